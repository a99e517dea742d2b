//! The keys of a round on Redis: removed behind it.

use anyhow::Context as _;
use redis::aio::MultiplexedConnection;

/// How many keys a look names, about.
const LOOK: usize = 1000;

/// Removes all streams, positions and groups with a prefix.
pub(super) async fn remove(url: &str, prefix: &str) -> anyhow::Result<()> {
    let url = url.split('?').next().unwrap_or(url);
    let client = redis::Client::open(url).context("a URL of Redis")?;
    let mut connection = client.get_multiplexed_async_connection().await?;
    let pattern = format!("*{prefix}*");
    let mut cursor: u64 = 0;
    loop {
        let mut look = redis::cmd("SCAN");
        look.arg(cursor).arg("MATCH").arg(&pattern);
        look.arg("COUNT").arg(LOOK);
        let (next, keys): (u64, Vec<String>) = look.query_async(&mut connection).await?;
        if !keys.is_empty() {
            let mut unlink = redis::cmd("UNLINK");
            unlink.arg(keys).exec_async(&mut connection).await?;
        }
        cursor = next;
        if cursor == 0 {
            break;
        }
    }
    for hash in ["eventbus:topics", "eventbus:groups"] {
        forget(&mut connection, hash, prefix).await?;
    }
    Ok(())
}

/// Removes the fields of a hash, or the members of a sorted set, that begin with a prefix.
async fn forget(
    connection: &mut MultiplexedConnection,
    key: &str,
    prefix: &str,
) -> anyhow::Result<()> {
    let mut ask = redis::cmd("TYPE");
    let kind: String = ask.arg(key).query_async(connection).await?;
    let (list, remove) = match kind.as_str() {
        "hash" => ("HKEYS", "HDEL"),
        "zset" => ("ZRANGE", "ZREM"),
        _ => return Ok(()),
    };
    let mut names = redis::cmd(list);
    names.arg(key);
    if list == "ZRANGE" {
        names.arg(0).arg(-1);
    }
    let names: Vec<String> = names.query_async(connection).await?;
    let ours: Vec<String> = names
        .into_iter()
        .filter(|name| name.starts_with(prefix))
        .collect();
    if !ours.is_empty() {
        let mut forget = redis::cmd(remove);
        forget.arg(key).arg(ours).exec_async(connection).await?;
    }
    Ok(())
}
