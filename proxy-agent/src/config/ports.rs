//! Source ports for masquerading: none that the host gives out itself, none that is a NodePort.

use std::ops::RangeInclusive;
use std::path::Path;

use super::Host;

/// Ports that any process may have.
const USABLE: RangeInclusive<u16> = 1024..=65535;
/// The API server's default `--service-node-port-range`.
const NODE_PORTS: RangeInclusive<u16> = 30000..=32767;
/// The kernel's default of `net.ipv4.ip_local_port_range` (ip-sysctl.rst).
const EPHEMERAL: RangeInclusive<u16> = 32768..=60999;
/// Taken when the host's own range leaves nothing.
const LAST_RESORT: RangeInclusive<u16> = 61000..=65535;

/// First port and number of ports, and a warning when they overlap with what the host gives out.
pub(super) fn snat_ports(host: &dyn Host) -> ((u16, u16), Option<String>) {
    let path = Path::new("/proc/sys/net/ipv4/ip_local_port_range");
    let ephemeral = host.read(path).ok().and_then(|text| parse(&text)).unwrap_or(EPHEMERAL);
    match largest_gap(&ephemeral) {
        Some(ports) => (sized(&ports), None),
        None => {
            let warning = format!(
                "net.ipv4.ip_local_port_range ({}-{}) leaves no port for masquerading: {}-{} are used and may \
                 collide with connections of this host; narrow the range, or add these ports to \
                 net.ipv4.ip_local_reserved_ports",
                ephemeral.start(),
                ephemeral.end(),
                LAST_RESORT.start(),
                LAST_RESORT.end(),
            );
            (sized(&LAST_RESORT), Some(warning))
        }
    }
}

fn parse(text: &str) -> Option<RangeInclusive<u16>> {
    let mut words = text.split_whitespace();
    let (first, last) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    (first <= last).then_some(first..=last)
}

/// The largest run of usable ports outside both ranges.
fn largest_gap(ephemeral: &RangeInclusive<u16>) -> Option<RangeInclusive<u16>> {
    let mut taken = [ephemeral.clone(), NODE_PORTS];
    taken.sort_by_key(|range| *range.start());
    let mut gaps = Vec::new();
    let mut next = u32::from(*USABLE.start());
    for range in taken {
        if u32::from(*range.start()) > next {
            gaps.push((next, u32::from(*range.start()) - 1));
        }
        next = next.max(u32::from(*range.end()) + 1);
    }
    if next <= u32::from(*USABLE.end()) {
        gaps.push((next, u32::from(*USABLE.end())));
    }
    let (first, last) = gaps.into_iter().max_by_key(|(first, last)| last - first)?;
    Some(u16::try_from(first).ok()?..=u16::try_from(last).ok()?)
}

fn sized(range: &RangeInclusive<u16>) -> (u16, u16) {
    (*range.start(), range.end() - range.start() + 1)
}

#[cfg(test)]
mod tests {
    use super::super::tests::FakeHost;
    use super::*;

    fn ports(range: &str) -> ((u16, u16), bool) {
        let host = FakeHost::default().with_file("/proc/sys/net/ipv4/ip_local_port_range", range);
        let (ports, warning) = snat_ports(&host);
        (ports, warning.is_some())
    }

    #[test]
    fn masquerade_ports_are_the_largest_gap_the_host_leaves() {
        assert_eq!(ports("32768\t60999\n"), ((1024, 28976), false));
        assert_eq!(ports("1024 29999"), ((32768, 32768), false));
        assert_eq!(ports("1024 50000"), ((50001, 15535), false));
        assert_eq!(ports("2000 65535"), ((1024, 976), false));
        assert_eq!(ports("30000 40000"), ((1024, 28976), false));
        assert_eq!(ports("10000 20000"), ((32768, 32768), false));
    }

    #[test]
    fn a_host_that_gives_out_every_port_is_warned_about() {
        assert_eq!(ports("1024 65535"), ((61000, 4536), true));
        let host = FakeHost::default().with_file("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535");
        let warning = snat_ports(&host).1.unwrap();
        assert!(warning.contains("1024-65535") && warning.contains("ip_local_reserved_ports"), "{warning}");
    }

    #[test]
    fn an_unreadable_range_counts_as_the_kernels_default() {
        assert_eq!(snat_ports(&FakeHost::default()).0, (1024, 28976));
        assert_eq!(ports("garbage"), ((1024, 28976), false));
        assert_eq!(ports("9 8"), ((1024, 28976), false));
    }
}
