//! CloudEvents and their official SDK for Python: it reads what we write, and the golden file is what it writes.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use eventbus_core::{
    CloudEventsBinaryFormat, CloudEventsBinding, CloudEventsFormat, Format, Headers,
};
use serde_json::{Value, json};

use crate::formats::{DATA, envelope};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/sdk.py");
const REQUIREMENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/requirements.txt");
const GOLDEN: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/golden/cloudevents_sdk.json"
);

/// Python with the SDK, in a folder beside what cargo builds; made by the first test.
fn python() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
        let python = folder.join("bin/python");
        let has_sdk = Command::new(&python).args(["-c", "import cloudevents"]).stderr(Stdio::null()).status();
        if !has_sdk.is_ok_and(|status| status.success()) {
            let venv = Command::new("python3").args(["-m", "venv"]).arg(&folder).status();
            assert!(
                venv.is_ok_and(|status| status.success()),
                "no environment for Python can be made: install python3 with venv (Debian: python3-venv)"
            );
        }
        let pip = ["-m", "pip", "install", "--quiet", "--requirement", REQUIREMENTS];
        let installed = Command::new(&python).args(pip).status();
        assert!(
            installed.is_ok_and(|status| status.success()),
            "what {REQUIREMENTS} names cannot be installed from PyPI"
        );
        python
    })
}

/// Runs the script, and gives what it answers.
fn ask(command: &str, input: &Value) -> Value {
    let mut child = Command::new(python())
        .args([SCRIPT, command])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("Python starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin
        .write_all(input.to_string().as_bytes())
        .expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "the script failed");
    serde_json::from_slice(&output.stdout).expect("it answers JSON")
}

fn sent(binding: &str, headers: &Headers, payload: &[u8]) -> Value {
    let headers: serde_json::Map<_, _> = headers
        .iter()
        .map(|(name, value)| (name.to_owned(), String::from_utf8_lossy(value).into()))
        .collect();
    let bytes: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
    json!({ "binding": binding, "headers": headers, "bytes": bytes })
}

#[test]
#[ignore = "needs Python: ./dev/test"]
fn the_sdk_reads_what_we_write() {
    let mut written = envelope();
    written
        .metadata
        .insert("tenant".into(), "Zürich & Söhne".into());
    let structured = CloudEventsFormat::new();
    let binary = CloudEventsBinaryFormat::new();
    let amqp = CloudEventsBinding::Amqp;
    let formats: [(&str, &dyn Format); 4] = [
        ("kafka", &structured),
        ("kafka", &binary),
        ("amqp", &structured.with_header_copies(amqp)),
        ("amqp", &binary.with_binding(amqp)),
    ];
    let bytes: &[u8] = b"\0\x01\xff";
    let mut messages = Vec::new();
    for (binding, format) in formats {
        for (content_type, data) in [("application/json", DATA), ("application/avro", bytes)] {
            let (headers, payload) = format
                .write(&written, content_type, data)
                .expect("it is written");
            messages.push(sent(binding, &headers, &payload));
        }
    }
    let found = ask("read", &Value::Array(messages));
    let found = found.as_array().expect("events");
    assert_eq!(found.len(), 8);
    for (index, event) in found.iter().enumerate() {
        let is_json = index % 2 == 0;
        let expected = json!({
            "specversion": "1.0",
            "id": written.id.to_string(),
            "source": "order-service",
            "type": "OrderCreated",
            "time": "2026-11-21T07:00:00.123000+00:00",
            "eventversion": "v1",
            "correlationid": "request-7",
            "causationid": "0192f1c3-0000-7000-8000-000000000001",
            "tenant": "Zürich & Söhne",
            "metadata": r#"{"sessionId":"session-2","userId":"user-1"}"#,
            "datacontenttype": if is_json { "application/json" } else { "application/avro" },
        });
        assert_eq!(event["attributes"], expected, "{index}");
        let data = match is_json {
            true => json!({"order_id": 123, "amount": 250}),
            false => json!({"bytes": "0001ff"}),
        };
        assert_eq!(event["data"], data, "{index}");
    }
}

#[test]
#[ignore = "needs Python: ./dev/test"]
fn the_golden_file_is_what_the_sdk_writes() {
    let golden = std::fs::read_to_string(GOLDEN).expect("the golden file is there");
    let golden: Value = serde_json::from_str(&golden).expect("JSON");
    assert_eq!(
        ask("write", &Value::Null),
        golden,
        "write it anew with tests/python/sdk.py"
    );
}
