-- What a service commits together with its own writes. The schema is put in for {s}.

-- Messages that wait to be published; rows are inserted and deleted, never changed unless they are
-- damaged. The columns are those that Debezium's event router takes by default, and what a relay
-- needs. Rows come and go all the time, so what is dead is cleared away
-- without pauses; reading begins behind it.
CREATE TABLE {s}.outbox (
    position           bigint    GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    lane               integer   NOT NULL, -- -1 - lane where the row is damaged
    id                 text      NOT NULL, -- the event's
    aggregatetype      text      NOT NULL, -- the topic, as the broker names it
    aggregateid        text,               -- the key, where it is text
    key                bytea,              -- the key, where it is not
    type               text      NOT NULL, -- the event's; empty where the message does not say it
    payload            bytea     NOT NULL,
    headers            bytea     NOT NULL,
    created_at         timestamp NOT NULL DEFAULT (clock_timestamp() AT TIME ZONE 'UTC'),
    tracingspancontext text                -- as java.util.Properties are written
) WITH (autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

CREATE INDEX outbox_lane ON {s}.outbox (lane, position);

-- The events that a group has handled. Their order on disk is nearly that of their time, so the
-- oldest are found by the ranges of pages alone.
CREATE TABLE {s}.inbox (
    consumer_group text   NOT NULL COLLATE "C",
    event_id       text   NOT NULL COLLATE "C",
    handled_at     bigint NOT NULL, -- microseconds
    PRIMARY KEY (consumer_group, event_id)
);

CREATE INDEX inbox_handled_at ON {s}.inbox USING brin (handled_at) WITH (pages_per_range = 32, autosummarize = on);
