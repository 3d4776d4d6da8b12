//! What clients saw, as values that are saved and compared.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::scene::Forwarder;

/// Attempts and their outcomes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    /// Attempts that were answered as they should be.
    pub answered: u64,
    /// Attempts that were not.
    pub failed: u64,
    /// Failures by reason.
    pub reasons: BTreeMap<String, u64>,
    /// The longest time that an answered attempt took.
    pub slowest_ms: f64,
}

impl Tally {
    /// All attempts.
    #[must_use]
    pub fn tried(&self) -> u64 {
        self.answered + self.failed
    }

    /// Counts one attempt.
    pub fn note(&mut self, outcome: Result<(), String>, took: Duration) {
        match outcome {
            Ok(()) => {
                self.answered += 1;
                self.slowest_ms = self.slowest_ms.max(took.as_secs_f64() * 1000.0);
            }
            Err(reason) => {
                self.failed += 1;
                *self.reasons.entry(reason).or_default() += 1;
            }
        }
    }
}

/// One line of a report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Who forwarded.
    pub forwarder: Forwarder,
    /// Which attempts.
    pub what: String,
    /// How many there were, the sum of the next two.
    pub tried: u64,
    /// What they came to.
    #[serde(flatten)]
    pub tally: Tally,
}

/// What was sent without waiting for any answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spoofed {
    /// Who had to bear it.
    pub forwarder: Forwarder,
    /// Packets that were sent.
    pub packets: u64,
    /// How long sending took.
    pub seconds: f64,
}

/// A whole run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The floods in it.
    pub spoofed: Vec<Spoofed>,
    /// What clients saw.
    pub rows: Vec<Row>,
}

impl Report {
    /// Adds a line.
    pub(super) fn row(&mut self, forwarder: Forwarder, what: &str, tally: Tally) {
        self.rows.push(Row { forwarder, what: what.into(), tried: tally.tried(), tally });
    }

    /// The lines of a forwarder.
    pub fn of(&self, forwarder: Forwarder) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(move |row| row.forwarder == forwarder)
    }

    /// What failed with a forwarder, over all its lines.
    #[must_use]
    pub fn failed(&self, forwarder: Forwarder) -> u64 {
        self.of(forwarder).map(|row| row.tally.failed).sum()
    }

    /// Adds what another run came to.
    pub fn append(&mut self, other: Self) {
        self.spoofed.extend(other.spoofed);
        self.rows.extend(other.rows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_counts_every_attempt_once_and_keeps_forwarders_apart() {
        let mut tally = Tally::default();
        tally.note(Ok(()), Duration::from_millis(7));
        tally.note(Ok(()), Duration::from_millis(3));
        // A failure's time says how long somebody was ready to wait, not how slow an answer was.
        tally.note(Err("connect timeout".into()), Duration::from_secs(5));
        assert_eq!((tally.answered, tally.failed, tally.tried()), (2, 1, 3));
        assert_eq!(tally.reasons, BTreeMap::from([("connect timeout".to_owned(), 1)]));
        assert!((tally.slowest_ms - 7.0).abs() < 0.001);
        let mut report = Report::default();
        report.row(Forwarder::Agent, "some", Tally::default());
        report.row(Forwarder::Nftables, "some", tally);
        assert_eq!((report.failed(Forwarder::Agent), report.failed(Forwarder::Nftables)), (0, 1));
        let text = serde_json::to_string(&report).unwrap();
        assert!(text.contains(r#""tried":3,"answered":2,"failed":1"#), "{text}");
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
