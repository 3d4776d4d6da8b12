//! What is attached, by the names of its pins: one link or filter each.

use std::fmt;

/// A direction of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Into the node's stack.
    Ingress,
    /// Out of it.
    Egress,
}

impl Direction {
    /// Both, in the order in which they are attached: a reply that is not translated back does less harm
    /// than a flow that is translated only one way, so the way out comes first.
    pub(crate) const BOTH: [Self; 2] = [Self::Egress, Self::Ingress];

    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    /// The programs of a direction.
    pub(crate) fn programs(self) -> [&'static str; 2] {
        [self.program(false), self.program(true)]
    }

    pub(crate) fn program(self, layer3: bool) -> &'static str {
        match (self, layer3) {
            (Self::Ingress, false) => "tc_ingress",
            (Self::Egress, false) => "tc_egress",
            (Self::Ingress, true) => "tc_ingress_l3",
            (Self::Egress, true) => "tc_egress_l3",
        }
    }
}

/// What a pin in the links directory stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PinName {
    /// A program of the cgroup root.
    Cgroup(String),
    /// The program that marks the new sockets of a cgroup, by its id.
    Excluded(u64),
    /// A TCX link.
    Tcx(u32, Direction),
    /// The program at an interface's driver.
    Driver(u32),
    /// The program of a clsact filter.
    Filter(u32, Direction),
    /// A program that says: the clsact qdisc of this interface is ours.
    Qdisc(u32),
}

impl PinName {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        if let Some(program) = name.strip_prefix("cgroup_") {
            return Some(Self::Cgroup(program.to_owned()));
        }
        let (kind, rest) = name.split_once('_')?;
        match kind {
            "exclude" => return rest.parse().ok().map(Self::Excluded),
            "xdp" => return rest.parse().ok().map(Self::Driver),
            _ => {}
        }
        let (index, place) = rest.split_once('_')?;
        let index = index.parse().ok()?;
        Some(match (kind, place) {
            ("tc", "ingress") => Self::Tcx(index, Direction::Ingress),
            ("tc", "egress") => Self::Tcx(index, Direction::Egress),
            ("clsact", "ingress") => Self::Filter(index, Direction::Ingress),
            ("clsact", "egress") => Self::Filter(index, Direction::Egress),
            ("clsact", "qdisc") => Self::Qdisc(index),
            _ => return None,
        })
    }

    /// All that an interface may have in the stack, a filter before the qdisc that it hangs on.
    pub(crate) fn of_interface(index: u32) -> [Self; 5] {
        let [egress, ingress] = Direction::BOTH;
        [
            Self::Tcx(index, egress),
            Self::Tcx(index, ingress),
            Self::Filter(index, egress),
            Self::Filter(index, ingress),
            Self::Qdisc(index),
        ]
    }

    /// The program that belongs there, for who may not ask the kernel; on an interface without link-layer headers it is the
    /// other one of two that do the same.
    pub(crate) fn program(&self) -> &str {
        match self {
            Self::Cgroup(program) => program,
            Self::Excluded(_) => super::exclude::PROGRAM,
            Self::Tcx(_, direction) | Self::Filter(_, direction) => direction.program(false),
            Self::Driver(_) => super::driver::PROGRAM,
            Self::Qdisc(_) => "",
        }
    }

    /// The interface it belongs to.
    pub(crate) fn interface(&self) -> Option<u32> {
        match self {
            Self::Cgroup(_) | Self::Excluded(_) => None,
            Self::Tcx(index, _) | Self::Filter(index, _) | Self::Driver(index) | Self::Qdisc(index) => {
                Some(*index)
            }
        }
    }
}

impl fmt::Display for PinName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cgroup(program) => write!(f, "cgroup_{program}"),
            Self::Excluded(id) => write!(f, "exclude_{id}"),
            Self::Driver(index) => write!(f, "xdp_{index}"),
            Self::Tcx(index, direction) => write!(f, "tc_{index}_{}", direction.word()),
            Self::Filter(index, direction) => write!(f, "clsact_{index}_{}", direction.word()),
            Self::Qdisc(index) => write!(f, "clsact_{index}_qdisc"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pin_names_survive_the_round_trip() {
        let names = [
            PinName::Cgroup("connect4".into()),
            PinName::Excluded(4711),
            PinName::Tcx(7, Direction::Ingress),
            PinName::Tcx(7, Direction::Egress),
            PinName::Filter(12, Direction::Ingress),
            PinName::Qdisc(12),
            PinName::Driver(12),
        ];
        for name in names {
            assert_eq!(PinName::parse(&name.to_string()), Some(name));
        }
        assert_eq!(PinName::parse("tc_x_ingress"), None);
        assert_eq!(PinName::parse("tc_1_sideways"), None);
        assert_eq!(PinName::parse("new_tc_1_ingress"), None);
    }

    #[test]
    fn pin_names_fit_the_documented_form() {
        assert_eq!(PinName::Tcx(3, Direction::Egress).to_string(), "tc_3_egress");
        assert_eq!(PinName::Cgroup("sendmsg6".into()).to_string(), "cgroup_sendmsg6");
    }
}
