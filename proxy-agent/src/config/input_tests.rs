//! kube-proxy's file and flags: what is taken, what is refused, what is passed over.

use super::kube_proxy::file::decode;
use super::tests::{FakeHost, config_on};
use super::*;

/// What kubeadm writes.
const KUBEADM: &str = r#"
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"#;

const KUBECONFIG: &str = "
current-context: default
contexts: [{name: default, context: {cluster: default, user: default}}]
clusters: [{name: default, cluster: {server: 'https://10.0.0.10:6443'}}]
";

/// A host with this file at `/config.conf`.
fn host(text: &str) -> FakeHost {
    FakeHost::named("n1")
        .with_file("/config.conf", text)
        .with_file("/var/lib/kube-proxy/kubeconfig.conf", KUBECONFIG)
}

fn with_head(rest: &str) -> String {
    format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{rest}")
}

fn from_file(text: &str, flags: &[&str]) -> Config {
    config_on(&host(text), &[&["--config=/config.conf"], flags].concat()).unwrap()
}

fn refused(text: &str) -> Vec<String> {
    let errors = config_on(&host(text), &["--config=/config.conf"]).unwrap_err();
    errors.0.iter().map(ToString::to_string).collect()
}

#[test]
fn what_kubeadm_installs_works_unchanged() {
    // F-5, F-14.
    let config = from_file(KUBEADM, &["--hostname-override=Node1"]);
    let mut expected = KubeProxyConfiguration {
        cluster_cidr: "10.244.0.0/16".to_owned(),
        healthz_bind_address: Some("0.0.0.0:10256".to_owned()),
        metrics_bind_address: Some("127.0.0.1:10249".to_owned()),
        ..KubeProxyConfiguration::default()
    };
    expected.client_connection.kubeconfig = "/var/lib/kube-proxy/kubeconfig.conf".to_owned();
    expected.logging = config.kube_proxy.logging.clone();
    expected.winkernel = config.kube_proxy.winkernel.clone();
    assert_eq!(config.kube_proxy, expected);
    assert_eq!(&*config.settings.node_name, "node1");
    assert_eq!(config.source.to_string(), "kubeconfig /var/lib/kube-proxy/kubeconfig.conf");
    assert_eq!(config.warnings, Vec::<String>::new());
    let file = ConfigFile { path: "/config.conf".into(), text: KUBEADM.to_owned() };
    assert_eq!(config.file, Some(file));
    // F-6: what is written of it reads back as the same.
    let written = decode(&config.to_file().unwrap()).unwrap();
    assert_eq!((written.configuration, written.warnings), (config.kube_proxy, vec![]));
}

#[test]
fn a_file_replaces_kube_proxy_s_flags_and_no_others() {
    // F-1, F-9.
    let text =
        with_head("clusterCIDR: 10.1.0.0/16\nhostnameOverride: of-file\nmetricsBindAddress: 0.0.0.0:99\n");
    let flags = [
        "--cluster-cidr=10.2.0.0/16",
        "--masquerade-all",
        "--manifests=/x",
        "--socket-lb=off",
        "--max-flows=77",
        "--masquerade-local",
        "--devices=eth*",
    ];
    let config = from_file(&text, &flags);
    assert_eq!(config.settings.cluster_cidrs, ["10.1.0.0/16".parse().unwrap()]);
    assert!(!config.settings.masquerade_all && config.settings.masquerade_local);
    assert_eq!(config.metrics, "0.0.0.0:99".parse().unwrap());
    assert_eq!(config.source, SourceConfig::Manifests("/x".into()));
    assert_eq!(
        (config.settings.socket_lb, config.capacities.each.flows),
        (agent_core::model::SocketLb::Off, 77)
    );
    assert_eq!(config.warnings, ["--config overrules these flags: --masquerade-all, --cluster-cidr"]);
    assert_eq!(&*config.settings.node_name, "of-file");
    assert_eq!(&*from_file(&text, &["--hostname-override=of-flag"]).settings.node_name, "of-flag");
    let other = from_file(KUBEADM, &["--master=https://10.9.9.9:6443"]);
    let servers = vec!["https://10.9.9.9:6443".to_owned()];
    let file = "/var/lib/kube-proxy/kubeconfig.conf".into();
    assert_eq!(other.source, SourceConfig::Kubeconfig { file, servers });
}

#[test]
fn a_file_is_yaml_or_json_and_odd_names_are_passed_over_with_a_warning() {
    // F-2.
    let json = r#"{"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "clusterCIDR": "10.1.0.0/16", "conntrack": {"maxPerCore": 1, "colour": 3}, "brandNew": {"a": 1}}"#;
    let config = from_file(json, &[]);
    assert_eq!(config.kube_proxy.conntrack.max_per_core, 1);
    let unknown = |path| format!("/config.conf: there is no field {path}: it is passed over");
    let mut warnings = config.warnings;
    warnings.sort();
    assert_eq!(warnings, [unknown("brandNew"), unknown("conntrack.colour")]);

    let twice = with_head("clusterCIDR: 10.1.0.0/16\nclusterCIDR: 10.2.0.0/16\n");
    let config = from_file(&twice, &[]);
    assert_eq!(config.settings.cluster_cidrs, ["10.2.0.0/16".parse().unwrap()]);
    let [warning] = config.warnings.try_into().unwrap();
    assert!(warning.contains("stands twice") && warning.contains("clusterCIDR"), "{warning}");
}

#[test]
fn a_file_of_another_kind_or_without_sense_is_refused() {
    // F-2.
    for (text, words) in [
        ("apiVersion: kubeproxy.config.k8s.io/v1beta9\nkind: KubeProxyConfiguration\n", "v1beta9"),
        (
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeletConfiguration\n",
            "KubeletConfiguration",
        ),
        ("clusterCIDR: 10.0.0.0/8\n", "KubeProxyConfiguration"),
        ("- a\n- b\n", "it has no apiVersion and kind"),
        ("a: [b", "is not YAML"),
        ("", "it has no apiVersion and kind"),
        (&with_head("oomScoreAdj: much\n"), "invalid type"),
        (&with_head("configSyncPeriod: 15 minutes\n"), "is not a duration such as 15m0s"),
        (&with_head("conntrack: [1]\n"), "conntrack"),
    ] {
        let [error] = refused(text).try_into().unwrap();
        assert!(
            error.starts_with("--config \"/config.conf\": ") && error.contains(words),
            "{words}: {error}"
        );
    }
    let missing = config_on(&FakeHost::named("n1"), &["--config=/none"]).unwrap_err().to_string();
    assert!(missing.contains("--config \"/none\": cannot be read"), "{missing}");
}

#[test]
fn the_section_of_the_mode_counts() {
    // F-10.
    let sections =
        "iptables: {masqueradeAll: true, syncPeriod: 10s}\nnftables: {syncPeriod: 20s, minSyncPeriod: 5s}";
    let config = |mode: &str| from_file(&with_head(&format!("mode: {mode}\n{sections}")), &[]);
    for mode in ["\"\"", "iptables", "ipvs"] {
        let config = config(mode);
        assert!(config.settings.masquerade_all);
        assert_eq!((config.sync_period.as_secs(), config.min_sync_period), (10, None));
    }
    let nftables = config("nftables");
    assert!(!nftables.settings.masquerade_all);
    assert_eq!((nftables.sync_period.as_secs(), nftables.min_sync_period.unwrap().as_secs()), (20, 5));
    // Flags mean every mode's section.
    let flags = ["--proxy-mode=nftables", "--masquerade-all", "--iptables-sync-period=7s"];
    let by_flags = config_on(&FakeHost::named("n1"), &flags).unwrap();
    assert!(by_flags.settings.masquerade_all);
    assert_eq!(by_flags.sync_period.as_secs(), 7);
}

#[test]
fn every_value_out_of_range_is_named_by_its_field_at_once() {
    // F-4, F-11.
    let text = "
iptables: {masqueradeBit: 32, syncPeriod: -1s, minSyncPeriod: -2s}
nftables: {masqueradeBit: -1, syncPeriod: 1s, minSyncPeriod: 2s}
ipvs: {excludeCIDRs: [junk], tcpTimeout: -1s}
mode: nftables
oomScoreAdj: -1001
conntrack: {maxPerCore: -1, min: -1, tcpEstablishedTimeout: -1s, tcpCloseWaitTimeout: -1s, udpTimeout: -1s,
  udpStreamTimeout: -1s}
configSyncPeriod: -1s
clientConnection: {burst: -1}
bindAddress: here
healthzBindAddress: 1.2.3.4:70000
metricsBindAddress: 1.2.3.4:0
nodePortAddresses: [primary, 10.0.0.0/8]
detectLocalMode: Guess
clusterCIDR: 10.1.0.0/16,10.2.0.0/16,junk
";
    let mut names: Vec<String> =
        refused(&with_head(text)).iter().map(|error| error.split(' ').next().unwrap().to_owned()).collect();
    names.sort();
    names.dedup();
    let mut expected = [
        "iptables.masqueradeBit",
        "iptables.syncPeriod",
        "iptables.minSyncPeriod",
        "nftables.masqueradeBit",
        "nftables.minSyncPeriod",
        "oomScoreAdj",
        "conntrack.maxPerCore",
        "conntrack.min",
        "conntrack.tcpEstablishedTimeout",
        "conntrack.tcpCloseWaitTimeout",
        "conntrack.udpTimeout",
        "conntrack.udpStreamTimeout",
        "configSyncPeriod",
        "clientConnection.burst",
        "bindAddress",
        "healthzBindAddress",
        "metricsBindAddress",
        "nodePortAddresses",
        "detectLocalMode",
        "clusterCIDR",
    ];
    expected.sort_unstable();
    assert_eq!(names, expected);
    // What is only of IPVS is checked for who asks for IPVS.
    let ipvs = refused(&with_head("mode: ipvs\nipvs: {excludeCIDRs: [junk], tcpTimeout: -1s}\n"));
    assert_eq!(ipvs.len(), 2, "{ipvs:?}");
    let [mode] = refused(&with_head("mode: userspace\n")).try_into().unwrap();
    assert_eq!(mode, r#"mode "userspace": is none of iptables, ipvs and nftables"#);
    // Flags are called by their own names.
    let errors =
        config_on(&FakeHost::named("n1"), &["--oom-score-adj=2000", "--iptables-min-sync-period=1m"]);
    let errors: Vec<_> = errors.unwrap_err().0.iter().map(|error| error.flag).collect();
    assert_eq!(errors, ["--oom-score-adj", "--iptables-min-sync-period"]);
}

#[test]
fn flags_that_have_no_effect_do_not_stop_the_agent() {
    // F-14: arguments of a DaemonSet.
    let flags = [
        "--proxy-mode=ipvs",
        "--ipvs-scheduler=rr",
        "--ipvs-strict-arp",
        "--ipvs-exclude-cidrs=10.0.0.0/8",
        "--ipvs-udp-timeout=5s",
        "--iptables-masquerade-bit=3",
        "--config-sync-period=1m",
        "--kube-api-qps=50",
        "--kube-api-burst=100",
        "--kube-api-content-type=application/json",
        "--profiling=true",
        "--show-hidden-metrics-for-version=1.35",
        "--healthz-port=10256",
        "--metrics-port=10249",
        "--boot-id-file=/x",
        "--machine-id-file=/y",
        "--v=2",
        "--vmodule=x=3",
        "--logging-format=json",
        "--log-flush-frequency=5s",
        "--log-json-split-stream=true",
        "--feature-gates=AllAlpha=false",
    ];
    let config = config_on(&FakeHost::named("n1"), &flags).unwrap();
    let [warning, gates] = config.warnings.try_into().unwrap();
    assert!(gates.contains("AllAlpha"), "{gates}");
    for word in ["--proxy-mode=ipvs", "--ipvs-scheduler=rr", "--kube-api-qps=50", "--profiling=true"] {
        assert!(warning.contains(word), "{word}: {warning}");
    }
    assert!(!warning.contains("feature") && !warning.contains("logging"), "{warning}");
}

#[test]
fn health_and_metrics_follow_the_family_of_the_bind_address() {
    // H-26, Y-10.
    let of = |bind: &str| {
        let flag = format!("--bind-address={bind}");
        let config = config_on(&FakeHost::named("n1"), &[flag.as_str()]).unwrap();
        (config.healthz.unwrap().to_string(), config.metrics.to_string(), config.settings.bind_address)
    };
    let four = ("0.0.0.0:10256".to_owned(), "127.0.0.1:10249".to_owned());
    let six = ("[::]:10256".to_owned(), "[::1]:10249".to_owned());
    assert_eq!(of("0.0.0.0"), (four.0.clone(), four.1.clone(), None));
    assert_eq!(of(""), (four.0.clone(), four.1.clone(), None));
    assert_eq!(of("::"), (six.0.clone(), six.1.clone(), None));
    assert_eq!(of("10.0.0.1"), (four.0, four.1, "10.0.0.1".parse().ok()));
    assert_eq!(of("fd00::1"), (six.0, six.1, "fd00::1".parse().ok()));
}

#[test]
fn external_ips_are_switched_off_by_their_gate() {
    // V-8.
    let of = |gates: &str| {
        let flag = format!("--feature-gates={gates}");
        config_on(&FakeHost::named("n1"), &[flag.as_str()]).unwrap().settings.external_ips
    };
    assert!(of("") && of("AllowServiceExternalIPs=true") && of("AllBeta=false"));
    assert!(!of("AllowServiceExternalIPs=false"));
    assert!(
        !from_file(&with_head("featureGates: {AllowServiceExternalIPs: false}\n"), &[]).settings.external_ips
    );
}

#[test]
fn a_node_without_ipv6_is_known() {
    // Y-11.
    let ipv6 = |host: FakeHost| config_on(&host, &[]).unwrap().settings.ipv6;
    const SWITCH: &str = "/proc/sys/net/ipv6/conf/all/disable_ipv6";
    assert!(ipv6(FakeHost::named("n1")));
    assert!(ipv6(FakeHost::named("n1").with_file(SWITCH, "0\n")));
    assert!(!ipv6(FakeHost::named("n1").with_file(SWITCH, "1\n")));
    assert!(!ipv6(FakeHost::without_ipv6()));
}

#[test]
fn what_does_not_fit_the_node_s_family_is_said() {
    // F-12, F-13.
    let single = || FakeHost::named("n1").with_file("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
    let misfits = |host: &FakeHost, flags: &[&str], primary, pod_cidrs: &[&str]| {
        let pod_cidrs: Vec<IpNet> = pod_cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
        let found = config_on(host, flags).unwrap().misfits(primary, &pod_cidrs);
        (found.errors.len(), found.warnings.len())
    };
    use agent_core::model::Family::{V4, V6};
    let dual = FakeHost::named("n1");
    let fd = "--cluster-cidr=fd00::/48";
    assert_eq!(misfits(&single(), &[], V4, &["10.0.0.0/24"]), (0, 0));
    assert_eq!(misfits(&single(), &[fd], V4, &[]), (1, 0));
    assert_eq!(misfits(&single(), &[fd, "--detect-local-mode=NodeCIDR"], V4, &[]), (0, 1));
    assert_eq!(misfits(&dual, &[fd], V4, &[]), (0, 1));
    assert_eq!(misfits(&dual, &["--cluster-cidr=fd00::/48,10.0.0.0/8"], V4, &[]), (0, 0));
    assert_eq!(misfits(&dual, &[fd], V6, &[]), (0, 0));
    assert_eq!(misfits(&dual, &[], V4, &["fd00::/64"]), (0, 1));
    assert_eq!(misfits(&single(), &["--metrics-bind-address=[::1]:1"], V4, &[]), (0, 1));
    assert_eq!(misfits(&dual, &["--metrics-bind-address=[::1]:1"], V4, &[]), (0, 0));
    // Metrics at 127.0.0.1 are in the wrong family, too.
    assert_eq!(misfits(&single(), &[], V6, &[]), (1, 1));
    // F-12: ranges for NodePorts of one family.
    let ranges = "--nodeport-addresses=10.0.0.0/8";
    assert_eq!(misfits(&dual, &[ranges], V4, &[]), (0, 0));
    assert_eq!(misfits(&dual, &[ranges], V6, &[]), (0, 1));
    assert_eq!(misfits(&dual, &[ranges, "--cluster-cidr=10.0.0.0/8,fd00::/48"], V4, &[]), (0, 1));
    assert_eq!(misfits(&dual, &[ranges], V4, &["10.0.0.0/24", "fd00::/64"]), (0, 1));
}
