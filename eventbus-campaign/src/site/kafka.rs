//! The topics and groups of a round on Kafka: removed behind it.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use eventbus::KafkaConfig;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::FromClientConfig as _;

/// How long the broker may take to answer.
const ANSWER: Duration = Duration::from_secs(30);

/// Removes all topics and groups with a prefix. The SDK removes none, so this is a client of its own.
pub(super) async fn remove(url: &str, prefix: &str) -> anyhow::Result<()> {
    let config = KafkaConfig::from_url(url)?;
    ensure!(
        config.credentials.is_none(),
        "topics are left behind: a broker that asks for a password is not cleaned up"
    );
    let mut client = ClientConfig::new();
    client.set("bootstrap.servers", &config.servers);
    let client = AdminClient::<DefaultClientContext>::from_config(&client)?;
    let asked = tokio::task::spawn_blocking(move || {
        let metadata = client.inner().fetch_metadata(None, ANSWER)?;
        let groups = client.inner().fetch_group_list(None, ANSWER)?;
        let topics = metadata
            .topics()
            .iter()
            .map(|topic| topic.name().to_owned());
        let groups = groups.groups().iter().map(|group| group.name().to_owned());
        let (topics, groups): (Vec<_>, Vec<_>) = (topics.collect(), groups.collect());
        Ok::<_, rdkafka::error::KafkaError>((client, topics, groups))
    });
    let (client, topics, groups) = asked.await.context("a client panicked")??;
    let options = AdminOptions::new().request_timeout(Some(ANSWER));
    let groups = ours(&groups, prefix);
    let topics = ours(&topics, prefix);
    // A member that was killed may still be thought to be there: its group goes by itself, some day.
    if !groups.is_empty() {
        client.delete_groups(&groups, &options).await?;
    }
    if !topics.is_empty() {
        client.delete_topics(&topics, &options).await?;
    }
    Ok(())
}

fn ours<'n>(names: &'n [String], prefix: &str) -> Vec<&'n str> {
    let names = names.iter().map(String::as_str);
    names.filter(|name| name.starts_with(prefix)).collect()
}
