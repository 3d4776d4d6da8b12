//! What kube-proxy's settings may not be, whoever uses them (F-11).

use super::Errors;
use super::kube_proxy::duration::GoDuration;
use super::kube_proxy::v1alpha1::KubeProxyConfiguration;

/// Modes that kube-proxy knows.
const MODES: [&str; 4] = ["", "iptables", "ipvs", "nftables"];

/// Warns of every value out of its range. Addresses and ranges are checked where they are parsed.
pub(super) fn check(kube: &KubeProxyConfiguration, errors: &mut Errors) {
    let mut range = |name, value: i64, allowed: std::ops::RangeInclusive<i64>| {
        if !allowed.contains(&value) {
            errors.add(name, value.to_string(), format!("must be {} to {}", allowed.start(), allowed.end()));
        }
    };
    range("--oom-score-adj", kube.oom_score_adj.into(), -1000..=1000);
    range("--iptables-masquerade-bit", kube.iptables.masquerade_bit.into(), 0..=31);
    range("nftables.masqueradeBit", kube.nftables.masquerade_bit.into(), 0..=31);
    range("--kube-api-burst", kube.client_connection.burst.into(), 0..=i32::MAX.into());
    range("--conntrack-max-per-core", kube.conntrack.max_per_core, 0..=i32::MAX.into());
    range("--conntrack-min", kube.conntrack.min, 0..=i32::MAX.into());
    if !MODES.contains(&kube.mode.as_str()) {
        errors.add("--proxy-mode", &kube.mode, "is none of iptables, ipvs and nftables");
    }
    durations(kube, errors);
    ipvs(kube, errors);
}

fn durations(kube: &KubeProxyConfiguration, errors: &mut Errors) {
    let conntrack = &kube.conntrack;
    for (name, value) in [
        ("--conntrack-tcp-timeout-established", conntrack.tcp_established_timeout),
        ("--conntrack-tcp-timeout-close-wait", conntrack.tcp_close_wait_timeout),
        ("--conntrack-udp-timeout", conntrack.udp_timeout),
        ("--conntrack-udp-timeout-stream", conntrack.udp_stream_timeout),
    ] {
        not_negative(name, value, errors);
    }
    if kube.config_sync_period.positive().is_none() {
        errors.add("--config-sync-period", kube.config_sync_period.to_string(), "must be more than 0");
    }
    let (iptables, nftables) = (&kube.iptables, &kube.nftables);
    let names = ["--iptables-sync-period", "--iptables-min-sync-period"];
    periods(names, iptables.sync_period, iptables.min_sync_period, errors);
    if kube.mode == "nftables" {
        let names = ["nftables.syncPeriod", "nftables.minSyncPeriod"];
        periods(names, nftables.sync_period, nftables.min_sync_period, errors);
    }
}

fn periods(names: [&'static str; 2], sync: GoDuration, min: GoDuration, errors: &mut Errors) {
    if sync.positive().is_none() {
        errors.add(names[0], sync.to_string(), "must be more than 0");
    }
    not_negative(names[1], min, errors);
    if sync < min {
        let reason = format!("must not be longer than {} ({sync})", errors.origin.name(names[0]));
        errors.add(names[1], min.to_string(), reason);
    }
}

fn not_negative(name: &'static str, value: GoDuration, errors: &mut Errors) {
    if value.is_negative() {
        errors.add(name, value.to_string(), "must not be negative");
    }
}

/// Nothing of it counts here, but who says `ipvs` has it checked as before.
fn ipvs(kube: &KubeProxyConfiguration, errors: &mut Errors) {
    if kube.mode != "ipvs" {
        return;
    }
    let ipvs = &kube.ipvs;
    periods(["--ipvs-sync-period", "--ipvs-min-sync-period"], ipvs.sync_period, ipvs.min_sync_period, errors);
    not_negative("--ipvs-tcp-timeout", ipvs.tcp_timeout, errors);
    not_negative("--ipvs-tcpfin-timeout", ipvs.tcp_fin_timeout, errors);
    not_negative("--ipvs-udp-timeout", ipvs.udp_timeout, errors);
    for range in &ipvs.exclude_cidrs {
        if range.parse::<ipnet::IpNet>().is_err() {
            errors.add("--ipvs-exclude-cidrs", range, "is not a range such as 10.244.0.0/16");
        }
    }
}
