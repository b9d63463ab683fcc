//! `cargo xtask bench switch`: frames through rings, the switch and rings again, on one core of
//! this machine, beside what else moves frames here.
//!
//! Time is only good for ratios within a run: others may use the machine as well. Instructions for
//! a frame, counted by valgrind where it is there, repeat.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::{Figure, figures};
use crate::packages::{find_program, run};
use crate::progress::step;
use crate::toolchain::{Workspace, cargo};

/// Frames that are followed one instruction after the other.
const FRAMES: u64 = 20_480;
/// Frames of 64 bytes a second, on one core of today's servers.
const SPEED: u64 = 10_000_000;
/// How many times the Linux bridge's.
const TIMES: u64 = 5;
/// What a neighbour that sprays headers may cost, in percent.
const HARM: u64 = 5;

/// What was measured.
pub struct Report {
    /// All figures, with what was made of them.
    pub figures: Vec<Figure>,
    /// What could not be measured, and why.
    pub notes: Vec<String>,
    /// Whether the marks that do not depend on the machine are kept.
    pub good: bool,
}

fn figure(all: &[Figure], case: &str, unit: &str) -> Option<u64> {
    let found = all.iter().find(|f| f.case == case && f.unit == unit);
    found.map(|f| f.value)
}

/// What `value` is above `base`, in percent.
fn percent_above(value: u64, base: u64) -> u64 {
    (value.saturating_sub(base) * 100).div_ceil(base.max(1))
}

/// Builds the bench and runs all of it.
pub fn measure(workspace: &Workspace) -> Result<Report> {
    let mut build = cargo();
    build
        .current_dir(&workspace.root)
        .env("CARGO_TARGET_DIR", &workspace.target)
        .args(["build", "--quiet", "--profile", "native"])
        .args(["--package", "tessera-switch-bench"])
        .stdin(Stdio::null());
    step("building bench switch", |_| run(build))?;
    let program = workspace.target.join("native/tessera-switch-bench");
    let mut report = Report {
        figures: Vec::new(),
        notes: Vec::new(),
        good: true,
    };
    let said = step("bench switch: the path", |_| {
        output(Command::new(&program).arg("path"))
    })?;
    report.take(&said);
    match find_program("valgrind") {
        None => report
            .notes
            .push("instructions: not counted here: there is no valgrind".to_owned()),
        Some(valgrind) => {
            let cases = output(Command::new(&program).arg("cases"))?;
            step("bench switch: instructions", |_| {
                for case in cases.lines() {
                    let count = instructions(&valgrind, &program, case)?;
                    let per_frame = count / FRAMES;
                    let figure = Figure::new(case, per_frame, "instructions/frame");
                    report.figures.push(figure);
                }
                Ok(())
            })?;
        }
    }
    let scratch = workspace.dir("bench")?;
    let said = step("bench switch: Linux and Open vSwitch", |_| {
        output(Command::new(&program).arg("rivals").arg(&scratch))
    })?;
    report.take(&said);
    report.judge();
    Ok(report)
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("running {command:?}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}\n{said}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// How many instructions a core of the hypervisor takes for [`FRAMES`] frames of a case.
fn instructions(valgrind: &PathBuf, program: &PathBuf, case: &str) -> Result<u64> {
    let mut command = Command::new(valgrind);
    command
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg("--toggle-collect=*counted_carry*")
        .arg(program)
        .args(["count", case, &FRAMES.to_string()])
        .stdin(Stdio::null());
    let output = command.output().context("running valgrind")?;
    let said = String::from_utf8_lossy(&output.stderr);
    // `==7== Collected : 41767906`
    let count = said.lines().find_map(|line| line.split_once("Collected :"));
    let count = count.and_then(|(_, rest)| rest.trim().parse().ok());
    count.with_context(|| format!("valgrind said nothing of {case}:\n{said}"))
}

impl Report {
    fn take(&mut self, said: &str) {
        self.figures.extend(figures(said));
        let notes = said.lines().filter_map(|line| line.strip_prefix("note "));
        self.notes.extend(notes.map(str::to_owned));
    }

    /// Holds the figures against the marks.
    fn judge(&mut self) {
        let speed = |case: &str| figure(&self.figures, case, "frames/s");
        let mut found = Vec::new();
        let own = speed("ports-2-64").unwrap_or(0);
        for rival in ["linux-bridge", "ovs-userspace"] {
            if let Some(theirs) = speed(&format!("{rival}-64")) {
                let tenths = own * 10 / theirs.max(1);
                let case = format!("times-{rival}");
                found.push(Figure::new(&case, tenths, "tenths"));
                self.good &= rival != "linux-bridge" || tenths >= TIMES * 10;
            }
        }
        let counted = |case: &str| figure(&self.figures, case, "instructions/frame");
        if let (Some(quiet), Some(spray)) = (counted("beside-quiet"), counted("beside-spray")) {
            let harm = percent_above(spray, quiet);
            found.push(Figure::new("harm-counted", harm, "percent"));
            self.good &= harm <= HARM;
        }
        if let (Some(quiet), Some(spray)) = (speed("beside-quiet"), speed("beside-spray")) {
            let harm = percent_above(quiet, spray);
            found.push(Figure::new("harm-timed", harm, "percent"));
        }
        self.figures.extend(found);
    }

    /// A table for people.
    pub fn text(&self) -> String {
        let mut out =
            "\nswitch on this host: one core; times are for ratios within this run\n".to_owned();
        for Figure {
            case, value, unit, ..
        } in &self.figures
        {
            let mark = match (case.as_str(), unit.as_str()) {
                ("ports-2-64", "frames/s") => format!("mark: {SPEED} on today's servers"),
                ("times-linux-bridge", _) => format!("mark: {} or more", TIMES * 10),
                ("harm-counted" | "harm-timed", _) => format!("mark: {HARM} or less"),
                _ => String::new(),
            };
            let _ = writeln!(out, "{case:24} {value:>10} {unit:20} {mark}");
        }
        for note in &self.notes {
            let _ = writeln!(out, "{note}");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(spray: u64, bridge: u64) -> Report {
        let mut report = Report {
            figures: Vec::new(),
            notes: Vec::new(),
            good: true,
        };
        report.take(&format!(
            "bench ports-2-64 5000000 frames/s\nbench linux-bridge-64 {bridge} frames/s\n\
             note ovs-userspace: not measured here: no such program\n\
             bench beside-quiet 1000 instructions/frame\n\
             bench beside-spray {spray} instructions/frame\n"
        ));
        report.judge();
        report
    }

    #[test]
    fn marks_are_judged_by_ratios_of_the_same_run() {
        let good = report(1_050, 1_000_000);
        assert!(good.good);
        assert_eq!(
            figure(&good.figures, "times-linux-bridge", "tenths"),
            Some(50)
        );
        assert_eq!(figure(&good.figures, "harm-counted", "percent"), Some(5));
        assert!(good.text().contains("not measured here: no such program"));
        assert!(!report(1_051, 1_000_000).good, "a neighbour costs 6 %");
        assert!(!report(1_000, 1_100_000).good, "4.5 times the bridge");
    }
}
