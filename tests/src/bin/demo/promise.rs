//! What was promised, what was measured.

use anyhow::Result;
use proxy_tests::answer::Load;

use crate::screen::Screen;

/// The rows of the summary.
#[derive(Default)]
pub(crate) struct Promises {
    rows: Vec<Row>,
}

struct Row {
    what: String,
    promise: &'static str,
    made: u64,
    failed: u64,
    kept: bool,
}

impl Promises {
    /// Notes a promise, with the traffic it was held to.
    pub(crate) fn note(&mut self, what: &str, promise: &'static str, loads: &[&Load], kept: bool) {
        let answered: u64 = loads.iter().map(|load| load.made).sum();
        let failed = loads.iter().map(|load| load.failed).sum();
        // What saw no traffic shows nothing.
        let kept = kept && answered > 0;
        self.rows.push(Row { what: what.into(), promise, made: answered + failed, failed, kept });
    }

    /// The summary; whether all were kept.
    pub(crate) fn show(&self, screen: &Screen) -> Result<bool> {
        screen.heading("Summary")?;
        let rows: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| {
                let counts = [row.made.to_string(), row.failed.to_string()];
                let [made, failed] = counts;
                vec![row.what.clone(), made, failed, row.promise.into(), screen.verdict(row.kept)]
            })
            .collect();
        screen.table(&["SCENE", "REQUESTS", "FAILED", "PROMISE", ""], &rows)?;
        Ok(!self.rows.is_empty() && self.rows.iter().all(|row| row.kept))
    }
}
