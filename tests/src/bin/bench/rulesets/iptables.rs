//! The shape of the iptables mode: one rule for each Service in `KUBE-SERVICES`, and for each NodePort in `KUBE-NODEPORTS`;
//! a chain for each Service, which goes from endpoint to endpoint with the chance that falls to it; a chain for each endpoint.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result};

use super::{PORT, Plan, Service, TARGET, without};

/// What leaves nothing, without `--noflush`.
pub(super) const NOTHING: &str = "*nat\nCOMMIT\n*filter\nCOMMIT\n";

/// Chains of no Service.
const CHAINS: &str = ":KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
";
const MASQUERADING: &str = "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
";
const ENTRANCES: &str = "-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
";
const FILTER: &str = "*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

/// The program that loads rules. The older variant, where it is there: it loads many in a tenth of the time.
pub(super) fn program() -> Result<&'static str> {
    static FOUND: OnceLock<Option<&'static str>> = OnceLock::new();
    let runs = |program: &&str| {
        let output = Command::new(program).arg("--version").output();
        output.is_ok_and(|output| output.status.success())
    };
    FOUND.get_or_init(|| ["iptables-legacy-restore", "iptables-restore"].into_iter().find(runs)).context(
        "there is no iptables here to compare with: install the package iptables, or leave this part out",
    )
}

/// All rules.
pub(super) fn all(plan: &Plan) -> String {
    let (mut names, mut rules) = (String::new(), String::new());
    for service in &plan.services {
        write(&mut names, &mut rules, plan, service);
    }
    format!("{FILTER}*nat\n{CHAINS}{names}{ENTRANCES}{MASQUERADING}{}{rules}COMMIT\n", dispatch(plan))
}

/// The chains that lead to Services are written whole, of those that belong to one only its own.
pub(super) fn change(plan: &Plan, before: &Service, after: &Service) -> String {
    let (mut names, mut rules) = (String::new(), String::new());
    write(&mut names, &mut rules, plan, after);
    for endpoint in without(before, after) {
        let chain = endpoint_chain(before, *endpoint);
        writeln!(names, ":{chain} - [0:0]").ok();
        writeln!(rules, "-X {chain}").ok();
    }
    format!("*nat\n{CHAINS}{names}{MASQUERADING}{}{rules}COMMIT\n", dispatch(plan))
}

/// The rules that lead to Services.
fn dispatch(plan: &Plan) -> String {
    let mut rules = String::new();
    // Writing to a string does not fail.
    for service in &plan.services {
        let Service { number, proto, address, node_port, .. } = service;
        writeln!(
            rules,
            "-A KUBE-SERVICES -d {address}/32 -p {proto} -m {proto} --dport {PORT} -j KUBE-SVC-{number:016}"
        )
        .ok();
        if let Some(port) = node_port {
            writeln!(
                rules,
                "-A KUBE-NODEPORTS -p {proto} -m {proto} --dport {port} -j KUBE-EXT-{number:016}"
            )
            .ok();
        }
    }
    rules.push_str("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n");
    rules
}

/// The chains of a Service and of its endpoints, and what is in them.
fn write(names: &mut String, rules: &mut String, plan: &Plan, service: &Service) {
    let Service { number, proto, address, node_port, endpoints } = service;
    writeln!(names, ":KUBE-SVC-{number:016} - [0:0]").ok();
    if node_port.is_some() {
        writeln!(names, ":KUBE-EXT-{number:016} - [0:0]").ok();
        writeln!(
            rules,
            "-A KUBE-EXT-{number:016} -j KUBE-MARK-MASQ\n-A KUBE-EXT-{number:016} -j KUBE-SVC-{number:016}"
        )
        .ok();
    }
    writeln!(
        rules,
        "-A KUBE-SVC-{number:016} -d {address}/32 ! -s {} -p {proto} -m {proto} --dport {PORT} -j KUBE-MARK-MASQ",
        plan.pods
    )
    .ok();
    for (n, endpoint) in endpoints.iter().enumerate() {
        let chain = endpoint_chain(service, *endpoint);
        let left = endpoints.len() - n;
        #[expect(clippy::cast_precision_loss, reason = "a Service has few endpoints")]
        let chance = match left {
            1 => String::new(),
            left => {
                format!("-m statistic --mode random --probability {:.10} ", 1.0 / left as f64)
            }
        };
        writeln!(names, ":{chain} - [0:0]").ok();
        writeln!(
            rules,
            "-A KUBE-SVC-{number:016} {chance}-j {chain}
-A {chain} -s {endpoint}/32 -j KUBE-MARK-MASQ
-A {chain} -p {proto} -m {proto} -j DNAT --to-destination {endpoint}:{TARGET}"
        )
        .ok();
    }
}

/// Sixteen digits, as many as kube-proxy's hash has letters.
fn endpoint_chain(service: &Service, endpoint: Ipv4Addr) -> String {
    format!("KUBE-SEP-{:06}{:010}", service.number, u32::from(endpoint))
}
