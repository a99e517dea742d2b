-- What a service commits together with its own writes. Every name begins with the broker's prefix,
-- put in for {p}.

-- Messages that wait to be published; rows are inserted and deleted, never changed unless they
-- are damaged. The columns are those that Debezium's event router takes by default, and what a relay
-- needs.
CREATE TABLE {p}outbox (
    position           INTEGER PRIMARY KEY AUTOINCREMENT, -- in the order of commits, never given again
    lane               INTEGER NOT NULL, -- -1 - lane where the row is damaged
    id                 TEXT    NOT NULL, -- the event's
    aggregatetype      TEXT    NOT NULL, -- the topic, as the broker names it
    aggregateid        TEXT,             -- the key; a BLOB where it is no text
    type               TEXT    NOT NULL, -- the event's; empty where the message does not say it
    payload            BLOB    NOT NULL,
    headers            BLOB    NOT NULL, -- as the head of a row of the log: checksum, key, headers
    created_at         INTEGER NOT NULL, -- microseconds
    tracingspancontext TEXT              -- as java.util.Properties are written
);

CREATE INDEX {p}outbox_lane ON {p}outbox (lane, position);

-- The events that a group has handled. Rows are in the order of their time, so the oldest are found
-- without an index of it.
CREATE TABLE {p}inbox (
    consumer_group TEXT    NOT NULL,
    event_id       TEXT    NOT NULL,
    handled_at     INTEGER NOT NULL, -- microseconds
    PRIMARY KEY (consumer_group, event_id)
);

-- Who holds a place that is no partition of the log.
CREATE TABLE {p}leases (
    consumer_group INTEGER NOT NULL,
    topic          TEXT    NOT NULL,
    partition      INTEGER NOT NULL,
    epoch          INTEGER NOT NULL, -- rises each time it is granted
    holder         TEXT,
    PRIMARY KEY (consumer_group, topic, partition)
) WITHOUT ROWID;

-- A member may be one of several groups. Those there are join again when they renew.
DROP TABLE {p}members;
CREATE TABLE {p}members (
    consumer_group INTEGER NOT NULL,
    id             TEXT    NOT NULL,
    process        TEXT    NOT NULL,
    topics         TEXT    NOT NULL, -- a line for each: name, partitions
    boot           TEXT    NOT NULL, -- which start of the machine the deadline counts from
    deadline       INTEGER NOT NULL, -- milliseconds since then
    renewals       INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (consumer_group, id)
) WITHOUT ROWID;
