//! Who cites which rule.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use super::{
    RULES,
    rules::{Id, Rules, id, shown},
};

/// The citations of all files.
pub(super) struct Cited<'r> {
    rules: &'r Rules,
    /// The tests that cite each rule.
    pub(super) by_test: BTreeMap<Id, BTreeSet<String>>,
    /// Citations of what is no rule.
    unknown: Vec<String>,
}

impl<'r> Cited<'r> {
    pub(super) fn new(rules: &'r Rules) -> Self {
        Self { rules, by_test: BTreeMap::new(), unknown: Vec::new() }
    }

    /// A golden scenario: its title is the comment it begins with.
    pub(super) fn scenario(&mut self, file: &Path, text: &str) {
        let title: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
        self.page(file, &title.join("\n"));
        self.shown_by(&title.join(" "), file, None);
    }

    /// A file of Rust code: what its tests cite, and whether all that it cites exists.
    pub(super) fn code(&mut self, file: &Path, text: &str) {
        self.page(file, text);
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
                self.shown_by(line, file, None);
            } else if let Some(test) = &scan.test {
                let cited = std::mem::take(&mut waiting) + line;
                self.shown_by(&cited, file, Some(test));
                last = Some(test.clone());
            } else {
                waiting.push_str(line);
                waiting.push(' ');
            }
        }
        self.shown_by(&waiting, file, last.as_deref());
    }

    /// Any text: shows nothing, but may not cite what is no rule.
    pub(super) fn page(&mut self, file: &Path, text: &str) {
        for (number, line) in (1..).zip(text.lines()) {
            let ends = citations(line).into_iter().flat_map(|(first, last)| BTreeSet::from([first, last]));
            for id in ends.filter(|id| !self.rules.all.contains_key(id)) {
                self.unknown.push(format!("{}:{number}: {} is not in {RULES}", file.display(), shown(id)));
            }
        }
    }

    fn shown_by(&mut self, text: &str, file: &Path, test: Option<&str>) {
        let place = match test {
            Some(test) => format!("`{}` `{test}`", file.display()),
            None => format!("`{}`", file.display()),
        };
        for (first, last) in citations(text).into_iter().filter(|(first, last)| first <= last) {
            for (id, _) in self.rules.all.range(first..=last) {
                self.by_test.entry(*id).or_default().insert(place.clone());
            }
        }
    }

    /// What is to be put right: citations of nothing, and rules that have neither a test nor a reason, or both.
    pub(super) fn wrong(&self) -> Vec<String> {
        let unshown = self.rules.all.iter().filter_map(|(id, rule)| {
            let (shown, what) = (shown(*id), (self.by_test.contains_key(id), rule.no_test.is_some()));
            match what {
                (false, false) => Some(format!("{shown}: no test cites it, and {RULES} does not say why")),
                (true, true) => Some(format!("{shown}: tests cite it, and {RULES} says that it needs none")),
                (true, false) | (false, true) => None,
            }
        });
        self.unknown.iter().cloned().chain(unshown).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::rules::example;

    fn by_test(file: &str, text: &str) -> Vec<(String, Vec<String>)> {
        let rules = example();
        let mut cited = Cited::new(&rules);
        cited.code(Path::new(file), text);
        assert!(cited.unknown.is_empty(), "{:?}", cited.unknown);
        let by_test = cited.by_test.into_iter();
        by_test.map(|(id, tests)| (shown(id), tests.into_iter().collect())).collect()
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
            by_test("proxy-agent/src/a.rs", text),
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
        assert_eq!(by_test("proxy-agent/src/model/mod.rs", text), []);
        assert_eq!(by_test("tests/src/test_cluster/mod.rs", text), []);
        for all_tests in
            ["proxy-agent/src/model/tests.rs", "tests/tests/e2e/a.rs", "proxy-agent/tests/laws.rs"]
        {
            assert_eq!(by_test(all_tests, text).len(), 2, "{all_tests}");
        }
        assert!(
            is_all_tests(Path::new("xtask/tests/image.rs")) && !is_all_tests(Path::new("tests/src/a.rs"))
        );
        assert!(is_all_tests(Path::new("proxy-agent/src/source/convert_tests.rs")));
    }

    #[test]
    fn a_scenario_cites_in_its_title_alone() {
        let rules = example();
        let mut cited = Cited::new(&rules);
        let text = "# A title (P-1,\n# P-2).\n-- manifests a.yaml --\n# P-3\n";
        cited.scenario(Path::new("a.txt"), text);
        assert_eq!(cited.by_test.keys().copied().collect::<Vec<_>>(), [('P', 1), ('P', 2)]);
    }

    #[test]
    fn what_is_no_rule_may_be_cited_nowhere() {
        let rules = example();
        let mut cited = Cited::new(&rules);
        cited.page(Path::new("README.md"), "P-1\nP-3…P-9\n");
        cited.code(Path::new("proxy-agent/src/a.rs"), "/// P-8\nfn code() {}\n");
        let unknown = ["README.md:2: P-9", "proxy-agent/src/a.rs:1: P-8"];
        assert_eq!(
            cited.unknown,
            unknown.map(|place| format!("{place} is not in docs/service-semantics.md"))
        );
        assert!(cited.by_test.is_empty());
    }

    #[test]
    fn a_rule_has_a_test_or_a_reason_to_have_none() {
        let rules = example();
        let mut cited = Cited::new(&rules);
        cited.scenario(Path::new("a.txt"), "# P-1…P-3, T-1\n");
        assert_eq!(cited.wrong(), [""; 0]);
        cited.scenario(Path::new("b.txt"), "# T-4\n");
        let mut none = Cited::new(&rules);
        none.scenario(Path::new("a.txt"), "# P-1…P-2, T-1\n");
        assert!(matches!(&cited.wrong()[..], [wrong] if wrong.starts_with("T-4: tests cite it")));
        assert!(matches!(&none.wrong()[..], [wrong] if wrong.starts_with("P-3: no test cites it")));
    }
}
