//! Frames of AMQP in bytes, as they come and as they pass.

use std::time::Duration;

use super::{AmqpMethod, AmqpMethods, CLOSE, CLOSE_OK, END, METHOD, Name, Session, close};
use crate::proxy::WireFault;
use crate::proxy::protocol::Watch;

const GREETING: &[u8] = b"AMQP\0\0\x09\x01";
const PUBLISH: Name = (60, 40);
const ACK: Name = (60, 80);
const BODY: u8 = 3;

fn frame(kind: u8, channel: u16, body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u32).to_be_bytes();
    [&[kind], &channel.to_be_bytes()[..], &length, body, &[END]].concat()
}

fn method(channel: u16, (class, method): Name) -> Vec<u8> {
    let name = [class.to_be_bytes(), method.to_be_bytes()].concat();
    frame(METHOD, channel, &[&name[..], b"and so on"].concat())
}

/// A connection on which the greeting has passed.
fn session() -> Session {
    let methods = AmqpMethods::of(&[AmqpMethod::Publish, AmqpMethod::DeclareQueue]);
    let mut session = Session::new(methods);
    assert_eq!(session.asks(GREETING, WireFault::None).bytes, GREETING);
    session
}

/// What comes out when a stream of the client goes in, byte by byte.
fn asked(session: &mut Session, bytes: &[u8], fault: WireFault) -> Vec<u8> {
    let pieces = bytes
        .iter()
        .map(|byte| session.asks(&[*byte], fault).bytes.into_owned());
    pieces.collect::<Vec<_>>().concat()
}

#[test]
fn what_is_not_harmed_passes_as_it_is() {
    let mut session = session();
    let all = [
        method(1, PUBLISH),
        frame(BODY, 1, &[END; 300]),
        frame(8, 0, b""),
    ]
    .concat();
    assert_eq!(asked(&mut session, &all, WireFault::None), all);
    assert_eq!(session.answers(&all).bytes, all);
}

#[test]
fn a_confirmation_is_lost_and_what_other_channels_hear_passes() {
    let mut session = session();
    let lose = WireFault::LoseResponse;
    assert!(!session.asks(&method(1, CLOSE_OK), lose).loses);
    let sent = method(2, PUBLISH);
    let asked = session.asks(&sent, lose);
    assert_eq!((&*asked.bytes, asked.loses), (&sent[..], true));
    let other = method(1, ACK);
    let answered = session.answers(&other);
    assert_eq!((&*answered.bytes, answered.is_served), (&other[..], false));
    let all = [other.clone(), method(2, ACK), other.clone()].concat();
    let answered = session.answers(&all);
    assert_eq!((&*answered.bytes, answered.is_served), (&other[..], true));
}

#[test]
fn a_channel_is_closed_for_both_sides_and_can_be_opened_again() {
    let mut session = session();
    let fault = WireFault::Misreport(541);
    let sent = [method(1, PUBLISH), frame(BODY, 1, b"data"), method(2, ACK)].concat();
    let passed = asked(&mut session, &sent, fault);
    assert_eq!(
        passed,
        [close(1, 541), method(2, ACK)].concat(),
        "in place of the message"
    );
    let last = method(1, ACK);
    let answers = [last.clone(), method(1, CLOSE_OK)].concat();
    let answered = session.answers(&answers);
    assert_eq!(answered.bytes, [last, close(1, 541)].concat());
    assert_eq!(answered.misreported, 1);
    // It did not know until now.
    let late = [frame(BODY, 1, b"data"), method(1, CLOSE_OK)].concat();
    assert!(asked(&mut session, &late, WireFault::None).is_empty());
    let open = method(1, AmqpMethod::OpenChannel.name());
    assert_eq!(asked(&mut session, &open, WireFault::None), open);
}

#[test]
fn who_closes_a_channel_at_the_same_time_gets_one_answer() {
    let mut session = session();
    asked(&mut session, &method(1, PUBLISH), WireFault::Misreport(541));
    let own = method(1, CLOSE);
    assert!(asked(&mut session, &own, WireFault::None).is_empty());
    let done = method(1, CLOSE_OK);
    assert_eq!(session.answers(&done).bytes, done);
}

#[test]
fn what_is_late_is_only_what_was_picked() {
    let mut session = session();
    let late = WireFault::DelayRequest(Duration::from_secs(1));
    assert_eq!(session.asks(&method(1, ACK), late).late, None);
    let asked = session.asks(&method(1, PUBLISH), late).late;
    assert_eq!(asked, Some(Duration::from_secs(1)));
}

#[test]
fn what_is_no_frame_passes() {
    let mut session = session();
    let other = b"\x16\x03\x01\x02\0\x01\0 and so on, encrypted";
    assert_eq!(asked(&mut session, other, WireFault::LoseResponse), other);
    assert_eq!(session.answers(b"AMQP\0\0\x09\x01").bytes, GREETING);
}
