//! Whatever stands on a topic of dead letters, through the desk of its group.

use eventbus_core::{DeadLetter, DeadLetters, Publisher, Redrive, Topic};
use eventbus_testkit::TestBus;

use crate::{Target, message, runtime};

pub(crate) const TARGET: Target = Target {
    name: "dead_letters",
    run,
    words: &[
        "\n====\n",
        "\n\n",
        "@key: 7\n",
        "eb-dlq-id: 7\n",
        "eb-dlq-id: 8\n",
        "eb-dlq-group: billing\n",
        "eb-dlq-topic: orders\n",
        "eb-dlq-cause: HandlerFailed\n",
        "eb-dlq-error: odd\n",
        "eb-dlq-attempts: 3\n",
        "eb-dlq-first-failed-at: 2026-01-01T00:00:00Z\n",
        "eb-dlq-failed-at: 2026-01-01T00:00:00Z\n",
        "eb-dlq-partition: 1\n",
        "eb-dlq-position: 18\n",
        "eb-dlq-keyless: true\n",
        "eb-dlq-whole: 8\n",
        "eb-dlq-whole: 18446744073709551615\n",
        "eb-dlq-part: 0\n",
        "eb-dlq-part: 4\n",
        "eb-dlq-status: claimed\n",
        "eb-dlq-status: redriven\n",
        "eb-dlq-status: edited\n",
        "eb-dlq-status: discarded\n",
        "eb-dlq-status: postponed\n",
        "eb-dlq-by: ann\n",
        "eb-dlq-because: it is odd\n",
        "eb-dlq-at: 2026-01-01T00:00:00Z\n",
        "eb-dlq-claim: 1\n",
        "eb-dlq-until: 2026-01-01T00:01:00Z\n",
        "eb-dlq-new-id: 9\n",
        "eb-redrives: 4294967295\n",
        "eb-id: 7\n",
        "eb-type: OrderCreated\n",
        "eb-format: flat\n",
        "\u{0}\u{0}\u{0}\u{0}",
    ],
    cost: 40,
};

const ORDERS: Topic = Topic::from_static("orders");
const LETTERS: Topic = Topic::from_static("orders.billing.dlq");
const RECORDS_MAX: usize = 16;

fn run(data: &[u8]) {
    let mut records = message::read_all(&LETTERS, data);
    records.truncate(RECORDS_MAX);
    runtime().block_on(async {
        let test = TestBus::new();
        // Some of them are larger than the broker takes, which is none of the desk's concern.
        drop(test.broker().publish(records).await);
        let desk = test.bus().dead_letters("billing", &[ORDERS]);
        let desk = desk.expect("the names are sound");
        look(&desk).await;
        test.run_out().await;
    });
}

/// What is listed can be shown, and ends when it is dealt with.
async fn look(desk: &DeadLetters) {
    let listed = desk.list().await.expect("the desk lists what it can read");
    let again = desk.list().await.expect("the desk lists what it can read");
    assert_eq!(ids(&listed), ids(&again));
    for letter in &listed {
        let shown = desk.show(&letter.id).await.expect("it was listed");
        assert_eq!(shown.message, letter.message, "shown otherwise than listed");
        let history = desk.history(&letter.id).await.expect("it was listed");
        assert!(!history.is_empty(), "a letter that nobody stored");
    }
    desk.by_error().await.expect("letters can be grouped");
    let redriven = desk.redrive(Redrive::all().by("fuzz")).await;
    redriven.expect("the desk answers");
    let left = desk.list().await.expect("the desk lists what it can read");
    let discarded = desk.discard(Redrive::all().by("fuzz")).await;
    let discarded = discarded.expect("the desk answers");
    let end = desk.list().await.expect("the desk lists what it can read");
    assert!(end.len() as u64 + discarded.done >= left.len() as u64);
    assert!(end.len() <= left.len(), "a letter came from nowhere");
}

fn ids(letters: &[DeadLetter]) -> Vec<String> {
    letters.iter().map(|letter| letter.id.to_string()).collect()
}
