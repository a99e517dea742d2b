//! What is asked of the tables of the schedule. Whoever changes what waits locks the row of `schedule`
//! first, so that nobody waits in a circle.

/// By itself, so that what is read behind it is as whoever held it before left it.
pub(super) const LOCK: &str = "SELECT claim FROM {s}.schedule FOR UPDATE";

pub(super) const SELECT_STATE: &str = "
    SELECT taker, process, deadline - {now}, waiting, version,
        (SELECT min(due) FROM {s}.scheduled WHERE due > $1),
        EXISTS (SELECT 1 FROM {s}.scheduled WHERE due <= $1)
    FROM {s}.schedule";

/// Adds those whose ids do not wait, and counts them; says whether one of them is the earliest now.
pub(super) const ADD: &str = "
    WITH before AS MATERIALIZED (
        SELECT (SELECT min(due) FROM {s}.scheduled) AS earliest, number FROM {s}.schedule
    ), added AS (
        INSERT INTO {s}.scheduled (number, event_id, topic, not_before, due, key, headers, payload)
        SELECT (SELECT number FROM before) + new.number, new.id, new.topic, new.due, new.due, new.key,
            new.headers, new.payload
        FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bytea[], $5::bytea[], $6::bytea[])
            WITH ORDINALITY AS new(id, topic, due, key, headers, payload, number)
        ORDER BY new.number
        ON CONFLICT (event_id) DO NOTHING
        RETURNING due
    ), news AS (
        SELECT count(*) AS messages,
            coalesce(min(due) < (SELECT coalesce(earliest, 9223372036854775807) FROM before), false)
                AS is_earlier
        FROM added
    )
    UPDATE {s}.schedule
    SET number = schedule.number + cardinality($1::text[]), waiting = waiting + news.messages,
        version = version + news.is_earlier::int
    FROM news
    RETURNING waiting, version, news.is_earlier";

pub(super) const CANCEL: &str = "
    WITH gone AS (
        DELETE FROM {s}.scheduled WHERE event_id = $1 AND NOT taken RETURNING 1
    )
    UPDATE {s}.schedule SET waiting = greatest(waiting - 1, 0) WHERE EXISTS (SELECT 1 FROM gone)
    RETURNING 1";

/// What is due and fits: the first in any case.
pub(super) const SELECT_DUE: &str = "
    SELECT number, event_id, topic, not_before, key, headers, payload
    FROM (
        SELECT first.*, sum(size) OVER (ORDER BY due, number) AS bytes
        FROM (
            SELECT scheduled.*, coalesce(octet_length(key), 0) + octet_length(headers)
                + octet_length(payload) AS size
            FROM {s}.scheduled WHERE due <= $1 ORDER BY due, number LIMIT $2
        ) AS first
    ) AS sized
    WHERE bytes <= $3 OR bytes = size
    ORDER BY due, number";

pub(super) const MARK_TAKEN: &str = "
    UPDATE {s}.scheduled SET taken = true WHERE number = ANY($1)";

pub(super) const CLAIM: &str = "
    UPDATE {s}.schedule SET claim = claim + 1, taker = $1, process = $2, deadline = {now} + $3
    RETURNING claim";

pub(super) const END_CLAIM: &str = "
    UPDATE {s}.schedule SET taker = NULL WHERE claim = $1 AND taker IS NOT NULL RETURNING claim";

pub(super) const REMOVE: &str = "
    WITH gone AS (
        DELETE FROM {s}.scheduled WHERE event_id = ANY($1) RETURNING 1
    )
    UPDATE {s}.schedule SET waiting = greatest(waiting - (SELECT count(*) FROM gone), 0)";

pub(super) const POSTPONE: &str = "
    UPDATE {s}.scheduled AS mine SET due = later.due, taken = later.taken
    FROM unnest($1::text[], $2::bigint[], $3::boolean[]) AS later(id, due, taken)
    WHERE mine.event_id = later.id";

pub(super) const LIST: &str = "
    SELECT number, event_id, topic, due, taken, key, headers, octet_length(payload)::bigint
    FROM {s}.scheduled WHERE (due, number) > ($1, $2)
    ORDER BY due, number LIMIT $3";
