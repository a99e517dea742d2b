//! `eventbus health`: whether the broker answers and everybody keeps up.

use std::time::Duration;

use clap::Args;
use eventbus::prelude::{Error, ErrorKind};
use eventbus::{EventBus, error_chain};
use serde::Serialize;

use super::dead_letters::Desks;
use crate::Outcome;
use crate::output::{Output, counted};

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus health
  eventbus health --lag-max 1000 --dead-letters-max 0 --parked-max 0 || page somebody

Exit code 3: the broker does not answer, or something is over its limit; the reasons are printed.")]
pub(crate) struct HealthArgs {
    /// Not healthy when a group is further behind than so many messages
    #[arg(long)]
    lag_max: Option<u64>,
    /// Not healthy when more than so many dead letters are open
    #[arg(long)]
    dead_letters_max: Option<usize>,
    /// Not healthy when more than so many keys are parked; messages behind them are in no lag
    #[arg(long)]
    parked_max: Option<usize>,
    /// How long the broker may take to answer
    #[arg(long, default_value = "5s", value_parser = humantime::parse_duration)]
    within: Duration,
}

/// How the bus is, for scripts.
#[derive(Default, Serialize)]
struct Health {
    healthy: bool,
    /// Why it is not.
    reasons: Vec<String>,
    system: Option<&'static str>,
    took_ms: Option<f64>,
    /// The largest lag of a group on a topic, where there is one and the broker can tell.
    lag: Option<u64>,
    /// Open dead letters, where they were asked for.
    dead_letters: Option<usize>,
    /// Parked keys, where they were asked for.
    parked: Option<usize>,
}

pub(crate) async fn run(
    args: HealthArgs,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<Outcome> {
    let mut health = Health {
        system: Some(bus.capabilities().system),
        ..Health::default()
    };
    match tokio::time::timeout(args.within, bus.health()).await {
        Ok(Ok(took)) => health.took_ms = Some((took.as_secs_f64() * 100_000.0).round() / 100.0),
        Ok(Err(error)) => health.reasons.push(error_chain(&error)),
        Err(_) => health.reasons.push(format!(
            "the broker did not answer within {:?}",
            args.within
        )),
    }
    if health.reasons.is_empty() {
        look_at_lag(&args, bus, &mut health).await?;
        look_at_dead_letters(&args, bus, &mut health).await?;
        look_at_parked_keys(&args, bus, &mut health).await?;
    }
    show(health, out)
}

/// Says that the broker can't be reached.
pub(crate) fn away(error: &Error, out: &mut Output<'_>) -> anyhow::Result<Outcome> {
    let health = Health {
        reasons: vec![crate::secret::hidden(&error_chain(error))],
        ..Health::default()
    };
    show(health, out)
}

async fn look_at_lag(args: &HealthArgs, bus: &EventBus, health: &mut Health) -> anyhow::Result<()> {
    let positions = match bus.lags(&[]).await {
        Err(error) if error.kind() == ErrorKind::Unsupported && args.lag_max.is_none() => {
            return Ok(());
        }
        positions => positions?,
    };
    let mut worst = None;
    for places in positions.chunk_by(|a, b| (&a.group, &a.topic) == (&b.group, &b.topic)) {
        let lag: u64 = places.iter().map(|place| place.lag).sum();
        worst = worst.max(Some(lag));
        if args.lag_max.is_some_and(|most| lag > most) {
            let (group, topic) = (&places[0].group, &places[0].topic);
            let reason = format!("the lag of {group} on {topic} is {lag}");
            health.reasons.push(reason);
        }
    }
    health.lag = worst;
    Ok(())
}

async fn look_at_dead_letters(
    args: &HealthArgs,
    bus: &EventBus,
    health: &mut Health,
) -> anyhow::Result<()> {
    let Some(most) = args.dead_letters_max else {
        return Ok(());
    };
    let mut open = 0;
    let desks = Desks::of(bus, &[], &[]).await?;
    desks.visit(|_| open += 1).await?;
    health.dead_letters = Some(open);
    if open > most {
        let letters = counted(open, "dead letter is", "dead letters are");
        health.reasons.push(format!("{letters} open"));
    }
    Ok(())
}

async fn look_at_parked_keys(
    args: &HealthArgs,
    bus: &EventBus,
    health: &mut Health,
) -> anyhow::Result<()> {
    let Some(most) = args.parked_max else {
        return Ok(());
    };
    let parked = super::keys::count_parked(bus).await?;
    health.parked = Some(parked);
    if parked > most {
        let keys = counted(parked, "key is", "keys are");
        health.reasons.push(format!("{keys} parked"));
    }
    Ok(())
}

fn show(mut health: Health, out: &mut Output<'_>) -> anyhow::Result<Outcome> {
    health.healthy = health.reasons.is_empty();
    if out.is_json() {
        out.json(&health)?;
    } else if health.healthy {
        let system = health.system.unwrap_or_default();
        let took = health.took_ms.unwrap_or_default();
        out.line(format_args!("healthy: {system} answered within {took} ms"))?;
        if let Some(lag) = health.lag {
            out.line(format_args!("the largest lag of a group is {lag}"))?;
        }
    } else {
        out.line("not healthy:")?;
        for reason in &health.reasons {
            out.line(format_args!("  {reason}"))?;
        }
    }
    Ok(match health.healthy {
        true => Outcome::Done,
        false => Outcome::NotAsItShouldBe,
    })
}
