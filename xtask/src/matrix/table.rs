//! What the probes said, as a table in Markdown: a row a probe, a column a kernel.

use super::machine::{Outcome, Probe};

/// A note that is longer does not fit into a cell.
const LONGEST_NOTE: usize = 28;

/// The table.
pub(super) fn text(outcomes: &[Outcome]) -> String {
    let head = std::iter::once("probe".to_owned()).chain(outcomes.iter().map(|one| one.version.clone()));
    let mut rows = vec![head.collect::<Vec<_>>()];
    for name in names(outcomes) {
        let cells =
            outcomes.iter().map(|outcome| cell(outcome.probes.iter().find(|probe| probe.name == name)));
        rows.push(std::iter::once(name.to_owned()).chain(cells).collect());
    }
    let took = outcomes.iter().map(|outcome| format!("{:.0} s", outcome.took.as_secs_f64()));
    rows.push(std::iter::once("in all".to_owned()).chain(took).collect());
    markdown(&rows)
}

/// The probes of all kernels, each once, in the order in which they are done.
fn names(outcomes: &[Outcome]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for outcome in outcomes {
        for (index, probe) in outcome.probes.iter().enumerate() {
            if names.contains(&probe.name.as_str()) {
                continue;
            }
            let before = outcome.probes[..index].last();
            let at = before.and_then(|before| names.iter().position(|name| *name == before.name));
            names.insert(at.map_or(names.len().min(index), |at| at + 1), &probe.name);
        }
    }
    names
}

fn cell(probe: Option<&Probe>) -> String {
    match probe {
        None => "not reached".to_owned(),
        Some(probe) if !probe.ok => "FAILED".to_owned(),
        Some(probe) if probe.note.is_empty() || probe.note.chars().count() > LONGEST_NOTE => "ok".to_owned(),
        Some(probe) => format!("ok: {}", probe.note),
    }
}

fn markdown(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            text.push_str(&format!("| {cell:<width$} "));
        }
        text.push_str("|\n");
        if index == 0 {
            widths.iter().for_each(|width| text.push_str(&format!("|{}", "-".repeat(width + 2))));
            text.push_str("|\n");
        }
    }
    text
}

/// What went wrong, a line each; nothing when all is well.
pub(super) fn failures(outcomes: &[Outcome]) -> Vec<String> {
    let mut failures = Vec::new();
    for outcome in outcomes {
        let failed = outcome.probes.iter().filter(|probe| !probe.ok);
        failures.extend(failed.map(|probe| format!("{}: {}: {}", outcome.version, probe.name, probe.note)));
        failures.extend(outcome.broke_off.iter().map(|why| format!("{}: {why}", outcome.version)));
        if outcome.probes.is_empty() && outcome.broke_off.is_none() {
            failures.push(format!("{}: no probe was done", outcome.version));
        }
    }
    failures
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn outcome(version: &str, probes: &[(&str, bool, &str)], broke_off: Option<&str>) -> Outcome {
        let probe = |(name, ok, note): &(&str, bool, &str)| Probe {
            name: (*name).to_owned(),
            ok: *ok,
            note: (*note).to_owned(),
            seconds: 1.0,
        };
        Outcome {
            version: version.to_owned(),
            probes: probes.iter().map(probe).collect(),
            broke_off: broke_off.map(str::to_owned),
            took: Duration::from_secs(31),
        }
    }

    #[test]
    fn a_probe_is_a_row_and_a_kernel_a_column() {
        let outcomes = [
            outcome("5.10.262-1", &[("load", false, "refused")], Some("it ended")),
            outcome("7.3.4-1", &[("load", true, "2 s"), ("cleanup", true, "")], None),
        ];
        assert_eq!(
            text(&outcomes),
            "| probe   | 5.10.262-1  | 7.3.4-1 |\n\
             |---------|-------------|---------|\n\
             | load    | FAILED      | ok: 2 s |\n\
             | cleanup | not reached | ok      |\n\
             | in all  | 31 s        | 31 s    |\n"
        );
        assert_eq!(failures(&outcomes), ["5.10.262-1: load: refused", "5.10.262-1: it ended"]);
    }

    #[test]
    fn a_machine_that_says_nothing_has_failed() {
        assert_eq!(failures(&[outcome("6.1", &[], None)]).len(), 1);
    }
}
