-- Keys that are put aside. Every name begins with the broker's prefix, put in for {p}.

-- Who may write what a group holds on a partition.
CREATE TABLE {p}claims (
    consumer_group TEXT    NOT NULL,
    topic          TEXT    NOT NULL,
    partition      INTEGER NOT NULL,
    fence          INTEGER NOT NULL, -- rises with every claim
    PRIMARY KEY (consumer_group, topic, partition)
) WITHOUT ROWID;

CREATE TABLE {p}held_names (
    id             INTEGER PRIMARY KEY,
    consumer_group TEXT    NOT NULL,
    topic          TEXT    NOT NULL,
    partition      INTEGER NOT NULL,
    kind           INTEGER NOT NULL, -- 0: all of a key, 1: one message by itself
    name           BLOB    NOT NULL, -- the key, or the message's event id
    since          INTEGER NOT NULL, -- microseconds, as all times
    next_number    INTEGER NOT NULL,
    last_position  BLOB,             -- of the last message held; 16 bytes, big endian
    until          INTEGER,          -- NULL: parked
    attempts       INTEGER NOT NULL,
    first_failed   INTEGER,
    cause          TEXT    NOT NULL,
    error          TEXT    NOT NULL,
    action         TEXT,             -- what an operator decided, and is not carried out
    decided_by     TEXT,
    because        TEXT,
    decided_at     INTEGER,
    UNIQUE (consumer_group, topic, partition, kind, name)
);

CREATE INDEX {p}held_until ON {p}held_names (consumer_group, topic, partition, until);
CREATE INDEX {p}held_decided ON {p}held_names (consumer_group, topic, partition)
    WHERE action IS NOT NULL;

CREATE TABLE {p}held_messages (
    held_name INTEGER NOT NULL,
    number    INTEGER NOT NULL,
    position  BLOB,
    head      BLOB    NOT NULL, -- as in the log
    payload   BLOB    NOT NULL,
    PRIMARY KEY (held_name, number)
);
