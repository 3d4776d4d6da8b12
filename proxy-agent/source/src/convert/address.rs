//! Addresses as API objects spell them: read leniently, kept in one form (X-1… ). The standard library does not accept
//! leading zeros, which Kubernetes does.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Why a text is not an address or a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    /// Not an address at all.
    #[error("is not an IP address")]
    Address,
    ///
    #[error("carries a zone index, which means nothing to other machines")]
    ZoneIndex,
    /// No `/` in it.
    #[error("is not a range: the prefix length is missing")]
    NoPrefix,
    /// The prefix length is not a number or beyond the address's bits.
    #[error("has no valid prefix length")]
    Prefix,
}

/// An address: leading zeros are decimal, an IPv4-mapped address is IPv4.
pub(crate) fn ip(text: &str) -> Result<IpAddr, Fault> {
    Ok(match raw(text)? {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4),
        v4 @ IpAddr::V4(_) => v4,
    })
}

/// A range with its host bits masked off; a mapped one with at least 96 bits is IPv4.
pub(crate) fn range(text: &str) -> Result<IpNet, Fault> {
    let (address, prefix) = text.split_once('/').ok_or(Fault::NoPrefix)?;
    let prefix: u8 = number(prefix).ok_or(Fault::Prefix)?;
    let net = match raw(address)? {
        IpAddr::V4(v4) => Ipv4Net::new(v4, prefix).map(IpNet::V4),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) if prefix >= 96 => Ipv4Net::new(v4, prefix - 96).map(IpNet::V4),
            _ => Ipv6Net::new(v6, prefix).map(IpNet::V6),
        },
    };
    net.map(|net| net.trunc()).map_err(|_| Fault::Prefix)
}

fn raw(text: &str) -> Result<IpAddr, Fault> {
    if text.contains('%') {
        return Err(Fault::ZoneIndex);
    }
    let Some((head, tail)) = text.rsplit_once(':') else {
        return v4(text).map(IpAddr::V4).ok_or(Fault::Address);
    };
    let v6: Option<Ipv6Addr> = if tail.contains('.') {
        v4(tail).and_then(|v4| format!("{head}:{v4}").parse().ok())
    } else {
        text.parse().ok()
    };
    v6.map(IpAddr::V6).ok_or(Fault::Address)
}

fn v4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = number(parts.next()?)?;
    }
    parts.next().is_none().then(|| octets.into())
}

/// A decimal number without sign, leading zeros allowed.
fn number(text: &str) -> Option<u8> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    match text.trim_start_matches('0') {
        "" => Some(0),
        digits => digits.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_leniently_and_kept_in_one_form() {
        for (text, expected) in [
            ("172.30.0.041", Ok("172.30.0.41")),
            ("10.180.00.001", Ok("10.180.0.1")),
            ("192.168.099.022", Ok("192.168.99.22")),
            ("0000010.0.0.1", Ok("10.0.0.1")),
            ("FD00:0::1", Ok("fd00::1")),
            ("::ffff:10.0.0.1", Ok("10.0.0.1")),
            ("::ffff:010.0.0.01", Ok("10.0.0.1")),
            ("::ffff:0a00:1", Ok("10.0.0.1")),
            ("64:ff9b::10.0.0.1", Ok("64:ff9b::a00:1")),
            ("fe80::1%eth0", Err(Fault::ZoneIndex)),
            (" 1.2.3.4", Err(Fault::Address)),
            ("1.2.3.4 ", Err(Fault::Address)),
            ("1.2.3", Err(Fault::Address)),
            ("1.2.3.4.5", Err(Fault::Address)),
            ("1.2.3.256", Err(Fault::Address)),
            ("1.2.3.+4", Err(Fault::Address)),
            ("1..3.4", Err(Fault::Address)),
            ("", Err(Fault::Address)),
            (":::", Err(Fault::Address)),
            ("[::1]", Err(Fault::Address)),
            ("web.example", Err(Fault::Address)),
        ] {
            assert_eq!(ip(text), expected.map(|ip: &str| ip.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn ranges_are_read_leniently_and_masked() {
        for (text, expected) in [
            ("203.0.113.000/025", Ok("203.0.113.0/25")),
            ("10.1.2.3/8", Ok("10.0.0.0/8")),
            ("2001:db8::1/32", Ok("2001:db8::/32")),
            ("::ffff:10.0.0.0/104", Ok("10.0.0.0/8")),
            ("::ffff:0:0/96", Ok("0.0.0.0/0")),
            ("::/0", Ok("::/0")),
            ("1.2.3.4", Err(Fault::NoPrefix)),
            ("1.2.3.4/33", Err(Fault::Prefix)),
            ("::/129", Err(Fault::Prefix)),
            ("1.2.3.4/-1", Err(Fault::Prefix)),
            ("1.2.3.4/", Err(Fault::Prefix)),
            ("garbage/8", Err(Fault::Address)),
            ("garbage", Err(Fault::NoPrefix)),
        ] {
            assert_eq!(range(text), expected.map(|net: &str| net.parse().unwrap()), "{text}");
        }
    }
}
