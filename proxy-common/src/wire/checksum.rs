//! The Internet checksum (RFC 1071): a 16-bit one's complement sum, which does not care about byte order,
//! and therefore can be kept right after a change from the difference alone (RFC 1624).
//!
//! A *difference* here is `new + ~old` summed word by word into 32 bits without losing carries; several add
//! up with [`add`]. [`apply`] turns the old checksum and a difference into the new checksum.

use crate::addr::{Addr, Port};

/// A flag of an update: UDP over IPv4, where zero means "no checksum" and stays; a checksum that becomes zero
/// is sent as 0xffff (RFC 768).
pub const UDP: u32 = 1;
/// A flag of an update: IPv6, where no IP header checksum balances the change of an address.
pub const IPV6: u32 = 2;

/// One's complement sum of two 32-bit partial sums.
#[inline(always)]
pub const fn add(a: u32, b: u32) -> u32 {
    // Without a branch: the carry comes out of the upper half.
    let sum = a as u64 + b as u64;
    (sum as u32).wrapping_add((sum >> 32) as u32)
}

/// A 32-bit partial sum folded to 16 bits.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The difference that replacing a word makes.
#[inline(always)]
pub const fn diff(old: u32, new: u32) -> u32 {
    add(!old, new)
}

/// The difference that replacing an IPv6 address makes.
#[inline(always)]
pub const fn addr_diff(old: &Addr, new: &Addr) -> u32 {
    let (o, n) = (&old.0, &new.0);
    add(add(diff(o[0], n[0]), diff(o[1], n[1])), add(diff(o[2], n[2]), diff(o[3], n[3])))
}

/// The difference that replacing a port makes.
#[inline(always)]
pub const fn port_diff(old: Port, new: Port) -> u32 {
    (!old.0) as u32 + new.0 as u32
}

/// The checksum field after a change (RFC 1624, equation 3).
#[inline(always)]
pub const fn apply(field: u16, diff: u32) -> u16 {
    !fold(add((!field) as u32, diff))
}

/// The sum of 32-bit words in memory order, to be folded and complemented.
#[inline(always)]
pub fn sum<const N: usize>(words: &[u32; N]) -> u32 {
    let mut total = 0;
    let mut n = 0;
    while n < N {
        total = add(total, words[n]);
        n += 1;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071 §3, from scratch.
    fn checksum(bytes: &[u8]) -> u16 {
        let mut sum = 0_u64;
        for pair in bytes.chunks(2) {
            sum += u64::from(u16::from_ne_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    proptest::proptest! {
        #[test]
        fn an_updated_checksum_equals_one_from_scratch(
            old in proptest::array::uniform4(0_u32..), new in proptest::array::uniform4(0_u32..), rest in 1_u32..
        ) {
            let bytes = |addr: [u32; 4]| -> Vec<u8> {
                addr.iter().chain([&rest]).flat_map(|w| w.to_ne_bytes()).collect()
            };
            let updated = apply(checksum(&bytes(old)), addr_diff(&Addr(old), &Addr(new)));
            proptest::prop_assert_eq!(updated, checksum(&bytes(new)));
        }

        #[test]
        fn a_checksum_follows_a_port_change(old: u16, new: u16, rest in 1_u32..) {
            let bytes = |port: u16| -> Vec<u8> {
                port.to_ne_bytes().into_iter().chain([0, 17]).chain(rest.to_ne_bytes()).collect()
            };
            let updated = apply(checksum(&bytes(old)), port_diff(Port(old), Port(new)));
            proptest::prop_assert_eq!(updated, checksum(&bytes(new)));
        }
    }
}
