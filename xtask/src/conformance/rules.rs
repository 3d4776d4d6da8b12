//! The rules, as the page lays them down: each at an anchor of its id, in a list or in a table.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};

use super::RULES;

/// A rule's id: its letter and number.
pub(super) type Id = (char, u32);

/// The rules in order, by the sections that they stand in.
#[derive(Default)]
pub(super) struct Rules {
    pub(super) all: BTreeMap<Id, Rule>,
    pub(super) sections: Vec<(String, Vec<Id>)>,
}

pub(super) struct Rule {
    pub(super) title: String,
    /// Why no test is to be expected.
    pub(super) no_test: Option<String>,
}

/// The section that says which rules need no test.
const NO_TEST: &str = "Rules that need no test";

impl Rules {
    pub(super) fn parse(page: &str) -> Result<Self> {
        let mut rules = Self::default();
        for (number, line) in (1..).zip(page.lines()) {
            let place = || format!("{RULES}:{number}: {line}");
            if let Some(heading) = line.strip_prefix("## ") {
                let (_, title) = heading.split_once(". ").unwrap_or(("", heading));
                rules.sections.push((title.to_owned(), Vec::new()));
            } else if let Some((before, rest)) = line.split_once("<a id=\"") {
                let (id, title) = rule(before, rest).with_context(place)?;
                rules.sections.last_mut().with_context(place)?.1.push(id);
                if rules.all.insert(id, Rule { title: title.to_owned(), no_test: None }).is_some() {
                    bail!("{}: the second rule of this id", place());
                }
            } else if rules.sections.last().is_some_and(|(title, _)| title == NO_TEST) {
                let mut cells = line.split('|').map(str::trim).skip(1);
                let Some(id) = cells.next().and_then(id) else { continue };
                let reason = cells.next().with_context(place)?.to_owned();
                rules.all.get_mut(&id).with_context(place)?.no_test = Some(reason);
            }
        }
        rules.sections.retain(|(_, ids)| !ids.is_empty());
        ensure!(!rules.all.is_empty(), "{RULES}: no rules");
        Ok(rules)
    }
}

/// The id and title of the rule on a line that has been split at its anchor. A title ends with a full stop in bold;
/// in a table it is the second cell.
fn rule<'a>(before: &str, rest: &'a str) -> Option<(Id, &'a str)> {
    let (anchored, text) = rest.split_once("\"></a>**")?;
    let (found, title) = if before == "- " {
        text.split_once(".** ")?.0.split_once(' ')?
    } else {
        let (found, cells) = text.split_once("** | ")?;
        (found, cells.split_once(" |")?.0)
    };
    let id = id(found).filter(|id| anchor(*id) == anchored)?;
    (!title.is_empty()).then_some((id, title))
}

/// What a link to a rule ends with.
pub(super) fn anchor(id: Id) -> String {
    shown(id).to_ascii_lowercase()
}

/// `P-4`.
pub(super) fn shown((letter, number): Id) -> String {
    format!("{letter}-{number}")
}

/// `P-4`.
pub(super) fn id(word: &str) -> Option<Id> {
    let (letter, number) = word.split_once('-')?;
    let mut letters = letter.chars();
    let letter = letters.next().filter(|c| "SEPVMACHFYXZDT".contains(*c))?;
    let is_number = letters.next().is_none() && number.chars().all(|c| c.is_ascii_digit());
    Some((letter, is_number.then(|| number.parse().ok())??))
}

/// A page for the tests of this module.
#[cfg(test)]
pub(super) fn example() -> Rules {
    let page = "\
# Rules

## 0. How to read

Nothing is laid down here, nor is P-7 anything.

## 1. Policies (P)

- <a id=\"p-1\"></a>**P-1 One.** The first
  of them.
- <a id=\"p-2\"></a>**P-2 Two.** As P-1.
- <a id=\"p-3\"></a>**P-3 Three.** Another.

## 2. Vectors (T)

| # | Case | Result |
|---|---|---|
| <a id=\"t-1\"></a>**T-1** | first | yes |
| <a id=\"t-4\"></a>**T-4** | fourth | no |

## 3. Rules that need no test

| Rule | Why |
|---|---|
| T-4 | Out of reach. |
";
    Rules::parse(page).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_found_at_their_anchors() {
        let rules = example();
        let found: Vec<_> = rules.all.iter().map(|(id, rule)| (shown(*id), rule.title.as_str())).collect();
        let expected =
            [("P-1", "One"), ("P-2", "Two"), ("P-3", "Three"), ("T-1", "first"), ("T-4", "fourth")];
        assert_eq!(found, expected.map(|(id, title)| (id.to_owned(), title)));
        let sections: Vec<_> =
            rules.sections.iter().map(|(title, ids)| (title.as_str(), ids.len())).collect();
        assert_eq!(sections, [("Policies (P)", 3), ("Vectors (T)", 2)]);
        assert_eq!(rules.all[&('T', 4)].no_test.as_deref(), Some("Out of reach."));
    }

    #[test]
    fn a_page_with_a_slip_is_refused() {
        let rule = "- <a id=\"p-1\"></a>**P-1 One.** Text.";
        for page in [
            rule.to_owned(),
            "## 1. P\n".to_owned(),
            format!("## 1. P\n{rule}\n{rule}\n"),
            format!("## 1. P\n{}\n", rule.replace("p-1", "p-2")),
            format!("## 1. P\n{}\n", rule.replace("One.**", "One**")),
            format!("## 1. P\n{}\n", rule.replace("P-1", "Q-1")),
            "## 1. T\n| <a id=\"t-1\"></a>**T-1** |\n".to_owned(),
            format!("## 1. P\n{rule}\n## 2. Rules that need no test\n| P-2 | why |\n"),
        ] {
            assert!(Rules::parse(&page).is_err(), "{page}");
        }
    }
}
