//! A wire to the server that can be cut where it hurts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::server::Server;

const OPEN: u8 = 0;
const DEAF: u8 = 1;
const SILENT: u8 = 2;
const GONE: u8 = 3;

/// Passes everything on, until it is told otherwise.
pub(crate) struct Proxy {
    port: u16,
    mode: Arc<AtomicU8>,
}

impl Proxy {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let mode = Arc::new(AtomicU8::new(OPEN));
        let base = Server::base();
        let address = base.rsplit_once('@').expect("a user").1.to_owned();
        let address = address.split('/').next().expect("a host").to_owned();
        let modes = Arc::clone(&mode);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if modes.load(Ordering::SeqCst) == GONE {
                    continue;
                }
                if let Ok(server) = TcpStream::connect(&address).await {
                    tokio::spawn(pass(client, server, Arc::clone(&modes)));
                }
            }
        });
        Self { port, mode }
    }

    /// The URL of the server behind it.
    pub(crate) fn url(&self, server: &Server) -> String {
        let url = server.url();
        let (user, rest) = url.rsplit_once('@').expect("a user");
        let path = rest.split_once('/').expect("a path").1;
        format!("{user}@127.0.0.1:{}/{path}", self.port)
    }

    /// From now on the server's answers are lost, and the first one ends its connection.
    pub(crate) fn lose_answers(&self) {
        self.mode.store(DEAF, Ordering::SeqCst);
    }

    /// From now on nothing passes, and no connection ends either.
    pub(crate) fn freeze(&self) {
        self.mode.store(SILENT, Ordering::SeqCst);
    }

    /// From now on the server is away: connections end when they are used, and there are no new ones.
    pub(crate) fn cut(&self) {
        self.mode.store(GONE, Ordering::SeqCst);
    }

    /// New connections work again.
    pub(crate) fn mend(&self) {
        self.mode.store(OPEN, Ordering::SeqCst);
    }
}

async fn pass(client: TcpStream, server: TcpStream, mode: Arc<AtomicU8>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let asked = Arc::clone(&mode);
    let asking = async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = from_client.read(&mut buffer).await {
            match asked.load(Ordering::SeqCst) {
                SILENT => std::future::pending().await,
                GONE => return,
                _ => {}
            }
            if to_server.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    let answering = async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
            match mode.load(Ordering::SeqCst) {
                OPEN => {}
                SILENT => std::future::pending().await,
                _ => return,
            }
            if to_client.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = asking => {}
        () = answering => {}
    }
}
