//! Requests and responses of Kafka in bytes, as they come and as they pass.

use std::net::SocketAddr;
use std::time::Duration;

use super::{KafkaApi, Requests, Session};
use crate::proxy::WireFault;
use crate::proxy::protocol::Watch;

fn address() -> SocketAddr {
    "127.0.0.1:40123".parse().expect("an address")
}

fn session(apis: &[KafkaApi]) -> Session {
    Session::new(Requests::of(apis), address())
}

fn frame(body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32).to_be_bytes()[..], body].concat()
}

fn request(api: KafkaApi, version: i16, id: i32) -> Vec<u8> {
    let key = (api as i16).to_be_bytes();
    let head = [&key[..], &version.to_be_bytes(), &id.to_be_bytes()].concat();
    frame(&[&head[..], b"\0\x08eventbus and so on"].concat())
}

fn response(id: i32, body: &[u8]) -> Vec<u8> {
    frame(&[&id.to_be_bytes()[..], body].concat())
}

/// All that comes out when a stream goes in, byte by byte.
fn piecewise(session: &mut Session, bytes: &[u8]) -> Vec<u8> {
    let pieces = bytes
        .iter()
        .map(|byte| session.answers(&[*byte]).bytes.into_owned());
    pieces.collect::<Vec<_>>().concat()
}

#[test]
fn the_response_to_a_picked_request_is_lost_and_those_before_it_pass() {
    let mut session = session(&[KafkaApi::Produce]);
    assert!(
        !session
            .asks(&request(KafkaApi::Fetch, 11, 1), WireFault::LoseResponse)
            .loses
    );
    assert!(
        session
            .asks(&request(KafkaApi::Produce, 7, 2), WireFault::LoseResponse)
            .loses
    );
    let (fetched, produced) = (response(1, b"records"), response(2, b"offsets"));
    let both = [fetched.clone(), produced].concat();
    let answered = session.answers(&both);
    assert_eq!(answered.bytes, fetched);
    assert!(answered.is_served);
}

#[test]
fn what_is_not_picked_or_not_harmed_passes_in_pieces_of_any_size() {
    let mut session = session(&[KafkaApi::Produce]);
    for id in 1..4 {
        for byte in request(KafkaApi::Produce, 7, id) {
            assert!(!session.asks(&[byte], WireFault::None).loses);
        }
    }
    // The first two asked for no acknowledgement.
    let answer = response(3, b"offsets");
    assert_eq!(piecewise(&mut session, &answer), answer);
}

#[test]
fn a_picked_request_is_late() {
    let mut session = session(&[KafkaApi::OffsetCommit]);
    let late = WireFault::DelayRequest(Duration::from_secs(1));
    assert_eq!(
        session.asks(&request(KafkaApi::Heartbeat, 3, 1), late).late,
        None
    );
    let commit = request(KafkaApi::OffsetCommit, 7, 2);
    let asked = session.asks(&commit, late);
    assert_eq!(asked.late, Some(Duration::from_secs(1)));
}

#[test]
fn clients_are_sent_to_the_proxy_in_every_version() {
    let port = 9092_i32.to_be_bytes();
    let port = &port[..];
    let to = 40123_i32.to_be_bytes();
    let to = &to[..];
    // Of each the request, what is before the broker's id, and what is behind host and port.
    let cases: [(KafkaApi, i16, &[u8], &[u8]); 5] = [
        (KafkaApi::Metadata, 0, b"\0\0\0\x01", b"topics"),
        (
            KafkaApi::Metadata,
            4,
            b"\0\0\0\0\0\0\0\x01",
            b"\xff\xfftopics",
        ),
        (KafkaApi::Metadata, 12, b"\0\0\0\0\0\x02", b"\0\0topics"),
        (KafkaApi::FindCoordinator, 0, b"\0\0", b""),
        (KafkaApi::FindCoordinator, 2, b"\0\0\0\0\0\0\xff\xff", b""),
    ];
    for (api, version, before, behind) in cases {
        let before = [before, b"\0\0\0\x01"].concat();
        let is_flexible = version >= 9;
        let host = |name: &[u8]| match is_flexible {
            true => [&[name.len() as u8 + 1][..], name].concat(),
            false => [&(name.len() as i16).to_be_bytes()[..], name].concat(),
        };
        let said = [&before[..], &host(b"kafka.example"), port, behind].concat();
        let passed = [&before[..], &host(b"127.0.0.1"), to, behind].concat();
        let mut session = session(&[]);
        session.asks(&request(api, version, 5), WireFault::None);
        let heard = piecewise(&mut session, &response(5, &said));
        assert_eq!(heard, response(5, &passed), "{api:?} {version}");
    }
}

#[test]
fn a_coordinator_that_is_not_there_stays_so() {
    let mut session = session(&[]);
    session.asks(&request(KafkaApi::FindCoordinator, 2, 5), WireFault::None);
    let none = response(
        5,
        b"\0\0\0\0\0\x0f\xff\xff\xff\xff\xff\xff\0\0\xff\xff\xff\xff",
    );
    assert_eq!(session.answers(&none).bytes, none);
}

#[test]
fn an_offset_commit_that_is_done_says_that_it_is_not() {
    let mut session = session(&[KafkaApi::OffsetCommit]);
    session.asks(
        &request(KafkaApi::OffsetCommit, 7, 9),
        WireFault::Misreport(14),
    );
    // No throttling, one topic with two partitions, of which the second one failed by itself.
    let head = b"\0\0\0\0\0\0\0\x01\0\x01t\0\0\0\x02";
    let said = [&head[..], b"\0\0\0\x04\0\0", b"\0\0\0\x05\0\x16"].concat();
    let passed = [&head[..], b"\0\0\0\x04\0\x0e", b"\0\0\0\x05\0\x16"].concat();
    let said = response(9, &said);
    let answered = session.answers(&said);
    assert_eq!(answered.bytes, response(9, &passed));
    assert_eq!(answered.misreported, 1);
}

#[test]
fn messages_that_are_published_are_said_not_to_be() {
    for (version, head) in [
        (7, &b"\0\0\0\x01\0\x01t\0\0\0\x01\0\0\0\x04"[..]),
        (10, &b"\0\x02\x02t\x02\0\0\0\x04"[..]),
    ] {
        let mut session = session(&[KafkaApi::Produce]);
        session.asks(
            &request(KafkaApi::Produce, version, 9),
            WireFault::Misreport(6),
        );
        let said = response(9, &[head, b"\0\0", b"offset and so on"].concat());
        let passed = response(9, &[head, b"\0\x06", b"offset and so on"].concat());
        assert_eq!(piecewise(&mut session, &said), passed, "version {version}");
    }
}

#[test]
fn nonsense_passes_as_it_is() {
    let mut session = session(&[KafkaApi::Produce]);
    assert!(!session.asks(&[0xff; 64], WireFault::LoseResponse).loses);
    let nonsense = [0xff; 64];
    assert_eq!(session.answers(&nonsense).bytes, &nonsense[..]);

    // An answer that says it has more than there is.
    let mut session = self::session(&[]);
    session.asks(&request(KafkaApi::Metadata, 4, 1), WireFault::None);
    let cut_off = response(1, b"\0\0\0\0\x7f\xff\xff\xff");
    assert_eq!(session.answers(&cut_off).bytes, cut_off);
}
