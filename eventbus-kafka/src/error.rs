//! What librdkafka says, as errors that say what to do.

use eventbus_core::{Error, ErrorKind, Outcome};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};

/// Makes an error of what a call of the client came to.
pub(crate) fn into_error(operation: &'static str, error: KafkaError) -> Error {
    match (&error, error.rdkafka_error_code()) {
        (KafkaError::ClientConfig(_, reason, name, _), _) => {
            let message = format!("librdkafka does not take an option: {reason}");
            Error::new(ErrorKind::InvalidInput, operation, message).with("option", name)
        }
        // It names the option and the reason, never a value.
        (KafkaError::ClientCreation(reason), _) if reason.contains("recompile librdkafka") => {
            Error::new(
                ErrorKind::InvalidInput,
                operation,
                "this `sasl.mechanism` or `security.protocol` needs the feature `kafka-tls`: add it to the features of eventbus",
            )
        }
        (KafkaError::ClientCreation(reason), _) => Error::new(
            ErrorKind::InvalidInput,
            operation,
            format!("the options do not fit together: {reason}"),
        ),
        (_, Some(code)) => of_code(operation, code),
        _ => Error::new(ErrorKind::Internal, operation, "the client failed").with_source(error),
    }
}

/// Makes an error of a code of the client or of a broker.
pub(crate) fn of_code(operation: &'static str, code: Code) -> Error {
    let (kind, message) = explain(code);
    Error::new(kind, operation, message).with("kafka", code)
}

fn explain(code: Code) -> (ErrorKind, &'static str) {
    use ErrorKind as Kind;
    match code {
        Code::AllBrokersDown | Code::BrokerTransportFailure | Code::NetworkException => (
            Kind::Unavailable,
            "no broker answers: look at the host and port of the url, whether Kafka runs there, and whether that port asks for a password or TLS, which the url does not name",
        ),
        Code::Resolve => (
            Kind::Unavailable,
            "the host of the url is unknown: look at its name",
        ),
        Code::Authentication
        | Code::SaslAuthenticationFailed
        | Code::UnsupportedSASLMechanism
        | Code::IllegalSASLState => (
            Kind::Unauthorized,
            "the broker does not accept the credentials: look at user, password and `sasl.mechanism` of the url, and whether that port asks for any",
        ),
        Code::TopicAuthorizationFailed => (
            Kind::Unauthorized,
            "the user may not do this with the topic: add an ACL for it",
        ),
        Code::GroupAuthorizationFailed => (
            Kind::Unauthorized,
            "the user may not read as this group: add an ACL for it",
        ),
        Code::ClusterAuthorizationFailed => (
            Kind::Unauthorized,
            "the user may not do this on the cluster: add an ACL for it",
        ),
        Code::SSL => (
            Kind::Unauthorized,
            "the connection cannot be encrypted: look at `tls` and `ssl.ca.location` of the url",
        ),
        Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition => (
            Kind::NotFound,
            "the topic does not exist: create it with `apply_topics`",
        ),
        Code::InvalidTopic => (
            Kind::InvalidInput,
            "the broker does not take this name for a topic",
        ),
        Code::MessageSizeTooLarge | Code::MessageBatchTooLarge | Code::InvalidMessageSize => (
            Kind::InvalidInput,
            "the message is larger than the topic takes: raise its `max.message.bytes`, or store the data elsewhere and publish a reference to it",
        ),
        Code::InvalidRecord | Code::InvalidMessage | Code::InvalidTimestamp => (
            Kind::InvalidInput,
            "the broker does not take the message as it is: look at the settings of the topic, such as `cleanup.policy` for messages without a key",
        ),
        Code::InvalidPartitions => (
            Kind::InvalidInput,
            "the broker does not take this number of partitions",
        ),
        Code::InvalidReplicationFactor => (
            Kind::InvalidInput,
            "the cluster has too few brokers for this replication: declare less",
        ),
        Code::InvalidConfig | Code::InvalidRequest | Code::InvalidArgument => (
            Kind::InvalidInput,
            "the broker does not take a value as it is",
        ),
        Code::PolicyViolation => (Kind::InvalidInput, "a policy of the cluster forbids it"),
        Code::TopicAlreadyExists => (Kind::AlreadyExists, "the topic is there already"),
        Code::UnsupportedVersion | Code::UnsupportedFeature | Code::UnknownProtocol => (
            Kind::Unsupported,
            "the broker is too old: Apache Kafka 2.4 or later is needed",
        ),
        Code::UnsupportedCompressionType => (
            Kind::Unsupported,
            "the broker is too old for this compression: choose another `compression.type`",
        ),
        Code::MessageTimedOut
        | Code::OperationTimedOut
        | Code::RequestTimedOut
        | Code::TimedOutQueue => (Kind::Timeout, "no broker has answered in time"),
        Code::QueueFull | Code::ThrottlingQuotaExceeded => {
            (Kind::RateLimited, "more is asked for than may be")
        }
        Code::NonEmptyGroup => (
            Kind::Conflict,
            "the group has members: stop its consumers first",
        ),
        Code::FencedInstanceId | Code::Fenced | Code::UnreleasedInstanceId => (
            Kind::Conflict,
            "another member has the same `group.instance.id`: give each its own",
        ),
        Code::GroupMaxSizeReached => (
            Kind::RateLimited,
            "the group has as many members as the broker allows",
        ),
        Code::IllegalGeneration
        | Code::UnknownMemberId
        | Code::RebalanceInProgress
        | Code::StaleMemberEpoch
        | Code::FencedMemberEpoch => (
            Kind::Unavailable,
            "the group shares its partitions out anew",
        ),
        Code::InvalidSessionTimeout => (
            Kind::InvalidInput,
            "the broker does not take this `session_timeout`: look at its `group.min.session.timeout.ms` and `group.max.session.timeout.ms`",
        ),
        Code::InconsistentGroupProtocol => (
            Kind::Conflict,
            "the group has members that share partitions out by another protocol: stop them, or use another group",
        ),
        Code::InvalidGroupId => (
            Kind::InvalidInput,
            "the broker does not take this name for a group",
        ),
        Code::BrokerDestroy => (Kind::Closed, "the broker handle was closed"),
        Code::Fatal
        | Code::OutOfOrderSequenceNumber
        | Code::InvalidProducerEpoch
        | Code::UnknownProducerId
        | Code::InvalidProducerIdMapping
        | Code::DuplicateSequenceNumber => (
            Kind::Unavailable,
            "the producer has lost its place on the broker, and begins anew",
        ),
        Code::BadCompression | Code::BadMessage => {
            (Kind::Codec, "what the broker sent cannot be read")
        }
        _ => (Kind::Unavailable, "the broker did not do it"),
    }
}

/// Whether a message that was not acknowledged for this reason may be on a broker.
pub(crate) fn outcome(code: Code) -> Outcome {
    match code {
        // Refused by the client before it was sent, or by the broker before it was written.
        Code::UnknownTopic
        | Code::UnknownPartition
        | Code::UnknownTopicOrPartition
        | Code::QueueFull
        | Code::PurgeQueue
        | Code::MessageSizeTooLarge
        | Code::MessageBatchTooLarge
        | Code::InvalidMessageSize
        | Code::InvalidRecord
        | Code::InvalidTimestamp
        | Code::InvalidTopic
        | Code::PolicyViolation
        | Code::TopicAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::UnsupportedCompressionType
        | Code::NotEnoughReplicas => Outcome::NotTaken,
        _ => Outcome::Unknown,
    }
}
