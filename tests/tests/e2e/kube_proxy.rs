//! What a kube-proxy has left on a node goes, and nothing else does (Z-1…Z-6).

use std::process::{Child, Command};

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::netns::Netns;
use proxy_tests::probe::eventually;
use proxy_tests::require::agent_binary;
use tempfile::TempDir;

use crate::common::{manifests, web};
use crate::life::{FLAGS, SOON, answers, one_node, servers, service, status_until};

/// Rules of others, among them kubelet's, for `iptables-restore`.
const FOREIGN: &str = r#"*mangle
:PREROUTING ACCEPT [0:0]
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
-A PREROUTING -m comment --comment "looks like -j KUBE-SERVICES" -j CNI-HOSTPORT-DNAT
-A CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 8443 -j RETURN
-A POSTROUTING -o nowhere -j MASQUERADE
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:FENCE - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -j FENCE
-A FENCE -p udp -m udp --dport 53 -m comment --comment "names" -j ACCEPT
COMMIT
"#;

/// What kube-proxy writes in iptables mode, with what IPVS mode adds.
const LEFT: &str = r#"*mangle
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SVL-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-EXT-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-FW-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-LOAD-BALANCER - [0:0]
:KUBE-NODE-PORT - [0:0]
-I PREROUTING 1 -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-I POSTROUTING 1 -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -p tcp -m tcp --dport 80 -j KUBE-SVC-AAAAAAAAAAAAAAAA
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-AAAAAAAAAAAAAAAA
-A KUBE-EXT-AAAAAAAAAAAAAAAA -j KUBE-MARK-MASQ
-A KUBE-EXT-AAAAAAAAAAAAAAAA -g KUBE-SVC-AAAAAAAAAAAAAAAA
-A KUBE-SVC-AAAAAAAAAAAAAAAA -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -m tcp -j DNAT --to-destination ENDPOINT
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m set --match-set SET dst,dst -j MASQUERADE
COMMIT
*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SOURCE-RANGES-FIREWALL - [0:0]
:KUBE-IPVS-FILTER - [0:0]
:KUBE-IPVS-OUT-FILTER - [0:0]
-A INPUT -j KUBE-NODEPORTS
-A FORWARD -j KUBE-FORWARD
-A OUTPUT -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-SERVICES -p tcp -m tcp --dport 81 -j REJECT
COMMIT
"#;

const NFT_LEFT: &str = "
table FAMILY kube-proxy {
  map service-ips { type ADDR . inet_proto . inet_service : verdict; }
  chain services { ADDRFAMILY daddr . meta l4proto . th dport vmap @service-ips; }
  chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
}
";

fn shell(at: &Netns, script: &str) -> Result<String> {
    at.output("sh", &["-e", "-c", script])
}

/// Feeds rules to iptables of both kinds and families.
fn restore(at: &Netns, rules: &str) -> Result<()> {
    for kind in ["nft", "legacy"] {
        for (program, endpoint, set) in
            [("iptables", "10.0.0.1:80", "KUBE-LOOP-BACK"), ("ip6tables", "[fd00::1]:80", "KUBE-6-LOOP-BACK")]
        {
            let rules = rules.replace("ENDPOINT", endpoint).replace("SET", set);
            shell(at, &format!("{program}-{kind}-restore --noflush <<'END'\n{rules}END"))?;
        }
    }
    Ok(())
}

/// Everything that any of the tools shows of the node.
fn shown(at: &Netns) -> Result<String> {
    shell(
        at,
        // Without comments, which hold the time, and counters, which traffic moves.
        "nft --stateless list ruleset; for kind in nft legacy; do for save in iptables ip6tables; do \
         $save-$kind-save 2>/dev/null | sed '/^#/d; s/ \\[.*\\]//'; done; done; ipset list; ip -o link show | cut -d: -f2",
    )
}

fn rules_of_others(at: &Netns) -> Result<()> {
    restore(at, FOREIGN)?;
    shell(at, "nft add table inet mine; nft add chain inet mine kube-proxy; ipset create mine hash:ip")
        .map(drop)
}

fn leave_kube_proxys(at: &Netns) -> Result<()> {
    shell(
        at,
        "ipset create KUBE-LOOP-BACK hash:ip,port; ipset create KUBE-6-LOOP-BACK hash:ip,port family inet6; \
         ipset create KUBE-NODE-PORT-TCP bitmap:port range 0-65535; ip link add kube-ipvs0 type bridge",
    )?;
    restore(at, LEFT)?;
    for (family, addr) in [("ip", "ipv4_addr"), ("ip6", "ipv6_addr")] {
        let table = NFT_LEFT.replace("ADDRFAMILY", family).replace("ADDR", addr).replace("FAMILY", family);
        shell(at, &format!("nft -f - <<'END'\n{table}END"))?;
    }
    Ok(())
}

/// A node without an agent.
struct Node {
    netns: Netns,
    root: TempDir,
}

impl Node {
    fn new(label: &str) -> Result<Self> {
        proxy_tests::require::world()?;
        Ok(Self { netns: Netns::new(label)?, root: tempfile::tempdir()? })
    }

    /// What `cleanup --kube-proxy` says when it succeeds; as an error what it says when it fails.
    fn clean(&self) -> Result<String> {
        self.clean_with("$PATH")
    }

    /// The same where only these directories have programs.
    fn clean_with(&self, path: &str) -> Result<String> {
        let root = self.root.path().join("none");
        let (agent, root) = (agent_binary()?, root.display());
        let line = format!("PATH={path} {} cleanup --kube-proxy --bpf-root {root}", agent.display());
        shell(&self.netns, &line)
    }
}

/// A process that is called kube-proxy and does nothing.
fn pretender(at: &Netns, directory: &TempDir) -> Result<Child> {
    let path = directory.path().join("kube-proxy");
    // By another process: a program that this one has open for writing is busy in whatever a test beside it starts just then.
    let copied = Command::new("cp").arg("/bin/sleep").arg(&path).status().context("copying sleep")?;
    ensure!(copied.success(), "cp: {copied}");
    Ok(at.run_in(|| Command::new(path).arg("600").spawn())??)
}

#[test]
fn cleanup_takes_everything_of_kube_proxy_and_nothing_of_others() -> Result<()> {
    let node = Node::new("left")?;
    rules_of_others(&node.netns)?;
    let before = shown(&node.netns)?;
    leave_kube_proxys(&node.netns)?;
    // Z-6: as iptables mode sets it for NodePorts at 127.0.0.1.
    node.netns.sysctls(&[("ipv4/conf/all/route_localnet", "1")])?;
    let with = shown(&node.netns)?;
    for trace in ["KUBE-SEP-A", "table ip6 kube-proxy", "KUBE-6-LOOP-BACK", "kube-ipvs0"] {
        ensure!(with.contains(trace), "{trace} was not made:\n{with}");
    }

    let mut process = pretender(&node.netns, &node.root)?;
    let refused = node.clean();
    process.kill()?;
    process.wait()?;
    let refused = format!("{:#}", refused.err().context("cleaned up beside a kube-proxy that runs")?);
    ensure!(refused.contains("stop it first") && shown(&node.netns)? == with, "{refused}");

    let said = node.clean()?;
    for what in ["nftables table ip kube-proxy", "iptables-nft table nat: 12 chains", "iptables-legacy table"]
    {
        ensure!(said.contains(what), "no {what} in: {said}");
    }
    let after = shown(&node.netns)?;
    ensure!(after == before, "before:\n{before}\nafter:\n{after}\nit said: {said}");
    ensure!(
        shell(&node.netns, "cat /proc/sys/net/ipv4/conf/all/route_localnet")?.trim() == "1",
        "a sysctl was undone"
    );
    let said = node.clean()?;
    ensure!(said.starts_with("nothing to remove"), "{said}");
    Ok(())
}

#[test]
fn what_others_rules_lead_to_stays_and_cleanup_says_so_with_its_exit_code() -> Result<()> {
    let node = Node::new("held")?;
    rules_of_others(&node.netns)?;
    leave_kube_proxys(&node.netns)?;
    for program in ["iptables-nft", "iptables-legacy"] {
        shell(&node.netns, &format!("{program} -t nat -A CNI-HOSTPORT-DNAT -j KUBE-MARK-MASQ"))?;
    }
    let said = format!("{:#}", node.clean().err().context("it claims to have removed everything")?);
    for what in
        ["iptables-nft chain KUBE-MARK-MASQ", "iptables-legacy chain KUBE-POSTROUTING", "remove that rule"]
    {
        ensure!(said.contains(what), "no {what} in: {said}");
    }
    let left = shown(&node.netns)?;
    ensure!(left.contains("jump KUBE-POSTROUTING") && left.contains("-j KUBE-MARK-MASQ"), "{left}");
    ensure!(!left.contains("KUBE-SERVICES\n") && !left.contains("KUBE-SEP-"), "{left}");
    // The mark's masquerading names a set, which is in use as long.
    ensure!(
        said.contains("IP set KUBE-LOOP-BACK:") && left.contains("Name: KUBE-LOOP-BACK"),
        "{said}\n{left}"
    );
    ensure!(!left.contains("KUBE-NODE-PORT-TCP"), "{left}");
    for program in ["iptables-nft", "iptables-legacy"] {
        shell(&node.netns, &format!("{program} -t nat -D CNI-HOSTPORT-DNAT -j KUBE-MARK-MASQ"))?;
    }
    node.clean()?;
    let left = shown(&node.netns)?;
    ensure!(!left.contains("KUBE-MARK-MASQ") && !left.contains("KUBE-LOOP-BACK"), "{left}");
    Ok(())
}

#[test]
fn without_programs_for_legacy_tables_the_rest_goes_and_they_are_named() -> Result<()> {
    // Z-1: absent tools are no errors as long as there is nothing to do with them.
    let node = Node::new("bare")?;
    rules_of_others(&node.netns)?;
    ensure!(node.clean_with("/nowhere")?.starts_with("nothing to remove"));
    leave_kube_proxys(&node.netns)?;
    let said = format!("{:#}", node.clean_with("/nowhere").err().context("nothing is left, it says")?);
    for family in ["IPv4", "IPv6"] {
        let line =
            format!("legacy iptables ({family}): tables filter, nat, mangle: hold chains of kube-proxy");
        ensure!(said.contains(&line), "no {line:?} in: {said}");
    }
    let left = shown(&node.netns)?;
    ensure!(!left.contains("table ip kube-proxy") && !left.contains("chain KUBE-SERVICES"), "{left}");
    ensure!(left.contains(":KUBE-SERVICES -"), "{left}");
    node.clean().map(drop)
}

#[test]
fn an_agent_that_has_taken_over_removes_the_rules_once_kube_proxy_has_gone() -> Result<()> {
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    let host = &cluster.place("node1").netns;
    rules_of_others(host)?;
    let before = shown(host)?;
    leave_kube_proxys(host)?;
    let with = shown(host)?;
    // kube-proxy's health server: that it runs is all that a pod without the host's process ids can see.
    let kube_proxy = host.listen("0.0.0.0:10256".parse()?)?;
    let agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let said = |word: &str| {
        let word = word.to_owned();
        status_until(&agent, &word, |status| status.to_string().contains(&word)).map(drop)
    };
    said("they stay while another process serves health at port 10256")?;
    let (_, doctor) = agent.ask(&["doctor"])?;
    ensure!(doctor.contains("nftables table ip kube-proxy"), "{doctor}");
    ensure!(shown(host)? == with, "something went although a kube-proxy runs");
    answers(cluster.place("a"), service(1)[0], "b")?;

    drop(kube_proxy);
    eventually(SOON, || {
        let now = shown(host)?;
        ensure!(now == before, "{now}");
        Ok(())
    })?;
    status_until(&agent, "no word of kube-proxy", |status| !status.to_string().contains("kube-proxy"))?;
    ensure!(agent.log_text().contains("removed what kube-proxy had left"), "{}", agent.log_text());
    answers(cluster.place("a"), service(1)[1], "b")
}

#[test]
fn an_agent_that_is_told_to_leave_the_rules_only_names_them() -> Result<()> {
    let (cluster, dir) = (one_node(&["a"])?, manifests()?);
    let host = &cluster.place("node1").netns;
    leave_kube_proxys(host)?;
    let with = shown(host)?;
    let flags = [&FLAGS[..], &["--remove-kube-proxy-rules=false"]].concat();
    let agent = Agent::start(&cluster, "node1", &dir, &flags)?;
    status_until(&agent, "the rules", |status| status.to_string().contains("they stay because of"))?;
    ensure!(shown(host)? == with, "something went");
    Ok(())
}
