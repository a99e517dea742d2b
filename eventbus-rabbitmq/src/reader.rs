//! Readers without a group: of a log from any place, of another topic what comes from now on.

use std::sync::Arc;

use eventbus_core::{
    Error, ErrorKind, Lane, Result, Start, Subscription, Topic, TopicPartition, Until,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::sync::Notify;

use crate::config::RabbitMqConfig;
use crate::confirms::publish_one;
use crate::deliveries::{Ends, Member, Order, is_ending};
use crate::lanes::{End, Lanes, Source};
use crate::link::{Link, RECONNECT, SharedLink};
use crate::names;
use crate::properties::to_mark;
use crate::session::{consume, own_queue};

const READ: &str = "read";

/// Whether what is read is what comes from now on, which needs no log.
pub(crate) fn is_tail(subscription: &Subscription) -> bool {
    matches!(
        (subscription.start, subscription.until),
        (Start::Latest, None)
    )
}

/// Refuses what no reader can be given.
pub(crate) fn check(subscription: &Subscription) -> Result<()> {
    let by_time = matches!(subscription.start, Start::Time(_))
        || matches!(subscription.until, Some(Until::Time(_)));
    if !by_time {
        return Ok(());
    }
    let message = "a stream of RabbitMQ knows the time of a chunk of messages only, not of each: start and end at a position";
    Err(Error::new(ErrorKind::Unsupported, "subscribe", message))
}

/// Says that a topic is not kept.
pub(crate) fn not_kept(topic: &Topic) -> Error {
    let message = "RabbitMQ keeps a topic for its groups only, in their queues: declare it with a retention, and what is published from then on is kept in a stream that can be read again; without one, a reader without a group gets what comes from now on (`Start::Latest`, without an end)";
    Error::new(ErrorKind::Unsupported, "subscribe", message).with("topic", topic)
}

/// Opens a reader, of logs or of what comes from now on; its task begins at once.
pub(crate) async fn open(
    config: &RabbitMqConfig,
    publishing: &Arc<SharedLink>,
    subscription: &Subscription,
    topics: Vec<(Topic, u32)>,
    is_log: bool,
) -> Result<Arc<Member>> {
    let link = Link::connect(config, "reader").await?;
    let task = Task {
        config: config.clone(),
        start: subscription.start,
        is_log,
        prefetch: config.prefetch_within(&subscription.limits),
    };
    let places = topics.iter().flat_map(|(topic, partitions)| {
        let topic = topic.clone();
        (0..*partitions).map(move |partition| TopicPartition::new(topic.clone(), partition))
    });
    let first = match subscription.start {
        Start::Position(position) => u64::try_from(position.0).unwrap_or(u64::MAX),
        _ => 0,
    };
    let mut openings = Vec::new();
    for place in places {
        let source = task.source(&link, &place, first).await?;
        openings.push((place, Some(source)));
    }
    let end = find_end(publishing, subscription.until, &openings).await?;
    let attention = Arc::<Notify>::default();
    let mut lanes = Lanes::of_reader(subscription.limits, Arc::clone(&attention), is_log);
    for lane in lanes.open(openings) {
        lanes.bound(lane, first, end.clone());
    }
    let (member, ends) = Member::new(lanes, attention, false);
    let member = Arc::new(member);
    tokio::spawn(task.run(Arc::clone(&member), link, ends));
    Ok(member)
}

/// Where a bounded read ends. The server tells nobody where a stream ends, so a mark is put into each,
/// behind everything that was published before; readers pass over it. No group gets it.
async fn find_end(
    publishing: &SharedLink,
    until: Option<Until>,
    openings: &[(TopicPartition, Option<Source>)],
) -> Result<Option<End>> {
    let mark = match until {
        Some(Until::Position(position)) => {
            let offset = u64::try_from(position.0).unwrap_or(u64::MAX);
            return Ok(Some(End::Offset(offset)));
        }
        Some(_) => format!("{:032x}", fastrand::u128(..)),
        None => return Ok(None),
    };
    let channel = publishing.get(READ).await?.confirming(READ).await?;
    for (place, _) in openings {
        let stream = names::log_queue(&place.topic, place.partition);
        let to = (ShortString::default(), stream);
        if !publish_one(READ, &channel, to, &[], to_mark(&mark)).await? {
            return Err(Error::new(
                ErrorKind::Unavailable,
                READ,
                "where the log ends cannot be found out: the server did not take a mark",
            )
            .with("topic", &place.topic));
        }
    }
    Ok(Some(End::Mark(mark)))
}

/// Keeps a reader supplied.
struct Task {
    config: RabbitMqConfig,
    start: Start,
    is_log: bool,
    prefetch: u16,
}

impl Task {
    /// What brings the messages of a place, from `next` on where that is known.
    async fn source(&self, link: &Link, place: &TopicPartition, next: u64) -> Result<Source> {
        if !self.is_log {
            return self.tail(link, place).await;
        }
        let queue = names::log_queue(&place.topic, place.partition);
        let from = match self.start {
            _ if next > 0 => AMQPValue::LongLongInt(i64::try_from(next).unwrap_or(i64::MAX)),
            Start::Latest => AMQPValue::LongString("next".into()),
            _ => AMQPValue::LongString("first".into()),
        };
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), from);
        consume(link, queue, self.prefetch, arguments).await
    }

    /// A queue that lasts as long as the connection.
    async fn tail(&self, link: &Link, place: &TopicPartition) -> Result<Source> {
        let channel = link.channel(READ).await?;
        let (exchange, key) = (
            names::exchange(&place.topic),
            names::routing_key(place.partition),
        );
        let queue = own_queue(READ, &channel, exchange, key).await?;
        consume(link, queue, self.prefetch, FieldTable::default()).await
    }

    async fn run(self, member: Arc<Member>, mut link: Link, mut ends: Ends) {
        let mut pause = RECONNECT.0;
        let mut again = false;
        loop {
            tokio::select! {
                biased;
                () = is_ending(ends.ending.clone()) => break,
                Some(Order::Release(lanes, done)) = ends.orders.recv() => {
                    let sources = member.lanes().close(&lanes);
                    close(sources).await;
                    // Whoever asked may have given up.
                    let _ = done.send(());
                }
                () = member.attention.notified() => {}
                () = tokio::time::sleep(pause), if again => {}
            }
            if let Err(error) = member.acknowledge().await {
                // It is asked again with the next messages.
                tracing::debug!(%error, "what a reader has read is not acknowledged yet");
            }
            again = match self.mend(&member, &mut link).await {
                Ok(()) => {
                    pause = RECONNECT.0;
                    false
                }
                Err(error) => {
                    pause = (pause * 2).min(RECONNECT.1);
                    let is_retryable = error.is_retryable();
                    member.lanes().fail(error);
                    is_retryable
                }
            };
            member.wake();
        }
        let sources = {
            let mut lanes = member.lanes();
            let all = lanes.all();
            lanes.close(&all)
        };
        // Closed before the sources are dropped, which would cancel themselves otherwise.
        link.close().await;
        drop(sources);
        ends.gone.send_replace(true);
    }

    /// Gives lanes that have lost their channel another one, and connects again for that.
    async fn mend(&self, member: &Member, link: &mut Link) -> Result<()> {
        let cut_off = member.lanes().cut_off();
        if cut_off.is_empty() {
            return Ok(());
        }
        if !link.is_open() {
            *link = Link::connect(&self.config, "reader").await?;
        }
        for (lane, place, next) in cut_off {
            self.mend_lane(member, link, lane, &place, next).await?;
        }
        Ok(())
    }

    async fn mend_lane(
        &self,
        member: &Member,
        link: &Link,
        lane: Lane,
        place: &TopicPartition,
        next: u64,
    ) -> Result<()> {
        let source = self.source(link, place, next).await?;
        if !self.is_log {
            tracing::warn!(%place, "a reader was cut off: it missed what was published meanwhile");
        }
        member.lanes().go_on(lane, source);
        Ok(())
    }
}

async fn close(sources: Vec<Source>) {
    for source in sources {
        source.close().await;
    }
}
