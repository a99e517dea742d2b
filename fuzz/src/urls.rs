//! URLs of brokers: read or refused, and what is secret in them never shown.
//!
//! Secret is what stands between a user's `:` and the last `@`, and the value of an option that is
//! called a password.

use std::fmt::Debug;

use eventbus::{
    Connect, EventBus, EventBusConfig, KafkaConfig, MemoryConfig, PostgresConfig, RabbitMqConfig,
    RedisConfig, SqliteConfig,
};
use eventbus_core::{Error, ErrorKind, Result, error_chain};

use crate::{Target, runtime};

pub(crate) const TARGET: Target = Target {
    name: "urls",
    run,
    words: &[
        "memory:",
        "memory:shop",
        "sqlite://shop.db",
        "sqlite:///tmp/shop.db",
        "postgres://",
        "postgresql://",
        "kafka://",
        "kafka://me:hunter2@one:9093,two",
        "&compression.type=lz4",
        "&ssl.key.password=hunter2",
        "&sasl.mechanism=SCRAM-SHA-256",
        "&publish_timeout=5s",
        "&create_topics=false",
        "&tls=true",
        "amqp://",
        "amqp://user:hunter2@rabbit,other:5673/%2fshop",
        "amqps://",
        "&queues=orders,old",
        "&volatile_queues=old",
        "&heartbeat=10s",
        "&prefetch=1",
        "&tls_ca=/tmp/ca.pem",
        "redis://",
        "redis://:hunter2@one:6380/3",
        "rediss://",
        "&timeout=5s",
        "&replicas=1",
        "&retention=7d",
        "user:hunter2@",
        "hunter2",
        "password=hunter2",
        "sslpassword=hunter2",
        "@host:5432/shop",
        "?like=kafka",
        "&partitions=8",
        "&bytes=65536",
        "&schema=bus",
        "&prefix=bus_",
        "&lease=5s",
        "&busy_timeout=500ms",
        "&transaction_limit=18446744073709551615d",
        "&connections=5",
        "&sslmode=verify-full",
        "&host=/tmp",
        "&application_name=shop",
        "%2f",
        "%",
        "%ff",
        "#",
        "?",
        "&",
        "=",
        "://",
    ],
    cost: 2,
};

/// What is looked for in everything that is shown.
pub(crate) const SECRET: &str = "hunter2";

fn run(data: &[u8]) {
    let Ok(url) = std::str::from_utf8(data) else {
        return;
    };
    let may_be_secret = has_secret(url, Secret::MayBe);
    let check = |shown: String| {
        assert!(!may_be_secret || !shown.contains(SECRET), "{shown}");
    };
    if let Some(error) = refused(MemoryConfig::from_url(url)) {
        check(error);
    }
    if let Some(error) = refused(SqliteConfig::from_url(url)) {
        check(error);
    }
    let is_secret = has_secret(url, Secret::IsRead);
    for read in [
        shown(PostgresConfig::from_url(url)),
        shown(KafkaConfig::from_url(url)),
        shown(RabbitMqConfig::from_url(url)),
        shown(RedisConfig::from_url(url)),
    ] {
        match read {
            Ok(config) => assert!(!is_secret || !config.contains(SECRET), "{config}"),
            Err(error) => check(text_of(&error)),
        }
    }
    check(format!("{:?}", EventBusConfig::new(url)));
    // Those that would open a file or a socket are only read.
    let opens = [
        "sqlite",
        "postgres",
        "postgresql",
        "kafka",
        "amqp",
        "amqps",
        "redis",
        "rediss",
    ];
    let scheme = url.split_once(':').map_or(url, |(scheme, _)| scheme);
    if !opens.contains(&scheme) {
        let connected = runtime().block_on(EventBus::connect(url));
        if let Some(error) = refused(connected) {
            check(error);
        }
    }
}

/// The text of the error, which is one of those that say what is wrong with a URL.
fn refused<T>(read: Result<T>) -> Option<String> {
    let error = read.err()?;
    let kinds = [
        ErrorKind::InvalidInput,
        ErrorKind::Unsupported,
        ErrorKind::Conflict,
    ];
    assert!(kinds.contains(&error.kind()), "{error}");
    Some(text_of(&error))
}

/// What a configuration shows of itself.
fn shown(read: Result<impl Debug>) -> Result<String> {
    read.map(|config| format!("{config:?}"))
}

fn text_of(error: &Error) -> String {
    format!("{error} {error:?} {}", error_chain(error))
}

/// What counts as a password.
#[derive(Clone, Copy)]
enum Secret {
    /// What stands before the last `@` of all: it may be one with characters that are to be escaped.
    MayBe,
    /// What stands before the last `@` in front of a path and options, as the URL is read.
    IsRead,
}

/// Whether what is looked for is somewhere secret, and nowhere else: neither before the scheme's
/// end, nor in a host, a path, or the value of an option that is no password.
fn has_secret(url: &str, secret: Secret) -> bool {
    // Readers of URLs pass these over.
    let url = url.replace(['\t', '\n', '\r'], "");
    let Some((scheme, address)) = url.split_once("://") else {
        return false;
    };
    if scheme.contains(['/', '?', '#']) {
        return false;
    }
    let end = match secret {
        Secret::MayBe => address.len(),
        Secret::IsRead => address.find(['/', '?', '#']).unwrap_or(address.len()),
    };
    let (user, host) = match address[..end].rfind('@') {
        Some(at) => (&address[..at], &address[at + 1..]),
        None => ("", address),
    };
    let (host, options) = host.split_once('?').unwrap_or((host, ""));
    let is_open = |option: &str| {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let is_secret = name.contains("password") && !name.contains(SECRET);
        option.contains(SECRET) && !(is_secret && value.contains(SECRET))
    };
    let (name, password) = user.split_once(':').unwrap_or((user, ""));
    let is_shown = scheme.contains(SECRET)
        || name.contains(SECRET)
        || host.contains(SECRET)
        || options.split('&').any(is_open);
    let is_secret = password.contains(SECRET) || options.contains(SECRET);
    is_secret && !is_shown
}
