//! The side of the tried process: says what it is about to do, and what came of it.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::monotonic_nanos;
use crate::error::{Error, Result};
use crate::record::{Entry, Phase, Record};
use crate::recorder::wire;
use crate::stamp::RunId;

/// A connection to the recorder, shared by all threads of a process.
///
/// # Contract
///
/// - When a call returns `Ok`, its records have left the process: the kernel holds them, and a
///   SIGKILL of this process takes nothing of them away.
/// - After the first error every call fails: there is no record with a hole before it.
///
/// # Why each call is a write
///
/// A thread that writes for others would lose, in a kill, what waits for it. For an invoke that would
/// be fatal, because the call it announces could then have an effect that nobody tried. For an `ok`
/// it would turn what was promised into something unknown, and so hide the losses that a kill just
/// after an acknowledgement causes, which are the ones to look for. So nothing waits: each call is
/// one `write` to a stream socket, some four microseconds on two busy cores. Who publishes a batch
/// announces it as one with [`Session::record`], at a tenth of that for each. A stream is enough,
/// because records have all the same size, and what a kill cut within one belongs to a call that had
/// not begun.
///
/// The call blocks while the recorder is behind by the socket's buffer; nothing is dropped.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    run: RunId,
    process: u32,
    sessions: AtomicU32,
    connection: Mutex<Connection>,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    /// How many records were written.
    sent: u64,
    /// What went wrong first.
    broken: Option<String>,
}

impl Client {
    /// Connects to the recorder that listens on a socket.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when nobody listens, [`Error::RecorderGone`] when something else does.
    pub fn connect(socket: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(socket)
            .map_err(|source| Error::io("connect to", socket, source))?;
        stream
            .write_all(&wire::hello(std::process::id()))
            .map_err(|error| Error::gone(error.to_string()))?;
        let mut welcome = [0; wire::GREETING_BYTES];
        stream
            .read_exact(&mut welcome)
            .map_err(|error| Error::gone(format!("it did not answer: {error}")))?;
        let (run, process) = wire::read_welcome(&welcome)
            .ok_or_else(|| Error::gone("something else listens on its socket"))?;
        let connection = Connection {
            stream,
            sent: 0,
            broken: None,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                run,
                process,
                sessions: AtomicU32::new(1),
                connection: Mutex::new(connection),
            }),
        })
    }

    /// The run that is recorded.
    #[must_use]
    pub fn run(&self) -> RunId {
        self.shared.run
    }

    /// The number of this connection in the records.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.shared.process
    }

    /// A caller with a number of its own.
    #[must_use]
    pub fn session(&self) -> Session {
        Session {
            shared: Arc::clone(&self.shared),
            number: self.shared.sessions.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Returns when the recorder has written, and synced, all that was sent before; fails when it
    /// has not got all of it, or does not answer within the limit.
    ///
    /// # Errors
    ///
    /// [`Error::RecorderGone`].
    pub fn flush(&self, limit: Duration) -> Result<()> {
        let mut connection = self.shared.lock();
        connection.call(|stream, sent| {
            stream.set_read_timeout(Some(limit))?;
            stream.write_all(&wire::flush())?;
            let mut answer = [0; 8];
            stream.read_exact(&mut answer)?;
            match u64::from_le_bytes(answer) {
                written if written == sent => Ok(()),
                written => Err(std::io::Error::new(
                    ErrorKind::InvalidData,
                    format!("{sent} records were sent, and {written} written"),
                )),
            }
        })
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Connection> {
        // A panic of another caller leaves `broken` unset at worst, and then the stream is whole.
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// Uses the stream, and never again after an error.
    fn call(
        &mut self,
        use_stream: impl FnOnce(&mut UnixStream, u64) -> std::io::Result<()>,
    ) -> Result<()> {
        if let Some(what) = &self.broken {
            return Err(Error::gone(what.clone()));
        }
        use_stream(&mut self.stream, self.sent).map_err(|error| {
            let what = error.to_string();
            self.broken = Some(what.clone());
            Error::gone(what)
        })
    }
}

/// One caller, which has one call at a time, or one batch.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    number: u32,
}

impl Session {
    /// The number of this session in the records.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Announces a call. It MUST NOT begin before this returned `Ok`.
    ///
    /// # Errors
    ///
    /// [`Error::RecorderGone`]; then the call must not be made.
    pub fn invoke(&self, entry: Entry) -> Result<()> {
        self.record(Phase::Invoke, &[entry])
    }

    /// Notes that a call was done, or that something happened.
    ///
    /// # Errors
    ///
    /// [`Error::RecorderGone`].
    pub fn ok(&self, entry: Entry) -> Result<()> {
        self.record(Phase::Ok, &[entry])
    }

    /// Notes that a call was surely not done.
    ///
    /// # Errors
    ///
    /// [`Error::RecorderGone`].
    pub fn fail(&self, entry: Entry) -> Result<()> {
        self.record(Phase::Fail, &[entry])
    }

    /// Notes that nobody knows what became of a call.
    ///
    /// # Errors
    ///
    /// [`Error::RecorderGone`].
    pub fn unknown(&self, entry: Entry) -> Result<()> {
        self.record(Phase::Unknown, &[entry])
    }

    /// Notes the same of several messages, at one time and with one `write`.
    ///
    /// # Errors
    ///
    /// [`Error::RecorderGone`]; some of them may be in the ledger then.
    pub fn record(&self, phase: Phase, entries: &[Entry]) -> Result<()> {
        let Self { shared, number } = self;
        let mut connection = shared.lock();
        // Under the lock, so that times never fall within a client.
        let time = monotonic_nanos();
        let record = |entry| Record::new(time, shared.process, *number, phase, entry).encode();
        let written = match entries {
            [entry] => connection.call(|stream, _| stream.write_all(&record(*entry))),
            _ => {
                let bytes: Vec<u8> = entries.iter().copied().flat_map(record).collect();
                connection.call(|stream, _| stream.write_all(&bytes))
            }
        };
        written?;
        connection.sent += entries.len() as u64;
        Ok(())
    }
}
