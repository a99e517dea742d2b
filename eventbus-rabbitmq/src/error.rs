//! What RabbitMQ and its client say, as errors that say what to do. Codes are read here only.

use eventbus_core::{Error, ErrorKind, Retry};
use lapin::ErrorKind as Native;
use lapin::protocol::{AMQPError, AMQPErrorKind, AMQPHardError as Hard, AMQPSoftError as Soft};

/// Makes an error of what a call of the client came to.
pub(crate) fn into_error(operation: &'static str, error: lapin::Error) -> Error {
    let (kind, message) = explain(operation, &error);
    let said = match error.kind() {
        Native::ProtocolError(said) => Some(said.get_message().to_string()),
        _ => None,
    };
    let made = Error::new(kind, operation, message);
    let made = match kind {
        // A channel or a node that is short of something may have it later.
        ErrorKind::Internal => made.with_retry(Retry::Later),
        _ => made,
    };
    match said {
        Some(said) => made.with("rabbitmq", said),
        None => made.with_source(error),
    }
}

fn explain(operation: &'static str, error: &lapin::Error) -> (ErrorKind, &'static str) {
    use ErrorKind as Kind;
    match error.kind() {
        Native::IOError(cause) => (Kind::Unavailable, of_socket(operation, cause)),
        Native::RuntimeShutdownError(_) => (Kind::Closed, "the runtime ends"),
        Native::ProtocolError(said) => of_server(operation, said),
        Native::MissingHeartbeatError => (
            Kind::Unavailable,
            "the server has said nothing for the time of a heartbeat",
        ),
        Native::InvalidChannel(_)
        | Native::InvalidChannelState(..)
        | Native::InvalidConnectionState(_) => {
            (Kind::Unavailable, "the connection to the server is gone")
        }
        Native::ChannelsLimitReached => (
            Kind::InvalidInput,
            "each partition of a consumer needs a channel, and the server allows no more of them on a connection: raise its `channel_max`, or share the topics among several consumers",
        ),
        Native::InvalidProtocolVersion(_) => (
            Kind::Unsupported,
            "what answers there does not speak AMQP 0.9.1: look at the port of the url",
        ),
        Native::ParsingError(_) => (
            Kind::Unavailable,
            "what answers there cannot be read as AMQP: look at the port of the url, and whether it asks for TLS (`amqps://`)",
        ),
        Native::SerialisationError(_) => (Kind::InvalidInput, "a value cannot be sent as it is"),
        _ => (Kind::Internal, "the client of RabbitMQ failed"),
    }
}

fn of_socket(operation: &'static str, cause: &std::io::Error) -> &'static str {
    let text = cause.to_string();
    if text.contains("lookup") || text.contains("resolve") || text.contains("not known") {
        return "the host of the url is unknown: look at its name";
    }
    let is_about_trust = ["certificate", "fatal alert", "tls", "TLS"];
    if is_about_trust.iter().any(|word| text.contains(word)) {
        return "the connection cannot be encrypted: look at the certificates, at `tls_ca`, by which the server's is trusted, at `tls_cert` and `tls_key`, which it may ask for, and at whether its port speaks TLS";
    }
    use std::io::ErrorKind as Io;
    match cause.kind() {
        Io::ConnectionRefused => {
            "no server answers: look at host and port of the url, and whether RabbitMQ runs there"
        }
        // What it said of TLS may be lost with the connection.
        Io::ConnectionReset | Io::ConnectionAborted | Io::BrokenPipe | Io::UnexpectedEof
            if operation == "connect" =>
        {
            "the server ended the connection while it was made: look at its log, and, where its port speaks TLS, at `tls_cert` and `tls_key`, which it may ask for"
        }
        _ if operation == "connect" => {
            "the server cannot be reached: look at its host and network, and at how many files this process may open"
        }
        _ => "the connection to the server broke",
    }
}

fn of_server(operation: &'static str, said: &AMQPError) -> (ErrorKind, &'static str) {
    use ErrorKind as Kind;
    let text = said.get_message().to_string();
    match said.kind() {
        AMQPErrorKind::Soft(Soft::ACCESSREFUSED) if operation == "connect" => (
            Kind::Unauthorized,
            "the server does not accept the credentials: look at user and password of the url",
        ),
        AMQPErrorKind::Soft(Soft::ACCESSREFUSED) if text.contains("exclusive use") => (
            Kind::Unavailable,
            "another program reads the queue and lets nobody read beside it: stop it, or wait until it ends",
        ),
        AMQPErrorKind::Soft(Soft::ACCESSREFUSED) => (
            Kind::Unauthorized,
            "the user may not do this: give it permissions on the virtual host to configure, write and read",
        ),
        AMQPErrorKind::Hard(Hard::NOTALLOWED) if operation == "connect" => (
            Kind::Unauthorized,
            "there is no such virtual host, or the user may not enter it: look at the path of the url, in which `/` is `%2f`",
        ),
        AMQPErrorKind::Soft(Soft::NOTFOUND) if text.contains("down or inaccessible") => (
            Kind::Unavailable,
            "the node that keeps the queue is away: wait until it is back",
        ),
        AMQPErrorKind::Soft(Soft::NOTFOUND) => (
            Kind::NotFound,
            "the topic does not exist: create it with `apply_topics`",
        ),
        AMQPErrorKind::Soft(Soft::RESOURCELOCKED) => {
            (Kind::Conflict, "somebody else holds the queue alone")
        }
        AMQPErrorKind::Soft(Soft::PRECONDITIONFAILED) if text.contains("message size") => (
            Kind::InvalidInput,
            "the message is larger than the server takes: raise its `max_message_size`, or store the data elsewhere and publish a reference to it",
        ),
        AMQPErrorKind::Soft(Soft::PRECONDITIONFAILED)
            if text.contains("invalid") || text.contains("feature flag") =>
        {
            too_old()
        }
        AMQPErrorKind::Soft(Soft::PRECONDITIONFAILED) => (
            Kind::Conflict,
            "something of that name is there with other settings: delete it, or choose another name",
        ),
        AMQPErrorKind::Soft(Soft::CONTENTTOOLARGE) => (
            Kind::InvalidInput,
            "the message is larger than the server takes",
        ),
        AMQPErrorKind::Hard(Hard::NOTIMPLEMENTED | Hard::COMMANDINVALID) => too_old(),
        // What 3.10 says when it may not create a queue of a kind that it knows.
        AMQPErrorKind::Hard(Hard::INTERNALERROR) if text.contains("feature flag") => too_old(),
        AMQPErrorKind::Hard(Hard::CONNECTIONFORCED) => {
            (Kind::Unavailable, "the server has ended the connection")
        }
        AMQPErrorKind::Hard(Hard::RESOURCEERROR) => (
            Kind::RateLimited,
            "the server is short of something: look at its alarms and limits",
        ),
        AMQPErrorKind::Hard(Hard::FRAMEERROR) => (
            Kind::InvalidInput,
            "the server does not take so much in one frame: keep headers short",
        ),
        _ => (Kind::Unavailable, "the server did not do it"),
    }
}

fn too_old() -> (ErrorKind, &'static str) {
    (
        ErrorKind::Unsupported,
        "the server has no quorum queues, single active consumers or streams: RabbitMQ 3.9 or later is needed, with its feature flags enabled (rabbitmqctl enable_feature_flag all)",
    )
}

/// The server has raised an alarm, for the reason that it gave.
pub(crate) fn blocked(operation: &'static str, reason: &str) -> Error {
    Error::new(
        ErrorKind::Unavailable,
        operation,
        "the server takes no messages until it has memory and disk again: look at its alarms",
    )
    .with("blocked", reason)
}

/// Whether a channel was closed because something does not exist.
pub(crate) fn is_missing(error: &lapin::Error) -> bool {
    is_soft(error, Soft::NOTFOUND)
        && !text(error).is_some_and(|text| text.contains("down or inaccessible"))
}

/// Whether no queue, or none of this kind, can have an argument as it was given.
pub(crate) fn is_invalid(error: &lapin::Error, argument: &str) -> bool {
    is_soft(error, Soft::PRECONDITIONFAILED)
        && text(error).is_some_and(|text| text.contains(&format!("invalid arg '{argument}'")))
}

/// Whether the user may not do it.
pub(crate) fn is_refused(error: &lapin::Error) -> bool {
    is_soft(error, Soft::ACCESSREFUSED)
}

/// What the server says when something is there with other settings, and which one differs.
pub(crate) fn difference(error: &lapin::Error) -> Option<Difference> {
    if !is_soft(error, Soft::PRECONDITIONFAILED) {
        return None;
    }
    Difference::read(&text(error)?)
}

/// The exchange that a message was published to and that does not exist.
pub(crate) fn missing_exchange(error: &lapin::Error) -> Option<String> {
    if !is_missing(error) {
        return None;
    }
    let text = text(error)?;
    let (_, behind) = text.split_once("no exchange '")?;
    Some(behind.split_once('\'')?.0.to_owned())
}

/// Whether a message was larger than the server takes.
pub(crate) fn is_too_large(error: &lapin::Error) -> bool {
    is_soft(error, Soft::CONTENTTOOLARGE)
        || is_soft(error, Soft::PRECONDITIONFAILED)
            && text(error).is_some_and(|text| text.contains("message size"))
}

fn is_soft(error: &lapin::Error, code: Soft) -> bool {
    matches!(error.kind(), Native::ProtocolError(said) if *said.kind() == AMQPErrorKind::Soft(code))
}

fn text(error: &lapin::Error) -> Option<String> {
    match error.kind() {
        Native::ProtocolError(said) => Some(said.get_message().to_string()),
        _ => None,
    }
}

/// An argument that something has otherwise than it was declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Such as `x-max-length`.
    pub(crate) argument: String,
    pub(crate) current: Current,
}

/// What an argument is on the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Current {
    Unset,
    Is(String),
    /// The server's text, which has 255 bytes, ended before it: the name of a queue is long.
    Unread,
}

impl Current {
    pub(crate) fn value(&self) -> Option<&str> {
        match self {
            Self::Is(value) => Some(value),
            Self::Unset | Self::Unread => None,
        }
    }
}

impl Difference {
    /// Reads `… inequivalent arg 'NAME' for queue '…' in vhost '…': received … but current is 'VALUE'`,
    /// or `… is the value 'VALUE' of type '…'`, or `… is none`.
    fn read(text: &str) -> Option<Self> {
        let (_, behind) = text.split_once("inequivalent arg '")?;
        let (argument, behind) = behind.split_once('\'')?;
        let current = behind.rsplit_once("but current is ");
        let current = current.map(|(_, current)| current.trim_start_matches("the value "));
        let value = |current: &str| {
            let (value, _) = current.strip_prefix('\'')?.split_once('\'')?;
            Some(value.to_owned())
        };
        let current = match current {
            Some("none") => Current::Unset,
            current => current.and_then(value).map_or(Current::Unread, Current::Is),
        };
        Some(Self {
            argument: argument.to_owned(),
            current,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(code: u16, text: &str) -> lapin::Error {
        let error = AMQPError::from_id(code, text.into()).expect("a code of AMQP");
        Native::ProtocolError(error).into()
    }

    fn socket(kind: std::io::ErrorKind, text: &str) -> lapin::Error {
        std::io::Error::new(kind, text.to_owned()).into()
    }

    #[test]
    fn what_goes_wrong_says_what_to_do() {
        use ErrorKind as Kind;
        let refused = std::io::ErrorKind::ConnectionRefused;
        let other = std::io::ErrorKind::Other;
        let cases = [
            (
                socket(refused, "Connection refused (os error 111)"),
                "connect",
                Kind::Unavailable,
                true,
                "whether RabbitMQ runs there",
            ),
            (
                socket(other, "failed to lookup address information"),
                "connect",
                Kind::Unavailable,
                true,
                "host of the url is unknown",
            ),
            (
                socket(other, "broken pipe"),
                "publish",
                Kind::Unavailable,
                true,
                "connection to the server broke",
            ),
            (
                socket(other, "invalid peer certificate: UnknownIssuer"),
                "connect",
                Kind::Unavailable,
                true,
                "certificate",
            ),
            (
                server(403, "ACCESS_REFUSED - Login was refused"),
                "connect",
                Kind::Unauthorized,
                false,
                "user and password",
            ),
            (
                server(403, "ACCESS_REFUSED - write access refused"),
                "publish",
                Kind::Unauthorized,
                false,
                "permissions",
            ),
            (
                server(
                    403,
                    "ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use",
                ),
                "subscribe",
                Kind::Unavailable,
                true,
                "lets nobody read beside it",
            ),
            (
                server(530, "NOT_ALLOWED - vhost x not found"),
                "connect",
                Kind::Unauthorized,
                false,
                "virtual host",
            ),
            (
                server(404, "NOT_FOUND - no exchange 'x' in vhost '/'"),
                "publish",
                Kind::NotFound,
                false,
                "apply_topics",
            ),
            (
                server(
                    404,
                    "NOT_FOUND - home node 'a' of durable queue 'q' is down or inaccessible",
                ),
                "subscribe",
                Kind::Unavailable,
                true,
                "is away",
            ),
            (
                server(405, "RESOURCE_LOCKED"),
                "subscribe",
                Kind::Conflict,
                false,
                "holds the queue",
            ),
            (
                server(
                    406,
                    "PRECONDITION_FAILED - message size 17 is larger than configured max size 16",
                ),
                "publish",
                Kind::InvalidInput,
                false,
                "max_message_size",
            ),
            (
                server(
                    406,
                    "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received 'quorum' but current is 'classic'",
                ),
                "subscribe",
                Kind::Conflict,
                false,
                "other settings",
            ),
            (
                server(
                    406,
                    "PRECONDITION_FAILED - invalid arg 'x-queue-type' for queue 'q'",
                ),
                "subscribe",
                Kind::Unsupported,
                false,
                "3.9",
            ),
            (
                server(540, "NOT_IMPLEMENTED"),
                "subscribe",
                Kind::Unsupported,
                false,
                "3.9",
            ),
            (
                server(
                    541,
                    "INTERNAL_ERROR - Cannot declare a queue 'queue 'q' in vhost '/'' of type 'rabbit_quorum_queue' on node 'a@b': the corresponding feature flag is disabled",
                ),
                "subscribe",
                Kind::Unsupported,
                false,
                "3.9",
            ),
            (
                server(320, "CONNECTION_FORCED - broker forced connection closure"),
                "read",
                Kind::Unavailable,
                true,
                "ended the connection",
            ),
            (
                server(506, "RESOURCE_ERROR"),
                "publish",
                Kind::RateLimited,
                true,
                "alarms",
            ),
            (
                server(501, "FRAME_ERROR"),
                "publish",
                Kind::InvalidInput,
                false,
                "headers short",
            ),
            (
                server(541, "INTERNAL_ERROR"),
                "publish",
                Kind::Unavailable,
                true,
                "did not do it",
            ),
            (
                Native::MissingHeartbeatError.into(),
                "read",
                Kind::Unavailable,
                true,
                "heartbeat",
            ),
            (
                Native::ChannelsLimitReached.into(),
                "subscribe",
                Kind::InvalidInput,
                false,
                "channel_max",
            ),
        ];
        for (native, operation, kind, is_retryable, text) in cases {
            let shown = native.to_string();
            let error = into_error(operation, native);
            assert_eq!(error.kind(), kind, "{shown}: {error}");
            assert_eq!(error.is_retryable(), is_retryable, "{shown}: {error}");
            assert!(error.to_string().contains(text), "{shown}: {error}");
        }
    }

    #[test]
    fn what_differs_is_read_from_what_the_server_says() {
        let cases = [
            (
                "received '5' but current is '3'",
                Current::Is("3".to_owned()),
            ),
            (
                "received none but current is the value '3' of type 'signedint'",
                Current::Is("3".to_owned()),
            ),
            (
                "received the value '5' of type 'signedint' but current is none",
                Current::Unset,
            ),
            ("received '5' but current is '3", Current::Unread),
            ("received '5' but curr", Current::Unread),
        ];
        for (text, current) in cases {
            let text = format!(
                "PRECONDITION_FAILED - inequivalent arg 'x-max-length' for queue 'a'' in vhost '/': {text}"
            );
            let found = difference(&server(406, &text)).expect("it differs");
            assert_eq!(found.argument, "x-max-length");
            assert_eq!(found.current, current, "{text}");
        }
        assert_eq!(difference(&server(404, "NOT_FOUND - no queue 'a'")), None);
    }

    #[test]
    fn a_missing_exchange_is_named() {
        let error = server(404, "NOT_FOUND - no exchange 'orders' in vhost '/'");
        assert_eq!(missing_exchange(&error).as_deref(), Some("orders"));
    }
}
