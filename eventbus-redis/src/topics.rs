//! Topics: created once, with a count of partitions that never changes; and numbers for what Redis
//! calls by name.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use eventbus_core::log::{TopicLanes, Topics};
use eventbus_core::{Error, ErrorKind, Group, Result, Topic, TopicSpec};

use crate::config::RedisConfig;
use crate::server::Server;

/// By name: how many partitions, and for how many milliseconds messages are kept that were read.
pub(crate) const TOPICS: &str = "eventbus:topics";

/// A topic with the keys of its partitions.
#[derive(Clone, Debug)]
pub(crate) struct Streams {
    pub(crate) topic: Arc<TopicLanes>,
    pub(crate) keys: Arc<[Arc<str>]>,
}

/// What is known of topics and groups. Rows of lanes and numbers of groups are this client's own.
#[derive(Debug, Default)]
pub(crate) struct Known(Mutex<Names>);

#[derive(Debug, Default)]
struct Names {
    topics: Topics,
    by_first_lane: BTreeMap<u32, Streams>,
    next_lane: u32,
    /// Those that members of this client read.
    read: HashSet<Topic>,
    /// Those that have other partitions on the server by now, and how many.
    changed: HashMap<Topic, u32>,
    groups: HashMap<Group, i64>,
    by_number: Vec<Group>,
}

impl Known {
    fn lock(&self) -> MutexGuard<'_, Names> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn topic(&self, name: &Topic) -> Option<Arc<TopicLanes>> {
        self.lock().topics.get(name)
    }

    /// Takes note that members of this client read a topic.
    pub(crate) fn reads(&self, name: &Topic) {
        self.lock().read.insert(name.clone());
    }

    pub(crate) fn is_read(&self, name: &Topic) -> bool {
        self.lock().read.contains(name)
    }

    /// Takes note of how many partitions a topic has on the server. Whether those are as many as it had.
    pub(crate) fn compare(&self, topic: &TopicLanes, partitions: u32) -> bool {
        let is_same = topic.partitions == partitions;
        let mut names = self.lock();
        match is_same {
            true => drop(names.changed.remove(&topic.name)),
            false => drop(names.changed.insert(topic.name.clone(), partitions)),
        }
        is_same
    }

    /// How many partitions a topic has on the server, where those are others than it had.
    fn other_count(&self, name: &Topic) -> Option<u32> {
        self.lock().changed.get(name).copied()
    }

    fn remember(&self, name: &Topic, partitions: u32) -> Arc<TopicLanes> {
        let mut names = self.lock();
        if let Some(known) = names.topics.get(name) {
            return known;
        }
        let topic = Arc::new(TopicLanes::new(name.clone(), partitions, names.next_lane));
        names.next_lane += partitions;
        let keys = (0..partitions).map(|partition| stream(&topic, partition).into());
        let streams = Streams {
            topic: Arc::clone(&topic),
            keys: keys.collect(),
        };
        names.by_first_lane.insert(topic.first_lane, streams);
        names.topics.remember(&topic)
    }

    /// The streams that a row is one of, and which.
    pub(crate) fn streams(&self, row: u32) -> Option<(Streams, u32)> {
        let names = self.lock();
        let (first, streams) = names.by_first_lane.range(..=row).next_back()?;
        Some((streams.clone(), row - first))
    }

    /// The stream that a row is about.
    pub(crate) fn stream(&self, row: u32) -> Option<Arc<str>> {
        let (streams, partition) = self.streams(row)?;
        streams.keys.get(partition as usize).cloned()
    }

    /// The topic and partition of a row.
    pub(crate) fn place(&self, row: u32) -> Option<(Topic, u32)> {
        let (streams, partition) = self.streams(row)?;
        Some((streams.topic.name.clone(), partition))
    }

    pub(crate) fn group(&self, name: &Group) -> i64 {
        let mut names = self.lock();
        if let Some(number) = names.groups.get(name) {
            return *number;
        }
        let number = names.by_number.len() as i64;
        names.by_number.push(name.clone());
        names.groups.insert(name.clone(), number);
        number
    }

    pub(crate) fn group_name(&self, number: i64) -> Option<Group> {
        let names = self.lock();
        names.by_number.get(usize::try_from(number).ok()?).cloned()
    }

    /// All topics that were used.
    pub(crate) fn topics(&self) -> Vec<Arc<TopicLanes>> {
        let names = self.lock();
        let topics = names.by_first_lane.values().map(|streams| &streams.topic);
        topics.cloned().collect()
    }
}

/// The key of a partition's stream: the topic's name, and a number where there are several.
pub(crate) fn stream(topic: &TopicLanes, partition: u32) -> String {
    match topic.partitions {
        1 => topic.name.to_string(),
        _ => format!("{}:{partition}", topic.name),
    }
}

/// A topic as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoredTopic {
    pub(crate) partitions: u32,
    pub(crate) retention: Option<Duration>,
}

impl StoredTopic {
    fn read(name: &Topic, text: &str) -> Result<Self> {
        let parse = || {
            let (partitions, retention) = text.split_once(' ')?;
            let partitions = partitions.parse().ok().filter(|count| *count > 0)?;
            let retention = match retention {
                "-" => None,
                millis => Some(Duration::from_millis(millis.parse().ok()?)),
            };
            Some(Self {
                partitions,
                retention,
            })
        };
        parse().ok_or_else(|| {
            Error::new(
                ErrorKind::Codec,
                "find topic",
                "what is stored of the topic cannot be read: somebody else wrote to `eventbus:topics`",
            )
            .with("topic", name)
        })
    }

    fn written(self) -> String {
        match self.retention {
            None => format!("{} -", self.partitions),
            Some(retention) => format!("{} {}", self.partitions, retention.as_millis()),
        }
    }
}

/// Finds a topic.
pub(crate) async fn find(
    server: &Server,
    operation: &'static str,
    name: &Topic,
) -> Result<Option<StoredTopic>> {
    let mut get = redis::cmd("HGET");
    get.arg(TOPICS).arg(name.as_str());
    let found: Option<String> = server.control.ask(operation, &get).await?;
    found.map(|text| StoredTopic::read(name, &text)).transpose()
}

/// Creates a topic where it is missing; returns what it is like, and whether it was.
pub(crate) async fn create(
    server: &Server,
    config: &RedisConfig,
    operation: &'static str,
    spec: &TopicSpec,
) -> Result<(StoredTopic, bool)> {
    let default = match spec.name.is_dead_letters() {
        true => 1,
        false => config.partitions,
    };
    let new = StoredTopic {
        partitions: spec.partitions.unwrap_or(default),
        retention: spec.retention,
    };
    let mut set = redis::cmd("HSETNX");
    set.arg(TOPICS).arg(spec.name.as_str()).arg(new.written());
    let created: bool = server.control.ask(operation, &set).await?;
    match created {
        true => Ok((new, true)),
        false => match find(server, operation, &spec.name).await? {
            Some(found) => Ok((found, false)),
            None => Err(Error::new(
                ErrorKind::Unavailable,
                operation,
                "the topic was removed while it was looked up",
            )
            .with("topic", &spec.name)),
        },
    }
}

/// The topic, if it is known or there.
async fn look_up(
    server: &Server,
    known: &Known,
    operation: &'static str,
    name: &Topic,
) -> Result<Option<Arc<TopicLanes>>> {
    if let Some(topic) = known.topic(name) {
        return match known.other_count(name) {
            None => Ok(Some(topic)),
            Some(partitions) => Err(recreated(operation, &topic, partitions)),
        };
    }
    let found = find(server, operation, name).await?;
    Ok(found.map(|stored| known.remember(name, stored.partitions)))
}

/// The topic, created where it is missing.
pub(crate) async fn meet(
    server: &Server,
    config: &RedisConfig,
    known: &Known,
    operation: &'static str,
    name: &Topic,
) -> Result<Arc<TopicLanes>> {
    if let Some(topic) = look_up(server, known, operation, name).await? {
        return Ok(topic);
    }
    // What a message that cannot be handled goes to has to be there.
    if !config.create_topics && !name.is_dead_letters() {
        return Err(missing(operation, name));
    }
    let spec = TopicSpec::new(name.clone());
    let (stored, _) = create(server, config, operation, &spec).await?;
    Ok(known.remember(name, stored.partitions))
}

/// A topic that is there.
pub(crate) async fn expect(
    server: &Server,
    known: &Known,
    operation: &'static str,
    name: &Topic,
) -> Result<Arc<TopicLanes>> {
    let topic = look_up(server, known, operation, name).await?;
    topic.ok_or_else(|| missing(operation, name))
}

/// Keys would go to other partitions than where their earlier messages are read.
fn recreated(operation: &'static str, topic: &TopicLanes, partitions: u32) -> Error {
    Error::new(
        ErrorKind::Conflict,
        operation,
        "the topic was created anew with other partitions: restart this process, which knew it before",
    )
    .with("topic", &topic.name)
    .with("known", topic.partitions)
    .with("partitions", partitions)
}

fn missing(operation: &'static str, name: &Topic) -> Error {
    Error::new(
        ErrorKind::NotFound,
        operation,
        "the topic does not exist: look at its name, or create it with `apply_topics`",
    )
    .with("topic", name)
}
