//! Parts of a service that are stopped together: who runs, who failed, who is late.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;

use crate::error::{BoxError, Error, ErrorKind, Result, Retry};

#[derive(Debug)]
pub(super) struct Parts {
    service: Arc<str>,
    running: JoinSet<Result<(), BoxError>>,
    names: HashMap<Id, String>,
    /// Until when what runs has to end, once it has to.
    stop: watch::Sender<Option<Instant>>,
    may_end: bool,
}

impl Parts {
    /// Parts that fail when they end by themselves.
    pub(super) fn new(service: &Arc<str>) -> Self {
        Self {
            service: Arc::clone(service),
            running: JoinSet::new(),
            names: HashMap::new(),
            stop: watch::Sender::new(None),
            may_end: false,
        }
    }

    /// Parts that may be done before they are stopped.
    pub(super) fn that_may_end(service: &Arc<str>) -> Self {
        Self {
            may_end: true,
            ..Self::new(service)
        }
    }

    /// Resolves with the time until which a part has to end.
    pub(super) fn stopping(&self) -> impl Future<Output = Instant> + Send + use<> {
        let mut stop = self.stop.subscribe();
        async move {
            let told = stop.wait_for(Option::is_some).await;
            // Without a sender the service is gone, and its parts with it.
            told.ok()
                .and_then(|told| *told)
                .unwrap_or_else(Instant::now)
        }
    }

    pub(super) fn spawn(
        &mut self,
        name: String,
        part: impl Future<Output = Result<(), BoxError>> + Send + 'static,
    ) {
        let task = self.running.spawn(part);
        self.names.insert(task.id(), name);
    }

    /// Resolves with the first failure; never while all is well.
    ///
    /// # Cancellation
    ///
    /// Safe: a dropped future has passed no failure by.
    pub(super) async fn failed(&mut self) -> Error {
        while let Some(ended) = self.running.join_next_with_id().await {
            let (name, result) = self.ended(ended);
            match result {
                Err(error) => return error,
                Ok(()) if self.may_end => {}
                Ok(()) => {
                    return self.describe(
                        &name,
                        Error::new(
                            ErrorKind::Closed,
                            "run service",
                            "a part ended by itself: let it run until it is told to stop",
                        ),
                    );
                }
            }
        }
        std::future::pending().await
    }

    /// Tells all that they have until `until`, waits for them until `deadline`, and drops what is
    /// late.
    pub(super) async fn stop(
        &mut self,
        until: Instant,
        deadline: Instant,
        errors: &mut Vec<Error>,
    ) {
        self.stop.send_replace(Some(until));
        loop {
            let next = self.running.join_next_with_id();
            match tokio::time::timeout_at(deadline, next).await {
                Ok(None) => return,
                Ok(Some(ended)) => errors.extend(self.ended(ended).1.err()),
                Err(_) => break,
            }
        }
        let late = self.names.values().map(|name| {
            let error = Error::new(
                ErrorKind::Timeout,
                "stop service",
                "a part did not stop in time and was dropped: make it faster or raise `.deadline(…)`",
            );
            self.describe(name, error)
        });
        errors.extend(late);
        self.running.shutdown().await;
    }

    fn ended(
        &mut self,
        ended: Result<(Id, Result<(), BoxError>), JoinError>,
    ) -> (String, Result<()>) {
        let (id, result) = match ended {
            Ok((id, result)) => (id, result.map_err(into_error)),
            Err(panic) => (panic.id(), Err(panicked(panic))),
        };
        let name = self.names.remove(&id).unwrap_or_default();
        let result = result.map_err(|error| self.describe(&name, error));
        (name, result)
    }

    fn describe(&self, part: &str, error: Error) -> Error {
        error.with("service", &self.service).with("part", part)
    }
}

/// Keeps an error of the SDK as it is.
fn into_error(error: BoxError) -> Error {
    match error.downcast::<Error>() {
        Ok(error) => *error,
        Err(error) => Error::new(ErrorKind::Unavailable, "run service", "a part failed")
            .with_retry(Retry::Never)
            .with_source(error),
    }
}

fn panicked(panic: JoinError) -> Error {
    Error::new(ErrorKind::Internal, "run service", "a part panicked").with_source(panic)
}
