//! Figures: a value, how far its rounds lie apart, what it is compared with and what it ought to be; as
//! tables and as JSON.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

/// What a figure ought to be at most.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Goal {
    /// Its value, in its unit.
    Value(f64),
    /// Its ratio to the baseline.
    Ratio(f64),
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    /// The part of the benchmarks that it is from.
    part: &'static str,
    /// What was measured, and after `vs` what it is compared with.
    name: String,
    /// The median of the rounds.
    value: f64,
    /// A tenth of the rounds lies below the one, a tenth above the other.
    low: f64,
    high: f64,
    unit: &'static str,
    /// The median of what it is compared with.
    baseline: Option<f64>,
    /// The median of the rounds' ratios.
    ratio: Option<f64>,
    goal: Option<Goal>,
    met: Option<bool>,
}

impl Figure {
    fn new(part: &'static str, name: String, unit: &'static str, rounds: &[f64]) -> Self {
        Self {
            part,
            name,
            value: median(rounds),
            low: rank(rounds, 0.1),
            high: rank(rounds, 0.9),
            unit,
            baseline: None,
            ratio: None,
            goal: None,
            met: None,
        }
    }

    /// Says what it ought to be.
    pub(crate) fn within(&mut self, goal: Goal) {
        self.goal = Some(goal);
        self.met = Some(match goal {
            Goal::Value(most) => self.value <= most,
            Goal::Ratio(most) => self.ratio.is_some_and(|ratio| ratio <= most),
        });
    }

    fn cells(&self) -> Vec<String> {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        let goal = self.goal.map(|goal| match goal {
            Goal::Value(most) => format!("<= {most} {}", self.unit),
            Goal::Ratio(most) => format!("<= {most} x"),
        });
        vec![
            self.name.clone(),
            or_dash(self.baseline.map(short)),
            short(self.value),
            format!("{}..{}", short(self.low), short(self.high)),
            self.unit.into(),
            or_dash(self.ratio.map(|ratio| format!("{ratio:.2}"))),
            or_dash(goal),
            or_dash(self.met.map(|met| if met { "met" } else { "NOT MET" }.into())),
        ]
    }
}

/// A part of the benchmarks, and what baseline and value are called in its table.
#[derive(Clone, Copy, Debug)]
struct Section {
    part: &'static str,
    baseline: &'static str,
    value: &'static str,
}

/// All figures of a run, and what is missing.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    sections: Vec<Section>,
    figures: Vec<Figure>,
    missing: Vec<String>,
    /// Where parts write what is drawn.
    pub(crate) out: PathBuf,
}

impl Figures {
    /// None yet; what parts draw goes to this folder.
    pub(crate) fn new(out: &Path) -> Self {
        Self { out: out.into(), ..Self::default() }
    }

    /// What follows is of this part.
    pub(crate) fn begin(&mut self, part: &'static str, baseline: &'static str, value: &'static str) {
        self.sections.push(Section { part, baseline, value });
    }

    fn push(&mut self, name: String, unit: &'static str, rounds: &[f64]) -> &mut Figure {
        let part = self.sections.last().map_or("", |section| section.part);
        let at = self.figures.len();
        self.figures.push(Figure::new(part, name, unit, rounds));
        &mut self.figures[at]
    }

    /// A value that stands alone.
    pub(crate) fn value(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        rounds: &[f64],
    ) -> &mut Figure {
        self.push(name.into(), unit, rounds)
    }

    /// Two values of the same rounds.
    pub(crate) fn pair(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        rounds: &[f64],
        baseline: &[f64],
    ) -> &mut Figure {
        let ratios: Vec<f64> = rounds.iter().zip(baseline).map(|(value, base)| value / base).collect();
        let figure = self.push(name.into(), unit, rounds);
        figure.baseline = Some(median(baseline));
        figure.ratio = Some(median(&ratios));
        figure
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
        let mut out = std::io::stdout().lock();
        for section in &self.sections {
            let figures: Vec<&Figure> =
                self.figures.iter().filter(|figure| figure.part == section.part).collect();
            if !figures.is_empty() {
                writeln!(out, "{}\n", section.table(&figures))?;
            }
        }
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

impl Section {
    fn table(&self, figures: &[&Figure]) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_content_arrangement(ContentArrangement::Disabled);
        let title = self.part.to_uppercase();
        table.set_header(vec![
            title.as_str(),
            self.baseline,
            self.value,
            "SPREAD",
            "UNIT",
            "RATIO",
            "GOAL",
            "",
        ]);
        for figure in figures {
            table.add_row(figure.cells());
        }
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if [1, 2, 3, 5].contains(&index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.trim_fmt()
    }
}

/// The middle one; of an even number the mean of the middle two.
pub(crate) fn median(values: &[f64]) -> f64 {
    rank(values, 0.5)
}

/// What a share of the values lies below; between two of them in proportion.
pub(crate) fn rank(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = share * last as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
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

    fn same(one: f64, other: f64) -> bool {
        (one - other).abs() < 1e-9
    }

    #[test]
    fn the_median_is_in_the_middle_whatever_the_order() {
        assert!(same(median(&[9.0, 1.0, 5.0]), 5.0));
        assert!(same(median(&[4.0, 1.0, 2.0, 100.0]), 3.0));
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn the_spread_leaves_out_a_tenth_at_either_end() {
        let rounds: Vec<f64> = (0..=10).map(f64::from).collect();
        assert!(same(rank(&rounds, 0.1), 1.0) && same(rank(&rounds, 0.9), 9.0));
        assert!(same(rank(&[7.0], 0.9), 7.0));
    }

    #[test]
    fn a_ratio_is_taken_round_by_round() {
        let mut figures = Figures::default();
        // The machine was ten times slower in the second round: both sides felt it.
        let figure = figures.pair("a vs b", "1/s", &[10.0, 1.0, 10.0], &[20.0, 2.0, 20.0]);
        figure.within(Goal::Ratio(0.5));
        assert_eq!((figure.ratio, figure.met), (Some(0.5), Some(true)));
        assert!(figures.complete());
        figures.missing("c", "no such tool");
        assert!(!figures.complete());
    }
}
