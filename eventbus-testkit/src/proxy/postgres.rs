//! As much of PostgreSQL's protocol as tells which answer belongs to which statement.
//!
//! ```text
//!  client ── startup ── [ Q text ] ── [ P name text ] [ B portal name ] [ E portal ] [ S ] ──▶
//!  server ◀─ … Z ────── [ … Z ] ──────────────────────────────────────────── [ … Z ] ──────────
//! ```
//!
//! Each `Q` and each `S` is answered by one `Z`, and so is the startup. So requests are numbered by
//! the `Z` that ends their answer, and an answer is lost from the `Z` before to its own.

use std::borrow::Cow;
use std::collections::HashSet;

use super::WireFault;
use super::protocol::{Answered, Asked, Statements, Watch};

/// How much of a message's body is looked at.
const HEAD_BYTES: usize = 512 + 64;
/// How many names of picked statements and portals are remembered.
const NAMES_MAX: usize = 1024;
/// The codes of requests that come before the startup itself: encryption by TLS or GSSAPI.
const ENCRYPTION: [u32; 2] = [80_877_103, 80_877_104];
/// The code of a request to cancel, which has no answer.
const CANCEL: u32 = 80_877_102;

/// One connection.
#[derive(Debug)]
pub(super) struct Session {
    statements: Statements,
    client: Frames,
    server: Frames,
    phase: Phase,
    /// Prepared statements that are picked.
    prepared: HashSet<Vec<u8>>,
    /// Portals of such statements.
    portals: HashSet<Vec<u8>>,
    /// How many answers were asked for, and how many have ended.
    asked: u64,
    answered: u64,
    /// The number of the answer that is lost.
    loses: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Messages of the client have no type yet.
    Startup,
    /// The client asked for encryption, and the server answers by a single byte.
    Asking,
    Open,
    /// Nothing can be told of what passes.
    Opaque,
}

impl Session {
    pub(super) fn new(statements: Statements) -> Self {
        Self {
            statements,
            client: Frames::new(false),
            server: Frames::new(true),
            phase: Phase::Startup,
            prepared: HashSet::new(),
            portals: HashSet::new(),
            asked: 0,
            answered: 0,
            loses: None,
        }
    }

    fn begins(&mut self, body: &[u8]) {
        let code = body.first_chunk().map(|code| u32::from_be_bytes(*code));
        self.phase = match code {
            Some(code) if ENCRYPTION.contains(&code) => Phase::Asking,
            Some(CANCEL) | None => Phase::Opaque,
            Some(_) => {
                self.client.has_type = true;
                self.asked = 1;
                Phase::Open
            }
        };
    }

    /// A whole message of the client; whether its answer is one to be lost.
    fn asks_for(&mut self, kind: u8, body: &[u8]) -> bool {
        let (first, rest) = split_text(body);
        match kind {
            b'Q' => {
                self.asked += 1;
                self.statements.picks(&String::from_utf8_lossy(first))
            }
            b'S' => {
                self.asked += 1;
                false
            }
            b'P' => {
                let sql = String::from_utf8_lossy(split_text(rest).0).into_owned();
                let is_picked = self.statements.picks(&sql);
                remember(&mut self.prepared, first, is_picked);
                false
            }
            b'B' => {
                let is_picked = self.prepared.contains(split_text(rest).0);
                remember(&mut self.portals, first, is_picked);
                false
            }
            b'E' => self.portals.contains(first),
            _ => false,
        }
    }

    /// How many bytes of the server pass, and whether the answer that is lost has come to its end.
    fn passes(&mut self, bytes: &[u8]) -> (usize, bool) {
        let (mut passes, mut is_served) = (bytes.len(), false);
        let mut rest = bytes;
        if self.phase == Phase::Asking {
            // `N`: it goes on in the clear, with a startup. Otherwise nothing can be read any more.
            self.phase = match bytes {
                b"N" => Phase::Startup,
                _ => Phase::Opaque,
            };
            return (passes, is_served);
        }
        if self.phase == Phase::Opaque {
            return (passes, is_served);
        }
        let is_lost = |session: &Self| session.loses == Some(session.answered + 1);
        if is_lost(self) {
            passes = 0;
        }
        while let Some(frame) = self.server.next(&mut rest) {
            if frame.kind != b'Z' {
                continue;
            }
            is_served |= is_lost(self);
            self.answered += 1;
            if is_lost(self) {
                passes = bytes.len() - rest.len();
            }
        }
        (passes, is_served)
    }

    /// The number of the answer to a message that was just looked at.
    fn answer_of(&self, kind: u8) -> u64 {
        match kind {
            b'Q' => self.asked,
            // That of the `S` behind it.
            _ => self.asked + 1,
        }
    }
}

impl Watch for Session {
    fn asks<'b>(&mut self, bytes: &'b [u8], fault: WireFault) -> Asked<'b> {
        let mut asked = Asked::passing(bytes);
        let mut rest = bytes;
        while let (false, Some(frame)) = (self.phase == Phase::Opaque, self.client.next(&mut rest))
        {
            if self.phase != Phase::Open {
                self.begins(&frame.head);
                continue;
            }
            let is_picked = self.asks_for(frame.kind, &frame.head);
            match fault {
                WireFault::LoseResponse if is_picked && self.loses.is_none() => {
                    self.loses = Some(self.answer_of(frame.kind));
                }
                WireFault::DelayRequest(time) if is_picked => asked.late = Some(time),
                _ => {}
            }
        }
        asked.loses = self.loses.is_some();
        asked
    }

    fn answers<'b>(&mut self, bytes: &'b [u8]) -> Answered<'b> {
        let (passes, is_served) = self.passes(bytes);
        Answered {
            bytes: Cow::Borrowed(&bytes[..passes]),
            is_served,
            misreported: 0,
        }
    }
}

fn remember(names: &mut HashSet<Vec<u8>>, name: &[u8], is_picked: bool) {
    if is_picked && names.len() < NAMES_MAX {
        names.insert(name.to_vec());
    } else if !is_picked {
        names.remove(name);
    }
}

/// What is before the first zero, and what is behind it.
fn split_text(bytes: &[u8]) -> (&[u8], &[u8]) {
    match bytes.iter().position(|byte| *byte == 0) {
        Some(end) => (&bytes[..end], &bytes[end + 1..]),
        None => (bytes, &[]),
    }
}

/// Cuts a stream into messages, and keeps the begin of each.
#[derive(Debug)]
struct Frames {
    /// Whether a message begins with its type.
    has_type: bool,
    header: Vec<u8>,
    /// The begin of the body, and how much of the body is still to come.
    head: Vec<u8>,
    left: usize,
}

/// A message that has come to its end.
#[derive(Debug)]
struct Frame {
    kind: u8,
    head: Vec<u8>,
}

impl Frames {
    fn new(has_type: bool) -> Self {
        Self {
            has_type,
            header: Vec::new(),
            head: Vec::new(),
            left: 0,
        }
    }

    fn header_bytes(&self) -> usize {
        4 + usize::from(self.has_type)
    }

    /// The next message that ends within these bytes, which are taken from their begin.
    fn next(&mut self, bytes: &mut &[u8]) -> Option<Frame> {
        while self.header.len() < self.header_bytes() {
            let (byte, rest) = bytes.split_first()?;
            *bytes = rest;
            self.header.push(*byte);
            if let (true, Some(length)) = (
                self.header.len() == self.header_bytes(),
                self.header.last_chunk::<4>(),
            ) {
                // The length counts itself.
                self.left = (u32::from_be_bytes(*length) as usize).saturating_sub(4);
            }
        }
        let (body, rest) = bytes.split_at(self.left.min(bytes.len()));
        *bytes = rest;
        self.left -= body.len();
        let room = HEAD_BYTES.saturating_sub(self.head.len());
        self.head.extend(&body[..room.min(body.len())]);
        if self.left > 0 {
            return None;
        }
        let kind = if self.has_type { self.header[0] } else { 0 };
        self.header.clear();
        Some(Frame {
            kind,
            head: std::mem::take(&mut self.head),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Session;
    use crate::proxy::WireFault;
    use crate::proxy::protocol::{Statements, Watch};

    const LOSE: WireFault = WireFault::LoseResponse;

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = (body.len() as u32 + 4).to_be_bytes();
        [&[kind][..], &length, body].concat()
    }

    fn startup(code: u32) -> Vec<u8> {
        let body = [&code.to_be_bytes()[..], b"user\0a\0\0"].concat();
        let length = (body.len() as u32 + 4).to_be_bytes();
        [&length[..], &body].concat()
    }

    const READY: &[u8] = b"Z\0\0\0\x05I";

    fn opened() -> Session {
        let mut session = Session::new(Statements::commits());
        assert!(!session.asks(&startup(196_608), LOSE).loses);
        let all = session.answers(READY);
        assert_eq!((all.bytes.len(), all.is_served), (READY.len(), false));
        session
    }

    #[test]
    fn the_answer_to_a_simple_commit_is_lost_and_no_other() {
        let mut session = opened();
        assert!(!session.asks(&message(b'Q', b"BEGIN\0"), LOSE).loses);
        let commit = message(b'Q', b"COMMIT\0");
        let asked = session.asks(&commit, LOSE);
        assert!(asked.loses);
        // Both answers come in one piece: that to BEGIN passes.
        let begin = [&message(b'C', b"BEGIN\0")[..], READY].concat();
        let commit = [&message(b'C', b"COMMIT\0")[..], READY].concat();
        let both = [begin.clone(), commit].concat();
        let answered = session.answers(&both);
        assert_eq!(answered.bytes, begin);
        assert!(answered.is_served);
    }

    #[test]
    fn a_prepared_commit_is_known_by_its_name_in_pieces_of_any_size() {
        let prepare = message(b'P', b"s1\0COMMIT\0\0\0");
        let execute = [
            message(b'B', b"\0s1\0\0\0\0\0\0\0"),
            message(b'E', b"\0\0\0\0\0"),
            message(b'S', b""),
        ]
        .concat();
        let mut session = opened();
        // Prepared while nothing was to be lost.
        assert!(
            !session
                .asks(&[prepare, message(b'S', b"")].concat(), WireFault::None)
                .loses
        );
        let prepared = [&message(b'1', b"")[..], READY].concat();
        assert_eq!(session.answers(&prepared).bytes.len(), prepared.len());
        let loses: Vec<bool> = execute
            .iter()
            .map(|byte| session.asks(&[*byte], LOSE).loses)
            .collect();
        assert!(loses.ends_with(&[true]));
        let answer = [message(b'C', b"COMMIT\0"), READY.to_vec()].concat();
        for byte in &answer[..answer.len() - 1] {
            let answered = session.answers(std::slice::from_ref(byte));
            assert_eq!((answered.bytes.len(), answered.is_served), (0, false));
        }
        assert!(session.answers(&answer[answer.len() - 1..]).is_served);
    }

    #[test]
    fn what_is_not_armed_passes() {
        let mut session = opened();
        assert!(
            !session
                .asks(&message(b'Q', b"COMMIT\0"), WireFault::None)
                .loses
        );
        assert_eq!(session.answers(READY).bytes.len(), READY.len());
    }

    #[test]
    fn encryption_that_is_refused_goes_on_in_the_clear_and_other_is_opaque() {
        let ask = [&8_u32.to_be_bytes()[..], &80_877_103_u32.to_be_bytes()].concat();
        let mut session = Session::new(Statements::commits());
        session.asks(&ask, LOSE);
        session.answers(b"N");
        session.asks(&startup(196_608), LOSE);
        session.answers(READY);
        assert!(session.asks(&message(b'Q', b"COMMIT\0"), LOSE).loses);

        let mut session = Session::new(Statements::commits());
        session.asks(&ask, LOSE);
        session.answers(b"S");
        assert!(!session.asks(&message(b'Q', b"COMMIT\0"), LOSE).loses);
        assert_eq!(session.answers(READY).bytes.len(), READY.len());
    }

    #[test]
    fn a_length_that_is_nonsense_ends_nothing() {
        let mut session = opened();
        assert!(!session.asks(b"Q\0\0\0\0", LOSE).loses);
        assert!(!session.asks(&[0xff; 64], LOSE).loses);
    }
}
