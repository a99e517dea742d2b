//! The store of duplicate windows: a key for each event, which Redis forgets by its own clock.

use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    ClaimEvents, DuplicateStore, Durability, Error, ErrorKind, EventClaim, EventId, Group,
    MemberId, Result,
};
use redis::Cmd;

use crate::config::RedisConfig;
use crate::server::Server;

const CLAIM: &str = "claim events";
const MARK: &str = "mark events handled";
const RELEASE: &str = "release events";

/// Longest time that Redis is told: as good as never.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// Answers 0 for what is the member's now, -1 for what was handled, and in how many milliseconds the
/// claim of somebody else ends.
const CLAIM_ALL: &str = "
    local answers = {}
    for i, key in ipairs(KEYS) do
        local known = redis.call('GET', key)
        if known == 'handled' then
            answers[i] = -1
        elseif known and known ~= ARGV[1] then
            answers[i] = math.max(redis.call('PTTL', key), 1)
        else
            redis.call('SET', key, ARGV[1], 'PX', ARGV[2])
            answers[i] = 0
        end
    end
    return answers";

/// A server whose memory is full lets it run all the same: an effect has happened.
const MARK_ALL: &str = "#!lua flags=allow-oom
    for _, key in ipairs(KEYS) do
        if ARGV[1] == '0' then
            redis.call('DEL', key)
        else
            redis.call('SET', key, 'handled', 'PX', ARGV[1])
        end
    end
    return 1";

const RELEASE_ALL: &str = "#!lua flags=allow-oom
    for _, key in ipairs(KEYS) do
        if redis.call('GET', key) == ARGV[1] then redis.call('DEL', key) end
    end
    return 1";

/// Remembers on a Redis server which events were handled, for all processes of a group: a key
/// `eventbus:handled:GROUP:ID` for each event, some 150 bytes, which ends with its window or lease.
///
/// # Contract
///
/// - **Nothing is forgotten early**: a server that throws keys away when its memory is full is refused,
///   and one that is full refuses claims (`RateLimited`).
/// - **Durability** is the server's, see [`durability`](Self::durability): what it loses is handled again.
/// - Times follow the date of the server.
///
/// # Examples
///
/// ```no_run
/// use eventbus_core::DuplicateWindow;
/// use eventbus_redis::RedisDuplicates;
///
/// # async fn example() -> eventbus_core::Result<()> {
/// let window = DuplicateWindow::new(RedisDuplicates::from_url("redis://localhost").await?);
/// # drop(window);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RedisDuplicates {
    server: Server,
}

impl RedisDuplicates {
    /// Connects, and looks whether the server keeps what it is told.
    ///
    /// # Errors
    ///
    /// As [`RedisBroker::connect`](crate::RedisBroker::connect); `Unsupported` also when the server
    /// throws away what is to end by itself, which all of this is.
    pub async fn connect(config: RedisConfig) -> Result<Self> {
        let server = Server::connect(&config).await?;
        if server.evicts {
            let message = "the server throws away what is to end by itself when its memory is full, and with it what was handled: set `maxmemory-policy noeviction`";
            let error = Error::new(ErrorKind::Unsupported, "connect", message);
            return Err(config.named(error));
        }
        Ok(Self { server })
    }

    /// Connects to the server that `url` names, see [`RedisConfig::from_url`].
    ///
    /// # Errors
    ///
    /// Those of reading the url and of [`connect`](Self::connect).
    pub async fn from_url(url: &str) -> Result<Self> {
        Self::connect(RedisConfig::from_url(url)?).await
    }

    /// What survives when a call has resolved.
    pub fn durability(&self) -> Durability {
        self.server.durability
    }
}

fn script(script: &str, group: &Group, ids: &[EventId]) -> Cmd {
    let mut ask = redis::cmd("EVAL");
    ask.arg(script).arg(ids.len());
    for id in ids {
        ask.arg(format!("eventbus:handled:{group}:{id}"));
    }
    ask
}

/// Whole milliseconds, rounded up.
fn millis(time: Duration) -> u64 {
    let time = time.min(FOREVER).as_micros().div_ceil(1000);
    u64::try_from(time).unwrap_or(u64::MAX)
}

#[async_trait]
impl DuplicateStore for RedisDuplicates {
    async fn claim(&self, request: &ClaimEvents) -> Result<Vec<EventClaim>> {
        if request.ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut ask = script(CLAIM_ALL, &request.group, &request.ids);
        ask.arg(request.member.to_string());
        ask.arg(millis(request.lease).max(1));
        let answers: Vec<i64> = self.server.keep(CLAIM, ask).await?;
        let claim = |answer: i64| match u64::try_from(answer) {
            Ok(0) => EventClaim::Granted,
            Ok(free_in) => EventClaim::Busy {
                free_in: Duration::from_millis(free_in),
            },
            Err(_) => EventClaim::Handled,
        };
        Ok(answers.into_iter().map(claim).collect())
    }

    async fn mark_handled(&self, group: &Group, ids: &[EventId], window: Duration) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let mut ask = script(MARK_ALL, group, ids);
        ask.arg(millis(window));
        self.server.keep(MARK, ask).await
    }

    async fn release(&self, group: &Group, member: MemberId, ids: &[EventId]) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let mut ask = script(RELEASE_ALL, group, ids);
        ask.arg(member.to_string());
        self.server.keep(RELEASE, ask).await
    }
}
