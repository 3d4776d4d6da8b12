//! The shape of the nftables mode: a look-up in a map of Services leads to the chain of the Service, which chooses an
//! endpoint at random; the endpoint's chain rewrites the destination. NodePorts have a map and chains of their own.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use proxy_tests::reference::HOOKS;

use super::{PORT, Plan, Service, TARGET, without};

/// What leaves nothing.
pub(super) const NOTHING: &str = "table ip services {}\ndelete table ip services\n";

/// Services of one transaction. The kernel walks all of a transaction for each map that a rule of it has for itself: with
/// 10,000 Services in one it kept a processor for the better part of a minute.
const BATCH: usize = 1000;

/// All rules, as transactions: what belongs to no Service, then the Services.
pub(super) fn all(plan: &Plan) -> Vec<String> {
    let base = format!(
        "table ip services {{
    chain mark-for-masquerade {{ meta mark set meta mark | 0x4000; }}
    map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
    map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
    set nodeport-ips {{ type ipv4_addr; elements = {{ {} }}; }}
    map service-nodeports {{ type inet_proto . inet_service : verdict; }}
    chain services {{
        ip daddr . meta l4proto . th dport vmap @service-ips
        ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
    }}
    chain endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}{HOOKS}
}}
",
        plan.node
    );
    let batches = plan.services.chunks(BATCH).map(|services| batch(plan, services));
    std::iter::once(base).chain(batches).collect()
}

fn batch(plan: &Plan, services: &[Service]) -> String {
    let (mut chains, mut addresses, mut ports) = (String::new(), String::new(), String::new());
    // Writing to a string does not fail.
    for service in services {
        endpoints(&mut chains, service, service.endpoints.iter());
        write(&mut chains, plan, service);
        let (name, proto) = (chain(service), service.proto);
        writeln!(addresses, "{} . {proto} . {PORT} : goto service-{name},", service.address).ok();
        if let Some(port) = service.node_port {
            let to = format!("external-{name}");
            writeln!(chains, "chain {to} {{ jump mark-for-masquerade\ngoto service-{name}; }}").ok();
            writeln!(ports, "{proto} . {port} : goto {to},").ok();
        }
    }
    let mut text = format!("table ip services {{\n{chains}}}\n");
    for (map, elements) in [("service-ips", addresses), ("service-nodeports", ports)] {
        if !elements.is_empty() {
            writeln!(text, "add element ip services {map} {{ {elements} }}").ok();
        }
    }
    text
}

/// One transaction: the chains of new endpoints, the Service's chain written anew, old endpoints' chains gone.
pub(super) fn change(plan: &Plan, before: &Service, after: &Service) -> String {
    let (name, mut new, mut old) = (chain(after), String::new(), String::new());
    endpoints(&mut new, after, without(after, before));
    let mut chains = String::new();
    write(&mut chains, plan, after);
    for endpoint in without(before, after) {
        let chain = endpoint_chain(before, *endpoint);
        writeln!(old, "flush chain ip services {chain}\ndelete chain ip services {chain}").ok();
    }
    format!(
        "table ip services {{\n{new}}}
flush chain ip services service-{name}
table ip services {{\n{chains}}}
{old}"
    )
}

/// The chains of endpoints.
fn endpoints<'a>(text: &mut String, service: &Service, endpoints: impl Iterator<Item = &'a Ipv4Addr>) {
    for endpoint in endpoints {
        let (chain, proto) = (endpoint_chain(service, *endpoint), service.proto);
        // Writing to a string does not fail.
        writeln!(
            text,
            "chain {chain} {{ ip saddr {endpoint} jump mark-for-masquerade\n\
             meta l4proto {proto} dnat to {endpoint}:{TARGET}; }}"
        )
        .ok();
    }
}

/// The chain of a Service.
fn write(text: &mut String, plan: &Plan, service: &Service) {
    let (name, proto, address) = (chain(service), service.proto, service.address);
    let goto: Vec<String> = service
        .endpoints
        .iter()
        .enumerate()
        .map(|(n, endpoint)| format!("{n} : goto {}", endpoint_chain(service, *endpoint)))
        .collect();
    let (count, goto) = (goto.len(), goto.join(", "));
    writeln!(
        text,
        "chain service-{name} {{ ip daddr {address} {proto} dport {PORT} ip saddr != {} \
         jump mark-for-masquerade\nnumgen random mod {count} vmap {{ {goto} }}; }}",
        plan.pods
    )
    .ok();
}

/// As long as the names that stand for a namespace, a Service and a port are.
fn chain(service: &Service) -> String {
    format!("{:08}-default/{}/{}/http", service.number, service.name(), service.proto)
}

fn endpoint_chain(service: &Service, endpoint: Ipv4Addr) -> String {
    format!("endpoint-{}__{endpoint}/{TARGET}", chain(service))
}
