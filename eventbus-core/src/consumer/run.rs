//! One run: a handler's attempt, what it published sent, or a dead letter stored. Never a verdict
//! before all of it is durable.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::{Span, trace};

use super::claims::{Claiming, Claims};
use super::dispatch::{Layers, Request};
use super::keys::Keep;
use super::scope::{Failure, Scope};
use crate::broker::PublishError;
use crate::dead_letter::{self, Cause, Diagnosis};
use crate::error::{BoxError, Error, ErrorKind};
use crate::header;
use crate::key_state::HeldMessage;
use crate::message::Message;
use crate::unit_of_work::{UnitOfWork, Work};

/// What a slot is asked to do.
#[derive(Debug)]
pub(crate) enum Run {
    /// Handle one delivery.
    Handle(Arc<Scope>),
    /// Handle several deliveries in one transaction or one call of a batch handler.
    Group(Vec<Arc<Scope>>),
    /// Send what a handler that succeeded has published.
    Publish(Arc<Scope>, Vec<Message>),
    /// Store a dead letter.
    DeadLetter(Arc<Scope>, Arc<Diagnosis>),
    /// Put a message aside, or take it back.
    Keep(Arc<Scope>, Arc<Keep>),
}

/// What became of a [`Run`]: that it went well fits a register, everything else is boxed.
#[derive(Debug)]
pub(crate) enum Ended {
    /// One delivery was handled: settle it.
    Done,
    Otherwise(Box<Ending>),
}

impl From<Ending> for Ended {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::One(Outcome::Done) => Self::Done,
            ending => Self::Otherwise(Box::new(ending)),
        }
    }
}

/// What became of a [`Run`] in full.
#[derive(Debug)]
pub(crate) enum Ending {
    One(Outcome),
    /// One a delivery of the group, in its order.
    Each(Vec<Outcome>),
    /// The group as a whole failed or was not possible: repeat it one delivery at a time.
    Split,
}

/// What became of one delivery.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Handled: settle it.
    Done,
    /// Handled, and the commit of its transaction held its position: nothing is left to settle.
    Settled,
    /// Handled before by this group: settle it.
    Duplicate,
    /// The dead letter is stored: settle it.
    DeadLettered,
    /// The store of held keys has done what it was to do, and says what is first of the name now.
    Kept(Option<HeldMessage>),
    /// The store of held keys takes no more.
    Full(Error),
    /// The right to write into the store of held keys is gone; it is claimed anew.
    Fenced,
    /// The attempt failed.
    Failed(Cause),
    /// Something the attempt needs is away: no attempt is counted.
    Unavailable(BoxError),
    /// Handled, but what it published was not sent: send that, do not handle again.
    Unpublished(Vec<Message>, PublishError),
    /// Handled; what it published waits for that of an older delivery of its key.
    Unsent(Vec<Message>),
    /// Handled, and what it published is sent, but not marked as handled: mark it, no more.
    Unmarked(Error),
    /// Somebody else of the group is at the same event: ask again after this time.
    Busy(Duration),
}

/// Does one [`Run`] after another with a clone of the consumer's layers that is its own, so that
/// the run most deliveries need is neither moved nor allocated.
pub(crate) struct Runner<V: Layers> {
    service: V,
    /// What is handled by a call of the layers.
    scope: Option<Arc<Scope>>,
    /// That call; none while the layers are not ready for it.
    call: Pin<Box<Option<V::Future>>>,
    /// What is rare, or expensive anyway.
    other: Option<Pin<Box<dyn Future<Output = Ending> + Send>>>,
    span: Option<Span>,
}

impl<V: Layers> fmt::Debug for Runner<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runner").finish_non_exhaustive()
    }
}

impl<V: Layers> Runner<V> {
    pub(crate) fn new(service: V) -> Self {
        Self {
            service,
            scope: None,
            call: Box::pin(None),
            other: None,
            span: None,
        }
    }

    /// Takes a run, to be polled; the one before has ended or was dropped.
    #[inline(always)]
    pub(crate) fn start(&mut self, run: Run) {
        match run {
            Run::Handle(scope) => {
                self.span = process_span(&scope);
                let runtime = scope.runtime();
                match (&runtime.unit, &runtime.claims) {
                    (None, None) => self.scope = Some(scope),
                    (Some(unit), _) => {
                        let (service, unit) = (self.service.clone(), Arc::clone(unit));
                        self.other = Some(Box::pin(handle_in_unit(service, unit, scope)));
                    }
                    (None, Some(claims)) => {
                        let (service, claims) = (self.service.clone(), Arc::clone(claims));
                        self.other = Some(Box::pin(handle_claimed(service, claims, scope)));
                    }
                }
            }
            Run::Group(scopes) => {
                self.span = process_span(&scopes[0]);
                let service = self.service.clone();
                self.other = Some(Box::pin(handle_group(service, scopes)));
            }
            Run::Publish(scope, messages) => {
                let publishing = async move {
                    Ending::One(match publish(&scope, messages).await {
                        Outcome::Done => mark_handled(&scope).await,
                        outcome => outcome,
                    })
                };
                self.other = Some(Box::pin(publishing));
            }
            Run::DeadLetter(scope, diagnosis) => {
                let storing = async move { Ending::One(store(&scope, &diagnosis).await) };
                self.other = Some(Box::pin(storing));
            }
            Run::Keep(scope, keep) => {
                let keeping = async move { Ending::One(self::keep(&scope, &keep).await) };
                self.other = Some(Box::pin(keeping));
            }
        }
    }

    /// Goes on with the run; pending when there is none.
    #[inline]
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        let entered = self.span.as_ref().map(Span::enter);
        if let Some(scope) = &self.scope
            && self.call.is_none()
        {
            match ready!(self.service.poll_ready(cx)) {
                Ok(()) => {
                    let request = Request::one(Arc::clone(scope));
                    self.call.set(Some(self.service.call(request)));
                }
                Err(error) => {
                    let result = Err(error.into());
                    self.other = self.scope.take().map(|scope| concluding(scope, result));
                    self.service = self.service.clone();
                }
            }
        }
        if let Some(call) = self.call.as_mut().as_pin_mut() {
            let result = ready!(call.poll(cx));
            self.call.set(None);
            let scope = self.scope.take();
            let scope = scope.expect("a call is for a scope");
            match result {
                Ok(()) if !scope.is_touched() && !is_kept(&scope) => {
                    drop(entered);
                    if self.span.is_some() {
                        handler_ended();
                        self.span = None;
                    }
                    return Poll::Ready(Ended::Done);
                }
                result => {
                    handler_ended();
                    self.other = Some(concluding(scope, result.map_err(Into::into)));
                }
            }
        }
        let Some(other) = &mut self.other else {
            return Poll::Pending;
        };
        let ending = ready!(other.as_mut().poll(cx));
        self.other = None;
        drop(entered);
        self.span = None;
        Poll::Ready(ending.into())
    }

    /// Drops the run there is. Its layers are made anew, since one may have reserved something for it.
    pub(crate) fn clear(&mut self) {
        let entered = self.span.as_ref().map(Span::enter);
        self.service = self.service.clone();
        self.scope = None;
        self.other = None;
        self.call.set(None);
        drop(entered);
        self.span = None;
    }
}

#[cold]
fn concluding(
    scope: Arc<Scope>,
    result: Result<(), BoxError>,
) -> Pin<Box<dyn Future<Output = Ending> + Send>> {
    Box::pin(async move { Ending::One(conclude(&scope, result).await) })
}

/// The span of a run, after OpenTelemetry's messaging conventions, if anybody may listen.
#[inline]
fn process_span(scope: &Scope) -> Option<Span> {
    (LevelFilter::current() >= LevelFilter::INFO).then(|| begin_span(scope))
}

#[cold]
fn begin_span(scope: &Scope) -> Span {
    trace!(target: "eventbus::step", step = "handle.before");
    let message = scope.message();
    tracing::info_span!(
        "process",
        otel.name = format_args!("process {}", message.topic),
        otel.kind = "consumer",
        messaging.system = scope.runtime().bus.capabilities().system,
        messaging.operation.name = "process",
        messaging.operation.type = "process",
        messaging.destination.name = message.topic.as_str(),
        messaging.destination.partition.id = scope.partition(),
        messaging.consumer.group.name = scope.group().as_str(),
        messaging.message.id = %scope.id(),
        messaging.message.conversation_id = message.headers.get_str(crate::header::CORRELATION_ID),
        attempt = scope.attempt(),
    )
}

/// Says that a handler ended; called only where somebody may listen or the message costs more anyway.
#[cold]
fn handler_ended() {
    trace!(target: "eventbus::step", step = "handle.after");
}

async fn call<V: Layers>(service: &mut V, request: Request) -> Result<(), BoxError> {
    poll_fn(|cx| service.poll_ready(cx))
        .await
        .map_err(Into::into)?;
    let result = service.call(request).await;
    handler_ended();
    result.map_err(Into::into)
}

/// Whether a context outlives its handler: the worker and the run hold the scope, nobody else should.
#[inline]
fn is_kept(scope: &Arc<Scope>) -> bool {
    Arc::strong_count(scope) > 2
}

/// What the handler's own code met, before its result is looked at.
fn failure(scope: &Arc<Scope>, result: Result<(), BoxError>) -> Result<(), Cause> {
    if is_kept(scope) {
        scope.end();
    }
    match (scope.take_failure(), result) {
        (Some(Failure::Undecodable(error)), _) => Err(Cause::Undecodable(error)),
        (Some(Failure::Item(error)), _) | (None, Err(error)) => Err(Cause::Error(error)),
        (None, Ok(())) => Ok(()),
    }
}

async fn handle_in_unit<V: Layers>(
    mut service: V,
    unit: Arc<dyn UnitOfWork>,
    scope: Arc<Scope>,
) -> Ending {
    let scopes = std::slice::from_ref(&scope);
    Ending::One(match in_transaction(&mut service, &unit, scopes).await {
        Transaction::Committed(mut outcomes) => outcomes.pop().unwrap_or(Outcome::Done),
        Transaction::Failed(cause) => Outcome::Failed(cause),
        Transaction::Unavailable(error) => Outcome::Unavailable(error),
    })
}

/// Handles a delivery once its event is claimed, and marks it as handled when what the handler
/// published is sent.
async fn handle_claimed<V: Layers>(
    mut service: V,
    claims: Arc<Claims>,
    scope: Arc<Scope>,
) -> Ending {
    scope.set_awaits_others(true);
    match claims.claim(scope.id()).await {
        Ok(Claiming::Granted(claimed)) => scope.set_claimed(claimed),
        Ok(Claiming::Handled) => return Ending::One(Outcome::Duplicate),
        Ok(Claiming::Busy(free_in)) => return Ending::One(Outcome::Busy(free_in)),
        // Whatever the reason, no handler has run that could have failed.
        Err(error) => return Ending::One(Outcome::Unavailable(error.into())),
    }
    scope.set_awaits_others(false);
    let result = call(&mut service, Request::one(Arc::clone(&scope))).await;
    Ending::One(match conclude(&scope, result).await {
        Outcome::Done => mark_handled(&scope).await,
        Outcome::Failed(cause) => {
            scope.give_up_claim();
            Outcome::Failed(cause)
        }
        outcome => outcome,
    })
}

/// Marks the event of a delivery as handled, where it was claimed.
async fn mark_handled(scope: &Scope) -> Outcome {
    let Some(claimed) = scope.claimed() else {
        return Outcome::Done;
    };
    scope.set_awaits_others(true);
    trace!(target: "eventbus::step", step = "mark_handled.before");
    let marked = claimed.mark_handled().await;
    trace!(target: "eventbus::step", step = "mark_handled.after");
    scope.set_awaits_others(false);
    match marked {
        Ok(()) => Outcome::Done,
        // Whatever the reason, nothing is settled before it is marked.
        Err(error) => Outcome::Unmarked(error),
    }
}

/// Sends what a handler that succeeded has published.
async fn conclude(scope: &Arc<Scope>, result: Result<(), BoxError>) -> Outcome {
    if let Err(cause) = failure(scope, result) {
        return Outcome::Failed(cause);
    }
    let mut outgoing = Vec::new();
    scope.take_outgoing(&mut outgoing);
    publish(scope, outgoing).await
}

async fn handle_group<V: Layers>(mut service: V, scopes: Vec<Arc<Scope>>) -> Ending {
    let Some(unit) = scopes[0].runtime().unit.clone() else {
        return handle_batch(&mut service, scopes).await;
    };
    match in_transaction(&mut service, &unit, &scopes).await {
        Transaction::Committed(outcomes) => Ending::Each(outcomes),
        Transaction::Failed(_) => Ending::Split,
        Transaction::Unavailable(error) => {
            let error = crate::error::error_chain(error.as_ref());
            let each = |_| Outcome::Unavailable(error.as_str().into());
            Ending::Each(scopes.iter().map(each).collect())
        }
    }
}

/// A transaction lent to a handler. When the handler panics or is dropped, it is rolled back then,
/// and not only when the delivery is tried again.
struct Loan<'a>(&'a Scope);

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        drop(self.0.reclaim_work());
    }
}

enum Transaction {
    Committed(Vec<Outcome>),
    Failed(Cause),
    Unavailable(BoxError),
}

/// Handles deliveries one after another in one transaction and commits it with what they published.
async fn in_transaction<V: Layers>(
    service: &mut V,
    unit: &Arc<dyn UnitOfWork>,
    scopes: &[Arc<Scope>],
) -> Transaction {
    let first = &scopes[0];
    first.set_awaits_others(true);
    let entries: Vec<_> = scopes.iter().map(|scope| scope.inbox_entry()).collect();
    let mut work: Box<dyn Work> = match unit.begin(first.group(), &entries).await {
        Ok(work) => work,
        Err(error) if error.is_retryable() => return Transaction::Unavailable(error.into()),
        Err(error) => return Transaction::Failed(Cause::Error(error.into())),
    };
    let duplicates: Vec<bool> = (0..scopes.len())
        .map(|index| work.is_duplicate(index))
        .collect();
    first.set_awaits_others(false);
    let mut outgoing = Vec::new();
    for (index, scope) in scopes.iter().enumerate() {
        if duplicates[index] {
            continue;
        }
        scope.lend_work(work);
        let loan = Loan(scope);
        let result = call(service, Request::one(Arc::clone(scope))).await;
        // Whatever happened, the transaction comes back or is gone: without it nothing commits.
        let returned = loan.0.reclaim_work();
        let failed = failure(scope, result).err();
        match (returned, failed) {
            (Some(returned), _) if returned.is_duplicate(index) => {
                first.set_awaits_others(true);
                return handled_elsewhere(returned, scopes.len()).await;
            }
            (Some(returned), None) => work = returned,
            (Some(returned), Some(cause)) => {
                first.set_awaits_others(true);
                let error = match &cause {
                    Cause::Error(error) => Some(error),
                    _ => None,
                };
                return match returned.roll_back(error).await {
                    Err(error) if error.is_retryable() => Transaction::Unavailable(error.into()),
                    _ => Transaction::Failed(cause),
                };
            }
            (None, Some(cause)) => return Transaction::Failed(cause),
            (None, None) => {
                return Transaction::Failed(Cause::Error(
                    "the handler kept its context beyond its end, so its transaction was rolled back: do not move `cx` into what outlives the handler, such as a spawned task".into(),
                ));
            }
        }
        scope.take_outgoing(&mut outgoing);
    }
    first.set_awaits_others(true);
    let committed = match work.commit(outgoing).await {
        Ok(committed) => committed,
        Err(error) if error.is_retryable() => return Transaction::Unavailable(error.into()),
        Err(error) => return Transaction::Failed(Cause::Error(error.into())),
    };
    let outcome = |duplicate: &bool| match (committed, duplicate) {
        (crate::unit_of_work::Committed::Settled, _) => Outcome::Settled,
        (_, true) => Outcome::Duplicate,
        (_, false) => Outcome::Done,
    };
    Transaction::Committed(duplicates.iter().map(outcome).collect())
}

/// Ends work on an event that somebody else has handled meanwhile; among several it is found to be
/// a duplicate when they are tried alone.
async fn handled_elsewhere(work: Box<dyn Work>, events: usize) -> Transaction {
    match work.roll_back(None).await {
        Err(error) if error.is_retryable() => Transaction::Unavailable(error.into()),
        _ if events > 1 => Transaction::Failed(Cause::Error("handled meanwhile".into())),
        _ => Transaction::Committed(vec![Outcome::Duplicate]),
    }
}

/// Gives several deliveries to a batch handler and sends what the good ones published.
async fn handle_batch<V: Layers>(service: &mut V, scopes: Vec<Arc<Scope>>) -> Ending {
    let result = call(service, Request::batch(scopes.clone())).await;
    if result.is_err() && scopes.len() > 1 {
        return Ending::Split;
    }
    let mut error = result.err();
    let mut outcomes = Vec::with_capacity(scopes.len());
    // Keys of which something is not done: nothing later of theirs is sent.
    let mut undone = Vec::new();
    for scope in &scopes {
        // An error of the whole call is left only for a batch of one.
        let result = error.take().map_or(Ok(()), Err);
        let key = scope.message().key.as_ref();
        let outcome = match failure(scope, result) {
            Err(cause) => Outcome::Failed(cause),
            Ok(()) => {
                let mut outgoing = Vec::new();
                scope.take_outgoing(&mut outgoing);
                match key.is_some() && undone.contains(&key) {
                    true => Outcome::Unsent(outgoing),
                    false => publish(scope, outgoing).await,
                }
            }
        };
        if !matches!(outcome, Outcome::Done) {
            undone.push(key);
        }
        outcomes.push(outcome);
    }
    Ending::Each(outcomes)
}

async fn publish(scope: &Scope, messages: Vec<Message>) -> Outcome {
    if messages.is_empty() {
        return Outcome::Done;
    }
    scope.set_awaits_others(true);
    let sent = scope.runtime().bus.send_in_time(messages).await;
    scope.set_awaits_others(false);
    match sent {
        Ok(()) => Outcome::Done,
        Err(error) if error.is_retryable() => {
            let messages = error
                .unpublished
                .iter()
                .map(|unpublished| unpublished.message.clone())
                .collect();
            Outcome::Unpublished(messages, error)
        }
        // As the SDK's own error, so that a retry policy's rules find it.
        Err(error) => Outcome::Failed(Cause::Error(Error::from(error).into())),
    }
}

async fn store(scope: &Scope, diagnosis: &Diagnosis) -> Outcome {
    let letter = match dead_letter::into_message(scope, diagnosis) {
        Ok(letter) => letter,
        Err(error) => return Outcome::Unavailable(error.into()),
    };
    trace!(target: "eventbus::step", step = "dead_letter.before");
    let sent = scope.runtime().bus.send(vec![letter]).await;
    trace!(target: "eventbus::step", step = "dead_letter.after");
    match sent {
        Ok(()) => {
            log_dead_letter(scope, diagnosis);
            Outcome::DeadLettered
        }
        // Whatever the reason, nothing is settled before the dead letter is stored.
        Err(error) => Outcome::Unavailable(error.into()),
    }
}

#[cold]
fn log_dead_letter(scope: &Scope, diagnosis: &Diagnosis) {
    tracing::error!(
        group = %scope.group(),
        letter_id = %dead_letter::id_of(scope),
        event_id = %scope.id(),
        event_type = scope.message().headers.get_str(header::TYPE),
        topic = scope.message().topic.as_str(),
        partition = scope.partition(),
        key = scope.message().key.as_ref().map(tracing::field::display),
        attempts = diagnosis.attempts,
        cause = %diagnosis.cause,
        "dead letter stored"
    );
}

/// Has the store of held keys do something.
async fn keep(scope: &Scope, keep: &Keep) -> Outcome {
    let lane = scope.lane();
    let Some(held) = &scope.runtime().held else {
        return Outcome::Fenced;
    };
    let Some(claim) = held.claim(lane) else {
        return Outcome::Fenced;
    };
    let store = &held.store;
    trace!(target: "eventbus::step", step = "park.before");
    let kept = match keep {
        Keep::Hold(entry) => store
            .hold(&claim, std::slice::from_ref(entry))
            .await
            .map(|()| None),
        Keep::Wait {
            name,
            wait,
            carried_out,
        } => store
            .wait(&claim, name, wait, *carried_out)
            .await
            .map(|()| None),
        Keep::Advance { name, number } => store.advance(&claim, name, Some(*number)).await,
    };
    trace!(target: "eventbus::step", step = "park.after");
    match kept {
        Ok(first) => Outcome::Kept(first),
        Err(error) if error.kind() == ErrorKind::Conflict => {
            held.reclaim(lane);
            Outcome::Fenced
        }
        Err(error) if error.kind() == ErrorKind::RateLimited => Outcome::Full(error),
        // Whatever the reason, nothing is settled before it is kept.
        Err(error) => Outcome::Unavailable(error.into()),
    }
}
