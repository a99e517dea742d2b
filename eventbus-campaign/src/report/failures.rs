//! The failures that the SDK has to stand, by their numbers, and where each is tried.

use std::fmt::Write as _;

use crate::scenario;
use crate::tally::Tally;

/// Something that goes wrong in production.
struct Failure {
    number: u32,
    what: &'static str,
    /// Tests of the repository that try it, beside the scenarios.
    tests: &'static [&'static str],
    /// Why it is not tried, or what else is to be known.
    note: &'static str,
}

const fn failure(number: u32, what: &'static str, tests: &'static [&'static str]) -> Failure {
    Failure {
        number,
        what,
        tests,
        note: "",
    }
}

const fn noted(
    number: u32,
    what: &'static str,
    tests: &'static [&'static str],
    note: &'static str,
) -> Failure {
    Failure {
        number,
        what,
        tests,
        note,
    }
}

const FAILURES: &[Failure] = &[
    failure(
        25,
        "a consumer is killed at each step: received, decoded, inbox written, effects written, committed, settled",
        &["what_a_killed_service_committed_and_published_adds_up"],
    ),
    failure(
        26,
        "a consumer stands still beyond its lease and goes on with what it had",
        &["a_member_that_stood_still_is_fenced"],
    ),
    noted(
        27,
        "a commit of positions fails during a rebalance",
        &["a_commit_whose_answer_is_lost_is_repeated_and_skips_nothing"],
        "a fault of Kafka's group protocol. Where a store leases partitions, settling is fenced by the lease (26)",
    ),
    failure(
        28,
        "poison: a message that no handler can handle",
        &["a_parked_key_waits_for_an_operator_and_others_go_on"],
    ),
    noted(
        29,
        "a handler panics, overflows its stack, or takes all memory",
        &["a_panic_is_a_failed_attempt_and_nothing_more"],
        "a stack overflow and a lack of memory end the process, and are kills (25)",
    ),
    failure(30, "dead letters cannot be stored", &[]),
    failure(31, "everything that was in flight comes back at once", &[]),
    failure(32, "handlers are slower than who publishes", &[]),
    failure(
        33,
        "one key is slow, or has most of the messages",
        &["while_one_key_retries_others_go_on_and_its_later_messages_wait"],
    ),
    failure(
        34,
        "keys end in another order than they began, and then the process dies",
        &["a_dropped_consumer_is_a_crash_that_loses_nothing"],
    ),
    failure(
        35,
        "a handler is dropped at any point where it waits",
        &[
            "a_handler_that_never_returns_is_dropped_at_its_deadline",
            "a_consumer_that_is_dropped_anywhere_leaves_nothing_half_done",
        ],
    ),
    failure(
        36,
        "a shutdown with much in flight, a second signal, a shutdown while the broker is away",
        &["a_handler_longer_than_the_timeout_is_dropped_and_its_message_handed_on"],
    ),
    failure(41, "a crash between commit and publish", &[]),
    failure(
        42,
        "a crash between the broker's answer and the removal from the outbox",
        &[],
    ),
    failure(
        43,
        "a crash, or a lost response, between publish and answer",
        &["a_commit_whose_answer_is_lost_takes_effect_once"],
    ),
    failure(
        44,
        "a slow transaction commits behind what relays have published",
        &["what_a_long_transaction_publishes_is_not_passed_over"],
    ),
    failure(
        45,
        "a transaction stays open for long",
        &["a_session_that_looks_at_the_past_holds_nothing_back"],
    ),
    failure(
        46,
        "two relays at once; the one that has the lease stands still",
        &[],
    ),
    failure(
        47,
        "a relay publishes a batch, and a part of it fails",
        &["a_refused_message_parks_its_key_and_no_other"],
    ),
    failure(
        48,
        "the database restarts, ends connections, or has none left",
        &[
            "a_server_that_crashes_again_and_again_loses_and_doubles_nothing",
            "connections_that_end_all_the_time_lose_and_double_nothing",
            "while_all_connections_are_lent_nothing_counts_as_an_attempt",
        ],
    ),
    failure(
        49,
        "the disk is full, the file is locked, a transaction cannot be serialized",
        &[
            "a_full_small_disk_marks_nothing_by_half_and_all_goes_on_when_there_is_room",
            "a_full_small_disk_loses_nothing_and_is_recovered_from",
            "a_transaction_that_cannot_be_serialized_is_done_again",
        ],
    ),
    failure(50, "a business transaction is rolled back", &[]),
    noted(
        51,
        "the inbox commits, and the effect rolls back",
        &[
            "work_ends_with_its_handler_however_that_ends",
            "an_event_whose_handler_commits_by_itself_is_never_settled_in_silence",
            "a_rollback_is_noticed_though_another_transaction_stands_in_its_place",
        ],
        "both are in one transaction that handlers only borrow; one that ends it is noticed",
    ),
    noted(
        52,
        "a backlog after the broker was away for long",
        &["a_service_with_an_outbox_accepts_work_while_connections_are_refused_and_catches_up"],
        "hundreds of thousands of messages here; ten million are a matter of `--round`",
    ),
    noted(
        60,
        "many append to one stream of an event store",
        &[],
        "the SDK has no event store yet",
    ),
    noted(
        61,
        "a projection crashes between its write and its position",
        &[],
        "the SDK has no projections yet; a handler's write and its inbox commit together (25)",
    ),
    noted(
        62,
        "the embedded log is torn, cut off or changed, or opened twice",
        &[
            "a_torn_log_keeps_what_was_committed_before",
            "a_truncated_file_is_damaged",
            "bits_flipped_anywhere_are_never_served_and_never_hang",
            "processes_that_open_a_new_file_at_once_all_succeed",
        ],
        "a file may be opened by many processes: every scenario on SQLite does so",
    ),
];

/// Where each failure is tried; a scenario counts only if it ran here and passed.
pub(super) fn table<'a>(tallies: impl Iterator<Item = &'a Tally> + Clone) -> String {
    let mut text = String::from(
        "\n## The failures\n\nBy their numbers in the specification of the SDK's reliability: 25 to 36, 41 to 52 and \
         60 to 62. A scenario counts where it ran in this report and passed; tests run in `dev/test`.\n\n\
         | # | what goes wrong | scenarios | tests | |\n| ---: | --- | --- | --- | --- |\n",
    );
    for failure in FAILURES {
        let scenarios = covering(failure.number, tallies.clone());
        let tests: Vec<String> = failure
            .tests
            .iter()
            .map(|test| format!("`{test}`"))
            .collect();
        let Failure {
            number, what, note, ..
        } = failure;
        let tests = tests.join(", ");
        writeln!(
            text,
            "| {number} | {what} | {scenarios} | {tests} | {note} |"
        )
        .expect("a string takes whatever is written");
    }
    text
}

fn covering<'a>(number: u32, tallies: impl Iterator<Item = &'a Tally> + Clone) -> String {
    let mut found = Vec::new();
    let covering = scenario::ALL
        .iter()
        .filter(|scenario| scenario.covers.contains(&number));
    for scenario in covering {
        let bases: Vec<&str> = tallies
            .clone()
            .filter(|tally| tally.scenario == scenario.name && tally.passed())
            .map(|tally| tally.base.as_str())
            .collect();
        found.push(match bases.is_empty() {
            true => format!("{} (not here)", scenario.name),
            false => format!("{} ({})", scenario.name, bases.join(", ")),
        });
    }
    found.join(", ")
}

#[cfg(test)]
mod tests {
    use super::FAILURES;
    use crate::scenario;
    use std::path::Path;

    /// All source files of the repository, as one text.
    fn sources(folder: &Path, text: &mut String) {
        for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            if path.is_dir() && name != "target" && name != ".git" {
                sources(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&std::fs::read_to_string(path).expect("a text"));
            }
        }
    }

    #[test]
    fn every_test_that_is_named_is_there() {
        let mut text = String::new();
        sources(
            Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")),
            &mut text,
        );
        for test in FAILURES.iter().flat_map(|failure| failure.tests) {
            assert!(
                text.contains(&format!("fn {test}(")),
                "there is no test {test}"
            );
        }
    }

    #[test]
    fn every_failure_of_the_lists_is_tried_or_says_why_not() {
        let asked = (25..=36).chain(41..=52).chain(60..=62);
        for number in asked {
            let failure = FAILURES.iter().find(|failure| failure.number == number);
            let failure = failure.unwrap_or_else(|| panic!("{number} is not in the list"));
            let has_scenario = scenario::ALL.iter().any(|one| one.covers.contains(&number));
            let is_said = has_scenario || !failure.tests.is_empty() || !failure.note.is_empty();
            assert!(is_said, "nothing is said of {number}");
        }
    }
}
