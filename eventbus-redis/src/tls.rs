//! Connections with TLS: whom they trust, and as whom they come.

use std::path::Path;

use eventbus_core::{Error, ErrorKind, Result};
use redis::{Client, ClientTlsConfig, ConnectionInfo, TlsCertificates};
use rustls::crypto::{CryptoProvider, ring};

use crate::config::RedisConfig;
use crate::error::into_error;

const CONNECT: &str = "connect";

/// A client that trusts `tls_ca`, or the public authorities, and shows `tls_cert` where there is one.
pub(crate) fn client(config: &RedisConfig, address: ConnectionInfo) -> Result<Client> {
    if CryptoProvider::get_default().is_none() {
        // The client takes the default of the process, and panics without one. Somebody else may set
        // one at the same moment.
        let _ = ring::default_provider().install_default();
    }
    let read = |path: &Option<_>| path.as_deref().map(read).transpose();
    let client_tls = match (read(&config.tls_cert)?, read(&config.tls_key)?) {
        (Some(client_cert), Some(client_key)) => Some(ClientTlsConfig {
            client_cert,
            client_key,
        }),
        (None, None) => None,
        _ => {
            let message = "`tls_cert` and `tls_key` go together: give both, or neither";
            return Err(Error::new(ErrorKind::InvalidInput, CONNECT, message));
        }
    };
    let certificates = TlsCertificates {
        client_tls,
        root_cert: read(&config.tls_ca)?,
    };
    Client::build_with_tls(address, certificates).map_err(|error| into_error(CONNECT, error))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| {
        let message = "a file of `tls_ca`, `tls_cert` or `tls_key` cannot be read";
        Error::new(ErrorKind::InvalidInput, CONNECT, message)
            .with("file", path.display())
            .with_source(error)
    })
}
