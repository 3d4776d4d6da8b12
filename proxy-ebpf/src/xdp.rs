//! [`Frame`] over an `xdp_md`: direct reads and writes. Checksums are always complete here, and kept so.

use core::mem::size_of;

use aya_ebpf::bindings::xdp_md;
use proxy_common::wire::{Frame, MAX_OFFSET, Words, checksum};

/// A packet at the driver.
pub struct Xdp(pub *mut xdp_md);

impl Xdp {
    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: the context is the one the program was called with; volatile keeps the compiler from merging
        // the read with another.
        unsafe { (&raw const (*self.0).data).read_volatile() as usize }
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).data_end).read_volatile() as usize }
    }

    /// Bytes of it that can be read.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.data_end() - self.data()
    }

    /// The interface it has come to.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).ingress_ifindex).read_volatile() }
    }

    #[inline(always)]
    fn at<T>(&self, off: usize) -> Option<*mut T> {
        if off > MAX_OFFSET {
            return None;
        }
        let mut off = off;
        // SAFETY: changes nothing that is in bounds; see `Skb::at`.
        unsafe { core::arch::asm!("{0} &= 0x7ff", inout(reg) off, options(pure, nomem, nostack)) };
        let start = self.data();
        if start + off + size_of::<T>() > self.data_end() { None } else { Some((start + off) as *mut T) }
    }
}

impl Frame for Xdp {
    #[inline(always)]
    fn load<T: Words>(&self, off: usize) -> Option<T> {
        // SAFETY: `at` has checked the bounds; the processor reads words of any alignment.
        self.at::<T>(off).map(|p| unsafe { p.read() })
    }

    #[inline(always)]
    fn load_at<T: Words, const OFF: usize>(&self) -> Option<T> {
        let from = self.data() + OFF;
        // SAFETY: in bounds, and as above.
        if from + size_of::<T>() > self.data_end() { None } else { Some(unsafe { (from as *mut T).read() }) }
    }

    #[inline(always)]
    fn store<T: Words>(&mut self, off: usize, value: T) -> bool {
        match self.at::<T>(off) {
            Some(p) => {
                // SAFETY: as above.
                unsafe { p.write(value) };
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn update<T: Words>(&mut self, off: usize, f: impl FnOnce(&mut T)) -> bool {
        match self.at::<T>(off) {
            Some(p) => {
                // SAFETY: `at` has checked the bounds, and nobody else has the packet.
                f(unsafe { &mut *p });
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn update_checksum(&mut self, off: usize, pseudo: u32, body: u32, flags: u32) -> bool {
        let Some(field) = self.at::<u16>(off) else { return false };
        // SAFETY: `at` has checked the bounds.
        let old = unsafe { field.read() };
        let udp = flags & checksum::UDP != 0;
        if udp && old == 0 {
            return true;
        }
        let new = checksum::apply(old, checksum::add(pseudo, body));
        // SAFETY: as above.
        unsafe { field.write(if udp && new == 0 { 0xffff } else { new }) };
        true
    }
}
