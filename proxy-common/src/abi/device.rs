//! Interfaces with a program at their driver.

use super::table_type;

/// A flag of a [`Device`]: drivers of other interfaces may hand it packets to be sent.
pub const SENDS: u16 = 1 << 0;

table_type! {
    /// An interface that has a program at its driver (XDP).
    pub struct Device {
        /// Its Ethernet address: frames to any other are not the node's.
        pub mac: [u8; 6],
        /// Bits of this module.
        pub flags: u16,
    }
}

impl Device {
    /// Its address as the first words of a frame for it, the second with zeros behind.
    #[inline(always)]
    #[must_use]
    pub const fn mac_words(&self) -> [u32; 2] {
        let [a, b, c, d, e, f] = self.mac;
        [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, 0, 0])]
    }
}
