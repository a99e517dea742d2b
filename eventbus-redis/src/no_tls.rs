//! A build without TLS.

use eventbus_core::{Error, ErrorKind, Result};
use redis::{Client, ConnectionInfo};

use crate::config::RedisConfig;

/// Says that there is none.
pub(crate) fn client(_: &RedisConfig, _: ConnectionInfo) -> Result<Client> {
    Err(Error::new(
        ErrorKind::Unsupported,
        "connect",
        "this build cannot encrypt: add the feature `redis-tls` to the dependency on eventbus, or, where nobody listens on the way, write `redis://` for `rediss://`",
    ))
}
