//! The innermost service: decodes a message and runs its handler, without allocating per message.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context as TaskContext, Poll};

use tower::Service;

use super::scope::Scope;
use crate::context::Context;
use crate::error::BoxError;
use crate::event::Event;
use crate::handler::{BatchHandler, BatchItem, Handler};
use crate::message::{Key, Topic};
use crate::unit_of_work::{NoUnit, Unit};

/// One run of a handler, as layers see it: one delivery, or several for a batch handler.
#[derive(Debug)]
pub struct Request {
    deliveries: Deliveries,
}

#[derive(Debug)]
enum Deliveries {
    One(Arc<Scope>),
    Batch(Vec<Arc<Scope>>),
}

impl Request {
    #[inline]
    pub(crate) fn one(scope: Arc<Scope>) -> Self {
        Self {
            deliveries: Deliveries::One(scope),
        }
    }

    pub(crate) fn batch(scopes: Vec<Arc<Scope>>) -> Self {
        Self {
            deliveries: Deliveries::Batch(scopes),
        }
    }

    #[inline]
    fn into_first(self) -> Arc<Scope> {
        match self.deliveries {
            Deliveries::One(scope) => scope,
            Deliveries::Batch(mut scopes) => scopes.swap_remove(0),
        }
    }

    #[inline]
    fn first(&self) -> &Arc<Scope> {
        match &self.deliveries {
            Deliveries::One(scope) => scope,
            Deliveries::Batch(scopes) => &scopes[0],
        }
    }

    /// How many deliveries the run handles.
    #[allow(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        match &self.deliveries {
            Deliveries::One(_) => 1,
            Deliveries::Batch(scopes) => scopes.len(),
        }
    }

    /// The topic of the first delivery.
    pub fn topic(&self) -> &Topic {
        &self.first().message().topic
    }

    /// The key of the first delivery.
    pub fn key(&self) -> Option<&Key> {
        self.first().message().key.as_ref()
    }

    /// The attempt at the first delivery, from 1 on.
    pub fn attempt(&self) -> u32 {
        self.first().attempt()
    }
}

/// A consumer's layers, down to its handlers.
pub(crate) trait Layers:
    Service<Request, Response = (), Error: Into<BoxError>, Future: Send> + Clone + Send + 'static
{
}

impl<V> Layers for V where
    V: Service<Request, Response = (), Error: Into<BoxError>, Future: Send>
        + Clone
        + Send
        + 'static
{
}

/// A handler whose event type is known only inside.
pub(crate) trait ErasedHandler<S>: Send + Sync {
    fn event_type(&self) -> &'static str;
    fn batch_max(&self) -> Option<usize>;
    /// Allocates a place for one run of it at a time.
    fn place(&self, state: &Arc<S>) -> SharedPlace;
}

/// Where the futures of one handler run, one after another, without allocating.
trait Place: Send {
    /// Starts a run where there is a request, and polls it.
    fn poll(
        &mut self,
        request: Option<Request>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Result<(), BoxError>>;
    /// Drops the run that is there.
    fn clear(&mut self);
}

/// A place as its service and the run in it share it; never waited for.
#[derive(Clone)]
pub(crate) struct SharedPlace(Arc<Mutex<dyn Place>>);

impl SharedPlace {
    /// A place for the futures that `call` makes, which read the events and call the handler.
    fn new<C, F>(call: C) -> Self
    where
        C: Fn(Request) -> F + Send + 'static,
        F: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        let future = Box::pin(None);
        Self(Arc::new(Mutex::new(Reused { call, future })))
    }

    /// Whether no run is in it.
    #[inline]
    fn is_idle(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    #[inline]
    fn lock(&self) -> MutexGuard<'_, dyn Place + 'static> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of a handler whose futures are `F`.
struct Reused<C, F> {
    call: C,
    future: Pin<Box<Option<F>>>,
}

impl<C, F> Place for Reused<C, F>
where
    C: Fn(Request) -> F + Send,
    F: Future<Output = Result<(), BoxError>> + Send,
{
    fn poll(
        &mut self,
        request: Option<Request>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Result<(), BoxError>> {
        if let Some(request) = request {
            self.future.set(Some((self.call)(request)));
        }
        let Some(future) = self.future.as_mut().as_pin_mut() else {
            return finished();
        };
        let result = future.poll(cx);
        if result.is_ready() {
            self.future.set(None);
        }
        result
    }

    fn clear(&mut self) {
        self.future.set(None);
    }
}

#[cold]
fn finished() -> Poll<Result<(), BoxError>> {
    Poll::Ready(Err("a finished handler was polled again".into()))
}

/// A handler of single events.
pub(crate) struct Single<E, H, U> {
    handler: Arc<H>,
    event: PhantomData<fn(E, U)>,
}

impl<E, H, U> Single<E, H, U> {
    pub(crate) fn new(handler: H) -> Self {
        Self {
            handler: Arc::new(handler),
            event: PhantomData,
        }
    }
}

impl<E, S, U, H> ErasedHandler<S> for Single<E, H, U>
where
    E: Event,
    S: Send + Sync + 'static,
    U: Unit,
    H: Handler<E, S, U>,
{
    fn event_type(&self) -> &'static str {
        E::TYPE
    }

    fn batch_max(&self) -> Option<usize> {
        None
    }

    fn place(&self, state: &Arc<S>) -> SharedPlace {
        let (handler, state) = (Arc::clone(&self.handler), Arc::clone(state));
        SharedPlace::new(move |request: Request| {
            let (handler, state) = (Arc::clone(&handler), Arc::clone(&state));
            // Several deliveries are only given to a batch handler.
            let scope = request.into_first();
            async move {
                match scope.decode::<E>() {
                    Ok(event) => handler.handle(event, Context::new(scope, state)).await,
                    Err(error) => {
                        scope.reject(error);
                        Ok(())
                    }
                }
            }
        })
    }
}

/// A handler of several events at once.
pub(crate) struct Batch<E, H> {
    handler: Arc<H>,
    batch_max: usize,
    event: PhantomData<fn(E)>,
}

impl<E, H> Batch<E, H> {
    pub(crate) fn new(handler: H, batch_max: usize) -> Self {
        Self {
            handler: Arc::new(handler),
            batch_max,
            event: PhantomData,
        }
    }
}

impl<E, S, H> ErasedHandler<S> for Batch<E, H>
where
    E: Event,
    S: Send + Sync + 'static,
    H: BatchHandler<E, S>,
{
    fn event_type(&self) -> &'static str {
        E::TYPE
    }

    fn batch_max(&self) -> Option<usize> {
        Some(self.batch_max)
    }

    fn place(&self, state: &Arc<S>) -> SharedPlace {
        let (handler, state) = (Arc::clone(&self.handler), Arc::clone(state));
        SharedPlace::new(move |request: Request| {
            let (handler, state) = (Arc::clone(&handler), Arc::clone(&state));
            async move {
                let scopes = match request.deliveries {
                    Deliveries::One(scope) => vec![scope],
                    Deliveries::Batch(scopes) => scopes,
                };
                let mut items = Vec::with_capacity(scopes.len());
                for scope in scopes {
                    match scope.decode::<E>() {
                        Ok(event) => items.push(BatchItem::<E, S>::new(
                            event,
                            Context::<S, NoUnit>::new(scope, Arc::clone(&state)),
                        )),
                        Err(error) => scope.reject(error),
                    }
                }
                match items.is_empty() {
                    true => Ok(()),
                    false => handler.handle(items).await,
                }
            }
        })
    }
}

/// The service at the bottom of a consumer's layers.
pub struct Dispatch<S> {
    handlers: Arc<[Arc<dyn ErasedHandler<S>>]>,
    state: Arc<S>,
    /// By handler, where the runs of this clone are; made when the first one begins.
    places: Vec<Option<SharedPlace>>,
}

impl<S> Dispatch<S> {
    pub(crate) fn new(handlers: Vec<Arc<dyn ErasedHandler<S>>>, state: Arc<S>) -> Self {
        Self {
            places: handlers.iter().map(|_| None).collect(),
            handlers: handlers.into(),
            state,
        }
    }

    #[inline]
    fn place(&mut self, handler: usize) -> SharedPlace {
        match &self.places[handler] {
            Some(place) if place.is_idle() => place.clone(),
            _ => self.new_place(handler),
        }
    }

    /// A first place, or another one where a layer lets two runs of one clone overlap.
    #[cold]
    fn new_place(&mut self, handler: usize) -> SharedPlace {
        let place = self.handlers[handler].place(&self.state);
        self.places[handler].insert(place).clone()
    }
}

impl<S> Clone for Dispatch<S> {
    /// Another service with places of its own.
    fn clone(&self) -> Self {
        Self {
            handlers: Arc::clone(&self.handlers),
            state: Arc::clone(&self.state),
            places: self.places.iter().map(|_| None).collect(),
        }
    }
}

impl<S> fmt::Debug for Dispatch<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let event_types = self.handlers.iter().map(|handler| handler.event_type());
        f.debug_list().entries(event_types).finish()
    }
}

impl<S: Send + Sync + 'static> Service<Request> for Dispatch<S> {
    type Response = ();
    type Error = BoxError;
    type Future = DispatchFuture;

    #[inline]
    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    #[inline(always)]
    fn call(&mut self, request: Request) -> DispatchFuture {
        let handler = request
            .first()
            .route()
            .expect("a run begins only for a routed message")
            .handler;
        DispatchFuture {
            place: Some(self.place(handler)),
            request: Some(request),
        }
    }
}

/// A handler while it runs. Dropping it drops the handler's future.
pub struct DispatchFuture {
    /// None when the handler has ended.
    place: Option<SharedPlace>,
    /// What to start with the first poll.
    request: Option<Request>,
}

impl fmt::Debug for DispatchFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DispatchFuture").finish_non_exhaustive()
    }
}

impl Future for DispatchFuture {
    type Output = Result<(), BoxError>;

    #[inline(always)]
    fn poll(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let Some(place) = &this.place else {
            return finished();
        };
        let result = place.lock().poll(this.request.take(), cx);
        if result.is_ready() {
            this.place = None;
        }
        result
    }
}

impl Drop for DispatchFuture {
    #[inline(always)]
    fn drop(&mut self) {
        if let Some(place) = &self.place {
            place.lock().clear();
        }
    }
}
