//! Payloads of the checker's runs, damaged, and sealed again so that damage reaches what is behind
//! the checksum.

use eventbus_verify::{MessageId, Payload, RunId, crc32c};

use crate::Target;

pub(crate) const TARGET: Target = Target {
    name: "payloads",
    run,
    words: &["EBP1", "\0\0\0\0"],
    cost: 1,
};

/// Where the checksum stands.
const CHECKSUM: std::ops::Range<usize> = 38..42;

fn run(data: &[u8]) {
    check(data);
    if data.len() >= Payload::BYTES_MIN {
        let mut sealed = data.to_vec();
        sealed[34..38].copy_from_slice(&(data.len() as u32).to_le_bytes());
        let covered = [&sealed[..CHECKSUM.start], &sealed[CHECKSUM.end..]].concat();
        sealed[CHECKSUM].copy_from_slice(&crc32c(&covered).to_le_bytes());
        check(&sealed);
    }
    if let Some((id, _)) = data.split_first_chunk() {
        let id = MessageId::from_u128(u128::from_be_bytes(*id));
        if let Some((run, stamp)) = id.origin() {
            assert_eq!(stamp.id(run), id);
        }
    }
}

fn check(bytes: &[u8]) {
    match Payload::decode(bytes) {
        Ok(payload) => {
            assert_eq!(payload.stamp.id(payload.run), payload.id);
            let other = RunId(payload.run.0.wrapping_add(1));
            assert!(Payload::decode_of(other, bytes).is_err());
        }
        Err(error) => drop(error.to_string()),
    }
}
