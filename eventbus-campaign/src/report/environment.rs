//! The versions of everything that a report speaks of.

use std::fmt;
use std::process::Command;

use sqlx::{Connection as _, PgConnection};

use crate::product::Product;
use crate::site::Ground;

/// On what a run ran.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// Each with its version, in the order in which they are shown.
    versions: Vec<(&'static str, String)>,
}

impl Environment {
    /// Looks around. What does not answer is left out.
    pub async fn look(bases: &[&Ground]) -> Self {
        let mut versions = Vec::new();
        let mut add = |name, version: Option<String>| {
            versions.extend(version.map(|version| (name, version)));
        };
        add("rustc", said("rustc", &["--version"]));
        add("kernel", said("uname", &["-srm"]));
        add("processors", processors());
        add("SQLite", sqlite().await);
        for base in bases {
            match base {
                Ground::Postgres(url) => add("PostgreSQL", postgres(url).await),
                Ground::Own(product) => add(product.name(), started(*product)),
                Ground::Sqlite | Ground::Broker(..) => {}
            }
        }
        Self { versions }
    }

    /// What is tried, as git names it.
    #[must_use]
    pub fn commit() -> String {
        commit().unwrap_or_else(|| "unknown".to_owned())
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n## Versions\n\n| what | version |\n| --- | --- |")?;
        for (name, version) in &self.versions {
            writeln!(f, "| {name} | {version} |")?;
        }
        Ok(())
    }
}

fn said(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

fn commit() -> Option<String> {
    let commit = said("git", &["rev-parse", "--short=12", "HEAD"])?;
    let changed = said("git", &["status", "--porcelain", "--untracked-files=no"])?;
    Some(match changed.is_empty() {
        true => commit,
        false => format!("{commit}, and changes"),
    })
}

fn processors() -> Option<String> {
    let count = std::thread::available_parallelism().ok()?;
    Some(count.to_string())
}

async fn sqlite() -> Option<String> {
    let mut connection = sqlx::SqliteConnection::connect("sqlite::memory:")
        .await
        .ok()?;
    let version = sqlx::query_scalar("SELECT sqlite_version()");
    version.fetch_one(&mut connection).await.ok()
}

async fn postgres(url: &str) -> Option<String> {
    let mut connection = PgConnection::connect(url).await.ok()?;
    let version = sqlx::query_scalar("SHOW server_version");
    version.fetch_one(&mut connection).await.ok()
}

/// The version that `dev/brokers` starts.
fn started(product: Product) -> Option<String> {
    match product {
        Product::Kafka => {
            let pom = include_str!("../../../dev/kafka/pom.xml");
            let version = pom.split("<kafka.version>").nth(1)?;
            version.split('<').next().map(str::to_owned)
        }
        // Redis server v=7.0.15 sha=…
        Product::Redis => {
            let text = said("redis-server", &["--version"])?;
            let mut words = text.split_whitespace();
            words.find_map(|word| Some(word.strip_prefix("v=")?.to_owned()))
        }
        Product::RabbitMq => said("rabbitmqctl", &["version"]),
    }
}
