//! The thread that commits for a member.
//!
//! A commit of the client blocks until the coordinator answers, and librdkafka tells nobody what came
//! of one that is not waited for: its callback is not an event (librdkafka 2.12,
//! `rd_kafka_cgrp_propagate_commit_result`). It is no blocking task of the runtime, because one that
//! no broker answers would keep the runtime, and so the process, from ending.

use std::sync::{Arc, mpsc};

use eventbus_core::{Error, ErrorKind, Result};
use tokio::sync::oneshot;

use crate::lanes::Place;
use crate::subscriber::{Client, commit_watched};

/// What is committed, and where that is said.
struct Request {
    client: Arc<Client>,
    offsets: Vec<(Place, i64)>,
    answer: oneshot::Sender<Answer>,
}

type Answer = (Result<()>, Vec<(Place, i64)>);

/// Ends its thread when it is dropped and what was begun is answered.
#[derive(Debug)]
pub(crate) struct Committer {
    operation: &'static str,
    requests: mpsc::Sender<Request>,
}

impl Committer {
    /// Starts the thread.
    pub(crate) fn spawn(operation: &'static str) -> Result<Self> {
        let (requests, taken) = mpsc::channel::<Request>();
        let thread = std::thread::Builder::new().name("eventbus-commit".to_owned());
        let spawned = thread.spawn(move || {
            for request in taken {
                // Whoever asked has given up; what it settled goes with the next commit.
                if request.answer.is_closed() {
                    continue;
                }
                let done = commit_watched(operation, &request.client, &request.offsets);
                // Before the answer: who hears it may want to be the last who has the client.
                drop(request.client);
                // It may have given up meanwhile.
                let _ = request.answer.send((done, request.offsets));
            }
        });
        spawned.map_err(|error| {
            Error::new(ErrorKind::Internal, operation, "no thread can be started")
                .with_source(error)
        })?;
        Ok(Self {
            operation,
            requests,
        })
    }

    /// Commits, and waits for the coordinator's answer. Dropping the future leaves a commit that
    /// has begun to itself, and one that has not undone.
    pub(crate) async fn commit(
        &self,
        client: Arc<Client>,
        offsets: Vec<(Place, i64)>,
    ) -> Result<Answer> {
        let gone = || {
            Error::new(
                ErrorKind::Internal,
                self.operation,
                "the thread that commits has panicked",
            )
        };
        let (answer, answered) = oneshot::channel();
        let request = Request {
            client,
            offsets,
            answer,
        };
        self.requests.send(request).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())
    }
}
