//! What reaches the ledger when clients are killed, and what clients hear when the recorder is.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use eventbus_verify::{
    Client, Entry, Error, Ledger, Operation, Phase, Record, Recorder, RunId, Stamp,
};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(30);
/// Where the child process of a test finds the recorder.
const SOCKET: &str = "EVENTBUS_VERIFY_SOCKET";

#[test]
fn what_clients_say_is_in_the_ledger() {
    let place = Place::new();
    let recorder = place.start();
    let mut threads = Vec::new();
    for producer in 0..4 {
        let client = Client::connect(&place.socket).unwrap();
        assert_eq!(client.run(), RunId(9));
        threads.push(thread::spawn(move || {
            let session = client.session();
            for key_seq in 0..500 {
                session.invoke(publish(producer, key_seq)).unwrap();
                session.ok(publish(producer, key_seq)).unwrap();
            }
            client.flush(LIMIT).unwrap();
        }));
    }
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(recorder.stop().unwrap(), 4 * (1000 + 2) + 1);

    let ledger = Ledger::read(&place.ledger).unwrap();
    assert!(ledger.is_complete());
    for producer in 0..4 {
        let said = records_of(&ledger, producer);
        let expected = (0..500).flat_map(|seq| [(seq, Phase::Invoke), (seq, Phase::Ok)]);
        assert!(said.eq(expected), "producer {producer}");
    }
}

#[test]
fn a_batch_is_announced_at_one_time() {
    let place = Place::new();
    let recorder = place.start();
    let client = Client::connect(&place.socket).unwrap();
    let entries: Vec<Entry> = (0..5000).map(|seq| publish(1, seq)).collect();
    client.session().record(Phase::Invoke, &entries).unwrap();
    client.session().record(Phase::Ok, &[]).unwrap();
    client.flush(LIMIT).unwrap();
    recorder.stop().unwrap();
    let ledger = Ledger::read(&place.ledger).unwrap();
    assert_eq!(records_of(&ledger, 1).count(), 5000);
    let sessions: Vec<u32> = published(&ledger).map(|one| one.session).collect();
    assert!(sessions.iter().all(|session| *session == 1));
}

#[test]
fn a_flush_returns_after_everything_was_written() {
    let place = Place::new();
    let _recorder = place.start();
    let client = Client::connect(&place.socket).unwrap();
    for key_seq in 0..100 {
        client.session().invoke(publish(1, key_seq)).unwrap();
        client.flush(LIMIT).unwrap();
        let ledger = Ledger::read(&place.ledger).unwrap();
        assert_eq!(records_of(&ledger, 1).count(), key_seq as usize + 1);
    }
}

#[test]
fn what_was_sent_before_a_stop_is_written() {
    for _ in 0..20 {
        let place = Place::new();
        let recorder = place.start();
        let client = Client::connect(&place.socket).unwrap();
        let session = client.session();
        for key_seq in 0..200 {
            session.invoke(publish(1, key_seq)).unwrap();
        }
        recorder.stop().unwrap();
        let ledger = Ledger::read(&place.ledger).unwrap();
        assert_eq!(records_of(&ledger, 1).count(), 200);
        let error = session.invoke(publish(1, 200)).unwrap_err();
        assert!(matches!(error, Error::RecorderGone { .. }), "{error}");
    }
}

#[test]
fn a_killed_client_loses_nothing_that_was_sent() {
    let place = Place::new();
    let mut recorder = place.spawn();
    let mut client = Command::new(std::env::current_exe().unwrap())
        .args(["recorder::client_that_is_killed", "--exact", "--ignored"])
        .arg("--nocapture")
        .env(SOCKET, &place.socket)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(client.stdout.take().unwrap());
    let mut told = 0;
    let mut line = String::new();
    while told < 2000 {
        line.clear();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "it ended early");
        told = said(&line).unwrap_or(told);
    }
    client.kill().unwrap();
    client.wait().unwrap();
    for line in output.lines() {
        told = said(&line.unwrap()).unwrap_or(told);
    }
    let count = end(&mut recorder);

    let ledger = Ledger::read(&place.ledger).unwrap();
    assert!(ledger.is_complete());
    assert_eq!(ledger.records().len() as u64, count);
    let keys: Vec<u32> = records_of(&ledger, 1).map(|(seq, _)| seq).collect();
    assert!(keys.len() as u64 >= told, "{told} were told");
    assert!((0..keys.len() as u32).eq(keys), "none is missing between");
    let last = ledger.records().iter().rev().nth(1).unwrap();
    assert_eq!(last.entry.operation, Operation::Disconnect);
}

fn said(line: &str) -> Option<u64> {
    line.trim().strip_prefix("sent ")?.parse().ok()
}

#[test]
#[ignore = "the child process of a_killed_client_loses_nothing_that_was_sent"]
fn client_that_is_killed() {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    let client = Client::connect(Path::new(&socket)).unwrap();
    let session = client.session();
    for key_seq in 0.. {
        session.invoke(publish(1, key_seq)).unwrap();
        println!("sent {}", key_seq + 1);
    }
}

#[test]
fn a_client_hears_that_the_recorder_was_killed() {
    let place = Place::new();
    let mut recorder = place.spawn();
    let client = Client::connect(&place.socket).unwrap();
    let session = client.session();
    session.invoke(publish(1, 0)).unwrap();
    client.flush(LIMIT).unwrap();
    recorder.kill().unwrap();
    recorder.wait().unwrap();

    let error = session.invoke(publish(1, 1)).unwrap_err();
    assert!(matches!(error, Error::RecorderGone { .. }), "{error}");
    let error = client.flush(LIMIT).unwrap_err();
    assert!(matches!(error, Error::RecorderGone { .. }), "{error}");
    let ledger = Ledger::read(&place.ledger).unwrap();
    assert_eq!(records_of(&ledger, 1).count(), 1);
    assert!(!ledger.is_complete());
}

#[test]
fn a_flush_fails_when_the_recorder_stands_still() {
    let place = Place::new();
    let listener = std::os::unix::net::UnixListener::bind(&place.socket).unwrap();
    let silent = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = [0; 16];
        stream.read_exact(&mut bytes).unwrap();
        bytes[..8].copy_from_slice(b"EBWELCO1");
        stream.write_all(&bytes).unwrap();
        stream
    });
    let client = Client::connect(&place.socket).unwrap();
    let _stream = silent.join().unwrap();
    assert!(client.flush(Duration::from_millis(50)).is_err());
    let session = client.session();
    let later = session.invoke(publish(1, 1)).unwrap_err();
    assert!(matches!(later, Error::RecorderGone { .. }), "{later}");
}

#[test]
fn what_is_no_client_leaves_no_record() {
    let place = Place::new();
    let recorder = place.start();
    let mut stream = UnixStream::connect(&place.socket).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    // Reset or closed: either way nothing was said.
    drop(stream.read_to_end(&mut answer));
    assert!(answer.is_empty());
    assert_eq!(recorder.stop().unwrap(), 1);
}

#[test]
fn a_record_that_was_cut_is_noted_as_such() {
    let place = Place::new();
    let recorder = place.start();
    let mut stream = UnixStream::connect(&place.socket).unwrap();
    let mut greeting = *b"EBHELLO1\x01\0\0\0\0\0\0\0";
    stream.write_all(&greeting).unwrap();
    stream.read_exact(&mut greeting).unwrap();
    stream.write_all(&[0; 40]).unwrap();
    drop(stream);
    recorder.stop().unwrap();
    let ledger = Ledger::read(&place.ledger).unwrap();
    let [connect, disconnect, close] = ledger.records() else {
        panic!("{:?}", ledger.records());
    };
    assert_eq!(connect.entry.operation, Operation::Connect);
    assert_eq!(disconnect.phase, Phase::Unknown);
    assert_eq!(disconnect.entry.detail, 40);
    assert_eq!(close.entry.operation, Operation::Close);
}

#[test]
fn nobody_listens_without_a_recorder() {
    let place = Place::new();
    let error = Client::connect(&place.socket).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

/// A folder for a ledger and its socket.
struct Place {
    _folder: TempDir,
    ledger: PathBuf,
    socket: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        Self {
            ledger: folder.path().join("ledger"),
            socket: folder.path().join("socket"),
            _folder: folder,
        }
    }

    fn start(&self) -> Recorder {
        Recorder::start(&self.ledger, &self.socket, RunId(9)).unwrap()
    }

    /// A recorder in a process of its own, which listens.
    fn spawn(&self) -> Child {
        let mut child = Command::new(env!("CARGO_BIN_EXE_eventbus-recorder"))
            .args([&self.ledger, &self.socket])
            .arg("9")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0; 10];
        let output = child.stdout.as_mut().unwrap();
        output.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"recording\n");
        child
    }
}

/// Ends a recorder in order; how many records it says it wrote.
fn end(recorder: &mut Child) -> u64 {
    drop(recorder.stdin.take());
    let mut output = String::new();
    let stdout = recorder.stdout.as_mut().unwrap();
    stdout.read_to_string(&mut output).unwrap();
    assert!(recorder.wait().unwrap().success());
    let records = output.trim().strip_suffix(" records").unwrap();
    records.parse().unwrap()
}

fn publish(producer: u16, key_seq: u32) -> Entry {
    Entry::of(Operation::Publish, Stamp::new(producer, 1, key_seq))
}

fn published(ledger: &Ledger) -> impl Iterator<Item = &Record> {
    let records = ledger.records().iter();
    records.filter(|record| record.entry.operation == Operation::Publish)
}

fn records_of(ledger: &Ledger, producer: u16) -> impl Iterator<Item = (u32, Phase)> {
    published(ledger).filter_map(move |record| {
        let stamp = record.entry.stamp?;
        (stamp.producer == producer).then_some((stamp.key_seq, record.phase))
    })
}
