//! The test group `fuzz`: libFuzzer at frames, flow text, and the rings of each device.
//!
//! The targets are built by the pinned toolchain with LLVM's coverage pass, which needs no feature
//! of a nightly compiler; there is no address sanitizer, and no unsafe code to need one. Two run at
//! a time, each from the seeds in `tests/fuzz/corpus` and from what earlier runs found, which is
//! kept in the target directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use harness::process::limited;

use crate::packages::run;
use crate::progress::{note, step};
use crate::toolchain::{Workspace, cargo};

/// What is fuzzed, each a program `fuzz-…`.
const TARGETS: [&str; 5] = ["frame", "flow", "net", "rng", "console"];
/// How many run at once.
const WORKERS: usize = 2;
/// The target with programs of its own, so that the flags below are not for build scripts.
const HOST: &str = "x86_64-unknown-linux-gnu";
/// Coverage as libFuzzer wants it, and all checks.
const FLAGS: [&str; 10] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
    "-Coverflow-checks",
    "-Ccodegen-units=1",
    "--cfg",
    "fuzzing",
];
/// The longest input.
const MAX_LENGTH: &str = "-max_len=2048";

/// Runs every target for `seconds`; says how much that was.
pub fn fuzz(workspace: &Workspace, seconds: u64) -> Result<String> {
    let mut build = cargo();
    build
        .current_dir(&workspace.root)
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"))
        .env("CARGO_TARGET_DIR", workspace.dir("fuzz/build")?)
        .args(["build", "--quiet", "--release", "--target", HOST])
        .args(["--package", "tessera-fuzz", "--features", "libfuzzer"])
        .stdin(Stdio::null());
    step("building the fuzz targets", |_| run(build))?;
    let queue = Mutex::new(TARGETS.to_vec());
    let told = Mutex::new(Vec::new());
    let work = || {
        loop {
            let next = queue.lock().unwrap_or_else(|e| e.into_inner()).pop();
            let Some(target) = next else { return };
            let found = one(workspace, target, seconds);
            told.lock()
                .unwrap_or_else(|e| e.into_inner())
                .push((target, found));
        }
    };
    step(&format!("fuzzing for {seconds} s each"), |_| {
        std::thread::scope(|scope| {
            for _ in 0..WORKERS {
                scope.spawn(work);
            }
        });
        Ok(())
    })?;
    let mut told = told.into_inner().unwrap_or_else(|e| e.into_inner());
    told.sort_by_key(|(target, _)| TARGETS.iter().position(|t| t == target));
    let mut words = Vec::new();
    let mut faults = Vec::new();
    for (target, found) in told {
        match found {
            Ok(said) => {
                note(&format!("fuzz {target}: {said}"));
                words.push(format!("{target} {said}"));
            }
            Err(error) => faults.push(format!("{target}: {error:#}")),
        }
    }
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    Ok(words.join(", "))
}

/// Runs one target; how many inputs it took and how many places they reached.
fn one(workspace: &Workspace, target: &str, seconds: u64) -> Result<String> {
    let seeds = workspace.root.join("tests/fuzz/corpus").join(target);
    let found = workspace.dir(&format!("fuzz/{target}/corpus"))?;
    let faults = workspace.dir(&format!("fuzz/{target}/faults"))?;
    let program = program(workspace, target)?;
    let mut fuzzer = limited(&program, Duration::from_secs(seconds + 120));
    fuzzer
        .arg(format!("-max_total_time={seconds}"))
        .args([MAX_LENGTH, "-timeout=10", "-rss_limit_mb=1024"])
        .args(["-print_final_stats=1", "-verbosity=1"])
        .arg(format!("-artifact_prefix={}/", faults.display()))
        .args([&found, &seeds])
        .stdin(Stdio::null());
    let output = fuzzer.output().context("running it")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let log = workspace.dir(&format!("fuzz/{target}"))?.join("log.txt");
    let _ = fs::write(&log, said.as_bytes());
    if !output.status.success() {
        // What was wrong comes first, then libFuzzer's own words.
        let panicked = said.lines().skip_while(|l| !l.contains("panicked at"));
        let panicked: Vec<&str> = panicked.take(3).collect();
        let written = said.lines().filter(|l| l.contains("Test unit written to"));
        let written: Vec<&str> = written.collect();
        bail!(
            "{}; {} {}; all of it: {}",
            output.status,
            panicked.join(" "),
            written.join(" "),
            log.display()
        );
    }
    Ok(summary(&said))
}

fn program(workspace: &Workspace, target: &str) -> Result<PathBuf> {
    let build = workspace.dir("fuzz/build")?;
    let program = build.join(
        Path::new(HOST)
            .join("release")
            .join(format!("fuzz-{target}")),
    );
    if !program.exists() {
        bail!("{} was not made", program.display());
    }
    Ok(program)
}

/// Inputs and places reached, by libFuzzer's closing lines.
fn summary(said: &str) -> String {
    let number = |text: &str| text.split_whitespace().next().and_then(|n| n.parse().ok());
    let after = |word: &str| -> u64 {
        let mut found = said.lines().rev().filter_map(|line| line.split_once(word));
        found.find_map(|(_, rest)| number(rest)).unwrap_or(0)
    };
    let (inputs, places) = (after("stat::number_of_executed_units:"), after(" cov: "));
    format!("{inputs} inputs, {places} places")
}

#[cfg(test)]
mod tests {
    use super::summary;

    #[test]
    fn the_closing_lines_say_how_much_it_was() {
        let said = "#2 INITED cov: 12 ft: 13 corp: 1/1b\n#9 DONE   cov: 345 ft: 400\n\
                    stat::number_of_executed_units: 9\nstat::average_exec_per_sec: 4\n";
        assert_eq!(summary(said), "9 inputs, 345 places");
        assert_eq!(summary(""), "0 inputs, 0 places");
    }
}
