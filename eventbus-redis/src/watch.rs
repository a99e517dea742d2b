//! Hears of what other clients publish and change: one command of the server's that waits, for
//! everything that somebody here waits for.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use eventbus_core::Result;
use eventbus_core::log::LaneEnd;
use redis::Value;

use crate::database::Database;
use crate::leases::changes_key;
use crate::position::{self, EntryId, beyond};
use crate::server::WAIT;

const WATCH: &str = "watch for messages";
/// How long the server is left alone that did not answer.
const PAUSE: Duration = Duration::from_millis(200);

/// What a stream that is watched is about.
enum Watched {
    Lane(u32),
    Group(i64),
}

/// Watches while somebody waits, until it is aborted with its database.
pub(crate) async fn run(database: Arc<Database>) {
    // Up to where the changes of each group were seen.
    let mut seen = HashMap::new();
    loop {
        database.wakes.wanted().await;
        if let Err(error) = look(&database, &mut seen).await {
            if !error.is_retryable() {
                // One key fails the question about all: each reader is to see for itself.
                for row in database.wakes.watched_lanes() {
                    wake(&database, row);
                }
            }
            tracing::debug!(%error, "the server is watched again");
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Has a lane read, of which nobody knows whether there is more.
fn wake(database: &Database, row: u32) {
    if let Some(end) = database.wakes.end_of(row) {
        end.reaches(beyond(position::from(end.next()).id));
    }
}

async fn look(database: &Database, seen: &mut HashMap<i64, EntryId>) -> Result<()> {
    let (mut streams, mut after, mut watched) = (Vec::new(), Vec::new(), Vec::new());
    for row in database.wakes.watched_lanes() {
        let end = database.wakes.end_of(row).map(|end| LaneEnd::next(&end));
        if let (Some(stream), Some(end)) = (database.known.stream(row), end) {
            streams.push(stream.to_string());
            after.push(position::from(end).after().to_string());
            watched.push(Watched::Lane(row));
        }
    }
    for number in database.wakes.watched_groups() {
        if let Some(group) = database.known.group_name(number) {
            streams.push(changes_key(&group));
            after.push(seen.entry(number).or_default().to_string());
            watched.push(Watched::Group(number));
        }
    }
    if streams.is_empty() {
        tokio::time::sleep(PAUSE).await;
        return Ok(());
    }
    let mut wait = redis::cmd("XREAD");
    wait.arg("COUNT")
        .arg(1)
        .arg("BLOCK")
        .arg(WAIT.as_millis() as u64);
    wait.arg("STREAMS").arg(&streams).arg(after);
    let Value::Array(found) = database.server.waits.ask(WATCH, &wait).await? else {
        return Ok(());
    };
    let mut is_damaged = false;
    for (stream, id) in found.iter().filter_map(first_of) {
        let index = streams
            .iter()
            .position(|watched| watched.as_bytes() == stream);
        match (index.map(|index| &watched[index]), id) {
            (Some(Watched::Lane(row)), Ok(id)) => database.wakes.appended(&[(*row, beyond(id))]),
            // Who reads it says what is wrong; the others are not held up.
            (Some(Watched::Lane(row)), Err(_)) => {
                wake(database, *row);
                is_damaged = true;
            }
            (Some(Watched::Group(number)), Ok(id)) => {
                seen.insert(*number, id);
                // Later changes have later ids.
                database.wakes.group_changed(*number, generation(id));
            }
            // Members look at their group from time to time anyway.
            (Some(Watched::Group(_)), Err(_)) => is_damaged = true,
            (None, _) => {}
        }
    }
    if is_damaged {
        // What cannot be read comes at once again.
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

/// An id as a number that only rises.
fn generation(id: EntryId) -> i64 {
    ((id.millis << 12) | id.sequence.min(4095)) as i64
}

/// The name of a stream and the id of the first entry that was found in it.
fn first_of(stream: &Value) -> Option<(&[u8], Result<EntryId>)> {
    let Value::Array(parts) = stream else {
        return None;
    };
    let [Value::BulkString(name), Value::Array(entries)] = parts.as_slice() else {
        return None;
    };
    let Some(Value::Array(entry)) = entries.first() else {
        return None;
    };
    match entry.first() {
        Some(Value::BulkString(id)) => Some((name, EntryId::read(id))),
        _ => None,
    }
}
