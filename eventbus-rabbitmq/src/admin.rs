//! What is answered beside the flow of messages.

use eventbus_core::{AdminReply, AdminRequest, Error, ErrorKind, Result, TopicReport};

use crate::broker::Shared;
use crate::error::blocked;

impl Shared {
    /// Answers an administrative request.
    pub(crate) async fn answer(&self, request: AdminRequest) -> Result<AdminReply> {
        let operation = request.operation();
        let refuse = |message: &str| Err(Error::new(ErrorKind::Unsupported, operation, message));
        match request {
            AdminRequest::ApplyTopics(specs) => {
                let mut reports = Vec::with_capacity(specs.len());
                for spec in &specs {
                    reports.push(self.topics.apply(spec).await?);
                }
                Ok(AdminReply::Topics(reports))
            }
            AdminRequest::DescribeTopics(topics) if topics.is_empty() => {
                refuse("RabbitMQ lists nothing over AMQP: name the topics")
            }
            AdminRequest::DescribeTopics(topics) => {
                let mut reports = Vec::with_capacity(topics.len());
                for topic in topics {
                    let partitions = self.topics.partitions(operation, &topic).await?;
                    reports.push(TopicReport::new(topic, partitions));
                }
                Ok(AdminReply::Topics(reports))
            }
            AdminRequest::Lag { .. } | AdminRequest::Groups { .. } => refuse(
                "over AMQP RabbitMQ counts what waits in a queue, not what is handed out and unsettled: ask its management API, or rabbitmqctl list_queues name messages",
            ),
            AdminRequest::ResetGroup { .. } => {
                refuse("a queue has what is not settled, and nothing else to go back to")
            }
            AdminRequest::Trim { .. } => refuse(
                "nothing is removed up to a place: purge a group's queue with rabbitmqctl purge_queue, or bound dead letters by a retention",
            ),
            AdminRequest::Health => self.health(operation).await,
            _ => refuse("the RabbitMQ broker does not know this request"),
        }
    }

    async fn health(&self, operation: &'static str) -> Result<AdminReply> {
        let publishing = self.publishing.present().await;
        if let Some(reason) = publishing.and_then(|link| link.blocked()) {
            return Err(blocked(operation, &reason));
        }
        // A channel that comes is an answer.
        self.asking.channel(operation).await?;
        Ok(AdminReply::Done)
    }
}
