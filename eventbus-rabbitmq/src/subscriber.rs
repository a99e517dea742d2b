//! The task of a member of a group: it agrees with the others about who has what, opens and closes
//! lanes, and connects again when the connection was lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use eventbus_core::{Error, ErrorKind, Group, Lane, Limits, Result, Retry, Topic, TopicPartition};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use tokio::sync::{Notify, oneshot};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use crate::adopted::RabbitMqQueue;
use crate::config::RabbitMqConfig;
use crate::deliveries::{Ends, Member, Order, is_ending};
use crate::lanes::{Lanes, Source};
use crate::link::{RECONNECT, SharedLink};
use crate::names;
use crate::opening::{Opened, Opening};
use crate::roster::{Announcement, BEAT, Heard, Roster};
use crate::session::{Announcer, Session};
use crate::topics::{Topics, consumers};

/// How long who joins waits to be told who is there, where queues have consumers.
const INTRODUCTION: Duration = Duration::from_millis(1500);
/// What is announced within this time is answered together.
const SETTLING: Duration = Duration::from_millis(20);
/// How soon, and how rarely at last, a partition is looked at that is not free yet.
const LOOK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(250));

const SUBSCRIBE: &str = "subscribe";

/// A connection that lasted for so long was good for something.
const LASTING: Duration = Duration::from_secs(10);

/// What a member reads, and how much of it at once.
#[derive(Clone)]
pub(crate) struct Reading {
    pub(crate) group: Group,
    pub(crate) topics: Vec<(Topic, u32)>,
    /// Topics that are queues of somebody else, which all members read at the same time.
    pub(crate) queues: BTreeMap<Topic, RabbitMqQueue>,
    pub(crate) limits: Limits,
    /// How many messages may be sent ahead for one place.
    pub(crate) prefetch: u16,
}

impl Reading {
    /// Whether there is such a partition, as far as this member knows.
    pub(crate) fn has(&self, place: &TopicPartition) -> bool {
        let mut topics = self.topics.iter();
        topics.any(|(topic, count)| *topic == place.topic && place.partition < *count)
    }
}

/// Joins a group; its task begins at once.
pub(crate) async fn join(
    config: &RabbitMqConfig,
    publishing: &Arc<SharedLink>,
    known: &Arc<Topics>,
    mut reading: Reading,
) -> Result<Arc<Member>> {
    let session = Session::open(config, known, &reading).await?;
    reading.topics.clone_from(&session.topics);
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
        known: Arc::clone(known),
        reading: Arc::new(reading),
        roster: Roster::default(),
        me,
        announcer,
        opening: Opening::default(),
        revoking: Vec::new(),
        due: Due::now(),
        pause: RECONNECT.0,
        checking: JoinSet::new(),
    };
    tokio::spawn(task.run(session, ends));
    Ok(member)
}

struct Task {
    member: Arc<Member>,
    config: RabbitMqConfig,
    known: Arc<Topics>,
    reading: Arc<Reading>,
    roster: Roster,
    /// What it says of itself; what it keeps is what it wants.
    me: Announcement,
    announcer: Announcer,
    /// What it wants, is free, and is not open yet.
    opening: Opening,
    /// Lanes whose owner was told to release them, and how long it has for that.
    revoking: Vec<(Lane, Instant)>,
    due: Due,
    /// How long it waits before it connects again: longer while sessions come to nothing.
    pause: Duration,
    /// Looks whether all that was made on the server is still there.
    checking: JoinSet<Result<bool>>,
}

/// When what is to be done.
struct Due {
    beat: Instant,
    /// To share out anew.
    plan: Option<Instant>,
    /// To look whether what it wants is free.
    look: Option<Instant>,
    pause: Duration,
    /// To look whether all that was made on the server is still there.
    check: Option<Instant>,
}

impl Due {
    fn now() -> Self {
        let now = Instant::now();
        Self {
            beat: now,
            plan: Some(now + INTRODUCTION),
            look: None,
            pause: LOOK.0,
            check: None,
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
        if self.look.is_none() {
            self.look = Some(Instant::now() + self.pause);
            self.pause = (self.pause * 2).min(LOOK.1);
        }
    }

    fn look_at(&mut self, at: Option<Instant>) {
        self.look = self.look.into_iter().chain(at).min();
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
            let begun = Instant::now();
            let over = self.serve(&mut current, &mut ends).await;
            self.opening.give_up().await;
            self.checking.shutdown().await;
            match over {
                Ok(()) | Err(Over::Ended) => {
                    let lanes = self.member.lanes().all();
                    let sources = self.member.lanes().close(&lanes);
                    // Closed before the sources are dropped, which would cancel themselves otherwise.
                    current.link.close().await;
                    drop(sources);
                }
                Err(Over::Lost(error)) => {
                    if begun.elapsed() > LASTING {
                        self.pause = RECONNECT.0;
                    }
                    self.lose_all(error);
                    current.link.close().await;
                    drop(current);
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
        loop {
            tokio::select! {
                () = tokio::time::sleep(self.pause) => {}
                () = is_ending(ends.ending.clone()) => return None,
            }
            self.pause = (self.pause * 2).min(RECONNECT.1);
            let opened = Session::open(&self.config, &self.known, &self.reading);
            let opened = tokio::select! {
                opened = opened => opened,
                () = is_ending(ends.ending.clone()) => return None,
            };
            let error = match opened {
                Ok(session) => {
                    self.due = Due::now();
                    let mut reading = Reading::clone(&self.reading);
                    reading.topics.clone_from(&session.topics);
                    self.me.topics.clone_from(&session.topics);
                    self.reading = Arc::new(reading);
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
        }
    }

    async fn serve(&mut self, session: &mut Session, ends: &mut Ends) -> Result<(), Over> {
        self.announcer.say(self.me.clone());
        self.begin(session).await?;
        self.due.check = Some(Instant::now() + self.config.check());
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
                (place, opened) = self.opening.next() => self.take(place, opened).await,
                Some(checked) = self.checking.join_next() => self.hear_check(checked)?,
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
    async fn begin(&mut self, session: &Session) -> Result<(), Over> {
        let asking = session.link.channel(SUBSCRIBE).await;
        let mut asking = asking.map_err(Over::Lost)?;
        for (topic, partitions) in &self.reading.topics {
            for partition in 0..*partitions {
                let queue = names::group_queue(topic, &self.reading.group, partition);
                match consumers(SUBSCRIBE, &asking, queue).await {
                    Ok(Some(0)) => {}
                    Ok(None) => {
                        let again = session.link.channel(SUBSCRIBE).await;
                        asking = again.map_err(Over::Lost)?;
                    }
                    // Somebody has it, or nobody can say: it waits for others to speak.
                    Ok(Some(_)) | Err(_) => return Ok(()),
                }
            }
        }
        self.due.plan_within(Duration::ZERO);
        Ok(())
    }

    fn next_due(&self) -> Instant {
        let revoked = self.revoking.iter().map(|(_, until)| *until);
        let others = [
            self.due.plan,
            self.due.look,
            self.due.check,
            self.roster.forgets_at(),
        ];
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
            self.open_what_is_free(session);
        }
        if self.due.check.is_some_and(|at| at <= now) {
            self.due.check = None;
            let check = session.check(&self.known, &self.reading.group);
            self.checking.spawn(check);
        }
        Ok(())
    }

    /// What came of looking whether all is still there. Topics with other partitions than before begin
    /// anew with a connection.
    fn hear_check(&mut self, checked: Result<Result<bool>, JoinError>) -> Result<(), Over> {
        self.due.check = Some(Instant::now() + self.config.check());
        match checked {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(Over::Lost(Error::new(
                ErrorKind::Unavailable,
                "read",
                "a topic was created anew with another number of partitions",
            ))),
            Ok(Err(error)) => {
                tracing::error!(%error, group = self.reading.group.as_str(), "what a consumer needs is not as it was made");
                self.member.lanes().fail(error.with_retry(Retry::Later));
                self.member.wake();
                Ok(())
            }
            // It has said why it panicked.
            Err(_) => Ok(()),
        }
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

    /// Asks for the places that it is to have and does not have yet.
    fn open_what_is_free(&mut self, session: &Session) {
        let places = self.member.lanes().places();
        let open: BTreeSet<_> = places.iter().map(|(place, _)| place).collect();
        self.opening.retain(|place| self.me.keeps.contains(place));
        for place in &self.me.keeps {
            if !open.contains(place) {
                self.opening
                    .ask(&session.link, &self.reading, place.clone());
            }
        }
        // Of what is still to be released, too, it may have some again.
        let keeps = &self.me.keeps;
        if places
            .iter()
            .any(|(it, revoking)| *revoking && keeps.contains(it))
        {
            self.due.look_later();
        }
        self.due.look_at(self.opening.again_at());
    }

    /// Takes what was opened, unless it is another's by now.
    async fn take(&mut self, place: TopicPartition, opened: Opened) {
        match opened {
            Opened::Open(source) if self.me.keeps.contains(&place) => {
                self.pause = RECONNECT.0;
                self.member.lanes().open(vec![(place, Some(*source))]);
                self.member.wake();
            }
            Opened::Open(source) => self.give_away(vec![*source]).await,
            Opened::Taken => self.due.look_later(),
            Opened::Failed(error) => {
                tracing::error!(%error, %place, group = self.reading.group.as_str(), "a partition cannot be read");
                self.member.lanes().fail(error);
                self.member.wake();
                self.due.look_at(self.opening.again_at());
            }
            Opened::StillFailing => self.due.look_at(self.opening.again_at()),
        }
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
