//! What an input does to a database.

use std::path::Path;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

/// Most changes of one input.
const CHANGES_MAX: usize = 8;
const PAGE: usize = 4096;

/// Words that changes of rows consist of.
pub(super) const WORDS: &[&str] = &[
    "topics name 0 text orders\n",
    "topics partitions 0 integer 4294967295\n",
    "topics first_lane 0 integer 524286\n",
    "topics retention 0 integer -1\n",
    "lanes next 0 integer 17592186044416\n",
    "lanes seal 0 integer 0\n",
    "messages id 0 integer 9223372036854775807\n",
    "messages head 0 blob 00\n",
    "messages payload 0 text changed\n",
    "messages id 3 delete\n",
    "consumer_groups name 0 text pay ments\n",
    "consumer_groups generation 0 integer 9223372036854775807\n",
    "cursors lane 0 integer 4294967296\n",
    "cursors epoch 0 integer 9223372036854775807\n",
    "cursors position 0 integer -1\n",
    "cursors holder 0 text nobody\n",
    "members topics 0 text orders 4294967295\n",
    "members process 0 text a/1/2\n",
    "members id 0 text 7\n",
    "members deadline 0 integer 9223372036854775807\n",
    "members renewals 0 integer 9223372036854775807\n",
    "claims fence 0 integer 9223372036854775807\n",
    "held_names next_number 0 integer 9223372036854775807\n",
    "held_names kind 0 integer 7\n",
    "held_names name 0 blob ff\n",
    "held_names attempts 0 integer -1\n",
    "held_names action 0 text dance\n",
    "held_names until 0 integer -9223372036854775808\n",
    "held_names last_position 0 blob ff\n",
    "held_messages number 0 integer 17592186044417\n",
    "held_messages position 0 blob ff\n",
    "scheduled number 0 integer 9223372036854775807\n",
    "scheduled number 0 integer 17592186044417\n",
    "scheduled due 0 integer -9223372036854775808\n",
    "scheduled event_id 0 text \n",
    "scheduled topic 0 text no topic\n",
    "schedule claim 0 integer 9223372036854775807\n",
    "schedule waiting 0 integer -1\n",
    "schedule version 0 integer 9223372036854775807\n",
    "schedule taker 0 text x\n",
    "schedule process 0 null\n",
    "outbox lane 0 integer 9223372036854775807\n",
    "outbox position 0 integer 9223372036854775807\n",
    "outbox id 0 blob 00\n",
    "outbox aggregatetype 0 text no topic\n",
    "outbox created_at 0 text later\n",
    "inbox handled_at 0 real 1.5\n",
    "leases epoch 0 integer 9223372036854775807\n",
    "leases partition 0 integer -1\n",
    "schema version 0 integer 99\n",
    "schema version 0 null\n",
    "text ",
    "integer ",
    "blob ",
    "real ",
    "null",
    "delete",
];

/// Five bytes a change: what is done, three bytes where, and with which byte.
pub(super) fn of_bytes(sound: &[u8], data: &[u8]) -> Vec<u8> {
    let mut file = sound.to_vec();
    let (changes, _) = data.as_chunks::<5>();
    for [what, a, b, c, value] in changes.iter().take(CHANGES_MAX) {
        if file.is_empty() {
            break;
        }
        let at = u32::from_be_bytes([0, *a, *b, *c]) as usize % file.len();
        match what % 5 {
            0 => file[at] ^= 1 << (value % 8),
            1 => file[at] = *value,
            2 => file
                .iter_mut()
                .skip(at)
                .take(16)
                .for_each(|byte| *byte = *value),
            3 => {
                let page = at / PAGE * PAGE;
                file.iter_mut()
                    .skip(page)
                    .take(PAGE)
                    .for_each(|byte| *byte = 0);
            }
            _ => file.truncate(at),
        }
    }
    file
}

/// A line a change: table, column, number of the row, kind of value, value.
pub(super) async fn of_rows(path: &Path, data: &[u8]) {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal);
    let mut connection = options.connect().await.expect("it is a database");
    let text = String::from_utf8_lossy(data);
    for line in text.lines().take(CHANGES_MAX) {
        // What is no change, or is one that the tables do not take, changes nothing.
        let _ = change(&mut connection, line).await;
    }
    connection.close().await.expect("it can be closed");
}

async fn change(connection: &mut SqliteConnection, line: &str) -> Option<()> {
    let mut words = line.splitn(4, ' ');
    let (table, column, row) = (words.next()?, words.next()?, words.next()?);
    let is_name = |name: &str| {
        let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
        !name.is_empty() && name.bytes().all(is_letter)
    };
    let row: i64 = row.parse().ok()?;
    if !is_name(table) || !is_name(column) {
        return None;
    }
    let of_row = format!("{column} IN (SELECT {column} FROM eventbus_{table} LIMIT 1 OFFSET ?1)");
    let (kind, value) = {
        let rest = words.next()?;
        rest.split_once(' ').unwrap_or((rest, ""))
    };
    let sql = match kind {
        "delete" => format!("DELETE FROM eventbus_{table} WHERE {of_row}"),
        _ => format!("UPDATE eventbus_{table} SET {column} = ?2 WHERE {of_row}"),
    };
    let query = sqlx::query(AssertSqlSafe(sql)).bind(row);
    let query = match kind {
        "delete" => query,
        "integer" => query.bind(value.parse::<i64>().ok()?),
        "real" => query.bind(value.parse::<f64>().ok()?),
        "blob" => query.bind(bytes_of(value)),
        "null" => query.bind(None::<i64>),
        _ => query.bind(value.to_owned()),
    };
    query.execute(connection).await.ok()?;
    Some(())
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex
        .chars()
        .filter_map(|digit| digit.to_digit(16))
        .map(|digit| digit as u8)
        .collect();
    digits
        .chunks_exact(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect()
}
