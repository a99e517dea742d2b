//! `eventbus lag`: how far groups are behind.

use std::collections::BTreeMap;

use clap::Args;
use eventbus::prelude::Topic;
use eventbus::{EventBus, GroupPosition};
use serde::Serialize;

use crate::Outcome;
use crate::output::Output;

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus lag                                    every group on every topic
  eventbus lag order-events --group payments
  eventbus lag order-events --partitions          where exactly it hangs
  eventbus --json lag | jq 'map(.lag) | add'

The lag counts messages that are published and not settled, those in flight among them.")]
pub(crate) struct LagArgs {
    /// The topics; without any, all there are
    #[arg(value_parser = super::topic)]
    topics: Vec<Topic>,
    /// Only this group; may be said several times
    #[arg(long)]
    group: Vec<String>,
    /// Each partition in a row of its own
    #[arg(long)]
    partitions: bool,
}

/// How far a group is behind on a topic, for scripts.
#[derive(Serialize)]
struct Behind {
    group: String,
    topic: String,
    lag: u64,
    partitions: Vec<PartitionBehind>,
}

#[derive(Serialize)]
struct PartitionBehind {
    partition: u32,
    /// As text: it may be larger than what JSON readers take for a number.
    position: String,
    lag: u64,
}

pub(crate) async fn run(
    args: LagArgs,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<Outcome> {
    let mut positions = bus.lags(&args.topics).await?;
    positions.retain(|place| {
        let group = place.group.as_str();
        args.group.is_empty() || args.group.iter().any(|wanted| wanted == group)
    });
    let behind = by_topic(positions);
    if out.is_json() {
        out.json(&behind)?;
        return Ok(Outcome::Done);
    }
    let none = "no group reads these topics";
    if args.partitions {
        let rows = behind.iter().flat_map(|behind| {
            behind.partitions.iter().map(|place| {
                [
                    behind.group.clone(),
                    behind.topic.clone(),
                    place.partition.to_string(),
                    place.position.clone(),
                    place.lag.to_string(),
                ]
            })
        });
        out.table(
            ["group", "topic", "partition", "position", "lag"],
            rows,
            none,
        )?;
    } else {
        let rows = behind.iter().map(|behind| {
            let furthest = behind.partitions.iter().max_by_key(|place| place.lag);
            let furthest = furthest.filter(|place| place.lag > 0);
            [
                behind.group.clone(),
                behind.topic.clone(),
                behind.lag.to_string(),
                furthest.map_or(String::new(), |place| {
                    format!("{} on partition {}", place.lag, place.partition)
                }),
            ]
        });
        out.table(["group", "topic", "lag", "most"], rows, none)?;
    }
    Ok(Outcome::Done)
}

fn by_topic(positions: Vec<GroupPosition>) -> Vec<Behind> {
    let mut behind: BTreeMap<_, Behind> = BTreeMap::new();
    for place in positions {
        let entry = behind
            .entry((place.group.clone(), place.topic.clone()))
            .or_insert_with(|| Behind {
                group: place.group.to_string(),
                topic: place.topic.to_string(),
                lag: 0,
                partitions: Vec::new(),
            });
        entry.lag += place.lag;
        entry.partitions.push(PartitionBehind {
            partition: place.partition,
            position: place.position.to_string(),
            lag: place.lag,
        });
    }
    behind.into_values().collect()
}
