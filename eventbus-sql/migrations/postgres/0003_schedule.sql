-- Messages that wait for their time. The broker's schema is put in for {s}; times are microseconds.

CREATE TABLE {s}.scheduled (
    number     bigint  PRIMARY KEY,            -- in the order of adding
    event_id   text    NOT NULL UNIQUE,
    topic      text    NOT NULL,
    not_before bigint  NOT NULL,               -- the time asked for
    due        bigint  NOT NULL,               -- later than that where the broker refused it
    taken      boolean NOT NULL DEFAULT false, -- it may be on the broker
    key        bytea,
    headers    bytea   NOT NULL,
    payload    bytea   NOT NULL
);

CREATE INDEX scheduled_due ON {s}.scheduled (due, number);

-- One row, locked by whoever changes what waits: who is at what is due.
CREATE TABLE {s}.schedule (
    claim    bigint NOT NULL, -- rises each time something is taken
    taker    text,            -- NULL: nobody is at it
    process  text,
    deadline bigint,          -- on the clock of the database
    number   bigint NOT NULL, -- the last one given
    waiting  bigint NOT NULL, -- rows of scheduled
    version  bigint NOT NULL  -- rises when another message becomes the earliest
) WITH (fillfactor = 10);

INSERT INTO {s}.schedule (claim, number, waiting, version) VALUES (0, 0, 0, 0);
