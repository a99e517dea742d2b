//! A member or a reader: joining, and what the group's coordinator says to it.
//!
//! ```text
//!  coordinator ──▶ rebalance (on the poller's thread) ─┬─ assigned: queue of its own ─▶ Assigned
//!                                                      ├─ revoked ─▶ Revoking … release ─▶ given up
//!                                                      └─ lost ────▶ Lost, given up at once
//! ```
//!
//! A member outlives its client: one whose commits are not answered for a whole session is given up for
//! another, which joins in its place (see [`poller`]).

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use eventbus_core::{Error, ErrorKind, Lane, Result, Start, Subscription, Topic};
use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext, RebalanceProtocol};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaRespErr;
use tokio::sync::{Notify, watch};

use crate::client::{ANSWER, Complaints, Context, blocking};
use crate::config::KafkaConfig;
use crate::error::into_error;
use crate::lanes::{End, Lanes, Opening, Place};
use crate::poller;
use crate::start::{bounds, commit, committed, ends, list, places, starts};

/// The client of one member.
pub(crate) type Client = BaseConsumer<MemberContext>;

const SUBSCRIBE: &str = "subscribe";

/// How long joining may take: as long as members that died keep their places, and more.
const JOIN: Duration = Duration::from_secs(60);

/// How long those who close a member wait for its brokers; the member ends by itself after that. A
/// commit that is not answered comes to its end before.
const LEAVE: Duration = Duration::from_secs(20);

/// What the two halves of a member, its poller and its client's callbacks share.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) subscription: Subscription,
    /// All there were when it subscribed.
    places: Vec<Place>,
    /// The topics that the group had read before.
    read_before: OnceLock<HashSet<Topic>>,
    lanes: Mutex<Lanes>,
    config: KafkaConfig,
    client: Mutex<Held>,
    /// Wakes `next`.
    pub(crate) notify: Arc<Notify>,
    pub(crate) complaints: Complaints,
    /// Where lanes go on whose place was looked for.
    found: Mutex<Vec<Found>>,
    /// Lanes are being led there.
    setting_out: AtomicBool,
    ended: AtomicBool,
    /// Raised by the first word of the coordinator.
    joined: watch::Sender<bool>,
    /// Raised when the client is gone, and the group knows.
    gone: watch::Sender<bool>,
}

/// The client until the member ends; the poller's thread drops it, for that blocks.
#[derive(Default)]
struct Held(Option<Arc<Client>>);

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Held").field(&self.0.is_some()).finish()
    }
}

/// Where a lane goes on.
#[derive(Debug)]
struct Found {
    lane: Lane,
    place: Place,
    start: i64,
    /// Where it would have gone on, if that were there.
    from: Option<i64>,
}

/// Hears what the client says.
pub(crate) struct MemberContext {
    context: Context,
    member: Arc<Member>,
    /// When each commit began that is not answered.
    commits: Mutex<Vec<Instant>>,
    /// Another client has taken its place: what the coordinator says to this one is of no account.
    given_up: watch::Sender<bool>,
}

impl MemberContext {
    fn new(member: Arc<Member>) -> Self {
        Self {
            context: Context {
                complaints: member.complaints.clone(),
            },
            member,
            commits: Mutex::default(),
            given_up: watch::Sender::new(false),
        }
    }

    fn commits(&self) -> MutexGuard<'_, Vec<Instant>> {
        self.commits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the oldest commit that is not answered has waited.
    pub(crate) fn has_committed_for(&self) -> Duration {
        let oldest = self.commits().iter().map(Instant::elapsed).max();
        oldest.unwrap_or_default()
    }

    /// Resolves when another client takes its place.
    pub(crate) async fn given_up(&self) {
        let mut given_up = self.given_up.subscribe();
        // The sender lives as long as this.
        let _ = given_up.wait_for(|given_up| *given_up).await;
    }
}

/// Commits for a member, and waits for the coordinator's answer as long as the client is not given up.
pub(crate) fn commit_watched(
    operation: &'static str,
    client: &Client,
    offsets: &[(Place, i64)],
) -> Result<()> {
    let began = Instant::now();
    let commits = || client.context().commits();
    commits().push(began);
    let done = commit(operation, client, offsets);
    let mut commits = commits();
    if let Some(index) = commits.iter().position(|other| *other == began) {
        commits.swap_remove(index);
    }
    done
}

impl ClientContext for MemberContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.context.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.context.error(error, reason);
    }

    fn stats_raw(&self, _statistics: &[u8]) {}
}

impl ConsumerContext for MemberContext {
    fn rebalance(&self, client: &Client, event: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let group = self.member.subscription.group.as_ref();
        tracing::debug!(
            group = group.map(|group| group.as_str()),
            ?event,
            partitions = list.count(),
            "partitions are shared out"
        );
        // One that was given up is answered, and opens nothing: the lanes are those of another client.
        let is_given_up = *self.given_up.borrow();
        let done = match event {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS if is_given_up => {
                take(client, list)
            }
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => {
                self.member.assigned(client, list)
            }
            _ if is_given_up => give_up(client, list),
            _ => self.member.revoked(client, list),
        };
        if is_given_up {
            return tracing::debug!(?done, "a client that was given up");
        }
        if let Err(error) = done {
            self.member.fail(into_error("share out partitions", error));
        }
        self.member.joined.send_replace(true);
    }
}

impl Member {
    fn new(config: KafkaConfig, subscription: Subscription, places: Vec<Place>) -> Arc<Self> {
        Arc::new(Self {
            places,
            read_before: OnceLock::new(),
            lanes: Mutex::new(Lanes::new(subscription.limits)),
            subscription,
            config,
            client: Mutex::default(),
            notify: Arc::default(),
            // Its own: what another client complained of says nothing about this one.
            complaints: Complaints::default(),
            found: Mutex::default(),
            setting_out: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            joined: watch::Sender::new(false),
            gone: watch::Sender::new(false),
        })
    }

    /// Makes a client, which has not joined and reads nothing; blocks.
    pub(crate) fn open(self: &Arc<Self>) -> Result<Arc<Client>> {
        let group = self.subscription.group.as_ref();
        let settings = match group {
            Some(group) => self.config.consumer(group.as_str())?,
            None => {
                // Nobody reads as it, and nothing is committed for it.
                let name = format!("eventbus-reader-{:016x}", fastrand::u64(..));
                let mut settings = self.config.consumer(&name)?;
                settings.set("enable.partition.eof", "true");
                settings
            }
        };
        let context = MemberContext::new(Arc::clone(self));
        let client = BaseConsumer::from_config_and_context(&settings, context);
        let client = Arc::new(client.map_err(|error| into_error(SUBSCRIBE, error))?);
        *self.held() = Held(Some(Arc::clone(&client)));
        Ok(client)
    }

    /// Lets a client go whose commits are not answered: all it had is lost.
    pub(crate) fn give_up_client(&self, client: &Client) {
        self.take_client();
        self.lanes().lose_all();
        self.notify.notify_one();
        // Last: who hears of it finds nothing left to commit.
        client.context().given_up.send_replace(true);
    }

    /// How long a commit may wait. One whose member has nothing any more keeps it from joining again.
    pub(crate) fn patience(&self) -> Duration {
        let session = self.config.session_timeout;
        match self.lanes().are_none() {
            true => session / 3,
            false => session,
        }
    }

    pub(crate) fn lanes(&self) -> MutexGuard<'_, Lanes> {
        // Nothing is left half done by a panic that a later call could not read.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client, until the member ends.
    pub(crate) fn client(&self) -> Option<Arc<Client>> {
        self.held().0.clone()
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Ends it: `next` and `settle` answer `Closed` from now on, and its poller leaves the group.
    pub(crate) fn end(&self) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        self.notify.notify_one();
    }

    /// Waits until the group knows that it left.
    ///
    /// # Errors
    ///
    /// `Timeout` when its brokers do not answer: the group finds out by itself.
    pub(crate) async fn gone(&self) -> Result<()> {
        let mut gone = self.gone.subscribe();
        // The sender lives as long as this member.
        let left = tokio::time::timeout(LEAVE, gone.wait_for(|gone| *gone)).await;
        left.map(drop).map_err(|_| {
            let error = Error::new(
                ErrorKind::Timeout,
                "close",
                "no broker answers the member that leaves: its group shares out what it had when its session is over",
            );
            self.complaints.explain("close", error)
        })
    }

    pub(crate) fn set_gone(&self) {
        self.take_client();
        self.gone.send_replace(true);
    }

    /// Takes the client away from everybody but its poller.
    pub(crate) fn take_client(&self) {
        *self.held() = Held(None);
    }

    /// Lets `next` fail.
    pub(crate) fn fail(&self, error: Error) {
        self.lanes().fail(error);
        self.notify.notify_one();
    }

    pub(crate) fn check_open(&self, operation: &'static str) -> Result<()> {
        if self.is_ended() {
            return Err(Error::new(
                ErrorKind::Closed,
                operation,
                "the member has left or its broker handle was closed: subscribe again",
            ));
        }
        Ok(())
    }

    /// The coordinator gives partitions to this member.
    fn assigned(&self, client: &Client, list: &TopicPartitionList) -> Result<(), KafkaError> {
        // A member that ends takes nothing; it says so when it leaves.
        if let Some(owner) = self.client().filter(|_| !self.is_ended()) {
            let openings = places(list).into_iter().filter_map(|place| {
                // Before it is assigned, so that no message comes beside its queue.
                let queue = self.split(&owner, &place)?;
                Some(Opening {
                    place,
                    queue,
                    start: None,
                    end: None,
                })
            });
            let openings = openings.collect();
            self.lanes().open(openings);
            self.notify.notify_one();
        }
        take(client, list)
    }

    /// Gives a partition a queue of its own, which wakes `next`.
    fn split(&self, client: &Arc<Client>, place: &Place) -> Option<PartitionQueue<MemberContext>> {
        let queue = client.split_partition_queue(place.topic.as_str(), place.partition);
        let Some(mut queue) = queue else {
            tracing::error!(topic = %place.topic, partition = place.partition, "a partition has no queue");
            return None;
        };
        let notify = Arc::clone(&self.notify);
        queue.set_nonempty_callback(move || notify.notify_one());
        Some(queue)
    }

    /// The coordinator takes partitions away from this member.
    fn revoked(&self, client: &Client, list: &TopicPartitionList) -> Result<(), KafkaError> {
        let places = places(list);
        // What is given up to lead lanes was taken for the answer: others may have these by now.
        let is_gone = client.assignment_lost() || self.setting_out.load(Ordering::Acquire);
        if is_gone || self.is_ended() {
            self.lanes().lose(&places);
        } else if self.lanes().revoke(places) {
            self.notify.notify_one();
            // They are given up when they are released.
            return Ok(());
        }
        self.notify.notify_one();
        give_up(client, list)
    }

    /// Gives up partitions that were released, or not in time.
    pub(crate) fn give_up(&self, client: &Client, places: &[Place]) {
        let given_up = list(places.iter().map(|place| (place, Offset::Invalid)))
            .and_then(|list| give_up(client, &list));
        if let Err(error) = given_up {
            self.fail(into_error("give up partitions", error));
        }
    }

    /// Looks for where a lane goes on whose place is not known, or not there any more; blocks.
    fn lead(&self, lane: Lane, place: &Place, next: Option<i64>) -> Result<()> {
        const READ: &str = "read";
        let Some(client) = self.client() else {
            return Ok(());
        };
        let deadline = Instant::now() + ANSWER;
        let (low, high) = bounds(READ, &client, place, deadline)?;
        let from = match next {
            None if self.subscription.group.is_some() => {
                self.begun_at(&client, lane, place, deadline)?
            }
            next => next,
        };
        if let Some(from) = from.filter(|from| *from > high) {
            tracing::error!(topic = %place.topic, partition = place.partition, from, high, "the partition was cut off or created anew: it is read from its beginning");
        }
        let start = from
            .filter(|from| (low..=high).contains(from))
            .unwrap_or(low);
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.push(Found {
            lane,
            place: place.clone(),
            start,
            from,
        });
        Ok(())
    }

    /// Where the group is on a partition, which it is made to be where it was not. Of a topic that it
    /// had read before this member came, a partition without a place was added since, and all of it
    /// is read; otherwise it begins where the subscription says.
    fn begun_at(
        &self,
        client: &Client,
        lane: Lane,
        place: &Place,
        deadline: Instant,
    ) -> Result<Option<i64>> {
        const READ: &str = "read";
        let is_added = self.has_read(&place.topic) || !self.places.contains(place);
        let place = std::slice::from_ref(place);
        let known = committed(READ, client, place)?;
        if let Some(offset) = known.into_values().next() {
            return Ok(Some(offset));
        }
        let start = match is_added {
            true => Start::Earliest,
            false => self.subscription.start,
        };
        let begin = starts(READ, client, place, start, deadline)?;
        if !self.lanes().is_astray(lane) {
            // It has gone meanwhile; where it begins is for its next owner to say.
            return Ok(None);
        }
        // The next owner would begin elsewhere.
        commit_watched(READ, client, &begin)?;
        Ok(begin.first().map(|(_, offset)| *offset))
    }

    /// Whether the group had read a topic before this member came.
    fn has_read(&self, topic: &Topic) -> bool {
        let topics = self.read_before.get();
        topics.is_some_and(|topics| topics.contains(topic))
    }

    /// Whether lanes can be led on.
    pub(crate) fn has_found(&self) -> bool {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        !found.is_empty()
    }

    /// Leads lanes to where they go on. On the poller's thread, when it has heard all there is: while
    /// the coordinator takes partitions away, what is given up here would be taken for those.
    pub(crate) fn set_out(&self, client: &Client) {
        if self.lanes().is_revoking() {
            return;
        }
        let found = std::mem::take(&mut *self.found.lock().unwrap_or_else(PoisonError::into_inner));
        if found.is_empty() {
            return;
        }
        self.setting_out.store(true, Ordering::Release);
        for lane in found {
            if !self.lanes().is_astray(lane.lane) {
                continue;
            }
            // A partition that has stopped for an error cannot be sought: it is assigned anew.
            let stop = list([(&lane.place, Offset::Invalid)]);
            let stopped = stop.and_then(|stop| client.incremental_unassign(&stop));
            let start = list([(&lane.place, Offset::Offset(lane.start))]);
            let started = stopped
                .and(start)
                .and_then(|start| client.incremental_assign(&start));
            match started {
                Ok(()) => self.lanes().found(lane.lane, lane.start, lane.from),
                Err(error) => self.fail(into_error("read", error)),
            }
        }
        self.notify.notify_one();
    }

    /// What was heard since [`set_out`](Self::set_out) was meant before it.
    pub(crate) fn has_set_out(&self) {
        self.setting_out.store(false, Ordering::Release);
    }

    /// Begins a look for where lanes start, beside the runtime.
    pub(crate) fn lead_all(self: &Arc<Self>, astray: Vec<(Lane, Place, Option<i64>)>) {
        for (lane, place, next) in astray {
            let member = Arc::clone(self);
            tokio::task::spawn_blocking(move || {
                let mut pause = Duration::from_millis(50);
                while !member.is_ended()
                    && member.lanes().is_astray(lane)
                    && let Err(error) = member.lead(lane, &place, next)
                {
                    tracing::warn!(topic = %place.topic, partition = place.partition, %error, "where to read on is looked for again");
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
            });
        }
    }

    /// Ends a reader at a time that has come; blocks.
    pub(crate) fn find_ends(&self) -> Result<()> {
        let (Some(client), Some(until)) = (self.client(), self.subscription.until) else {
            return Ok(());
        };
        let places = self.lanes().places();
        let deadline = Instant::now() + ANSWER;
        if let Some(ends) = ends("read", &client, &places, until, deadline)? {
            self.lanes().end_at(&ends);
            self.notify.notify_one();
        }
        Ok(())
    }
}

fn take(client: &Client, list: &TopicPartitionList) -> Result<(), KafkaError> {
    match client.rebalance_protocol() {
        RebalanceProtocol::Cooperative => client.incremental_assign(list),
        _ => client.assign(list),
    }
}

fn give_up(client: &Client, list: &TopicPartitionList) -> Result<(), KafkaError> {
    match client.rebalance_protocol() {
        RebalanceProtocol::Cooperative => client.incremental_unassign(list),
        _ => client.unassign(),
    }
}

/// Joins a group, or opens a reader, of topics that are there, with their partitions.
pub(crate) async fn subscribe(
    config: &KafkaConfig,
    subscription: Subscription,
    places: Vec<Place>,
) -> Result<Arc<Member>> {
    let is_reader = subscription.group.is_none();
    let member = Member::new(config.clone(), subscription, places.clone());
    let leaving = Leaving(Some(Arc::clone(&member)));
    let begun = Arc::clone(&member);
    let begin = blocking(move || {
        let client = begun.open()?;
        // First, for it ends what has begun, also where that fails.
        poller::spawn(Arc::clone(&begun), Arc::clone(&client))?;
        match is_reader {
            true => begun.begin_reading(&client, places),
            false => begun.begin_group(&client, &places),
        }
    });
    begin.await??;
    if !is_reader {
        member.wait_joined().await?;
    }
    leaving.stay();
    Ok(member)
}

/// Lets a member leave that nobody waits for any more.
struct Leaving(Option<Arc<Member>>);

impl Leaving {
    fn stay(mut self) {
        self.0 = None;
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if let Some(member) = &self.0 {
            member.end();
        }
    }
}

impl Member {
    /// Opens all lanes of a reader; blocks.
    fn begin_reading(&self, client: &Arc<Client>, places: Vec<Place>) -> Result<()> {
        let deadline = Instant::now() + ANSWER;
        let starts = starts(
            SUBSCRIBE,
            client,
            &places,
            self.subscription.start,
            deadline,
        )?;
        let ends: Option<Vec<(Place, End)>> = match self.subscription.until {
            Some(until) => ends(SUBSCRIBE, client, &places, until, deadline)?,
            None => Some(Vec::new()),
        };
        let mut lanes = self.lanes();
        if let (None, Some(eventbus_core::Until::Time(time))) = (&ends, self.subscription.until) {
            lanes.end_time = Some(crate::start::millis(time));
        }
        let ends = ends.unwrap_or_default();
        let openings = starts.iter().filter_map(|(place, start)| {
            let end = ends.iter().find(|(other, _)| other == place);
            Some(Opening {
                place: place.clone(),
                queue: self.split(client, place)?,
                start: Some(*start),
                end: end.map(|(_, end)| *end),
            })
        });
        lanes.open(openings.collect());
        drop(lanes);
        let offsets = starts
            .iter()
            .map(|(place, start)| (place, Offset::Offset(*start)));
        let assigned = list(offsets).and_then(|list| client.assign(&list));
        assigned.map_err(|error| into_error(SUBSCRIBE, error))
    }

    /// Says for a new group where it begins, and joins; blocks.
    fn begin_group(&self, client: &Arc<Client>, places: &[Place]) -> Result<()> {
        let known = committed(SUBSCRIBE, client, places)?;
        let topics = known.keys().map(|place| place.topic.clone());
        self.read_before.get_or_init(|| topics.collect());
        let missing = |place: &&Place| !known.contains_key(*place);
        let new: Vec<_> = places.iter().filter(missing).cloned().collect();
        if !new.is_empty() {
            // Of a topic that the group has read before, a partition without a place was added since.
            let is_read = |place: &Place| self.has_read(&place.topic);
            let (added, new): (Vec<_>, Vec<_>) = new.into_iter().partition(is_read);
            let deadline = Instant::now() + ANSWER;
            let mut begin = starts(SUBSCRIBE, client, &new, self.subscription.start, deadline)?;
            begin.extend(starts(
                SUBSCRIBE,
                client,
                &added,
                Start::Earliest,
                deadline,
            )?);
            match commit_watched(SUBSCRIBE, client, &begin) {
                // It has members: one of them was first.
                Err(error) if error.is_retryable() => {
                    tracing::debug!(%error, "the group has begun already");
                }
                result => result?,
            }
        }
        self.join(client)
    }

    /// Has the client join the group.
    pub(crate) fn join(&self, client: &Client) -> Result<()> {
        let topics = self.subscription.topics.iter();
        let topics: Vec<_> = topics.map(|topic| topic.as_str()).collect();
        let subscribed = client.subscribe(&topics);
        subscribed.map_err(|error| into_error(SUBSCRIBE, error))
    }

    /// Waits for the first word of the coordinator.
    async fn wait_joined(&self) -> Result<()> {
        let mut joined = self.joined.subscribe();
        let deadline = tokio::time::Instant::now() + JOIN;
        loop {
            let heard = tokio::time::timeout(Duration::from_millis(100), joined.wait_for(|it| *it));
            if heard.await.is_ok() {
                return Ok(());
            }
            self.check_open(SUBSCRIBE)?;
            let failure = self.lanes().take_failure();
            if let Some(error) = failure.filter(|error| !error.is_retryable()) {
                return Err(error);
            }
            if let Some(error) = self.complaints.hopeless(SUBSCRIBE) {
                return Err(error);
            }
            if tokio::time::Instant::now() > deadline {
                let error = Error::new(
                    ErrorKind::Timeout,
                    SUBSCRIBE,
                    "the group's coordinator has not let the member in within a minute",
                );
                return Err(self.complaints.explain(SUBSCRIBE, error));
            }
        }
    }
}
