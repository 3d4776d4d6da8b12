//! Figures: a value, what it is compared with, and the ratio; as a table and as JSON.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    /// What was measured, and after `vs` what it is compared with.
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// The value it is compared with.
    pub(crate) baseline: Option<f64>,
    /// Value over baseline; of two measured values the median of the rounds' ratios.
    pub(crate) ratio: Option<f64>,
}

/// All figures of a run, and what is missing.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    figures: Vec<Figure>,
    missing: Vec<String>,
}

impl Figures {
    /// A value that stands alone.
    pub(crate) fn value(&mut self, name: impl Into<String>, unit: &'static str, rounds: &[f64]) {
        let value = median(rounds);
        self.figures.push(Figure { name: name.into(), value, unit, baseline: None, ratio: None });
    }

    /// A value against a number from elsewhere.
    pub(crate) fn against(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        rounds: &[f64],
        limit: f64,
    ) {
        let value = median(rounds);
        let ratio = Some(value / limit);
        self.figures.push(Figure { name: name.into(), value, unit, baseline: Some(limit), ratio });
    }

    /// Two values of the same rounds.
    pub(crate) fn pair(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        rounds: &[f64],
        baseline: &[f64],
    ) {
        let ratios: Vec<f64> = rounds.iter().zip(baseline).map(|(value, base)| value / base).collect();
        self.figures.push(Figure {
            name: name.into(),
            value: median(rounds),
            unit,
            baseline: Some(median(baseline)),
            ratio: Some(median(&ratios)),
        });
    }

    /// Something could not be measured.
    pub(crate) fn missing(&mut self, name: &str, why: &str) {
        self.missing.push(format!("{name}: {why}"));
    }

    /// Whether nothing is missing.
    pub(crate) fn complete(&self) -> bool {
        self.missing.is_empty()
    }

    pub(crate) fn print(&self) -> Result<()> {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(vec!["FIGURE", "VALUE", "UNIT", "BASELINE", "RATIO"]);
        let number = |value: Option<f64>| value.map_or_else(|| "-".into(), short);
        for figure in &self.figures {
            table.add_row(vec![
                figure.name.clone(),
                short(figure.value),
                figure.unit.into(),
                number(figure.baseline),
                figure.ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.3}")),
            ]);
        }
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if [1, 3, 4].contains(&index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", table.trim_fmt())?;
        for missing in &self.missing {
            writeln!(out, "NOT MEASURED  {missing}")?;
        }
        out.flush()?;
        Ok(())
    }

    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.figures)? + "\n";
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }
}

/// The middle one; of an even number the mean of the middle two.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => f64::NAN,
        (length, middle) if length % 2 == 1 => sorted[middle],
        (_, middle) => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

fn short(value: f64) -> String {
    if value.abs() >= 1000.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

/// Says what is being measured, to a person who waits.
pub(crate) fn progress(line: &str) {
    eprintln!("bench: {line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_whatever_the_order() {
        assert!((median(&[9.0, 1.0, 5.0]) - 5.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0, 2.0, 100.0]) - 3.0).abs() < f64::EPSILON);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_ratio_is_taken_round_by_round() {
        let mut figures = Figures::default();
        // The machine was ten times slower in the second round: both sides felt it.
        figures.pair("a vs b", "1/s", &[10.0, 1.0, 10.0], &[20.0, 2.0, 20.0]);
        assert_eq!(figures.figures[0].ratio, Some(0.5));
        assert!(figures.complete());
        figures.missing("c", "no such tool");
        assert!(!figures.complete());
    }
}
