//! Commands and replies of Redis in bytes, as they come and as they pass.

use std::time::Duration;

use super::{RedisCommands, Session};
use crate::proxy::WireFault;
use crate::proxy::protocol::Watch;

const ADD: &[u8] = b"*5\r\n$4\r\nXADD\r\n$1\r\ns\r\n$1\r\n*\r\n$4\r\ndata\r\n$6\r\na\r\n$3\n\r\n";
const SELECT: &[u8] = b"*2\r\n$6\r\nSELECT\r\n$1\r\n0\r\n";

fn session() -> Session {
    Session::new(RedisCommands::of(&["XADD", "XREAD"]))
}

/// What comes out when a stream goes in, byte by byte: of commands, and of replies.
fn asked(session: &mut Session, bytes: &[u8], fault: WireFault) -> Vec<u8> {
    let pieces = bytes
        .iter()
        .map(|byte| session.asks(&[*byte], fault).bytes.into_owned());
    pieces.collect::<Vec<_>>().concat()
}

fn answered(session: &mut Session, bytes: &[u8]) -> (Vec<u8>, bool, u64) {
    let (mut passed, mut is_served, mut misreported) = (Vec::new(), false, 0);
    for byte in bytes {
        let answered = session.answers(std::slice::from_ref(byte));
        passed.extend(&*answered.bytes);
        is_served |= answered.is_served;
        misreported += answered.misreported;
    }
    (passed, is_served, misreported)
}

#[test]
fn what_is_not_harmed_passes_as_it_is() {
    let mut session = session();
    let both = [SELECT, ADD].concat();
    assert_eq!(asked(&mut session, &both, WireFault::None), both);
    let replies = b"+OK\r\n$3\r\n1-0\r\n";
    assert_eq!(
        answered(&mut session, replies),
        (replies.to_vec(), false, 0)
    );
    assert!(session.replies.is_empty());
}

#[test]
fn the_reply_to_a_picked_command_is_lost_and_those_before_it_pass() {
    let mut session = session();
    let both = [SELECT, ADD].concat();
    let sent = session.asks(&both, WireFault::LoseResponse);
    assert_eq!(sent.bytes, both, "it is served");
    assert!(sent.loses);
    let (passed, is_served, _) = answered(&mut session, b"+OK\r\n$3\r\n1-0\r\n");
    assert_eq!((&passed[..], is_served), (&b"+OK\r\n"[..], true));
}

#[test]
fn a_refused_command_does_not_reach_the_server_and_is_answered_in_its_turn() {
    let mut session = session();
    let three = [SELECT, ADD, SELECT].concat();
    let fault = WireFault::Misreport(RedisCommands::LOADING);
    let sent = asked(&mut session, &three, fault);
    assert_eq!(sent, [SELECT, b"*1\r\n$4\r\nPING\r\n", SELECT].concat());
    let (passed, is_served, misreported) = answered(&mut session, b"+OK\r\n+PONG\r\n+OK\r\n");
    let text = String::from_utf8(passed).expect("a text");
    assert!(text.starts_with("+OK\r\n-LOADING "), "{text}");
    assert!(text.ends_with("\r\n+OK\r\n"), "{text}");
    assert_eq!((is_served, misreported), (false, 1));
}

#[test]
fn a_nested_reply_is_one_and_so_are_those_that_are_empty() {
    let mut session = session();
    let reads = b"*4\r\n$5\r\nxread\r\n$7\r\nSTREAMS\r\n$1\r\ns\r\n$1\r\n0\r\n".repeat(4);
    assert_eq!(session.asks(&reads, WireFault::None).bytes, reads);
    let nested: &[u8] =
        b"*1\r\n*2\r\n$1\r\ns\r\n*1\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$4\r\ndata\r\n$0\r\n\r\n";
    let replies = [nested, b"*-1\r\n", b"*0\r\n", b"$-1\r\n"].concat();
    assert_eq!(answered(&mut session, &replies).0, replies);
    assert!(session.replies.is_empty(), "each was found");
}

#[test]
fn what_is_late_is_only_what_was_picked() {
    let mut session = session();
    let late = WireFault::DelayRequest(Duration::from_secs(1));
    assert_eq!(session.asks(SELECT, late).late, None);
    assert_eq!(session.asks(ADD, late).late, Some(Duration::from_secs(1)));
}

#[test]
fn what_is_no_command_passes() {
    let mut session = session();
    let greeting = b"\x16\x03\x01\x02\0\x01\0 and so on, encrypted\n";
    let fault = WireFault::LoseResponse;
    assert_eq!(asked(&mut session, greeting, fault), greeting);
    let long = [b'*'; 500];
    let passed = asked(&mut session, &long, fault);
    assert_eq!(passed, long);
}
