//! The table in REQUIREMENTS.md against the sources.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

/// How many requirements the standard's sections have.
const COUNTS: &[(&str, usize)] = &[
    ("2.1.2", 2),
    ("2.2.2", 2),
    ("2.4.1", 2),
    ("2.5.2", 1),
    ("2.6.1.1.1", 2),
    ("2.6.1.2.1", 1),
    ("2.7.4.1", 1),
    ("2.7.5.1", 2),
    ("2.7.5.3.2", 2),
    ("2.7.7.2", 4),
    ("2.7.8.2", 2),
    ("2.7.10.2", 3),
    ("2.8.12", 2),
    ("2.8.15", 3),
    ("2.8.18", 1),
    ("4.1.1", 1),
    ("4.1.2.1", 2),
    ("4.1.3.2", 1),
    ("4.1.4.2", 1),
    ("4.1.4.3.1", 14),
    ("4.1.4.4.1", 11),
    ("4.1.4.5.1", 5),
    ("4.1.4.6.1", 1),
    ("4.1.4.7.1", 2),
    ("4.1.4.9.1", 3),
    ("4.1.5.1.2.1", 6),
    ("4.1.5.3.1", 1),
    ("4.1.5.4.1", 1),
    ("5.1.4.1", 9),
    ("5.1.6.2.2", 4),
    ("5.1.6.3.2", 2),
    ("5.1.6.4.1", 18),
    ("5.1.6.5.1.1", 2),
    ("5.1.6.5.2.1", 3),
    ("5.1.6.5.3", 2),
    ("5.1.6.5.4.2", 1),
    ("5.1.6.5.6", 1),
    ("5.1.6.5.6.2", 3),
    ("5.3.5.1", 1),
    ("5.3.6.2.1", 2),
    ("5.4.6.2", 1),
    ("6.2", 3),
];

/// The names of all tests below `dir`.
fn tests(dir: &Path, names: &mut HashSet<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests(&path, names);
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        for part in text.split("#[test]\n").skip(1) {
            let name = part.trim_start().strip_prefix("fn ");
            let name = name.and_then(|name| name.split('(').next());
            names.extend(name.map(str::to_owned));
        }
    }
}

#[test]
fn each_has_a_test_that_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut names = HashSet::new();
    tests(&root.join("src"), &mut names);
    let table = fs::read_to_string(root.join("REQUIREMENTS.md")).unwrap();
    let mut counts: HashMap<&str, usize> = HashMap::new();
    let rows = table.lines().filter(|line| line.starts_with("| "));
    for row in rows.filter(|row| !row.starts_with("| section") && !row.starts_with("| ---")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, section, what, shown, _] = cells[..] else {
            panic!("not three cells: {row}");
        };
        assert!(!what.is_empty());
        *counts.entry(section).or_default() += 1;
        if shown.starts_with("n/a: ") {
            continue;
        }
        for name in shown.split(", ") {
            let name = name
                .strip_prefix('`')
                .and_then(|name| name.strip_suffix('`'));
            let name = name.unwrap_or_else(|| panic!("names no test: {row}"));
            assert!(names.contains(name), "there is no test {name}");
        }
    }
    for &(section, count) in COUNTS {
        let found = counts.get(section).copied().unwrap_or(0);
        assert_eq!(found, count, "rows for section {section}");
    }
}
