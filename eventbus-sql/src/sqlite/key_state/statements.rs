//! What is asked of the tables of held keys.

pub(super) const SELECT_VERSION: &str =
    "SELECT id, generation FROM {p}consumer_groups WHERE name = ?";

pub(super) const ADD_GROUP: &str = "
    INSERT INTO {p}consumer_groups (name, seen) VALUES (?1, ?2) ON CONFLICT (name) DO NOTHING";

pub(super) const CLAIM: &str = "
    INSERT INTO {p}claims (consumer_group, topic, partition, fence) VALUES (?1, ?2, ?3, 1)
    ON CONFLICT (consumer_group, topic, partition) DO UPDATE SET fence = fence + 1
    RETURNING fence";

pub(super) const SELECT_FENCE: &str = "
    SELECT fence FROM {p}claims WHERE consumer_group = ?1 AND topic = ?2 AND partition = ?3";

pub(super) const SELECT_NAMES: &str = "
    SELECT kind, name FROM {p}held_names
    WHERE consumer_group = ?1 AND topic = ?2 AND partition = ?3";

pub(super) const FIND_NAME: &str = "
    SELECT id, next_number, last_position FROM {p}held_names
    WHERE consumer_group = ?1 AND topic = ?2 AND partition = ?3 AND kind = ?4 AND name = ?5";

pub(super) const COUNT_NAMES: &str = "
    SELECT count(*) FROM {p}held_names
    WHERE consumer_group = ?1 AND topic = ?2 AND partition = ?3";

pub(super) const ADD_NAME: &str = "
    INSERT INTO {p}held_names (consumer_group, topic, partition, kind, name, since, next_number,
        until, attempts, first_failed, cause, error)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, 1, ?7, ?8, ?9, ?10, ?11)
    RETURNING id";

pub(super) const ADD_MESSAGE: &str = "
    INSERT INTO {p}held_messages (held_name, number, position, head, payload)
    VALUES (?1, ?2, ?3, ?4, ?5)";

pub(super) const NOTE_ADDED: &str = "
    UPDATE {p}held_names
    SET next_number = ?2, last_position = coalesce(?3, last_position) WHERE id = ?1";

pub(super) const SELECT_FIRST: &str = "
    SELECT message.number, message.position, message.head, message.payload, held.attempts,
        held.first_failed
    FROM {p}held_names AS held JOIN {p}held_messages AS message ON message.held_name = held.id
    WHERE held.id = ?1
    ORDER BY message.number LIMIT 1";

pub(super) const REMOVE_FIRST: &str = "
    DELETE FROM {p}held_messages
    WHERE held_name = ?1 AND number = ?2
        AND number = (SELECT min(number) FROM {p}held_messages WHERE held_name = ?1)
    RETURNING number";

/// What was decided of the first message is carried out with it; a discard goes on to the last.
pub(super) const NOTE_ADVANCED: &str = "
    UPDATE {p}held_names
    SET until = 0, attempts = 0, first_failed = NULL, cause = '', error = '',
        action = CASE action WHEN 'discard' THEN action END
    WHERE id = ?1";

pub(super) const REMOVE_NAME: &str = "DELETE FROM {p}held_names WHERE id = ?1";

pub(super) const WAIT: &str = "
    UPDATE {p}held_names
    SET until = ?6, attempts = ?7, first_failed = ?8, cause = ?9, error = ?10,
        action = CASE WHEN ?11 THEN NULL ELSE action END
    WHERE consumer_group = ?1 AND topic = ?2 AND partition = ?3 AND kind = ?4 AND name = ?5";

/// Two halves, so that each finds its names by an index and parked ones are not looked at.
pub(super) const SELECT_DUE: &str = "
    WITH mine AS (
        SELECT claim.topic, claim.partition
        FROM json_each(?2) AS mine JOIN {p}claims AS claim
            ON claim.consumer_group = ?1 AND claim.topic = mine.value->>0
            AND claim.partition = mine.value->>1 AND claim.fence = mine.value->>2
    )
    SELECT held.topic, held.partition, kind, name, until, attempts, first_failed, cause, error,
        action, decided_by, because, decided_at, until AS since_when
    FROM mine JOIN {p}held_names AS held
        ON held.consumer_group = ?1 AND held.topic = mine.topic
        AND held.partition = mine.partition AND until <= ?3
    WHERE action IS NULL
    UNION ALL
    SELECT held.topic, held.partition, kind, name, until, attempts, first_failed, cause, error,
        action, decided_by, because, decided_at, decided_at
    FROM mine JOIN {p}held_names AS held
        ON held.consumer_group = ?1 AND held.topic = mine.topic
        AND held.partition = mine.partition AND action IS NOT NULL
    ORDER BY since_when
    LIMIT ?4 + 0";

pub(super) const SELECT_NEXT_DUE: &str = "
    SELECT min(held.until)
    FROM json_each(?2) AS mine
    JOIN {p}held_names AS held
        ON held.consumer_group = ?1 AND held.topic = mine.value->>0
        AND held.partition = mine.value->>1
    WHERE held.action IS NULL AND held.until > ?3";

/// Places in the list of claims whose fence is not the latest.
pub(super) const SELECT_SUPERSEDED: &str = "
    SELECT mine.key
    FROM json_each(?2) AS mine LEFT JOIN {p}claims AS claim
        ON claim.consumer_group = ?1 AND claim.topic = mine.value->>0
        AND claim.partition = mine.value->>1
    WHERE claim.fence IS NOT mine.value->>2";

pub(super) const LIST: &str = "
    SELECT topic, partition, kind, name, until, attempts, first_failed, cause, error, action,
        decided_by, because, decided_at, since,
        (SELECT count(*) FROM {p}held_messages WHERE held_name = held.id)
    FROM {p}held_names AS held
    WHERE consumer_group = ?1
        AND (?2 IS NULL OR (topic, partition, kind, name) > (?2, ?3, ?4, ?5))
    ORDER BY topic, partition, kind, name
    LIMIT ?6 + 0";

pub(super) const SELECT_MESSAGES: &str = "
    SELECT message.number, message.position, message.head, message.payload, held.attempts,
        held.first_failed,
        message.number = (SELECT min(number) FROM {p}held_messages WHERE held_name = held.id)
    FROM {p}held_names AS held JOIN {p}held_messages AS message ON message.held_name = held.id
    WHERE held.consumer_group = ?1 AND held.topic = ?2 AND held.partition = ?3
        AND held.kind = ?4 AND held.name = ?5 AND message.number > ?6
    ORDER BY message.number LIMIT ?7 + 0";

pub(super) const DECIDE: &str = "
    UPDATE {p}held_names SET action = ?6, decided_by = ?7, because = ?8, decided_at = ?9
    WHERE consumer_group = ?1 AND topic = ?2 AND partition = ?3 AND kind = ?4 AND name = ?5
        AND action IS NULL
    RETURNING id";

pub(super) const NOTE_DECIDED: &str = "
    UPDATE {p}consumer_groups SET generation = generation + 1 WHERE name = ?
    RETURNING id, generation";
