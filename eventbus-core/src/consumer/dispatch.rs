//! The innermost service: decodes a message and runs its handler, without allocating per message.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as TaskContext, Poll};

use tokio_util::sync::ReusableBoxFuture;
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

type HandlerFuture = ReusableBoxFuture<'static, Result<(), BoxError>>;

/// A handler whose event type is known only inside.
pub(crate) trait ErasedHandler<S>: Send + Sync {
    fn event_type(&self) -> &'static str;
    fn batch_max(&self) -> Option<usize>;
    fn start(&self, request: Request, state: &Arc<S>, future: &mut HandlerFuture);
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

    fn start(&self, request: Request, state: &Arc<S>, future: &mut HandlerFuture) {
        let handler = Arc::clone(&self.handler);
        let state = Arc::clone(state);
        future.set(async move {
            let Deliveries::One(scope) = request.deliveries else {
                return Err("a batch was given to a handler of single events".into());
            };
            match scope.decode::<E>() {
                Ok(event) => handler.handle(event, Context::new(scope, state)).await,
                Err(error) => {
                    scope.reject(error);
                    Ok(())
                }
            }
        });
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

    fn start(&self, request: Request, state: &Arc<S>, future: &mut HandlerFuture) {
        let handler = Arc::clone(&self.handler);
        let state = Arc::clone(state);
        future.set(async move {
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
        });
    }
}

/// The service at the bottom of a consumer's layers.
pub struct Dispatch<S>(Arc<Handlers<S>>);

struct Handlers<S> {
    handlers: Vec<Arc<dyn ErasedHandler<S>>>,
    state: Arc<S>,
    idle: Mutex<Vec<HandlerFuture>>,
}

impl<S> Dispatch<S> {
    pub(crate) fn new(handlers: Vec<Arc<dyn ErasedHandler<S>>>, state: Arc<S>) -> Self {
        Self(Arc::new(Handlers {
            handlers,
            state,
            idle: Mutex::new(Vec::new()),
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
            .entries(self.0.handlers.iter().map(|handler| handler.event_type()))
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

    fn call(&mut self, request: Request) -> DispatchFuture<S> {
        let handler = request
            .first()
            .route()
            .expect("a run begins only for a routed message")
            .handler;
        let idle = {
            let mut idle = self.0.idle.lock().unwrap_or_else(PoisonError::into_inner);
            idle.pop()
        };
        let mut future = idle.unwrap_or_else(|| ReusableBoxFuture::new(std::future::ready(Ok(()))));
        self.0.handlers[handler].start(request, &self.0.state, &mut future);
        DispatchFuture {
            future: Some(future),
            handlers: Arc::clone(&self.0),
        }
    }
}

/// A handler while it runs. Dropping it drops the handler's future.
pub struct DispatchFuture<S> {
    /// Taken out, to be used again, when the handler has ended.
    future: Option<HandlerFuture>,
    handlers: Arc<Handlers<S>>,
}

impl<S> fmt::Debug for DispatchFuture<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DispatchFuture").finish_non_exhaustive()
    }
}

impl<S> Future for DispatchFuture<S> {
    type Output = Result<(), BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let Some(future) = &mut self.future else {
            return Poll::Ready(Err("a finished handler was polled again".into()));
        };
        let result = match future.poll(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(result) => result,
        };
        if let Some(future) = self.future.take() {
            let mut idle = self
                .handlers
                .idle
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            idle.push(future);
        }
        Poll::Ready(result)
    }
}
