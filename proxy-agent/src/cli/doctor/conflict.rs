//! Others who would translate the same traffic.

use super::{Check, Node};

pub(super) fn checks(node: &Node<'_>) -> Vec<Check> {
    vec![kube_proxy(node), leftovers(node), other_proxies(node)]
}

/// Pids of processes with this name (proc_pid_comm(5)).
fn pids(node: &Node<'_>, name: &str) -> Vec<String> {
    let numbers = node.list("/proc").into_iter().filter(|pid| pid.bytes().all(|b| b.is_ascii_digit()));
    numbers.filter(|pid| node.read(&format!("/proc/{pid}/comm")).as_deref() == Some(name)).collect()
}

fn kube_proxy(node: &Node<'_>) -> Check {
    const NAME: &str = "kube-proxy";
    match agent_kernel::kube_proxy::process(&node.path("/proc")) {
        // In a pod without hostPID only the pod's own processes are seen.
        None => Check::ok(NAME, "no such process seen"),
        Some(why) => Check::warn(
            NAME,
            format!("{why}: both translate, and this agent comes first"),
            "once this agent is healthy, delete the DaemonSet kube-proxy in kube-system",
        ),
    }
}

/// Rules that a kube-proxy has left: harmless to what this agent translates, but they answer for Services
/// that exist no more.
fn leftovers(node: &Node<'_>) -> Check {
    const NAME: &str = "kube-proxy's rules";
    match (node.leftovers)().as_slice() {
        [] => Check::ok(NAME, "none found"),
        found => Check::warn(
            NAME,
            found.join("\n"),
            "once kube-proxy is gone, a running agent removes them (--remove-kube-proxy-rules); without an agent, \
             run `proxy-agent cleanup --kube-proxy`",
        ),
    }
}

/// Other eBPF service proxies: whose hook runs first is not defined.
fn other_proxies(node: &Node<'_>) -> Check {
    const NAME: &str = "other eBPF proxies";
    let pinned = node.list("/sys/fs/bpf/tc/globals");
    let has = |prefix: &str| pinned.iter().any(|name| name.starts_with(prefix));
    // Names under which these projects pin their Service tables.
    let cilium = has("cilium_lb4_services") || has("cilium_lb6_services");
    let calico = has("cali_v4_nat_fe") || has("cali_v6_nat_fe");
    let (who, remedy) = match (cilium, calico) {
        (false, false) => return Check::ok(NAME, "none found"),
        (true, _) => ("Cilium", "set kubeProxyReplacement=false in Cilium's configuration"),
        (false, true) => ("Calico", "set bpfEnabled: false in the FelixConfiguration"),
    };
    let agent = match who {
        "Cilium" => "cilium-agent",
        _ => "calico-node",
    };
    match pids(node, agent).is_empty() {
        false => Check::fail(NAME, format!("{who} translates Services on this node"), remedy),
        true => Check::warn(
            NAME,
            format!("{who} has left Service tables pinned under /sys/fs/bpf/tc/globals"),
            "if it is gone for good, restart the node to be rid of its programs",
        ),
    }
}
