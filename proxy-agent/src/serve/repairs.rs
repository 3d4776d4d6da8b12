//! What somebody else has done to hooks, pins and tables, and was undone.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// Counts of what was restored, by kind: `link`, `program`, `pin`, `filter`, `entry`.
#[derive(Clone, Debug, Default)]
pub struct Repairs(Family<[(&'static str, &'static str); 1], Counter>);

impl Repairs {
    /// Every kind there is, so that each is seen before it happens.
    const KINDS: [&str; 5] = ["link", "program", "pin", "filter", "entry"];

    /// Offers them to whoever scrapes `registry`.
    pub(super) fn register(&self, registry: &mut Registry) {
        for kind in Self::KINDS {
            self.count(kind, 0);
        }
        let help = "Links, programs behind links, pins, filters and table entries that somebody else had removed or changed, and that were restored";
        registry.register("proxy_agent_repairs", help, self.0.clone());
    }

    /// So many of a kind have been restored.
    pub fn count(&self, what: &'static str, number: usize) {
        self.0.get_or_create(&[("what", what)]).inc_by(number as u64);
    }
}
