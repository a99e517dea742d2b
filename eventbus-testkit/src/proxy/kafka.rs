//! The protocol of Kafka, as far as a wire that is harmed has to follow it: which request has which
//! response, and where a response names brokers and errors.
//!
//! ```text
//!  client  ─ length key version id … ──▶         one connection, answered in the order of the requests
//!          ◀──────────── length id … ─  broker
//! ```
//!
//! Clients connect to the addresses that a broker names in its answers to `Metadata` and
//! `FindCoordinator`. The proxy names itself there, or they would pass it by.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::net::SocketAddr;

use super::WireFault;
use super::protocol::{Answered, Asked, Watch};

/// A request of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KafkaApi {
    /// Messages are published.
    Produce = 0,
    /// Messages are read.
    Fetch = 1,
    /// The first and last offsets are asked for.
    ListOffsets = 2,
    /// Topics, partitions and brokers are asked for.
    Metadata = 3,
    /// A group's offsets are recorded.
    OffsetCommit = 8,
    /// A group's offsets are asked for.
    OffsetFetch = 9,
    /// A group's coordinator is asked for.
    FindCoordinator = 10,
    /// A member joins its group.
    JoinGroup = 11,
    /// A member says that it is there.
    Heartbeat = 12,
    /// A member leaves its group.
    LeaveGroup = 13,
    /// A member asks which partitions it has.
    SyncGroup = 14,
}

/// Picks requests of Kafka by what they ask for.
#[derive(Clone, Copy, Debug)]
pub struct Requests(u128);

impl Requests {
    /// These.
    #[must_use]
    pub fn of(apis: &[KafkaApi]) -> Self {
        Self(apis.iter().fold(0, |all, api| all | 1 << *api as u32))
    }

    fn picks(self, key: i16) -> bool {
        (0..128).contains(&key) && self.0 >> key & 1 == 1
    }
}

/// The header of a request: its length, key, version and id.
const REQUEST_BYTES: usize = 12;
/// The header of a response: its length and the id of its request.
const RESPONSE_BYTES: usize = 8;
/// The bytes of a header that its length counts.
const REQUEST_COUNTED: usize = 8;
const RESPONSE_COUNTED: usize = 4;
/// A response that is to be rewritten and is longer passes as it is.
const REWRITTEN_MAX: usize = 64 << 20;

/// One connection.
#[derive(Debug)]
pub(super) struct Session {
    requests: Requests,
    /// Where clients are to connect to.
    address: SocketAddr,
    client: Headers<REQUEST_BYTES>,
    server: Headers<RESPONSE_BYTES>,
    /// What was asked and is not answered.
    asked: VecDeque<Request>,
    /// Whether the response to one of these is to be lost.
    loses: bool,
    /// What is done with the response that has begun.
    now: Now,
    /// Nothing can be told of what passes.
    is_opaque: bool,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    id: i32,
    key: i16,
    version: i16,
    is_lost: bool,
    /// What its response is to say.
    error: Option<i16>,
}

#[derive(Debug)]
enum Now {
    Passes,
    Loses,
    /// It is passed on, rewritten, when all of it has come.
    Collects(Request, Vec<u8>),
}

impl Session {
    pub(super) fn new(requests: Requests, address: SocketAddr) -> Self {
        Self {
            requests,
            address,
            client: Headers::default(),
            server: Headers::default(),
            asked: VecDeque::new(),
            loses: false,
            now: Now::Passes,
            is_opaque: false,
        }
    }

    /// The request that a response with this id is to. Those before have none, such as a `Produce`
    /// that asks for no acknowledgement.
    fn request(&mut self, id: i32) -> Option<Request> {
        let at = self.asked.iter().position(|request| request.id == id)?;
        self.asked.drain(..=at).next_back()
    }

    /// Whether this is in an answer that is read as a whole, because something in it is to change.
    fn is_rewritten(request: &Request) -> bool {
        let names_brokers = [KafkaApi::Metadata as i16, KafkaApi::FindCoordinator as i16];
        names_brokers.contains(&request.key) || request.error.is_some()
    }

    /// A response has begun with this header, which has not been passed on.
    fn begins(&mut self, header: [u8; RESPONSE_BYTES], to: &mut Vec<u8>) {
        let id = i32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        self.now = match self.request(id) {
            Some(request) if request.is_lost => Now::Loses,
            Some(request) if Self::is_rewritten(&request) && self.server.left <= REWRITTEN_MAX => {
                Now::Collects(request, header[4..].to_vec())
            }
            _ => {
                to.extend(header);
                Now::Passes
            }
        };
    }

    /// Goes on with the response that has begun.
    fn goes_on(&mut self, bytes: &[u8], answered: &mut Outgoing) {
        match &mut self.now {
            Now::Passes => answered.bytes.extend(bytes),
            Now::Loses => {}
            Now::Collects(_, body) => body.extend(bytes),
        }
        if self.server.left > 0 {
            return;
        }
        match std::mem::replace(&mut self.now, Now::Passes) {
            Now::Passes => {}
            Now::Loses => answered.is_served = true,
            Now::Collects(request, body) => {
                let rewritten = rewritten(&request, &body, self.address);
                answered.misreported += u64::from(request.error.is_some() && rewritten.is_some());
                let body = rewritten.unwrap_or(body);
                // It was at most as long as it may be, and an address is short.
                answered.bytes.extend((body.len() as u32).to_be_bytes());
                answered.bytes.extend(body);
            }
        }
    }
}

/// What is to be done with a piece of responses.
#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    is_served: bool,
    misreported: u64,
}

impl Watch for Session {
    fn asks<'b>(&mut self, bytes: &'b [u8], fault: WireFault) -> Asked<'b> {
        let mut asked = Asked::passing(bytes);
        let mut rest = bytes;
        while let (false, Some(header)) = (self.is_opaque, self.client.next(&mut rest)) {
            let [_, _, _, _, key @ .., a, b, c, d] = header;
            let mut request = Request {
                key: i16::from_be_bytes([key[0], key[1]]),
                version: i16::from_be_bytes([key[2], key[3]]),
                id: i32::from_be_bytes([a, b, c, d]),
                is_lost: false,
                error: None,
            };
            self.is_opaque |= !self.client.skip(header, REQUEST_COUNTED);
            let is_picked = self.requests.picks(request.key);
            match fault {
                WireFault::LoseResponse if is_picked => request.is_lost = !self.loses,
                WireFault::Misreport(code) if is_picked => request.error = Some(code),
                WireFault::DelayRequest(time) if is_picked => asked.late = Some(time),
                _ => {}
            }
            self.loses |= request.is_lost;
            self.asked.push_back(request);
        }
        asked.loses = self.loses;
        asked
    }

    fn answers<'b>(&mut self, bytes: &'b [u8]) -> Answered<'b> {
        let mut answered = Outgoing::default();
        let mut rest = bytes;
        while !rest.is_empty() && !answered.is_served {
            if self.is_opaque {
                answered.bytes.extend(rest);
                break;
            }
            if self.server.left == 0 {
                let Some(header) = self.server.next(&mut rest) else {
                    break;
                };
                if !self.server.skip(header, RESPONSE_COUNTED) {
                    self.is_opaque = true;
                    answered.bytes.extend(header);
                    continue;
                }
                self.begins(header, &mut answered.bytes);
            }
            let (body, behind) = rest.split_at(self.server.left.min(rest.len()));
            self.server.left -= body.len();
            rest = behind;
            self.goes_on(body, &mut answered);
        }
        Answered {
            bytes: Cow::Owned(answered.bytes),
            is_served: answered.is_served,
            misreported: answered.misreported,
        }
    }
}

/// Finds the headers in a stream of frames.
#[derive(Debug)]
struct Headers<const BYTES: usize> {
    header: Vec<u8>,
    /// How much of the frame is still to come behind its header.
    left: usize,
}

impl<const BYTES: usize> Default for Headers<BYTES> {
    fn default() -> Self {
        Self {
            header: Vec::new(),
            left: 0,
        }
    }
}

impl<const BYTES: usize> Headers<BYTES> {
    /// The next header that ends within these bytes, which are taken from their begin, with what is
    /// left of the frame before.
    fn next(&mut self, bytes: &mut &[u8]) -> Option<[u8; BYTES]> {
        let (body, rest) = bytes.split_at(self.left.min(bytes.len()));
        self.left -= body.len();
        let room = BYTES - self.header.len();
        let (header, rest) = rest.split_at(room.min(rest.len()));
        self.header.extend(header);
        *bytes = rest;
        let header = *self.header.first_chunk()?;
        self.header.clear();
        Some(header)
    }

    /// Sets how much comes behind a header of which `counted` bytes are in its length; false where
    /// that cannot be.
    fn skip(&mut self, header: [u8; BYTES], counted: usize) -> bool {
        let length = header
            .first_chunk()
            .map(|length| i32::from_be_bytes(*length));
        let length = length.and_then(|length| usize::try_from(length).ok());
        let left = length.and_then(|length| length.checked_sub(counted));
        self.left = left.unwrap_or(0);
        left.is_some()
    }
}

/// What a response says instead; none where its form is not known.
fn rewritten(request: &Request, body: &[u8], address: SocketAddr) -> Option<Vec<u8>> {
    let Request { key, version, .. } = *request;
    if key == KafkaApi::Metadata as i16 {
        return brokers(Rewriting::new(body, version >= 9), version, address);
    }
    if key == KafkaApi::FindCoordinator as i16 {
        return coordinators(Rewriting::new(body, version >= 3), version, address);
    }
    let error = request.error?;
    if key == KafkaApi::Produce as i16 && version <= 12 {
        return produced(Rewriting::new(body, version >= 9), error);
    }
    if key == KafkaApi::OffsetCommit as i16 && version <= 9 {
        return committed(Rewriting::new(body, version >= 8), version, error);
    }
    None
}

/// `Metadata`: the brokers come first.
fn brokers(mut response: Rewriting<'_>, version: i16, address: SocketAddr) -> Option<Vec<u8>> {
    response.header()?;
    if version >= 3 {
        response.copy(4)?;
    }
    for _ in 0..response.array()? {
        response.copy(4)?;
        response.address(address)?;
        if version >= 1 {
            response.text()?;
        }
        response.tags()?;
    }
    Some(response.finish())
}

/// `FindCoordinator`: of one group, or of several since version 4.
fn coordinators(mut response: Rewriting<'_>, version: i16, address: SocketAddr) -> Option<Vec<u8>> {
    response.header()?;
    if version >= 1 {
        response.copy(4)?;
    }
    if version < 4 {
        response.copy(2)?;
        if version >= 1 {
            response.text()?;
        }
        response.copy(4)?;
        response.address(address)?;
        return Some(response.finish());
    }
    for _ in 0..response.array()? {
        response.text()?;
        response.copy(4)?;
        response.address(address)?;
        response.copy(2)?;
        response.text()?;
        response.tags()?;
    }
    Some(response.finish())
}

/// `Produce`: the first partition; librdkafka asks for one at a time.
fn produced(mut response: Rewriting<'_>, error: i16) -> Option<Vec<u8>> {
    response.header()?;
    (response.array()? > 0).then_some(())?;
    response.text()?;
    (response.array()? > 0).then_some(())?;
    response.copy(4)?;
    response.error(error)?;
    Some(response.finish())
}

/// `OffsetCommit`: every partition.
fn committed(mut response: Rewriting<'_>, version: i16, error: i16) -> Option<Vec<u8>> {
    response.header()?;
    if version >= 3 {
        response.copy(4)?;
    }
    for _ in 0..response.array()? {
        response.text()?;
        for _ in 0..response.array()? {
            response.copy(4)?;
            response.error(error)?;
            response.tags()?;
        }
        response.tags()?;
    }
    Some(response.finish())
}

/// Copies a response, and says something else here and there.
struct Rewriting<'a> {
    from: &'a [u8],
    to: Vec<u8>,
    /// Whether it is of a version with compact lengths and tagged fields (KIP-482).
    is_flexible: bool,
}

impl<'a> Rewriting<'a> {
    fn new(body: &'a [u8], is_flexible: bool) -> Self {
        Self {
            from: body,
            to: Vec::with_capacity(body.len() + 32),
            is_flexible,
        }
    }

    /// The id, and the tags of the header.
    fn header(&mut self) -> Option<()> {
        self.copy(4)?;
        self.tags()
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.from.split_at_checked(count)?;
        self.from = rest;
        Some(taken)
    }

    fn copy(&mut self, count: usize) -> Option<()> {
        let taken = self.take(count)?;
        self.to.extend(taken);
        Some(())
    }

    fn copy_varint(&mut self) -> Option<usize> {
        let before = self.from;
        let value = self.varint()?;
        self.to.extend(&before[..before.len() - self.from.len()]);
        Some(value)
    }

    fn varint(&mut self) -> Option<usize> {
        let mut value = 0;
        for shift in (0..35).step_by(7) {
            let byte = self.take(1)?[0];
            value |= usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// How many elements follow; none of them where the array is null.
    fn array(&mut self) -> Option<usize> {
        if self.is_flexible {
            return Some(self.copy_varint()?.saturating_sub(1));
        }
        let count = i32::from_be_bytes(*self.from.first_chunk()?);
        self.copy(4)?;
        Some(usize::try_from(count).unwrap_or(0))
    }

    /// The length of a text that follows, which is not copied.
    fn text_length(&mut self) -> Option<usize> {
        if self.is_flexible {
            return Some(self.varint()?.saturating_sub(1));
        }
        let length = i16::from_be_bytes(*self.take(2)?.first_chunk()?);
        Some(usize::try_from(length).unwrap_or(0))
    }

    fn text(&mut self) -> Option<()> {
        let before = self.from;
        let length = self.text_length()?;
        self.take(length)?;
        self.to.extend(&before[..before.len() - self.from.len()]);
        Some(())
    }

    fn tags(&mut self) -> Option<()> {
        if !self.is_flexible {
            return Some(());
        }
        for _ in 0..self.copy_varint()? {
            self.copy_varint()?;
            let length = self.copy_varint()?;
            self.copy(length)?;
        }
        Some(())
    }

    /// A host and a port, which become others. Where there is none, it stays so.
    fn address(&mut self, address: SocketAddr) -> Option<()> {
        let before = self.from;
        let length = self.text_length()?;
        self.take(length + 4)?;
        if length == 0 {
            self.to.extend(&before[..before.len() - self.from.len()]);
            return Some(());
        }
        let host = address.ip().to_string();
        match self.is_flexible {
            // No address has as many as 127 letters.
            true => self.to.push(host.len() as u8 + 1),
            false => self.to.extend((host.len() as i16).to_be_bytes()),
        }
        self.to.extend(host.as_bytes());
        self.to.extend(i32::from(address.port()).to_be_bytes());
        Some(())
    }

    /// An error. One that the broker says itself stays.
    fn error(&mut self, code: i16) -> Option<()> {
        let said = i16::from_be_bytes(*self.take(2)?.first_chunk()?);
        let code = if said == 0 { code } else { said };
        self.to.extend(code.to_be_bytes());
        Some(())
    }

    fn finish(mut self) -> Vec<u8> {
        self.to.extend(self.from);
        self.to
    }
}

#[cfg(test)]
mod tests;
