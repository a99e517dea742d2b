//! The file of a ledger: damaged anywhere, and whole but of records that no recorder would write,
//! which the checks go through.

use eventbus_verify::{Effect, History, Ledger, MessageId, Promises, Report, RunId, Stamp, crc32c};

use crate::Target;

pub(crate) const TARGET: Target = Target {
    name: "ledger",
    run,
    words: &["EBLEDGER", "\u{1}\0\0\0@\0\0\0"],
    cost: 20,
};

const BYTES: usize = 64;
const RECORDS_MAX: usize = 256;

/// The first byte says whether the file is taken as it is, or put right as far as its checks go.
fn run(data: &[u8]) {
    let Some((mode, data)) = data.split_first() else {
        return;
    };
    match mode % 2 {
        0 => read(data),
        _ => read(&whole(data)),
    }
}

/// A ledger of these records: numbered, sealed, of operations and phases there are.
fn whole(data: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(data.len() + 2 * BYTES);
    let mut header = [0; BYTES];
    header[..8].copy_from_slice(b"EBLEDGER");
    header[8..12].copy_from_slice(&1u32.to_le_bytes());
    header[12..16].copy_from_slice(&(BYTES as u32).to_le_bytes());
    header[16..20].copy_from_slice(&7u32.to_le_bytes());
    file.extend(sealed(header));
    let (records, _) = data.as_chunks::<BYTES>();
    for (number, record) in records.iter().take(RECORDS_MAX).enumerate() {
        let mut record = *record;
        record[..8].copy_from_slice(&(number as u64).to_le_bytes());
        record[58] = 1 + record[58] % 20;
        record[59] = (1 + record[59] % 4) | (record[59] & 0x30);
        file.extend(sealed(record));
    }
    file
}

fn sealed(mut record: [u8; BYTES]) -> [u8; BYTES] {
    let checksum = crc32c(&record[..60]);
    record[60..].copy_from_slice(&checksum.to_le_bytes());
    record
}

fn read(file: &[u8]) {
    let place = tempfile::tempdir().expect("a directory can be made");
    let path = place.path().join("ledger");
    std::fs::write(&path, file).expect("a file can be written");
    let ledger = match Ledger::read(&path) {
        Ok(ledger) => ledger,
        Err(error) => return drop(error.to_string()),
    };
    for record in ledger.records() {
        drop(record.to_string());
    }
    let stamps = ledger
        .records()
        .iter()
        .filter_map(|record| record.entry.stamp);
    let effects = stamps
        .enumerate()
        .map(|(order, stamp)| effect(stamp, order));
    let history = History::new(&ledger, effects);
    let report = Report::of(&history, &Promises::to([1, 2]));
    assert_eq!(
        report.passed(),
        report.violations_total() == 0 && report.passed()
    );
    assert!(!report.to_markdown().is_empty());
}

/// Every third one is of another run, or says of itself what its id does not.
fn effect(stamp: Stamp, order: usize) -> Effect {
    let id = match order % 3 {
        2 => MessageId::from_u128(stamp.id(RunId(7)).as_u128() ^ 1),
        _ => stamp.id(RunId(7)),
    };
    Effect {
        group: 1,
        id,
        key: stamp.key,
        key_seq: stamp.key_seq,
        attempt: 1,
        order: order as u64,
    }
}
