//! Whom connections with TLS trust, and as whom they come.

use std::path::Path;

use eventbus_core::{Error, ErrorKind, Result};
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};

use crate::config::RabbitMqConfig;

const CONNECT: &str = "connect";

/// What the files of a configuration say; nothing where it names none.
pub(crate) async fn files(config: &RabbitMqConfig) -> Result<OwnedTLSConfig> {
    let cert_chain = match &config.tls_ca {
        Some(path) => {
            let text = String::from_utf8(read(path).await?);
            Some(text.map_err(|error| unreadable(path).with_source(error))?)
        }
        None => None,
    };
    let identity = match (&config.tls_cert, &config.tls_key) {
        (Some(cert), Some(key)) => Some(OwnedIdentity::PKCS8 {
            pem: read(cert).await?,
            key: read(key).await?,
        }),
        (None, None) => None,
        _ => {
            let message = "`tls_cert` and `tls_key` go together: give both, or neither";
            return Err(Error::new(ErrorKind::InvalidInput, CONNECT, message));
        }
    };
    Ok(OwnedTLSConfig {
        identity,
        cert_chain,
    })
}

async fn read(path: &Path) -> Result<Vec<u8>> {
    let read = tokio::task::spawn_blocking({
        let path = path.to_owned();
        move || std::fs::read(path)
    });
    let read = read.await.map_err(std::io::Error::other).flatten();
    read.map_err(|error| unreadable(path).with_source(error))
}

fn unreadable(path: &Path) -> Error {
    let message = "a file of `tls_ca`, `tls_cert` or `tls_key` cannot be read";
    Error::new(ErrorKind::InvalidInput, CONNECT, message).with("file", path.display())
}
