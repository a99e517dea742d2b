//! The report of a run: what was tried, what came of it, and what is not promised.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use eventbus_verify::Fault;
use indicatif::HumanCount;

use crate::results::Results;
use crate::tally::{Tally, percentile};

mod environment;
mod failures;

pub use environment::Environment;

/// What a report is made of.
#[derive(Debug)]
pub struct Report<'a> {
    /// What each scenario came to.
    pub results: &'a Results,
    /// On what it ran.
    pub environment: &'a Environment,
}

impl Report<'_> {
    /// The report as Markdown.
    #[must_use]
    pub fn to_markdown(&self) -> String {
        self.to_string()
    }

    fn tallies(&self) -> impl Iterator<Item = &Tally> + Clone {
        self.results.parts.iter().map(|part| &part.tally)
    }

    fn total(&self, of: impl Fn(&Tally) -> u64) -> u64 {
        self.tallies().map(of).sum()
    }

    fn write_summary(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let messages = self.total(|tally| tally.messages.total());
        let (violations, complaints) = (
            self.total(|tally| tally.violations),
            self.total(|tally| tally.complaints),
        );
        let (messages, faults) = (
            HumanCount(messages),
            HumanCount(self.total(Tally::faults_total)),
        );
        let (effects, deliveries) = (
            HumanCount(self.total(|tally| tally.effects)),
            HumanCount(self.total(|tally| tally.deliveries)),
        );
        writeln!(
            f,
            "**{messages} messages** were checked under **{faults} faults**: **{violations} violations**, and \
             {complaints} other complaints. They had {effects} effects in {deliveries} deliveries; it took {}.",
            hours(
                self.tallies()
                    .map(|tally| tally.lasted + tally.drained)
                    .sum()
            )
        )?;
        writeln!(
            f,
            "\nWith no failure in *n* independent trials, the probability of one is below 3/*n* with 95 % confidence. \
             Neither messages nor faults of one run are independent of each other, so this is a measure, and no proof."
        )
    }

    fn write_scenarios(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n## What was tried\n")?;
        writeln!(
            f,
            "| scenario | on | messages | faults | violations | duplicates on the wire | recovery p50 | p99 | max | rounds |"
        )?;
        writeln!(
            f,
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
        )?;
        for tally in self.tallies() {
            let Tally { scenario, base, .. } = tally;
            if let Some(why) = &tally.missing {
                writeln!(f, "| {scenario} | {base} | not run: {why} | | | | | | | |")?;
                continue;
            }
            let time = |percent| seconds(percentile(&tally.recoveries, percent));
            let wrong = match tally.complaints {
                0 => tally.violations.to_string(),
                more => format!("{}, and {more} complaints", tally.violations),
            };
            writeln!(
                f,
                "| {scenario} | {base} | {} | {} | {wrong} | {} | {} | {} | {} | {} |",
                HumanCount(tally.messages.total()),
                HumanCount(tally.faults_total()),
                HumanCount(tally.duplicates),
                time(50),
                time(99),
                time(100),
                tally.seeds.len(),
            )?;
        }
        writeln!(
            f,
            "\nRecovery is from the end of a fault, when the process runs again, the wire is healed, or a new client finds \
             the leaders and coordinators of a broker that was harmed, until a message to each partition that was \
             published afterwards has its effect in every group; what had piled up is handled before it. Without a fault that took {} (p50).",
            seconds(percentile(&self.passing(), 50))
        )?;
        writeln!(f, "\nThe scenarios:\n")?;
        for scenario in crate::scenario::ALL {
            let covers: Vec<String> = scenario.covers.iter().map(ToString::to_string).collect();
            let (name, about, covers) = (scenario.name, scenario.about, covers.join(", "));
            writeln!(f, "- **{name}**: {about} (covers {covers}).")?;
        }
        Ok(())
    }

    fn passing(&self) -> Vec<Duration> {
        let each = self.tallies();
        each.flat_map(|tally| tally.passing.iter().copied())
            .collect()
    }

    fn write_messages(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n## What callers were told\n")?;
        writeln!(
            f,
            "| scenario | on | ok | surely failed | unknown | dead letters and parked |"
        )?;
        writeln!(f, "| --- | --- | ---: | ---: | ---: | ---: |")?;
        for tally in self.tallies().filter(|tally| tally.missing.is_none()) {
            let Tally { scenario, base, .. } = tally;
            writeln!(
                f,
                "| {scenario} | {base} | {} | {} | {} | {} |",
                HumanCount(tally.messages.ok),
                HumanCount(tally.messages.failed),
                HumanCount(tally.messages.unknown),
                HumanCount(tally.kept),
            )?;
        }
        writeln!(
            f,
            "\nA rolled back transaction is a failure here: what it published must never be seen. Of what is unknown, \
             either is right, but not twice, and not out of order."
        )
    }

    fn write_faults(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds: BTreeMap<Fault, BTreeMap<&str, u64>> = BTreeMap::new();
        for tally in self.tallies() {
            for (fault, count) in &tally.faults {
                let of_base = kinds.entry(*fault).or_default();
                *of_base.entry(&tally.base).or_default() += count;
            }
        }
        let bases: Vec<&str> = vec!["SQLite", "PostgreSQL", "Kafka", "Redis", "RabbitMQ"];
        writeln!(f, "\n## Faults\n\n| kind | {} |", bases.join(" | "))?;
        writeln!(f, "| --- |{}", " ---: |".repeat(bases.len()))?;
        for (fault, counts) in kinds {
            let count = |base: &&str| counts.get(base).copied().unwrap_or(0).to_string();
            let counts: Vec<String> = bases.iter().map(count).collect();
            writeln!(f, "| {} | {} |", name_of(fault), counts.join(" | "))?;
        }
        let mut steps: BTreeMap<&str, u64> = BTreeMap::new();
        for (step, count) in self.tallies().flat_map(|tally| &tally.steps) {
            *steps.entry(step).or_default() += count;
        }
        if steps.is_empty() {
            return Ok(());
        }
        writeln!(
            f,
            "\nOf the kills, these were at a named step of a process:\n\n| step | times |\n| --- | ---: |"
        )?;
        for (step, count) in steps {
            writeln!(f, "| `{step}` | {count} |")?;
        }
        Ok(())
    }

    fn write_drifts(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n## What processes took\n")?;
        let mut drifts = self.tallies().flat_map(|tally| {
            let each = tally.drifts.iter();
            each.map(move |drift| (tally, drift))
        });
        let Some(first) = drifts.next() else {
            return writeln!(
                f,
                "No process ran for five minutes: nothing is said of memory, descriptors, threads and tasks over time."
            );
        };
        writeln!(
            f,
            "Processes that lived through all faults of a round, in the first quarter of the time after a minute and \
             in the last one, each as the median. More than a tenth of growth, and more than 8 MiB or 8 of what is \
             counted, is a complaint.\n"
        )?;
        writeln!(
            f,
            "| scenario | on | process | watched | MiB resident | descriptors | threads | tasks |"
        )?;
        writeln!(f, "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")?;
        for (tally, drift) in std::iter::once(first).chain(drifts) {
            let (first, last) = (drift.first, drift.last);
            let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
            writeln!(
                f,
                "| {} | {} | {} | {} | {} → {} | {} → {} | {} → {} | {} → {} |",
                tally.scenario,
                tally.base,
                drift.name,
                hours(drift.watched),
                mib(first.resident),
                mib(last.resident),
                first.descriptors,
                last.descriptors,
                first.threads,
                last.threads,
                first.tasks,
                last.tasks,
            )?;
        }
        Ok(())
    }

    fn write_simulated(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(simulated) = &self.results.simulated else {
            return Ok(());
        };
        writeln!(f, "\n## In virtual time\n\n{}\n", simulated.line())?;
        writeln!(
            f,
            "Each seed decides a run of consumers, relays, leases, held keys, schedules and units of work on a broker \
             and a database in memory that are late, away, or do not answer, with members and relays that come, go and \
             die, checked by the same checker (`eventbus-simulation`). Each of these bugs was planted in a wrapper, and \
             has to be found:\n"
        )?;
        writeln!(f, "| it … | found with seed |\n| --- | ---: |")?;
        for (what, seed) in &simulated.plants {
            let seed = seed.map_or_else(|| "**not found**".to_owned(), |seed| seed.to_string());
            writeln!(f, "| {what} | {seed} |")?;
        }
        for broken in simulated.broken.iter().take(5) {
            writeln!(f, "\n```text\n{broken}\n```")?;
        }
        Ok(())
    }

    fn write_wrong(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wrong: Vec<&Tally> = self
            .tallies()
            .filter(|tally| !tally.shown.is_empty())
            .collect();
        if wrong.is_empty() {
            return Ok(());
        }
        writeln!(f, "\n## What went wrong")?;
        for tally in wrong {
            for text in &tally.shown {
                let (scenario, base) = (&tally.scenario, &tally.base);
                let text = text.trim_end();
                writeln!(f, "\n{scenario} on {base}:\n\n```text\n{text}\n```")?;
            }
        }
        Ok(())
    }

    fn write_again(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n## Again\n\n```sh")?;
        let mut said: Vec<(&str, &str)> = Vec::new();
        for part in &self.results.parts {
            let command = (part.command.as_str(), part.commit.as_str());
            if !said.contains(&command) {
                said.push(command);
                writeln!(f, "{} # on commit {}", part.command, part.commit)?;
            }
        }
        writeln!(f, "```\n")?;
        writeln!(
            f,
            "A seed decides what is published, who is harmed, when and how; the machine decides the rest, so that a \
             seed repeats a schedule and no execution. Each round has a seed of its own, the first that of the command:\n"
        )?;
        for tally in self.tallies().filter(|tally| !tally.seeds.is_empty()) {
            let seeds: Vec<String> = tally.seeds.iter().map(ToString::to_string).collect();
            let (scenario, base) = (&tally.scenario, &tally.base);
            writeln!(f, "- {scenario} on {base}: {}", seeds.join(", "))?;
        }
        let own = "docs/guide/verify-your-own.md";
        writeln!(
            f,
            "\nHow to put handlers and brokers of your own through the same: [{own}](guide/verify-your-own.md)."
        )
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "# Verification\n\n<!-- Written by dev/verify. Do not edit: run it again. -->\n"
        )?;
        writeln!(
            f,
            "What `dev/verify` tried with the SDK, and what came of it. Processes that publish, commit, relay and \
             handle are harmed while a recorder, in a process that nobody harms, writes down what each tried and what \
             it was told. Then all is healed and drained, and the checker of `eventbus-verify` looks for messages that \
             are lost (I1), never sent (I2), doubled (I3) or out of order (I4), for messages that do not pass again \
             (I7), bounds that do not hold (I8), callers who were told too much (I9), and what was settled unhandled \
             (I10).\n"
        )?;
        self.write_summary(f)?;
        self.write_scenarios(f)?;
        self.write_messages(f)?;
        self.write_faults(f)?;
        self.write_drifts(f)?;
        self.write_simulated(f)?;
        self.write_wrong(f)?;
        f.write_str(&failures::table(self.tallies()))?;
        f.write_str(NOT_PROMISED)?;
        write!(f, "{}", self.environment)?;
        self.write_again(f)
    }
}

const NOT_PROMISED: &str = "
## What is not promised

- Exactly-once delivery. Delivery is at least once; an effect happens once where it commits with an inbox.
- Order across keys, between producers, or after the number of partitions was changed; order of a call whose
  outcome was unknown and that was repeated after later ones.
- Durability below that of the broker: a kill leaves what the kernel holds, so that nothing here tries `fsync`, a
  power cut, or a disk that lies.
- Recognising duplicates beyond the time for which an inbox or a window remembers events.
- Anything about what was not tried: other faults, other timing, other versions, several machines, clocks that
  disagree.
- Sagas and event stores (I5, I6): the SDK has neither yet.
";

/// A time as people say it.
fn hours(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds / 60 {
        0 => format!("{seconds} s"),
        minutes @ 1..90 => format!("{minutes} min"),
        minutes => format!("{:.1} h", minutes as f64 / 60.0),
    }
}

fn seconds(time: Option<Duration>) -> String {
    time.map_or_else(
        || "-".to_owned(),
        |time| format!("{:.2} s", time.as_secs_f64()),
    )
}

/// A kind of fault in words.
fn name_of(fault: Fault) -> String {
    let name = match fault {
        Fault::Kill => "a process is killed",
        Fault::Stop => "a process stands still, and goes on",
        Fault::Terminate => "a process is told to stop",
        Fault::BrokerKill => "the broker is killed, and started again",
        Fault::BrokerTerminate => "the broker is told to stop, and started again",
        Fault::BrokerStop => "the broker stands still, and goes on",
        Fault::Cut => "connections are cut",
        Fault::HalfOpen => "nothing passes, and no connection ends",
        Fault::Delay => "everything is late",
        Fault::OneWayLoss => "one direction is lost",
        Fault::Truncate => "connections end within a message",
        Fault::ResponseLoss => "commits are served, and their responses lost or wrong",
        Fault::DiskFull => "the disk is full",
        Fault::MemberJoin => "a member joins",
        Fault::MemberLeave => "a member leaves",
        Fault::Other => "the broker's file is locked, or dead letters are refused",
        other => return format!("{other:?}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::{Environment, Report, Results, hours};
    use crate::results::Part;
    use crate::tally::Tally;
    use std::time::Duration;

    #[test]
    fn a_report_says_what_was_tried_and_what_was_not() {
        let mut tried = Tally::new("embedded", "SQLite");
        tried.seeds.push(7);
        tried.messages.ok = 1_234_567;
        let mut missing = Tally::new("disk-full", "SQLite");
        missing.missing = Some("only root may mount a disk".to_owned());
        let mut results = Results::default();
        for tally in [tried, missing] {
            results.add(Part {
                tally,
                command: "dev/verify --seed 7".to_owned(),
                commit: "0123456789ab".to_owned(),
            });
        }
        let report = Report {
            results: &results,
            environment: &Environment::default(),
        };
        let text = report.to_markdown();
        for part in [
            "**1,234,567 messages**",
            "| embedded | SQLite | 1,234,567 |",
            "not run: only root may mount a disk",
            "dev/verify --seed 7",
            "Exactly-once delivery",
            "| 60 |",
        ] {
            assert!(text.contains(part), "{part} is missing:\n{text}");
        }
    }

    #[test]
    fn times_are_said_as_people_do() {
        let said = [59, 61, 5400, 9000].map(|seconds| hours(Duration::from_secs(seconds)));
        assert_eq!(said, ["59 s", "1 min", "1.5 h", "2.5 h"]);
    }
}
