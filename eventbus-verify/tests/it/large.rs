//! Two million records: that the checks come to an end, and find one fault among them.

use std::time::Instant;

use eventbus_verify::{
    Breach, Effect, Entry, History, Ledger, LedgerWriter, Operation, Phase, Promises, Record,
    Report, RunId, Stamp,
};
use tempfile::TempDir;

const RUN: RunId = RunId(5);
const MESSAGES: u32 = 250_000;
const KEYS: u32 = 1000;

#[test]
fn one_loss_in_two_million_records_is_found() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ledger");
    let mut writer = LedgerWriter::create(&path, RUN).unwrap();
    let mut effects = Vec::new();
    for number in 0..MESSAGES {
        let stamp = Stamp::new(1, number % KEYS, number / KEYS);
        writer
            .append(&records_of(stamp, u64::from(number)))
            .unwrap();
        effects.push(Effect {
            group: 1,
            id: stamp.id(RUN),
            key: stamp.key,
            key_seq: stamp.key_seq,
            attempt: 1,
            order: u64::from(number),
        });
    }
    let lost = effects.remove(123_456);
    writer.close(u64::from(MESSAGES) * 100).unwrap();

    let begun = Instant::now();
    let ledger = Ledger::read(&path).unwrap();
    println!(
        "read {} records: {:?}",
        ledger.records().len(),
        begun.elapsed()
    );
    assert!(ledger.records().len() > 2_000_000);
    let begun = Instant::now();
    let history = History::new(&ledger, effects);
    println!("sorted: {:?}", begun.elapsed());
    let begun = Instant::now();
    let report = Report::of(&history, &Promises::to([1]));
    println!("checked: {:?}", begun.elapsed());

    assert_eq!(report.violations_total(), 1, "{}", report.to_markdown());
    let mut violations = report.violations.iter();
    let violation = violations
        .find_map(|(_, found)| found.examples().first())
        .unwrap();
    assert_eq!(violation.breach, Breach::Lost);
    assert_eq!(violation.stamp.unwrap().id(RUN), lost.id);
    assert_eq!(violation.records.len(), 8, "only those of the message");
}

/// A message that is published, handed out, handled and found in the end.
fn records_of(stamp: Stamp, number: u64) -> [Record; 8] {
    let of = |operation| Entry::of(operation, stamp);
    let in_group = |operation| of(operation).with_group(1);
    let said = [
        (Phase::Invoke, of(Operation::Publish)),
        (Phase::Invoke, of(Operation::Send)),
        (Phase::Ok, of(Operation::Send)),
        (Phase::Ok, of(Operation::Publish).with_position(1, number)),
        (
            Phase::Ok,
            in_group(Operation::Deliver).with_position(1, number),
        ),
        (Phase::Invoke, in_group(Operation::Handle)),
        (Phase::Ok, in_group(Operation::Handle)),
        (Phase::Invoke, in_group(Operation::Settle)),
    ];
    let mut time = number * 100;
    said.map(|(phase, entry)| {
        time += 1;
        Record::new(time, 1, 1, phase, entry)
    })
}
