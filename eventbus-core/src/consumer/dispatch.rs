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

/// A handler whose event type is known only inside.
pub(crate) trait ErasedHandler<S>: Send + Sync {
    fn event_type(&self) -> &'static str;
    fn batch_max(&self) -> Option<usize>;
    /// Allocates a place for one run of it at a time.
    fn place(&self) -> Box<dyn Place<S>>;
}

/// Where the futures of one handler run, one after another, without allocating.
pub(crate) trait Place<S>: Send {
    /// Puts a run there, to be polled.
    fn start(&mut self, request: Request, state: &Arc<S>);
    fn poll(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), BoxError>>;
}

/// The place of a handler whose futures are `F`.
struct Reused<C, F> {
    /// Makes the future that reads the events and calls the handler.
    call: C,
    future: Pin<Box<Option<F>>>,
}

impl<C, F> Reused<C, F> {
    fn boxed<S>(call: C) -> Box<dyn Place<S>>
    where
        C: Fn(Request, &Arc<S>) -> F + Send + 'static,
        F: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        let future = Box::pin(None);
        Box::new(Self { call, future })
    }
}

impl<S, C, F> Place<S> for Reused<C, F>
where
    C: Fn(Request, &Arc<S>) -> F + Send,
    F: Future<Output = Result<(), BoxError>> + Send,
{
    fn start(&mut self, request: Request, state: &Arc<S>) {
        self.future.set(Some((self.call)(request, state)));
    }

    fn poll(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), BoxError>> {
        let Some(future) = self.future.as_mut().as_pin_mut() else {
            return Poll::Ready(Err("a finished handler was polled again".into()));
        };
        let result = future.poll(cx);
        if result.is_ready() {
            self.future.set(None);
        }
        result
    }
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

    fn place(&self) -> Box<dyn Place<S>> {
        let handler = Arc::clone(&self.handler);
        Reused::boxed(move |request: Request, state: &Arc<S>| {
            let (handler, state) = (Arc::clone(&handler), Arc::clone(state));
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

    fn place(&self) -> Box<dyn Place<S>> {
        let handler = Arc::clone(&self.handler);
        Reused::boxed(move |request: Request, state: &Arc<S>| {
            let (handler, state) = (Arc::clone(&handler), Arc::clone(state));
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
pub struct Dispatch<S>(Arc<Handlers<S>>);

struct Handlers<S> {
    handlers: Vec<Registered<S>>,
    state: Arc<S>,
}

struct Registered<S> {
    handler: Arc<dyn ErasedHandler<S>>,
    /// Places that no run is in; as many as ever ran at once.
    idle: Mutex<Vec<Box<dyn Place<S>>>>,
}

impl<S> Registered<S> {
    fn idle(&self) -> MutexGuard<'_, Vec<Box<dyn Place<S>>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> Dispatch<S> {
    pub(crate) fn new(handlers: Vec<Arc<dyn ErasedHandler<S>>>, state: Arc<S>) -> Self {
        let register = |handler| Registered {
            handler,
            idle: Mutex::new(Vec::new()),
        };
        Self(Arc::new(Handlers {
            handlers: handlers.into_iter().map(register).collect(),
            state,
        }))
    }
}

impl<S> Clone for Dispatch<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S> fmt::Debug for Dispatch<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(
                self.0
                    .handlers
                    .iter()
                    .map(|registered| registered.handler.event_type()),
            )
            .finish()
    }
}

impl<S: Send + Sync + 'static> Service<Request> for Dispatch<S> {
    type Response = ();
    type Error = BoxError;
    type Future = DispatchFuture<S>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, request: Request) -> DispatchFuture<S> {
        let handler = request
            .first()
            .route()
            .expect("a run begins only for a routed message")
            .handler;
        let registered = &self.0.handlers[handler];
        let idle = registered.idle().pop();
        let mut place = idle.unwrap_or_else(|| registered.handler.place());
        place.start(request, &self.0.state);
        DispatchFuture {
            place: Some(place),
            handler,
            handlers: Arc::clone(&self.0),
        }
    }
}

/// A handler while it runs. Dropping it drops the handler's future.
pub struct DispatchFuture<S> {
    /// Given back, to be used again, when the handler has ended.
    place: Option<Box<dyn Place<S>>>,
    handler: usize,
    handlers: Arc<Handlers<S>>,
}

impl<S> fmt::Debug for DispatchFuture<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DispatchFuture").finish_non_exhaustive()
    }
}

impl<S> Future for DispatchFuture<S> {
    type Output = Result<(), BoxError>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let Some(place) = &mut self.place else {
            return Poll::Ready(Err("a finished handler was polled again".into()));
        };
        let result = place.poll(cx);
        if result.is_ready()
            && let Some(place) = self.place.take()
        {
            self.handlers.handlers[self.handler].idle().push(place);
        }
        result
    }
}
