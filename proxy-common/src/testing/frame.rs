//! A packet's bytes.

use std::vec::Vec;

use crate::wire::{Frame, MAX_OFFSET, Words, checksum};

/// A [`Frame`] over bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ByteFrame {
    /// The bytes from the first header on.
    pub bytes: Vec<u8>,
    /// Whether the transport checksum is still to be finished by hardware: it holds the folded sum of the
    /// pseudo header.
    pub partial: bool,
}

impl Frame for ByteFrame {
    fn update<T: Words>(&mut self, off: usize, f: impl FnOnce(&mut T)) -> bool {
        let Some(mut value) = self.load::<T>(off) else { return false };
        f(&mut value);
        self.store(off, value)
    }

    fn load<T: Words>(&self, off: usize) -> Option<T> {
        if off > MAX_OFFSET {
            return None;
        }
        let bytes = self.bytes.get(off..off + size_of::<T>())?;
        #[expect(unsafe_code, reason = "words of any alignment")]
        // SAFETY: `bytes` is as long as T, and every T is made of integers.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    fn store<T: Words>(&mut self, off: usize, value: T) -> bool {
        if off > MAX_OFFSET {
            return false;
        }
        let Some(bytes) = self.bytes.get_mut(off..off + size_of::<T>()) else {
            return false;
        };
        #[expect(unsafe_code, reason = "words of any alignment")]
        // SAFETY: `bytes` is as long as T.
        unsafe {
            bytes.as_mut_ptr().cast::<T>().write_unaligned(value);
        }
        true
    }

    fn update_checksum(&mut self, off: usize, pseudo: u32, body: u32, flags: u32) -> bool {
        let Some(field) = self.load::<u16>(off) else {
            return false;
        };
        if flags & checksum::UDP != 0 && field == 0 {
            return true;
        }
        if self.partial {
            let sum = checksum::fold(checksum::add(u32::from(field), pseudo));
            return self.store(off, sum);
        }
        let mut updated = checksum::apply(field, checksum::add(pseudo, body));
        if flags & checksum::UDP != 0 && updated == 0 {
            updated = 0xffff;
        }
        self.store(off, updated)
    }
}
