//! What holds for the whole node.

#[cfg(feature = "next-layout")]
pub use super::next::Config;
use super::table_type;
use crate::addr::{Addr, Port};

/// `--masquerade-all`: ClusterIP flows are masqueraded whatever their source (M-6).
pub const MASQUERADE_ALL: u32 = 1 << 0;
/// Flows to local endpoints under the Cluster policy are masqueraded too, as kube-proxy does (M-8).
pub const MASQUERADE_LOCAL: u32 = 1 << 1;
/// Sockets of pods are translated (`--socket-lb=all`).
pub const SOCKET_PODS: u32 = 1 << 2;
/// Sockets of the host are translated (`--socket-lb=all|host`).
pub const SOCKET_HOST: u32 = 1 << 3;
/// The IPv4 pod range is known: sources outside it are masqueraded towards ClusterIPs (M-6).
pub const POD_RANGE_V4: u32 = 1 << 4;
/// The same for IPv6.
pub const POD_RANGE_V6: u32 = 1 << 5;
/// Host processes reach NodePorts at 127.0.0.1 and ::1, too.
pub const LOCALHOST_NODE_PORTS: u32 = 1 << 6;
/// Pods are known by the interface they send through ([`iface::POD`]), not by their address (M-1).
pub const POD_INTERFACES: u32 = 1 << 7;
/// What is new is left to another proxy on this node: flows that are there go on, none begins, and nothing is
/// rejected.
pub const LEAVE_NEW: u32 = 1 << 8;
/// The middle of a TCP connection that has no flow is left to the kernel's connection tracking: it may be
/// another proxy's.
pub const LEAVE_MIDDLE: u32 = 1 << 9;

/// Ranges of ClusterIPs that the programs look at, both families together.
pub const SERVICE_RANGES: usize = 8;

/// Ranges of masquerade ports.
pub const PORT_RANGES: usize = 8;

/// Kernel features, probed by the agent and frozen into the programs when they are loaded.
pub mod feature {
    /// `bpf_ktime_get_coarse_ns` (5.11); otherwise the precise clock, which costs 30 ns more.
    pub const COARSE_CLOCK: u32 = 1 << 0;
    /// `bpf_set_retval` for socket hooks (5.18); otherwise a rejected connect fails with EPERM.
    pub const SET_RETVAL: u32 = 1 << 1;
    /// `BPF_F_IPV6` in `bpf_l4_csum_replace` (6.16, backported): keeps a hardware checksum of IPv6 true.
    pub const CSUM_IPV6: u32 = 1 << 2;
    /// `bpf_get_netns_cookie` in TC programs and socket hooks (5.8 for sockets).
    pub const NETNS_COOKIE: u32 = 1 << 3;
    /// `bpf_skc_to_mptcp_sock` in socket hooks (5.19): what is translated is a subflow, what the process holds is
    /// the MPTCP socket.
    pub const MPTCP_SOCKET: u32 = 1 << 4;
    /// A verifier that gets through what direct server return takes besides (6.6; those up to 6.1 do not).
    pub const WRAP: u32 = 1 << 5;
}

/// What is known of an address: values of `ADDRESSES`.
pub mod address {
    /// A programmed ClusterIP: ports that the Service does not define are rejected (P-21).
    pub const CLUSTER_IP: u32 = 1 << 0;
    /// An external IP or load-balancer IP.
    pub const EXTERNAL: u32 = 1 << 1;
    /// An address of this node (loopback excluded).
    pub const NODE: u32 = 1 << 2;
    /// An address of this node at which NodePorts are accepted (V-33).
    pub const NODE_PORT: u32 = 1 << 3;
}

/// Flags of an [`Iface`].
pub mod iface {
    /// Frames have no Ethernet header (WireGuard, IPIP, tun).
    pub const L3: u32 = 1 << 0;
    /// Who sends through it is a pod (with [`super::POD_INTERFACES`]).
    pub const POD: u32 = 1 << 1;
}

#[cfg(not(feature = "next-layout"))]
table_type! {
    /// Settings of the node, in an array of one: changed live.
    pub struct Config {
        /// Cookie of the node's network namespace: distinguishes host sockets from pods' (0: not known).
        pub host_netns: u64,
        /// First address of the IPv4 pod range (IPv4-mapped).
        pub pod_v4: Addr,
        /// First address of the IPv6 pod range.
        pub pod_v6: Addr,
        /// Mask of the IPv6 pod range.
        pub pod_v6_mask: Addr,
        /// The node's primary IPv4 address (Y-10): the source of host sockets towards restricted Services.
        pub node_v4: Addr,
        /// The node's primary IPv6 address.
        pub node_v6: Addr,
        /// Mask of the IPv4 pod range, network order.
        pub pod_v4_mask: u32,
        /// Bits of this module.
        pub flags: u32,
        /// Number of source ports for masquerading in all of `snat_ports`; 0 rules it out.
        pub snat_total: u32,
        /// Seed of the selection hash.
        pub seed: u32,
        /// How many of `service_ranges` are in use.
        pub service_range_count: u32,
        /// UDP port of this node at which agents of other nodes ask whether wrapped packets get through; 0 for none.
        pub probe_port: Port,
        /// Zero.
        pub pad: u16,
        /// Source ports for masquerading; the ranges do not overlap, those that are not in use are empty.
        pub snat_ports: [PortRange; PORT_RANGES],
        /// Ranges of ClusterIPs (P-22). One that is not in use is [`Range::NONE`], so that a reader in the
        /// middle of a change sees no range that is in neither the old nor the new settings but these and
        /// single addresses.
        pub service_ranges: [Range; SERVICE_RANGES],
    }
}

table_type! {
    /// A range of ports, host order.
    pub struct PortRange {
        /// First port.
        pub first: u16,
        /// Number of ports; 0 is none.
        pub count: u16,
    }
}

impl PortRange {
    /// No port at all.
    pub const NONE: Self = Self { first: 0, count: 0 };
}

table_type! {
    /// A range of addresses; IPv4 ones are IPv4-mapped.
    pub struct Range {
        /// First address.
        pub first: Addr,
        /// Mask, network order.
        pub mask: Addr,
    }
}

impl Range {
    /// A range that no packet's destination is in.
    pub const NONE: Self = Self { first: Addr::ANY_V6, mask: Addr([u32::MAX; 4]) };

    /// Whether `addr` lies in it.
    #[inline(always)]
    pub const fn contains(&self, addr: &Addr) -> bool {
        let (a, n, m) = (&addr.0, &self.first.0, &self.mask.0);
        ((a[0] ^ n[0]) & m[0] | (a[1] ^ n[1]) & m[1] | (a[2] ^ n[2]) & m[2] | (a[3] ^ n[3]) & m[3]) == 0
    }
}

impl Config {
    /// Nothing known, nothing translated at sockets, nothing masqueraded.
    pub const EMPTY: Self = Self {
        host_netns: 0,
        pod_v4: Addr::ANY_V4,
        pod_v6: Addr::ANY_V6,
        pod_v6_mask: Addr::ANY_V6,
        node_v4: Addr::ANY_V4,
        node_v6: Addr::ANY_V6,
        pod_v4_mask: 0,
        flags: 0,
        snat_total: 0,
        seed: 0,
        service_range_count: 0,
        probe_port: Port(0),
        pad: 0,
        snat_ports: [PortRange::NONE; PORT_RANGES],
        service_ranges: [Range::NONE; SERVICE_RANGES],
        #[cfg(feature = "next-layout")]
        next: [0; 4],
    };

    /// Whether the agent has written it: the array of one is all zeros before, and an address never is.
    #[inline(always)]
    pub const fn is_written(&self) -> bool {
        self.pod_v4.0[2] != 0
    }

    /// Whether `addr` lies in the pod range of its family.
    #[inline(always)]
    pub const fn is_pod(&self, addr: &Addr) -> bool {
        if addr.is_v4() {
            self.flags & POD_RANGE_V4 != 0 && (addr.word_v4() ^ self.pod_v4.word_v4()) & self.pod_v4_mask == 0
        } else {
            let pods = Range { first: self.pod_v6, mask: self.pod_v6_mask };
            self.flags & POD_RANGE_V6 != 0 && pods.contains(addr)
        }
    }

    /// Whether pods of `addr`'s family can be distinguished from others.
    #[inline(always)]
    pub const fn knows_pods(&self, addr: &Addr) -> bool {
        let bit = if addr.is_v4() { POD_RANGE_V4 } else { POD_RANGE_V6 };
        self.flags & (bit | POD_INTERFACES) != 0
    }

    /// Whether `addr` lies in a range of ClusterIPs.
    #[inline(always)]
    pub const fn is_service_range(&self, addr: &Addr) -> bool {
        let mut n = 0;
        while n < SERVICE_RANGES && n < self.service_range_count as usize {
            if self.service_ranges[n].contains(addr) {
                return true;
            }
            n += 1;
        }
        false
    }

    /// These settings with the masquerade ports of some ranges; those that there is no room for are left out.
    #[must_use]
    pub const fn with_snat_ports(mut self, ranges: &[PortRange]) -> Self {
        self.snat_ports = [PortRange::NONE; PORT_RANGES];
        self.snat_total = 0;
        let mut n = 0;
        while n < PORT_RANGES && n < ranges.len() {
            self.snat_ports[n] = ranges[n];
            self.snat_total += ranges[n].count as u32;
            n += 1;
        }
        self
    }

    /// Whether flows are masqueraded with this port.
    #[inline(always)]
    pub const fn is_snat_port(&self, port: Port) -> bool {
        let mut at = 0;
        while at < PORT_RANGES {
            let PortRange { first, count } = self.snat_ports[at];
            if port.number().wrapping_sub(first) < count {
                return true;
            }
            at += 1;
        }
        false
    }

    /// The `n`th masquerade port, wrapping round; zero when there are none (or, for the moment in which the
    /// settings are changed, when number and ranges do not fit).
    #[inline(always)]
    pub const fn snat_port(&self, n: u32) -> Port {
        let Some(mut offset) = n.checked_rem(self.snat_total) else { return Port(0) };
        let mut at = 0;
        while at < PORT_RANGES {
            let PortRange { first, count } = self.snat_ports[at];
            if offset < count as u32 {
                return Port::new(first.wrapping_add(offset as u16));
            }
            offset -= count as u32;
            at += 1;
        }
        Port(0)
    }
}

table_type! {
    /// An interface that carries the programs.
    pub struct Iface {
        /// Bits of [`iface`].
        pub flags: u32,
        /// Index of the interface by which answers to what came in here have to leave; 0 where the routes say it
        /// (pods, tunnels, whatever is no uplink).
        pub uplink: u32,
        /// Of a bridge's port the bridge's own Ethernet address: frames to it are this host's as well. Else zero.
        pub bridge: [u8; 6],
        /// Zero.
        pub pad: [u8; 2],
    }
}

impl Iface {
    /// An interface that is no bridge's port.
    #[must_use]
    pub const fn new(flags: u32, uplink: u32) -> Self {
        Self { flags, uplink, bridge: [0; 6], pad: [0; 2] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masquerade_ports_are_counted_through_all_ranges_and_round_again() {
        let ranges = [(1024, 2), (40_000, 1), (65_534, 2)].map(|(first, count)| PortRange { first, count });
        let config = Config::EMPTY.with_snat_ports(&ranges);
        let ports: [u16; 7] = core::array::from_fn(|n| config.snat_port(n as u32).number());
        assert_eq!(ports, [1024, 1025, 40_000, 65_534, 65_535, 1024, 1025]);
        assert_eq!(config.snat_port(u32::MAX).number(), 1024, "4294967295 is 5 times 858993459");
        assert_eq!(Config::EMPTY.snat_port(7), Port(0));
        let all: Vec<u16> = (0..=u16::MAX).filter(|n| config.is_snat_port(Port::new(*n))).collect();
        let mut given: Vec<u16> = (0..config.snat_total).map(|n| config.snat_port(n).number()).collect();
        given.sort_unstable();
        assert_eq!(all, given);
        let torn = Config { snat_total: 100, ..config };
        assert_eq!(torn.snat_port(50), Port(0));
        let many = [PortRange { first: 2000, count: 1 }; PORT_RANGES + 1];
        assert_eq!(Config::EMPTY.with_snat_ports(&many).snat_total, PORT_RANGES as u32);
    }

    #[test]
    fn what_the_agent_writes_is_told_from_what_a_new_map_holds() {
        assert!(Config::EMPTY.is_written());
        let zeros = Config { pod_v4: Addr::ANY_V6, node_v4: Addr::ANY_V6, ..Config::EMPTY };
        assert!(!zeros.is_written());
    }
}
