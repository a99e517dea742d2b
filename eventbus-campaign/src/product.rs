//! The message brokers that are tried, each with what tells it from the others.

use eventbus_testkit::{AmqpMethod, AmqpMethods, KafkaApi, Protocol, RedisCommands, Requests};

/// A message broker, which `dev/brokers` can start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// Apache Kafka.
    Kafka,
    /// Redis, whose streams are read as logs.
    Redis,
    /// `RabbitMQ`, with quorum queues.
    RabbitMq,
}

impl Product {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Kafka, Self::Redis, Self::RabbitMq];

    /// How it is called in the report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kafka => "Kafka",
            Self::Redis => "Redis",
            Self::RabbitMq => "RabbitMQ",
        }
    }

    /// How it is called on the command line, here and for `dev/brokers`.
    #[must_use]
    pub fn command(self) -> &'static str {
        match self {
            Self::Kafka => "kafka",
            Self::Redis => "redis",
            Self::RabbitMq => "rabbitmq",
        }
    }

    /// What its URLs begin with.
    #[must_use]
    pub fn scheme(self) -> &'static str {
        match self {
            Self::Kafka => "kafka",
            Self::Redis => "redis",
            Self::RabbitMq => "amqp",
        }
    }

    /// The port that a URL need not say.
    #[must_use]
    pub fn port(self) -> u16 {
        match self {
            Self::Kafka => 9092,
            Self::Redis => 6379,
            Self::RabbitMq => 5672,
        }
    }

    /// The variable in which `dev/brokers` says where it is.
    #[must_use]
    pub fn variable(self) -> &'static str {
        match self {
            Self::Kafka => "EVENTBUS_TEST_KAFKA",
            Self::Redis => "EVENTBUS_TEST_REDIS",
            Self::RabbitMq => "EVENTBUS_TEST_RABBITMQ",
        }
    }

    /// Whether it says of a group how much it has still to settle. `RabbitMQ` says what waits, and not
    /// what was handed out.
    #[must_use]
    pub fn tells_lag(self) -> bool {
        self != Self::RabbitMq
    }

    /// How many bytes a process may have read ahead of what it handles, when it is behind: of Kafka
    /// what its client does by default (`queued.max.messages.kbytes`), of `RabbitMQ` what is sent ahead
    /// for each partition.
    #[must_use]
    pub fn read_ahead(self) -> u64 {
        match self {
            Self::Kafka => 32 << 20,
            Self::Redis => 0,
            Self::RabbitMq => 8 << 20,
        }
    }

    /// Which requests are commits, to a proxy: whatever moves a message or a group.
    #[must_use]
    pub fn protocol(self) -> Protocol {
        match self {
            Self::Kafka => Protocol::Kafka(Requests::of(&[
                KafkaApi::Produce,
                KafkaApi::Fetch,
                KafkaApi::OffsetCommit,
                KafkaApi::JoinGroup,
                KafkaApi::SyncGroup,
                KafkaApi::Heartbeat,
                KafkaApi::LeaveGroup,
            ])),
            // A script settles, or renews leases.
            Self::Redis => Protocol::Redis(RedisCommands::of(&["XADD", "XREAD", "EVAL"])),
            // A queue is asked about behind what is settled.
            Self::RabbitMq => Protocol::Amqp(AmqpMethods::of(&[
                AmqpMethod::Publish,
                AmqpMethod::DeclareQueue,
                AmqpMethod::Consume,
            ])),
        }
    }

    /// What it says of commits that it did not do, or may not have done.
    #[must_use]
    pub fn refusals(self) -> &'static [i16] {
        match self {
            // The coordinator loads, or is elsewhere; the leader is elsewhere, or too few replicas have it.
            Self::Kafka => &[14, 15, 16, 6, 20],
            Self::Redis => RedisCommands::REFUSALS,
            Self::RabbitMq => AmqpMethods::REFUSALS,
        }
    }
}
