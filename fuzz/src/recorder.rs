//! What a client sends the recorder of a run: it listens to whoever connects to its socket.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use eventbus_verify::{Ledger, Recorder, RunId, crc32c};

use crate::Target;

pub(crate) const TARGET: Target = Target {
    name: "recorder",
    run,
    words: &["EBHELLO1\u{1}\0\0\0\0\0\0\0"],
    cost: 100,
};

const BYTES: usize = 64;
const GREETING: &[u8; 16] = b"EBHELLO1\x01\0\0\0\0\0\0\0";

/// The first byte says how far the client is true to the protocol: not at all, in its greeting, or
/// also in the seals of its records.
fn run(data: &[u8]) {
    let Some((mode, data)) = data.split_first() else {
        return;
    };
    let said = match mode % 3 {
        0 => data.to_vec(),
        1 => [GREETING, data].concat(),
        _ => [&GREETING[..], &sealed(data)].concat(),
    };
    let place = tempfile::tempdir().expect("a directory can be made");
    let (path, socket) = (place.path().join("ledger"), place.path().join("socket"));
    let recorder = Recorder::start(&path, &socket, RunId(7)).expect("it starts");
    let mut client = UnixStream::connect(&socket).expect("it listens");
    // It may have hung up on nonsense before it read all of it.
    drop(client.write_all(&said));
    drop(client.shutdown(Shutdown::Write));
    drop(client.read_to_end(&mut Vec::new()));
    let records = recorder.stop().expect("no client ends the recorder");
    let ledger = Ledger::read(&path).expect("no client damages the ledger");
    assert_eq!(ledger.records().len() as u64, records);
    assert!(ledger.is_complete());
}

/// Records of the first client, of operations and phases there are, or questions.
fn sealed(data: &[u8]) -> Vec<u8> {
    let (records, rest) = data.as_chunks::<BYTES>();
    let mut said = Vec::with_capacity(data.len());
    for record in records {
        let mut record = *record;
        record[24..28].copy_from_slice(&1u32.to_le_bytes());
        record[58] = match record[58] % 21 {
            20 => 0xff,
            operation => 1 + operation,
        };
        record[59] = (1 + record[59] % 4) | (record[59] & 0x30);
        let checksum = crc32c(&record[..60]);
        record[60..].copy_from_slice(&checksum.to_le_bytes());
        said.extend(record);
    }
    said.extend(rest);
    said
}
