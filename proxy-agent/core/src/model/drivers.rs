//! Which interfaces carry a program at their driver (XDP): those to the outside, where packets may come that only pass the
//! node.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Link;

/// What `--xdp` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Drivers {
    /// No programs at drivers.
    #[default]
    Off,
    /// At the drivers of hardware and of bonds.
    Auto,
    /// At the driver of whatever has one that takes it.
    Native,
}

/// An interface whose driver is to carry a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AtDriver {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: Arc<str>,
    /// As in [`Link::born`].
    pub born: u32,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Whether it is one end of a virtual cable.
    pub is_pair: bool,
}

/// The interfaces among `links` that are to carry one. A port of a bridge or bond carries none, since what it stands for has
/// the addresses; nor does one with VLANs on top: a driver may take off the tag before the program sees the frame.
pub(super) fn at_drivers(mode: Drivers, links: &[Link], uplinks: &BTreeSet<u32>) -> Vec<AtDriver> {
    if mode == Drivers::Off {
        return Vec::new();
    }
    let lowers: BTreeSet<u32> =
        links.iter().filter(|link| &*link.kind == "vlan").filter_map(|link| link.lower).collect();
    let takes = |link: &Link| match mode {
        Drivers::Off => false,
        Drivers::Auto => matches!(&*link.kind, "" | "bond"),
        Drivers::Native => true,
    };
    links
        .iter()
        .filter(|link| uplinks.contains(&link.index) && !link.layer3 && link.master.is_none())
        .filter(|link| link.mac != [0; 6] && !lowers.contains(&link.index) && takes(link))
        .map(|link| AtDriver {
            index: link.index,
            name: link.name.clone(),
            born: link.born,
            mac: link.mac,
            is_pair: &*link.kind == "veth",
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, kind: &str) -> Link {
        Link { index, kind: kind.into(), mac: [2, 0, 0, 0, 0, 1], ..Link::default() }
    }

    fn chosen(mode: Drivers, links: &[Link]) -> Vec<u32> {
        let uplinks = links.iter().map(|link| link.index).filter(|index| *index < 10).collect();
        at_drivers(mode, links, &uplinks).iter().map(|driver| driver.index).collect()
    }

    #[test]
    fn hardware_and_bonds_by_themselves_and_others_when_asked_for() {
        let links = [link(1, ""), link(2, "bond"), link(3, "veth"), link(4, "vlan"), link(11, "")];
        assert_eq!(chosen(Drivers::Off, &links), [0; 0]);
        assert_eq!(chosen(Drivers::Auto, &links), [1, 2]);
        assert_eq!(chosen(Drivers::Native, &links), [1, 2, 3, 4]);
    }

    #[test]
    fn neither_ports_nor_those_with_vlans_nor_those_without_ethernet() {
        let port = Link { master: Some(9), ..link(1, "") };
        let parent = link(2, "");
        let vlan = Link { lower: Some(2), ..link(12, "vlan") };
        let bare = Link { layer3: true, ..link(3, "") };
        let nameless = Link { mac: [0; 6], ..link(4, "") };
        assert_eq!(chosen(Drivers::Native, &[port, parent, vlan, bare, nameless]), [0; 0]);
    }
}
