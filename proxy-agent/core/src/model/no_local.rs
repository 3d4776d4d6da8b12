//! Service ports that this node serves nobody of, although the cluster could: a figure operators watch (H-42).

use std::collections::BTreeMap;
use std::ops::{AddAssign, SubAssign};

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

impl AddAssign for NoLocal {
    fn add_assign(&mut self, other: Self) {
        self.internal += other.internal;
        self.external += other.external;
    }
}

impl SubAssign for NoLocal {
    fn sub_assign(&mut self, other: Self) {
        self.internal -= other.internal;
        self.external -= other.external;
    }
}

impl AddAssign for NoLocalByFamily {
    fn add_assign(&mut self, other: Self) {
        self.v4 += other.v4;
        self.v6 += other.v6;
    }
}

impl SubAssign for NoLocalByFamily {
    fn sub_assign(&mut self, other: Self) {
        self.v4 -= other.v4;
        self.v6 -= other.v6;
    }
}

impl NoLocalByFamily {
    /// Among the ports of a Service.
    pub(super) fn of(ports: &BTreeMap<ServicePort, DesiredService>) -> Self {
        let mut all = Self::default();
        for (port, desired) in ports.iter().filter(|(_, desired)| desired.local.is_empty()) {
            let count = match port.family {
                Family::V4 => &mut all.v4,
                Family::V6 => &mut all.v6,
            };
            let missed = |internal: u32| {
                const MISSED: u32 = frontend::LOCAL | frontend::ANY;
                let bits = MISSED | frontend::INTERNAL;
                desired.frontends.iter().any(|f| f.flags & bits == MISSED | internal)
            };
            count.internal += u64::from(missed(frontend::INTERNAL));
            count.external += u64::from(missed(0));
        }
        all
    }
}
