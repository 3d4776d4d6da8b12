//! Source ports for masquerading: none that is reserved or a NodePort, and if enough are left, none that the host gives
//! out itself. What is in use towards an endpoint all the same is found out with each flow.

use std::ops::RangeInclusive;
use std::path::Path;

use proxy_common::abi::PortRange;

use super::Host;
use agent_core::model::{NODE_PORTS, ports};

/// Ports that any process may have.
const USABLE: RangeInclusive<u16> = 1024..=65535;
/// The kernel's default of `net.ipv4.ip_local_port_range` (ip-sysctl.rst).
const EPHEMERAL: RangeInclusive<u16> = 32768..=60999;
/// With fewer ports outside the host's own range, that is used as well: two thousand new flows a second to one endpoint
/// need as many.
const ENOUGH: usize = 16_384;

/// The ranges, and a warning when there are few.
pub(super) fn snat_ports(host: &dyn Host) -> (Vec<PortRange>, Option<String>) {
    let read = |name: &str| host.read(&Path::new("/proc/sys/net/ipv4").join(name)).ok();
    let ephemeral = read("ip_local_port_range").and_then(|text| parse(&text)).unwrap_or(EPHEMERAL);
    let mut reserved = read("ip_local_reserved_ports").map(|text| parse_list(&text)).unwrap_or_default();
    reserved.push(NODE_PORTS);
    let all = ports::without(vec![USABLE], &reserved);
    let outside = ports::without(all.clone(), &[ephemeral]);
    let chosen = if ports::count(&outside) >= ENOUGH { outside } else { all };
    let kept = ports::largest(chosen);
    let count: u32 = kept.iter().map(|range| u32::from(range.count)).sum();
    let warning = (count < MANY).then(|| {
        format!(
            "{count} ports are left for masquerading by net.ipv4.ip_local_reserved_ports: flows to one endpoint \
             beyond that number fail; reserve fewer, or in fewer ranges"
        )
    });
    (kept, warning)
}

/// What a node with some traffic needs.
const MANY: u32 = 4_096;

fn parse(text: &str) -> Option<RangeInclusive<u16>> {
    let mut words = text.split_whitespace();
    let (first, last) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    (first <= last).then_some(first..=last)
}

/// `8080,9148-9150`; what cannot be read is left out.
fn parse_list(text: &str) -> Vec<RangeInclusive<u16>> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    text.split(',').filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::FakeHost;
    use super::*;

    fn kept(files: &[(&str, &str)]) -> (Vec<(u16, u16)>, bool) {
        let host = files.iter().fold(FakeHost::default(), |host, (name, text)| {
            host.with_file(&format!("/proc/sys/net/ipv4/{name}"), text)
        });
        let (ports, warning) = snat_ports(&host);
        (ports.iter().map(|range| (range.first, range.count)).collect(), warning.is_some())
    }

    fn beside(range: &str) -> Vec<(u16, u16)> {
        let (ports, warned) = kept(&[("ip_local_port_range", range)]);
        assert!(!warned);
        ports
    }

    #[test]
    fn masquerade_ports_are_those_that_the_host_leaves_if_they_are_enough() {
        assert_eq!(beside("32768\t60999\n"), [(1024, 28_976), (61_000, 4_536)]);
        assert_eq!(beside("1024 29999"), [(32_768, 32_768)]);
        assert_eq!(beside("10000 20000"), [(32_768, 32_768), (20_001, 9_999), (1024, 8_976)]);
        assert_eq!(beside("30000 40000"), [(1024, 28_976), (40_001, 25_535)]);
    }

    #[test]
    fn a_host_that_gives_out_nearly_every_port_shares_them() {
        let all = [(32_768, 32_768), (1024, 28_976)];
        for range in ["1024 65535", "2000 65535", "1024 50000", "15000\t65000"] {
            assert_eq!(beside(range), all, "{range}");
        }
    }

    #[test]
    fn reserved_ports_are_left_alone() {
        let (ports, warned) = kept(&[("ip_local_reserved_ports", "8080,9000-9999,30500,61000-65535\n")]);
        assert_eq!(ports, [(10_000, 20_000), (1024, 7_056), (8_081, 919)]);
        assert!(!warned);
        let many: String = (11..300).map(|n| format!("{}-{},", n * 200, n * 200 + 150)).collect();
        let (ports, warned) = kept(&[("ip_local_reserved_ports", &many)]);
        assert_eq!((ports.len(), ports[0]), (8, (59_951, 5_585)));
        assert!(!warned);
        let (ports, warned) = kept(&[("ip_local_reserved_ports", "1-60000")]);
        assert_eq!((ports.as_slice(), warned), (&[(60_001, 5_535)][..], false));
        let (ports, warned) = kept(&[("ip_local_reserved_ports", "1-65535")]);
        assert_eq!((ports.as_slice(), warned), (&[][..], true));
    }

    #[test]
    fn an_unreadable_range_counts_as_the_kernels_default() {
        let default = [(1024, 28_976), (61_000, 4_536)];
        assert_eq!(kept(&[]).0, default);
        for text in ["garbage", "9 8"] {
            assert_eq!(beside(text), default);
        }
    }
}
