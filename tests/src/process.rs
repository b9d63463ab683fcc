//! Child processes that cannot outlive their purpose.
//!
//! An emulator under test may hang, ignore SIGTERM (Bochs does) or leave children. So each one runs
//! in a process group of its own, under `timeout -s KILL` as a last resort that works even when
//! `xtask` itself is killed, and its group is killed when the owner is dropped or `xtask` is
//! interrupted.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// The groups alive now, for [`kill_all`].
static GROUPS: Mutex<Vec<i32>> = Mutex::new(Vec::new());

fn groups<R>(f: impl FnOnce(&mut Vec<i32>) -> R) -> R {
    // A poisoned list is still a list of groups that must be killed.
    f(&mut GROUPS.lock().unwrap_or_else(|e| e.into_inner()))
}

/// Kills every process started here that is still running: for the interrupt handler.
pub fn kill_all() {
    groups(|list| {
        for group in list.drain(..) {
            // It may have ended this instant; there is nothing else to do then.
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
    });
}

/// A child in its own process group, killed with that group on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
    group: i32,
    reaped: Option<ExitStatus>,
}

/// A command that the kernel's clock ends after `limit`, whatever becomes of us.
pub fn limited(program: impl AsRef<OsStr>, limit: Duration) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["-s", "KILL", &limit.as_secs().max(1).to_string()])
        .arg(program);
    command
}

impl Process {
    /// Starts `command` as the leader of a new process group.
    pub fn spawn(mut command: Command) -> Result<Self> {
        command.process_group(0);
        let child = command.spawn().with_context(|| {
            format!(
                "starting {:?} (is the program installed?)",
                command.get_program()
            )
        })?;
        let group = i32::try_from(child.id()).context("a process id beyond pid_t")?;
        groups(|list| list.push(group));
        Ok(Self {
            child,
            group,
            reaped: None,
        })
    }

    /// The child, to take its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits up to `limit` for the child to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + limit;
        loop {
            if self.reaped.is_some() {
                return self.reaped;
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                self.reaped = Some(status);
                groups(|list| list.retain(|&g| g != self.group));
                return self.reaped;
            }
            if Instant::now() >= until {
                return None;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends the whole group and reaps the child.
    pub fn kill(&mut self) {
        if self.wait(Duration::ZERO).is_none() {
            let _ = killpg(Pid::from_raw(self.group), Signal::SIGKILL);
            self.wait(Duration::from_secs(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_process_takes_its_children_along() {
        let mut shell = limited("sh", Duration::from_secs(20));
        shell
            .args(["-c", "sleep 19 & echo $!; wait"])
            .stdout(std::process::Stdio::piped());
        let mut process = Process::spawn(shell).expect("sh starts");
        let out = process.child().stdout.take().expect("piped");
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).expect("a pid");
        drop(process);
        let pid: i32 = line.trim().parse().expect("a pid");
        let gone = Instant::now() + Duration::from_secs(5);
        let state = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/stat"));
        while state(pid).is_ok_and(|s| !s.contains(") Z ")) {
            assert!(Instant::now() < gone, "the grandchild {pid} is still there");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
