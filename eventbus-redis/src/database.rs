//! What the handles of one client share, and how its members read and settle.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use eventbus_core::log::{Advance, Log, Page, Place, TopicLanes, Wakes, Wanted};
use eventbus_core::{
    Error, ErrorKind, Lease, MemberId, Position, Result, Timestamp, Topic, TopicSpec,
};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::config::RedisConfig;
use crate::leases;
use crate::pages::{self, Pages};
use crate::server::Server;
use crate::topics::{self, Known, Streams};
use crate::writer::Writer;
use crate::{janitor, watch};

/// An open database of a server.
#[derive(Debug)]
pub(crate) struct Database {
    pub(crate) server: Server,
    pub(crate) config: RedisConfig,
    pub(crate) known: Known,
    pub(crate) wakes: Arc<Wakes>,
    pages: Pages,
    stale: AtomicU64,
}

/// A share of it; with the last one its tasks end.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub(crate) database: Arc<Database>,
    pub(crate) writer: Writer,
    tasks: Arc<Tasks>,
}

#[derive(Debug)]
struct Tasks([JoinHandle<()>; 3]);

impl Tasks {
    fn abort(&self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.abort();
    }
}

impl Shared {
    /// Connects and starts the tasks: one publishes, one hears of what others publish, one removes what
    /// every group has read.
    pub(crate) async fn open(config: RedisConfig) -> Result<Self> {
        let server = Server::connect(&config).await?;
        let wakes = Arc::new(Wakes::new());
        let (writer, writing) = Writer::new(server.clone(), &config, &wakes);
        let database = Arc::new(Database {
            server,
            config,
            known: Known::default(),
            wakes,
            pages: Pages::default(),
            stale: AtomicU64::new(0),
        });
        let tasks = [
            tokio::spawn(writing),
            tokio::spawn(watch::run(Arc::clone(&database))),
            tokio::spawn(janitor::run(Arc::clone(&database))),
        ];
        Ok(Self {
            database,
            writer,
            tasks: Arc::new(Tasks(tasks)),
        })
    }
}

impl Shared {
    /// Ends its tasks: what was not published by now is answered as unknown.
    pub(crate) fn end(&self) {
        self.tasks.abort();
    }
}

impl Database {
    pub(crate) fn count_stale(&self, settlements: u64) {
        self.stale.fetch_add(settlements, Ordering::Relaxed);
    }

    pub(crate) fn stale(&self) -> u64 {
        self.stale.load(Ordering::Relaxed)
    }

    /// The topic, created where it is missing.
    pub(crate) async fn meet_topic(
        &self,
        operation: &'static str,
        name: &Topic,
    ) -> Result<Arc<TopicLanes>> {
        topics::meet(&self.server, &self.config, &self.known, operation, name).await
    }

    /// A topic that is there.
    pub(crate) async fn expect_topic(
        &self,
        operation: &'static str,
        name: &Topic,
    ) -> Result<Arc<TopicLanes>> {
        topics::expect(&self.server, &self.known, operation, name).await
    }

    /// Creates what is missing; tells what there is, and whether it was created just now.
    pub(crate) async fn apply_topic(
        &self,
        operation: &'static str,
        spec: &TopicSpec,
    ) -> Result<(topics::StoredTopic, bool)> {
        topics::create(&self.server, &self.config, operation, spec).await
    }

    /// The streams that a row is one of, and which.
    pub(crate) fn streams(&self, operation: &'static str, row: u32) -> Result<(Streams, u32)> {
        self.known.streams(row).ok_or_else(|| {
            let message = "a row of no topic was asked for";
            Error::new(ErrorKind::Internal, operation, message)
        })
    }
}

impl Log for Shared {
    const PAGES_MAX: usize = 16;

    fn wakes(&self) -> &Wakes {
        &self.database.wakes
    }

    async fn read_pages(&self, wanted: &[Wanted]) -> Result<Vec<Page>> {
        let Database {
            server,
            wakes,
            pages,
            ..
        } = &*self.database;
        pages.read(server, wakes, wanted).await
    }

    async fn ends_at(&self, lanes: &[u32], time: Timestamp) -> Result<Vec<Position>> {
        const READ: &str = "read messages";
        let database = &self.database;
        // Ids are made of the server's date and never fall, so that it says when the end is.
        loop {
            let now = database.server.now(READ).await?;
            if now >= time {
                break;
            }
            tokio::time::sleep(time.since(now)).await;
        }
        let mut ends = Vec::with_capacity(lanes.len());
        for lane in lanes {
            let (streams, partition) = database.streams(READ, *lane)?;
            let stream = &streams.keys[partition as usize];
            ends.push(pages::at_time(&database.server, READ, stream, time).await?);
        }
        Ok(ends)
    }

    async fn open_places(
        &self,
        group: i64,
        leases: &[Lease],
        notify: &Arc<Notify>,
    ) -> Result<Vec<Place>> {
        self.database.places(group, leases, notify).await
    }

    async fn settle(&self, advances: Vec<Advance>) -> Result<()> {
        self.database.advance(&advances).await
    }

    fn count_stale(&self, settlements: u64) {
        self.database.count_stale(settlements);
    }

    async fn leave(&self, group: i64, member: MemberId) -> Result<()> {
        match self.database.known.group_name(group) {
            Some(group) => leases::leave(&self.database.server, &group, member).await,
            None => Ok(()),
        }
    }
}
