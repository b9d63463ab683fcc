//! Says what is going on: a spinner at a terminal, plain lines elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// Does `work` under the heading `what`, and says how long it took when that was noticeable.
pub fn step<R>(what: &str, work: impl FnOnce(&Step) -> Result<R>) -> Result<R> {
    let step = Step::start(what);
    let begin = Instant::now();
    let result = work(&step);
    step.bar.finish_and_clear();
    let took = begin.elapsed();
    match &result {
        Ok(_) if step.shown || took > Duration::from_secs(2) => {
            note(&format!("{what}: {}", seconds(took)))
        }
        Ok(_) => {}
        Err(_) => note(&format!("{what}: failed after {}", seconds(took))),
    }
    result
}

/// A line of our own on standard error.
pub fn note(text: &str) {
    eprintln!("xtask: {text}");
}

/// A duration for people.
pub fn seconds(time: Duration) -> String {
    if time < Duration::from_secs(100) {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} min {:02} s", time.as_secs() / 60, time.as_secs() % 60)
    }
}

/// A step in progress.
pub struct Step {
    bar: ProgressBar,
    shown: bool,
}

impl Step {
    fn start(what: &str) -> Self {
        let shown = stderr().is_terminal();
        let bar = if shown {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        Self { bar, shown }
    }
}
