//! The protocol of Redis (RESP, versions 2 and 3), as far as a wire that is harmed has to follow it:
//! which command has which reply.
//!
//! ```text
//!  client  ─ *2 $4 XADD … ─ *1 $4 PING ──▶         one connection, answered in the order of the commands
//!          ◀─────── $15 1-0 ─── +PONG ────  server
//! ```
//!
//! A command that is refused has to be answered in its turn, and the server must not see it. So a `PING`
//! goes in its place, and the answer to that says the error.

use std::borrow::Cow;
use std::collections::VecDeque;

use super::WireFault;
use super::protocol::{Answered, Asked, Watch};

/// Most commands that are picked.
const PICKED_MAX: usize = 8;
/// What comes before the name of a command has a few bytes, and a name at most so many.
const HEAD_BYTES_MAX: usize = 96;
/// A line that tells a kind and a length has no more.
const LINE_BYTES_MAX: usize = 32;
const PING: &[u8] = b"*1\r\n$4\r\nPING\r\n";

/// Picks commands of Redis by their names.
#[derive(Clone, Copy, Debug)]
pub struct RedisCommands([&'static str; PICKED_MAX]);

impl RedisCommands {
    /// What a server that refuses says, by the numbers that
    /// [`Misreport`](WireFault::Misreport) takes.
    pub const REFUSALS: &[i16] = &[
        Self::LOADING,
        Self::READ_ONLY,
        Self::OUT_OF_MEMORY,
        Self::DISK_FAILED,
    ];
    /// It reads its data after a start.
    pub const LOADING: i16 = 1;
    /// It is a replica.
    pub const READ_ONLY: i16 = 2;
    /// Its memory is full.
    pub const OUT_OF_MEMORY: i16 = 3;
    /// It cannot write to its disk.
    pub const DISK_FAILED: i16 = 4;
    /// It wants a password.
    pub const NO_PASSWORD: i16 = 5;
    /// The user may not do that.
    pub const NO_PERMISSION: i16 = 6;

    /// These, in upper case; eight at most.
    #[must_use]
    pub fn of(names: &[&'static str]) -> Self {
        let mut picked = [""; PICKED_MAX];
        for (place, name) in picked.iter_mut().zip(names) {
            *place = name;
        }
        Self(picked)
    }

    fn picks(self, name: &[u8]) -> bool {
        let is_it = |picked: &&str| picked.as_bytes().eq_ignore_ascii_case(name);
        !name.is_empty() && self.0.iter().any(is_it)
    }
}

fn refusal(code: i16) -> Option<&'static [u8]> {
    Some(match code {
        RedisCommands::LOADING => b"-LOADING Redis is loading the dataset in memory\r\n",
        RedisCommands::READ_ONLY => b"-READONLY You can't write against a read only replica.\r\n",
        RedisCommands::OUT_OF_MEMORY => {
            b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
        }
        RedisCommands::DISK_FAILED => {
            b"-MISCONF Errors writing to the AOF file: No space left on device\r\n"
        }
        RedisCommands::NO_PASSWORD => b"-NOAUTH Authentication required.\r\n",
        RedisCommands::NO_PERMISSION => {
            b"-NOPERM User eventbus has no permissions to run the 'xadd' command\r\n"
        }
        _ => return None,
    })
}

/// One connection.
#[derive(Debug)]
pub(super) struct Session {
    commands: RedisCommands,
    client: Stream,
    server: Stream,
    /// What is done with the command that has begun.
    command: Turn,
    /// The begin of a command whose name is not known yet.
    head: Vec<u8>,
    /// What is done with the replies that are still to come.
    replies: VecDeque<Turn>,
    /// Whether one of them is to be lost.
    loses: bool,
}

/// What is done with a command, or with its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Passes,
    Loses,
    Refuses(&'static [u8]),
}

impl Session {
    pub(super) fn new(commands: RedisCommands) -> Self {
        Self {
            commands,
            client: Stream::default(),
            server: Stream::default(),
            command: Turn::Passes,
            head: Vec::new(),
            replies: VecDeque::new(),
            loses: false,
        }
    }

    /// A command has told its name: decides what becomes of it.
    fn named(&mut self, name: &[u8], fault: WireFault, asked: &mut Asked<'_>) {
        let is_picked = self.commands.picks(name);
        let mut turn = Turn::Passes;
        match fault {
            WireFault::LoseResponse if is_picked && !self.loses => turn = Turn::Loses,
            WireFault::Misreport(code) if is_picked => {
                turn = refusal(code).map_or(Turn::Passes, Turn::Refuses);
            }
            WireFault::DelayRequest(time) if is_picked => asked.late = Some(time),
            _ => {}
        }
        self.loses |= turn == Turn::Loses;
        self.replies.push_back(turn);
        self.command = turn;
    }
}

impl Watch for Session {
    fn asks<'b>(&mut self, bytes: &'b [u8], fault: WireFault) -> Asked<'b> {
        let mut asked = Asked::passing(bytes);
        let mut passes = Vec::with_capacity(bytes.len());
        for byte in bytes {
            if self.client.is_opaque {
                passes.push(*byte);
                continue;
            }
            let is_before_name = self.client.is_before_first_text();
            if is_before_name {
                self.head.push(*byte);
            }
            let seen = self.client.see(*byte);
            if let Some(name) = &seen.first_text {
                self.named(name, fault, &mut asked);
                let head = std::mem::take(&mut self.head);
                match self.command {
                    Turn::Refuses(_) => passes.extend(PING),
                    _ => passes.extend(head),
                }
            } else if !is_before_name && !matches!(self.command, Turn::Refuses(_)) {
                passes.push(*byte);
            } else if self.client.is_opaque || self.head.len() > HEAD_BYTES_MAX {
                self.client.is_opaque = true;
                passes.append(&mut self.head);
            }
        }
        asked.bytes = Cow::Owned(passes);
        asked.loses = self.loses;
        asked
    }

    fn answers<'b>(&mut self, bytes: &'b [u8]) -> Answered<'b> {
        let mut passes = Vec::with_capacity(bytes.len());
        let (mut is_served, mut misreported) = (false, 0);
        for byte in bytes {
            let turn = match self.server.is_opaque {
                true => Turn::Passes,
                // What nobody asked for passes, too.
                false => self.replies.front().copied().unwrap_or(Turn::Passes),
            };
            if turn == Turn::Passes {
                passes.push(*byte);
            }
            if self.server.is_opaque || !self.server.see(*byte).is_end {
                continue;
            }
            self.replies.pop_front();
            match turn {
                Turn::Passes => {}
                Turn::Loses => {
                    is_served = true;
                    break;
                }
                Turn::Refuses(error) => {
                    passes.extend(error);
                    misreported += 1;
                }
            }
        }
        Answered {
            bytes: Cow::Owned(passes),
            is_served,
            misreported,
        }
    }
}

/// What a byte comes to.
#[derive(Debug, Default)]
struct Seen {
    /// The first text of a value, when it is complete.
    first_text: Option<Vec<u8>>,
    /// Whether a whole value has ended.
    is_end: bool,
}

/// Finds values in a stream.
#[derive(Debug, Default)]
struct Stream {
    /// A line that has begun.
    line: Vec<u8>,
    /// How much of a text, with what ends it, is still to come.
    text_left: usize,
    /// How many values belong to the one that has begun, and are still to come.
    values_left: usize,
    /// The first text of the value, as far as it has come; none where that is over.
    first: Option<Vec<u8>>,
    is_first_over: bool,
    /// Nothing can be told of what passes.
    is_opaque: bool,
}

impl Stream {
    /// Whether the first text of a value, which is a command's name, is still to come.
    fn is_before_first_text(&self) -> bool {
        !self.is_first_over
    }

    fn see(&mut self, byte: u8) -> Seen {
        if self.text_left > 0 {
            return self.see_text(byte);
        }
        self.line.push(byte);
        if byte != b'\n' {
            // A simple line, such as an error, may be long; only its begin is of use.
            self.line.truncate(LINE_BYTES_MAX);
            return Seen::default();
        }
        let line = std::mem::take(&mut self.line);
        self.see_line(&line)
    }

    fn see_text(&mut self, byte: u8) -> Seen {
        self.text_left -= 1;
        // Behind a text is the end of its line.
        if self.text_left >= 2
            && let Some(first) = &mut self.first
        {
            // A name is short; what is long is none.
            if first.len() < HEAD_BYTES_MAX {
                first.push(byte);
            }
        }
        match self.text_left {
            0 => self.ends_one(),
            _ => Seen::default(),
        }
    }

    fn see_line(&mut self, line: &[u8]) -> Seen {
        let Some((kind, rest)) = line.split_first() else {
            return Seen::default();
        };
        let number = || {
            let text = std::str::from_utf8(rest).ok()?;
            text.trim_end().parse::<i64>().ok()
        };
        self.values_left = self.values_left.max(1);
        match kind {
            b'+' | b'-' | b':' | b'_' | b',' | b'#' | b'(' => self.ends_one(),
            b'$' | b'=' | b'!' => match number().map(usize::try_from) {
                Some(Ok(length)) => {
                    self.text_left = length + 2;
                    if !self.is_first_over {
                        self.first = Some(Vec::new());
                    }
                    Seen::default()
                }
                Some(Err(_)) => self.ends_one(),
                None => self.gives_up(),
            },
            b'*' | b'~' | b'>' | b'%' => match number() {
                Some(count) => {
                    let each = if *kind == b'%' { 2 } else { 1 };
                    self.values_left += each * usize::try_from(count).unwrap_or(0);
                    self.counts_down()
                }
                None => self.gives_up(),
            },
            _ => self.gives_up(),
        }
    }

    fn gives_up(&mut self) -> Seen {
        self.is_opaque = true;
        Seen::default()
    }

    /// A value that has no parts has ended.
    fn ends_one(&mut self) -> Seen {
        let first_text = self.first.take();
        self.is_first_over = true;
        Seen {
            first_text,
            ..self.counts_down()
        }
    }

    fn counts_down(&mut self) -> Seen {
        self.values_left -= 1;
        let is_end = self.values_left == 0;
        if is_end {
            self.is_first_over = false;
            self.first = None;
        }
        Seen {
            first_text: None,
            is_end,
        }
    }
}

#[cfg(test)]
mod tests;
