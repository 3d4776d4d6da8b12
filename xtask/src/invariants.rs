//! What can be seen in the source text: nothing is unfinished or switched off, and the code map of ARCHITECTURE.md has
//! every room. (Who may use which crate is said in Cargo.toml and deny.toml.)

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result, bail};

use crate::workspace;

/// What no file may hold, tests included. (In pieces, so that this file passes too.)
const ABSENT: [(&str, &str); 3] = [
    (concat!("to", "do!("), "finish it"),
    (concat!("unimple", "mented!("), "finish it"),
    (concat!("#[ig", "nore"), "a test runs or is deleted"),
];

/// The folders with Rust code of ours.
const CODE: [&str; 5] = ["proxy-common", "proxy-agent", "proxy-ebpf", "xtask", "tests"];

/// The crates whose rooms, the folders of their `src`, the code map lists one by one.
const MAPPED: [&str; 6] = [
    "proxy-common",
    "proxy-ebpf",
    "proxy-agent/core",
    "proxy-agent/kernel",
    "proxy-agent/source",
    "proxy-agent",
];

/// Fails with every line that breaks a rule.
pub(crate) fn check() -> Result<()> {
    let root = workspace::root();
    let mut broken = Vec::new();
    let mut files = 0;
    for folder in CODE {
        for file in workspace::files(&root.join(folder), "rs")? {
            let name = file.strip_prefix(&root).unwrap_or(&file);
            broken.extend(unfinished(name, &read(&file)?));
            files += 1;
        }
    }
    let rooms = rooms(&root)?;
    broken.extend(off_the_map(&rooms, &read(&root.join("ARCHITECTURE.md"))?));
    if !broken.is_empty() {
        bail!("{}", broken.join("\n"));
    }
    println!("{files} files: nothing is unfinished; {} rooms: all are on the map", rooms.len());
    Ok(())
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("could not read {}", file.display()))
}

/// What is not finished in a file, a line for each.
fn unfinished(file: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        let code = text.split("//").next().unwrap_or_default();
        for (word, what) in ABSENT.iter().filter(|(word, _)| code.contains(word)) {
            found.push(format!("{}:{line}: `{word}`: {what}", file.display()));
        }
    }
    found
}

/// The rooms of the mapped crates, as the map writes them: every folder with code.
fn rooms(root: &Path) -> Result<BTreeSet<String>> {
    let mut rooms = BTreeSet::new();
    for package in MAPPED {
        let sources = root.join(package).join("src");
        for file in workspace::files(&sources, "rs")? {
            let room = file.parent().filter(|room| *room != sources);
            let room = room.and_then(|room| room.strip_prefix(root).ok());
            rooms.extend(room.map(|room| room.display().to_string()));
        }
    }
    Ok(rooms)
}

/// Rooms that the code map lacks, and places of the map that are no rooms.
fn off_the_map(rooms: &BTreeSet<String>, architecture: &str) -> Vec<String> {
    let mapped: BTreeSet<&str> = architecture
        .lines()
        .skip_while(|line| !line.starts_with("## 2. Code map"))
        .take_while(|line| !line.starts_with("## 3."))
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .filter(|place| place.contains("/src/") && !place.ends_with(".rs"))
        .collect();
    let absent = rooms.iter().filter(|room| !mapped.contains(room.as_str()));
    let absent = absent.map(|room| format!("{room}: a room that the code map of ARCHITECTURE.md lacks"));
    let gone = mapped.iter().filter(|place| !rooms.contains(**place));
    absent.chain(gone.map(|place| format!("ARCHITECTURE.md: {place}: no such room"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfinished_code_and_tests_that_are_switched_off_are_found_everywhere() {
        for (word, _) in ABSENT {
            let text = format!("#[cfg(test)]\nmod tests {{\n    {word}]\n}}\n// {word}\n");
            assert_eq!(unfinished(Path::new("tests/src/lib.rs"), &text).len(), 1, "{word}");
        }
    }

    #[test]
    fn a_room_is_on_the_map_and_the_map_has_no_other() {
        let rooms = BTreeSet::from(["a/src/one".to_owned(), "a/src/two".to_owned()]);
        let map = "## 2. Code map\n| `a/src/one` | x | y |\n| `a/src/three` | x |\n| `a/src/b.rs` | x |\n## 3. Next\n| `a/src/four` |\n";
        let broken = off_the_map(&rooms, map);
        assert_eq!(broken.len(), 2, "{broken:?}");
        assert!(broken[0].starts_with("a/src/two: ") && broken[1].contains("a/src/three"));
    }
}
