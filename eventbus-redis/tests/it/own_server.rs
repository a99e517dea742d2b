//! A server of one test's own, to be filled, stopped or copied; it ends with the test.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use eventbus_redis::{RedisBroker, RedisConfig};
use tempfile::TempDir;

pub(crate) struct OwnServer {
    directory: TempDir,
    port: u16,
    child: Child,
}

impl OwnServer {
    /// A server with an append-only file and these settings besides, as on a command line.
    pub(crate) async fn start(settings: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("there is room");
        // Free at the moment; whoever else takes it makes the start fail.
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a port");
        let port = free.local_addr().expect("it has one").port();
        drop(free);
        let child = run(&directory, port, settings);
        let server = Self {
            directory,
            port,
            child,
        };
        server.answers(&["PING"], "PONG").await;
        server
    }

    /// Starts it again on its data, and does not wait for more than that it listens.
    pub(crate) async fn start_again(&mut self, settings: &[&str]) {
        self.kill();
        self.child = run(&self.directory, self.port, settings);
        self.answers(&["INFO"], "redis_version").await;
    }

    /// What it has on its disk now.
    pub(crate) fn copy(&self) -> TempDir {
        let copy = tempfile::tempdir().expect("there is room");
        let copied = Command::new("cp")
            .arg("-a")
            .arg(self.directory.path().join("."))
            .arg(copy.path())
            .status();
        assert!(copied.expect("cp is installed").success());
        copy
    }

    /// Goes on with what another server had on its disk, as after a failover to a replica that had not got
    /// all.
    pub(crate) async fn go_on_with(&mut self, data: TempDir) {
        self.kill();
        self.directory = data;
        self.start_again(&[]).await;
        self.answers(&["PING"], "PONG").await;
    }

    /// Has it stand still, as a machine that swaps or a long fork does, and go on.
    pub(crate) fn signal(&self, signal: &str) {
        let sent = Command::new("kill")
            .args([&format!("-{signal}"), &self.child.id().to_string()])
            .status();
        assert!(sent.expect("kill is installed").success());
    }

    pub(crate) async fn native(&self) -> redis::aio::MultiplexedConnection {
        let url = format!("redis://127.0.0.1:{}", self.port);
        let client = redis::Client::open(url).expect("a good url");
        let connection = client.get_multiplexed_async_connection().await;
        connection.expect("it answers")
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn config(&self) -> RedisConfig {
        RedisConfig::new("127.0.0.1").with_port(self.port)
    }

    pub(crate) async fn connect(&self) -> RedisBroker {
        let connected = RedisBroker::connect(self.config()).await;
        connected.expect("it answers")
    }

    /// Asks until the answer has this in it.
    pub(crate) async fn answers(&self, command: &[&str], wanted: &str) {
        let url = format!("redis://127.0.0.1:{}", self.port);
        let client = redis::Client::open(url).expect("a good url");
        let mut ask = redis::Cmd::new();
        for word in command {
            ask.arg(word);
        }
        let asking = async {
            loop {
                if let Ok(mut connection) = client.get_multiplexed_async_connection().await {
                    let answer: redis::RedisResult<String> = ask.query_async(&mut connection).await;
                    if answer.is_ok_and(|answer| answer.contains(wanted)) {
                        return;
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let answered = tokio::time::timeout(Duration::from_secs(30), asking).await;
        answered.unwrap_or_else(|_| panic!("{command:?} is never answered with {wanted}"));
    }
}

fn run(directory: &TempDir, port: u16, settings: &[&str]) -> Child {
    let mut command = Command::new("redis-server");
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1"]);
    command.arg("--dir").arg(directory.path());
    command.args(["--appendonly", "yes"]).args(settings);
    command.stdout(Stdio::null());
    command.spawn().expect("redis-server is installed")
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
