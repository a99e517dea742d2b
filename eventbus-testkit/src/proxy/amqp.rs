//! AMQP 0.9.1, as far as a wire that is harmed has to follow it: which method has which answer on its
//! channel, and how a channel is closed for both sides.
//!
//! ```text
//!  client ── publish ─────────▶ proxy ── channel.close ──▶ server       a channel is closed
//!         ◀─ channel.close ────       ◀────── close-ok ───
//!         ── close-ok ─▶ (nothing)
//! ```
//!
//! What the client sends on the channel until it knows is not passed on: a server that has closed a
//! channel does not heed it either.

use std::borrow::Cow;
use std::collections::HashMap;

use super::WireFault;
use super::protocol::{Answered, Asked, Watch};

/// A method of the protocol that is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AmqpMethod {
    /// A message is published, and confirmed.
    Publish,
    /// A queue is declared, or asked about, as it is for each settlement.
    DeclareQueue,
    /// An exchange is declared, or asked about.
    DeclareExchange,
    /// A consumer begins.
    Consume,
    /// A channel is opened.
    OpenChannel,
}

/// Class and method, as they travel.
type Name = (u16, u16);

const CLOSE: Name = (20, 40);
const CLOSE_OK: Name = (20, 41);

impl AmqpMethod {
    const ALL: [Self; 5] = [
        Self::Publish,
        Self::DeclareQueue,
        Self::DeclareExchange,
        Self::Consume,
        Self::OpenChannel,
    ];

    fn name(self) -> Name {
        match self {
            Self::Publish => (60, 40),
            Self::DeclareQueue => (50, 10),
            Self::DeclareExchange => (40, 10),
            Self::Consume => (60, 20),
            Self::OpenChannel => (20, 10),
        }
    }

    /// What the server says to it. To a publish it may also say that it did not take it.
    fn answers(self) -> &'static [Name] {
        match self {
            Self::Publish => &[(60, 80), (60, 120)],
            Self::DeclareQueue => &[(50, 11)],
            Self::DeclareExchange => &[(40, 11)],
            Self::Consume => &[(60, 21)],
            Self::OpenChannel => &[(20, 11)],
        }
    }
}

/// Picks methods of AMQP.
#[derive(Clone, Copy, Debug)]
pub struct AmqpMethods(u8);

impl AmqpMethods {
    /// With what a server closes a channel that did no wrong: an error of its own, and a resource that it
    /// lacks.
    pub const REFUSALS: &[i16] = &[541, 506];

    /// These.
    #[must_use]
    pub fn of(methods: &[AmqpMethod]) -> Self {
        Self(methods.iter().fold(0, |all, one| all | 1 << *one as u8))
    }

    /// Which of them has this name.
    fn find(self, name: Name) -> Option<AmqpMethod> {
        let mut picked = AmqpMethod::ALL.into_iter();
        picked.find(|one| one.name() == name && self.0 >> *one as u8 & 1 == 1)
    }
}

/// The kind of a frame, its channel, and the length of what follows.
const HEADER_BYTES: usize = 7;
const METHOD: u8 = 1;
/// Methods, headers, bodies and heartbeats.
const KINDS: [u8; 4] = [METHOD, 2, 3, 8];
const END: u8 = 0xce;
/// A frame that is longer is none: both sides agree on 128 KiB.
const FRAME_BYTES_MAX: usize = 1 << 20;
/// What the client begins with has so many bytes.
const GREETING_BYTES: usize = 8;

/// One connection.
#[derive(Debug)]
pub(super) struct Session {
    methods: AmqpMethods,
    client: Frames,
    server: Frames,
    greeting_left: usize,
    /// On which channel the answer to what is to be lost.
    loses: Option<(u16, AmqpMethod)>,
    /// Channels that are being closed.
    closing: HashMap<u16, Closing>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// The server was told, the client not yet, which will hear this number.
    Server(i16),
    /// The client was told.
    Client,
}

impl Session {
    pub(super) fn new(methods: AmqpMethods) -> Self {
        Self {
            methods,
            client: Frames::default(),
            server: Frames::default(),
            greeting_left: GREETING_BYTES,
            loses: None,
            closing: HashMap::new(),
        }
    }

    /// What of a frame of the client, or in its place, passes.
    fn ask(&mut self, frame: &Frame, fault: WireFault, asked: &mut Asked<'_>) -> Option<Vec<u8>> {
        let Frame { channel, name, .. } = *frame;
        match self.closing.get(&channel) {
            // The server's answer is one to both of them.
            Some(Closing::Server(_)) if name == CLOSE => self.closing.remove(&channel),
            Some(Closing::Client) if name == CLOSE_OK => self.closing.remove(&channel),
            Some(_) => None,
            None => return self.asks_openly(frame, fault, asked),
        };
        None
    }

    fn asks_openly(
        &mut self,
        frame: &Frame,
        fault: WireFault,
        asked: &mut Asked<'_>,
    ) -> Option<Vec<u8>> {
        let channel = frame.channel;
        if let Some(method) = self.methods.find(frame.name) {
            match fault {
                WireFault::LoseResponse => {
                    self.loses.get_or_insert((channel, method));
                }
                WireFault::DelayRequest(time) => asked.late = Some(time),
                WireFault::Misreport(code) => {
                    self.closing.insert(channel, Closing::Server(code));
                    return Some(close(channel, code));
                }
                _ => {}
            }
        }
        Some(frame.bytes.clone())
    }
}

impl Watch for Session {
    fn asks<'b>(&mut self, bytes: &'b [u8], fault: WireFault) -> Asked<'b> {
        let mut asked = Asked::passing(bytes);
        let (greeting, frames) = bytes.split_at(self.greeting_left.min(bytes.len()));
        self.greeting_left -= greeting.len();
        let mut passes = greeting.to_vec();
        self.client.add(frames);
        while let Some(frame) = self.client.next() {
            passes.extend(self.ask(&frame, fault, &mut asked).unwrap_or_default());
        }
        passes.extend(self.client.unreadable());
        asked.loses = self.loses.is_some();
        asked.bytes = Cow::Owned(passes);
        asked
    }

    fn answers<'b>(&mut self, bytes: &'b [u8]) -> Answered<'b> {
        let mut passes = Vec::with_capacity(bytes.len());
        let (mut is_served, mut misreported) = (false, 0);
        self.server.add(bytes);
        while let Some(frame) = self.server.next() {
            let Frame { channel, name, .. } = frame;
            let lost = self.loses.filter(|(on, _)| *on == channel);
            if lost.is_some_and(|(_, method)| method.answers().contains(&name)) {
                is_served = true;
                break;
            }
            match self.closing.get(&channel) {
                Some(Closing::Server(code)) if name == CLOSE_OK => {
                    passes.extend(close(channel, *code));
                    misreported += 1;
                    self.closing.insert(channel, Closing::Client);
                }
                _ => passes.extend(frame.bytes),
            }
        }
        passes.extend(self.server.unreadable());
        Answered {
            bytes: Cow::Owned(passes),
            is_served,
            misreported,
        }
    }
}

/// The frame that closes a channel.
fn close(channel: u16, code: i16) -> Vec<u8> {
    const TEXT: &[u8] = b"closed by the fault proxy";
    let mut body = Vec::new();
    for number in [CLOSE.0, CLOSE.1, code.cast_unsigned()] {
        body.extend(number.to_be_bytes());
    }
    body.push(TEXT.len() as u8);
    body.extend(TEXT);
    // Which method it was for is not said.
    body.extend([0; 4]);
    let mut frame = vec![METHOD];
    frame.extend(channel.to_be_bytes());
    frame.extend((body.len() as u32).to_be_bytes());
    frame.extend(body);
    frame.push(END);
    frame
}

/// A whole frame.
#[derive(Debug)]
struct Frame {
    channel: u16,
    /// That of a method; zeros for what is none.
    name: Name,
    bytes: Vec<u8>,
}

/// Finds frames in a stream.
#[derive(Debug, Default)]
struct Frames {
    begun: Vec<u8>,
    /// Nothing can be told of what passes.
    is_opaque: bool,
}

impl Frames {
    fn add(&mut self, bytes: &[u8]) {
        self.begun.extend(bytes);
    }

    fn next(&mut self) -> Option<Frame> {
        if self.is_opaque {
            return None;
        }
        let [kind, c0, c1, l0, l1, l2, l3] = *self.begun.first_chunk::<HEADER_BYTES>()?;
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if !KINDS.contains(&kind) || length > FRAME_BYTES_MAX {
            self.is_opaque = true;
            return None;
        }
        let whole = HEADER_BYTES + length + 1;
        if self.begun.len() < whole {
            return None;
        }
        let rest = self.begun.split_off(whole);
        let bytes = std::mem::replace(&mut self.begun, rest);
        let body = &bytes[HEADER_BYTES..whole - 1];
        let name = match body.first_chunk::<4>() {
            Some([a, b, c, d]) if kind == METHOD => {
                (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]))
            }
            _ => (0, 0),
        };
        Some(Frame {
            channel: u16::from_be_bytes([c0, c1]),
            name,
            bytes,
        })
    }

    /// What is no frame, and passes as it is.
    fn unreadable(&mut self) -> Vec<u8> {
        match self.is_opaque {
            true => std::mem::take(&mut self.begun),
            false => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
