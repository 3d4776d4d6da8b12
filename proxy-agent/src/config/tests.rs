//! Flags in, settings out.

use std::collections::HashMap;
use std::io;

use agent_core::model::{DetectLocal, Link, LoadBalancerMode, SocketLb};
use agent_kernel::datapath::store::pin::BpfRoot;
use clap::Parser;

use super::*;

/// A host that says what it was told to.
#[derive(Default)]
pub(super) struct FakeHost {
    files: HashMap<PathBuf, String>,
    env: HashMap<String, String>,
    name: Option<String>,
    /// A file that is there and cannot be read.
    pub(super) broken: Option<PathBuf>,
}

impl FakeHost {
    pub(super) fn with_file(mut self, path: &str, text: &str) -> Self {
        self.files.insert(path.into(), text.to_owned());
        self
    }

    pub(super) fn with_env(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }

    pub(super) fn without_ipv6() -> Self {
        Self { name: Some("n1".to_owned()), ..Self::default() }
    }

    pub(super) fn named(name: &str) -> Self {
        Self { name: Some(name.to_owned()), ..Self::default() }.with_file("/proc/net/if_inet6", "")
    }
}

impl Host for FakeHost {
    fn hostname(&self) -> io::Result<String> {
        self.name.clone().ok_or_else(|| io::Error::other("no name"))
    }

    fn read(&self, path: &Path) -> io::Result<String> {
        if self.broken.as_deref() == Some(path) {
            return Err(io::Error::other("it is broken"));
        }
        self.files.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn env(&self, name: &str) -> Option<String> {
        self.env.get(name).cloned()
    }

    fn netns_cookie(&self) -> u64 {
        4026
    }

    fn cpus(&self) -> u64 {
        8
    }
}

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    run: RunArgs,
}

pub(super) fn config_on(host: &FakeHost, line: &[&str]) -> Result<Config, ConfigErrors> {
    let mut args = Line::parse_from([&["run"], line].concat()).run;
    // What the test machine's environment says must not decide a test.
    if !line.iter().any(|word| word.starts_with("--hostname-override")) {
        args.hostname_override = None;
    }
    Config::new(&args, Path::new(BpfRoot::DEFAULT), host)
}

fn config(line: &[&str]) -> Config {
    config_on(&FakeHost::named("n1"), line).unwrap()
}

fn errors(line: &[&str]) -> Vec<String> {
    let errors = config_on(&FakeHost::named("n1"), line).unwrap_err();
    errors.0.iter().map(ToString::to_string).collect()
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn no_flags_mean_the_documented_defaults() {
    let config = config(&[]);
    assert_eq!(config.source, SourceConfig::InCluster);
    assert_eq!(
        config.settings,
        Settings {
            node_name: "n1".into(),
            bind_address: None,
            ipv6: true,
            external_ips: true,
            cluster_cidrs: vec![],
            detect_local: DetectLocal::AnyRange,
            drop_unallocated: true,
            masquerade_all: false,
            masquerade_local: false,
            loadbalancer_mode: LoadBalancerMode::Snat,
            nodeport_addresses: NodePortAddresses::Primary,
            socket_lb: SocketLb::All,
            localhost_node_ports: true,
            host_netns: 4026,
            snat_ports: vec![
                PortRange { first: 1024, count: 28_976 },
                PortRange { first: 61_000, count: 4_536 },
            ],
            own_ports: vec![10256, 10249, 10261],
            agents_service: ObjectName::new("kube-system", "ebpf-proxy"),
            probe_port: 10261,
            seed: SELECTION_SEED,
        }
    );
    assert_eq!(config.healthz, Some("0.0.0.0:10256".parse().unwrap()));
    assert_eq!(config.metrics, "127.0.0.1:10249".parse().unwrap());
    assert_eq!(config.bpf_root, Path::new("/sys/fs/bpf/ebpf-proxy"));
    assert_eq!(config.cgroup_root, None);
    assert_eq!(config.scheduler, Scheduler::Hash);
    assert_eq!((config.capacities.each.flows, config.capacities.each.backends), (163_840, 262_144));
    assert!(carries(&config.devices, "eth0") && carries(&config.devices, "lxc1234"));
    assert_eq!(config.warnings, Vec::<String>::new());
}

#[test]
fn a_detection_mode_is_followed_or_refused_with_the_way_out() {
    let mode = |line: &[&str]| config(line).settings.detect_local;
    // M-1; an empty value is what templates leave of an unset option.
    assert_eq!(mode(&["--detect-local-mode="]), DetectLocal::AnyRange);
    assert_eq!(mode(&["--detect-local-mode", "NodeCIDR"]), DetectLocal::NodeCidr);
    let ranges = ["--detect-local-mode=ClusterCIDR", "--cluster-cidr=10.244.0.0/16"];
    assert_eq!(mode(&ranges), DetectLocal::ClusterCidr);
    assert_eq!(config(&ranges).warnings, Vec::<String>::new());
    // M-5.
    let [warning] = config(&ranges[..1]).warnings.try_into().unwrap();
    assert!(warning.contains("without --cluster-cidr"), "{warning}");
    assert_eq!(
        mode(&["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0"]),
        DetectLocal::Bridge("cni0".into())
    );
    // M-4: a name that no interface can have is no error.
    let prefix =
        ["--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=much-too-long-for-linux"];
    assert_eq!(mode(&prefix), DetectLocal::InterfacePrefix("much-too-long-for-linux".into()));
    // F-11.
    for (value, reason) in [
        ("BridgeInterface", "--pod-bridge-interface \"\": is missing"),
        ("InterfaceNamePrefix", "--pod-interface-name-prefix \"\": is missing"),
        ("nodecidr", "is none of ClusterCIDR, NodeCIDR, "),
    ] {
        let [error] = errors(&["--detect-local-mode", value]).try_into().unwrap();
        assert!(error.contains(value) && error.contains(reason), "{error}");
    }
}

#[test]
fn localhost_node_ports_are_on_until_switched_off_by_either_name() {
    let on = |line: &[&str]| config(line).settings.localhost_node_ports;
    assert!(on(&[]) && on(&["--localhost-nodeports"]));
    assert!(!on(&["--localhost-nodeports=false"]) && !on(&["--iptables-localhost-nodeports=false"]));
}

#[test]
fn the_node_name_is_trimmed_and_lower_cased() {
    // F-9.
    assert_eq!(&*config(&["--hostname-override= Node-A\n"]).settings.node_name, "node-a");
    let host = FakeHost::named("HOST.example");
    assert_eq!(&*config_on(&host, &[]).unwrap().settings.node_name, "host.example");
    assert_eq!(&*config_on(&host, &["--hostname-override="]).unwrap().settings.node_name, "host.example");
    assert_eq!(errors(&["--hostname-override=  "]), [r#"--hostname-override "  ": the node name is blank"#]);
    let nameless = config_on(&FakeHost::default(), &[]).unwrap_err().to_string();
    assert!(nameless.contains("the host name cannot be read: no name"), "{nameless}");
}

#[test]
fn one_pod_range_a_family_is_taken() {
    let config = config(&["--cluster-cidr=10.244.3.0/16,fd00:10:244::/56"]);
    assert_eq!(config.settings.cluster_cidrs, nets(&["10.244.0.0/16", "fd00:10:244::/56"]));
    assert_eq!(
        errors(&["--cluster-cidr=10.0.0.0/8,10.244.0.0/16,junk"]),
        [
            r#"--cluster-cidr "10.244.0.0/16": is the second range of its family: one a family is allowed"#,
            r#"--cluster-cidr "junk": is not a range such as 10.244.0.0/16"#,
        ]
    );
}

#[test]
fn nodeport_addresses_are_ranges_or_primary_alone() {
    let of = |text: &str| config(&[&format!("--nodeport-addresses={text}")]).settings.nodeport_addresses;
    assert_eq!(of("primary"), NodePortAddresses::Primary);
    assert_eq!(of(""), NodePortAddresses::Primary);
    assert_eq!(of("192.168.0.0/16,::/0"), NodePortAddresses::Ranges(nets(&["192.168.0.0/16", "::/0"])));
    assert_eq!(
        errors(&["--nodeport-addresses=primary,10.0.0.0/8"]),
        [r#"--nodeport-addresses "primary": must stand alone"#]
    );
    assert_eq!(
        errors(&["--nodeport-addresses=10.0.0.1"]),
        [r#"--nodeport-addresses "10.0.0.1": is neither a range such as 192.168.0.0/16 nor `primary`"#]
    );
}

#[test]
fn a_bare_address_gets_the_default_port() {
    // F-11, H-26.
    let of = |text: &str| {
        let config =
            config(&[&format!("--healthz-bind-address={text}"), &format!("--metrics-bind-address={text}")]);
        (config.healthz.unwrap().to_string(), config.metrics.to_string())
    };
    assert_eq!(of("10.0.0.1"), ("10.0.0.1:10256".to_owned(), "10.0.0.1:10249".to_owned()));
    assert_eq!(of("::"), ("[::]:10256".to_owned(), "[::]:10249".to_owned()));
    assert_eq!(of("[::1]"), ("[::1]:10256".to_owned(), "[::1]:10249".to_owned()));
    assert_eq!(config(&["--healthz-bind-address=[::]:99"]).healthz, Some("[::]:99".parse().unwrap()));
    assert_eq!(config(&["--healthz-bind-address="]).healthz, None);
    assert_eq!(
        errors(&["--metrics-bind-address="]),
        [r#"--metrics-bind-address "": is not an address such as 0.0.0.0:10249 or [::]:10249"#]
    );
    assert_eq!(errors(&["--healthz-bind-address=0.0.0.0:0"]).len(), 1);
    assert_eq!(errors(&["--healthz-bind-address=localhost:80"]).len(), 1);
    assert_eq!(
        errors(&["--healthz-bind-address=1.2.3.4:5", "--metrics-bind-address=1.2.3.4:5"]),
        [r#"--metrics-bind-address "1.2.3.4:5": is taken by --healthz-bind-address"#]
    );
}

#[test]
fn exactly_one_source_is_taken() {
    assert_eq!(config(&["--manifests=/etc/svc"]).source, SourceConfig::Manifests("/etc/svc".into()));
    assert_eq!(
        config(&["--apiserver=https://10.0.0.10:6443"]).source,
        SourceConfig::ApiServer(vec!["https://10.0.0.10:6443".to_owned()])
    );
    assert_eq!(
        errors(&["--apiserver=https://10.0.0.10:6443", "--manifests=/x"]),
        [r#"--manifests "/x": only one of --kubeconfig, --apiserver and --manifests may be given"#]
    );
    // Y-1: credentials of a kubeconfig, at another address.
    let host = FakeHost::named("n1").with_file("/kc", KUBECONFIG);
    let both = config_on(&host, &["--kubeconfig=/kc", "--master=https://10.0.0.10:6443"]).unwrap();
    let servers = vec!["https://10.0.0.10:6443".to_owned()];
    assert_eq!(both.source, SourceConfig::Kubeconfig { file: "/kc".into(), servers });
    assert_eq!(both.source.to_string(), "kubeconfig /kc at https://10.0.0.10:6443");
    assert_eq!(errors(&["--kubeconfig=/kc", "--manifests=/x"]).len(), 1);
    assert_eq!(
        errors(&["--apiserver=10.0.0.10:6443"]),
        [r#"--apiserver "10.0.0.10:6443": must be a URL such as https://10.0.0.10:6443"#]
    );
    assert_eq!(errors(&["--apiserver=https://:6443"]).len(), 1);
}

#[test]
fn everything_wrong_is_said_at_once() {
    // F-4, F-11.
    let errors = config_on(
        &FakeHost::default(),
        &["--cluster-cidr=x", "--nodeport-addresses=y", "--healthz-bind-address=z", "--devices=[a"],
    )
    .unwrap_err();
    let flags: Vec<_> = errors.0.iter().map(|e| e.flag).collect();
    assert_eq!(
        flags,
        [
            "--hostname-override",
            "--cluster-cidr",
            "--nodeport-addresses",
            "--healthz-bind-address",
            "--devices"
        ]
    );
    assert!(errors.to_string().starts_with("5 of the settings cannot be followed:\n  --hostname-override"));
}

#[test]
fn switches_are_taken_bare_and_with_a_value() {
    let of = |line: &[&str]| {
        let settings = config(line).settings;
        (settings.masquerade_all, settings.masquerade_local)
    };
    assert_eq!(of(&["--masquerade-all", "--masquerade-local"]), (true, true));
    assert_eq!(of(&["--masquerade-all=true", "--masquerade-local=false"]), (true, false));
    let settings = config(&["--socket-lb=host", "--cgroup-root=/sys/fs/cgroup/unified"]);
    assert_eq!(settings.settings.socket_lb, SocketLb::Host);
    assert_eq!(settings.cgroup_root, Some("/sys/fs/cgroup/unified".into()));
}

#[test]
fn the_mode_of_load_balancing_is_one_of_two() {
    let of = |mode| config(&["--loadbalancer-mode", mode]).settings.loadbalancer_mode;
    assert_eq!([of("snat"), of("dsr")], [LoadBalancerMode::Snat, LoadBalancerMode::Dsr]);
    assert!(Line::try_parse_from(["run", "--loadbalancer-mode=hybrid"]).is_err());
}

#[test]
fn the_agents_find_each_other_by_a_service_and_a_port() {
    let settings = config(&["--agents-service=net/proxies", "--dsr-probe-port=4711"]).settings;
    assert_eq!(settings.agents_service, ObjectName::new("net", "proxies"));
    assert_eq!((settings.probe_port, settings.own_ports), (4711, vec![10256, 10249, 4711]));
    let settings = config(&["--dsr-probe-port=0"]).settings;
    assert_eq!((settings.probe_port, settings.own_ports), (0, vec![10256, 10249]));
    for wrong in ["ebpf-proxy", "/ebpf-proxy", "kube-system/", "a/b/c", ""] {
        let [said] = errors(&[&format!("--agents-service={wrong}")]).try_into().unwrap();
        assert!(said.starts_with(&format!("--agents-service {wrong:?}: is not a namespace")), "{said}");
    }
    assert_eq!(
        errors(&["--dsr-probe-port=10249"]),
        [r#"--dsr-probe-port "10249": is taken by --healthz-bind-address or --metrics-bind-address"#]
    );
}

fn carries(devices: &Devices, name: &str) -> bool {
    let name = name.into();
    devices.carries(&Link {
        index: 2,
        name,
        loopback: false,
        up: true,
        layer3: false,
        addresses: Vec::new(),
        ..Link::default()
    })
}

#[test]
fn devices_are_patterns() {
    let devices = config(&["--devices=eth*, ens?"]).devices;
    assert!(carries(&devices, "eth0") && carries(&devices, "ens5"));
    assert!(!carries(&devices, "ens55") && !carries(&devices, "cni0"));
}

#[test]
fn every_size_that_an_error_names_a_flag_for_can_be_set() {
    use proxy_common::abi::maps;
    for flag in maps::ALL.iter().filter_map(|map| agent_core::capacity::size_flag(map)) {
        let capacities = config(&[&format!("{flag}=77")]).capacities.each;
        let defaults = config(&[]).capacities.each.each(2);
        let sized: Vec<_> = capacities.each(2).into_iter().filter(|one| !defaults.contains(one)).collect();
        assert!(!sized.is_empty(), "{flag}");
        assert!(
            sized.iter().all(|(map, _)| agent_core::capacity::size_flag(map) == Some(flag)),
            "{flag}: {sized:?}"
        );
    }
}

#[test]
fn tables_cannot_be_made_for_nothing() {
    assert!(Line::try_parse_from(["run", "--max-flows=0"]).is_err());
    assert!(Line::try_parse_from(["run", "--max-flows=5000000000"]).is_err());
    assert_eq!(config(&["--max-flows=1000"]).capacities.each.flows, 1000);
}

const KUBECONFIG: &str = "
apiVersion: v1
kind: Config
current-context: b
contexts:
- {name: a, context: {cluster: one, user: u}}
- {name: b, context: {cluster: two, user: u}}
clusters:
- {name: one, cluster: {server: 'https://10.0.0.1:6443'}}
- {name: two, cluster: {server: 'https://10.96.0.1:443', certificate-authority-data: eA==}}
users: [{name: u, user: {token: t}}]
";

#[test]
fn an_agent_that_would_depend_on_itself_is_warned_about() {
    // Y-2.
    let pod = || FakeHost::named("n1").with_env("KUBERNETES_SERVICE_HOST", "10.96.0.1");
    let warned = |host: &FakeHost, line: &[&str]| !config_on(host, line).unwrap().warnings.is_empty();
    assert!(warned(&pod(), &["--apiserver=https://10.96.0.1:443"]));
    assert!(warned(&pod(), &["--apiserver=https://kubernetes.default.svc"]));
    assert!(!warned(&pod(), &["--apiserver=https://10.0.0.10:6443"]));
    assert!(!warned(&pod(), &["--manifests=/x"]));

    let with_file = pod().with_file("/kc", KUBECONFIG);
    let config = config_on(&with_file, &["--kubeconfig=/kc"]).unwrap();
    assert_eq!(config.warnings.len(), 1);
    assert!(config.warnings[0].contains("10.96.0.1") && config.warnings[0].contains("--apiserver"));

    let untouched = pod().with_env("KUBERNETES_PORT_443_TCP_ADDR", "10.96.0.1");
    assert!(warned(&untouched, &[]));
    let overridden = pod()
        .with_env("KUBERNETES_SERVICE_HOST", "192.168.0.10")
        .with_env("KUBERNETES_PORT_443_TCP_ADDR", "10.96.0.1");
    assert!(!warned(&overridden, &[]));
}

#[test]
fn a_kubeconfig_that_names_no_server_is_an_error() {
    let error = |text: Option<&str>| {
        let mut host = FakeHost::named("n1");
        if let Some(text) = text {
            host = host.with_file("/kc", text);
        }
        config_on(&host, &["--kubeconfig=/kc"]).unwrap_err().to_string()
    };
    assert!(error(None).contains("cannot be read"));
    assert!(error(Some("contexts: 7")).contains("is not a kubeconfig"));
    assert!(error(Some("current-context: x")).contains("\"x\" is not among its contexts"));
}

#[test]
fn the_host_of_a_url_is_found() {
    for (url, host) in [
        ("https://10.0.0.1:6443", "10.0.0.1"),
        ("https://[fd00::1]:6443/path", "fd00::1"),
        ("http://user@api.example/?q", "api.example"),
        ("api:6443", "api"),
        ("https://", ""),
    ] {
        assert_eq!(bootstrap::url_host(url), host, "{url}");
    }
}

#[test]
fn this_host_has_a_name_and_a_network_namespace() {
    assert!(!ThisHost.hostname().unwrap().is_empty());
    assert!(ThisHost.read(Path::new("/proc/sys/kernel/osrelease")).is_ok());
    assert!(ThisHost.cpus() > 0);
    // Known since Linux 5.14; one namespace has one cookie.
    assert_eq!(ThisHost.netns_cookie(), ThisHost.netns_cookie());
}
