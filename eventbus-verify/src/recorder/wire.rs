//! What client and recorder say to each other besides records.

use crate::record::{Record, check_seal, seal};
use crate::stamp::RunId;

pub(crate) const GREETING_BYTES: usize = 16;

const HELLO: [u8; 8] = *b"EBHELLO1";
const WELCOME: [u8; 8] = *b"EBWELCO1";
/// Stands where a record has its operation.
const FLUSH: u8 = 0xff;

/// The client's first bytes: who it is.
pub(crate) fn hello(process_id: u32) -> [u8; GREETING_BYTES] {
    greeting(HELLO, process_id, 0)
}

pub(crate) fn read_hello(bytes: &[u8; GREETING_BYTES]) -> Option<u32> {
    read_greeting(HELLO, bytes).map(|(process_id, _)| process_id)
}

/// The recorder's first bytes: which run it is, and the client's number.
pub(crate) fn welcome(run: RunId, process: u32) -> [u8; GREETING_BYTES] {
    greeting(WELCOME, run.0, process)
}

pub(crate) fn read_welcome(bytes: &[u8; GREETING_BYTES]) -> Option<(RunId, u32)> {
    read_greeting(WELCOME, bytes).map(|(run, process)| (RunId(run), process))
}

/// A question in place of a record: is all written that was sent before?
pub(crate) fn flush() -> [u8; Record::BYTES] {
    let mut bytes = [0; Record::BYTES];
    bytes[58] = FLUSH;
    seal(&mut bytes);
    bytes
}

pub(crate) fn is_flush(bytes: &[u8; Record::BYTES]) -> bool {
    bytes[58] == FLUSH && check_seal(bytes).is_ok()
}

fn greeting(magic: [u8; 8], first: u32, second: u32) -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[..8].copy_from_slice(&magic);
    bytes[8..12].copy_from_slice(&first.to_le_bytes());
    bytes[12..].copy_from_slice(&second.to_le_bytes());
    bytes
}

fn read_greeting(magic: [u8; 8], bytes: &[u8; GREETING_BYTES]) -> Option<(u32, u32)> {
    let (found, numbers) = bytes.split_first_chunk::<8>()?;
    let (first, second) = numbers.split_first_chunk::<4>()?;
    let second = u32::from_le_bytes(second.try_into().ok()?);
    (*found == magic).then_some((u32::from_le_bytes(*first), second))
}
