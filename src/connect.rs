//! From a URL to a bus.

#[cfg(any(
    feature = "memory",
    feature = "sqlite",
    feature = "postgres",
    feature = "redis"
))]
use std::sync::Arc;

#[cfg(feature = "redis")]
use eventbus_core::Durability;
use eventbus_core::{Error, ErrorKind, EventBus, EventBusBuilder, Result, Topic, redacted_url};
#[cfg(any(feature = "sqlite", feature = "postgres"))]
use eventbus_core::{KeyStateStore, ScheduleStore};

use crate::config::EventBusConfig;

/// Every scheme there is, and the feature that brings it.
const SCHEMES: &[(&str, &str)] = &[
    ("memory", "memory"),
    ("sqlite", "sqlite"),
    ("postgres", "postgres"),
    ("postgresql", "postgres"),
    ("kafka", "kafka"),
    ("redis", "redis"),
    ("rediss", "redis"),
    ("amqp", "rabbitmq"),
    ("amqps", "rabbitmq-tls"),
];

/// Schemes of what can keep held keys and events for later beside a broker.
const STORES: &[&str] = &["sqlite", "postgres", "postgresql", "redis", "rediss"];

/// Connects an [`EventBus`]; in scope with the prelude, so that `EventBus::connect` is there.
pub trait Connect: Sized {
    /// Connects to the broker that `url` names, such as `sqlite://shop.db`, `postgres://db.example/shop`,
    /// `kafka://kafka.example:9092`, `amqp://rabbit.example/%2f`, `memory:`, `memory:shop` for one that several parts of a process share, or `memory:?like=kafka`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for an unknown scheme or option, `Unsupported` for a scheme whose feature is
    /// off, and those of connecting. A password in the URL is in none of them.
    fn connect(url: &str) -> impl Future<Output = Result<Self>> + Send;

    /// Connects as a configuration says.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    fn connect_with(config: &EventBusConfig) -> impl Future<Output = Result<Self>> + Send;
}

impl Connect for EventBus {
    async fn connect(url: &str) -> Result<Self> {
        connect(url).await
    }

    async fn connect_with(config: &EventBusConfig) -> Result<Self> {
        if !config.topic_prefix.is_empty()
            && Topic::new(&format!("{}x", config.topic_prefix)).is_err()
        {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "read configuration",
                "a topic prefix takes characters of A-Z a-z 0-9 . _ - only",
            )
            .with("topic_prefix", format_args!("{:?}", config.topic_prefix)));
        }
        let mut builder = builder(&config.url)
            .await?
            .topic_prefix(&config.topic_prefix);
        if let Some(source) = &config.source {
            builder = builder.source(source);
        }
        if let Some(store) = &config.store {
            let with_store = with_store(builder, store).await;
            builder = with_store.map_err(|error| error.with("setting", "store"))?;
        }
        Ok(builder.build())
    }
}

/// Connects to the broker that `url` names.
///
/// # Errors
///
/// As [`Connect::connect`].
///
/// # Examples
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let bus = eventbus::connect("memory:").await?;
/// assert_eq!(bus.capabilities().system, "memory");
///
/// let error = eventbus::connect("carrier-pigeon://loft").await.unwrap_err();
/// assert!(error.to_string().contains("known schemes"));
/// # Ok::<(), eventbus::Error>(())
/// # }).unwrap();
/// ```
pub async fn connect(url: &str) -> Result<EventBus> {
    Ok(builder(url).await?.build())
}

async fn builder(url: &str) -> Result<EventBusBuilder> {
    let scheme = url.split_once(':').map_or(url, |(scheme, _)| scheme);
    match scheme {
        #[cfg(feature = "memory")]
        "memory" => {
            let broker = eventbus_core::MemoryBroker::from_url(url)?;
            let (key_state, schedule) = (broker.key_state(), broker.schedule());
            let mut builder = EventBus::builder(broker);
            if let Some(store) = key_state {
                builder = builder.key_state(Arc::new(store));
            }
            if let Some(store) = schedule {
                builder = builder.schedule(Arc::new(store));
            }
            Ok(builder)
        }
        #[cfg(feature = "sqlite")]
        "sqlite" => {
            let broker = eventbus_sql::SqliteBroker::from_url(url).await?;
            let (key_state, schedule) = (broker.key_state(), broker.schedule());
            Ok(with_both(EventBus::builder(broker), key_state, schedule))
        }
        #[cfg(feature = "postgres")]
        "postgres" | "postgresql" => {
            let broker = eventbus_sql::PostgresBroker::from_url(url).await?;
            let (key_state, schedule) = (broker.key_state(), broker.schedule());
            Ok(with_both(EventBus::builder(broker), key_state, schedule))
        }
        #[cfg(feature = "kafka")]
        "kafka" => Ok(EventBus::builder(
            eventbus_kafka::KafkaBroker::from_url(url).await?,
        )),
        #[cfg(feature = "rabbitmq")]
        "amqp" | "amqps" => Ok(EventBus::builder(
            eventbus_rabbitmq::RabbitMqBroker::from_url(url).await?,
        )),
        #[cfg(feature = "redis")]
        "redis" | "rediss" => {
            let broker = eventbus_redis::RedisBroker::from_url(url).await?;
            let key_state = broker.key_state();
            Ok(EventBus::builder(broker).key_state(Arc::new(key_state)))
        }
        scheme => Err(unknown(scheme, url)),
    }
}

/// Adds the stores of the database that `url` names, in place of the broker's own where it has them.
#[cfg_attr(
    not(any(feature = "sqlite", feature = "postgres", feature = "redis")),
    expect(unused_variables, reason = "no store is built in")
)]
async fn with_store(builder: EventBusBuilder, url: &str) -> Result<EventBusBuilder> {
    let scheme = url.split_once(':').map_or(url, |(scheme, _)| scheme);
    match scheme {
        #[cfg(feature = "sqlite")]
        "sqlite" => {
            let file = eventbus_sql::SqliteBroker::from_url(url).await?;
            Ok(with_both(builder, file.key_state(), file.schedule()))
        }
        #[cfg(feature = "postgres")]
        "postgres" | "postgresql" => {
            let schema = eventbus_sql::PostgresBroker::from_url(url).await?;
            Ok(with_both(builder, schema.key_state(), schema.schedule()))
        }
        #[cfg(feature = "redis")]
        "redis" | "rediss" => {
            let key_state = eventbus_redis::RedisBroker::from_url(url).await?.key_state();
            if key_state.durability() == Durability::Process {
                // What is held counts as settled on the broker.
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "connect",
                    "the server has no append-only file, so what is held would end with it: set `appendonly yes`",
                )
                .with("url", redacted_url(url)));
            }
            Ok(builder.key_state(Arc::new(key_state)))
        }
        // Also `memory:`: what is held counts as settled on the broker, and would end with the process.
        scheme => Err(match STORES.contains(&scheme) {
            true => unknown(scheme, url),
            false => Error::new(
                ErrorKind::InvalidInput,
                "connect",
                "held keys and events for later are kept in a database, `sqlite://FILE` or `postgres://HOST/DATABASE`; held keys alone also on `redis://HOST`",
            )
            .with("url", format_args!("{:?}", redacted_url(url))),
        }),
    }
}

#[cfg(any(feature = "sqlite", feature = "postgres"))]
fn with_both(
    builder: EventBusBuilder,
    key_state: impl KeyStateStore,
    schedule: impl ScheduleStore,
) -> EventBusBuilder {
    let builder = builder.key_state(Arc::new(key_state));
    builder.schedule(Arc::new(schedule))
}

fn unknown(scheme: &str, url: &str) -> Error {
    let feature = SCHEMES.iter().find(|(known, _)| *known == scheme);
    if let Some((_, feature)) = feature {
        return Error::new(
            ErrorKind::Unsupported,
            "connect",
            format!("this build leaves {scheme} out: add `features = [\"{feature}\"]` to the dependency on eventbus"),
        )
        .with("url", redacted_url(url));
    }
    let known: Vec<_> = SCHEMES
        .iter()
        .map(|(scheme, _)| format!("{scheme}:"))
        .collect();
    Error::new(
        ErrorKind::InvalidInput,
        "connect",
        format!(
            "the url begins with no known scheme: known schemes are {}",
            known.join(", ")
        ),
    )
    .with("url", format_args!("{:?}", redacted_url(url)))
}
