//! The thread of a member: it serves what the client has to say, and leaves the group at the end.
//!
//! A client whose commits are not answered is given up. Where the coordinator's connection fails while a
//! commit waits to be sent, librdkafka takes the coordinator for dead, forgets where it is, by which the
//! connection fails again, and so on; a request that was never sent is repeated without an end, and as
//! long as it is not answered the client does not join again (librdkafka 2.12:
//! `rd_kafka_handle_OffsetCommit`, `rd_kafka_buf_retry`, `wait_commit_cnt`).

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use eventbus_core::{Error, ErrorKind, Result, Retry, Until};
use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};

use crate::error::of_code;
use crate::subscriber::{Client, Member};

/// How long one look at the client may last; what comes ends it at once.
const LOOK: Duration = Duration::from_millis(50);

/// How long a lane may bring nothing before it is asked whether there is something.
const SILENCE: Duration = Duration::from_secs(30);

/// Starts the thread.
pub(crate) fn spawn(member: Arc<Member>, client: Arc<Client>) -> Result<()> {
    let thread = std::thread::Builder::new().name("eventbus-kafka".to_owned());
    let for_thread = Arc::clone(&member);
    let spawned = thread.spawn(move || {
        // Whatever happens in here, those who wait for its end hear of it.
        let gone = Gone(Arc::clone(&for_thread));
        live(&for_thread, client);
        drop(gone);
    });
    spawned.map(drop).map_err(|error| {
        Error::new(ErrorKind::Internal, "subscribe", "no thread can be started").with_source(error)
    })
}

struct Gone(Arc<Member>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.end();
        self.0.set_gone();
    }
}

/// Serves one client after another until the member ends.
fn live(member: &Arc<Member>, mut client: Arc<Client>) {
    while let Served::Unanswered = serve(member, &client) {
        tracing::warn!("the coordinator of a group answers no commits: its member joins anew");
        member.give_up_client(&client);
        bury(client);
        match join_anew(member) {
            Some(next) => client = next,
            None => return,
        }
    }
    leave(member, client);
}

/// Joins with another client; none when the member ends before there is one.
fn join_anew(member: &Arc<Member>) -> Option<Arc<Client>> {
    let mut pause = Duration::from_millis(50);
    while !member.is_ended() {
        let next = member.open();
        match next.and_then(|next| member.join(&next).map(|()| next)) {
            Ok(next) => return Some(next),
            // Whoever gives its password, for one, may not be there at the moment.
            Err(error) => tracing::warn!(%error, "a member joins anew in a moment"),
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
    None
}

/// Why a client is not served any more.
enum Served {
    /// The member has ended.
    Ended,
    /// Its commits are not answered.
    Unanswered,
}

fn serve(member: &Arc<Member>, client: &Arc<Client>) -> Served {
    let mut looked = Instant::now();
    while !member.is_ended() {
        if client.context().has_committed_for() > member.patience() {
            return Served::Unanswered;
        }
        hear(member, client, LOOK);
        let overdue = member.lanes().overdue(client.assignment_lost());
        if let Some(places) = overdue {
            member.give_up(client, &places);
            member.notify.notify_one();
        }
        lead(member, client);
        if member.subscription.group.is_some() && member.lanes().are_none() {
            hasten(client);
        }
        if looked.elapsed() > Duration::from_secs(1) {
            looked = Instant::now();
            look_after(member, client);
        }
    }
    Served::Ended
}

/// Closes a client that was given up, beside everything else: the calls that wait for it fail by that.
fn bury(client: Arc<Client>) {
    let thread = std::thread::Builder::new().name("eventbus-bury".to_owned());
    let spawned = thread.spawn(move || {
        close_under(&client, |error| {
            tracing::debug!(%error, "a client that was given up");
        })
    });
    if let Err(error) = spawned {
        // What waits for it waits on: the process has no threads left.
        tracing::error!(%error, "a client that was given up is not closed");
    }
}

/// Has the client's own thread look after its group now. By itself it does so once a second, and a
/// member that has lost its coordinator needs several looks: to find it, to join, to join by its new
/// name. Any question wakes it.
fn hasten(client: &Client) {
    let _ = client.rebalance_protocol();
}

/// What the client says of itself.
fn complain(member: &Member, error: &KafkaError) {
    let is_fatal = matches!(error, KafkaError::MessageConsumptionFatal(_));
    let code = error.rdkafka_error_code().unwrap_or(Code::Unknown);
    let error = of_code("read", code);
    // One connection of several: it is made anew.
    if let Code::BrokerTransportFailure | Code::Resolve | Code::OperationTimedOut = code
        && !is_fatal
    {
        return tracing::debug!(%error, "a connection of a consumer failed");
    }
    let error = member.complaints.explain("read", error);
    let retry = match code {
        _ if is_fatal => Retry::Never,
        // It may be missing for the moment only, while a broker starts; a group does not end for that.
        Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition => Retry::Later,
        // Who could join was let in; a password or a certificate that is being changed is not known
        // everywhere at once.
        Code::Authentication | Code::SaslAuthenticationFailed | Code::SSL | Code::BadMessage => {
            Retry::Later
        }
        _ => error.retry(),
    };
    member.fail(error.with_retry(retry));
}

/// Leads lanes on whose place was found out, between what the coordinator says.
fn lead(member: &Arc<Member>, client: &Arc<Client>) {
    if !member.has_found() {
        return;
    }
    while hear(member, client, Duration::ZERO) {}
    member.set_out(client);
    while hear(member, client, Duration::ZERO) {}
    member.has_set_out();
}

/// Hears one thing that the client says; false when there was none.
fn hear(member: &Member, client: &Client, wait: Duration) -> bool {
    match client.poll(wait) {
        None => return false,
        Some(Ok(record)) => {
            member.lanes().take_stray(&record);
            member.notify.notify_one();
        }
        Some(Err(error)) => complain(member, &error),
    }
    true
}

fn look_after(member: &Arc<Member>, client: &Arc<Client>) {
    let silent = member.lanes().silent(SILENCE);
    for (lane, place, next) in silent {
        let Some(next) = next else {
            // Nobody has said where it starts: librdkafka waits for an answer that it never asks for
            // again (librdkafka issue #5586).
            member.lanes().lead_astray(lane);
            member.notify.notify_one();
            continue;
        };
        let bounds = client.fetch_watermarks(place.topic.as_str(), place.partition, LOOK);
        if let Ok((_, high)) = bounds
            && high > next
            && member.lanes().seek_once(lane, next, high)
        {
            tracing::warn!(topic = %place.topic, partition = place.partition, next, high, "an assigned partition is silent though it has messages: it is sought anew");
            member.lanes().lead_astray(lane);
            member.notify.notify_one();
        }
    }
    let has_come =
        matches!(member.subscription.until, Some(Until::Time(time)) if time <= SystemTime::now());
    if has_come
        && member.lanes().end_time.is_some()
        && let Err(error) = member.find_ends()
    {
        tracing::warn!(%error, "where a reader ends is looked for again");
    }
}

/// Leaves the group. Nothing is committed by that.
fn leave(member: &Member, client: Arc<Client>) {
    let waiting = member.lanes().end();
    if let Some(places) = waiting {
        member.give_up(&client, &places);
    }
    member.take_client();
    // Calls that have begun end soon, and whoever drops the client last waits for the group.
    if !is_last(&client, Duration::from_secs(2)) {
        // A commit that no broker answers is waiting: it fails when the client is closed under it.
        close_under(&client, |error| complain(member, &error));
        is_last(&client, Duration::from_secs(1));
    }
    drop(client);
}

/// Closes a client that others still have, and hears what it says until it is closed.
fn close_under(client: &Client, mut hear: impl FnMut(KafkaError)) {
    if let Err(error) = client.close_queue() {
        tracing::debug!(%error, "a member that ends was closed before");
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while !client.closed() && Instant::now() < deadline {
        if let Some(Err(error)) = client.poll(LOOK) {
            hear(error);
        }
    }
}

/// Waits for others to be done with the client.
fn is_last(client: &Arc<Client>, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while Arc::strong_count(client) > 1 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    Arc::strong_count(client) == 1
}
