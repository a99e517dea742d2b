//! How an operator deals with many letters: claims some, deals with them, goes on to the next.
//!
//! ```text
//!  page of open letters ─▶ round: claim ─▶ read back ─▶ batch: publish events ─▶ note what was done
//!                            ▲                           (not when the claim is half over)   │
//!                            └──────────────── what is left of the page ◀────────────────────┘
//! ```

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::desk::{DEAD_LETTER_CLAIM_TIME, DeadLetters};
use super::letter::{DeadLetter, DeadLetterStatus, Decision, DeskAction};
use super::log::{Log, Place};
use super::record::Note;
use super::redrive::{DeskReport, Redrive};
use crate::broker::PublishError;
use crate::envelope::EventId;
use crate::error::{Error, ErrorKind, Result};

/// Most letters that are claimed at once.
const ROUND_MAX: usize = 1_000;
/// Most letters that are dealt with at once, between two looks at the time.
const BATCH_MAX: usize = 100;
/// Somebody who deals with letters: who, why, and under which claim.
pub(super) struct Operator<'d> {
    desk: &'d DeadLetters,
    by: &'d str,
    because: &'d str,
    claim: String,
}

impl<'d> Operator<'d> {
    pub(super) fn new(desk: &'d DeadLetters, by: &'d str, because: &'d str) -> Self {
        Self {
            desk,
            by,
            because,
            claim: EventId::new().to_string(),
        }
    }

    /// Writes a note beside each letter.
    pub(super) async fn note(&self, action: DeskAction, letters: &[DeadLetter]) -> Result<()> {
        let note = Note {
            action,
            decision: Decision {
                by: self.by.to_owned(),
                because: self.because.to_owned(),
                at: self.desk.now(),
            },
            claim: self.claim.clone(),
        };
        let records = letters.iter().map(|letter| note.about(letter));
        let records = records.collect::<Result<_>>()?;
        self.desk.bus.send_at_once(records).await?;
        Ok(())
    }

    /// Claims letters, or renews the claim on them. Returns those that are this operator's.
    pub(super) async fn claim(
        &self,
        log: &Log<'_>,
        letters: Vec<DeadLetter>,
    ) -> Result<Vec<DeadLetter>> {
        let until = self.desk.now().plus(DEAD_LETTER_CLAIM_TIME);
        self.note(DeskAction::Claimed { until }, &letters).await?;
        let standings = log.standings(&letters).await?;
        let is_ours = |letter: &DeadLetter| {
            standings
                .get(&letter.id)
                .is_some_and(|standing| standing.is_claimed_by(&self.claim))
        };
        Ok(letters.into_iter().filter(is_ours).collect())
    }
}

/// One call of `redrive` or `discard`.
pub(super) struct Run<'d> {
    desk: &'d DeadLetters,
    choice: &'d Redrive,
    action: DeskAction,
    operator: Operator<'d>,
    begun: Instant,
    report: DeskReport,
}

impl<'d> Run<'d> {
    pub(super) fn new(desk: &'d DeadLetters, choice: &'d Redrive, action: DeskAction) -> Self {
        Self {
            desk,
            choice,
            action,
            operator: Operator::new(desk, &choice.by, &choice.because),
            begun: Instant::now(),
            report: DeskReport::default(),
        }
    }

    pub(super) async fn finish(mut self) -> Result<DeskReport> {
        let begun = self.desk.now();
        let mut pages = self.desk.pages(0, Place::default(), |_| {});
        while let Some((log, letters)) = pages.next(self.desk.room()).await? {
            // Not those that fail again meanwhile: a queue of several pages would never end.
            let chosen = letters
                .into_iter()
                .filter(|letter| letter.failed_at <= begun && (self.choice.choose)(letter));
            let mut letters: VecDeque<_> = chosen.collect();
            self.report.chosen += letters.len() as u64;
            self.tell();
            letters.retain(|letter| self.is_possible(letter));
            while !letters.is_empty() {
                let round = letters
                    .drain(..letters.len().min(self.round_max()))
                    .collect();
                for letter in self.round(&log, round).await?.into_iter().rev() {
                    letters.push_front(letter);
                }
            }
        }
        self.tell();
        Ok(self.report)
    }

    fn tell(&self) {
        (self.choice.progress)(&self.report);
    }

    /// As many as can be dealt with in a quarter of the time of their claim.
    fn round_max(&self) -> usize {
        let quarter = DEAD_LETTER_CLAIM_TIME.as_secs() as usize / 4;
        let rate = self.choice.rate.map(|rate| rate as usize * quarter);
        rate.map_or(ROUND_MAX, |letters| letters.min(ROUND_MAX))
    }

    /// A tenth of what a second allows.
    fn batch_max(&self) -> usize {
        let rate = self.choice.rate.map(|rate| rate as usize / 10);
        rate.map_or(BATCH_MAX, |letters| letters.clamp(1, BATCH_MAX))
    }

    /// Counts and leaves what is claimed already or can't be re-driven.
    fn is_possible(&mut self, letter: &DeadLetter) -> bool {
        if letter.status != DeadLetterStatus::Open {
            self.report.taken += 1;
            return false;
        }
        if self.action != DeskAction::Redriven {
            return true;
        }
        if self.desk.expired(&letter.message).is_some() {
            self.report.expired += 1;
            return false;
        }
        let bytes_max = self.desk.bus.capabilities().message_bytes_max;
        let event = self.desk.redriven(letter);
        match event.and_then(|event| event.check(bytes_max)) {
            Ok(()) => true,
            Err(error) => {
                self.refuse(&letter.id, &error);
                false
            }
        }
    }

    fn refuse(&mut self, id: &EventId, error: &Error) {
        self.report.refused += 1;
        tracing::warn!(%id, %error, "a dead letter can't be re-driven");
    }

    /// Claims letters and deals with those it gets; gives back what is left when the claim is half
    /// over.
    async fn round(&mut self, log: &Log<'_>, letters: Vec<DeadLetter>) -> Result<Vec<DeadLetter>> {
        let claimed = Instant::now();
        let count = letters.len();
        let mut letters = self.operator.claim(log, letters).await?;
        self.report.taken += (count - letters.len()) as u64;
        while !letters.is_empty() {
            self.keep_to_rate().await;
            if claimed.elapsed() > DEAD_LETTER_CLAIM_TIME / 2 {
                break;
            }
            let rest = letters.split_off(letters.len().min(self.batch_max()));
            self.deal_with(std::mem::replace(&mut letters, rest))
                .await?;
            self.tell();
        }
        Ok(letters)
    }

    async fn keep_to_rate(&self) {
        if let Some(rate) = self.choice.rate {
            // A queue has far fewer than 2^32 letters; one that has not is slowed down no more.
            let done = u32::try_from(self.report.done).unwrap_or(u32::MAX);
            let time = Duration::from_secs(1).saturating_mul(done) / rate;
            tokio::time::sleep_until(self.begun + time).await;
        }
    }

    /// Publishes the events where they are re-driven, then records what was done.
    async fn deal_with(&mut self, mut letters: Vec<DeadLetter>) -> Result<()> {
        let mut failure = None;
        if self.action == DeskAction::Redriven {
            let events = letters.iter().map(|letter| self.desk.redriven(letter));
            let events = events.collect::<Result<_>>()?;
            if let Err(error) = self.desk.bus.send(events).await {
                failure = self.leave(&mut letters, error);
            }
        }
        self.operator.note(self.action.clone(), &letters).await?;
        self.report.done += letters.len() as u64;
        failure.map_or(Ok(()), Err)
    }

    /// Takes letters out whose events were not taken. Returns the error that ends the run, if it is
    /// not the events' own.
    fn leave(&mut self, letters: &mut Vec<DeadLetter>, error: PublishError) -> Option<Error> {
        let mut ending = None;
        let mut unpublished = error.unpublished;
        unpublished.sort_by_key(|unpublished| unpublished.index);
        // From the last to the first, so that places stay what they are.
        for unpublished in unpublished.into_iter().rev() {
            let letter = letters.remove(unpublished.index);
            match unpublished.error.kind() {
                ErrorKind::InvalidInput | ErrorKind::Conflict => {
                    self.refuse(&letter.id, &unpublished.error);
                }
                _ => ending = Some(unpublished.error),
            }
        }
        ending
    }
}
