//! The house rules, checked: rustfmt, clippy on the host and for the bare targets, and what no
//! compiler checks.
//!
//! `unsafe` has its rooms, and each use in them says why it is sound in a `// SAFETY:` comment
//! directly above; every other crate forbids it. No test is switched off, no feature of a nightly
//! compiler is used, no such lint is silenced.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::factory::{FAILING, UEFI_LOADER};
use crate::packages::run;
use crate::progress::step;
use crate::toolchain::{NONE, UEFI, Workspace, cargo};

/// The folders where `unsafe` may stand.
const ROOMS: [&str; 5] = [
    "hypervisor/cpu",
    "hypervisor/hw",
    "hypervisor/kernel",
    "boot",
    "guest-images",
];
const GUESTS: &str = "guest-images";
/// Attributes that would undo a rule.
const SILENCERS: [&str; 5] = [
    "#[ignore",
    "#![feature",
    "allow(unsafe_code",
    "allow(clippy::undocumented_unsafe_blocks",
    "allow(unsafe_op_in_unsafe_fn",
];

/// Runs all of it and says what was counted.
pub fn lint(workspace: &Workspace) -> Result<String> {
    let mut checks = cargo();
    checks
        .current_dir(&workspace.root)
        .args(["fmt", "--all", "--check"]);
    step("rustfmt", |_| run(checks)).context("not formatted; `cargo fmt --all` does it")?;
    let crates = crates(workspace)?;
    let report = step("house rules", |_| house(workspace, &crates))?;
    step("clippy, host", |_| {
        run(clippy(workspace, &["--all-targets"]))
    })?;
    // Guests have no heap: features of what they share with the hypervisor are not joined with it.
    for (target, guests) in [(NONE, false), (NONE, true), (UEFI, false)] {
        let mut args = vec!["--target", target];
        let chosen = |c: &&Crate| c.target == Some(target) && c.dir.starts_with(GUESTS) == guests;
        for one in crates.iter().filter(chosen) {
            args.extend(["--package", &one.name]);
        }
        if args.len() > 2 {
            let what = if guests { GUESTS } else { target };
            step(&format!("clippy, {what}"), |_| {
                run(clippy(workspace, &args))
            })?;
        }
    }
    step("clippy, fault-injection", |_| {
        let package = ["--target", NONE, "--package", "tessera"];
        run(clippy(
            workspace,
            &[&package[..], &["--features", FAILING]].concat(),
        ))
    })?;
    Ok(report)
}

fn clippy(workspace: &Workspace, args: &[&str]) -> std::process::Command {
    let mut clippy = cargo();
    clippy
        .current_dir(&workspace.root)
        .args(["clippy", "--quiet"])
        .args(args);
    clippy.args(["--", "-D", "warnings"]).stdin(Stdio::null());
    clippy
}

/// A crate of the workspace.
#[derive(Debug)]
struct Crate {
    name: String,
    /// Relative to the root.
    dir: PathBuf,
    /// The bare target it is built for; `None` for what builds on the host.
    target: Option<&'static str>,
    inherits_lints: bool,
}

/// All members, by the top manifest's own list.
fn crates(workspace: &Workspace) -> Result<Vec<Crate>> {
    let read = |file: &Path| -> Result<toml::Table> {
        let text =
            fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        text.parse().with_context(|| format!("{}", file.display()))
    };
    let top = read(&workspace.root.join("Cargo.toml"))?;
    let list = |key: &str| -> Vec<String> {
        let list = top.get("workspace").and_then(|w| w.get(key)?.as_array());
        list.into_iter()
            .flatten()
            .filter_map(|v| v.as_str().map(str::to_owned))
            .collect()
    };
    let host = list("default-members");
    let mut dirs = Vec::new();
    for member in list("members") {
        match member.strip_suffix("/*") {
            None => dirs.push(member),
            Some(parent) => {
                let folder = workspace.root.join(parent);
                let entries = fs::read_dir(&folder)
                    .with_context(|| format!("reading {}", folder.display()))?;
                let names = entries
                    .flatten()
                    .filter(|e| e.path().join("Cargo.toml").exists());
                dirs.extend(names.map(|e| format!("{parent}/{}", e.file_name().to_string_lossy())));
            }
        }
    }
    dirs.sort();
    let mut crates = Vec::new();
    for dir in dirs {
        let manifest = read(&workspace.root.join(&dir).join("Cargo.toml"))?;
        let name = manifest
            .get("package")
            .and_then(|p| p.get("name")?.as_str());
        let name = name
            .with_context(|| format!("{dir} has no package name"))?
            .to_owned();
        let inherits = manifest
            .get("lints")
            .and_then(|l| l.get("workspace")?.as_bool());
        let is_macro = manifest
            .get("lib")
            .and_then(|l| l.get("proc-macro")?.as_bool());
        let target = match &name {
            _ if host.contains(&dir) || is_macro == Some(true) => None,
            name if name == UEFI_LOADER => Some(UEFI),
            _ => Some(NONE),
        };
        crates.push(Crate {
            name,
            dir: dir.into(),
            target,
            inherits_lints: inherits == Some(true),
        });
    }
    Ok(crates)
}

/// What no compiler checks.
fn house(workspace: &Workspace, crates: &[Crate]) -> Result<String> {
    let mut faults = Vec::new();
    let mut counts = Vec::new();
    for one in crates {
        let room = ROOMS.iter().any(|r| one.dir.starts_with(r));
        if !one.inherits_lints {
            faults.push(format!(
                "{}/Cargo.toml: lacks `[lints] workspace = true`",
                one.dir.display()
            ));
        }
        let mut uses = 0;
        for file in sources(&workspace.root.join(&one.dir))? {
            let text =
                fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
            let shown = file
                .strip_prefix(&workspace.root)
                .unwrap_or(&file)
                .display()
                .to_string();
            let code = Code::of(&text);
            uses += code.unsafe_uses();
            faults.extend(
                code.faults(room, is_root(&file))
                    .into_iter()
                    .map(|f| format!("{shown}:{f}")),
            );
        }
        if room {
            counts.push(format!("{} {uses}", one.dir.display()));
        }
    }
    if !faults.is_empty() {
        bail!(
            "the house rules are broken in {} places:\n{}",
            faults.len(),
            faults.join("\n")
        );
    }
    Ok(format!("unsafe blocks: {}", counts.join(", ")))
}

/// Every `.rs` file of a crate, without nested crates and build output.
fn sources(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
        for path in entries.flatten().map(|e| e.path()) {
            if path.is_dir() {
                if !path.join("Cargo.toml").exists() && !path.ends_with("target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a file is the root of a crate, where `forbid` must stand.
fn is_root(file: &Path) -> bool {
    let parent = file.parent();
    let in_bin = parent.is_some_and(|p| p.ends_with("src/bin"));
    let in_src = parent.is_some_and(|p| p.ends_with("src"));
    in_bin || (in_src && (file.ends_with("lib.rs") || file.ends_with("main.rs")))
}

/// A source file with the code and the comments of each line apart; the contents of strings are
/// in neither.
struct Code {
    lines: Vec<Line>,
}

#[derive(Default)]
struct Line {
    code: String,
    comment: String,
}

impl Code {
    fn of(text: &str) -> Self {
        let mut lines = vec![Line::default()];
        let mut rest = text;
        // How deep in block comments, which nest in Rust.
        let mut depth = 0_u32;
        while let Some(c) = rest.chars().next() {
            let skipped = match depth {
                0 => literal_length(rest, lines.last().map_or("", |l| &l.code)),
                _ => 0,
            };
            if skipped > 0 {
                let (literal, after) = rest.split_at(skipped);
                for (i, _) in literal.split('\n').enumerate() {
                    if i > 0 {
                        lines.push(Line::default());
                    }
                }
                if let Some(line) = lines.last_mut() {
                    line.code.push('"');
                }
                rest = after;
                continue;
            }
            let line_comment = depth == 0 && rest.starts_with("//");
            let length = if line_comment {
                rest.find('\n').unwrap_or(rest.len())
            } else if rest.starts_with("/*") {
                depth += 1;
                2
            } else if depth > 0 && rest.starts_with("*/") {
                depth -= 1;
                2
            } else {
                c.len_utf8()
            };
            let (piece, after) = rest.split_at(length);
            if piece == "\n" {
                lines.push(Line::default());
            } else if let Some(line) = lines.last_mut() {
                let comment = line_comment || depth > 0 || piece == "*/";
                if comment {
                    &mut line.comment
                } else {
                    &mut line.code
                }
                .push_str(piece);
            }
            rest = after;
        }
        Self { lines }
    }

    /// Where the word `unsafe` stands, with what follows it on the same line.
    fn unsafes(&self) -> impl Iterator<Item = (usize, &str)> {
        self.lines.iter().enumerate().flat_map(|(number, line)| {
            line.code
                .match_indices("unsafe")
                .filter_map(move |(at, word)| {
                    let before = line.code.get(..at)?.chars().next_back();
                    let after = line.code.get(at + word.len()..)?;
                    let part = |c: char| c.is_alphanumeric() || c == '_';
                    let alone = !before.is_some_and(part) && !after.starts_with(part);
                    alone.then_some((number, after.trim_start()))
                })
        })
    }

    /// Blocks and implementations: the uses that need a reason.
    fn unsafe_uses(&self) -> usize {
        self.unsafes()
            .filter(|(_, after)| needs_reason(after))
            .count()
    }

    fn faults(&self, room: bool, root: bool) -> Vec<String> {
        let mut faults = Vec::new();
        for (number, after) in self.unsafes() {
            if !room {
                faults.push(format!(
                    "{}: `unsafe` outside its rooms ({})",
                    number + 1,
                    ROOMS.join(", ")
                ));
            } else if needs_reason(after) && !self.has_reason(number) {
                faults.push(format!(
                    "{}: `unsafe` without `// SAFETY:` above it",
                    number + 1
                ));
            }
        }
        for (number, line) in self.lines.iter().enumerate() {
            let compact: String = line.code.chars().filter(|c| !c.is_whitespace()).collect();
            let found = SILENCERS.iter().filter(|s| compact.contains(*s));
            faults.extend(found.map(|s| format!("{}: `{s}…` is not allowed here", number + 1)));
        }
        let forbids = self
            .lines
            .iter()
            .any(|l| l.code.trim() == "#![forbid(unsafe_code)]");
        if root && !room && !forbids {
            faults.push("1: lacks `#![forbid(unsafe_code)]`".to_owned());
        }
        faults
    }

    /// Whether the statement that reaches to line `number` has a `SAFETY:` comment in it or
    /// directly above.
    fn has_reason(&self, number: usize) -> bool {
        let mut within_comment = false;
        for (i, line) in self.lines.iter().enumerate().take(number + 1).rev() {
            if line.comment.contains("SAFETY:") {
                return true;
            }
            let code = line.code.trim();
            let comment_only = code.is_empty() && !line.comment.is_empty();
            // A comment ends where something else begins, a statement where another ends.
            let ended = i < number
                && (within_comment && !comment_only
                    || line.comment.is_empty() && (code.is_empty() || code.ends_with([';', '}'])));
            if ended {
                return false;
            }
            within_comment |= comment_only && i < number;
        }
        false
    }
}

/// Whether what follows `unsafe` makes it a block or an implementation, not a declaration.
fn needs_reason(after: &str) -> bool {
    after.is_empty() || after.starts_with('{') || after.starts_with("impl")
}

/// The length of the string or character literal that `rest` begins with, 0 when it does not.
/// `before` is the code before it on its line.
fn literal_length(rest: &str, before: &str) -> usize {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    if before.chars().next_back().is_some_and(word) {
        // Part of a name, or a prefix that has been passed already.
        if !rest.starts_with('"') {
            return 0;
        }
    }
    let prefix = ["br", "cr", "r", "b", "c", ""].into_iter().find(|p| {
        let tail = rest.strip_prefix(p);
        tail.is_some_and(|t| {
            t.starts_with('"') || (p.ends_with('r') && t.trim_start_matches('#').starts_with('"'))
        })
    });
    if let Some(prefix) = prefix {
        let tail = rest.get(prefix.len()..).unwrap_or_default();
        let hashes = tail.len() - tail.trim_start_matches('#').len();
        let body = prefix.len() + hashes + 1;
        if prefix.ends_with('r') {
            let close = format!("\"{}", "#".repeat(hashes));
            let end = rest.get(body..).and_then(|t| t.find(&close));
            return end.map_or(rest.len(), |e| body + e + close.len());
        }
        let mut escaped = false;
        for (i, c) in rest.char_indices().skip_while(|(i, _)| *i < body) {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => return i + 1,
                _ => {}
            }
        }
        return rest.len();
    }
    // A character, and not a lifetime: `'x'`, or an escape.
    let mut chars = rest.char_indices().skip(1);
    if rest.starts_with('\'') {
        match (chars.next(), chars.next()) {
            (Some((_, '\\')), Some(_)) => {
                return chars.find(|(_, c)| *c == '\'').map_or(0, |(i, _)| i + 1);
            }
            (Some(_), Some((i, '\''))) => return i + 1,
            _ => {}
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(text: &str, room: bool) -> Vec<String> {
        Code::of(text).faults(room, false)
    }

    #[test]
    fn words_in_strings_and_comments_do_not_count() {
        let text = "// unsafe\n/* unsafe /* deep */ unsafe */\nlet a = \"unsafe { \\\" \";\n\
                    let b = r#\"unsafe \" {\"#;\nlet c: &'a str = unsafe_name; let q = '\"'; let e = '\\'';\n\
                    #![forbid(unsafe_code)]\n";
        assert_eq!(faults(text, false), [""; 0]);
        assert_eq!(Code::of(text).unsafe_uses(), 0);
        assert_eq!(faults("let q = '\"'; unsafe {}", false).len(), 1);
    }

    #[test]
    fn a_block_has_its_reason_directly_above() {
        for good in [
            "// SAFETY: because\nunsafe { f() }",
            "// SAFETY: because\n// of this\nlet x =\n    unsafe { f() };",
            "match x {\n    // SAFETY: because\n    A => unsafe { f() },\n}",
            "unsafe { f() } // SAFETY: because",
            "/// # Safety\nunsafe fn f() {}",
            "// SAFETY: because\n#[cfg(a)]\nunsafe impl Send for X {}",
            "#[unsafe(no_mangle)]\nextern \"C\" fn f() {}",
        ] {
            assert_eq!(faults(good, true), [""; 0], "{good}");
        }
        for bad in [
            "unsafe { f() }",
            "// SAFETY: because\nf();\nunsafe { g() }",
            "// SAFETY: because\n\nunsafe { g() }",
            "f(); // SAFETY-ish\nunsafe\n{ g() }",
            "unsafe impl Send for X {}",
        ] {
            assert_eq!(faults(bad, true).len(), 1, "{bad}");
        }
    }

    #[test]
    fn nothing_is_switched_off() {
        assert_eq!(
            faults("#[test]\n#[ignore = \"slow\"]\nfn t() {}", true).len(),
            1
        );
        assert_eq!(faults("#![allow( unsafe_code )]", true).len(), 1);
        assert_eq!(Code::of("//! A crate.\n").faults(false, true).len(), 1);
        assert_eq!(
            Code::of("#![forbid(unsafe_code)]\n").faults(false, true),
            [""; 0]
        );
    }
}
