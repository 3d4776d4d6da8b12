//! `tests/conformance.md`: every rule of `docs/service-semantics.md` with the tests that cite it.
//!
//! A test cites a rule by its id (P-4, or T-1…T-35 for a run of them) in a comment, a doc comment or a table
//! inside it or before it; a golden scenario does so in its title. Only text is looked at, laid out as rustfmt
//! does: that is enough to find the function that a line belongs to.
//!
//! Other code and other pages cite rules, too. They show nothing, but what they cite must exist.

mod cited;
mod rules;

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result, bail};

use self::{
    cited::Cited,
    rules::{Id, Rules, shown},
};
use crate::{pages, workspace};

const RULES: &str = "docs/service-semantics.md";
const TABLE: &str = "tests/conformance.md";
const SCENARIOS: &str = "proxy-agent/tests/scenarios";
/// Where code may cite rules.
const CODE: [&str; 5] = ["proxy-agent", "proxy-common", "proxy-ebpf", "tests", "xtask/tests"];

/// `cargo xtask conformance`
pub(crate) fn run() -> Result<()> {
    let Table { text, summary } = Table::read()?;
    fs::write(workspace::root().join(TABLE), text).with_context(|| format!("could not write {TABLE}"))?;
    println!("{TABLE}: {summary}");
    Ok(())
}

/// Fails unless the table is what [`run`] would write.
pub(crate) fn check() -> Result<()> {
    let Table { text, summary } = Table::read()?;
    let found = fs::read_to_string(workspace::root().join(TABLE)).unwrap_or_default();
    if found != text {
        bail!("{TABLE} is not in step with the tests; run: cargo xtask conformance");
    }
    println!("{summary}");
    Ok(())
}

/// What goes to [`TABLE`].
struct Table {
    text: String,
    summary: String,
}

impl Table {
    /// Reads the rules, and everything that may cite them.
    fn read() -> Result<Self> {
        let root = workspace::root();
        let read = |path: &Path| {
            fs::read_to_string(path).with_context(|| format!("could not read {}", path.display()))
        };
        let rules = Rules::parse(&read(&root.join(RULES))?)?;
        let mut cited = Cited::new(&rules);
        for folder in CODE {
            for file in workspace::files(&root.join(folder), "rs")? {
                cited.code(file.strip_prefix(&root).unwrap_or(&file), &read(&file)?);
            }
        }
        for file in workspace::files(&root.join(SCENARIOS), "txt")? {
            cited.scenario(file.strip_prefix(&root).unwrap_or(&file), &read(&file)?);
        }
        for file in pages::all(&root)? {
            cited.page(file.strip_prefix(&root).unwrap_or(&file), &read(&file)?);
        }
        let wrong = cited.wrong();
        if !wrong.is_empty() {
            bail!("{}", wrong.join("\n"));
        }
        Ok(Self::new(&rules, &cited))
    }

    fn new(rules: &Rules, cited: &Cited<'_>) -> Self {
        let summary = format!("{} of {} rules are cited by tests", cited.by_test.len(), rules.all.len());
        let mut text = format!(
            "# Conformance\n\nWhat a Kubernetes service proxy must do, rule by rule, and the tests that show it. \
             Written by\n`cargo xtask conformance` from [the rules](../{RULES}) and the tests that cite them;\n\
             `cargo xtask check` verifies it.\n\n{summary}.\n",
        );
        for (heading, ids) in &rules.sections {
            // Writing to a string does not fail.
            write!(text, "\n## {heading}\n\n| rule | | shown by |\n|---|---|---|\n").ok();
            for id in ids {
                let Some(rule) = rules.all.get(id) else { continue };
                let tests = match (cited.by_test.get(id), &rule.no_test) {
                    (Some(tests), _) => tests.iter().cloned().collect::<Vec<_>>().join("<br>"),
                    (None, Some(reason)) => format!("no test: {reason}"),
                    (None, None) => String::new(),
                };
                writeln!(text, "| {} | {} | {tests} |", link(*id), rule.title).ok();
            }
        }
        Self { text, summary }
    }
}

/// A link from [`TABLE`] to the rule.
fn link(id: Id) -> String {
    format!("[{}](../{RULES}#{})", shown(id), rules::anchor(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_leads_to_each_rule_and_to_its_tests() {
        let rules = rules::example();
        let mut cited = Cited::new(&rules);
        cited.scenario(Path::new("a.txt"), "# P-1…P-2\n");
        let Table { text, summary } = Table::new(&rules, &cited);
        assert_eq!(summary, "2 of 5 rules are cited by tests");
        for line in [
            "## Policies (P)",
            "| [P-1](../docs/service-semantics.md#p-1) | One | `a.txt` |",
            "| [P-3](../docs/service-semantics.md#p-3) | Three |  |",
            "| [T-4](../docs/service-semantics.md#t-4) | fourth | no test: Out of reach. |",
        ] {
            assert!(text.contains(&format!("\n{line}\n")), "{line} in {text}");
        }
    }
}
