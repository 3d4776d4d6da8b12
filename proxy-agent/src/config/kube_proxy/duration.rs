//! A span of time as Go writes it: `15m0s`, `1h`, `500ms` (F-5).

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::SignedDuration;
use serde::{Deserialize, Serialize};

/// A span of time as kube-proxy's flags and file have it. It may be negative, so that a check can say so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GoDuration(SignedDuration);

impl GoDuration {
    /// So many seconds.
    #[must_use]
    pub const fn secs(secs: i64) -> Self {
        Self(SignedDuration::from_secs(secs))
    }

    /// As the rest of the program has it; what is negative is nothing.
    #[must_use]
    pub fn positive(self) -> Option<Duration> {
        Duration::try_from(self.0).ok().filter(|duration| !duration.is_zero())
    }

    /// Below zero.
    #[must_use]
    pub fn is_negative(self) -> bool {
        self.0.is_negative()
    }
}

impl FromStr for GoDuration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Go takes a bare zero, and nothing else without a unit.
        if matches!(text, "0" | "+0" | "-0") {
            return Ok(Self::default());
        }
        // What Go does not know, jiff may: its own ISO form and words with blanks.
        let foreign = text.contains(|c: char| c.is_whitespace() || c.is_ascii_uppercase());
        match text.parse() {
            Ok(duration) if !foreign => Ok(Self(duration)),
            _ => Err(format!("{text:?} is not a duration such as 15m0s, 1h or 500ms")),
        }
    }
}

impl TryFrom<String> for GoDuration {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<GoDuration> for String {
    fn from(duration: GoDuration) -> Self {
        duration.to_string()
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use jiff::fmt::friendly::{Direction, Spacing, SpanPrinter};
        let printer = SpanPrinter::new().direction(Direction::Sign).spacing(Spacing::None);
        f.write_str(&printer.duration_to_string(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them_and_read_back() {
        // F-5.
        for (text, millis) in [
            ("15m0s", 900_000),
            ("1h", 3_600_000),
            ("24h0m0s", 86_400_000),
            ("500ms", 500),
            ("1.5s", 1_500),
            ("1m30s", 90_000),
            ("2000us", 2),
            ("0s", 0),
            ("0", 0),
            ("-1s", -1_000),
        ] {
            let duration: GoDuration = text.parse().unwrap();
            assert_eq!(duration.0, SignedDuration::from_millis(millis), "{text}");
            assert_eq!(duration.to_string().parse(), Ok(duration), "{duration}");
        }
        assert_eq!(GoDuration::secs(86_400).to_string(), "24h");
        assert_eq!(GoDuration::secs(-5).to_string(), "-5s");
        assert_eq!(GoDuration::secs(-5).positive(), None);
    }

    #[test]
    fn what_go_does_not_take_is_refused() {
        // F-5.
        for text in ["", "15", "15 m", "PT1H", "ten", "1h x"] {
            let error = text.parse::<GoDuration>().unwrap_err();
            assert!(error.contains(text) && error.contains("15m0s"), "{error}");
        }
    }
}
