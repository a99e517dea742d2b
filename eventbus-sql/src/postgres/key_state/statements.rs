//! What is asked of the tables of held keys.

pub(super) const SELECT_VERSION: &str =
    "SELECT id, generation FROM {s}.consumer_groups WHERE name = $1";

pub(super) const ADD_GROUP: &str = "
    INSERT INTO {s}.consumer_groups (name, seen) VALUES ($1, {now}) ON CONFLICT (name) DO NOTHING";

pub(super) const CLAIM: &str = "
    INSERT INTO {s}.claims AS mine (consumer_group, topic, partition, fence) VALUES ($1, $2, $3, 1)
    ON CONFLICT (consumer_group, topic, partition) DO UPDATE SET fence = mine.fence + 1
    RETURNING fence";

/// Held until the commit, so that a later claim waits for what is written under this one.
pub(super) const LOCK_FENCE: &str = "
    SELECT fence FROM {s}.claims
    WHERE consumer_group = $1 AND topic = $2 AND partition = $3 FOR UPDATE";

pub(super) const SELECT_NAMES: &str = "
    SELECT kind, name FROM {s}.held_names
    WHERE consumer_group = $1 AND topic = $2 AND partition = $3";

pub(super) const FIND_NAME: &str = "
    SELECT id, next_number, last_position FROM {s}.held_names
    WHERE consumer_group = $1 AND topic = $2 AND partition = $3 AND kind = $4 AND name = $5
    FOR UPDATE";

pub(super) const COUNT_NAMES: &str = "
    SELECT count(*) FROM {s}.held_names
    WHERE consumer_group = $1 AND topic = $2 AND partition = $3";

pub(super) const ADD_NAME: &str = "
    INSERT INTO {s}.held_names (consumer_group, topic, partition, kind, name, since, next_number,
        until, attempts, first_failed, cause, error)
    VALUES ($1, $2, $3, $4, $5, {now}, 1, $6, $7, $8, $9, $10)
    RETURNING id";

pub(super) const ADD_MESSAGE: &str = "
    INSERT INTO {s}.held_messages (held_name, number, position, key, headers, payload)
    VALUES ($1, $2, $3, $4, $5, $6)";

pub(super) const NOTE_ADDED: &str = "
    UPDATE {s}.held_names
    SET next_number = $2, last_position = coalesce($3, last_position) WHERE id = $1";

pub(super) const SELECT_FIRST: &str = "
    SELECT message.number, message.position, message.key, message.headers, message.payload,
        held.attempts, held.first_failed
    FROM {s}.held_names AS held JOIN {s}.held_messages AS message ON message.held_name = held.id
    WHERE held.id = $1
    ORDER BY message.number LIMIT 1";

pub(super) const REMOVE_FIRST: &str = "
    DELETE FROM {s}.held_messages
    WHERE held_name = $1 AND number = $2
        AND number = (SELECT min(number) FROM {s}.held_messages WHERE held_name = $1)
    RETURNING number";

/// What was decided of the first message is carried out with it; a discard goes on to the last.
pub(super) const NOTE_ADVANCED: &str = "
    UPDATE {s}.held_names
    SET until = 0, attempts = 0, first_failed = NULL, cause = '', error = '',
        action = CASE action WHEN 'discard' THEN action END
    WHERE id = $1";

pub(super) const REMOVE_NAME: &str = "DELETE FROM {s}.held_names WHERE id = $1";

pub(super) const WAIT: &str = "
    UPDATE {s}.held_names
    SET until = $6, attempts = $7, first_failed = $8, cause = $9, error = $10,
        action = CASE WHEN $11 THEN NULL ELSE action END
    WHERE consumer_group = $1 AND topic = $2 AND partition = $3 AND kind = $4 AND name = $5";

/// Two halves, so that each finds its names by an index and parked ones are not looked at.
pub(super) const SELECT_DUE: &str = "
    WITH mine AS (
        SELECT claim.topic, claim.partition
        FROM unnest($2::text[], $3::int[], $4::bigint[]) AS mine(topic, partition, fence)
        JOIN {s}.claims AS claim
            ON claim.consumer_group = $1 AND claim.topic = mine.topic
            AND claim.partition = mine.partition AND claim.fence = mine.fence
    )
    SELECT held.topic, held.partition, kind, name, until, attempts, first_failed, cause, error,
        action, decided_by, because, decided_at, until AS since_when
    FROM mine JOIN {s}.held_names AS held
        ON held.consumer_group = $1 AND held.topic = mine.topic
        AND held.partition = mine.partition AND until <= $5
    WHERE action IS NULL
    UNION ALL
    SELECT held.topic, held.partition, kind, name, until, attempts, first_failed, cause, error,
        action, decided_by, because, decided_at, decided_at
    FROM mine JOIN {s}.held_names AS held
        ON held.consumer_group = $1 AND held.topic = mine.topic
        AND held.partition = mine.partition AND action IS NOT NULL
    ORDER BY since_when
    LIMIT $6";

pub(super) const SELECT_NEXT_DUE: &str = "
    SELECT min(held.until)
    FROM unnest($2::text[], $3::int[], $4::bigint[]) AS mine(topic, partition, fence)
    JOIN {s}.held_names AS held
        ON held.consumer_group = $1 AND held.topic = mine.topic
        AND held.partition = mine.partition
    WHERE held.action IS NULL AND held.until > $5";

/// Places in the list of claims, from 1, whose fence is not the latest.
pub(super) const SELECT_SUPERSEDED: &str = "
    SELECT mine.at
    FROM unnest($2::text[], $3::int[], $4::bigint[]) WITH ORDINALITY
        AS mine(topic, partition, fence, at)
    LEFT JOIN {s}.claims AS claim
        ON claim.consumer_group = $1 AND claim.topic = mine.topic
        AND claim.partition = mine.partition
    WHERE claim.fence IS DISTINCT FROM mine.fence";

pub(super) const LIST: &str = "
    SELECT topic, partition, kind, name, until, attempts, first_failed, cause, error, action,
        decided_by, because, decided_at, since,
        (SELECT count(*) FROM {s}.held_messages WHERE held_name = held.id)
    FROM {s}.held_names AS held
    WHERE consumer_group = $1
        AND ($2::text IS NULL
            OR (topic, partition, kind, name) > ($2::text COLLATE \"C\", $3::int, $4::int, $5::bytea))
    ORDER BY topic, partition, kind, name
    LIMIT $6";

pub(super) const SELECT_MESSAGES: &str = "
    SELECT message.number, message.position, message.key, message.headers, message.payload,
        held.attempts, held.first_failed,
        message.number = (SELECT min(number) FROM {s}.held_messages WHERE held_name = held.id)
    FROM {s}.held_names AS held JOIN {s}.held_messages AS message ON message.held_name = held.id
    WHERE held.consumer_group = $1 AND held.topic = $2 AND held.partition = $3
        AND held.kind = $4 AND held.name = $5 AND message.number > $6
    ORDER BY message.number LIMIT $7";

pub(super) const DECIDE: &str = "
    UPDATE {s}.held_names SET action = $6, decided_by = $7, because = $8, decided_at = $9
    WHERE consumer_group = $1 AND topic = $2 AND partition = $3 AND kind = $4 AND name = $5
        AND action IS NULL
    RETURNING id";

pub(super) const NOTE_DECIDED: &str = "
    UPDATE {s}.consumer_groups SET generation = generation + 1 WHERE name = $1
    RETURNING id, generation";
