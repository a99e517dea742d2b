//! What a damaged ledger says. What the recorder writes into it is in `recorder.rs`.

use std::fs::{read, write};
use std::path::PathBuf;

use eventbus_verify::{Entry, Error, Ledger, LedgerWriter, Operation, Phase, Record, RunId, Stamp};
use tempfile::TempDir;

const COUNT: u32 = 5;

#[test]
fn what_was_appended_is_read() {
    let (_folder, path) = written();
    let ledger = Ledger::read(&path).unwrap();
    assert_eq!(ledger.run(), RunId(9));
    assert_eq!(ledger.records().len(), COUNT as usize + 1);
    for (sequence, record) in ledger.records()[..COUNT as usize].iter().enumerate() {
        assert_eq!(record.sequence, sequence as u64);
        assert_eq!(record.entry.stamp, Some(Stamp::new(1, 2, sequence as u32)));
    }
    assert!(ledger.is_complete());
}

#[test]
fn records_are_read_in_order_of_time() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ledger");
    let mut writer = LedgerWriter::create(&path, RunId(9)).unwrap();
    writer.append(&[record(3, 0), record(1, 1)]).unwrap();
    writer.append(&[record(3, 2), record(2, 3)]).unwrap();
    let ledger = Ledger::read(&path).unwrap();
    let sequences: Vec<u64> = ledger.records().iter().map(|one| one.sequence).collect();
    assert_eq!(sequences, [1, 3, 0, 2]);
    assert!(!ledger.is_complete(), "it was not closed");
}

#[test]
fn a_torn_tail_is_cut_and_counted_at_every_length() {
    let (_folder, path) = written();
    let whole = read(&path).unwrap();
    for length in Record::BYTES..whole.len() {
        write(&path, &whole[..length]).unwrap();
        let ledger = Ledger::read(&path).unwrap();
        assert_eq!(ledger.records().len(), length / Record::BYTES - 1);
        let torn = length % Record::BYTES;
        assert_eq!(ledger.cut().bytes, torn as u64, "{length} bytes");
        assert_eq!(ledger.cut().records, u64::from(torn > 0));
        assert!(!ledger.is_complete());
    }
}

#[test]
fn zeros_at_the_end_are_cut() {
    let (_folder, path) = written();
    let mut bytes = read(&path).unwrap();
    bytes.extend([0; 2 * Record::BYTES + 7]);
    write(&path, bytes).unwrap();
    let ledger = Ledger::read(&path).unwrap();
    assert_eq!((ledger.cut().records, ledger.cut().bytes), (3, 135));
    assert_eq!(ledger.records().len(), COUNT as usize + 1);
    assert!(!ledger.is_complete());
}

#[test]
fn damage_before_the_end_names_its_offset() {
    let (_folder, path) = written();
    let whole = read(&path).unwrap();
    for index in 1..=COUNT as usize {
        let mut bytes = whole.clone();
        bytes[index * Record::BYTES + 17] ^= 1;
        write(&path, bytes).unwrap();
        let error = Ledger::read(&path).unwrap_err();
        let expected = (index * Record::BYTES) as u64;
        assert!(matches!(error, Error::Damaged { offset, .. } if offset == expected));
    }
}

#[test]
fn a_missing_record_is_noticed() {
    let (_folder, path) = written();
    let mut bytes = read(&path).unwrap();
    bytes.drain(2 * Record::BYTES..3 * Record::BYTES);
    write(&path, bytes).unwrap();
    let error = Ledger::read(&path).unwrap_err();
    assert!(
        matches!(error, Error::Damaged { offset: 128, .. }),
        "{error}"
    );
}

#[test]
fn something_else_is_no_ledger() {
    let (_folder, path) = written();
    let whole = read(&path).unwrap();
    let mut damaged = whole.clone();
    damaged[16] ^= 1;
    let mut other = whole.clone();
    other[0] = b'X';
    for bytes in [damaged, other, whole[..63].to_vec(), Vec::new()] {
        write(&path, bytes).unwrap();
        let error = Ledger::read(&path).unwrap_err();
        assert!(matches!(error, Error::NotALedger { .. }), "{error}");
    }
}

#[test]
fn a_ledger_is_never_written_over() {
    let (_folder, path) = written();
    let error = LedgerWriter::create(&path, RunId(9)).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

/// A closed ledger of a few records.
fn written() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ledger");
    let mut writer = LedgerWriter::create(&path, RunId(9)).unwrap();
    for key_seq in 0..COUNT {
        writer
            .append(&[record(u64::from(key_seq), key_seq)])
            .unwrap();
    }
    assert_eq!(writer.close(99).unwrap(), u64::from(COUNT) + 1);
    (folder, path)
}

fn record(time: u64, key_seq: u32) -> Record {
    let entry = Entry::of(Operation::Publish, Stamp::new(1, 2, key_seq));
    Record::new(time, 1, 1, Phase::Invoke, entry)
}
