-- Messages that wait for their time. Every name begins with the broker's prefix, put in for {p}.

CREATE TABLE {p}scheduled (
    number   INTEGER PRIMARY KEY,        -- in the order of adding
    event_id TEXT    NOT NULL UNIQUE,
    topic    TEXT    NOT NULL,
    due      INTEGER NOT NULL,           -- microseconds; the time asked for is in the head
    taken    INTEGER NOT NULL DEFAULT 0, -- 1: it may be on the broker
    head     BLOB    NOT NULL,           -- as in the log
    payload  BLOB    NOT NULL
);

CREATE INDEX {p}scheduled_due ON {p}scheduled (due);

-- One row: who is at what is due.
CREATE TABLE {p}schedule (
    claim    INTEGER NOT NULL, -- rises each time something is taken
    taker    TEXT,             -- NULL: nobody is at it
    process  TEXT,
    boot     TEXT,             -- which start of the machine the deadline counts from
    deadline INTEGER,          -- milliseconds since then
    waiting  INTEGER NOT NULL, -- rows of scheduled
    version  INTEGER NOT NULL  -- rises when another message becomes the earliest
);

INSERT INTO {p}schedule (claim, waiting, version) VALUES (0, 0, 0);
