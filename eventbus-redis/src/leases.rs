//! The leases of groups in Redis, on its clock.
//!
//! | key | holds |
//! | --- | --- |
//! | `eventbus:group:GROUP:members` | by member: until when, its process, the topics it reads |
//! | `eventbus:group:GROUP:leases` | by `TOPIC PARTITION`: the epoch, and who holds it or `-` |
//! | `eventbus:group:GROUP:changes` | a stream of one entry, for who waits for changes |
//! | `eventbus:groups` | by group: when one of its members was last heard of, in milliseconds |
//! | `eventbus:groups:expiry` | by group: for how many milliseconds it is remembered without a member |

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use eventbus_core::log::Wakes;
use eventbus_core::{
    Error, ErrorKind, Group, Lease, LeaseMember, LeaseReply, LeaseRequest, LeaseStore, LeaseTopic,
    MemberId, Result, Topic, TopicPartition,
};

use crate::database::Database;
use crate::server::Server;

pub(crate) const GROUPS: &str = "eventbus:groups";
pub(crate) const EXPIRIES: &str = "eventbus:groups:expiry";

const EXCHANGE: &str = "renew leases";
const LEAVE: &str = "leave group";

/// Keeps the leases of any groups on a Redis server, on its clock.
///
/// That clock follows the date of the server: who sets it forward ends leases early, and the fencing
/// epoch refuses what their former owners still write.
#[derive(Clone, Debug)]
pub struct RedisLeases {
    database: Arc<Database>,
    /// Raised when the member that uses it has left: nothing is renewed for it any more.
    ended: Arc<AtomicBool>,
}

impl RedisLeases {
    pub(crate) fn new(database: Arc<Database>, ended: Arc<AtomicBool>) -> Self {
        Self { database, ended }
    }
}

pub(crate) fn members_key(group: &Group) -> String {
    format!("eventbus:group:{group}:members")
}

pub(crate) fn leases_key(group: &Group) -> String {
    format!("eventbus:group:{group}:leases")
}

pub(crate) fn changes_key(group: &Group) -> String {
    format!("eventbus:group:{group}:changes")
}

/// What a lease is called in its group.
pub(crate) fn place_name(topic: &Topic, partition: u32) -> String {
    format!("{topic} {partition}")
}

/// A server whose memory is full lets it run all the same: without members nothing would be read.
///
/// Ends members whose time is over, and those named; and tells whether anything changed, to all who
/// wait. `members`, `leases`, `changes` and `now`, in milliseconds, are set.
const COMMON: &str = "#!lua flags=allow-oom
    local members, leases, changes, groups = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    local changed = false
    local function free(member)
        local all = redis.call('HGETALL', leases)
        for i = 1, #all, 2 do
            local epoch, holder = string.match(all[i + 1], '^(%d+) (.*)$')
            if holder == member then
                redis.call('HSET', leases, all[i], epoch .. ' -')
            end
        end
        changed = true
    end
    local function remove(member)
        if redis.call('HDEL', members, member) == 1 then free(member) end
    end
    local function tell()
        if changed then redis.call('XADD', changes, 'MAXLEN', 1, '*', 'changed', now) end
    end
";

const SERVE: &str = "
    local cursor = 1
    local function take()
        local value = ARGV[cursor]
        cursor = cursor + 1
        return value
    end
    local me, ttl, process, topics = take(), tonumber(take()), take(), take()
    local all = redis.call('HGETALL', members)
    for i = 1, #all, 2 do
        local until_time = tonumber(string.match(all[i + 1], '^(%d+)\\n'))
        if until_time <= now and all[i] ~= me then remove(all[i]) end
        if until_time <= now and all[i] == me then free(me) end
    end
    for _ = 1, tonumber(take()) do remove(take()) end
    local until_time = now + ttl
    local entry = string.format('%.0f', until_time) .. '\\n' .. process .. '\\n' .. topics
    if redis.call('HSET', members, me, entry) == 1 then changed = true end
    redis.call('ZADD', groups, now, take())
    for _ = 1, tonumber(take()) do
        local place, epoch = take(), take()
        if redis.call('HGET', leases, place) == epoch .. ' ' .. me then
            redis.call('HSET', leases, place, epoch .. ' -')
            changed = true
        end
    end
    for _ = 1, tonumber(take()) do
        local place = take()
        local lease = redis.call('HGET', leases, place) or '0 -'
        local epoch, holder = string.match(lease, '^(%d+) (.*)$')
        if holder == '-' or redis.call('HEXISTS', members, holder) == 0 then
            -- Above all that a server gave which lost this key.
            local later = math.max(epoch + 1, now)
            redis.call('HSET', leases, place, string.format('%.0f', later) .. ' ' .. me)
            changed = true
        end
    end
    tell()
    return {redis.call('HGETALL', members), redis.call('HGETALL', leases)}
";

const END: &str = "
    remove(ARGV[1])
    tell()
    return 1
";

fn script(what: &str, group: &Group) -> redis::Cmd {
    let mut script = redis::cmd("EVAL");
    script.arg([COMMON, what].concat()).arg(4);
    script.arg(members_key(group)).arg(leases_key(group));
    script.arg(changes_key(group)).arg(GROUPS);
    script
}

#[async_trait]
impl LeaseStore for RedisLeases {
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        if self.ended.load(Ordering::Acquire) {
            let message = "the member has left";
            return Err(Error::new(ErrorKind::Closed, EXCHANGE, message));
        }
        request.topics.iter().try_for_each(LeaseTopic::check)?;
        let lines = request.topics.iter().map(LeaseTopic::to_string);
        let topics = lines.collect::<Vec<_>>().join("\n");
        let mut ask = script(SERVE, &request.group);
        ask.arg(request.member.to_string());
        ask.arg(u64::try_from(request.ttl.as_millis()).unwrap_or(u64::MAX));
        ask.arg(request.process.to_string()).arg(topics);
        ask.arg(request.dead.len());
        for dead in &request.dead {
            ask.arg(dead.to_string());
        }
        ask.arg(request.group.as_str());
        ask.arg(request.released.len());
        for lease in &request.released {
            ask.arg(place_name(&lease.place.topic, lease.place.partition));
            ask.arg(lease.epoch);
        }
        ask.arg(request.wanted.len());
        for place in &request.wanted {
            ask.arg(place_name(&place.topic, place.partition));
        }
        let (members, leases) = self.database.server.control.ask(EXCHANGE, &ask).await?;
        read_group(members, leases)
    }

    async fn leave(&self, group: &Group, member: MemberId) -> Result<()> {
        leave(&self.database.server, group, member).await
    }

    async fn changed(&self, group: &Group) {
        let number = self.database.known.group(group);
        let wakes: &Wakes = &self.database.wakes;
        let _waiting = wakes.wait();
        let mut changes = wakes.group(number);
        // Without a sender nobody would say anything, and members renew all the same.
        if changes.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Ends a member.
pub(crate) async fn leave(server: &Server, group: &Group, member: MemberId) -> Result<()> {
    let mut ask = script(END, group);
    ask.arg(member.to_string());
    let _: i64 = server.control.ask(LEAVE, &ask).await?;
    Ok(())
}

/// The members of a group whose time is not over.
pub(crate) async fn members(
    server: &Server,
    operation: &'static str,
    group: &Group,
) -> Result<Vec<LeaseMember>> {
    const LIVING: &str = "
        local all = redis.call('HGETALL', members)
        for i = 1, #all, 2 do
            if tonumber(string.match(all[i + 1], '^(%d+)\\n')) <= now then remove(all[i]) end
        end
        tell()
        return {redis.call('HGETALL', members), redis.call('HGETALL', leases)}";
    let ask = script(LIVING, group);
    let (members, leases) = server.control.ask(operation, &ask).await?;
    Ok(read_group(members, leases)?.members)
}

/// Reads what the scripts answer: names and values by turns.
fn read_group(members: Vec<String>, leases: Vec<String>) -> Result<LeaseReply> {
    let mut group = Vec::new();
    for pair in members.chunks_exact(2) {
        group.push(read_member(&pair[0], &pair[1])?);
    }
    for pair in leases.chunks_exact(2) {
        let (epoch, holder) = pair[1].split_once(' ').ok_or_else(|| damaged(&pair[1]))?;
        let member = group.iter_mut().find(|it| it.id.to_string() == holder);
        let Some(member) = member else { continue };
        let (topic, partition) = pair[0].rsplit_once(' ').ok_or_else(|| damaged(&pair[0]))?;
        let partition = partition.parse().map_err(|_| damaged(&pair[0]))?;
        member.leases.push(Lease {
            place: TopicPartition::new(Topic::new(topic)?, partition),
            epoch: epoch.parse().map_err(|_| damaged(&pair[1]))?,
        });
    }
    Ok(LeaseReply::new(group))
}

fn read_member(id: &str, entry: &str) -> Result<LeaseMember> {
    let mut lines = entry.lines().skip(1);
    let process = lines.next().ok_or_else(|| damaged(entry))?;
    let topics = lines.map(str::parse).collect::<Result<_>>()?;
    Ok(LeaseMember::new(id.parse()?, process.parse()?, topics))
}

fn damaged(text: &str) -> Error {
    let message =
        "what is stored of the group cannot be read: somebody else wrote to `eventbus:group:*`";
    Error::new(ErrorKind::Codec, EXCHANGE, message).with("value", format_args!("{text:?}"))
}
