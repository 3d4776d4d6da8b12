//! Programs of others at our hooks, and devices whose packets may pass by them.

use super::{Check, Node};
use agent_kernel::datapath::attach::others::{Company, Others};

/// Places that a line names.
const NAMED: usize = 4;
/// How the programs of Cilium are called.
const CILIUM: &str = "cil_";

pub(super) fn checks(node: &Node<'_>) -> Vec<Check> {
    let others = (node.others)();
    let mut checks = vec![at_hooks(&others.company), redirecting(&others), past(&others)];
    if !others.unknown.is_empty() {
        let remedy = "run doctor as root, on the node itself (hostNetwork, the host's /sys/fs/cgroup)";
        checks.push(Check::warn("unknown programs", others.unknown.join("\n"), remedy));
    }
    checks
}

/// Whether what runs before ours, or is Cilium's, may lead packets past it.
fn is_first(company: &Company) -> bool {
    !company.before.is_empty() && matches!(company.hook, "ingress" | "egress" | "XDP")
        || company.hook == "XDP" && !company.after.is_empty()
}

/// Who is there, and in which order: a program sees what those before it have left of a packet.
fn at_hooks(company: &[Company]) -> Check {
    const NAME: &str = "programs of others";
    if company.is_empty() {
        return Check::ok(NAME, "none at our hooks");
    }
    let lines: Vec<String> = company.iter().map(line).collect();
    let found = lines.join("\n");
    if company.iter().any(is_first) {
        let remedy = "what they drop or redirect never reaches ours: have them attached after ours (BPF_F_AFTER; at XDP \
                      there is no order), or leave the interface to them with --devices";
        return Check::warn(NAME, found, remedy);
    }
    Check::ok(NAME, found)
}

fn line(company: &Company) -> String {
    let Company { hook, before, after, places } = company;
    let mut at = places.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if places.len() > NAMED {
        at += &format!(" and {} more", places.len() - NAMED);
    }
    let mut parts = Vec::new();
    if !before.is_empty() {
        parts.push(format!("{} before ours ({})", before.join(", "), meaning(hook, true)));
    }
    if !after.is_empty() {
        // XDP is a hook that we have nothing at.
        let order = if *hook == "XDP" { "before ours" } else { "after ours" };
        parts.push(format!("{} {order} ({})", after.join(", "), meaning(hook, *hook == "XDP")));
    }
    format!("{hook} of {at}: {}", parts.join("; "))
}

/// What a program before or after ours sees.
fn meaning(hook: &str, before: bool) -> &'static str {
    match (hook, before) {
        ("ingress" | "XDP" | "netkit", true) => "sees packets to Services as they were sent",
        ("ingress", false) => "sees packets to endpoints",
        ("egress", true) => "sees packets from endpoints",
        ("egress", false) => "sees packets from Services",
        (_, true) => "sees the Service's address, and may refuse it",
        (_, false) => "sees the endpoint's address",
    }
}

/// CNIs that hand packets from one device to another below the stack.
fn redirecting(others: &Others) -> Check {
    const NAME: &str = "packets past our hooks";
    let names = |company: &Company| {
        let all = company.before.iter().chain(&company.after);
        let cilium = all.filter(|name| name.starts_with(CILIUM));
        cilium.map(|name| format!("{name} at {} of {}", company.hook, company.places.join(", "))).collect()
    };
    let cilium: Vec<Vec<String>> = others.company.iter().map(names).collect();
    let cilium = cilium.concat();
    let netkit: Vec<String> = others
        .company
        .iter()
        .filter(|company| company.hook == "netkit")
        .flat_map(|company| company.places.iter().cloned())
        .collect();
    match (cilium.as_slice(), netkit.as_slice()) {
        ([], []) => Check::ok(NAME, "no CNI seen that leads packets past them"),
        ([], netkit) => Check::warn(
            NAME,
            format!("programs of netkit devices may redirect pods' packets: {}", netkit.join(", ")),
            "use veth devices, or see that their programs pass packets on to the stack",
        ),
        (cilium, _) => Check::warn(
            NAME,
            format!(
                "Cilium leads packets of pods past the stack (bpf_redirect_peer, bpf_redirect_neigh): {}",
                cilium.join("; ")
            ),
            "set bpf.hostLegacyRouting=true in Cilium's configuration",
        ),
    }
}

/// Devices of pods that are no devices of this node.
fn past(others: &Others) -> Check {
    const NAME: &str = "devices past the node";
    let one = |(name, count): &(String, u32)| format!("{name} has {count} virtual functions (SR-IOV)");
    let found: Vec<String> = others.virtual_functions.iter().map(one).collect();
    match found.as_slice() {
        [] => Check::ok(
            NAME,
            "none seen; what macvlan and ipvlan devices inside pods send cannot be seen from here",
        ),
        found => Check::warn(
            NAME,
            found.join("\n"),
            "pods that have one reach Services by TCP and UDP sockets only (socket programs), and cannot be endpoints of \
             NodePorts of this node: give them a second interface for cluster traffic",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn company(hook: &'static str, before: &[&str], after: &[&str], places: &[&str]) -> Company {
        let own = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        Company { hook, before: own(before), after: own(after), places: own(places) }
    }

    #[test]
    fn whoever_comes_first_is_named_with_what_that_means() {
        let check = at_hooks(&[
            company("ingress", &["firewall"], &[], &["eth0", "eth1", "a", "b", "c"]),
            company("connect4", &[], &["audit"], &["/sys/fs/cgroup"]),
        ]);
        assert_eq!(check.verdict, super::super::Verdict::Warn);
        assert_eq!(
            check.found,
            "ingress of eth0, eth1, a, b and 1 more: firewall before ours (sees packets to Services as they were sent)\n\
             connect4 of /sys/fs/cgroup: audit after ours (sees the endpoint's address)"
        );
        let check = at_hooks(&[company("ingress", &[], &["after"], &["eth0"])]);
        assert_eq!(check.verdict, super::super::Verdict::Ok);
        let check = at_hooks(&[company("XDP", &[], &["shield"], &["eth0"])]);
        assert_eq!(check.verdict, super::super::Verdict::Warn);
        assert!(check.found.contains("shield before ours"), "{check:?}");
    }

    #[test]
    fn who_leads_packets_past_our_hooks_is_named() {
        let warned = |company: Company| {
            let check = redirecting(&Others { company: vec![company], ..Others::default() });
            (check.verdict == super::super::Verdict::Warn).then_some(check.found)
        };
        let cilium = warned(company("ingress", &[], &["cil_from_contain"], &["lxc1"])).unwrap();
        assert!(cilium.contains("cil_from_contain at ingress of lxc1"), "{cilium}");
        assert!(warned(company("netkit", &["x"], &[], &["nk0"])).unwrap().contains("nk0"));
        assert_eq!(warned(company("ingress", &["x"], &[], &["eth0"])), None);
        let cards = Others { virtual_functions: vec![("ens1".into(), 8)], ..Others::default() };
        assert!(past(&cards).found.contains("ens1 has 8 virtual functions"));
        assert_eq!(past(&Others::default()).verdict, super::super::Verdict::Ok);
    }
}
