-- The log and who is how far in it. The broker's schema is put in for {s}; times are microseconds.

CREATE TABLE {s}.topics (
    id              bigint  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name            text    NOT NULL UNIQUE,
    partitions      integer NOT NULL,
    first_lane      integer NOT NULL UNIQUE, -- its partitions are this lane and the following ones
    retention       bigint,
    retention_bytes bigint
);

-- One partition of one topic. Whoever publishes to it holds its row until the commit, so that
-- positions become visible in their order. Half of a page is left for the next version of its rows.
CREATE TABLE {s}.lanes (
    id     integer PRIMARY KEY,
    base   bigint NOT NULL, -- the first position kept
    next   bigint NOT NULL, -- the position the next message gets
    newest bigint NOT NULL, -- when the last message was taken; never falls
    bytes  bigint NOT NULL  -- of keys, headers and payloads kept
) WITH (fillfactor = 50);

CREATE TABLE {s}.messages (
    lane     integer NOT NULL,
    position bigint  NOT NULL, -- dense per lane
    taken    bigint  NOT NULL, -- when
    key      bytea,
    headers  bytea   NOT NULL,
    payload  bytea   NOT NULL,
    PRIMARY KEY (lane, position)
);

CREATE TABLE {s}.consumer_groups (
    id         bigint  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name       text    NOT NULL UNIQUE,
    seen       bigint  NOT NULL,               -- when it last had a member
    expired    boolean NOT NULL DEFAULT false, -- retention may pass it
    generation bigint  NOT NULL DEFAULT 0      -- rises when members, leases or decisions change
) WITH (fillfactor = 50);

-- How far a group is on a lane.
CREATE TABLE {s}.cursors (
    consumer_group bigint  NOT NULL,
    lane           integer NOT NULL,
    position       bigint  NOT NULL, -- the first position not settled
    PRIMARY KEY (consumer_group, lane)
) WITH (fillfactor = 50);

-- Which member holds a place: a partition of a topic, or whatever else a group shares out.
CREATE TABLE {s}.leases (
    consumer_group bigint  NOT NULL,
    topic          text    NOT NULL,
    partition      integer NOT NULL,
    lane           integer,          -- NULL where the topic is none of this broker's
    epoch          bigint  NOT NULL, -- rises each time it is granted
    holder         text,
    PRIMARY KEY (consumer_group, topic, partition)
) WITH (fillfactor = 50);

CREATE UNIQUE INDEX leases_by_lane ON {s}.leases (consumer_group, lane);

CREATE TABLE {s}.members (
    id             text   PRIMARY KEY,
    consumer_group bigint NOT NULL,
    process        text   NOT NULL,
    topics         text   NOT NULL, -- a line for each: name, partitions
    deadline       bigint NOT NULL, -- on the clock of the database
    renewals       bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
