//! Writes down what clients say, in a process that nobody kills.
//!
//! ```text
//!  tried process ── invoke ──▶ ┐                     ┌▶ one write a batch ▶ page cache ─ each second ▶ disk
//!  tried process ── ok ──────▶ ├ socket ▶ a thread ──┤
//!  harness ─────── fault ────▶ ┘         a client    └▶ answer to a flush, after a sync
//! ```
//!
//! The tried processes may be killed at any time: what they sent is in the socket, the thread reads
//! it to its end, and only then notes that the client is gone.

pub(crate) mod wire;

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::clock::monotonic_nanos;
use crate::error::{Error, Result};
use crate::ledger::LedgerWriter;
use crate::record::{Entry, Operation, Phase, Record};
use crate::stamp::RunId;

/// How many clients may be connected at a time.
const CLIENTS_MAX: usize = 1024;

/// How long a client may take for its first sixteen bytes.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

const SYNC_EVERY: Duration = Duration::from_secs(1);

/// How long records may gather in a client's socket, which a kill takes nothing from. To be woken,
/// and to write, for each of them takes the tried processes more time than all else here.
const GATHER: Duration = Duration::from_micros(100);

/// How many bytes are read, and written, at a time.
const BATCH_BYTES: usize = 1024 * Record::BYTES;

/// A recorder that listens; dropping it without [`stop`](Self::stop) leaves the ledger without its
/// end, as a crash would, and its threads run on until the process ends.
///
/// It belongs into a process of its own, which the program `eventbus-recorder` is; within a tried
/// process it is of use only for tests that kill nothing.
#[derive(Debug)]
pub struct Recorder {
    socket: PathBuf,
    shared: Arc<Shared>,
    acceptor: JoinHandle<Vec<JoinHandle<()>>>,
    syncer: JoinHandle<()>,
    /// Dropped to end the syncer.
    ends_syncer: Sender<()>,
}

#[derive(Debug)]
struct Shared {
    run: RunId,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    writer: LedgerWriter,
    /// What went wrong first; from then on nothing is written and nobody is listened to.
    error: Option<Error>,
    is_stopping: bool,
    clients: HashMap<u32, UnixStream>,
    /// The number of the next client.
    next: u32,
}

impl Recorder {
    /// Creates the ledger and listens on the socket.
    ///
    /// # Errors
    ///
    /// When either is there already, or can't be made.
    pub fn start(ledger: &Path, socket: &Path, run: RunId) -> Result<Self> {
        let writer = LedgerWriter::create(ledger, run)?;
        let file = writer.file()?;
        let listener =
            UnixListener::bind(socket).map_err(|source| Error::io("listen on", socket, source))?;
        let shared = Arc::new(Shared {
            run,
            state: Mutex::new(State {
                writer,
                error: None,
                is_stopping: false,
                clients: HashMap::new(),
                next: 1,
            }),
        });
        let (ends_syncer, ended) = channel();
        let (for_acceptor, for_syncer) = (Arc::clone(&shared), Arc::clone(&shared));
        let ledger = ledger.to_owned();
        Ok(Self {
            socket: socket.to_owned(),
            shared,
            acceptor: thread::spawn(move || accept(&listener, &for_acceptor)),
            syncer: thread::spawn(move || sync(&file, &ledger, &ended, &for_syncer)),
            ends_syncer,
        })
    }

    /// The socket it listens on.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Takes what was sent until now, ends all connections, and closes the ledger. The answer is
    /// how many records it has.
    ///
    /// # Errors
    ///
    /// The first thing that went wrong while it ran, such as a full disk: the ledger has no end then.
    pub fn stop(self) -> Result<u64> {
        {
            let mut state = self.shared.lock();
            state.is_stopping = true;
            state.hang_up();
        }
        // Wakes the acceptor; if nobody listens any more, it needs no waking.
        drop(UnixStream::connect(&self.socket));
        for client in self.acceptor.join().expect("the acceptor does not panic") {
            client.join().expect("a client's thread does not panic");
        }
        drop(self.ends_syncer);
        self.syncer.join().expect("the syncer does not panic");
        // Whether it can be removed changes nothing of what was recorded.
        drop(std::fs::remove_file(&self.socket));
        let shared = Arc::into_inner(self.shared).expect("all threads have ended");
        let state = shared.state.into_inner();
        let state = state.unwrap_or_else(PoisonError::into_inner);
        match state.error {
            Some(error) => Err(error),
            None => state.writer.close(monotonic_nanos()),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Writes records, unless something went wrong before.
    fn append(&mut self, records: &[Record]) -> std::result::Result<(), Ended> {
        if self.error.is_some() {
            return Err(Ended::Failed);
        }
        match self.writer.append(records) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.fail(error);
                Err(Ended::Failed)
            }
        }
    }

    fn fail(&mut self, error: Error) {
        self.error.get_or_insert(error);
        self.hang_up();
    }

    /// Lets clients send no more. What they sent is still read.
    fn hang_up(&self) {
        for stream in self.clients.values() {
            // One that is gone already needs no more.
            drop(stream.shutdown(Shutdown::Read));
        }
    }
}

/// Why a client is not listened to any longer.
enum Ended {
    /// It hung up, so many bytes after the last whole record.
    Gone(usize),
    /// It sent something that is no record.
    Nonsense,
    /// Nothing can be written any more.
    Failed,
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) -> Vec<JoinHandle<()>> {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    loop {
        let accepted = listener.accept();
        {
            let mut state = shared.lock();
            if state.is_stopping || state.error.is_some() {
                return threads;
            }
            if let Err(error) = &accepted
                && error.kind() != ErrorKind::Interrupted
            {
                let what = format!("nobody can connect any more: {error}");
                state.fail(Error::gone(what));
                return threads;
            }
        }
        threads.retain(|thread| !thread.is_finished());
        // One too many finds its connection closed, which it takes for a recorder that is gone.
        if let Ok((stream, _)) = accepted
            && threads.len() < CLIENTS_MAX
        {
            let shared = Arc::clone(shared);
            threads.push(thread::spawn(move || serve(stream, &shared)));
        }
    }
}

fn serve(mut stream: UnixStream, shared: &Shared) {
    // Who does not greet is no client, and nothing of it is in the ledger.
    let Some(process) = greet(&mut stream, shared) else {
        return;
    };
    let ended = listen(&mut stream, shared, process);
    let mut state = shared.lock();
    state.clients.remove(&process);
    let (phase, left) = match ended {
        Ended::Gone(0) => (Phase::Ok, 0),
        Ended::Gone(left) => (Phase::Unknown, left),
        Ended::Nonsense => (Phase::Fail, 0),
        Ended::Failed => return,
    };
    let mut entry = Entry::new(Operation::Disconnect);
    entry.detail = left as u32;
    let record = Record::new(monotonic_nanos(), process, 0, phase, entry);
    // If this fails, `stop` tells why.
    drop(state.append(&[record]));
}

/// Gives a client its number, and notes that it is there before it can do anything.
fn greet(stream: &mut UnixStream, shared: &Shared) -> Option<u32> {
    let mut hello = [0; wire::GREETING_BYTES];
    stream.set_read_timeout(Some(GREETING_LIMIT)).ok()?;
    stream.read_exact(&mut hello).ok()?;
    let process_id = wire::read_hello(&hello)?;
    stream.set_read_timeout(None).ok()?;
    let process = {
        let mut state = shared.lock();
        if state.is_stopping {
            return None;
        }
        let process = state.next;
        state.next += 1;
        let mut entry = Entry::new(Operation::Connect);
        entry.position = Some(u64::from(process_id));
        let record = Record::new(monotonic_nanos(), process, 0, Phase::Ok, entry);
        state.append(&[record]).ok()?;
        state.clients.insert(process, stream.try_clone().ok()?);
        process
    };
    let welcome = wire::welcome(shared.run, process);
    // One that died meanwhile is noted by `listen`, at once.
    drop(stream.write_all(&welcome));
    Some(process)
}

fn listen(stream: &mut UnixStream, shared: &Shared, process: u32) -> Ended {
    let mut buffer = vec![0; BATCH_BYTES];
    let mut filled = 0;
    let mut written = 0;
    let mut batch = Vec::with_capacity(BATCH_BYTES / Record::BYTES);
    loop {
        let read = match stream.read(&mut buffer[filled..]) {
            Ok(0) => return Ended::Gone(filled),
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return Ended::Gone(filled),
        };
        filled += read;
        let (frames, rest) = buffer[..filled].as_chunks::<{ Record::BYTES }>();
        let left = rest.len();
        for frame in frames {
            let taken = match wire::is_flush(frame) {
                true => flush(stream, shared, &mut batch, &mut written),
                false => collect(frame, process, &mut batch),
            };
            if let Err(ended) = taken {
                return ended;
            }
        }
        if let Err(ended) = write(shared, &mut batch, &mut written) {
            return ended;
        }
        buffer.copy_within(filled - left..filled, 0);
        filled = left;
        if read < BATCH_BYTES / 2 {
            thread::sleep(GATHER);
        }
    }
}

fn collect(
    frame: &[u8; Record::BYTES],
    process: u32,
    batch: &mut Vec<Record>,
) -> std::result::Result<(), Ended> {
    match Record::decode(frame) {
        Ok(record) if record.process == process => {
            batch.push(record);
            Ok(())
        }
        _ => Err(Ended::Nonsense),
    }
}

fn write(
    shared: &Shared,
    batch: &mut Vec<Record>,
    written: &mut u64,
) -> std::result::Result<(), Ended> {
    if batch.is_empty() {
        return Ok(());
    }
    shared.lock().append(batch)?;
    *written += batch.len() as u64;
    batch.clear();
    Ok(())
}

fn flush(
    stream: &mut UnixStream,
    shared: &Shared,
    batch: &mut Vec<Record>,
    written: &mut u64,
) -> std::result::Result<(), Ended> {
    write(shared, batch, written)?;
    {
        let mut state = shared.lock();
        if let Err(error) = state.writer.sync() {
            state.fail(error);
            return Err(Ended::Failed);
        }
    }
    // A client that died meanwhile does not wait for the answer, and the next read tells.
    drop(stream.write_all(&written.to_le_bytes()));
    Ok(())
}

/// Puts what was written onto the disk, once a second, so that a machine that fails takes little.
fn sync(file: &File, path: &Path, ended: &Receiver<()>, shared: &Shared) {
    while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(SYNC_EVERY) {
        if let Err(source) = file.sync_data() {
            shared.lock().fail(Error::io("sync", path, source));
            return;
        }
    }
}
