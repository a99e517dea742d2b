//! What a fake was asked and what it answered, by idempotency key; kept in a file, it outlives the
//! fake.
//!
//! Each call and each answer is a line of JSON that is written before the answer is given.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::Path;

use anyhow::{Context as _, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::events::OrderId;

/// Remembers the first answer to each key, and counts calls.
#[derive(Debug)]
pub struct Ledger<A> {
    calls: BTreeMap<String, u64>,
    answers: HashMap<String, (OrderId, A)>,
    file: Option<File>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line<A> {
    Called {
        key: String,
    },
    Answered {
        key: String,
        order_id: OrderId,
        answer: A,
    },
}

impl<A> Default for Ledger<A> {
    fn default() -> Self {
        Self {
            calls: BTreeMap::new(),
            answers: HashMap::new(),
            file: None,
        }
    }
}

impl<A: Clone + Serialize + DeserializeOwned> Ledger<A> {
    /// Goes on with the ledger in `file`, or begins it there; without one, in memory.
    ///
    /// # Errors
    ///
    /// When it is not a ledger, or another process writes it.
    pub fn open(file: Option<&Path>) -> anyhow::Result<Self> {
        match file {
            None => Ok(Self::default()),
            Some(path) => {
                Self::read(path).with_context(|| format!("open the ledger {}", path.display()))
            }
        }
    }

    fn read(path: &Path) -> anyhow::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("another provider keeps it: name that one with `--psp` or `--mailer`")
            }
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        let mut ledger = Self::default();
        let mut whole = 0;
        let mut reader = BufReader::new(&file);
        let mut line = String::new();
        while reader.read_line(&mut line)? > 0 && line.ends_with('\n') {
            ledger.note(serde_json::from_str(&line)?);
            whole += line.len() as u64;
            line.clear();
        }
        // A line without an end was being written when the fake was killed: nobody got the answer.
        file.set_len(whole)?;
        ledger.file = Some(file);
        Ok(ledger)
    }

    /// Counts a call and says whether it is the first with this key.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn called(&mut self, key: &str) -> io::Result<bool> {
        let key = key.to_owned();
        self.write(Line::Called { key: key.clone() })?;
        Ok(self.calls[&key] == 1)
    }

    /// What was answered to this key before.
    pub fn answer(&self, key: &str) -> Option<A> {
        self.answers.get(key).map(|(_, answer)| answer.clone())
    }

    /// Keeps the answer to this key.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn answered(&mut self, key: &str, order_id: OrderId, answer: A) -> io::Result<()> {
        self.write(Line::Answered {
            key: key.to_owned(),
            order_id,
            answer,
        })
    }

    /// Every answer, each key once, with the order it was about.
    pub fn answers(&self) -> impl Iterator<Item = &(OrderId, A)> {
        self.answers.values()
    }

    /// Orders served under more than one key, among the answers that `serves` them: each is a
    /// mistake of the caller.
    pub fn served_twice(&self, serves: impl Fn(&A) -> bool) -> u64 {
        let mut keys: HashMap<OrderId, u64> = HashMap::new();
        for (order_id, _) in self.answers().filter(|(_, answer)| serves(answer)) {
            *keys.entry(*order_id).or_default() += 1;
        }
        keys.values().filter(|keys| **keys > 1).count() as u64
    }

    /// Calls per key.
    pub fn calls(&self) -> &BTreeMap<String, u64> {
        &self.calls
    }

    /// All calls, and those among them that repeated a key.
    pub fn totals(&self) -> (u64, u64) {
        let calls: u64 = self.calls.values().sum();
        (calls, calls - self.calls.len() as u64)
    }

    fn write(&mut self, line: Line<A>) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            let mut text = serde_json::to_vec(&line)?;
            text.push(b'\n');
            file.write_all(&text)?;
        }
        self.note(line);
        Ok(())
    }

    fn note(&mut self, line: Line<A>) {
        match line {
            Line::Called { key } => *self.calls.entry(key).or_default() += 1,
            Line::Answered {
                key,
                order_id,
                answer,
            } => {
                self.answers.insert(key, (order_id, answer));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const ORDER: OrderId = OrderId(Uuid::from_u128(1));

    #[test]
    fn a_ledger_goes_on_where_it_was_killed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger");
        let mut ledger = Ledger::<String>::open(Some(&path)).unwrap();
        assert!(ledger.called("a").unwrap());
        ledger.answered("a", ORDER, "yes".to_owned()).unwrap();
        let error = Ledger::<String>::open(Some(&path)).unwrap_err();
        assert!(format!("{error:#}").contains("another provider keeps it"));
        drop(ledger);
        let mut torn = OpenOptions::new().append(true).open(&path).unwrap();
        torn.write_all(b"{\"called\":{\"ke").unwrap();

        let mut ledger = Ledger::<String>::open(Some(&path)).unwrap();
        assert!(!ledger.called("a").unwrap(), "it was called before");
        assert_eq!(ledger.answer("a").as_deref(), Some("yes"));
        assert_eq!(ledger.totals(), (2, 1));
        drop(ledger);
        assert_eq!(
            Ledger::<String>::open(Some(&path)).unwrap().totals(),
            (2, 1)
        );
    }
}
