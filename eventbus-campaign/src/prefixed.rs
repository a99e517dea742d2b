//! A broker whose topics and groups begin with a prefix, so that rounds that share a server do not meet.

use std::sync::Arc;

use async_trait::async_trait;
use eventbus::broker::{
    AdminReply, AdminRequest, Broker, Capabilities, Deliveries, Member, PublishError, Publisher,
    Signal, Subscriber, Subscription,
};
use eventbus::prelude::Result;
use eventbus::{Group, Message, Topic};

/// Gives topics and groups other names on the broker than those that are spoken of.
#[derive(Debug)]
pub struct Prefixed {
    broker: Arc<dyn Broker>,
    prefix: Arc<str>,
}

impl Prefixed {
    /// A broker on which all names begin with `prefix`.
    #[must_use]
    pub fn new(broker: Arc<dyn Broker>, prefix: &str) -> Self {
        Self {
            broker,
            prefix: prefix.into(),
        }
    }

    fn topics(&self, topics: Vec<Topic>) -> Result<Vec<Topic>> {
        topics.iter().map(|topic| self.topic(topic)).collect()
    }

    fn topic(&self, topic: &Topic) -> Result<Topic> {
        Topic::new(&format!("{}{topic}", self.prefix))
    }

    fn group(&self, group: &Group) -> Result<Group> {
        Group::new(&format!("{}{group}", self.prefix))
    }

    fn ask(&self, request: AdminRequest) -> Result<AdminRequest> {
        use AdminRequest as Ask;
        Ok(match request {
            Ask::ApplyTopics(mut specs) => {
                for spec in &mut specs {
                    spec.name = self.topic(&spec.name)?;
                }
                Ask::ApplyTopics(specs)
            }
            Ask::DescribeTopics(topics) => Ask::DescribeTopics(self.topics(topics)?),
            Ask::Lag { group, topics } => Ask::Lag {
                group: self.group(&group)?,
                topics: self.topics(topics)?,
            },
            Ask::Groups { topics } => Ask::Groups {
                topics: self.topics(topics)?,
            },
            Ask::ResetGroup { group, topic, to } => Ask::ResetGroup {
                group: self.group(&group)?,
                topic: self.topic(&topic)?,
                to,
            },
            Ask::Trim {
                topic,
                partition,
                before,
            } => Ask::Trim {
                topic: self.topic(&topic)?,
                partition,
                before,
            },
            other => other,
        })
    }

    fn answer(&self, mut reply: AdminReply) -> AdminReply {
        match &mut reply {
            AdminReply::Topics(reports) => {
                reports.retain(|report| report.name.as_str().starts_with(&*self.prefix));
                for report in reports {
                    strip(&self.prefix, &mut report.name);
                }
            }
            AdminReply::Lag(lanes) => {
                for lane in lanes {
                    strip(&self.prefix, &mut lane.topic);
                }
            }
            AdminReply::Groups(positions) => {
                positions.retain(|position| position.group.as_str().starts_with(&*self.prefix));
                for position in positions {
                    strip(&self.prefix, &mut position.topic);
                    let group = position.group.as_str().strip_prefix(&*self.prefix);
                    let group = group.and_then(|group| Group::new(group).ok());
                    position.group = group.unwrap_or_else(|| position.group.clone());
                }
            }
            _ => {}
        }
        reply
    }
}

fn strip(prefix: &str, topic: &mut Topic) {
    let name = topic.as_str().strip_prefix(prefix);
    if let Some(plain) = name.and_then(|name| Topic::new(name).ok()) {
        *topic = plain;
    }
}

/// Renames the topics of messages; mostly all are of one.
fn rename<'m>(
    messages: impl Iterator<Item = &'m mut Message>,
    new_name: impl Fn(&Topic) -> Result<Topic>,
) -> Result<()> {
    let mut last: Option<(Topic, Topic)> = None;
    for message in messages {
        let known = last.take().filter(|(topic, _)| *topic == message.topic);
        let (topic, name) = match known {
            Some(known) => known,
            None => (message.topic.clone(), new_name(&message.topic)?),
        };
        message.topic = name.clone();
        last = Some((topic, name));
    }
    Ok(())
}

#[async_trait]
impl Publisher for Prefixed {
    async fn publish(&self, mut batch: Vec<Message>) -> Result<(), PublishError> {
        rename(batch.iter_mut(), |topic| self.topic(topic))
            .expect("the names of the campaign's topics are short");
        let published = self.broker.publish(batch).await;
        published.map_err(|mut error| {
            for unpublished in &mut error.unpublished {
                strip(&self.prefix, &mut unpublished.message.topic);
            }
            error
        })
    }
}

#[async_trait]
impl Subscriber for Prefixed {
    async fn subscribe(&self, mut subscription: Subscription) -> Result<Member> {
        subscription.topics = self.topics(subscription.topics)?;
        if let Some(group) = &subscription.group {
            subscription.group = Some(self.group(group)?);
        }
        let member = self.broker.subscribe(subscription).await?;
        let deliveries = PrefixedDeliveries {
            inner: member.deliveries,
            prefix: Arc::clone(&self.prefix),
        };
        Ok(Member::new(Box::new(deliveries), member.settlement))
    }
}

#[async_trait]
impl Broker for Prefixed {
    fn capabilities(&self) -> Capabilities {
        self.broker.capabilities()
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        let reply = self.broker.admin(self.ask(request)?).await?;
        Ok(self.answer(reply))
    }

    async fn close(&self) -> Result<()> {
        self.broker.close().await
    }
}

#[derive(Debug)]
struct PrefixedDeliveries {
    inner: Box<dyn Deliveries>,
    prefix: Arc<str>,
}

#[async_trait]
impl Deliveries for PrefixedDeliveries {
    async fn next(&mut self) -> Result<Signal> {
        // Nothing is awaited behind it, so that a dropped future has consumed no signal.
        let mut signal = self.inner.next().await?;
        match &mut signal {
            Signal::Assigned(assignments) => {
                for assignment in assignments {
                    strip(&self.prefix, &mut assignment.topic);
                }
            }
            Signal::Delivered(deliveries) => {
                let messages = deliveries.iter_mut().map(|delivery| &mut delivery.message);
                rename(messages, |topic| {
                    let mut topic = topic.clone();
                    strip(&self.prefix, &mut topic);
                    Ok(topic)
                })?;
            }
            _ => {}
        }
        Ok(signal)
    }

    async fn close(self: Box<Self>) -> Result<()> {
        self.inner.close().await
    }
}
