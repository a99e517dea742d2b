//! What is asked of the tables of the schedule.

pub(super) const SELECT_STATE: &str = "
    SELECT taker, process, boot, deadline, waiting, version,
        (SELECT min(due) FROM {p}scheduled WHERE due > ?1),
        EXISTS (SELECT 1 FROM {p}scheduled WHERE due <= ?1)
    FROM {p}schedule";

pub(super) const SELECT_EARLIEST: &str = "
    SELECT min(due), (SELECT coalesce(max(number), 0) FROM {p}scheduled) FROM {p}scheduled";

pub(super) const ADD: &str = "
    INSERT INTO {p}scheduled (number, event_id, topic, due, head, payload)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6)
    ON CONFLICT (event_id) DO NOTHING
    RETURNING number";

/// Counts what was added, or removed, and whether something became the earliest.
pub(super) const COUNT: &str = "
    UPDATE {p}schedule SET waiting = max(waiting + ?1, 0), version = version + ?2
    RETURNING waiting, version";

pub(super) const CANCEL: &str = "
    DELETE FROM {p}scheduled WHERE event_id = ?1 AND taken = 0 RETURNING number";

pub(super) const SELECT_SIZES: &str = "
    SELECT number, length(head) + length(payload) FROM {p}scheduled
    WHERE due <= ?1 ORDER BY due, number LIMIT ?2 + 0";

pub(super) const SELECT_DUE: &str = "
    SELECT number, event_id, topic, head, payload FROM {p}scheduled
    WHERE number IN (SELECT value FROM json_each(?1)) ORDER BY due, number";

pub(super) const MARK_TAKEN: &str = "
    UPDATE {p}scheduled SET taken = 1 WHERE number IN (SELECT value FROM json_each(?1))";

pub(super) const CLAIM: &str = "
    UPDATE {p}schedule
    SET claim = claim + 1, taker = ?1, process = ?2, boot = ?3, deadline = ?4
    RETURNING claim";

pub(super) const END_CLAIM: &str = "
    UPDATE {p}schedule SET taker = NULL WHERE claim = ?1 AND taker IS NOT NULL RETURNING claim";

pub(super) const REMOVE: &str = "
    DELETE FROM {p}scheduled WHERE event_id = ?1 RETURNING number";

pub(super) const POSTPONE: &str =
    "UPDATE {p}scheduled SET due = ?2, taken = ?3 WHERE event_id = ?1";

pub(super) const LIST: &str = "
    SELECT number, event_id, topic, due, taken, head, length(payload) FROM {p}scheduled
    WHERE (due, number) > (?1, ?2)
    ORDER BY due, number LIMIT ?3 + 0";
