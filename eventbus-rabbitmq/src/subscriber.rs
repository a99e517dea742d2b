//! The task of a member of a group: it agrees with the others about who has what, opens and closes
//! lanes, and connects again when the connection was lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use eventbus_core::{Error, ErrorKind, Group, Lane, Limits, Result, Topic, TopicPartition};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::adopted::RabbitMqQueue;
use crate::config::RabbitMqConfig;
use crate::deliveries::{Ends, Member, Order, is_ending};
use crate::groups::declare_group;
use crate::lanes::{Lanes, Source};
use crate::link::{RECONNECT, SharedLink};
use crate::names;
use crate::roster::{Announcement, BEAT, Heard, Roster};
use crate::session::{Announcer, Session};

/// How long who joins waits to be told who is there, where queues have consumers.
const INTRODUCTION: Duration = Duration::from_millis(1500);
/// What is announced within this time is answered together.
const SETTLING: Duration = Duration::from_millis(20);
/// How soon, and how rarely at last, a partition is looked at that is not free yet.
const LOOK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(250));

const SUBSCRIBE: &str = "subscribe";

/// What a member reads, and how much of it at once.
pub(crate) struct Reading {
    pub(crate) group: Group,
    pub(crate) topics: Vec<(Topic, u32)>,
    /// Topics that are queues of somebody else, which all members read at the same time.
    pub(crate) queues: BTreeMap<Topic, RabbitMqQueue>,
    pub(crate) limits: Limits,
}

/// Joins a group; its task begins at once.
pub(crate) async fn join(
    config: &RabbitMqConfig,
    publishing: &Arc<SharedLink>,
    reading: Reading,
) -> Result<Arc<Member>> {
    let session = Session::open(config, &reading).await?;
    let attention = Arc::<Notify>::default();
    let lanes = Lanes::of_member(reading.limits, Arc::clone(&attention));
    let (member, ends) = Member::new(lanes, attention, true);
    let member = Arc::new(member);
    let joined = SystemTime::now().duration_since(UNIX_EPOCH);
    let me = Announcement {
        member: fastrand::u64(..),
        joined: joined.unwrap_or_default().as_millis() as u64,
        is_leaving: false,
        topics: reading.topics.clone(),
        keeps: BTreeSet::new(),
    };
    let announcer = Announcer::spawn(Arc::clone(publishing), &reading.group, me.clone());
    let task = Task {
        member: Arc::clone(&member),
        config: config.clone(),
        reading,
        roster: Roster::default(),
        me,
        announcer,
        revoking: Vec::new(),
        due: Due::now(),
    };
    tokio::spawn(task.run(session, ends));
    Ok(member)
}

struct Task {
    member: Arc<Member>,
    config: RabbitMqConfig,
    reading: Reading,
    roster: Roster,
    /// What it says of itself; what it keeps is what it wants.
    me: Announcement,
    announcer: Announcer,
    /// Lanes whose owner was told to release them, and how long it has for that.
    revoking: Vec<(Lane, Instant)>,
    due: Due,
}

/// When what is to be done.
struct Due {
    beat: Instant,
    /// To share out anew.
    plan: Option<Instant>,
    /// To look whether what it wants is free.
    look: Option<Instant>,
    pause: Duration,
}

impl Due {
    fn now() -> Self {
        let now = Instant::now();
        Self {
            beat: now,
            plan: Some(now + INTRODUCTION),
            look: None,
            pause: LOOK.0,
        }
    }

    fn plan_within(&mut self, time: Duration) {
        let at = Instant::now() + time;
        self.plan = Some(self.plan.map_or(at, |before| before.min(at)));
    }

    fn look_now(&mut self) {
        self.look = Some(Instant::now());
        self.pause = LOOK.0;
    }

    fn look_later(&mut self) {
        self.look = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(LOOK.1);
    }
}

/// Why serving ends.
enum Over {
    Ended,
    Lost(Error),
}

impl Task {
    async fn run(mut self, session: Session, mut ends: Ends) {
        let mut session = Some(session);
        while let Some(mut current) = session.take() {
            match self.serve(&mut current, &mut ends).await {
                Ok(()) | Err(Over::Ended) => {
                    let lanes = self.member.lanes().all();
                    let sources = self.member.lanes().close(&lanes);
                    // Closed before the sources are dropped, which would cancel themselves otherwise.
                    current.link.close().await;
                    drop(sources);
                }
                Err(Over::Lost(error)) => {
                    self.lose_all(error);
                    session = self.connect_again(&ends).await;
                }
            }
        }
        let mut me = self.me;
        me.is_leaving = true;
        self.announcer.say_last(me).await;
        ends.gone.send_replace(true);
    }

    /// Gives up what went with the connection.
    fn lose_all(&mut self, error: Error) {
        tracing::warn!(%error, group = self.reading.group.as_str(), "a consumer has lost its connection");
        let sources = {
            let mut lanes = self.member.lanes();
            let all = lanes.all();
            let sources = lanes.lose(&all);
            lanes.fail(error);
            sources
        };
        drop(sources);
        self.member.wake();
        self.revoking.clear();
        self.roster.clear();
        self.me.keeps.clear();
    }

    /// Connects again; none when it is to end.
    async fn connect_again(&mut self, ends: &Ends) -> Option<Session> {
        let mut pause = RECONNECT.0;
        loop {
            let opened = Session::open(&self.config, &self.reading);
            let opened = tokio::select! {
                opened = opened => opened,
                () = is_ending(ends.ending.clone()) => return None,
            };
            let error = match opened {
                Ok(session) => {
                    self.due = Due::now();
                    tracing::info!(
                        group = self.reading.group.as_str(),
                        "a consumer is connected again"
                    );
                    return Some(session);
                }
                Err(error) => error,
            };
            // A topic that is gone, or a user who may not any more, ends the member.
            let is_final = !error.is_retryable();
            self.member.lanes().fail(error);
            self.member.wake();
            if is_final {
                is_ending(ends.ending.clone()).await;
                return None;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = is_ending(ends.ending.clone()) => return None,
            }
            pause = (pause * 2).min(RECONNECT.1);
        }
    }

    async fn serve(&mut self, session: &mut Session, ends: &mut Ends) -> Result<(), Over> {
        self.announcer.say(self.me.clone());
        self.begin(session).await?;
        loop {
            let due = self.next_due();
            // What was said is heard before anybody is forgotten for saying nothing: after a pause of
            // this process both are there.
            tokio::select! {
                biased;
                () = is_ending(ends.ending.clone()) => return Err(Over::Ended),
                Some(order) = ends.orders.recv() => self.obey(order).await,
                news = session.news.next() => match news {
                    Some(Ok(news)) => self.hear(&news.data),
                    Some(Err(error)) => return Err(lost(error)),
                    None => return Err(gone()),
                },
                () = self.member.attention.notified() => self.attend(),
                () = tokio::time::sleep_until(due) => {
                    if self.roster.forget(Instant::now()) {
                        self.due.plan_within(Duration::ZERO);
                    }
                }
            }
            self.do_what_is_due(session).await?;
        }
    }

    /// Where no queue has a consumer, nobody has anything, and there is nobody to wait for.
    async fn begin(&mut self, session: &mut Session) -> Result<(), Over> {
        for (topic, partitions) in &self.reading.topics {
            for partition in 0..*partitions {
                let queue = names::group_queue(topic, &self.reading.group, partition);
                let consumers = session.consumers(queue).await.map_err(Over::Lost)?;
                if consumers.is_some_and(|consumers| consumers > 0) {
                    return Ok(());
                }
            }
        }
        self.due.plan_within(Duration::ZERO);
        Ok(())
    }

    fn next_due(&self) -> Instant {
        let revoked = self.revoking.iter().map(|(_, until)| *until);
        let others = [self.due.plan, self.due.look, self.roster.forgets_at()];
        let all = others.into_iter().flatten().chain(revoked);
        all.fold(self.due.beat, Instant::min)
    }

    fn hear(&mut self, news: &[u8]) {
        let Some(said) = Announcement::read(news) else {
            return;
        };
        if said.member == self.me.member {
            return;
        }
        match self.roster.hear(said, Instant::now()) {
            Heard::New => {
                // It waits to be told who is there.
                self.announcer.say(self.me.clone());
                self.due.plan_within(SETTLING);
            }
            Heard::Changed => self.due.plan_within(SETTLING),
            Heard::Left => self.due.plan_within(Duration::ZERO),
            Heard::Same => {}
        }
        // It may have closed what is wanted here.
        if self.due.look.is_some() {
            self.due.look_now();
        }
    }

    /// A channel has ended by itself; what it brought is wanted still.
    fn attend(&mut self) {
        let open = self.member.lanes().all();
        self.revoking.retain(|(lane, _)| open.contains(lane));
        self.due.look_now();
    }

    async fn do_what_is_due(&mut self, session: &mut Session) -> Result<(), Over> {
        let now = Instant::now();
        if !session.link.is_open() {
            return Err(gone());
        }
        if self.due.beat <= now {
            self.due.beat = now + BEAT;
            self.announcer.say(self.me.clone());
        }
        if self.due.plan.is_some_and(|at| at <= now) {
            self.due.plan = None;
            self.plan();
        }
        self.take_overdue(now).await;
        if self.due.look.is_some_and(|at| at <= now) {
            self.due.look = None;
            self.open_what_is_free(session).await.map_err(Over::Lost)?;
        }
        Ok(())
    }

    /// Shares out anew: what is another's from now on is revoked, what is its own is looked at.
    fn plan(&mut self) {
        let mut mine = self.roster.share(&self.me);
        let queues = self.reading.queues.keys();
        mine.extend(queues.map(|topic| TopicPartition::new(topic.clone(), 0)));
        let is_other = mine != self.me.keeps;
        self.me.keeps = mine;
        let lanes = {
            let keeps = &self.me.keeps;
            self.member.lanes().revoke(|place| !keeps.contains(place))
        };
        let until = Instant::now() + self.reading.limits.revoke_timeout;
        self.revoking
            .extend(lanes.iter().map(|lane| (*lane, until)));
        if !lanes.is_empty() {
            self.member.wake();
        }
        if is_other {
            self.announcer.say(self.me.clone());
        }
        self.due.look_now();
    }

    /// Takes lanes whose owner has not released them in time.
    async fn take_overdue(&mut self, now: Instant) {
        let overdue = |(lane, until): &(Lane, Instant)| (*until <= now).then_some(*lane);
        let overdue: Vec<_> = self.revoking.iter().filter_map(overdue).collect();
        if overdue.is_empty() {
            return;
        }
        self.revoking.retain(|(_, until)| *until > now);
        let sources = self.member.lanes().lose(&overdue);
        self.member.wake();
        self.give_away(sources).await;
    }

    async fn obey(&mut self, order: Order) {
        let Order::Release(lanes, done) = order;
        self.revoking.retain(|(lane, _)| !lanes.contains(lane));
        let sources = self.member.lanes().close(&lanes);
        self.give_away(sources).await;
        // Whoever asked may have given up.
        let _: Result<(), ()> = oneshot::Sender::send(done, ());
    }

    /// Closes channels, and says so: others wait for it.
    async fn give_away(&mut self, sources: Vec<Source>) {
        if sources.is_empty() {
            return;
        }
        join_all(sources.into_iter().map(Source::close)).await;
        self.announcer.say(self.me.clone());
        // Some of it may be its own again, or still.
        self.due.look_now();
    }

    /// Opens the lanes that it is to have and that nobody else is handed messages of.
    async fn open_what_is_free(&mut self, session: &mut Session) -> Result<()> {
        let open: BTreeSet<_> = {
            let places = self.member.lanes().places();
            places.into_iter().map(|(place, _)| place).collect()
        };
        let wanted: Vec<_> = self.me.keeps.difference(&open).cloned().collect();
        let mut opened = Vec::new();
        let mut is_waiting = false;
        for place in wanted {
            match self.open_if_free(session, &place).await? {
                Some(source) => opened.push((place, Some(source))),
                None => is_waiting = true,
            }
        }
        if !opened.is_empty() {
            self.member.lanes().open(opened);
            self.member.wake();
        }
        // Of what is still to be released, too, it may have some again.
        is_waiting |= self.me.keeps.iter().any(|place| {
            let places = self.member.lanes().places();
            places.iter().any(|(it, revoking)| it == place && *revoking)
        });
        if is_waiting {
            self.due.look_later();
        }
        Ok(())
    }

    async fn open_if_free(
        &self,
        session: &mut Session,
        place: &TopicPartition,
    ) -> Result<Option<Source>> {
        if let Some(queue) = self.reading.queues.get(&place.topic) {
            return self.open_adopted(session, queue).await;
        }
        let group = &self.reading.group;
        let queue = names::group_queue(&place.topic, group, place.partition);
        match session.consumers(queue.clone()).await? {
            Some(0) => {}
            Some(_) => return Ok(None),
            None => {
                tracing::error!(
                    queue = queue.as_str(),
                    "a queue was deleted, and what was in it is gone: it is created anew"
                );
                let count = self
                    .reading
                    .topics
                    .iter()
                    .find(|(topic, _)| *topic == place.topic);
                let count = count.map_or(0, |(_, count)| *count);
                declare_group(SUBSCRIBE, &session.link, group, &place.topic, count).await?;
            }
        }
        let prefetch = self.config.prefetch_within(&self.reading.limits);
        Ok(Some(session.consume(queue, prefetch).await?))
    }
}

impl Task {
    /// Begins to read a queue of somebody else, beside whoever reads it, too.
    async fn open_adopted(
        &self,
        session: &mut Session,
        queue: &RabbitMqQueue,
    ) -> Result<Option<Source>> {
        let name = queue.short_name(SUBSCRIBE)?;
        if session.consumers(name.clone()).await?.is_none() {
            self.member.lanes().fail(queue.missing(SUBSCRIBE));
            self.member.wake();
            return Ok(None);
        }
        let prefetch = self.config.prefetch_within(&self.reading.limits);
        let source = session.consume(name, prefetch).await?;
        Ok(Some(source.adopted(queue.clone())))
    }
}

fn lost(error: lapin::Error) -> Over {
    Over::Lost(crate::error::into_error("read", error))
}

fn gone() -> Over {
    Over::Lost(Error::new(
        ErrorKind::Unavailable,
        "read",
        "the connection to the server is gone",
    ))
}
