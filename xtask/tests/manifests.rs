//! The manifests under `deploy/` say what the Kubernetes API understands, and agree with each other.
//!
//! Parsing alone would not notice a misspelt field: every document is also written back from its type and must
//! come out whole.
#![cfg(test)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{ConfigMap, Container, Endpoints, Service, ServiceAccount, ServicePort},
    discovery::v1::EndpointSlice,
    rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// The namespaced name of an object.
type Name = (String, String);

/// What a directory of examples holds, by kind.
#[derive(Default)]
struct Examples {
    services: Vec<Service>,
    slices: Vec<EndpointSlice>,
    endpoints: Vec<Endpoints>,
}

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("deploy")
}

/// Example files whose names end like this, sorted.
fn files(ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(deploy().join("examples")).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.to_string_lossy().ends_with(ending));
    files.sort();
    files
}

fn documents(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// Reads a document as its type, and fails if the type drops or changes anything of it.
fn typed<T: DeserializeOwned + Serialize>(document: &Value) -> T {
    let object: T =
        serde_json::from_value(document.clone()).unwrap_or_else(|error| panic!("{error} in {document:#}"));
    let again = serde_json::to_value(&object).unwrap();
    assert_within(document, &again, "");
    object
}

fn assert_within(written: &Value, understood: &Value, path: &str) {
    match (written, understood) {
        (Value::Object(written), Value::Object(understood)) => {
            for (key, value) in written {
                let path = format!("{path}.{key}");
                let there = understood.get(key).unwrap_or_else(|| panic!("the API has no field {path}"));
                assert_within(value, there, &path);
            }
        }
        (Value::Array(written), Value::Array(understood)) => {
            assert_eq!(written.len(), understood.len(), "{path}");
            for (index, (value, there)) in written.iter().zip(understood).enumerate() {
                assert_within(value, there, &format!("{path}[{index}]"));
            }
        }
        _ => assert_eq!(written, understood, "{path}"),
    }
}

fn examples(files: &[PathBuf]) -> Examples {
    let mut examples = Examples::default();
    for file in files {
        for document in documents(file) {
            match document["kind"].as_str() {
                Some("Service") => examples.services.push(typed(&document)),
                Some("EndpointSlice") => examples.slices.push(typed(&document)),
                Some("Endpoints") => examples.endpoints.push(typed(&document)),
                other => panic!("{}: unexpected kind {other:?}", file.display()),
            }
        }
    }
    examples
}

fn name(metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> Name {
    (metadata.namespace.clone().expect("a namespace"), metadata.name.clone().expect("a name"))
}

fn ports(service: &Service) -> &[ServicePort] {
    service.spec.as_ref().unwrap().ports.as_deref().unwrap_or_default()
}

/// A port's name and protocol: how endpoints' ports are matched with a Service's.
fn port_names(service: &Service) -> BTreeSet<(String, String)> {
    let protocol = |port: &ServicePort| port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
    ports(service).iter().map(|port| (port.name.clone().unwrap_or_default(), protocol(port))).collect()
}

/// What must be true of a directory that an agent reads.
fn check(examples: &Examples) {
    let mut services = BTreeMap::new();
    let (mut addresses, mut node_ports) = (BTreeSet::new(), BTreeSet::new());
    for service in &examples.services {
        assert!(
            services.insert(name(&service.metadata), service).is_none(),
            "twice: {:?}",
            service.metadata.name
        );
        let spec = service.spec.as_ref().unwrap();
        let ips = spec.cluster_ips.clone().unwrap_or_default();
        assert_eq!(spec.cluster_ip.as_ref(), ips.first(), "{:?}", service.metadata.name);
        for ip in ips.iter().filter(|ip| *ip != "None") {
            ip.parse::<IpAddr>().unwrap();
            assert!(addresses.insert(ip.clone()), "two Services with {ip}");
        }
        let of_services = ports(service).iter().filter_map(|port| port.node_port);
        for port in of_services.chain(spec.health_check_node_port) {
            assert!((30000..32768).contains(&port), "{port} is no NodePort");
            assert!(node_ports.insert(port), "NodePort {port} twice");
        }
    }
    for slice in &examples.slices {
        let (namespace, own) = name(&slice.metadata);
        let label = &slice.metadata.labels.as_ref().unwrap()["kubernetes.io/service-name"];
        let service =
            services.get(&(namespace, label.clone())).unwrap_or_else(|| panic!("{own}: no Service"));
        for port in slice.ports.as_deref().unwrap_or_default() {
            let port = (port.name.clone().unwrap_or_default(), port.protocol.clone().unwrap_or_default());
            assert!(port_names(service).contains(&port), "{own}: the Service has no port {port:?}");
        }
        for endpoint in slice.endpoints.iter().flatten() {
            for address in &endpoint.addresses {
                let address: IpAddr = address.parse().unwrap();
                assert_eq!(address.is_ipv4(), slice.address_type == "IPv4", "{own}: {address}");
            }
            assert!(endpoint.node_name.is_some() && endpoint.conditions.is_some(), "{own}");
        }
    }
    for endpoints in &examples.endpoints {
        let service = services[&name(&endpoints.metadata)];
        assert!(
            service.spec.as_ref().unwrap().selector.is_none(),
            "a cluster would overwrite hand-written ones"
        );
        for subset in endpoints.subsets.as_deref().unwrap_or_default() {
            for port in subset.ports.as_deref().unwrap_or_default() {
                let port = (port.name.clone().unwrap_or_default(), port.protocol.clone().unwrap_or_default());
                assert!(port_names(service).contains(&port), "{port:?}");
            }
        }
    }
}

#[test]
fn the_examples_agree_with_each_other() {
    let examples = examples(&files(".yaml"));
    assert!(examples.services.len() >= 10, "{}", examples.services.len());
    assert!(!examples.endpoints.is_empty());
    check(&examples);
}

#[test]
fn the_examples_agree_after_each_next_step() {
    let steps = files(".yaml.next");
    assert_eq!(steps.len(), 2);
    for step in steps {
        let replaced = step.with_extension("");
        assert!(replaced.is_file(), "{} replaces nothing", step.display());
        let mut files = files(".yaml");
        files.retain(|file| *file != replaced);
        files.push(step);
        check(&examples(&files));
    }
}

#[test]
fn every_example_says_what_it_shows_and_how_to_try_it() {
    for file in files("").into_iter().filter(|file| file.extension().is_some_and(|end| end == "yaml")) {
        let text = fs::read_to_string(&file).unwrap();
        let head: String = text.lines().take_while(|line| line.starts_with('#')).collect();
        assert!(head.contains("Try it"), "{}", file.display());
    }
}

#[test]
fn the_webui_example_is_where_the_demo_expects_it() {
    let examples = examples(&[deploy().join("examples/webui.yaml")]);
    let of = |node: &str| -> Vec<&str> {
        let endpoints = examples.slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
        let here = endpoints.filter(|endpoint| endpoint.node_name.as_deref() == Some(node));
        here.flat_map(|endpoint| endpoint.addresses.iter().map(String::as_str)).collect()
    };
    assert_eq!(of("node1"), ["10.244.1.11", "10.244.1.12", "10.244.1.11", "10.244.1.12"]);
    assert_eq!(of("node2"), ["10.244.2.11", "10.244.2.11"]);
    let ips: Vec<_> =
        examples.services.iter().filter_map(|s| s.spec.as_ref()?.cluster_ip.as_deref()).collect();
    assert_eq!(ips, ["10.100.100.100", "10.100.100.200"]);
}

/// The manifests that install everything.
const INSTALLED: [&str; 2] = ["daemonset.yaml", "daemonset-restricted.yaml"];

/// The one document of deploy/daemonset.yaml with this kind.
fn installed<T: DeserializeOwned + Serialize>(kind: &str) -> T {
    of(INSTALLED[0], kind)
}

/// The one document of a manifest with this kind.
fn of<T: DeserializeOwned + Serialize>(manifest: &str, kind: &str) -> T {
    let mut documents = documents(&deploy().join(manifest));
    documents.retain(|document| document["kind"] == kind);
    assert_eq!(documents.len(), 1, "{kind}");
    typed(&documents[0])
}

#[test]
fn the_restricted_manifest_differs_in_rights_alone() {
    for kind in ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "ConfigMap", "Service"] {
        let [one, other] = INSTALLED.map(|manifest| {
            let documents = documents(&deploy().join(manifest));
            documents.into_iter().find(|document| document["kind"] == kind).expect(kind)
        });
        assert_eq!(one, other);
    }
    let [mut privileged, mut restricted] = INSTALLED.map(|manifest| of::<DaemonSet>(manifest, "DaemonSet"));
    let [one, other] = [&mut privileged, &mut restricted]
        .map(|set| set.spec.as_mut().unwrap().template.spec.as_mut().unwrap());
    // What runs first is the same program, told the same, with all rights.
    let first = other.init_containers.take().unwrap();
    let [first] = &first[..] else { panic!("one container first") };
    let told = |container: &Container| container.args.clone().unwrap();
    let own = told(&other.containers[0]);
    assert_eq!(first.security_context.as_ref().unwrap().privileged, Some(true));
    assert!(told(first).iter().all(|arg| arg == "--init-only" || own.contains(arg)), "{:?}", told(first));
    assert_eq!(first.image, other.containers[0].image);
    assert_eq!((one.host_pid.take(), other.host_pid), (Some(true), None));
    // All containers of the pod: neither has a profile of its own, which would count instead.
    let own_profile = |container: &Container| container.security_context.as_ref()?.app_armor_profile.clone();
    assert!(own_profile(first).is_none() && own_profile(&other.containers[0]).is_none());
    let profile = other.security_context.take().and_then(|context| context.app_armor_profile);
    assert_eq!(profile.expect("the default profile refuses pins").type_, "Unconfined");
    let mounts = |container: &mut Container| {
        let mounts = container.volume_mounts.as_mut().unwrap();
        mounts.iter_mut().for_each(|mount| (mount.read_only, mount.mount_propagation) = (None, None));
    };
    // Who is privileged may write to all of /sys.
    let expedited = |name: &str| name == "rcu-expedited";
    other.volumes.as_mut().unwrap().retain(|volume| !expedited(&volume.name));
    other.containers[0].volume_mounts.as_mut().unwrap().retain(|mount| !expedited(&mount.name));
    for set in [one, other] {
        let [container] = &mut set.containers[..] else { panic!("one container") };
        container.security_context = None;
        container.args.as_mut().unwrap().retain(|arg| !arg.starts_with("--oom-score-adj"));
        mounts(container);
    }
    assert_eq!(privileged, restricted);
}

#[test]
fn the_daemonset_runs_this_version_as_the_account_that_has_the_role() {
    let account: ServiceAccount = installed("ServiceAccount");
    let role: ClusterRole = installed("ClusterRole");
    let binding: ClusterRoleBinding = installed("ClusterRoleBinding");
    let daemon_set: DaemonSet = installed("DaemonSet");
    let (namespace, account) = name(&account.metadata);

    assert_eq!(Some(binding.role_ref.name), role.metadata.name);
    let subject = &binding.subjects.as_deref().unwrap()[0];
    assert_eq!((subject.namespace.as_ref(), &subject.name), (Some(&namespace), &account));
    assert_eq!(daemon_set.metadata.namespace.as_ref(), Some(&namespace));

    let spec = daemon_set.spec.unwrap();
    let labels = spec.template.metadata.unwrap().labels.unwrap();
    for (key, value) in spec.selector.match_labels.unwrap() {
        assert_eq!(labels.get(&key), Some(&value), "the selector does not match its own pods");
    }
    assert_eq!(labels["k8s-app"], "kube-proxy");
    let pod = spec.template.spec.unwrap();
    assert_eq!(pod.service_account_name.as_ref(), Some(&account));
    assert_eq!(
        (pod.host_network, pod.priority_class_name.as_deref()),
        (Some(true), Some("system-node-critical"))
    );
    let image = concat!("ebpf-proxy/proxy-agent:", env!("CARGO_PKG_VERSION"));
    assert_eq!(pod.containers[0].image.as_deref(), Some(image));
}

#[test]
fn what_the_agent_is_told_to_use_is_mounted() {
    let daemon_set: DaemonSet = installed("DaemonSet");
    let config: ConfigMap = installed("ConfigMap");
    let pod = daemon_set.spec.unwrap().template.spec.unwrap();
    let container = &pod.containers[0];
    let volumes: BTreeMap<_, _> =
        pod.volumes.as_deref().unwrap().iter().map(|volume| (volume.name.as_str(), volume)).collect();
    let mounts = container.volume_mounts.as_deref().unwrap();
    assert_eq!(mounts.len(), volumes.len());
    let mount = |name: &str| mounts.iter().find(|mount| mount.name == name).unwrap();
    let args = container.args.as_deref().unwrap();
    let arg =
        |flag: &str| args.iter().find_map(|arg| arg.strip_prefix(flag)).unwrap_or_else(|| panic!("{flag}"));

    assert!(mounts.iter().all(|mount| volumes.contains_key(mount.name.as_str())));
    assert_eq!(mount("bpffs").mount_propagation.as_deref(), Some("Bidirectional"));
    assert!(arg("--bpf-root=").starts_with(&mount("bpffs").mount_path));
    assert_eq!(arg("--cgroup-root="), mount("cgroup").mount_path);
    let kubeconfig = arg("--kubeconfig=").strip_prefix(&mount("kubeconfig").mount_path).unwrap();
    assert_eq!(
        volumes["kubeconfig"].config_map.as_ref().unwrap().name,
        config.metadata.name.clone().unwrap(),
        "the volume is another ConfigMap"
    );
    assert!(config.data.unwrap().contains_key(kubeconfig.trim_start_matches('/')));
    assert_eq!(arg("--hostname-override="), "$(NODE_NAME)");
    assert!(container.env.as_deref().unwrap().iter().any(|variable| variable.name == "NODE_NAME"));
}

#[test]
fn kubeadm_s_kube_proxy_is_replaced_in_its_own_place() {
    // F-14.
    let [document] = documents(&deploy().join("kubeadm.yaml")).try_into().unwrap();
    let set: DaemonSet = typed(&document);
    assert_eq!(name(&set.metadata), ("kube-system".to_owned(), "kube-proxy".to_owned()));
    let labels = BTreeMap::from([("k8s-app".to_owned(), "kube-proxy".to_owned())]);
    let spec = set.spec.unwrap();
    assert_eq!(spec.selector.match_labels.as_ref(), Some(&labels));
    assert_eq!(spec.template.metadata.unwrap().labels.as_ref(), Some(&labels));
    let pod = spec.template.spec.unwrap();
    assert_eq!(pod.service_account_name.as_deref(), Some("kube-proxy"));
    let container = &pod.containers[0];
    let config = pod.volumes.as_deref().unwrap().iter().find(|volume| volume.name == "kube-proxy").unwrap();
    assert_eq!(config.config_map.as_ref().unwrap().name, "kube-proxy");
    let mount = container.volume_mounts.as_deref().unwrap().iter().find(|m| m.name == "kube-proxy").unwrap();
    assert_eq!(mount.mount_path, "/var/lib/kube-proxy");
    // Beside where it is told to look, it is the other DaemonSet's pod.
    let other: DaemonSet = installed("DaemonSet");
    let other = other.spec.unwrap().template.spec.unwrap();
    assert_eq!(container.image, other.containers[0].image);
    let args = |args: &Option<Vec<String>>| -> Vec<String> {
        let args = args.iter().flatten().filter(|arg| !arg.contains("config"));
        args.cloned().collect()
    };
    assert_eq!(args(&container.args), args(&other.containers[0].args));
    assert_eq!(
        (&container.env, &container.ports, &container.security_context),
        (&other.containers[0].env, &other.containers[0].ports, &other.containers[0].security_context)
    );
}

/// Agents know each other by the endpoints of an ordinary Service: a headless one's are not watched, and one of another proxy's
/// neither.
#[test]
fn the_agents_are_endpoints_of_their_service_by_the_port_of_probes() {
    for (set, service) in [
        ("daemonset.yaml", "daemonset.yaml"),
        ("daemonset-restricted.yaml", "daemonset-restricted.yaml"),
        ("kubeadm.yaml", "kubeadm-agents.yaml"),
    ] {
        let (set, service): (DaemonSet, Service) = (of(set, "DaemonSet"), of(service, "Service"));
        // What --agents-service and --dsr-probe-port are unless they are set.
        assert_eq!(name(&service.metadata), ("kube-system".to_owned(), "ebpf-proxy".to_owned()));
        assert_eq!(service.metadata.labels, None);
        let [port] = ports(&service) else { panic!("one port") };
        assert_eq!(
            (port.name.as_deref(), port.port, port.protocol.as_deref()),
            (Some("dsr"), 10261, Some("UDP"))
        );
        let spec = service.spec.as_ref().unwrap();
        assert_eq!((spec.cluster_ip.as_ref(), spec.type_.as_deref()), (None, Some("ClusterIP")));
        assert_eq!(spec.ip_family_policy.as_deref(), Some("PreferDualStack"), "both addresses of each node");
        assert_eq!(spec.publish_not_ready_addresses, Some(false));
        assert_eq!(set.metadata.namespace, service.metadata.namespace);
        let template = set.spec.unwrap().template;
        let labels = template.metadata.unwrap().labels.unwrap();
        let selector = spec.selector.as_ref().unwrap();
        assert!(!selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value)));
        let pod = template.spec.unwrap();
        assert_eq!(pod.host_network, Some(true), "endpoints with the nodes' addresses");
        let target = serde_json::to_value(port.target_port.as_ref().unwrap()).unwrap();
        let mut all = pod.containers[0].ports.iter().flatten();
        let own = all.find(|port| target == *port.name.as_deref().unwrap()).expect("the port it leads to");
        let told = (own.container_port, own.host_port, own.protocol.as_deref());
        assert_eq!(told, (10261, Some(10261), Some("UDP")));
    }
}

#[test]
fn the_probes_ask_the_health_port() {
    let daemon_set: DaemonSet = installed("DaemonSet");
    let container = &daemon_set.spec.unwrap().template.spec.unwrap().containers[0];
    let port = &container.ports.as_deref().unwrap()[0];
    assert_eq!((port.name.as_deref(), port.container_port), (Some("healthz"), 10256));
    for (probe, path) in [(&container.liveness_probe, "/livez"), (&container.readiness_probe, "/healthz")] {
        let get = probe.as_ref().unwrap().http_get.as_ref().unwrap();
        assert_eq!(get.path.as_deref(), Some(path));
        assert_eq!(serde_json::to_value(&get.port).unwrap(), "healthz");
    }
}

#[test]
fn the_role_is_that_of_kube_proxy() {
    // Y-4: `system:node-proxier`, from the API server's bootstrap policy.
    let allowed = [
        ("", "services", &["list", "watch"][..]),
        ("", "endpoints", &["list", "watch"]),
        ("discovery.k8s.io", "endpointslices", &["list", "watch"]),
        ("networking.k8s.io", "servicecidrs", &["list", "watch"]),
        ("", "nodes", &["get", "list", "watch"]),
        ("", "events", &["create", "patch", "update"]),
        ("events.k8s.io", "events", &["create", "patch", "update"]),
    ];
    for manifest in INSTALLED {
        assert_allowed(manifest, &allowed);
    }
}

/// Everything that its role allows is here, and everything here is allowed.
fn assert_allowed(manifest: &str, allowed: &[(&str, &str, &[&str])]) {
    let role: ClusterRole = of(manifest, "ClusterRole");
    let mut missing: BTreeSet<_> = allowed.iter().map(|(group, resource, _)| (*group, *resource)).collect();
    for PolicyRule { api_groups, resources, verbs, resource_names, non_resource_urls } in role.rules.unwrap()
    {
        assert!(resource_names.is_none() && non_resource_urls.is_none());
        for group in api_groups.unwrap() {
            for resource in resources.iter().flatten() {
                let known = allowed.iter().find(|(g, r, _)| (*g, *r) == (&group, resource));
                let (_, _, may) = known.unwrap_or_else(|| panic!("{group}/{resource} is too much"));
                assert_eq!(verbs, *may, "{resource}");
                missing.retain(|known| *known != (group.as_str(), resource.as_str()));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:?}");
}
