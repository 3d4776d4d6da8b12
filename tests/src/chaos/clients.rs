//! The load of a play: crowds of clients in a pod, on the host and outside, and what they have lost, with the steps of
//! the fault during which it was lost.

use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;

use super::progress;
use crate::crowd::{Count, Loss, Plan, Said, Target, now_ms};
use crate::pod::Place;
use crate::probe::Process;

/// How long a request may take: a lost SYN is sent twice more until then.
const TIMEOUT_MS: u64 = 5000;
/// How long crowds may take to say something besides.
const SOON: Duration = Duration::from_secs(20);
/// Crowds end by themselves after this time.
const LIMIT: &str = "86400";
/// So many losses of a step are reported one by one; the others are counted.
const REPORT: u64 = 10;
/// Steps of a loss that are reported.
const STEPS: usize = 3;

/// For how long a crowd asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Term {
    /// Until the play is over.
    Play,
    /// Until the fault ends it with [`Clients::end_round`].
    Round,
}

/// Crowds that run until they are ended, and what those have counted that were.
#[derive(Debug, Default)]
pub struct Clients {
    crowds: Vec<(Term, Process)>,
    /// Of crowds that have ended.
    ended: Count,
    /// Of crowds that run.
    running: Count,
    /// What somebody else than a crowd has counted: losses, and how often it was looked.
    others: Count,
    /// Losses that have been reported, of those that began in the step of this number.
    reported: (usize, u64),
    steps: Vec<(u64, String)>,
    /// Times in which new requests may fail; the last one may still last.
    gaps: Vec<(u64, Option<u64>)>,
    /// New requests that have failed in one.
    excused: u64,
}

impl Clients {
    /// Starts a crowd in each place and waits until its connections are open.
    pub fn start(&mut self, term: Term, crowds: &[(&Place, Vec<Target>)], rate: f64) -> Result<()> {
        for (place, targets) in crowds {
            let plan =
                Plan { client: place.name.clone(), targets: targets.clone(), rate, timeout_ms: TIMEOUT_MS };
            let arguments = ["--seconds", LIMIT, "--plan", &serde_json::to_string(&plan)?];
            let mut crowd = Process::start(place, "crowd", &arguments.map(ToOwned::to_owned))?;
            let Said::Count(_) = crowd.line(SOON)? else { anyhow::bail!("a crowd loses before it asks") };
            self.crowds.push((term, crowd));
        }
        Ok(())
    }

    /// Notes what the fault does from now on.
    pub fn step(&mut self, what: impl Into<String>) {
        self.steps.push((now_ms(), what.into()));
    }

    /// From now on new requests may fail: what serves them was taken away, and the agent cannot know yet. They are counted
    /// apart; connections that are held have to live.
    pub fn begin_gap(&mut self) {
        self.gaps.push((now_ms(), None));
    }

    /// What begins from this time on must be served again.
    pub fn end_gap(&mut self, at_ms: u64) {
        if let Some((_, end)) = self.gaps.last_mut() {
            *end = Some(at_ms);
        }
    }

    /// New requests that have failed in a gap.
    #[must_use]
    pub fn excused(&self) -> u64 {
        self.excused
    }

    /// Has all crowds follow an order, and counts.
    pub fn order(&mut self, order: &str) -> Result<()> {
        self.running = Count::default();
        for (_, crowd) in &mut self.crowds {
            crowd.order(order)?;
        }
        let mut losses = Vec::new();
        for (_, crowd) in &mut self.crowds {
            loop {
                match crowd.line(SOON)? {
                    Said::Lost(loss) => losses.push(loss),
                    Said::Count(count) => break self.running.add(&count),
                }
            }
        }
        losses.iter().for_each(|loss| self.take(loss));
        Ok(())
    }

    /// Uses every connection that is held and idle; one that is broken is lost.
    pub fn check(&mut self) -> Result<()> {
        self.order("check")
    }

    /// Reports what has been lost meanwhile, without waiting.
    pub fn receive(&mut self) -> Result<()> {
        let mut losses = Vec::new();
        for (_, crowd) in &mut self.crowds {
            while let Some(said) = crowd.printed()? {
                if let Said::Lost(loss) = said {
                    losses.push(loss);
                }
            }
        }
        losses.iter().for_each(|loss| self.take(loss));
        Ok(())
    }

    /// Ends all crowds, with a last look at the connections that are held.
    pub fn end(&mut self) -> Result<()> {
        self.check()?;
        self.ended.add(&std::mem::take(&mut self.running));
        self.crowds.clear();
        Ok(())
    }

    /// Ends the crowds of this round, with a last look at the connections that they hold.
    pub fn end_round(&mut self) -> Result<()> {
        let crowds = std::mem::take(&mut self.crowds);
        let (round, play): (Vec<_>, Vec<_>) = crowds.into_iter().partition(|(term, _)| *term == Term::Round);
        self.crowds = round;
        self.end()?;
        self.crowds = play;
        self.order("report")
    }

    /// Counts something that a fault has tried itself; what did not come as expected is lost.
    pub fn note(&mut self, what: &str, expected: &str, begun_ms: u64, outcome: Result<()>) {
        self.others.requests += 1;
        if let Err(error) = outcome {
            self.others.lost += 1;
            let (what, expected, came) = (what.to_owned(), expected.to_owned(), brief(&format!("{error:#}")));
            self.tell(&Loss { begun_ms, ended_ms: now_ms(), what, expected, came, held: false });
        }
    }

    /// What there is so far, as of the last order.
    #[must_use]
    pub fn count(&self) -> Count {
        let mut sum = self.ended.clone();
        sum.add(&self.running);
        sum.add(&self.others);
        // Those of crowds that run may have been reported after the last order.
        sum.lost = sum.lost.saturating_sub(self.excused);
        sum
    }

    /// Takes what a crowd says of a loss.
    fn take(&mut self, loss: &Loss) {
        if fell_into(loss, &self.gaps) {
            self.excused += 1;
        } else {
            self.tell(loss);
        }
    }

    fn tell(&mut self, loss: &Loss) {
        let step = self.steps.partition_point(|(at, _)| *at <= loss.begun_ms);
        if self.reported.0 != step {
            self.reported = (step, 0);
        }
        self.reported.1 += 1;
        if self.reported.1 <= REPORT {
            progress(&line(loss, &self.steps));
        } else if self.reported.1 == REPORT + 1 {
            progress("LOST more in this step; it is counted, and not reported one by one");
        }
    }
}

/// Whether it is a new request that fell into one of these times, which have begun one after the other.
fn fell_into(loss: &Loss, gaps: &[(u64, Option<u64>)]) -> bool {
    let within = |(from, until): &(u64, Option<u64>)| {
        loss.ended_ms >= *from && until.is_none_or(|until| loss.begun_ms < until)
    };
    !loss.held && gaps.iter().any(within)
}

/// What fits into one line of a long text: its beginning and its end.
fn brief(text: &str) -> String {
    /// Characters of either.
    const PART: usize = 300;
    let text: Vec<char> = text.trim().replace('\n', " | ").chars().collect();
    let (begin, end) = (text.iter().take(PART), text.iter().skip(PART.max(text.len().saturating_sub(PART))));
    let gap = if text.len() > 2 * PART { " … " } else { "" };
    begin.chain(gap.chars().collect::<Vec<_>>().iter()).chain(end).collect()
}

/// One loss in one line.
fn line(loss: &Loss, steps: &[(u64, String)]) -> String {
    // The step that the attempt began in, and those that came before its end.
    let first = steps.partition_point(|(at, _)| *at <= loss.begun_ms).saturating_sub(1);
    let until = steps.partition_point(|(at, _)| *at <= loss.ended_ms);
    let during = steps.get(first..until).unwrap_or_default();
    let left = during.len().saturating_sub(STEPS);
    let mut steps: Vec<&str> = during.iter().take(STEPS).map(|(_, step)| step.as_str()).collect();
    let more = format!("{left} more");
    if left > 0 {
        steps.push(&more);
    }
    let Loss { begun_ms, ended_ms, what, expected, came, held: _ } = loss;
    let time = time(*begun_ms).unwrap_or_else(|| begun_ms.to_string());
    let took = ended_ms.saturating_sub(*begun_ms);
    format!(
        "LOST {time} {what}: expected {expected}, came {came} after {took} ms; step: {}",
        steps.join(" → ")
    )
}

/// The time of day in UTC.
fn time(ms: u64) -> Option<String> {
    let time = Timestamp::from_millisecond(i64::try_from(ms).ok()?).ok()?;
    Some(time.strftime("%H:%M:%S%.3f").to_string())
}

/// An error with all that led to it, for [`Clients::note`].
pub(super) fn looked<T>(outcome: Result<T>, what: &str) -> Result<()> {
    outcome.map(drop).with_context(|| what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_one_line_with_its_time_and_the_steps_it_fell_into() {
        let steps: Vec<_> = (0..9).map(|n| (1000 * n, format!("step {n}"))).collect();
        let loss = |begun_ms, ended_ms| Loss {
            begun_ms,
            ended_ms,
            what: "a: new TCP".into(),
            expected: "an answer".into(),
            came: "timeout".into(),
            held: false,
        };
        let text = line(&loss(3_500, 4_100), &steps);
        assert_eq!(
            text,
            "LOST 00:00:03.500 a: new TCP: expected an answer, came timeout after 600 ms; step: step 3 → step 4"
        );
        assert!(line(&loss(1_500, 8_100), &steps).ends_with("step 1 → step 2 → step 3 → 5 more"));
        assert!(line(&loss(9_999, 9_999), &steps).ends_with("step: step 8"));
        assert!(line(&loss(5, 9), &[]).ends_with("step: "));
    }

    #[test]
    fn a_new_request_may_fail_in_a_gap_and_a_connection_that_is_held_may_not() {
        let loss = |begun_ms, ended_ms, held| Loss {
            begun_ms,
            ended_ms,
            what: String::new(),
            expected: String::new(),
            came: String::new(),
            held,
        };
        let gaps = [(100, Some(200)), (300, None)];
        for (begun, ended, excused) in
            [(50, 99, false), (50, 100, true), (199, 250, true), (200, 250, false), (400, 500, true)]
        {
            assert_eq!(fell_into(&loss(begun, ended, false), &gaps), excused, "{begun} to {ended}");
            assert!(!fell_into(&loss(begun, ended, true), &gaps));
        }
    }

    #[test]
    fn a_long_text_is_cut_in_its_middle_and_has_no_lines() {
        assert_eq!(brief("one\ntwo\n"), "one | two");
        let long = brief(&format!("begin{}end", "x".repeat(5000)));
        assert!(long.starts_with("beginx") && long.contains(" … ") && long.ends_with("xend"), "{long}");
        assert_eq!(long.chars().count(), 603);
        assert_eq!(brief(&"y".repeat(500)).len(), 500);
    }

    #[test]
    fn what_a_fault_tries_itself_counts_like_a_request() {
        let mut clients = Clients::default();
        clients.note("a look", "all in line", now_ms(), Ok(()));
        clients.note("a look", "all in line", now_ms(), Err(anyhow::anyhow!("not so")));
        let count = clients.count();
        assert_eq!((count.requests, count.lost, count.held), (2, 1, 0));
    }
}
