//! Which kinds of device carry programs, and why: a packet is translated once on each crossing, where it enters the
//! stack and where it leaves it, whatever devices it passes besides.
//!
//! What the programs themselves leave alone makes most of this simple. They look at no frame that is addressed to
//! another machine on its way in, nor at one with a VLAN tag: so a frame that only passes a bridge's port, the parent of
//! a macvlan or that of a VLAN on its way to the device above is left for that device. A packet that has been translated
//! has another tuple, and is left alone by the next device on its way out.

use netlink_packet_route::link::LinkLayerType;

use agent_core::model::Device;

/// A row of the table.
pub(super) struct Row {
    /// The kernel's words (`IFLA_INFO_KIND`); the empty one is hardware.
    pub(super) kinds: &'static [&'static str],
    /// What such a device is to the programs.
    pub(super) device: Device,
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "said here, shown in ARCHITECTURE.md, compared by a test")
    )]
    pub(super) why: &'static str,
}

const fn row(kinds: &'static [&'static str], device: Device, why: &'static str) -> Row {
    Row { kinds, device, why }
}

/// The table. A kind that is not in it is a [`Device::Wire`]: better looked at for nothing than not at all.
pub(super) const TABLE: &[Row] = &[
    row(&["", "veth", "netkit", "dsa", "openvswitch"], Device::Wire, "leads to a pod or out of the node"),
    row(
        &["bridge"],
        Device::Wire,
        "what is for the node comes up through it, and its own egress is where the node answers; its ports carry \
         programs, too, because what goes from port to port never passes the bridge itself",
    ),
    row(
        &["bond", "team"],
        Device::Wire,
        "the stack sees the packet here; its ports carry none, they would only see it a second time",
    ),
    row(
        &["vlan", "macsec", "hsr", "rmnet", "batadv"],
        Device::Wire,
        "the frame is unwrapped between the parent and it; the parent, which leaves wrapped frames alone, carries \
         programs for its own",
    ),
    row(
        &["macvlan", "macvtap", "ipvlan", "ipvtap"],
        Device::Wire,
        "an end of its own: what is for it is for another machine in the eyes of the parent",
    ),
    row(
        &[
            "tun",
            "wireguard",
            "ipip",
            "sit",
            "gre",
            "gretap",
            "ip6tnl",
            "ip6gre",
            "ip6gretap",
            "erspan",
            "ip6erspan",
            "vxlan",
            "geneve",
            "gtp",
            "vti",
            "vti6",
            "xfrm",
            "bareudp",
            "amt",
            "pfcp",
            "wwan",
            "ppp",
            "l2tpeth",
        ],
        Device::Tunnel,
        "inner packets enter and leave the stack here; the outer ones are the node's own and pass the device below",
    ),
    row(
        &["vrf"],
        Device::Detour,
        "packets enter by the VRF's ports, and some leave through the VRF and then through the port: there they are seen",
    ),
    row(&["ifb"], Device::Detour, "packets are redirected here to be queued, and go on where they were"),
    row(&["nlmon", "vsockmon"], Device::Detour, "carries no packets of the stack"),
    row(&["can", "vcan", "vxcan"], Device::Detour, "its frames are no IP packets"),
    row(
        &["dummy"],
        Device::Holder,
        "holds addresses: what is for them comes in elsewhere, what is sent through it is gone",
    ),
];

/// What a device is. `master` is the kind of the device that it is a port of.
pub(super) fn device(kind: &str, layer: LinkLayerType, master: Option<&str>) -> Device {
    if matches!(master, Some("bond" | "team")) || frames(layer) == Frames::Unknown {
        return Device::Detour;
    }
    let row = TABLE.iter().find(|row| row.kinds.contains(&kind));
    match row.map_or(Device::Wire, |row| row.device) {
        // Modems and point-to-point links of unknown make.
        Device::Wire if frames(layer) == Frames::Network => Device::Tunnel,
        device => device,
    }
}

/// What frames begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frames {
    /// An Ethernet header.
    Ethernet,
    /// The network header.
    Network,
    /// Something that the programs do not know, such as InfiniBand's header or radio data.
    Unknown,
}

/// What frames of a link layer begin with.
pub(super) fn frames(layer: LinkLayerType) -> Frames {
    match layer {
        LinkLayerType::Ether | LinkLayerType::Loopback => Frames::Ethernet,
        LinkLayerType::None
        | LinkLayerType::Rawip
        | LinkLayerType::Ppp
        | LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit
        | LinkLayerType::Ipgre
        | LinkLayerType::Ip6gre => Frames::Network,
        _ => Frames::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(kind: &str) -> Device {
        device(kind, LinkLayerType::Ether, None)
    }

    #[test]
    fn packets_are_met_where_they_enter_and_leave_the_stack() {
        for kind in
            ["", "veth", "bridge", "bond", "team", "vlan", "macvlan", "ipvlan", "netkit", "something new"]
        {
            assert_eq!(is(kind), Device::Wire, "{kind}");
        }
        for kind in ["vxlan", "wireguard", "ipip", "tun"] {
            assert_eq!(is(kind), Device::Tunnel, "{kind}");
        }
        assert_eq!(is("dummy"), Device::Holder);
    }

    #[test]
    fn where_packets_only_pass_by_there_are_no_programs() {
        for kind in ["ifb", "nlmon", "vrf", "vcan"] {
            assert_eq!(is(kind), Device::Detour, "{kind}");
        }
        for master in ["bond", "team"] {
            assert_eq!(
                device("", LinkLayerType::Ether, Some(master)),
                Device::Detour,
                "a port of a {master}"
            );
        }
        for master in ["bridge", "vrf", "openvswitch"] {
            assert_eq!(
                device("veth", LinkLayerType::Ether, Some(master)),
                Device::Wire,
                "a port of a {master}"
            );
        }
    }

    #[test]
    fn frames_that_begin_with_something_else_are_left_alone() {
        for layer in [LinkLayerType::Infiniband, LinkLayerType::Ieee80211Radiotap, LinkLayerType::Can] {
            assert_eq!(device("", layer, None), Device::Detour, "{layer:?}");
        }
        assert_eq!(device("", LinkLayerType::Rawip, None), Device::Tunnel);
        assert_eq!(device("netkit", LinkLayerType::None, None), Device::Tunnel);
    }

    #[test]
    fn the_architecture_names_every_kind_with_its_reason() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../ARCHITECTURE.md");
        let text = std::fs::read_to_string(path).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        for Row { kinds, why, .. } in TABLE {
            let why = why.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(text.contains(&why), "{kinds:?}: {why}");
            for kind in kinds.iter().filter(|kind| !kind.is_empty()) {
                assert!(text.contains(&format!("`{kind}`")), "{kind}");
            }
        }
    }
}
