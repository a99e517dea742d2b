//! Servers that have a name, so that parts of one process meet on `memory:shop`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::{MemoryBroker, MemoryConfig, Server};
use crate::error::{Error, ErrorKind, Result};
use crate::message::Group;
use crate::url::redacted_url;

/// Every named server that still has a client.
static SERVERS: Mutex<BTreeMap<String, Weak<Server>>> = Mutex::new(BTreeMap::new());

/// A client of the server called `name`, which is started if there is none.
pub(super) fn client(name: &str, config: MemoryConfig) -> Result<MemoryBroker> {
    // A name is written like every other one. What is none may be a URL, with a password.
    if Group::new(name).is_err() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "read broker url",
            "the name of an in-memory server has 1 to 200 characters of A-Z a-z 0-9 . _ -",
        )
        .with("name", format_args!("{:?}", redacted_url(name))));
    }
    let mut servers = SERVERS.lock().unwrap_or_else(PoisonError::into_inner);
    servers.retain(|_, server| server.strong_count() > 0);
    let Some(server) = servers.get(name).and_then(Weak::upgrade) else {
        let broker = MemoryBroker::with(config);
        let server = Arc::downgrade(&broker.client.server);
        servers.insert(name.to_owned(), server);
        return Ok(broker);
    };
    if !server.config.is_like(&config) {
        return Err(Error::new(
            ErrorKind::Conflict,
            "connect",
            "the in-memory server of this name runs with other options: give the same ones, or another name",
        )
        .with("name", name));
    }
    Ok(server.client())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_one_name_meet_and_options_have_to_agree() {
        let first = MemoryBroker::from_url("memory:meeting?partitions=2").expect("a new server");
        let second = MemoryBroker::from_url("memory:meeting?partitions=2").expect("the same one");
        assert!(Arc::ptr_eq(&first.client.server, &second.client.server));
        let other = MemoryBroker::from_url("memory:meeting?partitions=3");
        assert_eq!(
            other.expect_err("other options").kind(),
            ErrorKind::Conflict
        );
        drop((first, second));
        MemoryBroker::from_url("memory:meeting?partitions=3").expect("the first one is gone");
        let anonymous = MemoryBroker::from_url("memory:").expect("a server");
        let another = MemoryBroker::from_url("memory:").expect("a server");
        assert!(!Arc::ptr_eq(
            &anonymous.client.server,
            &another.client.server
        ));
        assert!(MemoryBroker::from_url("memory:no spaces").is_err());
        let url = "memory:kafka://me:secret@host";
        let error = MemoryBroker::from_url(url).expect_err("no name");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}
