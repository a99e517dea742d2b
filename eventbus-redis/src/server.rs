//! The connections to the server, and what it says of itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use eventbus_core::{Durability, Error, ErrorKind, Result, Timestamp};
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::io::tcp::TcpSettings;
use redis::{
    Client, Cmd, ConnectionAddr, FromRedisValue, IntoConnectionInfo, Pipeline, RedisConnectionInfo,
    RedisError, RedisResult,
};

use crate::config::RedisConfig;
use crate::error::into_error;
use crate::tls;

const CONNECT: &str = "connect";
/// The oldest version whose streams say how many entries they ever had.
const VERSION_MIN: (u32, u32) = (7, 0);
/// How long it is tried to connect before it is tried anew.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// How long a command about leases is waited for where they are short.
const CONTROL_MIN: Duration = Duration::from_secs(1);
/// How long a connection waits on the server for messages before it asks anew what to wait for.
pub(crate) const WAIT: Duration = Duration::from_millis(250);

/// The connections of one client: what waits on one does not wait for another.
#[derive(Clone)]
pub(crate) struct Server {
    /// For what is published.
    pub(crate) writes: Line,
    /// For pages of messages, which are large.
    pub(crate) reads: Line,
    /// For leases, positions and questions, which are quick.
    pub(crate) control: Line,
    /// For what replicas are waited for behind, which holds up a connection.
    keeps: Line,
    /// For waiting on the server.
    pub(crate) waits: Line,
    /// What an acknowledgement of the server means.
    pub(crate) durability: Durability,
    /// Whether it throws away what is to end by itself when its memory is full.
    pub(crate) evicts: bool,
    replicas: u32,
    /// For how many milliseconds replicas are waited for.
    wait: u64,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("durability", &self.durability)
            .finish_non_exhaustive()
    }
}

/// One connection, made anew when it is lost: by the next command, which fails if it cannot.
#[derive(Clone)]
pub(crate) struct Line {
    manager: Arc<Mutex<ConnectionManager>>,
    client: Client,
    config: ConnectionManagerConfig,
    /// Whether what was sent and not answered stands before what is sent next.
    in_order: bool,
}

impl Line {
    fn new(client: &Client, config: ConnectionManagerConfig) -> RedisResult<Self> {
        let manager = ConnectionManager::new_lazy_with_config(client.clone(), config.clone())?;
        Ok(Self {
            manager: Arc::new(Mutex::new(manager)),
            client: client.clone(),
            config,
            in_order: false,
        })
    }

    fn in_order(self) -> Self {
        Self {
            in_order: true,
            ..self
        }
    }

    fn manager(&self) -> MutexGuard<'_, ConnectionManager> {
        self.manager.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one command.
    pub(crate) async fn ask<T: FromRedisValue>(
        &self,
        operation: &'static str,
        cmd: &Cmd,
    ) -> Result<T> {
        let mut manager = self.manager().clone();
        let answer = self.after(cmd.query_async(&mut manager).await);
        answer.map_err(|error| into_error(operation, error))
    }

    /// Sends several commands at once.
    pub(crate) async fn send<T: FromRedisValue>(&self, pipeline: &Pipeline) -> RedisResult<T> {
        let mut manager = self.manager().clone();
        self.after(pipeline.query_async(&mut manager).await)
    }

    /// The client goes on giving the answer of a login that was refused, also when it no longer would be,
    /// and on asking through a connection that nothing comes back from. The latter is right where a server
    /// that stood still may yet do what it was told: through another connection, later messages would
    /// come first.
    fn after<T>(&self, answer: RedisResult<T>) -> RedisResult<T> {
        let is_of_no_use = |error: &RedisError| {
            error.kind() == redis::ErrorKind::AuthenticationFailed
                || (error.is_timeout() && !self.in_order)
        };
        if answer.as_ref().is_err_and(is_of_no_use) {
            let (client, config) = (self.client.clone(), self.config.clone());
            if let Ok(anew) = ConnectionManager::new_lazy_with_config(client, config) {
                *self.manager() = anew;
            }
        }
        answer
    }
}

impl Server {
    /// Connects, and looks whether the server keeps what it takes.
    pub(crate) async fn connect(config: &RedisConfig) -> Result<Self> {
        let connecting = Self::try_connect(config);
        let connected = match tokio::time::timeout(config.timeout, connecting).await {
            Ok(connected) => connected,
            Err(_) => Err(Error::new(
                ErrorKind::Unavailable,
                CONNECT,
                "the server did not answer in time: look at its host and port, or raise `timeout`",
            )),
        };
        connected.map_err(|error| config.named(error))
    }

    async fn try_connect(config: &RedisConfig) -> Result<Self> {
        let native = |error| into_error(CONNECT, error);
        let client = client(config)?;
        // Tried once by itself: a line would go on trying.
        let probe = client.get_multiplexed_async_connection().await;
        let mut probe = probe.map_err(native)?;
        let info: String = redis::cmd("INFO")
            .query_async(&mut probe)
            .await
            .map_err(native)?;
        check(&info)?;
        let mut ask = redis::cmd("CONFIG");
        ask.arg("GET").arg("*appendfsync*");
        // A user may not be let to ask; then the weaker is believed.
        let fsync: HashMap<String, String> = ask.query_async(&mut probe).await.unwrap_or_default();
        let line = |limit: Duration| {
            let lines = ConnectionManagerConfig::new()
                .set_connection_timeout(Some(config.timeout.min(CONNECT_MAX)))
                .set_response_timeout(Some(limit))
                .set_number_of_retries(0);
            Line::new(&client, lines).map_err(native)
        };
        Ok(Self {
            writes: line(config.timeout)?.in_order(),
            reads: line(config.timeout)?,
            // A renewal that is not answered has to be tried again before the lease is over.
            control: line(config.timeout.min((config.lease / 2).max(CONTROL_MIN)))?,
            keeps: line(config.timeout)?,
            waits: line(config.timeout + WAIT)?,
            evicts: is_bounded(&info) && policy(&info).starts_with("volatile"),
            replicas: config.replicas,
            wait: config.timeout.as_millis() as u64 / 2,
            durability: durability(&info, &fsync),
        })
    }

    /// Runs one command that writes, and waits for the replicas that are asked for.
    pub(crate) async fn keep<T: FromRedisValue>(
        &self,
        operation: &'static str,
        cmd: Cmd,
    ) -> Result<T> {
        if self.replicas == 0 {
            return self.control.ask(operation, &cmd).await;
        }
        let mut pipeline = Pipeline::with_capacity(2);
        pipeline.add_command(cmd);
        pipeline.cmd("WAIT").arg(self.replicas).arg(self.wait);
        let answer = self.keeps.send(&pipeline).await;
        let (answer, replicas): (T, u32) = answer.map_err(|error| into_error(operation, error))?;
        if replicas < self.replicas {
            let message =
                "fewer replicas than `replicas` asks for have it: look at them, or lower it";
            let error = Error::new(ErrorKind::Unavailable, operation, message);
            return Err(error.with("replicas", replicas));
        }
        Ok(answer)
    }

    /// The server's date, which is what its entries' ids are made of.
    pub(crate) async fn now(&self, operation: &'static str) -> Result<Timestamp> {
        let (seconds, micros): (i64, i64) =
            self.control.ask(operation, &redis::cmd("TIME")).await?;
        Ok(Timestamp::from_micros(seconds * 1_000_000 + micros))
    }
}

fn client(config: &RedisConfig) -> Result<Client> {
    let address = match config.tls {
        true => ConnectionAddr::TcpTls {
            host: config.host.clone(),
            port: config.port,
            insecure: false,
            tls_params: None,
        },
        false => ConnectionAddr::Tcp(config.host.clone(), config.port),
    };
    let mut redis = RedisConnectionInfo::default()
        .set_db(config.database)
        .set_lib_name("eventbus", env!("CARGO_PKG_VERSION"));
    if let Some(user) = &config.user {
        redis = redis.set_username(user);
    }
    if let Some(password) = &config.password {
        redis = redis.set_password(password);
    }
    let tcp = bounded(TcpSettings::default().set_nodelay(true), config.timeout);
    let address = address.into_connection_info();
    let address = address.map_err(|error| into_error(CONNECT, error))?;
    let address = address.set_redis_settings(redis).set_tcp_settings(tcp);
    match config.tls {
        true => tls::client(config, address),
        false => Client::open(address).map_err(|error| into_error(CONNECT, error)),
    }
}

/// A server whose machine is gone closes no connection: what is not acknowledged in time does.
#[cfg(target_os = "linux")]
fn bounded(tcp: TcpSettings, timeout: Duration) -> TcpSettings {
    tcp.set_user_timeout(timeout)
}

/// Elsewhere the system's own patience counts.
#[cfg(not(target_os = "linux"))]
fn bounded(tcp: TcpSettings, _: Duration) -> TcpSettings {
    tcp
}

/// A value of what `INFO` answers.
fn value<'i>(info: &'i str, name: &str) -> Option<&'i str> {
    let mut lines = info.lines();
    lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
}

fn check(info: &str) -> Result<()> {
    let refuse = |message: &str| Error::new(ErrorKind::Unsupported, CONNECT, message);
    let version = value(info, "redis_version").unwrap_or_default();
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    let version_found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version_found < VERSION_MIN {
        let message =
            "the server is too old: streams that tell a gap need Redis 7.0 or later, or Valkey";
        return Err(refuse(message).with("version", version));
    }
    if value(info, "cluster_enabled") == Some("1") {
        return Err(refuse(
            "the server is part of a cluster, which this broker does not use: name one that is not",
        ));
    }
    let policy = policy(info);
    if is_bounded(info) && policy.starts_with("allkeys") {
        let message = "the server throws keys away when its memory is full, and messages with them: set `maxmemory-policy noeviction`";
        return Err(refuse(message).with("maxmemory-policy", policy));
    }
    Ok(())
}

fn policy(info: &str) -> &str {
    value(info, "maxmemory_policy").unwrap_or_default()
}

fn is_bounded(info: &str) -> bool {
    value(info, "maxmemory").is_some_and(|bytes| bytes != "0")
}

/// What an acknowledgement means, by `INFO` and the settings of the append-only file.
fn durability(info: &str, fsync: &HashMap<String, String>) -> Durability {
    let is = |name, value| fsync.get(name).is_some_and(|set| set == value);
    let always = is("appendfsync", "always") && is("no-appendfsync-on-rewrite", "no");
    match value(info, "aof_enabled") {
        Some("1") if always => Durability::Disk,
        Some("1") => Durability::PageCache,
        _ => Durability::Process,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_loses_messages_is_refused() {
        let good = "redis_version:7.0.15\r\ncluster_enabled:0\r\nmaxmemory:0\r\nmaxmemory_policy:allkeys-lru\r\naof_enabled:1\r\n";
        check(good).expect("nothing is thrown away without a bound");
        for (from, to, advice) in [
            ("7.0.15", "6.2.14", "7.0 or later"),
            ("cluster_enabled:0", "cluster_enabled:1", "cluster"),
            ("maxmemory:0", "maxmemory:1000", "noeviction"),
        ] {
            let error = check(&good.replace(from, to)).expect_err(to);
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(advice), "{error}");
        }
    }

    #[test]
    fn an_acknowledgement_means_what_the_file_is_set_to() {
        let set = |fsync: &str, on_rewrite: &str| {
            HashMap::from([
                ("appendfsync".to_owned(), fsync.to_owned()),
                (
                    "no-appendfsync-on-rewrite".to_owned(),
                    on_rewrite.to_owned(),
                ),
            ])
        };
        let (on, off) = ("aof_enabled:1\r\n", "aof_enabled:0\r\n");
        assert_eq!(durability(on, &set("always", "no")), Durability::Disk);
        // It waits for no disk while the file is written anew.
        assert_eq!(durability(on, &set("always", "yes")), Durability::PageCache);
        assert_eq!(
            durability(on, &set("everysec", "no")),
            Durability::PageCache
        );
        assert_eq!(durability(on, &HashMap::new()), Durability::PageCache);
        assert_eq!(durability(off, &set("always", "no")), Durability::Process);
    }
}
