//! Correct histories with one thing wrong: a check must find it, and the right one must.

use std::collections::HashMap;

use eventbus_verify::{
    Effect, Entry, Fault, History, Invariant, Ledger, Operation, Phase, Record, RunId, Stamp,
};
use fastrand::Rng;

use crate::model::{GROUPS, RUN, Told, promises, run};

const SEEDS: u64 = 60;
const STEPS: usize = 700;

type Mutation = fn(&mut Told, &mut Rng) -> Option<()>;

/// What is done to a history, and which check must find it.
const MUTATIONS: &[(&str, Invariant, Mutation)] = &[
    ("drop an effect", Invariant::NoLoss, drop_effect),
    ("fail becomes ok", Invariant::NoLoss, fail_becomes_ok),
    (
        "an effect of what failed",
        Invariant::NoPhantom,
        effect_of_failed,
    ),
    (
        "an effect of another run",
        Invariant::NoPhantom,
        effect_of_other_run,
    ),
    (
        "an effect of two messages",
        Invariant::NoPhantom,
        mixed_up_effect,
    ),
    ("another payload", Invariant::NoPhantom, change_payload),
    ("ok becomes fail", Invariant::NoPhantom, ok_becomes_fail),
    (
        "delivered before published",
        Invariant::NoPhantom,
        deliver_early,
    ),
    ("commit becomes a rollback", Invariant::NoPhantom, roll_back),
    ("double an effect", Invariant::EffectOnce, double_effect),
    (
        "swap two effects of a key",
        Invariant::KeyOrder,
        swap_effects,
    ),
    (
        "swap two deliveries of a key",
        Invariant::KeyOrder,
        swap_deliveries,
    ),
    (
        "no probe passes at the end",
        Invariant::Liveness,
        drop_last_probe,
    ),
    ("lag is left", Invariant::Liveness, leave_lag),
    (
        "hand out again and again",
        Invariant::Bounds,
        hand_out_often,
    ),
    ("one attempt more", Invariant::Bounds, attempt_more),
    ("the broker forgets one", Invariant::Honesty, forget_stored),
    ("two at one position", Invariant::Honesty, same_position),
    ("unknown becomes ok", Invariant::Honesty, unknown_becomes_ok),
    (
        "unknown becomes fail",
        Invariant::Honesty,
        unknown_becomes_fail,
    ),
    ("settle before the handler", Invariant::Drain, settle_early),
    (
        "go on after the shutdown",
        Invariant::Drain,
        deliver_after_drain,
    ),
    (
        "a handler outlives the shutdown",
        Invariant::Drain,
        leave_running,
    ),
];

#[test]
fn each_mutation_is_found_in_every_history() {
    let mut applied: HashMap<&str, u32> = HashMap::new();
    for seed in 0..SEEDS {
        let told = run(seed, STEPS);
        for (name, invariant, mutate) in MUTATIONS {
            let mut rng = Rng::with_seed(seed);
            let mut mutated = told.clone();
            if mutate(&mut mutated, &mut rng).is_none() {
                continue;
            }
            *applied.entry(name).or_default() += 1;
            let found = find(&mutated);
            assert!(
                found.contains(invariant),
                "seed {seed}, {name}: {invariant} found nothing, others {found:?}"
            );
        }
    }
    for (name, ..) in MUTATIONS {
        let count = applied.get(name).copied().unwrap_or(0);
        assert!(count >= 10, "{name} was possible in {count} histories only");
    }
}

/// The invariants that are broken.
fn find(told: &Told) -> Vec<Invariant> {
    let mut records = told.records.clone();
    // The place in the ledger follows from the time, also where a mutation moved something.
    records.sort_by_key(|record| record.time);
    let ledger = Ledger::from_records(RUN, records);
    let history = History::new(&ledger, told.effects.iter().copied());
    let checked = promises().check(&history).into_iter();
    let broken = checked.filter(|(_, found)| !found.is_empty());
    broken.map(|(invariant, _)| invariant).collect()
}

fn is(record: &Record, operation: Operation, phase: Phase) -> bool {
    record.entry.operation == operation && record.phase == phase
}

/// Where records are that say this of a message, in a group if one is named.
fn places(told: &Told, stamp: Stamp, group: u16, operation: Operation) -> Vec<usize> {
    let matches = |record: &Record| {
        let entry = &record.entry;
        entry.stamp == Some(stamp) && entry.group == group && entry.operation == operation
    };
    let records = told.records.iter().enumerate();
    records
        .filter(|(_, one)| matches(one))
        .map(|(at, _)| at)
        .collect()
}

/// Where one such record is, at random.
fn pick(told: &Told, rng: &mut Rng, fits: impl Fn(&Record) -> bool) -> Option<usize> {
    let records = told.records.iter().enumerate();
    let places: Vec<usize> = records
        .filter(|(_, one)| fits(one))
        .map(|(at, _)| at)
        .collect();
    rng.choice(places)
}

/// Whether there was one try, and it was ok.
fn is_certain(told: &Told, stamp: Stamp) -> bool {
    let publishes = places(told, stamp, 0, Operation::Publish);
    if !publishes.is_empty() {
        let phases: Vec<Phase> = publishes.iter().map(|at| told.records[*at].phase).collect();
        return phases == [Phase::Invoke, Phase::Ok];
    }
    let appends = places(told, stamp, 0, Operation::Append);
    let transaction = appends
        .first()
        .and_then(|at| told.records[*at].entry.position);
    let mut records = told.records.iter();
    records.any(|one| is(one, Operation::Commit, Phase::Ok) && one.entry.position == transaction)
}

fn is_kept(told: &Told, stamp: Stamp, group: u16) -> bool {
    let kept = |operation| !places(told, stamp, group, operation).is_empty();
    kept(Operation::DeadLetter) || kept(Operation::Park)
}

/// Whether it may be lost in the group without anybody noticing.
fn is_excused(told: &Told, stamp: Stamp, group: u16) -> bool {
    let known = told
        .records
        .iter()
        .filter(|one| one.entry.stamp == Some(stamp));
    let mut positions = known.filter_map(|one| match one.entry.operation {
        Operation::Publish | Operation::Deliver | Operation::Stored => one
            .entry
            .position
            .map(|position| (one.entry.place, position)),
        _ => None,
    });
    let is_gone = |(place, position): (u32, u64)| {
        told.records.iter().any(|one| {
            let entry = &one.entry;
            let is_gap = entry.operation == Operation::Gap && entry.group == group;
            is_gap && (entry.place, entry.position) == (place, Some(position))
        })
    };
    is_kept(told, stamp, group) || positions.any(is_gone)
}

/// An effect of which everything is known.
fn pick_effect(told: &Told, rng: &mut Rng) -> Option<(usize, Stamp)> {
    for _ in 0..20 {
        let at = rng.usize(0..told.effects.len().max(1));
        let effect = told.effects.get(at)?;
        let (_, stamp) = effect.id.origin()?;
        if is_certain(told, stamp) && !is_excused(told, stamp, effect.group) {
            return Some((at, stamp));
        }
    }
    None
}

fn effect_of(stamp: Stamp, run: RunId, order: u64) -> Effect {
    Effect {
        group: GROUPS[0],
        id: stamp.id(run),
        key: stamp.key,
        key_seq: stamp.key_seq,
        attempt: 1,
        order,
    }
}

fn drop_effect(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let (at, _) = pick_effect(told, rng)?;
    told.effects.remove(at);
    Some(())
}

fn double_effect(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let order = told.effects.len() as u64;
    let effect = *rng.choice(&told.effects)?;
    told.effects.push(Effect { order, ..effect });
    Some(())
}

/// The messages of which every try failed.
fn pick_failed(told: &Told, rng: &mut Rng) -> Option<(usize, Stamp)> {
    let is_failed = |record: &Record| {
        let stamp = record
            .entry
            .stamp
            .filter(|_| is(record, Operation::Publish, Phase::Fail));
        stamp.is_some_and(|stamp| places(told, stamp, 0, Operation::Publish).len() == 2)
    };
    let at = pick(told, rng, is_failed)?;
    Some((at, told.records[at].entry.stamp?))
}

fn fail_becomes_ok(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let (at, _) = pick_failed(told, rng)?;
    told.records[at].phase = Phase::Ok;
    Some(())
}

fn effect_of_failed(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let (_, stamp) = pick_failed(told, rng)?;
    told.effects.push(effect_of(stamp, RUN, u64::MAX));
    Some(())
}

fn effect_of_other_run(told: &mut Told, _: &mut Rng) -> Option<()> {
    let stamp = Stamp::new(0, 0, 0);
    told.effects
        .push(effect_of(stamp, RunId(RUN.0 + 1), u64::MAX));
    Some(())
}

fn mixed_up_effect(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let at = rng.usize(0..told.effects.len());
    told.effects[at].key_seq += 1;
    Some(())
}

fn change_payload(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let carries = |one: &Record| one.entry.checksum != 0 && is(one, Operation::Deliver, Phase::Ok);
    let at = pick(told, rng, carries)?;
    told.records[at].entry.checksum ^= 1 << rng.u32(0..10);
    told.records[at].entry.checksum |= 1 << 20;
    Some(())
}

fn ok_becomes_fail(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let at = pick(told, rng, |one| {
        let stamp = one
            .entry
            .stamp
            .filter(|_| is(one, Operation::Publish, Phase::Ok));
        stamp.is_some_and(|stamp| is_certain(told, stamp))
    })?;
    told.records[at].phase = Phase::Fail;
    Some(())
}

fn deliver_early(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let (at, stamp) = pick_effect(told, rng)?;
    let group = told.effects[at].group;
    let delivery = *places(told, stamp, group, Operation::Deliver).first()?;
    let publish = *places(told, stamp, 0, Operation::Publish).first()?;
    told.records[delivery].time = told.records[publish].time.checked_sub(1)?;
    Some(())
}

fn roll_back(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let at = pick(told, rng, |one| is(one, Operation::Commit, Phase::Ok))?;
    told.records[at].phase = Phase::Fail;
    Some(())
}

/// Two effects of a group and key, the first of which is certain.
fn swap_effects(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let (at, stamp) = pick_effect(told, rng)?;
    let before = told.effects[at];
    let is_later = |one: &Effect| {
        let is_of_key = one.id.origin().is_some_and(|(_, other)| {
            (other.producer, other.key) == (stamp.producer, stamp.key)
                && other.key_seq > stamp.key_seq
        });
        is_of_key && one.group == before.group && one.order > before.order
    };
    let later = told.effects.iter().position(is_later)?;
    told.effects[at].order = told.effects[later].order;
    told.effects[later].order = before.order;
    Some(())
}

/// Two deliveries of a group and key, each the only one, the first of a message that is certain.
fn swap_deliveries(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let (at, stamp) = pick_effect(told, rng)?;
    let group = told.effects[at].group;
    let [first] = places(told, stamp, group, Operation::Deliver)[..] else {
        return None;
    };
    let next = Stamp::new(stamp.producer, stamp.key, stamp.key_seq + 1);
    let [second] = places(told, next, group, Operation::Deliver)[..] else {
        return None;
    };
    let (one, other) = (told.records[first].time, told.records[second].time);
    if one >= other {
        return None;
    }
    told.records[first].time = other + 1;
    told.records[second].time = one;
    Some(())
}

fn drop_last_probe(told: &mut Told, _: &mut Rng) -> Option<()> {
    let passed = |one: &Record| is(one, Operation::Probe, Phase::Ok);
    let last = told.records.iter().rposition(passed)?;
    told.records.remove(last);
    Some(())
}

fn leave_lag(told: &mut Told, _: &mut Rng) -> Option<()> {
    let sampled = |one: &Record| is(one, Operation::Sample, Phase::Ok);
    let last = told.records.iter().rposition(sampled)?;
    told.records[last].entry.position = Some(1);
    Some(())
}

fn hand_out_often(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let begins = |one: &&Record| is(one, Operation::FaultBegin, Phase::Ok);
    let faults = told.records.iter().filter(begins).count();
    let at = pick(told, rng, |one| is(one, Operation::Deliver, Phase::Ok))?;
    // Each fault explains three, and an operator or a second try one more.
    let again = told.records[at];
    told.records.extend(vec![again; 3 * faults + 10]);
    Some(())
}

fn attempt_more(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let at = pick(told, rng, |one| is(one, Operation::Handle, Phase::Invoke))?;
    told.records[at].entry.attempt = 4;
    Some(())
}

fn forget_stored(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let (_, stamp) = pick_effect(told, rng)?;
    if GROUPS.iter().any(|group| is_excused(told, stamp, *group)) {
        return None;
    }
    let stored =
        |one: &Record| one.entry.stamp == Some(stamp) && one.entry.operation == Operation::Stored;
    told.records.retain(|one| !stored(one));
    Some(())
}

fn same_position(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let at = pick(told, rng, |one| is(one, Operation::Stored, Phase::Ok))?;
    let mut other = told.records[at].entry;
    let stamp = other.stamp?;
    other.stamp = Some(Stamp::new(stamp.producer, stamp.key, stamp.key_seq + 1));
    told.records[at].entry = other;
    Some(())
}

/// A try with an unknown outcome that its caller was told of.
fn pick_unknown(told: &Told, rng: &mut Rng) -> Option<usize> {
    pick(told, rng, |one| is(one, Operation::Publish, Phase::Unknown))
}

fn unknown_becomes_ok(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let at = pick_unknown(told, rng)?;
    told.records[at].phase = Phase::Ok;
    Some(())
}

fn unknown_becomes_fail(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let at = pick_unknown(told, rng)?;
    told.records[at].phase = Phase::Fail;
    Some(())
}

fn settle_early(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let (at, stamp) = pick_effect(told, rng)?;
    let group = told.effects[at].group;
    let handles = places(told, stamp, group, Operation::Handle);
    let settle = *places(told, stamp, group, Operation::Settle).first()?;
    let begun = told.records[*handles.first()?].time;
    told.records[settle].time = begun.checked_sub(1)?;
    Some(())
}

fn deliver_after_drain(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let done = pick(told, rng, |one| is(one, Operation::Drain, Phase::Ok))?;
    let done = told.records[done];
    let of = |one: &Record| {
        one.entry.group == done.entry.group && is(one, Operation::Deliver, Phase::Ok)
    };
    let at = pick(told, rng, |one| of(one) && one.process == done.process)?;
    let mut late = told.records[at];
    late.time = told.records.last()?.time + 1;
    told.records.push(late);
    Some(())
}

fn leave_running(told: &mut Told, rng: &mut Rng) -> Option<()> {
    let done = pick(told, rng, |one| is(one, Operation::Drain, Phase::Ok))?;
    let done = told.records[done];
    let mut records = told.records.iter();
    let last = records
        .rposition(|one| one.process == done.process && one.entry.operation == Operation::Handle)?;
    let ended = &mut told.records[last];
    if ended.phase != Phase::Ok || ended.time >= done.time {
        return None;
    }
    ended.time = done.time + 1;
    Some(())
}

#[test]
fn a_fault_that_nobody_named_is_another_one() {
    let mut entry = Entry::fault(Operation::FaultBegin, Fault::Kill, 1);
    entry.detail = 60_000;
    assert_eq!(Fault::of(&entry), Fault::Other);
}
