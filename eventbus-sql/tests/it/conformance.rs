//! The suite that every broker passes.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use eventbus_core::{Broker, Result};
use eventbus_sql::{SqliteBroker, SqliteConfig};
use eventbus_testkit::{BrokerHarness, broker_conformance};

use crate::place::{Place, crash_image};

struct Harness {
    place: Place,
    file: Mutex<PathBuf>,
    restarts: AtomicUsize,
}

impl Harness {
    fn new() -> Self {
        let place = Place::new();
        Self {
            file: Mutex::new(place.file("bus.db")),
            place,
            restarts: AtomicUsize::new(0),
        }
    }
}

#[async_trait::async_trait]
impl BrokerHarness for Harness {
    async fn connect(&self) -> Result<Arc<dyn Broker>> {
        let file = self.file.lock().expect("not poisoned").clone();
        let broker = SqliteBroker::connect(SqliteConfig::new(file)).await?;
        Ok(Arc::new(broker))
    }

    /// There is no server. What a machine that stops here leaves on its disk is opened instead.
    async fn restart(&self) -> Result<bool> {
        let number = self.restarts.fetch_add(1, Ordering::Relaxed);
        let mut file = self.file.lock().expect("not poisoned");
        let restarted = self.place.file(&format!("restarted-{number}.db"));
        crash_image(&file, &restarted);
        *file = restarted;
        Ok(true)
    }
}

broker_conformance!(Harness::new());
