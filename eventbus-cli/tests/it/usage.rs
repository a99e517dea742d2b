//! What holds for every subcommand: exit codes, help, and that no secret is shown.

use assert_cmd::Command;

/// The program, with nothing of the tester's own in its environment.
fn eventbus(arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("eventbus").expect("it was built");
    command.env_remove("EVENTBUS_URL").args(arguments);
    command
}

fn stderr(command: &mut Command, code: i32) -> String {
    let output = command.assert().code(code).get_output().clone();
    String::from_utf8(output.stderr).expect("it is text")
}

#[test]
fn without_a_broker_it_says_how_to_name_one() {
    let text = stderr(&mut eventbus(&["lag"]), 1);
    assert!(
        text.contains("--url") && text.contains("EVENTBUS_URL"),
        "{text}"
    );
    eventbus(&["topics", "list"])
        .env("EVENTBUS_URL", "memory:")
        .assert()
        .success();
}

#[test]
fn wrong_use_is_exit_code_2_and_help_is_0() {
    stderr(&mut eventbus(&["tail"]), 2);
    stderr(&mut eventbus(&["publish", "orders"]), 2);
    stderr(&mut eventbus(&["tail", "orders", "--from", "yesterday"]), 2);
    for command in [
        "publish",
        "tail",
        "topics",
        "lag",
        "dlq",
        "whereabouts",
        "replay",
        "health",
    ] {
        eventbus(&[command, "--help"]).assert().success();
    }
}

#[test]
fn what_is_not_as_it_should_be_is_exit_code_3() {
    let file = r#"{"topic": [{"name": "orders"}]}"#;
    let check = ["--url", "memory:", "topics", "check", "-"];
    eventbus(&check).write_stdin(file).assert().code(3);
    let apply = ["--url", "memory:", "--json", "topics", "apply", "-"];
    let output = eventbus(&apply).write_stdin(file).assert().success();
    let stdout = String::from_utf8(output.get_output().stdout.clone()).expect("it is text");
    assert_eq!(
        stdout,
        "[{\"name\":\"orders\",\"state\":\"created\",\"partitions\":4,\"drift\":[]}]\n"
    );
}

#[test]
fn secrets_are_never_shown() {
    let url = "pigeon://ann:secret@loft:1/?password=secret";
    let mistakes: [(&[&str], i32); 4] = [
        (&["--url", url, "lag"], 1),
        (&[url, "lag"], 2),
        (&["lag", "--group", "a", "--since", url], 2),
        (&["--ulr", url, "lag"], 2),
    ];
    for (arguments, code) in mistakes {
        let text = stderr(&mut eventbus(arguments), code);
        assert!(!text.contains("secret"), "{text}");
    }
    let help = eventbus(&["--help"])
        .env("EVENTBUS_URL", url)
        .assert()
        .success();
    let text = String::from_utf8(help.get_output().stdout.clone()).expect("it is text");
    assert!(!text.contains("secret"), "{text}");
}
