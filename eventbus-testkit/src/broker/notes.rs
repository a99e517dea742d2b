//! What the suite has shown of a broker, noted in a file where somebody asks for that.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;

use eventbus_core::{AdminRequest, Capabilities, Durability, ErrorKind};

use super::BrokerHarness;

/// The variable that names the directory; nothing is noted without it.
pub const NOTES_VARIABLE: &str = "EVENTBUS_CONFORMANCE_NOTES";

/// Notes that a broker has passed a check: `holds`, or `refused` where it declares that it cannot do
/// that, which the check has seen it refuse.
///
/// Each line of the broker's file is a check and one of the two words.
///
/// # Panics
///
/// When the server does not answer, or the file cannot be written.
pub async fn note(check: &str, harness: &dyn BrokerHarness) {
    let Some(directory) = std::env::var_os(NOTES_VARIABLE) else {
        return;
    };
    let broker = harness.connect().await.expect("the server answers");
    let capabilities = broker.capabilities();
    let holds = match check {
        "topics_are_listed_where_possible" => {
            let listed = broker.admin(AdminRequest::DescribeTopics(Vec::new())).await;
            !listed.is_err_and(|error| error.kind() == ErrorKind::Unsupported)
        }
        _ => declares(check, &capabilities),
    };
    let word = if holds { "holds" } else { "refused" };
    let directory = PathBuf::from(directory);
    fs::create_dir_all(&directory).expect("the directory can be made");
    let file = directory.join(format!("{}.txt", capabilities.system));
    let file = OpenOptions::new().create(true).append(true).open(file);
    let mut file = file.expect("the file can be opened");
    // One write, so that lines of tests that run side by side do not mix.
    let line = format!("{check} {word}\n");
    file.write_all(line.as_bytes()).expect("there is room");
}

/// Whether a check shows that something is done, and not that it is refused.
fn declares(check: &str, capabilities: &Capabilities) -> bool {
    match check {
        "later_messages_of_a_refused_key_are_held_back_where_declared" => {
            capabilities.ordered_pipelining
        }
        "handed_out_is_counted_where_declared" => capabilities.hand_out_count,
        "start_earliest_sees_history_where_declared" => capabilities.history,
        "reading_starts_at_a_position"
        | "reading_starts_at_a_time"
        | "bounded_read_ends_where_it_says"
        | "empty_partition_ends_at_once"
        | "reader_has_all_its_lanes_at_once"
        | "reader_moves_no_group"
        | "group_is_reset_only_without_members" => capabilities.replay,
        "gap_is_reported_with_its_range" => capabilities.gaps,
        "lag_counts_what_is_not_settled" | "groups_are_listed_with_their_positions" => {
            capabilities.lag
        }
        "restart_keeps_what_was_acknowledged" => capabilities.durability != Durability::Process,
        _ => true,
    }
}
