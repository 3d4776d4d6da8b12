//! Service ports that this node serves nobody of, although the cluster could: a figure operators watch (H-42).

use std::collections::BTreeMap;
use std::iter::Sum;

use proxy_common::abi::frontend;

use super::{DesiredService, Family, ServicePort};

/// Number of Service ports with policy Local, an endpoint somewhere, and none here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NoLocal {
    /// By `internalTrafficPolicy`.
    pub internal: u64,
    /// By `externalTrafficPolicy`, where there is a destination that it applies to.
    pub external: u64,
}

/// Both families' counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NoLocalByFamily {
    pub v4: NoLocal,
    pub v6: NoLocal,
}

impl Sum for NoLocalByFamily {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        let add = |a: NoLocal, b: NoLocal| NoLocal {
            internal: a.internal + b.internal,
            external: a.external + b.external,
        };
        all.fold(Self::default(), |sum, one| Self { v4: add(sum.v4, one.v4), v6: add(sum.v6, one.v6) })
    }
}

impl NoLocalByFamily {
    /// Adds the ports of a Service.
    pub(super) fn add(&mut self, ports: &BTreeMap<ServicePort, DesiredService>) {
        for (port, desired) in ports.iter().filter(|(_, desired)| desired.local.is_empty()) {
            let count = match port.family {
                Family::V4 => &mut self.v4,
                Family::V6 => &mut self.v6,
            };
            let missed = |internal: u32| {
                const MISSED: u32 = frontend::LOCAL | frontend::ANY;
                let bits = MISSED | frontend::INTERNAL;
                desired.frontends.iter().any(|f| f.flags & bits == MISSED | internal)
            };
            count.internal += u64::from(missed(frontend::INTERNAL));
            count.external += u64::from(missed(0));
        }
    }
}
