//! Reading streams as logs: pages of several lanes in one question, each with what the stream says of
//! itself at that moment, so that a gap is seen.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use eventbus_core::log::{PAGE_ROWS, Page, Unpacked, Wakes, Wanted};
use eventbus_core::{Error, ErrorKind, Position, Result, Start, Timestamp};
use redis::{Cmd, Pipeline, RedisResult, Value};

use crate::error::is_full;
use crate::position::{self, EntryId};
use crate::record::Reader;
use crate::server::Server;
use crate::topics::stream;

const READ: &str = "read messages";

/// How far the clocks of two servers may be apart of which one takes the other's place.
const CLOCKS_APART: Duration = Duration::from_secs(60);

/// Bytes that a page should have.
const PAGE_BYTES: usize = 2 * 1024 * 1024;
/// What a message is taken for of whose size nothing is known.
const SIZE_FIRST: usize = PAGE_BYTES / 32;

/// A server whose memory is full lets it run all the same: reading makes room.
///
/// How many entries were ever added and are there, and the first and last ids; nothing where there is
/// no stream.
const LOOK: &str = "#!lua flags=no-writes,allow-oom
    if redis.call('EXISTS', KEYS[1]) == 0 then return false end
    local info = redis.call('XINFO', 'STREAM', KEYS[1])
    local found = {}
    for i = 1, #info, 2 do found[info[i]] = info[i + 1] end
    return {found['entries-added'], found['length'],
        found['recorded-first-entry-id'], found['last-generated-id']}";

/// What `LOOK` says and a page, in one step: for a server whose memory is full, which takes no
/// transactions.
const PAGE: &str = "#!lua flags=no-writes,allow-oom
    local found = redis.call('XREAD', 'COUNT', ARGV[1], 'STREAMS', KEYS[1], ARGV[2])
    if redis.call('EXISTS', KEYS[1]) == 0 then return {false, found} end
    local info = redis.call('XINFO', 'STREAM', KEYS[1])
    local look = {}
    for i = 1, #info, 2 do look[info[i]] = info[i + 1] end
    return {{look['entries-added'], look['length'], look['recorded-first-entry-id'],
        look['last-generated-id']}, found}";

/// How many entries come at or after an id, at most so many, the last one looked at, and how many were
/// ever added.
const COUNT: &str = "#!lua flags=no-writes,allow-oom
    local found = redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
    local info = redis.call('XINFO', 'STREAM', KEYS[1])
    local added = 0
    for i = 1, #info, 2 do if info[i] == 'entries-added' then added = info[i + 1] end end
    return {#found, #found > 0 and found[#found][1] or '', added}";
const COUNT_MAX: u64 = 1000;

/// What a stream says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Look {
    /// Entries that were ever added.
    pub(crate) added: u64,
    /// Entries that are there.
    pub(crate) length: u64,
    first: EntryId,
    last: EntryId,
}

impl Look {
    pub(crate) fn read(reply: Value) -> Result<Self> {
        let read = || {
            let Value::Array(parts) = reply else {
                return Some(Ok(Self::default()));
            };
            let [
                Value::Int(added),
                Value::Int(length),
                Value::BulkString(first),
                Value::BulkString(last),
            ] = parts.as_slice()
            else {
                return None;
            };
            let ids = EntryId::read(first).and_then(|first| Ok((first, EntryId::read(last)?)));
            Some(ids.map(|(first, last)| Self {
                added: *added as u64,
                length: *length as u64,
                first,
                last,
            }))
        };
        read().unwrap_or_else(|| Err(unreadable()))
    }

    /// Entries that were added and are gone.
    pub(crate) fn gone(&self) -> u64 {
        self.added.saturating_sub(self.length)
    }

    /// The place of the first entry, or of the next one where there is none.
    pub(crate) fn base(&self) -> Position {
        match (self.length, self.added) {
            (0, 0) => Position(0),
            (0, _) => self.end(),
            _ => position::entry(self.first, self.gone() + 1),
        }
    }

    /// The place behind the last entry.
    pub(crate) fn end(&self) -> Position {
        match self.added {
            0 => Position(0),
            added => position::behind(self.last, added),
        }
    }

    /// Whether the stream knows less than was read: it lost its end, as in a failover to a replica that
    /// had not got all of it, or another one has begun, with lower ids.
    pub(crate) fn has_lost(&self, from: position::From) -> bool {
        self.added > 0 && (self.added < from.before || self.last < from.id)
    }

    /// Whether entries at or behind this place, which nobody read, are gone.
    ///
    /// As long as one before it is there, none behind it was trimmed. Otherwise exactly those before it
    /// are gone, unless more are, or the stream was removed and another one has begun.
    fn has_gap(&self, from: position::From) -> bool {
        let has_earlier = self.length > 0 && self.first <= from.after();
        !has_earlier && self.gone() != from.before
    }
}

fn unreadable() -> Error {
    Error::new(
        ErrorKind::Codec,
        READ,
        "the server answered what cannot be read: look at its version",
    )
}

/// Reads pages, and remembers how large messages are.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    /// By row, the largest message of the last page; more after a page that did not come.
    sizes: Mutex<HashMap<u32, usize>>,
}

impl Pages {
    fn count(&self, row: u32) -> usize {
        let sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        let size = sizes.get(&row).copied().unwrap_or(SIZE_FIRST);
        (PAGE_BYTES / size.max(1)).clamp(1, PAGE_ROWS as usize)
    }

    /// Has less asked for after pages that did not come, perhaps because there was too much in them.
    fn expect_larger(&self, wanted: &[Wanted]) {
        let mut sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        for wanted in wanted {
            let size = sizes.entry(wanted.row).or_insert(SIZE_FIRST);
            *size = (*size * 4).min(PAGE_BYTES);
        }
    }

    fn remember(&self, row: u32, messages: &[Unpacked]) {
        if let Some(size) = messages.iter().map(|message| message.size).max() {
            let mut sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
            sizes.insert(row, size);
        }
    }

    /// What is asked for pages: two commands each in one transaction, which costs the server less, or
    /// one script each.
    fn questions(&self, wanted: &[Wanted], together: bool) -> Pipeline {
        let mut pipeline = Pipeline::with_capacity(2 * wanted.len());
        if together {
            pipeline.atomic();
        }
        for wanted in wanted {
            let stream = stream(&wanted.topic, wanted.row - wanted.topic.first_lane);
            let after = position::from(wanted.from).after().to_string();
            let count = self.count(wanted.row);
            if together {
                pipeline.add_command(ask_look(&stream));
                pipeline.cmd("XREAD").arg("COUNT").arg(count);
                pipeline.arg("STREAMS").arg(&stream).arg(after);
            } else {
                pipeline.cmd("EVAL").arg(PAGE).arg(1).arg(&stream);
                pipeline.arg(count).arg(after);
            }
        }
        pipeline
    }

    /// Reads one page for each that is wanted.
    pub(crate) async fn read(
        &self,
        server: &Server,
        wakes: &Wakes,
        wanted: &[Wanted],
    ) -> Result<Vec<Page>> {
        let together = self.questions(wanted, true);
        let mut replies: RedisResult<Vec<Value>> = server.reads.send(&together).await;
        if replies.as_ref().is_err_and(is_full) {
            let pages = server.reads.send(&self.questions(wanted, false)).await;
            let pages: RedisResult<Vec<(Value, Value)>> = pages;
            replies = pages.map(|pages| pages.into_iter().flat_map(<[Value; 2]>::from).collect());
        }
        let replies = replies.map_err(|error| {
            self.expect_larger(wanted);
            crate::error::into_error(READ, error)
        })?;
        let mut replies = replies.into_iter();
        let mut pages = Vec::with_capacity(wanted.len());
        for wanted in wanted {
            let (Some(look), Some(entries)) = (replies.next(), replies.next()) else {
                return Err(unreadable());
            };
            let partition = wanted.row - wanted.topic.first_lane;
            let page = async {
                let look = Look::read(look)?;
                match self.page(wakes, wanted, look, entries)? {
                    Found::Page(page) => Ok(page),
                    Found::Lost => {
                        let stream = stream(&wanted.topic, partition);
                        let at = again(server, READ, &stream, look, wanted.from).await?;
                        let end = look.end();
                        Ok(Page::Restarted { at, end })
                    }
                }
            };
            pages.push(page.await.map_err(|error: Error| {
                error
                    .with("topic", &wanted.topic.name)
                    .with("partition", partition)
            })?);
        }
        Ok(pages)
    }

    fn page(&self, wakes: &Wakes, wanted: &Wanted, look: Look, entries: Value) -> Result<Found> {
        let from = position::from(wanted.from);
        if look.has_lost(from) {
            wakes.corrects(wanted.row, wanted.to, look.end());
            return Ok(Found::Lost);
        }
        if look.has_gap(from) {
            return Ok(Found::Page(gap(wakes, wanted, look)));
        }
        if look.end() > wanted.to {
            // The watch sees one more entry at a time: whoever followed it would read pages of one.
            wakes.appended(&[(wanted.row, look.end())]);
        }
        let entries = entries_of(entries)?;
        let is_empty = entries.is_empty();
        let mut messages = Vec::with_capacity(entries.len());
        let mut reader = Reader::default();
        for (number, entry) in (from.before + 1..).zip(entries) {
            let message = unpack(&mut reader, wanted, number, entry)?;
            if message.position >= wanted.to {
                break;
            }
            messages.push(message);
        }
        self.remember(wanted.row, &messages);
        let reaches_end = match messages.last() {
            Some(last) => position::from(last.position).id == look.last,
            None => true,
        };
        if reaches_end {
            // What the writer and the watch say of an end is later than the end itself.
            wakes.corrects(wanted.row, wanted.to, look.end());
        }
        if let (Some(first), Some(last), true) = (messages.first(), messages.last(), reaches_end) {
            let (first, last) = (
                position::from(first.position),
                position::from(last.position),
            );
            let counted = last.before + 1;
            match counted.cmp(&look.added) {
                Ordering::Equal => {}
                // It lost its end, and became longer than it was since.
                Ordering::Greater => return Ok(Found::Lost),
                // Somebody removed some of these, or some in the pages before.
                Ordering::Less => {
                    let number = first.before + 1 + (look.added - counted);
                    let base = position::entry(first.id, number);
                    return Ok(Found::Page(Page::Gone { base }));
                }
            }
        }
        if !messages.is_empty() {
            return Ok(Found::Page(Page::Messages(messages)));
        }
        if is_empty && look.added > from.before {
            return Ok(Found::Page(Page::Gone { base: look.end() }));
        }
        // Nobody can go on from a place that does not say how many entries were before it: the next ones
        // would be numbered wrongly, and passed over.
        let next = match position::is_beyond(wanted.to) {
            true if is_empty => look.end(),
            true => wanted.from,
            false => wanted.to.min(look.end()),
        };
        Ok(Found::Page(Page::Nothing { next }))
    }
}

/// What a look at a stream and its entries came to.
enum Found {
    Page(Page),
    /// The stream knows less than was read.
    Lost,
}

/// Where reading goes on behind a gap.
fn gap(wakes: &Wakes, wanted: &Wanted, look: Look) -> Page {
    if look.added == 0 {
        // Removed as a whole: it is told when something is there again.
        wakes.corrects(wanted.row, wanted.to, wanted.from);
        return Page::Nothing { next: wanted.from };
    }
    Page::Gone { base: look.base() }
}

/// The entries of what `XREAD` answers for one stream.
fn entries_of(reply: Value) -> Result<Vec<Value>> {
    let streams = match reply {
        Value::Nil => return Ok(Vec::new()),
        Value::Array(streams) => streams,
        _ => return Err(unreadable()),
    };
    let Some(Value::Array(mut stream)) = streams.into_iter().next() else {
        return Ok(Vec::new());
    };
    match stream.pop() {
        Some(Value::Array(entries)) => Ok(entries),
        _ => Err(unreadable()),
    }
}

fn unpack(reader: &mut Reader, wanted: &Wanted, number: u64, entry: Value) -> Result<Unpacked> {
    let Value::Array(parts) = entry else {
        return Err(unreadable());
    };
    let mut parts = parts.into_iter();
    let (Some(Value::BulkString(id)), Some(fields)) = (parts.next(), parts.next()) else {
        return Err(unreadable());
    };
    let id = EntryId::read(&id)?;
    let Value::Array(fields) = fields else {
        return Err(unreadable());
    };
    let message = reader.read(&wanted.topic.name, fields);
    Ok(Unpacked {
        position: position::entry(id, number),
        time: time_of(id),
        size: message.size(),
        message,
    })
}

fn time_of(id: EntryId) -> Timestamp {
    // 48 bits of milliseconds fit.
    Timestamp::from_micros(id.millis as i64 * 1000)
}

/// Asks what a stream says of itself, for [`Look::read`].
pub(crate) fn ask_look(stream: &str) -> Cmd {
    let mut look = redis::cmd("EVAL");
    look.arg(LOOK).arg(1).arg(stream);
    look
}

/// What a stream says of itself.
pub(crate) async fn look(server: &Server, operation: &'static str, stream: &str) -> Result<Look> {
    Look::read(server.control.ask(operation, &ask_look(stream)).await?)
}

/// Where reading goes on in a stream that lost its end, by somebody who had read up to `from`. What was
/// added since has ids by another server's clock, which may be behind the one before: so a little
/// of what was read is read again.
pub(crate) async fn again(
    server: &Server,
    operation: &'static str,
    stream: &str,
    look: Look,
    from: Position,
) -> Result<Position> {
    let known = position::from(from).id.min(look.last);
    let millis = known.millis.saturating_sub(CLOCKS_APART.as_millis() as u64);
    let time = EntryId {
        millis,
        sequence: 0,
    };
    at_time(server, operation, stream, time_of(time)).await
}

/// Where one begins on a stream that looks like that.
pub(crate) async fn start(
    server: &Server,
    operation: &'static str,
    stream: &str,
    seen: Look,
    start: Start,
) -> Result<Position> {
    match start {
        Start::Latest => Ok(seen.end()),
        Start::Position(position) => Ok(position.min(seen.end())),
        Start::Time(time) => at_time(server, operation, stream, time.into()).await,
        _ => Ok(seen.base()),
    }
}

/// The place of the first entry that was added at a time or later; behind the last one where there is
/// none.
pub(crate) async fn at_time(
    server: &Server,
    operation: &'static str,
    stream: &str,
    time: Timestamp,
) -> Result<Position> {
    let micros = u64::try_from(time.as_micros()).unwrap_or(0);
    let wanted = EntryId {
        millis: micros.div_ceil(1000),
        sequence: 0,
    };
    loop {
        let before = look(server, operation, stream).await?;
        if before.length == 0 || before.last < wanted {
            return Ok(before.end());
        }
        if before.first >= wanted {
            return Ok(before.base());
        }
        let (later, added) = count_from(server, operation, stream, wanted).await?;
        let after = look(server, operation, stream).await?;
        // Where some were removed meanwhile, the count is of other entries.
        if after.gone() == before.gone() && later <= added {
            return Ok(position::entry(wanted, added - later + 1));
        }
    }
}

/// How many entries come at or after an id, of how many that were ever added.
async fn count_from(
    server: &Server,
    operation: &'static str,
    stream: &str,
    id: EntryId,
) -> Result<(u64, u64)> {
    let (mut from, mut total) = (id.to_string(), 0);
    loop {
        let mut count = redis::cmd("EVAL");
        count
            .arg(COUNT)
            .arg(1)
            .arg(stream)
            .arg(&from)
            .arg(COUNT_MAX);
        let (found, last, added): (u64, String, u64) =
            server.control.ask(operation, &count).await?;
        total += found;
        if found < COUNT_MAX {
            return Ok((total, added));
        }
        from = format!("({last}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use eventbus_core::log::TopicLanes;
    use eventbus_core::{LaneTable, Limits, Topic};

    use super::*;

    fn id(millis: u64) -> EntryId {
        EntryId {
            millis,
            sequence: 0,
        }
    }

    fn look(added: u64, length: u64, first: u64, last: u64) -> Look {
        Look {
            added,
            length,
            first: id(first),
            last: id(last),
        }
    }

    #[test]
    fn only_what_nobody_read_is_a_gap() {
        let read_to = position::from(position::behind(id(30), 3));
        for (look, has_gap, what) in [
            (look(5, 5, 10, 50), false, "nothing is gone"),
            (
                look(5, 3, 30, 50),
                false,
                "what was read is gone, but for one",
            ),
            (look(5, 2, 40, 50), false, "what was read is gone"),
            (look(3, 0, 0, 30), false, "all that was read is gone"),
            (look(5, 1, 50, 50), true, "one more is gone"),
            (look(5, 0, 0, 50), true, "all are gone"),
            (look(9, 9, 60, 99), true, "another stream has as many"),
            (look(0, 0, 0, 0), true, "there is no stream"),
        ] {
            assert_eq!(look.has_gap(read_to), has_gap, "{what}");
        }
        let nothing_read = position::from(Position(0));
        assert!(!look(0, 0, 0, 0).has_gap(nothing_read));
        assert!(!look(2, 2, 10, 20).has_gap(nothing_read));
    }

    #[test]
    fn a_stream_that_knows_less_than_was_read_has_lost_its_end() {
        let read_to = position::from(position::behind(id(30), 3));
        for (look, has_lost, what) in [
            (look(3, 3, 10, 30), false, "nothing is lost"),
            (look(3, 0, 0, 30), false, "all that was read is removed"),
            (look(2, 2, 10, 20), true, "the last one is lost"),
            (look(2, 2, 10, 40), true, "two are, and one was added"),
            (look(7, 7, 10, 29), true, "another stream has lower ids"),
            (
                look(0, 0, 0, 0),
                false,
                "it is removed: nothing is there to read",
            ),
        ] {
            assert_eq!(look.has_lost(read_to), has_lost, "{what}");
        }
        assert!(!look(2, 2, 10, 20).has_lost(position::from(Position(0))));
    }

    /// What comes of a page of entries with these ids.
    fn found(from: Position, look: Look, ids: &[u64]) -> Found {
        let topic = Topic::from_static("orders");
        let mut lanes = LaneTable::new(Limits::default());
        let wanted = Wanted {
            lane: lanes.open(),
            topic: Arc::new(TopicLanes::new(topic, 1, 7)),
            row: 7,
            from,
            to: Position(u128::MAX),
        };
        let entry = |millis: &u64| {
            Value::Array(vec![
                Value::BulkString(format!("{millis}-0").into_bytes()),
                Value::Array(Vec::new()),
            ])
        };
        let stream = vec![
            Value::BulkString(b"orders".to_vec()),
            Value::Array(ids.iter().map(entry).collect()),
        ];
        let reply = Value::Array(vec![Value::Array(stream)]);
        let found = Pages::default().page(&Wakes::new(), &wanted, look, reply);
        found.expect("it can be read")
    }

    #[test]
    fn a_stream_that_lost_its_end_and_grew_since_is_seen_by_its_count() {
        // 100 were read, 90 of them are left, and 15 were added.
        let from = position::behind(id(100), 100);
        let ids: Vec<u64> = (101..116).collect();
        let found = found(from, look(105, 105, 1, 115), &ids);
        assert!(matches!(found, Found::Lost));
    }

    #[test]
    fn what_was_removed_in_the_middle_before_it_was_read_is_a_gap() {
        let from = position::behind(id(10), 1);
        let ids = [20, 40];
        let look = look(4, 3, 10, 40);
        let Found::Page(Page::Gone { base }) = found(from, look, &ids) else {
            panic!("entry 3 is gone");
        };
        assert_eq!(base, position::entry(id(20), 3));
        let Found::Page(Page::Messages(messages)) = found(base, look, &ids) else {
            panic!("the others are there");
        };
        let positions: Vec<_> = messages.iter().map(|it| it.position).collect();
        assert_eq!(
            positions,
            [position::entry(id(20), 3), position::entry(id(40), 4)]
        );
    }

    #[test]
    fn what_was_removed_at_the_end_before_it_was_read_is_a_gap() {
        let from = position::behind(id(30), 3);
        let look = look(4, 3, 10, 40);
        let Found::Page(Page::Gone { base }) = found(from, look, &[]) else {
            panic!("entry 4 is gone");
        };
        assert_eq!(base, look.end());
    }

    #[test]
    fn what_was_added_between_a_wake_and_its_page_is_read_next() {
        let topic = Topic::from_static("orders");
        let topic = Arc::new(TopicLanes::new(topic, 1, 7));
        let mut lanes = LaneTable::new(Limits::default());
        let mut wanted = Wanted {
            lane: lanes.open(),
            topic,
            row: 7,
            from: position::behind(id(30), 3),
            // Entry 3 was just heard of, and is read already.
            to: position::beyond(id(30)),
        };
        let wakes = Wakes::new();
        let end = wakes.lane(7, wanted.to);
        let entry = Value::Array(vec![
            Value::BulkString(b"40-0".to_vec()),
            Value::Array(Vec::new()),
        ]);
        let stream = vec![
            Value::BulkString(b"orders".to_vec()),
            Value::Array(vec![entry]),
        ];
        let reply = Value::Array(vec![Value::Array(stream)]);
        let look = look(4, 4, 10, 40);
        let read = |wanted: &Wanted| {
            // The watch goes on meanwhile.
            wakes.appended(&[(7, position::beyond(id(35)))]);
            let page = Pages::default().page(&wakes, wanted, look, reply.clone());
            match page.expect("it can be read") {
                Found::Page(page) => page,
                Found::Lost => panic!("nothing is lost"),
            }
        };
        let Page::Nothing { next } = read(&wanted) else {
            panic!("it is behind what was heard of");
        };
        assert_eq!(next, wanted.from, "it is not passed over");
        assert_eq!(end.next(), look.end(), "and what comes behind it, too");
        wanted.to = end.next();
        let Page::Messages(messages) = read(&wanted) else {
            panic!("it is there");
        };
        let positions: Vec<_> = messages.iter().map(|it| it.position).collect();
        assert_eq!(positions, [position::entry(id(40), 4)]);
    }

    #[test]
    fn a_stream_begins_at_what_is_there_and_ends_behind_it() {
        assert_eq!(look(5, 3, 30, 50).base(), position::entry(id(30), 3));
        assert_eq!(look(5, 3, 30, 50).end(), position::behind(id(50), 5));
        assert_eq!(look(5, 0, 0, 50).base(), position::behind(id(50), 5));
        assert_eq!(look(0, 0, 0, 0).base(), Position(0));
    }
}
