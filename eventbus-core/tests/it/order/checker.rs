//! The model: reads what happened and says the first thing that must not happen.
//!
//! One thing may look wrong for an instant: a member whose lane the broker took away goes on until
//! it hears so. What it does in that time is allowed if it hears of it at once.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use eventbus_core::{Lane, Receipt};

use super::case::Case;
use super::recorder::{Event, Handed, How, Noted};

/// How soon a member hears that a lane was lost: timers are a millisecond coarse.
const HEARS_WITHIN: Duration = Duration::from_millis(3);

/// How soon a shutdown ends after the last handler, or after the lanes of what waited left.
const LEAVES_WITHIN: Duration = Duration::from_millis(10);

/// How many events are told with what is wrong.
const TOLD: usize = 40;

/// Checks what happened, one after the other.
pub(super) fn check_events(case: &Case, events: &[Noted]) -> Result<(), String> {
    after(case, events).map(|_| ())
}

/// Checks what has come of each message in the end.
pub(super) fn check_end(case: &Case, events: &[Noted]) -> Result<(), String> {
    after(case, events)?.end()
}

fn after<'a>(case: &'a Case, events: &[Noted]) -> Result<Checker<'a>, String> {
    let mut checker = Checker::new(case);
    for (index, noted) in events.iter().enumerate() {
        checker.see(noted).map_err(|broken| {
            let before = index.saturating_sub(TOLD);
            let told = events[before..=index].iter().map(|noted| {
                let Noted { at, member, event } = noted;
                format!("\n  {at:?} member {member}: {event:?}")
            });
            format!("{broken}, after{}", told.collect::<String>())
        })?;
    }
    Ok(checker)
}

struct Checker<'a> {
    case: &'a Case,
    before: Vec<Option<usize>>,
    members: HashMap<usize, Member>,
    running: Vec<Running>,
    /// Handled or dead-lettered, by anybody.
    done: HashSet<usize>,
    /// The last message of each key that was.
    latest: HashMap<u32, usize>,
    handled: Vec<usize>,
    letters: Vec<usize>,
    published: Vec<usize>,
    promises: Vec<Promise>,
}

#[derive(Default)]
struct Member {
    /// Delivered and not settled, on lanes it holds.
    held: HashMap<Receipt, Handed>,
    /// Of these, those that have a verdict.
    decided: HashSet<Receipt>,
    /// Every receipt there was.
    seen: HashSet<Receipt>,
    leaves_at: Option<Duration>,
    /// When its last handler ended, or lanes left it.
    busy_until: Duration,
    is_gone: bool,
}

impl Member {
    fn receipt_of(&self, number: usize) -> Option<Receipt> {
        let mut held = self.held.values();
        held.find(|handed| handed.number == number)
            .map(|handed| handed.receipt)
    }

    fn give_up(&mut self, at: Duration, lanes: &[Lane]) {
        self.busy_until = at;
        self.held
            .retain(|receipt, _| !lanes.contains(&receipt.lane));
    }
}

/// A handler.
#[derive(Clone, Copy)]
struct Running {
    member: usize,
    run: usize,
    number: usize,
    receipt: Receipt,
    /// When its member heard that its lane was lost.
    lost_at: Option<Duration>,
}

/// One of these lanes was lost and its member is about to hear so; otherwise `broken` is true.
struct Promise {
    until: Duration,
    lanes: Vec<(usize, Lane)>,
    broken: String,
}

impl<'a> Checker<'a> {
    fn new(case: &'a Case) -> Self {
        let count = case.messages.len();
        Self {
            case,
            before: (0..count).map(|number| case.before(number)).collect(),
            members: HashMap::new(),
            running: Vec::new(),
            done: HashSet::new(),
            latest: HashMap::new(),
            handled: vec![0; count],
            letters: vec![0; count],
            published: vec![0; count],
            promises: Vec::new(),
        }
    }

    fn see(&mut self, noted: &Noted) -> Result<(), String> {
        let (at, id) = (noted.at, noted.member);
        if let Some(promise) = self.promises.iter().find(|promise| promise.until < at) {
            return Err(promise.broken.clone());
        }
        let is_late = |one: &&Running| one.lost_at.is_some_and(|lost| lost + HEARS_WITHIN < at);
        if let Some(late) = self.running.iter().find(is_late) {
            return Err(format!(
                "lost lane: message {} is still being handled",
                late.number
            ));
        }
        if self.members.entry(id).or_default().is_gone
            && !matches!(
                noted.event,
                Event::Ended {
                    how: How::Dropped,
                    ..
                }
            )
        {
            return Err("gone: a member that is gone goes on".to_owned());
        }
        match &noted.event {
            Event::Delivered(batch) => self.delivered(id, batch),
            Event::Lost(lanes) => {
                self.member(id).give_up(at, lanes);
                for one in &mut self.running {
                    if one.member == id && lanes.contains(&one.receipt.lane) {
                        one.lost_at = Some(at);
                    }
                }
                self.promises.retain(|promise| {
                    let kept =
                        |(member, lane): &(usize, Lane)| *member == id && lanes.contains(lane);
                    !promise.lanes.iter().any(kept)
                });
                Ok(())
            }
            Event::Released(lanes) => self.released(at, id, lanes),
            Event::Settled(receipts) => receipts
                .iter()
                .try_for_each(|receipt| self.settled(id, *receipt)),
            Event::Started { run, number } => self.started(at, id, *run, *number),
            Event::Ended { run, number, how } => self.ended(at, id, *run, *number, *how),
            Event::DeadLettered(number) => self.dead_lettered(at, id, *number),
            Event::Published(number) => {
                self.published[*number] += 1;
                Ok(())
            }
            Event::Leaves => {
                self.member(id).leaves_at = Some(at);
                Ok(())
            }
            Event::Left => self.left(at, id),
            Event::Crashes => {
                self.member(id).is_gone = true;
                self.promises
                    .retain(|promise| !promise.lanes.iter().any(|(member, _)| *member == id));
                Ok(())
            }
        }
    }

    fn member(&mut self, id: usize) -> &mut Member {
        self.members.entry(id).or_default()
    }

    fn delivered(&mut self, id: usize, batch: &[Handed]) -> Result<(), String> {
        let setting = &self.case.setting;
        let member = self.members.entry(id).or_default();
        if batch.len() > setting.batch {
            return Err(format!("limits: a batch of {}", batch.len()));
        }
        for handed in batch {
            if !member.seen.insert(handed.receipt) {
                return Err(format!("limits: {:?} was given twice", handed.receipt));
            }
            member.held.insert(handed.receipt, *handed);
        }
        let bytes: usize = member.held.values().map(|handed| handed.bytes).sum();
        if bytes > setting.bytes && member.held.len() > 1 {
            return Err(format!("limits: {bytes} bytes are unsettled"));
        }
        if member.held.len() > setting.limit_messages {
            return Err(format!("limits: {} are unsettled", member.held.len()));
        }
        let mut lanes: HashMap<Lane, usize> = HashMap::new();
        for receipt in member.held.keys() {
            *lanes.entry(receipt.lane).or_default() += 1;
        }
        match lanes.values().find(|count| **count > setting.lane_messages) {
            Some(count) => Err(format!("limits: {count} are unsettled on a lane")),
            None => Ok(()),
        }
    }

    fn released(&mut self, at: Duration, id: usize, lanes: &[Lane]) -> Result<(), String> {
        self.member(id).give_up(at, lanes);
        let mut running = self.running.iter();
        match running.find(|one| one.member == id && lanes.contains(&one.receipt.lane)) {
            Some(one) => Err(format!(
                "released: message {} of a released lane is being handled",
                one.number
            )),
            None => Ok(()),
        }
    }

    fn settled(&mut self, id: usize, receipt: Receipt) -> Result<(), String> {
        let member = self.members.entry(id).or_default();
        let Some(handed) = member.held.remove(&receipt) else {
            // Of a lane that was lost: the broker ignores it. Of one that is held: twice.
            let holds = member.held.keys().any(|held| held.lane == receipt.lane);
            return match holds {
                true => Err(format!("settled: {receipt:?} twice")),
                false => Ok(()),
            };
        };
        let number = handed.number;
        if !member.decided.remove(&receipt) {
            return Err(format!("settled: message {number} has no verdict"));
        }
        let publishes = self.case.messages[number].publishes && self.letters[number] == 0;
        if publishes && self.published[number] == 0 {
            return Err(format!(
                "settled: what the handler of message {number} published was not sent"
            ));
        }
        Ok(())
    }

    fn started(
        &mut self,
        at: Duration,
        id: usize,
        run: usize,
        number: usize,
    ) -> Result<(), String> {
        let member = self.members.entry(id).or_default();
        let Some(receipt) = member.receipt_of(number) else {
            return Err(format!("held: message {number} is not this member's"));
        };
        if let Some(before) = self.before[number] {
            // In a batch the handler itself keeps the order.
            let same_run = |one: &Running| one.run == run && one.number == before;
            if !self.done.contains(&before) && !self.running.iter().any(same_run) {
                return Err(format!("order: {number} began before {before} was done"));
            }
        }
        let key = self.case.messages[number].key;
        let same_key = |one: &&Running| {
            one.run != run
                && one.lost_at.is_none()
                && key.is_some()
                && self.case.messages[one.number].key == key
        };
        if let Some(other) = self.running.iter().find(same_key) {
            let broken = format!(
                "overlap: {number} began at member {id} while {} of its key ran at member {}",
                other.number, other.member
            );
            if other.member == id && other.receipt.lane == receipt.lane {
                return Err(broken);
            }
            self.promises.push(Promise {
                until: at + HEARS_WITHIN,
                lanes: vec![(other.member, other.receipt.lane), (id, receipt.lane)],
                broken,
            });
        }
        self.running.push(Running {
            member: id,
            run,
            number,
            receipt,
            lost_at: None,
        });
        let runs: HashSet<_> = self
            .running
            .iter()
            .filter(|one| one.member == id)
            .map(|one| one.run)
            .collect();
        match runs.len() > self.case.setting.concurrency {
            true => Err(format!("limits: {} handlers run at once", runs.len())),
            false => Ok(()),
        }
    }

    fn ended(
        &mut self,
        at: Duration,
        id: usize,
        run: usize,
        number: usize,
        how: How,
    ) -> Result<(), String> {
        let is_this = |one: &Running| one.run == run && one.number == number;
        let Some(index) = self.running.iter().position(is_this) else {
            return Err(format!("held: message {number} ended unstarted"));
        };
        let running = self.running.remove(index);
        self.member(id).busy_until = at;
        if how != How::Ok {
            return Ok(());
        }
        self.handled[number] += 1;
        self.decide(at, id, number, running.receipt)
    }

    fn dead_lettered(&mut self, at: Duration, id: usize, number: usize) -> Result<(), String> {
        self.letters[number] += 1;
        if let Some(before) = self.before[number]
            && !self.done.contains(&before)
        {
            return Err(format!(
                "order: {number} was dead-lettered before {before} was done"
            ));
        }
        match self.member(id).receipt_of(number) {
            Some(receipt) => self.decide(at, id, number, receipt),
            None => Err(format!("held: message {number} is not this member's")),
        }
    }

    /// A message was handled or dead-lettered.
    fn decide(
        &mut self,
        at: Duration,
        id: usize,
        number: usize,
        receipt: Receipt,
    ) -> Result<(), String> {
        let member = self.members.entry(id).or_default();
        if !member.held.contains_key(&receipt) {
            return Err(format!("held: the lane of message {number} was given up"));
        }
        if !member.decided.insert(receipt) {
            return Err(format!("twice: message {number} within one epoch"));
        }
        self.done.insert(number);
        let Some(key) = self.case.messages[number].key else {
            return Ok(());
        };
        let latest = self.latest.insert(key, number);
        let before = self.before[number];
        if latest < before {
            // Those between were done earlier, or it could not have begun.
            self.promises.push(Promise {
                until: at + HEARS_WITHIN,
                lanes: vec![(id, receipt.lane)],
                broken: format!("order: from {latest:?} to {number}, over {before:?}"),
            });
        }
        Ok(())
    }

    fn left(&mut self, at: Duration, id: usize) -> Result<(), String> {
        if let Some(one) = self.running.iter().find(|one| one.member == id) {
            return Err(format!("left: message {} is being handled", one.number));
        }
        let member = self.member(id);
        member.is_gone = true;
        let could = member.busy_until.max(member.leaves_at.unwrap_or_default());
        let late = at.saturating_sub(could);
        match late > LEAVES_WITHIN {
            true => Err(format!("left: {late:?} after it had nothing left to do")),
            false => Ok(()),
        }
    }

    fn end(self) -> Result<(), String> {
        if let Some(promise) = self.promises.first() {
            return Err(promise.broken.clone());
        }
        for number in 0..self.case.messages.len() {
            self.end_of(number)?;
        }
        Ok(())
    }

    fn end_of(&self, number: usize) -> Result<(), String> {
        let (handled, letters) = (self.handled[number], self.letters[number]);
        let (wanted, other) = match self.case.is_poison(number) {
            true => (letters, handled),
            false => (handled, letters),
        };
        let published = self.published[number];
        let to_publish = self.case.messages[number].publishes && handled > 0;
        let counts = format!(
            "message {number} was handled {handled} times, dead-lettered {letters} times, and \
             published {published} times"
        );
        if wanted == 0 || (to_publish && published == 0) {
            return Err(format!("lost: {counts}"));
        }
        if other > 0 {
            return Err(format!("dead letters: {counts}"));
        }
        if self.case.is_calm() && (wanted > 1 || published > 1) {
            return Err(format!("twice: {counts} without a reason"));
        }
        Ok(())
    }
}
