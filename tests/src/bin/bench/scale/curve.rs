//! The figures as a table, and drawn.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::{
    BLACK, ChartBuilder, Color, IntoDrawingArea, IntoLogRange, LineSeries, PathElement, RGBColor, SVGBackend,
    SeriesLabelPosition, WHITE,
};

use super::sample::{Measure, Point, Samples, Who};
use crate::rulesets::Kind;

const SIZE: (u32, u32) = (720, 420);

/// Writes `scale.csv`, and a drawing of each measure that more than one size is known of.
pub(super) fn save(folder: &Path, samples: &Samples) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let table = folder.join("scale.csv");
    std::fs::write(&table, csv(samples)).with_context(|| format!("writing {}", table.display()))?;
    for measure in Measure::ALL {
        let lines: Vec<(Who, Vec<Point>)> = Who::ALL
            .into_iter()
            .map(|who| (who, samples.line(measure, who)))
            .filter(|(_, line)| line.len() > 1)
            .collect();
        if !lines.is_empty() {
            let file = folder.join(format!("{}.svg", measure.name()));
            draw(&file, measure, &lines).with_context(|| format!("drawing {}", file.display()))?;
        }
    }
    Ok(())
}

fn csv(samples: &Samples) -> String {
    let mut text = String::from("measure,unit,who,services,median,low,high\n");
    for measure in Measure::ALL {
        for who in Who::ALL {
            for Point { services, value, low, high } in samples.line(measure, who) {
                let (name, unit, who) = (measure.name(), measure.unit(), who.name().replace(", ", " "));
                // Writing to a string does not fail.
                writeln!(text, "{name},{unit},{who},{services},{value:.3},{low:.3},{high:.3}").ok();
            }
        }
    }
    text
}

/// Both axes are logarithmic: what is drawn lies apart by powers of ten.
fn draw(file: &Path, measure: Measure, lines: &[(Who, Vec<Point>)]) -> Result<()> {
    // No failure of drawing can go to another thread.
    let broken = |error: &dyn std::fmt::Display| anyhow!("{error}");
    let all = || lines.iter().flat_map(|(_, line)| line);
    let most = all().map(|point| point.services).max().unwrap_or(1);
    let low = all().map(height).fold(f64::INFINITY, f64::min) / 1.5;
    let high = all().map(height).fold(0.0, f64::max) * 1.5;
    // Where lines do not go.
    let place = if measure == Measure::Rate {
        SeriesLabelPosition::LowerLeft
    } else {
        SeriesLabelPosition::UpperLeft
    };
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|error| broken(&error))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(measure.title(), ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d((1.0..f64::from(most)).log_scale(), (low..high).log_scale())
        .map_err(|error| broken(&error))?;
    chart
        .configure_mesh()
        .x_desc("Services")
        .y_desc(measure.unit())
        .x_label_formatter(&|services| format!("{services:.0}"))
        .y_label_formatter(&|value| if *value < 1.0 { format!("{value}") } else { format!("{value:.0}") })
        .light_line_style(WHITE)
        .draw()
        .map_err(|error| broken(&error))?;
    for (who, line) in lines {
        let color = color(*who);
        let points = line.iter().map(|point| (f64::from(point.services), height(point)));
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)).point_size(3))
            .map_err(|error| broken(&error))?
            .label(who.name())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(place)
        .background_style(WHITE)
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(|error| broken(&error))?;
    area.present().map_err(|error| broken(&error))
}

/// What is nothing, or less by what others freed meanwhile, has no place on such an axis: it lies at the bottom.
fn height(point: &Point) -> f64 {
    point.value.max(0.01)
}

const fn color(who: Who) -> RGBColor {
    match who {
        Who::Nobody => RGBColor(130, 130, 130),
        Who::Agent => RGBColor(0, 90, 200),
        Who::AgentTc => RGBColor(60, 170, 230),
        Who::Rules(Kind::Nftables) => RGBColor(220, 120, 0),
        Who::Rules(Kind::Iptables) => RGBColor(180, 30, 40),
    }
}
