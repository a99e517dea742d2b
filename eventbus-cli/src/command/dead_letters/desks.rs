//! Which groups left dead letters of which topics, and how all of them are read.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, bail};
use eventbus::prelude::{ErrorKind, EventBus, EventId, Topic};
use eventbus::{DeadLetter, DeadLetters};

/// The desks of several groups and topics.
pub(crate) struct Desks(pub(super) Vec<Desk>);

/// What one group left of one topic.
pub(super) struct Desk {
    pub(super) group: String,
    pub(super) topic: Topic,
    pub(super) letters: DeadLetters,
}

impl Desks {
    /// The desks that there are of these groups and topics; where none are named, of all.
    pub(crate) async fn of(
        bus: &EventBus,
        groups: &[String],
        topics: &[Topic],
    ) -> anyhow::Result<Self> {
        let mut desks = Vec::new();
        for (group, topics) in readers(bus, groups, topics).await? {
            for topic in topics {
                if has_letters(bus, &group, &topic).await? {
                    let letters = bus.dead_letters(&group, std::slice::from_ref(&topic))?;
                    desks.push(Desk {
                        group: group.clone(),
                        topic,
                        letters,
                    });
                }
            }
        }
        Ok(Self(desks))
    }

    /// Visits all open letters, a page at a time.
    pub(crate) async fn visit(&self, mut visit: impl FnMut(DeadLetter)) -> anyhow::Result<()> {
        for desk in &self.0 {
            let mut page = desk.letters.list().await?;
            while let Some(last) = page.last().cloned() {
                page.into_iter().for_each(&mut visit);
                page = desk.letters.list_after(&last).await?;
            }
        }
        Ok(())
    }

    /// A letter and the desk on which it is, whatever has become of it.
    pub(super) async fn find(&self, id: &EventId) -> anyhow::Result<(&DeadLetters, DeadLetter)> {
        for desk in &self.0 {
            match desk.letters.show(id).await {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                letter => return Ok((&desk.letters, letter?)),
            }
        }
        bail!("there is no letter {id}: `eventbus dlq list` shows the open ones")
    }
}

/// Which groups read which topics.
async fn readers(
    bus: &EventBus,
    groups: &[String],
    topics: &[Topic],
) -> anyhow::Result<BTreeMap<String, BTreeSet<Topic>>> {
    if !groups.is_empty() && !topics.is_empty() {
        // Also of groups that the broker has forgotten or never knew.
        let topics: BTreeSet<_> = topics.iter().cloned().collect();
        let pairs = groups.iter().map(|group| (group.clone(), topics.clone()));
        return Ok(pairs.collect());
    }
    let positions = bus.lags(topics).await.context(
        "the groups and topics with dead letters are not known: name them with --group and --topic",
    )?;
    let mut readers: BTreeMap<String, BTreeSet<Topic>> = BTreeMap::new();
    for place in positions {
        let group = place.group.as_str();
        if groups.is_empty() || groups.iter().any(|wanted| wanted == group) {
            readers
                .entry(group.to_owned())
                .or_default()
                .insert(place.topic);
        }
    }
    Ok(readers)
}

/// Whether there is a topic for these letters; reading it would create it on some brokers.
async fn has_letters(bus: &EventBus, group: &str, topic: &Topic) -> anyhow::Result<bool> {
    let Ok(name) = Topic::new(&format!("{topic}.{group}.dlq")) else {
        return Ok(false);
    };
    match bus.describe_topics(&[name]).await {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}
