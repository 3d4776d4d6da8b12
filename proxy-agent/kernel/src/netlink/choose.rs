//! Which interfaces carry programs.

use globset::{Glob, GlobSet, GlobSetBuilder};

use agent_core::model::Link;

/// A pattern of `--devices` that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("--devices: {pattern:?} is no pattern for interface names (examples: eth0, eth*, cali*)")]
pub struct DevicesError {
    pattern: String,
    source: globset::Error,
}

impl DevicesError {
    #[must_use]
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// What is wrong with it.
    #[must_use]
    pub fn reason(&self) -> String {
        format!("is no pattern for interface names such as eth0, eth*, cali*: {}", self.source.kind())
    }
}

/// The interfaces that carry programs: all whose kind does (`kinds.rs`), or those of them that `--devices` names.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    only: Option<GlobSet>,
}

impl Devices {
    /// From the patterns of `--devices`; none means every interface.
    pub fn new<S: AsRef<str>>(patterns: &[S]) -> Result<Self, DevicesError> {
        let failed = |pattern: &str, source| DevicesError { pattern: pattern.to_owned(), source };
        let mut set = GlobSetBuilder::new();
        for pattern in patterns {
            let pattern = pattern.as_ref();
            set.add(Glob::new(pattern).map_err(|source| failed(pattern, source))?);
        }
        let only = match patterns {
            [] => None,
            _ => Some(set.build().map_err(|source| failed("", source))?),
        };
        Ok(Self { only })
    }

    /// Whether `link` carries programs.
    #[must_use]
    pub fn carries(&self, link: &Link) -> bool {
        link.carries_programs() && self.only.as_ref().is_none_or(|only| only.is_match(&*link.name))
    }

    /// Those of `links` that carry programs.
    #[must_use]
    pub fn choose(&self, links: &[Link]) -> Vec<Link> {
        links.iter().filter(|link| self.carries(link)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_core::model::Device;

    fn link(name: &str) -> Link {
        Link {
            index: 1,
            name: name.into(),
            loopback: name == "lo",
            device: if name == "ifb0" { Device::Detour } else { Device::Wire },
            ..Link::default()
        }
    }

    fn chosen(patterns: &[&str]) -> Vec<String> {
        let links = ["lo", "eth0", "eth1", "cali123", "wg0", "ifb0"].map(link);
        let chosen = Devices::new(patterns).unwrap().choose(&links);
        chosen.into_iter().map(|link| link.name.to_string()).collect()
    }

    #[test]
    fn every_interface_carries_programs_but_loopback_and_detours() {
        assert_eq!(chosen(&[]), ["eth0", "eth1", "cali123", "wg0"]);
    }

    #[test]
    fn devices_restricts_them_by_pattern_and_never_adds_loopback_or_detours() {
        assert_eq!(chosen(&["eth*", "wg0"]), ["eth0", "eth1", "wg0"]);
        assert_eq!(chosen(&["lo", "ifb*"]), Vec::<String>::new());
        assert_eq!(chosen(&["{eth,cali}*"]), ["eth0", "eth1", "cali123"]);
    }

    #[test]
    fn a_broken_pattern_is_named() {
        let said = Devices::new(&["eth["]).unwrap_err().to_string();
        assert!(said.contains("eth["), "{said}");
    }
}
