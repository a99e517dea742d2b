//! One line of the ledger: what was tried and what came of it, and the 64 bytes it is written as.

use std::fmt;

use crate::checksum::crc32c;
use crate::stamp::Stamp;

/// What is tried, or what happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
#[repr(u8)]
pub enum Operation {
    /// A client connected to the recorder, which notes it; `position` is the id of its process.
    Connect = 1,
    /// A client's connection ended, in order or because its process died; noted by the recorder.
    Disconnect,
    /// A message is published: the call that a user makes.
    Publish,
    /// A message is appended to an outbox within an open transaction; `position` is a number that
    /// the transaction has within its process. What becomes of the message, the commit decides.
    Append,
    /// The transaction with the number `position` commits; `fail` says it was rolled back.
    Commit,
    /// What an adapter answers the SDK about a message, one layer below [`Publish`](Self::Publish).
    /// If a ledger has any, it has those of all published messages.
    Send,
    /// A broker hands a message to a member of a group. `fail`: what it handed out is no payload of
    /// this run.
    Deliver,
    /// A handler runs: `invoke` before it begins, the outcome after.
    Handle,
    /// A group tells the broker that it is done with a message.
    Settle,
    /// A message was stored as a dead letter of a group.
    DeadLetter,
    /// A message was put aside with its key in the store of a group.
    Park,
    /// A group was told that messages vanished unread: `detail` positions of `place`, from
    /// `position` on.
    Gap,
    /// A message was found in the broker by the final reading.
    Stored,
    /// The final reading of all that the broker has, from the first position to the last.
    Reread,
    /// A message that only asks whether messages pass at present.
    Probe,
    /// A graceful shutdown of the group's consumer in this process, or of all where `group` is 0.
    Drain,
    /// A fault begins: `detail` is a [`Fault`], `position` its number.
    FaultBegin,
    /// The fault with the number `position` is over.
    FaultEnd,
    /// A measurement: `detail` is a [`Sample`], `position` its value.
    Sample,
    /// The recorder ended in order; a ledger without this lacks its end.
    Close,
}

impl Operation {
    const ALL: [Self; 20] = [
        Self::Connect,
        Self::Disconnect,
        Self::Publish,
        Self::Append,
        Self::Commit,
        Self::Send,
        Self::Deliver,
        Self::Handle,
        Self::Settle,
        Self::DeadLetter,
        Self::Park,
        Self::Gap,
        Self::Stored,
        Self::Reread,
        Self::Probe,
        Self::Drain,
        Self::FaultBegin,
        Self::FaultEnd,
        Self::Sample,
        Self::Close,
    ];

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code).checked_sub(1)?).copied()
    }
}

/// Before a call, or what came of it, in Jepsen's three values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum Phase {
    /// The call is about to begin. Whatever this announces has not happened yet.
    Invoke = 1,
    /// It was done. What merely happens, such as a delivery, has only this.
    Ok,
    /// It was surely not done, and never will be.
    Fail,
    /// Nobody knows: it may have been done, or may be done later.
    Unknown,
}

impl Phase {
    const ALL: [Self; 4] = [Self::Invoke, Self::Ok, Self::Fail, Self::Unknown];

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code).checked_sub(1)?).copied()
    }
}

/// What is done to the tried system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
#[repr(u16)]
pub enum Fault {
    /// A process of the tried service is killed.
    Kill = 1,
    /// A process stands still for a while.
    Stop,
    /// A process is told to shut down.
    Terminate,
    /// The broker's process is killed.
    BrokerKill,
    /// The broker's process stands still for a while.
    BrokerStop,
    /// Connections are cut.
    Cut,
    /// One side of a connection is gone, and the other does not hear of it.
    HalfOpen,
    /// Bytes are late.
    Delay,
    /// Bytes of one direction vanish.
    OneWayLoss,
    /// A connection ends within a message.
    Truncate,
    /// A request is served and its response lost.
    ResponseLoss,
    /// Nothing can be written.
    DiskFull,
    /// A member joins the group.
    MemberJoin,
    /// A member leaves the group.
    MemberLeave,
    /// The clock is set.
    ClockJump,
    /// Anything else.
    Other,
    /// The broker's process is told to shut down.
    BrokerTerminate,
}

impl Fault {
    const ALL: [Self; 17] = [
        Self::Kill,
        Self::Stop,
        Self::Terminate,
        Self::BrokerKill,
        Self::BrokerStop,
        Self::Cut,
        Self::HalfOpen,
        Self::Delay,
        Self::OneWayLoss,
        Self::Truncate,
        Self::ResponseLoss,
        Self::DiskFull,
        Self::MemberJoin,
        Self::MemberLeave,
        Self::ClockJump,
        Self::Other,
        Self::BrokerTerminate,
    ];

    /// The fault that a record speaks of; what a later version named is [`Other`](Self::Other).
    #[must_use]
    pub fn of(entry: &Entry) -> Self {
        let found = usize::try_from(entry.detail)
            .ok()
            .and_then(|detail| Self::ALL.get(detail.checked_sub(1)?));
        found.copied().unwrap_or(Self::Other)
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
#[repr(u16)]
pub enum Sample {
    /// Bytes of memory that the process has resident.
    ResidentBytes = 1,
    /// Messages delivered to a group's member and not settled.
    InFlight,
    /// Messages that wait in a queue of the process.
    Queued,
    /// Open file descriptors.
    Descriptors,
    /// Tasks or threads.
    Tasks,
    /// Connections opened within a minute.
    ConnectionsPerMinute,
    /// Messages that a group has still to settle.
    Lag,
}

impl Sample {
    const ALL: [Self; 7] = [
        Self::ResidentBytes,
        Self::InFlight,
        Self::Queued,
        Self::Descriptors,
        Self::Tasks,
        Self::ConnectionsPerMinute,
        Self::Lag,
    ];

    /// What a record measures, if this version knows it.
    #[must_use]
    pub fn of(entry: &Entry) -> Option<Self> {
        let detail = usize::try_from(entry.detail).ok()?;
        Self::ALL.get(detail.checked_sub(1)?).copied()
    }
}

/// What a client says; the rest of a [`Record`] is filled in on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Entry {
    /// What is tried.
    pub operation: Operation,
    /// With which message, if with one.
    pub stamp: Option<Stamp>,
    /// In which group; 0 is none.
    pub group: u16,
    /// Which of the group's deliveries or attempts it is, from 1; 0 where nobody counts.
    pub attempt: u16,
    /// On which partition; the harness numbers those of all topics.
    pub place: u32,
    /// Where on it, or what the operation says it is.
    pub position: Option<u64>,
    /// The checksum in the payload, 0 where no payload is at hand.
    pub checksum: u32,
    /// What the operation says it is.
    pub detail: u32,
}

impl Entry {
    /// About no message.
    #[must_use]
    pub fn new(operation: Operation) -> Self {
        Self {
            operation,
            stamp: None,
            group: 0,
            attempt: 0,
            place: 0,
            position: None,
            checksum: 0,
            detail: 0,
        }
    }

    /// About a message.
    #[must_use]
    pub fn of(operation: Operation, stamp: Stamp) -> Self {
        Self {
            stamp: Some(stamp),
            ..Self::new(operation)
        }
    }

    /// A fault that begins, or ends.
    #[must_use]
    pub fn fault(operation: Operation, fault: Fault, number: u64) -> Self {
        Self {
            detail: fault as u32,
            position: Some(number),
            ..Self::new(operation)
        }
    }

    /// A measurement.
    #[must_use]
    pub fn sample(sample: Sample, value: u64) -> Self {
        Self {
            detail: sample as u32,
            position: Some(value),
            ..Self::new(Operation::Sample)
        }
    }

    /// A gap of so many positions that a group was told of.
    #[must_use]
    pub fn gap(group: u16, place: u32, first: u64, count: u32) -> Self {
        Self {
            detail: count,
            ..Self::new(Operation::Gap)
                .with_group(group)
                .with_position(place, first)
        }
    }

    /// In a group.
    #[must_use]
    pub fn with_group(mut self, group: u16) -> Self {
        self.group = group;
        self
    }

    /// As such an attempt.
    #[must_use]
    pub fn with_attempt(mut self, attempt: u16) -> Self {
        self.attempt = attempt;
        self
    }

    /// At a position of a partition.
    #[must_use]
    pub fn with_position(mut self, place: u32, position: u64) -> Self {
        self.place = place;
        self.position = Some(position);
        self
    }

    /// In a transaction of this process.
    #[must_use]
    pub fn with_transaction(mut self, number: u64) -> Self {
        self.position = Some(number);
        self
    }

    /// With a payload of this checksum.
    #[must_use]
    pub fn with_checksum(mut self, checksum: u32) -> Self {
        self.checksum = checksum;
        self
    }
}

/// One line of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Record {
    /// Its place in the file, from 0; the recorder counts.
    pub sequence: u64,
    /// Nanoseconds of `CLOCK_MONOTONIC`, the same for all processes of a machine: before a call for
    /// an invoke, after it for an outcome.
    pub time: u64,
    /// Which connection to the recorder it came from; a process that comes again is another one.
    pub process: u32,
    /// Which caller in that process; a session has one call at a time, or one batch.
    pub session: u32,
    /// Before, or what came of it.
    pub phase: Phase,
    /// What it is about.
    pub entry: Entry,
}

const HAS_STAMP: u8 = 1;
const HAS_POSITION: u8 = 2;

impl Record {
    /// How many bytes each record has.
    ///
    /// ```text
    ///  0 sequence:u64   8 time:u64      16 position:u64  24 process:u32  28 session:u32
    /// 32 key:u32       36 key_seq:u32   40 checksum:u32  44 place:u32    48 detail:u32
    /// 52 producer:u16  54 group:u16     56 attempt:u16   58 operation    59 phase and flags
    /// 60 crc32c:u32 of what is before
    /// ```
    ///
    /// All numbers are little-endian. A message's id is not written: it follows from the run, which
    /// is in the header of the file, and the stamp.
    pub const BYTES: usize = 64;

    /// What happened at a time, by a session of a process; for histories that no recorder wrote.
    #[must_use]
    pub fn new(time: u64, process: u32, session: u32, phase: Phase, entry: Entry) -> Self {
        Self {
            sequence: 0,
            time,
            process,
            session,
            phase,
            entry,
        }
    }

    pub(crate) fn encode(&self) -> [u8; Self::BYTES] {
        let entry = &self.entry;
        let stamp = entry.stamp.unwrap_or(Stamp::new(0, 0, 0));
        let mut flags = 0;
        if entry.stamp.is_some() {
            flags |= HAS_STAMP;
        }
        if entry.position.is_some() {
            flags |= HAS_POSITION;
        }
        let mut bytes = [0; Self::BYTES];
        bytes[0..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.time.to_le_bytes());
        bytes[16..24].copy_from_slice(&entry.position.unwrap_or(0).to_le_bytes());
        bytes[24..28].copy_from_slice(&self.process.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.session.to_le_bytes());
        bytes[32..36].copy_from_slice(&stamp.key.to_le_bytes());
        bytes[36..40].copy_from_slice(&stamp.key_seq.to_le_bytes());
        bytes[40..44].copy_from_slice(&entry.checksum.to_le_bytes());
        bytes[44..48].copy_from_slice(&entry.place.to_le_bytes());
        bytes[48..52].copy_from_slice(&entry.detail.to_le_bytes());
        bytes[52..54].copy_from_slice(&stamp.producer.to_le_bytes());
        bytes[54..56].copy_from_slice(&entry.group.to_le_bytes());
        bytes[56..58].copy_from_slice(&entry.attempt.to_le_bytes());
        bytes[58] = entry.operation as u8;
        bytes[59] = self.phase as u8 | flags << 4;
        seal(&mut bytes);
        bytes
    }

    /// Reads a record; the error says what is wrong with its bytes.
    pub(crate) fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, String> {
        check_seal(bytes)?;
        let operation = Operation::from_code(bytes[58])
            .ok_or_else(|| format!("there is no operation {}", bytes[58]))?;
        let phase = Phase::from_code(bytes[59] & 0xf)
            .ok_or_else(|| format!("there is no phase {}", bytes[59] & 0xf))?;
        let flags = bytes[59] >> 4;
        let stamp = Stamp {
            producer: u16_at(bytes, 52),
            key: u32_at(bytes, 32),
            key_seq: u32_at(bytes, 36),
        };
        let entry = Entry {
            operation,
            stamp: (flags & HAS_STAMP != 0).then_some(stamp),
            group: u16_at(bytes, 54),
            attempt: u16_at(bytes, 56),
            place: u32_at(bytes, 44),
            position: (flags & HAS_POSITION != 0).then(|| u64_at(bytes, 16)),
            checksum: u32_at(bytes, 40),
            detail: u32_at(bytes, 48),
        };
        Ok(Self {
            sequence: u64_at(bytes, 0),
            time: u64_at(bytes, 8),
            process: u32_at(bytes, 24),
            session: u32_at(bytes, 28),
            phase,
            entry,
        })
    }
}

/// Writes the checksum of the first sixty bytes into the last four.
pub(crate) fn seal(bytes: &mut [u8; Record::BYTES]) {
    let checksum = crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&checksum.to_le_bytes());
}

/// Whether the last four bytes are the checksum of the others.
pub(crate) fn check_seal(bytes: &[u8; Record::BYTES]) -> Result<(), String> {
    let (said, computed) = (u32_at(bytes, 60), crc32c(&bytes[..60]));
    match said == computed {
        true => Ok(()),
        false => Err(format!(
            "its checksum is {said:08x}, its bytes have {computed:08x}"
        )),
    }
}

fn u16_at(bytes: &[u8; Record::BYTES], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn u32_at(bytes: &[u8; Record::BYTES], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8; Record::BYTES], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl fmt::Display for Record {
    /// One line that a reader understands without this file.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanos) = (self.time / 1_000_000_000, self.time % 1_000_000_000);
        let (entry, phase) = (&self.entry, self.phase);
        write!(
            formatter,
            "record {} at {seconds}.{nanos:09} process {} session {}: {:?} {}",
            self.sequence,
            self.process,
            self.session,
            entry.operation,
            format!("{phase:?}").to_lowercase(),
        )?;
        if let Some(stamp) = entry.stamp {
            write!(formatter, " of {stamp}")?;
        }
        if entry.group != 0 {
            write!(formatter, " group {}", entry.group)?;
        }
        if entry.attempt != 0 {
            write!(formatter, " attempt {}", entry.attempt)?;
        }
        if entry.checksum != 0 {
            write!(formatter, " checksum {:08x}", entry.checksum)?;
        }
        self.fmt_position(formatter)
    }
}

impl Record {
    fn fmt_position(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entry = &self.entry;
        let Some(position) = entry.position else {
            return Ok(());
        };
        match entry.operation {
            Operation::Connect => write!(formatter, " process id {position}"),
            Operation::Append | Operation::Commit => write!(formatter, " transaction {position}"),
            Operation::FaultBegin | Operation::FaultEnd => {
                write!(formatter, " number {position}: {:?}", Fault::of(entry))
            }
            Operation::Sample => match Sample::of(entry) {
                Some(sample) => write!(formatter, " {sample:?} {position}"),
                None => write!(formatter, " of kind {}: {position}", entry.detail),
            },
            Operation::Gap => write!(
                formatter,
                " of {} positions from {}:{position}",
                entry.detail, entry.place
            ),
            _ => write!(formatter, " at {}:{position}", entry.place),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Entry, Fault, Operation, Phase, Record, Sample};
    use crate::stamp::Stamp;

    #[test]
    fn codes_are_dense_and_never_change_place() {
        for (index, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, index + 1, "{operation:?}");
        }
        for (index, phase) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(phase as usize, index + 1, "{phase:?}");
        }
        for fault in Fault::ALL {
            let entry = Entry::fault(Operation::FaultBegin, fault, 1);
            assert_eq!(Fault::of(&entry), fault);
        }
        for sample in Sample::ALL {
            assert_eq!(Sample::of(&Entry::sample(sample, 1)), Some(sample));
        }
    }

    #[test]
    fn a_record_comes_back() {
        let full = Entry {
            detail: 13,
            ..Entry::of(Operation::Deliver, Stamp::new(1, 2, 3))
                .with_group(4)
                .with_attempt(5)
                .with_position(6, 7)
                .with_checksum(8)
        };
        for entry in [full, Entry::new(Operation::Close)] {
            for phase in Phase::ALL {
                let mut record = Record::new(9, 10, 11, phase, entry);
                record.sequence = 12;
                assert_eq!(Record::decode(&record.encode()), Ok(record));
            }
        }
    }

    #[test]
    fn a_changed_bit_is_noticed() {
        let entry = Entry::of(Operation::Publish, Stamp::new(1, 2, 3));
        let bytes = Record::new(1, 2, 3, Phase::Invoke, entry).encode();
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(Record::decode(&changed).is_err(), "bit {bit}");
        }
        assert!(Record::decode(&[0; Record::BYTES]).is_err());
    }

    #[test]
    fn a_line_says_what_happened() {
        let entry = Entry::of(Operation::Deliver, Stamp::new(1, 2, 3))
            .with_group(4)
            .with_position(6, 7);
        let record = Record::new(1_000_000_005, 10, 11, Phase::Ok, entry);
        assert_eq!(
            record.to_string(),
            "record 0 at 1.000000005 process 10 session 11: Deliver ok of 1/2#3 group 4 at 6:7"
        );
    }
}
