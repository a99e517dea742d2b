//! A server of one test's own, which it may restart, fill and harm without any other test noticing.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::place::Place;

/// The machine goes on when the server does not, so nothing has to reach the disk.
const SETTINGS: &str = "
listen_addresses = ''
fsync = off
shared_buffers = 32MB
max_connections = 100
";

/// Listens on a socket in its own directory, and is stopped when it is dropped.
#[derive(Debug)]
pub(crate) struct OwnServer(Place);

impl OwnServer {
    pub(crate) async fn start() -> Self {
        Self::created_with(&[]).await
    }

    /// Its log lies in another directory, which it may write in.
    pub(crate) async fn start_with_log(directory: &Path) -> Self {
        let directory = directory.join("log").display().to_string();
        let options = ["--wal-segsize=1", "--waldir", &directory];
        Self::created_with(&options).await
    }

    async fn created_with(options: &[&str]) -> Self {
        let server = Self(Place::new());
        let home = server.home();
        give(Path::new(&home));
        let data = server.data();
        let always = ["--username=eventbus", "--auth=trust", "--encoding=UTF8"];
        let place = ["--no-sync", "--pgdata", &data];
        succeeded(run("initdb", &[&always, &place, options].concat()));
        let file = format!("{data}/postgresql.conf");
        let settings = std::fs::read_to_string(&file).expect("initdb wrote it");
        let settings = format!("{settings}{SETTINGS}unix_socket_directories = '{home}'\n");
        std::fs::write(file, settings).expect("it can be written");
        server.pg_ctl(&[
            "start",
            "--log",
            &server.0.file("log").display().to_string(),
        ]);
        server.create_database("shop").await;
        server
    }

    fn home(&self) -> String {
        self.0.file("").display().to_string()
    }

    fn data(&self) -> String {
        self.0.file("data").display().to_string()
    }

    pub(crate) fn url(&self, database: &str) -> String {
        format!(
            "postgres://eventbus@localhost/{database}?host={}",
            self.home()
        )
    }

    /// Runs one statement beside the store, as the owner of everything.
    pub(crate) async fn run(&self, sql: &str) {
        let connected = PgConnection::connect(&self.url("postgres")).await;
        let mut connection = connected.expect("the server answers");
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
            .execute(&mut connection)
            .await
            .expect("the statement is sound");
    }

    pub(crate) async fn create_database(&self, name: &str) {
        self.run(&format!("CREATE DATABASE {name}")).await;
    }

    /// Stops the server as a crash would, unless it has stopped, and starts it again.
    pub(crate) async fn restart(&self) {
        let log = self.0.file("log").display().to_string();
        let data = self.data();
        let restarting = tokio::task::spawn_blocking(move || {
            let arguments = ["restart", "--mode=immediate", "--wait", "--silent"];
            let arguments = [&arguments[..], &["--pgdata", &data, "--log", &log]].concat();
            succeeded(run("pg_ctl", &arguments));
        });
        restarting.await.expect("it restarts");
    }

    /// Whether the server has said this.
    pub(crate) fn has_said(&self, text: &str) -> bool {
        let log = std::fs::read(self.0.file("log")).expect("there is a log");
        String::from_utf8_lossy(&log).contains(text)
    }

    fn pg_ctl(&self, arguments: &[&str]) {
        let data = self.data();
        let always = ["--wait", "--silent", "--pgdata", &data];
        succeeded(run("pg_ctl", &[arguments, &always].concat()));
    }

    /// Copies a database into another one, which is empty, as `pg_dump` writes it and `psql` reads it.
    pub(crate) fn copy(&self, from: &str, to: &str) {
        let (home, file) = (self.home(), self.0.file("dump.sql").display().to_string());
        let login = ["--host", &home, "--username=eventbus"];
        let dump = [&login[..], &["--file", &file, from]].concat();
        succeeded(run("pg_dump", &dump));
        let strict = ["--quiet", "--no-psqlrc", "--set=ON_ERROR_STOP=1"];
        let restore = [&login[..], &strict, &["--file", &file, to]].concat();
        succeeded(run("psql", &restore));
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        // One that did not start is not there to be stopped.
        let _ = run(
            "pg_ctl",
            &[
                "stop",
                "--mode=immediate",
                "--wait",
                "--pgdata",
                &self.data(),
            ],
        );
    }
}

/// Lets the server's user write in a directory.
pub(crate) fn give(directory: &Path) {
    if is_root() {
        let given = Command::new("chown")
            .arg("postgres")
            .arg(directory)
            .status();
        assert!(given.expect("there is chown").success());
    }
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.expect("there is id").stdout == b"0\n"
}

/// Runs one of the server's programs, which refuse to be run by root.
fn run(program: &str, arguments: &[&str]) -> Output {
    let mut found: Vec<_> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|versions| versions.flatten().map(|it| it.path().join("bin")).collect())
        .unwrap_or_default();
    found.sort();
    // Elsewhere they are on the path.
    let newest = found.pop().unwrap_or_default().join(program);
    let mut command = match is_root() {
        true => {
            let mut command = Command::new("runuser");
            command.args(["-u", "postgres", "--"]).arg(newest);
            command
        }
        false => Command::new(newest),
    };
    // A server that stays in the background would keep a pipe open: it has its log.
    let stays = program == "pg_ctl";
    let output = || match stays {
        true => Stdio::null(),
        false => Stdio::piped(),
    };
    command
        .args(arguments)
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::null())
        .stdout(output())
        .stderr(output())
        .spawn()
        .and_then(Child::wait_with_output)
        .expect("the programs of PostgreSQL are installed")
}

fn succeeded(output: Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
}
