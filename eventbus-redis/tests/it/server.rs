//! The server that `dev/brokers up redis` started. Tests name topics and groups of their own.

use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use eventbus_core::Result;
use eventbus_redis::{RedisBroker, RedisConfig};
use tokio::sync::{OwnedRwLockReadGuard, RwLock};

const URL: &str = "EVENTBUS_TEST_REDIS";

/// Held by every test that uses the server, and alone by one that restarts it.
static IN_USE: LazyLock<Arc<RwLock<()>>> = LazyLock::new(Arc::default);

pub(crate) struct Server(Mutex<Option<OwnedRwLockReadGuard<()>>>);

impl Server {
    pub(crate) async fn new() -> Self {
        let in_use = Arc::clone(&IN_USE).read_owned().await;
        Self(Mutex::new(Some(in_use)))
    }

    pub(crate) fn url() -> String {
        std::env::var(URL).unwrap_or_else(|_| {
            panic!(
                "{URL} is not set: run ./dev/test only brokers, or export $(dev/brokers up redis)"
            )
        })
    }

    pub(crate) fn config() -> RedisConfig {
        let config = RedisConfig::from_url(&Self::url()).expect("a good url");
        config.with_lease(Duration::from_secs(3))
    }

    /// Stops the server as a crash would and starts it again, when no other test uses it.
    pub(crate) async fn restart(&self) {
        let mine = self.0.lock().expect("not poisoned").take();
        drop(mine);
        let alone = Arc::clone(&IN_USE).write_owned().await;
        restart().await;
        *self.0.lock().expect("not poisoned") = Some(alone.downgrade());
    }

    pub(crate) async fn connect(&self) -> Result<RedisBroker> {
        RedisBroker::connect(Self::config()).await
    }
}

async fn restart() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../dev/brokers");
    let restarted = tokio::task::spawn_blocking(move || {
        Command::new(script).args(["restart", "redis"]).output()
    });
    let restarted = restarted
        .await
        .expect("it ends")
        .expect("the script is there");
    assert!(
        restarted.status.success(),
        "{}",
        String::from_utf8_lossy(&restarted.stderr)
    );
}
