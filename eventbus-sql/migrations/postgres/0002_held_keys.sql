-- Keys that are put aside. The broker's schema is put in for {s}; times are microseconds.

-- Who may write what a group holds on a partition.
CREATE TABLE {s}.claims (
    consumer_group text    NOT NULL,
    topic          text    NOT NULL,
    partition      integer NOT NULL,
    fence          bigint  NOT NULL, -- rises with every claim
    PRIMARY KEY (consumer_group, topic, partition)
);

CREATE TABLE {s}.held_names (
    id             bigint  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    consumer_group text    NOT NULL,
    topic          text    NOT NULL COLLATE "C",
    partition      integer NOT NULL,
    kind           integer NOT NULL, -- 0: all of a key, 1: one message by itself
    name           bytea   NOT NULL, -- the key, or the message's event id
    since          bigint  NOT NULL,
    next_number    bigint  NOT NULL,
    last_position  bytea,            -- of the last message held; 16 bytes, big endian
    until          bigint,           -- NULL: parked
    attempts       integer NOT NULL,
    first_failed   bigint,
    cause          text    NOT NULL,
    error          text    NOT NULL,
    action         text,             -- what an operator decided, and is not carried out
    decided_by     text,
    because        text,
    decided_at     bigint,
    UNIQUE (consumer_group, topic, partition, kind, name)
);

CREATE INDEX held_until ON {s}.held_names (consumer_group, topic, partition, until);
CREATE INDEX held_decided ON {s}.held_names (consumer_group, topic, partition)
    WHERE action IS NOT NULL;

CREATE TABLE {s}.held_messages (
    held_name bigint NOT NULL,
    number    bigint NOT NULL,
    position  bytea,
    key       bytea,
    headers   bytea  NOT NULL,
    payload   bytea  NOT NULL,
    PRIMARY KEY (held_name, number)
);
