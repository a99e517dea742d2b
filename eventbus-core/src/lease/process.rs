//! Which process a member lives in, and whether that is certainly dead. Asks the kernel, writes
//! nothing.

use std::fmt::{self, Debug};
use std::fs;
use std::io;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use crate::error::{Error, ErrorKind, Result};

/// A process, told apart from every other one: of other machines and containers, from before a
/// restart of the machine, and of the same number.
///
/// Shown as `{host}/{pid}/{started}`. The host names the boot of the machine and the namespaces
/// in which number and start are counted; it is empty where the system does not tell (other than
/// Linux), and such a process is never certainly dead.
///
/// # Examples
///
/// ```
/// use eventbus_core::ProcessId;
///
/// let process = ProcessId::current();
/// assert!(!process.is_dead());
/// assert_eq!(process.to_string().parse::<ProcessId>()?, process);
/// # Ok::<(), eventbus_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// Empty: unknown.
    host: Arc<str>,
    pid: u32,
    /// In ticks since the boot.
    started: u64,
}

impl ProcessId {
    /// This process.
    #[must_use]
    pub fn current() -> Self {
        static CURRENT: OnceLock<ProcessId> = OnceLock::new();
        CURRENT
            .get_or_init(|| {
                let pid = std::process::id();
                let stat = Stat::read(pid).ok();
                let (host, started) = match (host(), stat) {
                    (Some(host), Some(stat)) => (host, stat.started),
                    _ => (String::new(), 0),
                };
                Self {
                    host: Arc::from(host),
                    pid,
                    started,
                }
            })
            .clone()
    }

    /// Whether it is certain that this process runs no more.
    ///
    /// Certain is only what was started on this machine since its last boot, in the same
    /// namespaces, where the kernel shows every process.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        if self.host.is_empty() || self.host != Self::current().host {
            return false;
        }
        match Stat::read(self.pid) {
            Ok(stat) => stat.ended || stat.started != self.started,
            Err(error) => error.kind() == io::ErrorKind::NotFound && shows_all_processes(),
        }
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.host, self.pid, self.started)
    }
}

impl Debug for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ProcessId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (rest, started) = text.rsplit_once('/')?;
            let (host, pid) = rest.rsplit_once('/')?;
            Some(Self {
                host: Arc::from(host),
                pid: pid.parse().ok()?,
                started: started.parse().ok()?,
            })
        };
        parse().ok_or_else(|| {
            Error::new(
                ErrorKind::Codec,
                "read process id",
                "it is not of the form host/pid/started",
            )
            .with("id", format_args!("{text:?}"))
        })
    }
}

/// The boot of this machine, and the namespaces that give processes their numbers and start times:
/// two containers on one machine have the same numbers for different processes.
fn host() -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let pids = fs::read_link("/proc/self/ns/pid").ok()?;
    // Kernels before 5.6 have one time for all.
    let time = fs::read_link("/proc/self/ns/time").unwrap_or_default();
    Some(format!(
        "{}-{}-{}",
        boot.trim(),
        pids.display(),
        time.display()
    ))
}

/// Whether this system hides no processes of other users, so that one that is not shown is not
/// there.
fn shows_all_processes() -> bool {
    fs::read_to_string("/proc/self/mountinfo").is_ok_and(|mounts| !mounts.contains("hidepid="))
}

/// What the kernel tells about a process in `/proc/{pid}/stat`.
struct Stat {
    started: u64,
    /// None of its threads runs any more; only its parent has not asked for its result yet.
    ended: bool,
}

impl Stat {
    fn read(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Self::parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(text: &str) -> Option<Self> {
        // The name before it may contain anything, brackets included; the third field follows.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3);
        let threads: u32 = field(20)?.parse().ok()?;
        Some(Self {
            started: field(22)?.parse().ok()?,
            ended: matches!(*field(3)?, "Z" | "X") && threads <= 1,
        })
    }
}

// Elsewhere no process is known well enough to be called dead.
#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn of_pid(pid: u32) -> ProcessId {
        ProcessId {
            pid,
            started: Stat::read(pid).expect("it runs").started,
            ..ProcessId::current()
        }
    }

    #[test]
    fn a_process_is_alive_until_it_is_killed_and_dead_before_its_parent_asks() {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .spawn()
            .expect("there is a cat");
        let process = of_pid(child.id());
        assert!(!process.is_dead());
        child.kill().expect("it can be killed");
        while !process.is_dead() {
            std::thread::yield_now();
        }
        child.wait().expect("it ended");
        assert!(process.is_dead(), "nothing is left of it");
    }

    #[test]
    fn another_start_of_the_same_number_is_another_process() {
        let current = ProcessId::current();
        let earlier = ProcessId {
            started: current.started - 1,
            ..current.clone()
        };
        assert!(earlier.is_dead());
        assert_ne!(earlier, current);
    }

    #[test]
    fn a_process_of_another_machine_or_of_an_unknown_host_is_not_certainly_dead() {
        for host in ["", "another"] {
            let process = ProcessId {
                host: Arc::from(host),
                pid: u32::MAX,
                started: 1,
            };
            assert!(!process.is_dead());
            assert_eq!(
                process.to_string().parse::<ProcessId>().expect("an id"),
                process
            );
        }
        assert!("7/8".parse::<ProcessId>().is_err());
    }

    #[test]
    fn a_name_with_brackets_and_blanks_is_passed_over() {
        let rest = "S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 5 0 4711 0";
        let stat = Stat::parse(&format!("7 (a) b (c)) {rest}")).expect("a stat line");
        assert_eq!((stat.started, stat.ended), (4711, false));
        let leader = Stat::parse(&format!("7 (a) {}", rest.replacen('S', "Z", 1)));
        assert!(!leader.expect("a stat line").ended, "its other threads run");
    }
}
