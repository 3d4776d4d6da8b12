//! Endpoints that run on a node, with the number of slices that have them: the addresses of a large cluster's are its
//! largest set.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Addresses by family, since one of IPv4 is a quarter as large.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pods {
    v4: HashSet<Ipv4Addr>,
    v6: HashSet<Ipv6Addr>,
    /// How many slices more than one have an address.
    again: HashMap<IpAddr, u32>,
}

impl Pods {
    /// One more slice has this address; true if it is the first.
    pub(super) fn insert(&mut self, ip: IpAddr) -> bool {
        let new = match ip {
            IpAddr::V4(ip) => self.v4.insert(ip),
            IpAddr::V6(ip) => self.v6.insert(ip),
        };
        if !new {
            *self.again.entry(ip).or_default() += 1;
        }
        new
    }

    /// One slice fewer has this address; true if it was the last.
    pub(super) fn remove(&mut self, ip: IpAddr) -> bool {
        if let Some(count) = self.again.get_mut(&ip) {
            *count -= 1;
            if *count == 0 {
                self.again.remove(&ip);
            }
            return false;
        }
        match ip {
            IpAddr::V4(ip) => self.v4.remove(&ip),
            IpAddr::V6(ip) => self.v6.remove(&ip),
        }
    }

    pub(super) fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.v4.contains(&ip),
            IpAddr::V6(ip) => self.v6.contains(&ip),
        }
    }

    /// Each address once.
    pub(super) fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.v4.iter().copied().map(IpAddr::V4).chain(self.v6.iter().copied().map(IpAddr::V6))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_there_as_long_as_a_slice_has_it() {
        let ips: [IpAddr; 2] = ["10.244.0.1", "fd00::1"].map(|text| text.parse().unwrap());
        let mut pods = Pods::default();
        for ip in ips {
            assert!(!pods.contains(ip));
            assert_eq!([pods.insert(ip), pods.insert(ip), pods.insert(ip)], [true, false, false]);
            assert_eq!(pods.iter().filter(|known| *known == ip).count(), 1);
            assert_eq!([pods.remove(ip), pods.remove(ip)], [false, false]);
            assert!(pods.contains(ip));
            assert_eq!([pods.remove(ip), pods.remove(ip)], [true, false]);
            assert!(!pods.contains(ip));
        }
        assert_eq!(pods, Pods::default());
    }
}
