//! From a change of endpoints in the cluster to its programming here (E-24).

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;

use agent_core::model::Change;
use agent_core::model::{Family, ObjectName, Slice};

/// When endpoints changed that are not programmed yet.
#[derive(Debug)]
pub(in crate::run) struct Latency {
    /// What happened before is not our delay.
    since: Timestamp,
    /// Times of slices whose change comes next.
    announced: HashMap<ObjectName, Timestamp>,
    waiting: BTreeMap<(ObjectName, Family), Vec<Timestamp>>,
}

impl Latency {
    pub(in crate::run) fn new(since: Timestamp) -> Self {
        Self { since, announced: HashMap::new(), waiting: BTreeMap::new() }
    }

    /// Takes each change before the world does; `slices` still has what the change replaces.
    pub(in crate::run) fn observe<'a>(
        &mut self,
        change: &Change,
        slices: impl Fn(&ObjectName) -> Option<&'a Slice>,
    ) {
        match change {
            Change::Triggered(slice, at) if *at > self.since => {
                self.announced.insert(slice.clone(), *at);
            }
            Change::Slice(name, Some(slice)) => {
                if let Some(at) = self.announced.remove(name) {
                    let key = (slice.service.clone(), slice.family);
                    self.waiting.entry(key).or_default().push(at);
                }
            }
            Change::Slice(name, None) => {
                self.announced.remove(name);
                if let Some(old) = slices(name) {
                    self.waiting.remove(&(old.service.clone(), old.family));
                }
            }
            _ => {}
        }
    }

    /// Everything observed so far is programmed: the delays in seconds.
    pub(in crate::run) fn programmed(&mut self, now: Timestamp) -> Vec<(Family, f64)> {
        // Clocks of two machines: what seems to come from the future has just happened.
        let delay = |at: Timestamp| now.duration_since(at).as_secs_f64().max(0.0);
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        waiting
            .flat_map(|((_, family), times)| times.into_iter().map(move |at| (family, delay(at))))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn name(name: &str) -> ObjectName {
        ObjectName::new("default", name)
    }

    fn slice(slice: &str, family: Family) -> Change {
        let content = Slice { service: name("web"), family, ports: Vec::new(), endpoints: Vec::new() };
        Change::Slice(name(slice), Some(content))
    }

    /// What is observed at second 110 by an agent that started at second 100.
    fn observed(changes: Vec<Change>) -> Vec<(Family, f64)> {
        let (mut latency, mut slices) = (Latency::new(at(100)), HashMap::new());
        for change in changes {
            latency.observe(&change, |name| slices.get(name));
            if let Change::Slice(name, Some(slice)) = change {
                slices.insert(name, slice);
            }
        }
        let observed = latency.programmed(at(110));
        assert_eq!(latency.programmed(at(111)), [], "once each");
        observed
    }

    #[test]
    fn each_change_with_a_time_counts_once_when_it_is_programmed() {
        // E-24.
        let triggered = |slice: &str, second| Change::Triggered(name(slice), at(second));
        let v4 = || slice("v4", Family::V4);
        assert_eq!(observed(vec![v4()]), []);
        assert_eq!(observed(vec![triggered("v4", 105), v4()]), [(Family::V4, 5.0)]);
        assert_eq!(observed(vec![triggered("v4", 99), v4()]), [], "before our time");
        assert_eq!(observed(vec![triggered("v4", 100), v4()]), [], "not later than our start");
        assert_eq!(observed(vec![triggered("v4", 112), v4()]), [(Family::V4, 0.0)]);
        let twice = vec![triggered("v4", 105), v4(), triggered("v4", 107), v4()];
        assert_eq!(observed(twice), [(Family::V4, 5.0), (Family::V4, 3.0)]);
        let both = vec![triggered("v4", 105), v4(), triggered("v6", 106), slice("v6", Family::V6)];
        assert_eq!(observed(both), [(Family::V4, 5.0), (Family::V6, 4.0)]);
    }

    #[test]
    fn a_deleted_slice_takes_the_times_of_its_service_along() {
        // E-24.
        let triggered = |slice: &str, second| Change::Triggered(name(slice), at(second));
        let gone = vec![
            triggered("one", 105),
            slice("one", Family::V4),
            triggered("six", 106),
            slice("six", Family::V6),
            Change::Slice(name("one"), None),
        ];
        assert_eq!(observed(gone), [(Family::V6, 4.0)]);
    }
}
