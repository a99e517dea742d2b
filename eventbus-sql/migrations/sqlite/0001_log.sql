-- The log and who is how far in it. Every name begins with the broker's prefix, put in for {p}.

CREATE TABLE {p}topics (
    id              INTEGER PRIMARY KEY,
    name            TEXT    NOT NULL UNIQUE,
    partitions      INTEGER NOT NULL,
    first_lane      INTEGER NOT NULL UNIQUE, -- its partitions are this lane and the following ones
    retention       INTEGER,                 -- microseconds
    retention_bytes INTEGER
);

-- One partition of one topic.
CREATE TABLE {p}lanes (
    id     INTEGER PRIMARY KEY,
    base   INTEGER NOT NULL, -- the first position kept
    next   INTEGER NOT NULL, -- the position the next message gets
    newest INTEGER NOT NULL, -- when the last message was taken; never falls
    bytes  INTEGER NOT NULL, -- of keys, headers and payloads kept
    seal   INTEGER NOT NULL  -- checksum of id, base, next, newest
);

-- Clustered by place: id = lane << 44 | position.
CREATE TABLE {p}messages (
    id      INTEGER PRIMARY KEY,
    head    BLOB NOT NULL, -- checksum, time, lengths, key, headers
    payload BLOB NOT NULL
);

CREATE TABLE {p}consumer_groups (
    id      INTEGER PRIMARY KEY,
    name    TEXT    NOT NULL UNIQUE,
    seen    INTEGER NOT NULL,           -- when it last had a member
    expired INTEGER NOT NULL DEFAULT 0, -- retention may pass it
    generation INTEGER NOT NULL DEFAULT 0 -- rises when members or leases change
);

-- How far a group is on a lane, and which member holds it.
CREATE TABLE {p}cursors (
    consumer_group INTEGER NOT NULL,
    lane           INTEGER NOT NULL,
    position       INTEGER NOT NULL,           -- the first position not settled
    seal           INTEGER NOT NULL,           -- checksum of group, lane, position
    epoch          INTEGER NOT NULL DEFAULT 0, -- rises each time it is granted
    holder         TEXT,
    PRIMARY KEY (consumer_group, lane)
) WITHOUT ROWID;

CREATE TABLE {p}members (
    id             TEXT    PRIMARY KEY,
    consumer_group INTEGER NOT NULL,
    process        TEXT    NOT NULL,
    topics         TEXT    NOT NULL, -- a line for each: name, partitions
    boot           TEXT    NOT NULL, -- which start of the machine the deadline counts from
    deadline       INTEGER NOT NULL, -- milliseconds since then
    renewals       INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
