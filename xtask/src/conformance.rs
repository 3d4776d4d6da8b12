//! `tests/conformance.md`: every rule of `tests/rules.txt` with the tests that cite it.
//!
//! A test cites a rule by its id (P-4, or T-1…T-35 for a run of them) in a comment, a doc comment or a table
//! inside it or before it; a golden scenario does so in its title. Only text is looked at, laid out as rustfmt
//! does: that is enough to find the function that a line belongs to.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
};

use anyhow::{Context as _, Result, bail};

use crate::{invariants::rust_files, workspace};

const RULES: &str = "tests/rules.txt";
const TABLE: &str = "tests/conformance.md";
const SCENARIOS: &str = "proxy-agent/tests/scenarios";
/// Where tests of rules may be.
const CODE: [&str; 5] = ["proxy-agent", "proxy-common", "proxy-ebpf", "tests", "xtask/tests"];

/// `cargo xtask conformance`
pub(crate) fn run() -> Result<()> {
    let (text, shown, all) = table()?;
    fs::write(workspace::root().join(TABLE), text).with_context(|| format!("could not write {TABLE}"))?;
    println!("{TABLE}: {shown} of {all} rules are cited by tests");
    Ok(())
}

/// Fails unless the table is what [`run`] would write.
pub(crate) fn check() -> Result<()> {
    let (text, shown, all) = table()?;
    let found = fs::read_to_string(workspace::root().join(TABLE)).unwrap_or_default();
    if found != text {
        bail!("{TABLE} is not in step with the tests; run: cargo xtask conformance");
    }
    println!("{shown} of {all} rules are cited by tests");
    Ok(())
}

/// The table's text, how many rules are shown, and how many there are.
fn table() -> Result<(String, usize, usize)> {
    let root = workspace::root();
    let read =
        |path: &Path| fs::read_to_string(path).with_context(|| format!("could not read {}", path.display()));
    let rules = Rules::parse(&read(&root.join(RULES))?)?;
    let mut shown = Shown::default();
    for folder in CODE {
        for file in rust_files(&root.join(folder))? {
            let name = file.strip_prefix(&root).unwrap_or(&file);
            shown.code(&rules, name, &read(&file)?);
        }
    }
    let scenarios =
        fs::read_dir(root.join(SCENARIOS)).with_context(|| format!("could not list {SCENARIOS}"))?;
    for entry in scenarios {
        let path = entry.with_context(|| format!("could not list {SCENARIOS}"))?.path();
        if path.extension().is_some_and(|extension| extension == "txt") {
            shown.scenario(&rules, path.strip_prefix(&root).unwrap_or(&path), &read(&path)?);
        }
    }
    if !shown.unknown.is_empty() {
        bail!("not in {RULES}:\n{}", shown.unknown.into_iter().collect::<Vec<_>>().join("\n"));
    }
    Ok((rules.table(&shown), shown.by_rule.len(), rules.all.len()))
}

/// A rule's id: its letter and number.
type Id = (char, u32);

/// The rules in order, and where headings come between them.
#[derive(Default)]
struct Rules {
    all: BTreeMap<Id, Rule>,
    sections: Vec<(String, Vec<Id>)>,
}

struct Rule {
    title: String,
    /// Why no test is to be expected.
    reason: Option<String>,
}

impl Rules {
    fn parse(text: &str) -> Result<Self> {
        let mut rules = Self::default();
        for (number, line) in (1..).zip(text.lines()) {
            let place = || format!("{RULES}:{number}: {line}");
            if line.is_empty() || line.starts_with("//") {
                continue;
            }
            if let Some(heading) = line.strip_prefix("# ") {
                rules.sections.push((heading.to_owned(), Vec::new()));
                continue;
            }
            let mut columns = line.split(" | ");
            let id = columns.next().and_then(id).with_context(place)?;
            let title = columns.next().with_context(place)?.to_owned();
            let reason = columns.next().map(ToOwned::to_owned);
            rules.sections.last_mut().with_context(place)?.1.push(id);
            if rules.all.insert(id, Rule { title, reason }).is_some() {
                bail!("{}: the second rule of this id", place());
            }
        }
        Ok(rules)
    }

    /// The whole page.
    fn table(&self, shown: &Shown) -> String {
        let mut page = format!(
            "# Conformance\n\nWhat a Kubernetes service proxy must do, rule by rule, and the tests that show it. \
             Written by\n`cargo xtask conformance` from `rules.txt` and the rules that tests cite; \
             `cargo xtask check` verifies it.\n\n{} of {} rules are cited by tests.\n",
            shown.by_rule.len(),
            self.all.len()
        );
        for (heading, ids) in &self.sections {
            // Writing to a string does not fail.
            let _ = write!(page, "\n## {heading}\n\n| rule | | shown by |\n|---|---|---|\n");
            for id in ids {
                let Some(rule) = self.all.get(id) else { continue };
                let tests = match (shown.by_rule.get(id), &rule.reason) {
                    (Some(tests), _) => tests.iter().cloned().collect::<Vec<_>>().join("<br>"),
                    (None, Some(reason)) => format!("not shown yet: {reason}"),
                    (None, None) => "not shown yet".to_owned(),
                };
                let _ = writeln!(page, "| {}-{} | {} | {tests} |", id.0, id.1, rule.title);
            }
        }
        page
    }
}

/// The tests that cite each rule.
#[derive(Default)]
struct Shown {
    by_rule: BTreeMap<Id, BTreeSet<String>>,
    /// Citations of what is no rule.
    unknown: BTreeSet<String>,
}

impl Shown {
    /// A golden scenario: its title is the comment it begins with.
    fn scenario(&mut self, rules: &Rules, file: &Path, text: &str) {
        let title: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
        self.cite(rules, &title.join(" "), file, None);
    }

    /// A file of Rust code: what its tests cite.
    fn code(&mut self, rules: &Rules, file: &Path, text: &str) {
        let mut scan = Scan::new(is_all_tests(file));
        let mut lines = text.lines().peekable();
        // Citations that wait for the test they stand before.
        let mut waiting = String::new();
        let mut last = None;
        while let Some(line) = lines.next() {
            scan.step(line, lines.peek().copied());
            if !scan.in_tests {
                continue;
            }
            if line.starts_with("//!") {
                self.cite(rules, line, file, None);
            } else if let Some(test) = &scan.test {
                let cited = std::mem::take(&mut waiting) + line;
                self.cite(rules, &cited, file, Some(test));
                last = Some(test.clone());
            } else {
                waiting.push_str(line);
                waiting.push(' ');
            }
        }
        self.cite(rules, &waiting, file, last.as_deref());
    }

    fn cite(&mut self, rules: &Rules, text: &str, file: &Path, test: Option<&str>) {
        let shown = match test {
            Some(test) => format!("`{}` `{test}`", file.display()),
            None => format!("`{}`", file.display()),
        };
        for (first, last) in citations(text) {
            let known: Vec<Id> = rules.all.range(first..=last).map(|(id, _)| *id).collect();
            for id in [first, last].iter().filter(|id| !known.contains(id)) {
                self.unknown.insert(format!("{}-{}, cited in {shown}", id.0, id.1));
            }
            for id in known {
                self.by_rule.entry(id).or_default().insert(shown.clone());
            }
        }
    }
}

/// Whether a whole file is test code.
fn is_all_tests(file: &Path) -> bool {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let mut folders = file.parent().into_iter().flat_map(Path::components).skip(1);
    stem == "tests" || stem.ends_with("_tests") || folders.any(|folder| folder.as_os_str() == "tests")
}

/// Where in a file a line stands.
struct Scan {
    /// In test code.
    in_tests: bool,
    /// An attribute has said that the next function is a test.
    announced: bool,
    /// In the test of this name …
    test: Option<String>,
    /// … which ends with this line.
    end: String,
}

impl Scan {
    fn new(in_tests: bool) -> Self {
        Self { in_tests, announced: false, test: None, end: String::new() }
    }

    fn step(&mut self, line: &str, next: Option<&str>) {
        let code = line.trim_start();
        // A declaration of a file of tests says nothing about the lines after it.
        let declares = next.is_some_and(|next| next.trim_start().starts_with("mod ") && next.ends_with(';'));
        self.in_tests |= code == "#[cfg(test)]" && !declares;
        if line == self.end && self.test.is_some() {
            self.test = None;
        }
        self.announced |= code.starts_with("#[test]") || code.starts_with("#[tokio::test");
        let name = code.trim_start_matches("async ").strip_prefix("fn ");
        if let Some(name) = name.filter(|_| self.announced) {
            self.announced = false;
            let end = name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.len());
            self.test = name.get(..end).map(ToOwned::to_owned);
            self.end = line.chars().take_while(|c| c.is_whitespace()).chain(['}']).collect();
        }
    }
}

/// The rules that a text cites, as runs: P-4 is a run of one.
fn citations(text: &str) -> Vec<(Id, Id)> {
    let part = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    let mut cited: Vec<(Id, Id)> = Vec::new();
    let mut word = String::new();
    let mut joined = false;
    for c in text.chars().chain([' ']) {
        if part(c) {
            word.push(c);
            continue;
        }
        let found = id(&word);
        match (found, cited.last_mut()) {
            (Some(id), Some(run)) if joined && id.0 == run.0.0 => run.1 = id,
            (Some(id), _) => cited.push((id, id)),
            (None, _) => {}
        }
        joined = c == '…' && found.is_some();
        word.clear();
    }
    cited
}

/// `P-4`.
fn id(word: &str) -> Option<Id> {
    let (letter, number) = word.split_once('-')?;
    let mut letters = letter.chars();
    let letter = letters.next().filter(|c| "SEPVMACHFYXZDT".contains(*c))?;
    let is_number = letters.next().is_none() && number.chars().all(|c| c.is_ascii_digit());
    Some((letter, is_number.then(|| number.parse().ok())??))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        let text = "// Said by nobody.\n\n# P: policies\nP-1 | one\nP-2 | two\nP-3 | three\n\n\
                    # T: vectors\nT-1 | first\nT-4 | fourth | out of reach\n";
        Rules::parse(text).unwrap()
    }

    fn shown(file: &str, text: &str) -> Vec<(String, Vec<String>)> {
        let mut shown = Shown::default();
        shown.code(&rules(), Path::new(file), text);
        assert!(shown.unknown.is_empty(), "{:?}", shown.unknown);
        let by_rule = shown.by_rule.into_iter();
        by_rule.map(|(id, tests)| (format!("{}-{}", id.0, id.1), tests.into_iter().collect())).collect()
    }

    #[test]
    fn ids_are_words_of_their_own_and_runs_hold_all_between() {
        let found = |text| {
            let name = |(a, b): &(Id, Id)| format!("{}{}-{}{}", a.0, a.1, b.0, b.1);
            citations(text).iter().map(name).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(found("(P-4, \"T-21\") and X-17: see D-1."), "P4-P4 T21-T21 X17-X17 D1-D1");
        assert_eq!(found("T-1…T-35, H-1 … H-2; P-14…X-2"), "T1-T35 H1-H1 H2-H2 P14-P14 X2-X2");
        assert_eq!(found("UTF-8 SHA-256 P-x XP-4 p-4 node-P-4 P-4-x Q-1 P- V4"), "");
    }

    #[test]
    fn a_citation_belongs_to_the_test_around_it_else_to_the_next_one() {
        let text = "\
//! All of P-1.
fn code() {} // P-2
#[cfg(test)]
mod tests {
    // P-3
    const TABLE: [&str; 1] = [\"T-1\"];

    #[test]
    fn first_of_all() {
        if true {
            // P-2
        }
    }

    fn helper() -> u8 {
        1 // P-1
    }

    /// T-4.
    #[tokio::test(flavor = \"current_thread\")]
    async fn second_of_all() {
        assert!(true, \"P-2\");
    }
}
";
        let at = |name: &str| format!("`proxy-agent/src/a.rs` `{name}`");
        let row = |id: &str, names: &[&str]| (id.to_owned(), names.iter().map(|name| at(name)).collect());
        assert_eq!(
            shown("proxy-agent/src/a.rs", text),
            [
                row("P-1", &["second_of_all"]),
                row("P-2", &["first_of_all", "second_of_all"]),
                row("P-3", &["first_of_all"]),
                row("T-1", &["first_of_all"]),
                row("T-4", &["second_of_all"]),
            ]
        );
    }

    #[test]
    fn code_cites_rules_without_showing_them() {
        let text = "//! P-1\n#[cfg(test)]\nmod tests;\n/// P-2\nfn code() {}\n";
        assert_eq!(shown("proxy-agent/src/model/mod.rs", text), []);
        assert_eq!(shown("tests/src/town.rs", text), []);
        for all_tests in
            ["proxy-agent/src/model/tests.rs", "tests/tests/e2e/a.rs", "proxy-agent/tests/laws.rs"]
        {
            assert_eq!(shown(all_tests, text).len(), 2, "{all_tests}");
        }
        assert!(
            is_all_tests(Path::new("xtask/tests/image.rs")) && !is_all_tests(Path::new("tests/src/a.rs"))
        );
        assert!(is_all_tests(Path::new("proxy-agent/src/source/convert_tests.rs")));
    }

    #[test]
    fn a_scenario_cites_in_its_title_alone() {
        let mut shown = Shown::default();
        let text = "# A title (P-1,\n# P-2).\n-- manifests a.yaml --\n# P-3\n";
        shown.scenario(&rules(), Path::new("a.txt"), text);
        assert_eq!(shown.by_rule.keys().copied().collect::<Vec<_>>(), [('P', 1), ('P', 2)]);
    }

    #[test]
    fn what_is_no_rule_is_found_and_what_no_test_cites_is_listed() {
        let mut shown = Shown::default();
        shown.scenario(&rules(), Path::new("a.txt"), "# P-1…P-2 and P-9\n");
        assert_eq!(Vec::from_iter(&shown.unknown), ["P-9, cited in `a.txt`"]);
        let page = rules().table(&shown);
        assert!(page.contains("2 of 5 rules"), "{page}");
        for line in [
            "## P: policies",
            "| P-1 | one | `a.txt` |",
            "| P-3 | three | not shown yet |",
            "| T-4 | fourth | not shown yet: out of reach |",
        ] {
            assert!(page.contains(&format!("\n{line}\n")), "{line} in {page}");
        }
    }

    #[test]
    fn a_list_of_rules_with_a_slip_is_refused() {
        for text in ["P-1 | before any heading", "# P\nP-1", "# P\nQ-1 | x", "# P\nP-1 | x\nP-1 | y"] {
            assert!(Rules::parse(text).is_err(), "{text}");
        }
    }
}
