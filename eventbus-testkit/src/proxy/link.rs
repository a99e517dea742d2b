//! One connection over a wire that can be harmed.

use std::borrow::Cow;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::sleep;

use super::protocol::Watch;
use super::{Direction, Wire, WireFault};

const PIECE_BYTES: usize = 16 * 1024;

/// The connection is to be reset.
struct Reset;

/// What the protocol makes of a piece.
struct Followed<'b> {
    /// What passes.
    bytes: Cow<'b, [u8]>,
    /// How much later.
    late: Option<Duration>,
    /// Whether a response that is lost has come to its end.
    is_served: bool,
}

/// What both directions of a connection know.
struct Link {
    watch: Mutex<Box<dyn Watch>>,
    /// Whether something vanished, so that it cannot be used any more when the fault ends.
    has_lost: AtomicBool,
    /// How many bytes passed while they were counted.
    passed: AtomicUsize,
    wire: Wire,
}

/// Passes on what both sides send, as far as the wire lets it.
pub(super) async fn pass(mut client: TcpStream, mut server: TcpStream, wire: Wire) {
    let link = Link {
        watch: Mutex::new(wire.protocol.watch(wire.address)),
        has_lost: AtomicBool::new(false),
        passed: AtomicUsize::new(0),
        wire,
    };
    let ended = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let asks = link.pump(Direction::ToServer, from_client, to_server);
        let answers = link.pump(Direction::ToClient, from_server, to_client);
        tokio::try_join!(asks, answers)
    };
    if ended.is_err() {
        reset(&client);
        reset(&server);
    }
}

/// Has the other side hear of a reset, and not of an end, when the stream is dropped.
pub(super) fn reset(stream: &TcpStream) {
    // If it cannot be set, the other side hears of an end, which is as good a cut.
    let _ = stream.set_zero_linger();
}

impl Link {
    async fn pump(
        &self,
        direction: Direction,
        mut from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
    ) -> Result<(), Reset> {
        let mut faults = self.wire.fault.clone();
        let mut buffer = vec![0; PIECE_BYTES];
        loop {
            let fault = *faults.borrow_and_update();
            if fault == WireFault::Cut {
                return Err(Reset);
            }
            let read = tokio::select! {
                read = from.read(&mut buffer) => read,
                changed = faults.changed() => {
                    self.changes(changed)?;
                    continue;
                }
            };
            match read {
                Ok(count @ 1..) => {
                    let bytes = &buffer[..count];
                    self.carry(direction, bytes, &mut to, &mut faults).await?;
                }
                _ if swallows(fault, direction) => {
                    // The end of the connection vanishes, too.
                    self.loses();
                    let changed = faults.changed().await;
                    self.changes(changed)?;
                }
                Ok(_) => {
                    // Whoever does not listen any more needs no end.
                    let _ = to.shutdown().await;
                    return Ok(());
                }
                Err(_) => return Err(Reset),
            }
        }
    }

    /// What is to be done when the fault is another one.
    fn changes(&self, changed: Result<(), watch::error::RecvError>) -> Result<(), Reset> {
        let is_over = changed.is_err() || self.has_lost.load(Ordering::SeqCst);
        self.passed.store(0, Ordering::SeqCst);
        match is_over {
            true => Err(Reset),
            false => Ok(()),
        }
    }

    fn loses(&self) {
        self.has_lost.store(true, Ordering::SeqCst);
    }

    /// Does to one piece what the wire does.
    async fn carry(
        &self,
        direction: Direction,
        bytes: &[u8],
        to: &mut WriteHalf<'_>,
        faults: &mut watch::Receiver<WireFault>,
    ) -> Result<(), Reset> {
        let fault = *faults.borrow();
        let followed = self.follow(direction, bytes, fault);
        let bytes = &*followed.bytes;
        if let Some(late) = followed.late {
            wait(late, faults).await;
        }
        match fault {
            WireFault::Delay {
                to_server,
                to_client,
            } => {
                let delay = match direction {
                    Direction::ToServer => to_server,
                    Direction::ToClient => to_client,
                };
                wait(delay, faults).await;
                self.write(bytes, to, faults).await?;
            }
            _ if swallows(fault, direction) => self.loses(),
            WireFault::Truncate {
                direction: counted,
                after,
            } if counted == direction => self.truncate(bytes, after, to, faults).await?,
            WireFault::Cut => return Err(Reset),
            _ => self.write(bytes, to, faults).await?,
        }
        if followed.is_served {
            let lost = &self.wire.counters.responses_lost;
            lost.fetch_add(1, Ordering::Relaxed);
            return Err(Reset);
        }
        Ok(())
    }

    /// Lets the protocol follow.
    fn follow<'b>(&self, direction: Direction, bytes: &'b [u8], fault: WireFault) -> Followed<'b> {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        match direction {
            Direction::ToServer => {
                let asked = watch.asks(bytes, fault);
                if asked.loses {
                    self.loses();
                }
                Followed {
                    bytes: asked.bytes,
                    late: asked.late,
                    is_served: false,
                }
            }
            Direction::ToClient => {
                let answered = watch.answers(bytes);
                let misreported = &self.wire.counters.responses_misreported;
                misreported.fetch_add(answered.misreported, Ordering::Relaxed);
                Followed {
                    bytes: answered.bytes,
                    late: None,
                    is_served: answered.is_served,
                }
            }
        }
    }

    /// Passes on what may still pass, and ends the connection behind it.
    async fn truncate(
        &self,
        bytes: &[u8],
        after: usize,
        to: &mut WriteHalf<'_>,
        faults: &mut watch::Receiver<WireFault>,
    ) -> Result<(), Reset> {
        let passed = self.passed.fetch_add(bytes.len(), Ordering::SeqCst);
        let left = after.saturating_sub(passed);
        if bytes.len() < left {
            return self.write(bytes, to, faults).await;
        }
        self.write(&bytes[..left], to, faults).await?;
        // What was written is to arrive before the reset.
        let _ = to.flush().await;
        sleep(Duration::from_millis(1)).await;
        Err(Reset)
    }

    /// Writes all, unless the wire is cut before.
    async fn write(
        &self,
        mut bytes: &[u8],
        to: &mut WriteHalf<'_>,
        faults: &mut watch::Receiver<WireFault>,
    ) -> Result<(), Reset> {
        while !bytes.is_empty() {
            let written: io::Result<usize> = tokio::select! {
                written = to.write(bytes) => written,
                cut = faults.wait_for(|fault| *fault == WireFault::Cut) => {
                    drop(cut);
                    return Err(Reset);
                }
            };
            match written {
                Ok(count @ 1..) => bytes = &bytes[count..],
                _ => return Err(Reset),
            }
        }
        Ok(())
    }
}

/// Whether what is sent in this direction vanishes.
fn swallows(fault: WireFault, direction: Direction) -> bool {
    match fault {
        WireFault::HalfOpen => true,
        WireFault::Lose(lost) => lost == direction,
        _ => false,
    }
}

/// Waits, or until the fault is another one.
async fn wait(time: Duration, faults: &watch::Receiver<WireFault>) {
    let mut faults = faults.clone();
    faults.mark_unchanged();
    tokio::select! {
        () = sleep(time) => {}
        // The sender is gone: the connection ends with the next look.
        _ = faults.changed() => {}
    }
}
