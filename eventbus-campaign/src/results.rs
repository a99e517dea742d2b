//! What several runs came to, kept in a file, so that a report need not be made at once.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use eventbus_verify::{Entry, Fault, Messages, Operation};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::simulated::Simulated;
use crate::tally::Tally;

/// What is known of every scenario that was tried, each of its last run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Results {
    /// In the order in which they were first tried.
    pub parts: Vec<Part>,
    /// What the simulation came to.
    pub simulated: Option<Simulated>,
}

/// A scenario on one broker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Part {
    /// What it came to.
    pub tally: Tally,
    /// The command that does the same again.
    pub command: String,
    /// What was tried, as git names it.
    pub commit: String,
}

impl Results {
    /// Reads what is known; nothing, where there is no file.
    pub fn read(file: &Path) -> anyhow::Result<Self> {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
        };
        serde_json::from_str(&text)
            .with_context(|| format!("{} holds no results of dev/verify", file.display()))
    }

    /// Keeps it; the file is never half written.
    pub fn write(&self, file: &Path) -> anyhow::Result<()> {
        let begun = file.with_extension("begun");
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(&begun, text + "\n")
            .and_then(|()| std::fs::rename(&begun, file))
            .with_context(|| format!("write {}", file.display()))
    }

    /// Adds a run, in the place of an earlier one of the same.
    pub fn add(&mut self, part: Part) {
        let is_same = |known: &&mut Part| {
            (&known.tally.scenario, &known.tally.base) == (&part.tally.scenario, &part.tally.base)
        };
        match self.parts.iter_mut().find(is_same) {
            Some(known) => *known = part,
            None => self.parts.push(part),
        }
    }
}

/// Messages by what became of them, as four numbers.
pub mod messages {
    use super::{Deserialize, Deserializer, Messages, Serialize, Serializer};

    /// Writes them.
    pub fn serialize<S: Serializer>(messages: &Messages, to: S) -> Result<S::Ok, S::Error> {
        let Messages {
            ok,
            failed,
            unknown,
            untried,
            ..
        } = messages;
        [ok, failed, unknown, untried].serialize(to)
    }

    /// Reads them.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Messages, D::Error> {
        let mut messages = Messages::default();
        [
            messages.ok,
            messages.failed,
            messages.unknown,
            messages.untried,
        ] = Deserialize::deserialize(from)?;
        Ok(messages)
    }
}

/// Faults by kind, each as its number in a ledger.
pub mod faults {
    use super::{
        BTreeMap, Deserialize, Deserializer, Entry, Fault, Operation, Serialize, Serializer,
    };

    /// Writes them.
    pub fn serialize<S: Serializer>(
        faults: &BTreeMap<Fault, u64>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        let faults = faults.iter().map(|(fault, count)| (*fault as u32, *count));
        faults.collect::<BTreeMap<u32, u64>>().serialize(to)
    }

    /// Reads them.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<BTreeMap<Fault, u64>, D::Error> {
        let faults: BTreeMap<u32, u64> = Deserialize::deserialize(from)?;
        let named = faults.into_iter().map(|(detail, count)| {
            let mut entry = Entry::new(Operation::FaultBegin);
            entry.detail = detail;
            (Fault::of(&entry), count)
        });
        Ok(named.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::{Part, Results};
    use crate::tally::Tally;
    use eventbus_verify::Fault;

    fn part(scenario: &str, base: &str, seed: u64) -> Part {
        let mut tally = Tally::new(scenario, base);
        tally.seeds.push(seed);
        tally.messages.ok = seed;
        tally.faults.insert(Fault::Kill, 3);
        Part {
            tally,
            command: "dev/verify".to_owned(),
            commit: "0123456789ab".to_owned(),
        }
    }

    #[test]
    fn what_was_kept_is_read_and_the_last_run_of_the_same_counts() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("verification.json");
        let mut results = Results::read(&file).expect("no file is no result");
        for (scenario, base, seed) in [
            ("embedded", "SQLite", 1),
            ("embedded", "PostgreSQL", 2),
            ("embedded", "SQLite", 3),
        ] {
            results.add(part(scenario, base, seed));
        }
        results.write(&file).expect("written");
        let read = Results::read(&file).expect("read");
        let seeds: Vec<_> = read.parts.iter().map(|part| part.tally.seeds[0]).collect();
        assert_eq!(seeds, [3, 2]);
        assert_eq!(read.parts[0].tally.messages.ok, 3);
        assert_eq!(read.parts[0].tally.faults[&Fault::Kill], 3);
    }
}
