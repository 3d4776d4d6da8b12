//! The rivals: rules of the shape that kube-proxy makes of Services, for nftables and for iptables.
//!
//! They are made and loaded whole, and changed as kube-proxy would change them when one endpoint has become another. What
//! kube-proxy itself does before that (watching, comparing, listing what is there) is no part of it.

mod feed;
mod iptables;
mod nftables;

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::manifests::{Family, Phase, ServicePlan, SlicePlan};
use proxy_tests::pod::Place;
use proxy_tests::reference;

pub(crate) use self::feed::Fed;
use self::feed::feed;

/// The port of every Service, and that of its endpoints.
pub(crate) const PORT: u16 = 80;
pub(crate) const TARGET: u16 = 8080;

/// Who reads the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Nftables,
    Iptables,
}

/// A Service with one port.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    /// Its place among the others, which its name and those of its chains are made of.
    pub(crate) number: u32,
    /// `tcp` or `udp`.
    pub(crate) proto: &'static str,
    pub(crate) address: Ipv4Addr,
    pub(crate) node_port: Option<u16>,
    pub(crate) endpoints: Vec<Ipv4Addr>,
}

/// What rules are made for.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The address at which the node has its NodePorts.
    pub(crate) node: Ipv4Addr,
    /// The range of the pods: who is outside is masqueraded.
    pub(crate) pods: &'static str,
    pub(crate) services: Vec<Service>,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }

    /// Fails where the program that loads them is missing.
    pub(crate) fn needs(self) -> Result<()> {
        match self {
            Self::Nftables => reference::needs_nft(),
            Self::Iptables => iptables::program().map(drop),
        }
    }

    /// The command that reads rules from its standard input and changes nothing that they do not name.
    fn command(self) -> Result<[&'static str; 2]> {
        Ok(match self {
            Self::Nftables => ["nft", "-f-"],
            Self::Iptables => [iptables::program()?, "--noflush"],
        })
    }

    /// Loads rules into a node that has none.
    pub(crate) fn load(self, node: &Place, plan: &Plan, limit: Duration) -> Result<Fed> {
        let transactions = match self {
            Self::Nftables => nftables::all(plan),
            Self::Iptables => vec![iptables::all(plan)],
        };
        let mut all = Duration::ZERO;
        for rules in transactions {
            match feed(node, &self.command()?, &rules, limit.saturating_sub(all))
                .context("loading all rules")?
            {
                Fed::Took(took) => all += took,
                Fed::GivenUp => return Ok(Fed::GivenUp),
            }
        }
        Ok(Fed::Took(all))
    }

    /// Makes the rules of one Service those that stand in the plan; `before` is what it was.
    pub(crate) fn change(self, node: &Place, plan: &Plan, before: &Service, limit: Duration) -> Result<Fed> {
        let after = plan.services.iter().find(|service| service.number == before.number);
        let after = after.context("the plan has no such Service")?;
        let rules = match self {
            Self::Nftables => nftables::change(plan, before, after),
            Self::Iptables => iptables::change(plan, before, after),
        };
        feed(node, &self.command()?, &rules, limit)
            .with_context(|| format!("changing the rules of {}", before.name()))
    }

    /// Takes all rules away.
    pub(crate) fn clear(self, node: &Place, limit: Duration) -> Result<()> {
        let [program, _] = self.command()?;
        let (command, rules): (&[&str], _) = match self {
            Self::Nftables => (&[program, "-f-"], nftables::NOTHING),
            Self::Iptables => (&[program], iptables::NOTHING),
        };
        let cleared = feed(node, command, rules, limit).context("taking all rules away")?;
        ensure!(cleared != Fed::GivenUp, "taking all rules of {} away took over {limit:?}", self.name());
        Ok(())
    }
}

impl Service {
    pub(crate) fn name(&self) -> String {
        format!("service-{}", self.number)
    }

    /// As an object of Kubernetes.
    pub(crate) fn object(&self) -> k8s_openapi::api::core::v1::Service {
        let proto = self.proto.to_uppercase();
        let plan = ServicePlan::new(&self.name(), &[self.address.into()]).port("http", &proto, PORT, TARGET);
        match self.node_port {
            Some(port) => plan.node_port(port).build(),
            None => plan.build(),
        }
    }

    /// Its slice.
    pub(crate) fn slice(&self) -> k8s_openapi::api::discovery::v1::EndpointSlice {
        let plan = SlicePlan::new(&self.name(), "v4", Family::V4);
        let plan = plan.port("http", &self.proto.to_uppercase(), TARGET);
        let add = |plan: SlicePlan, endpoint: &Ipv4Addr| {
            plan.endpoint(&format!("pod-{endpoint}"), (*endpoint).into(), Some("node2"), Phase::Ready)
        };
        self.endpoints.iter().fold(plan, add).build()
    }
}

/// Endpoints that the first has and the second has not.
fn without<'a>(one: &'a Service, other: &'a Service) -> impl Iterator<Item = &'a Ipv4Addr> {
    one.endpoints.iter().filter(|endpoint| !other.endpoints.contains(endpoint))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let service = |number: u32, node_port| Service {
            number,
            proto: "tcp",
            address: Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 100, 0, 1)) + number),
            node_port,
            endpoints: vec![Ipv4Addr::new(10, 244, 1, 1), Ipv4Addr::new(10, 244, 1, 2)],
        };
        Plan {
            node: Ipv4Addr::new(192, 168, 10, 11),
            pods: "10.244.0.0/16",
            services: vec![service(0, Some(30_080)), service(1, None)],
        }
    }

    /// The lines in which a word stands.
    fn lines<'a>(text: &'a str, word: &str) -> Vec<&'a str> {
        text.lines().map(str::trim).filter(|line| line.contains(word)).collect()
    }

    #[test]
    fn every_chain_that_rules_of_iptables_lead_to_is_declared() {
        let text = iptables::all(&plan());
        let declared: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next()).collect();
        for line in text.lines().filter(|line| line.starts_with("-A ")) {
            let target = line.split(" -j ").nth(1).unwrap().split(' ').next().unwrap();
            let known = declared.contains(&target)
                || ["ACCEPT", "DROP", "DNAT", "MARK", "MASQUERADE", "RETURN"].contains(&target);
            assert!(known, "{line}");
        }
        // The first of two is chosen for half of the connections, the last for what is left.
        assert_eq!(lines(&text, "--probability 0.5").len(), 2);
        assert_eq!(lines(&text, "-j DNAT").len(), 4);
    }

    #[test]
    fn a_change_writes_one_service_and_takes_the_old_endpoint_away() {
        let before = plan();
        let mut after = before.clone();
        after.services[1].endpoints[1] = Ipv4Addr::new(10, 244, 1, 3);
        let text = iptables::change(&after, &before.services[1], &after.services[1]);
        assert_eq!(lines(&text, "-j DNAT").len(), 2);
        assert_eq!(lines(&text, "-X ").len(), 1);
        // The chain that all Services are in is written whole.
        assert_eq!(lines(&text, "-A KUBE-SERVICES").len(), 3);
        let text = nftables::change(&after, &before.services[1], &after.services[1]);
        assert_eq!(lines(&text, "dnat to 10.244.1.3").len(), 1);
        assert_eq!(lines(&text, "delete chain").len(), 1);
        assert!(!text.contains("service-ips"), "the map of Services is not touched");
    }
}
