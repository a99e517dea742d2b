//! TLS against a server with a certificate of an authority of its own.

use std::path::Path;

use eventbus_core::{ErrorKind, Message, Publisher, Topic};
use eventbus_redis::RedisBroker;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tempfile::TempDir;

use crate::own_server::OwnServer;

/// An authority, and a certificate and key that it signed for 127.0.0.1, as files.
fn certificates() -> TempDir {
    let directory = tempfile::tempdir().expect("there is room");
    let mut authority = CertificateParams::new(Vec::new()).expect("no names");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let names = &mut authority.distinguished_name;
    names.push(DnType::CommonName, "authority");
    let key = KeyPair::generate().expect("there is entropy");
    let authority = CertifiedIssuer::self_signed(authority, key).expect("it signs itself");
    let names = vec!["127.0.0.1".to_owned()];
    let certificate = CertificateParams::new(names).expect("a good name");
    let key = KeyPair::generate().expect("there is entropy");
    let certificate = certificate.signed_by(&key, &authority).expect("it signs");
    let write = |name: &str, text: String| {
        std::fs::write(directory.path().join(name), text).expect("there is room");
    };
    write("ca.pem", authority.pem());
    write("cert.pem", certificate.pem());
    write("key.pem", key.serialize_pem());
    directory
}

/// A server that speaks TLS on the port that is returned with it.
async fn start(files: &Path) -> (OwnServer, u16) {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a port");
    let port = free.local_addr().expect("it has one").port();
    drop(free);
    let file = |name: &str| files.join(name).display().to_string();
    let (ca, cert, key) = (file("ca.pem"), file("cert.pem"), file("key.pem"));
    let settings = [
        "--tls-port",
        &port.to_string(),
        "--tls-ca-cert-file",
        &ca,
        "--tls-cert-file",
        &cert,
        "--tls-key-file",
        &key,
    ];
    (OwnServer::start(&settings).await, port)
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_client_that_trusts_the_authority_and_shows_a_certificate_is_served() {
    let files = certificates();
    let (_server, port) = start(files.path()).await;
    let file = |name: &str| files.path().join(name).display().to_string();
    let url = format!(
        "rediss://127.0.0.1:{port}?timeout=2s&tls_ca={}",
        file("ca.pem")
    );
    // The server asks for a certificate by default.
    let error = RedisBroker::from_url(&url)
        .await
        .expect_err("it shows none");
    // What the server says of it may be lost with the connection.
    let kinds = [ErrorKind::Unauthorized, ErrorKind::Unavailable];
    assert!(kinds.contains(&error.kind()), "{error}");
    assert!(error.to_string().contains("`tls_cert`"), "{error}");
    let url = format!(
        "{url}&tls_cert={}&tls_key={}",
        file("cert.pem"),
        file("key.pem")
    );
    let broker = RedisBroker::from_url(&url).await.expect("it answers");
    let message = Message::new(Topic::from_static("orders"), "1");
    broker.publish(vec![message]).await.expect("it is taken");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn whom_it_does_not_trust_it_does_not_talk_to() {
    let files = certificates();
    let (_server, port) = start(files.path()).await;
    let url = format!("rediss://127.0.0.1:{port}?timeout=2s");
    let error = RedisBroker::from_url(&url)
        .await
        .expect_err("nobody knows the authority");
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    assert!(error.to_string().contains("`tls_ca`"), "{error}");
    let url = format!("{url}&tls_ca=/no/such/file.pem");
    let error = RedisBroker::from_url(&url)
        .await
        .expect_err("there is no such file");
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(error.to_string().contains("/no/such/file.pem"), "{error}");
    let url = format!(
        "rediss://127.0.0.1:{port}?timeout=2s&tls_cert={}",
        files.path().join("cert.pem").display()
    );
    let error = RedisBroker::from_url(&url)
        .await
        .expect_err("without its key");
    assert!(error.to_string().contains("go together"), "{error}");
}
