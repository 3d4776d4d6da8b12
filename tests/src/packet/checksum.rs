//! The Internet checksum (RFC 1071) and SCTP's CRC-32c (RFC 9260, appendix A), from scratch and slowly.

use std::net::IpAddr;

/// A running ones' complement sum.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u32);

impl Sum {
    /// Adds bytes as big-endian words; an odd last byte is padded with zero.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        for word in bytes.chunks(2) {
            self.0 += u32::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]));
            self.0 = (self.0 & 0xffff) + (self.0 >> 16);
        }
        self
    }

    /// Adds the pseudo-header of RFC 9293 §3.1 and RFC 8200 §8.1.
    #[must_use]
    pub fn pseudo(self, source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Self {
        let length = u32::try_from(length).expect("a packet's length").to_be_bytes();
        self.address(source).address(destination).bytes(&[0, protocol]).bytes(&length)
    }

    /// The sum itself: what stands in the checksum field of a packet whose checksum the device is to complete.
    #[must_use]
    pub fn partial(self) -> u16 {
        let folded = (self.0 & 0xffff) + (self.0 >> 16);
        u16::try_from(folded & 0xffff).expect("sixteen bits")
    }

    /// The checksum: the sum's complement.
    #[must_use]
    pub fn checksum(self) -> u16 {
        !self.partial()
    }

    fn address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.bytes(&address.octets()),
            IpAddr::V6(address) => self.bytes(&address.octets()),
        }
    }
}

/// CRC-32c, bit by bit.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_that_of_rfc_1071() {
        // RFC 1071 §3: the example's sum is ddf2.
        let sum = Sum::default().bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.partial(), 0xddf2);
        assert_eq!(sum.checksum(), 0x220d);
    }

    #[test]
    fn the_crc_has_its_published_check_value() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
