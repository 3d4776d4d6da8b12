//! kube-proxy's settings by the names of their flags and of their fields, and which of them do nothing here.

use serde_json::Value;

use super::v1alpha1::KubeProxyConfiguration;

/// One setting.
pub(in crate::config) struct Field {
    /// Its flag; empty where there is none.
    flag: &'static str,
    /// Its place in the file.
    path: &'static str,
    /// Whether it changes nothing here.
    ignored: bool,
}

const fn followed(flag: &'static str, path: &'static str) -> Field {
    Field { flag, path, ignored: false }
}

const fn ignored(flag: &'static str, path: &'static str) -> Field {
    Field { flag, path, ignored: true }
}

/// Nobody misses its effect: the log's form, and what is for Windows.
const fn silent(flag: &'static str, path: &'static str) -> Field {
    Field { flag, path, ignored: false }
}

/// All of them.
pub(in crate::config) const FIELDS: &[Field] = &[
    followed("--feature-gates", "featureGates"),
    followed("--kubeconfig", "clientConnection.kubeconfig"),
    ignored("", "clientConnection.acceptContentTypes"),
    ignored("--kube-api-content-type", "clientConnection.contentType"),
    ignored("--kube-api-qps", "clientConnection.qps"),
    ignored("--kube-api-burst", "clientConnection.burst"),
    silent("", "logging"),
    followed("--hostname-override", "hostnameOverride"),
    followed("--bind-address", "bindAddress"),
    followed("--healthz-bind-address", "healthzBindAddress"),
    followed("--metrics-bind-address", "metricsBindAddress"),
    followed("--bind-address-hard-fail", "bindAddressHardFail"),
    ignored("--profiling", "enableProfiling"),
    ignored("--show-hidden-metrics-for-version", "showHiddenMetricsForVersion"),
    ignored("--proxy-mode", "mode"),
    ignored("--iptables-masquerade-bit", "iptables.masqueradeBit"),
    followed("--masquerade-all", "iptables.masqueradeAll"),
    followed("--localhost-nodeports", "iptables.localhostNodePorts"),
    followed("--iptables-sync-period", "iptables.syncPeriod"),
    followed("--iptables-min-sync-period", "iptables.minSyncPeriod"),
    ignored("--ipvs-sync-period", "ipvs.syncPeriod"),
    ignored("--ipvs-min-sync-period", "ipvs.minSyncPeriod"),
    ignored("--ipvs-scheduler", "ipvs.scheduler"),
    ignored("--ipvs-exclude-cidrs", "ipvs.excludeCIDRs"),
    ignored("--ipvs-strict-arp", "ipvs.strictARP"),
    ignored("--ipvs-tcp-timeout", "ipvs.tcpTimeout"),
    ignored("--ipvs-tcpfin-timeout", "ipvs.tcpFinTimeout"),
    ignored("--ipvs-udp-timeout", "ipvs.udpTimeout"),
    ignored("", "nftables.masqueradeBit"),
    followed("", "nftables.masqueradeAll"),
    followed("", "nftables.syncPeriod"),
    followed("", "nftables.minSyncPeriod"),
    silent("", "winkernel"),
    silent("", "windowsRunAsService"),
    followed("--detect-local-mode", "detectLocalMode"),
    followed("--pod-bridge-interface", "detectLocal.bridgeInterface"),
    followed("--pod-interface-name-prefix", "detectLocal.interfaceNamePrefix"),
    followed("--cluster-cidr", "clusterCIDR"),
    followed("--nodeport-addresses", "nodePortAddresses"),
    followed("--oom-score-adj", "oomScoreAdj"),
    followed("--conntrack-max-per-core", "conntrack.maxPerCore"),
    followed("--conntrack-min", "conntrack.min"),
    followed("--conntrack-tcp-timeout-established", "conntrack.tcpEstablishedTimeout"),
    followed("--conntrack-tcp-timeout-close-wait", "conntrack.tcpCloseWaitTimeout"),
    followed("--conntrack-tcp-be-liberal", "conntrack.tcpBeLiberal"),
    followed("--conntrack-udp-timeout", "conntrack.udpTimeout"),
    followed("--conntrack-udp-timeout-stream", "conntrack.udpStreamTimeout"),
    ignored("--config-sync-period", "configSyncPeriod"),
    ignored("", "portRange"),
];

/// Where a setting comes from, and so what it is called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::config) enum Origin {
    /// The command line.
    #[default]
    Flags,
    File,
}

impl Origin {
    /// What the operator calls the setting that is called like this here: a flag, or a field without one.
    pub(in crate::config) fn name(self, name: &'static str) -> &'static str {
        let path = FIELDS.iter().find(|field| field.flag == name).map_or(name, |field| field.path);
        if self == Self::File { path } else { name }
    }
}

/// Settings that were set and change nothing.
pub(in crate::config) fn without_effect(given: &KubeProxyConfiguration, origin: Origin) -> Vec<String> {
    let ignored = differences(given).into_iter().filter(|(field, _)| field.ignored);
    ignored
        .map(|(field, value)| {
            let name = if origin == Origin::File || field.flag.is_empty() { field.path } else { field.flag };
            format!("{name}={}", text(&value))
        })
        .collect()
}

/// Flags that were set and are overruled by a file.
pub(in crate::config) fn overruled(given: &KubeProxyConfiguration) -> Vec<&'static str> {
    let set = differences(given).into_iter().map(|(field, _)| field.flag);
    set.filter(|flag| !flag.is_empty()).collect()
}

/// What differs from the defaults.
fn differences(given: &KubeProxyConfiguration) -> Vec<(&'static Field, Value)> {
    let (given, default) = (value(given), value(&KubeProxyConfiguration::default()));
    let at = |value: &Value, path: &str| value.pointer(&format!("/{}", path.replace('.', "/"))).cloned();
    FIELDS
        .iter()
        .filter_map(|field| {
            let found = at(&given, field.path)?;
            (Some(&found) != at(&default, field.path).as_ref()).then_some((field, found))
        })
        .collect()
}

/// A configuration as its file has it.
pub(in crate::config) fn value(configuration: &KubeProxyConfiguration) -> Value {
    serde_json::to_value(configuration).unwrap_or_default()
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command};

    use super::super::v1alpha1::IGNORED;
    use super::*;

    #[test]
    fn every_setting_is_in_the_list_under_its_own_names() {
        let command = KubeProxyConfiguration::augment_args(Command::new("x"));
        let mut flags: Vec<String> = command
            .get_arguments()
            .filter_map(|arg| arg.get_long())
            .map(|long| format!("--{long}"))
            .collect();
        // It stands beside the others, because it counts beside a file, too.
        flags.push("--hostname-override".to_owned());
        flags.sort();
        let mut listed: Vec<String> =
            FIELDS.iter().map(|field| field.flag.to_owned()).filter(|flag| !flag.is_empty()).collect();
        listed.sort();
        assert_eq!(flags, listed);

        let mut paths = leaves(&value(&KubeProxyConfiguration::default()), "");
        paths.retain(|path| path != "apiVersion" && path != "kind");
        paths.sort();
        let mut listed: Vec<&str> = FIELDS.iter().map(|field| field.path).collect();
        listed.sort_unstable();
        assert_eq!(paths, listed);
    }

    #[test]
    fn flags_without_effect_stand_apart_in_the_help() {
        let command = KubeProxyConfiguration::augment_args(Command::new("x"));
        for arg in command.get_arguments() {
            let flag = arg.get_long().map(|long| format!("--{long}")).unwrap();
            let field = FIELDS.iter().find(|field| field.flag == flag).unwrap();
            assert_eq!(arg.get_help_heading() == Some(IGNORED), field.ignored, "{flag}");
            assert_eq!(arg.is_hide_short_help_set(), field.ignored, "{flag}");
        }
    }

    fn leaves(value: &Value, prefix: &str) -> Vec<String> {
        match value {
            Value::Object(map) if !map.is_empty() => {
                map.iter().flat_map(|(key, value)| leaves(value, &format!("{prefix}.{key}"))).collect()
            }
            _ => vec![prefix.trim_start_matches('.').to_owned()],
        }
    }

    #[test]
    fn what_was_set_in_vain_is_named_as_the_operator_knows_it() {
        let mut given = KubeProxyConfiguration { mode: "ipvs".to_owned(), ..Default::default() };
        given.ipvs.scheduler = "rr".to_owned();
        given.port_range = "1-2".to_owned();
        given.iptables.masquerade_all = true;
        let flags = without_effect(&given, Origin::Flags);
        assert_eq!(flags, ["--proxy-mode=ipvs", "--ipvs-scheduler=rr", "portRange=1-2"]);
        assert_eq!(without_effect(&given, Origin::File), ["mode=ipvs", "ipvs.scheduler=rr", "portRange=1-2"]);
        assert_eq!(overruled(&given), ["--proxy-mode", "--masquerade-all", "--ipvs-scheduler"]);
        assert_eq!(Origin::File.name("--cluster-cidr"), "clusterCIDR");
        assert_eq!(Origin::File.name("--devices"), "--devices");
        assert_eq!(Origin::Flags.name("--cluster-cidr"), "--cluster-cidr");
    }
}
