//! The file of what was tried: appended to by a recorder, read by the checker.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::record::{Entry, Operation, Phase, Record, check_seal, seal, u32_at};
use crate::stamp::RunId;

const MAGIC: [u8; 8] = *b"EBLEDGER";
const VERSION: u32 = 1;

/// A ledger that was read.
///
/// Takes 88 bytes of memory for each record.
#[derive(Clone, Debug)]
pub struct Ledger {
    run: RunId,
    /// In order of time; those of the same time in order of arrival.
    records: Vec<Record>,
    cut: Cut,
}

/// What was cut off the end of a ledger, because it was not written whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cut {
    /// How many records that is, one begun included.
    pub records: u64,
    /// How many bytes.
    pub bytes: u64,
}

impl Ledger {
    /// Reads a ledger. An end that was not written whole is [cut](Self::cut): bytes that are too few
    /// for a record, and damaged records that no whole one follows.
    ///
    /// # Errors
    ///
    /// [`Error::NotALedger`] for another header, [`Error::Damaged`] for a record that is damaged, or
    /// missing, before a whole one.
    pub fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|source| Error::io("open", path, source))?;
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let run = read_header(path, &mut reader)?;
        let mut records = Vec::with_capacity(length as usize / Record::BYTES);
        let mut cut = Cut::default();
        let mut damage = None;
        let mut offset = Record::BYTES as u64;
        loop {
            let mut bytes = [0; Record::BYTES];
            let length = read_full(&mut reader, &mut bytes)
                .map_err(|source| Error::io("read", path, source))?;
            if length == 0 {
                break;
            }
            let expected = records.len() as u64;
            let read = match length == Record::BYTES {
                true => Record::decode(&bytes),
                false => Err(format!("it ends after {length} bytes")),
            };
            match (read, damage.take()) {
                (Ok(_), Some((offset, what))) => return Err(Error::Damaged { offset, what }),
                (Ok(record), None) if record.sequence != expected => {
                    let what = format!("record {expected} is missing: {record}");
                    return Err(Error::Damaged { offset, what });
                }
                (Ok(record), None) => records.push(record),
                (Err(what), before) => {
                    cut.records += 1;
                    cut.bytes += length as u64;
                    damage = before.or(Some((offset, what)));
                }
            }
            offset += length as u64;
        }
        Ok(Self::in_order(run, records, cut))
    }

    /// A ledger of records that no recorder wrote, in the order they come: for simulations and tests.
    #[must_use]
    pub fn from_records(run: RunId, mut records: Vec<Record>) -> Self {
        for (sequence, record) in records.iter_mut().enumerate() {
            record.sequence = sequence as u64;
        }
        Self::in_order(run, records, Cut::default())
    }

    /// Clients are read by several threads of the recorder, so that the order of arrival is the
    /// order of events only within one client; the clock is the same for all.
    fn in_order(run: RunId, mut records: Vec<Record>, cut: Cut) -> Self {
        records.sort_unstable_by_key(|record| (record.time, record.sequence));
        Self { run, records, cut }
    }

    /// The run whose ledger this is.
    #[must_use]
    pub fn run(&self) -> RunId {
        self.run
    }

    /// The records, in order of time.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// What was cut off its end.
    #[must_use]
    pub fn cut(&self) -> Cut {
        self.cut
    }

    /// Whether the recorder ended it: otherwise something may have happened that is not in it.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let is_close = |record: &Record| record.entry.operation == Operation::Close;
        self.cut == Cut::default() && self.records.iter().rev().any(is_close)
    }
}

/// Appends records to a new ledger.
///
/// Each [`append`](Self::append) is one `write`, so that what it returned for is in the page cache
/// and outlives the process, though not the machine; [`sync`](Self::sync) makes it outlive that.
#[derive(Debug)]
pub struct LedgerWriter {
    path: PathBuf,
    file: File,
    /// The sequence of the next record.
    next: u64,
    buffer: Vec<u8>,
}

impl LedgerWriter {
    /// Creates a ledger.
    ///
    /// # Errors
    ///
    /// When the file is there already, or can't be written.
    pub fn create(path: &Path, run: RunId) -> Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .open(path)
            .map_err(|source| Error::io("create", path, source))?;
        let mut writer = Self {
            path: path.to_owned(),
            file,
            next: 0,
            buffer: header(run).to_vec(),
        };
        writer.write_buffer()?;
        Ok(writer)
    }

    /// Numbers the records and writes them.
    ///
    /// # Errors
    ///
    /// When they can't be written; the ledger may end within a record then, and takes no more.
    pub fn append(&mut self, records: &[Record]) -> Result<()> {
        self.buffer.clear();
        for record in records {
            let sequence = self.next;
            self.next += 1;
            let numbered = Record {
                sequence,
                ..*record
            };
            self.buffer.extend(numbered.encode());
        }
        self.write_buffer()
    }

    /// Returns when all that was appended is on the disk.
    ///
    /// # Errors
    ///
    /// Those of the disk.
    pub fn sync(&self) -> Result<()> {
        let synced = self.file.sync_data();
        synced.map_err(|source| Error::io("sync", &self.path, source))
    }

    /// Notes that the ledger ends here, and syncs it. The answer is how many records it has.
    ///
    /// # Errors
    ///
    /// Those of [`append`](Self::append) and [`sync`](Self::sync).
    pub fn close(mut self, time: u64) -> Result<u64> {
        let entry = Entry::new(Operation::Close);
        self.append(&[Record::new(time, 0, 0, Phase::Ok, entry)])?;
        self.sync()?;
        Ok(self.next)
    }

    /// The file again, for a thread that syncs it while others append.
    pub(crate) fn file(&self) -> Result<File> {
        let cloned = self.file.try_clone();
        cloned.map_err(|source| Error::io("open again", &self.path, source))
    }

    fn write_buffer(&mut self) -> Result<()> {
        let written = self.file.write_all(&self.buffer);
        written.map_err(|source| Error::io("write", &self.path, source))
    }
}

fn header(run: RunId) -> [u8; Record::BYTES] {
    let mut bytes = [0; Record::BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&(Record::BYTES as u32).to_le_bytes());
    bytes[16..20].copy_from_slice(&run.0.to_le_bytes());
    seal(&mut bytes);
    bytes
}

fn read_header(path: &Path, reader: &mut impl Read) -> Result<RunId> {
    let not_a_ledger = |what: String| Error::NotALedger {
        path: path.to_owned(),
        what,
    };
    let mut bytes = [0; Record::BYTES];
    let length = read_full(reader, &mut bytes).map_err(|source| Error::io("read", path, source))?;
    if length < Record::BYTES {
        return Err(not_a_ledger(format!("it has only {length} bytes")));
    }
    if bytes[..8] != MAGIC {
        let begin = bytes[..8].escape_ascii();
        return Err(not_a_ledger(format!("it begins with \"{begin}\"")));
    }
    check_seal(&bytes).map_err(|what| not_a_ledger(format!("its header is damaged: {what}")))?;
    let (version, size) = (u32_at(&bytes, 8), u32_at(&bytes, 12));
    if version != VERSION || size as usize != Record::BYTES {
        let what = format!("it is of version {version}, with {size} bytes a record");
        return Err(not_a_ledger(what));
    }
    Ok(RunId(u32_at(&bytes, 16)))
}

// What the documentation says of memory.
const _: () = assert!(size_of::<Record>() == 88);

/// Reads until the buffer is full or nothing comes any more.
fn read_full(reader: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match reader.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}
