//! Bytes to meaning, and back: headers, checksums, and the few reads and writes that a hook lends.

pub mod checksum;
pub mod crc32c;
mod parse;
mod peek;
pub mod reject;
mod rewrite;
pub mod wrap;

pub use parse::{Kind, Packet, parse};
pub use peek::{peek, peek_v6};
pub use rewrite::{Edit, End, lower_hops, rewrite, rewrite_error};

/// What can be read and written in one go: words, so that a load is a load and not a loop over bytes.
pub trait Words: Copy {}
impl Words for u8 {}
impl Words for u16 {}
impl Words for u32 {}
impl<const N: usize> Words for [u32; N] {}

/// No header that matters lies further out: Ethernet, IPv6 with extensions, ICMPv6, the same embedded. The
/// verifier wants a bound, and a frame has the same one everywhere.
pub const MAX_OFFSET: usize = 1024;

/// The bytes of a packet, as a hook lends them. Offsets count from the first byte of the frame.
pub trait Frame {
    /// The value at `off` in memory order, or `None` past the end of what can be read directly or
    /// past [`MAX_OFFSET`].
    fn load<T: Words>(&self, off: usize) -> Option<T>;

    /// [`Frame::load`] at an offset that is known beforehand.
    fn load_at<T: Words, const OFF: usize>(&self) -> Option<T> {
        self.load(OFF)
    }

    /// Writes `value` at `off`; false past the same bounds.
    #[must_use]
    fn store<T: Words>(&mut self, off: usize, value: T) -> bool;

    /// Lets `f` change the value at `off` in place; false past the same bounds.
    #[must_use]
    fn update<T: Words>(&mut self, off: usize, f: impl FnOnce(&mut T)) -> bool;

    /// Updates the transport checksum at `off` after changes whose one's complement differences are `pseudo`
    /// (in the pseudo header) and `body` (in the segment itself). The frame knows whether the checksum is
    /// complete or still to be finished by the hardware, in which case it holds the pseudo header only.
    /// `flags` are [`checksum::UDP`] and [`checksum::IPV6`]. False when it cannot be done.
    #[must_use]
    fn update_checksum(&mut self, off: usize, pseudo: u32, body: u32, flags: u32) -> bool;

    /// [`crc32c::difference`]; the kernel overrides it by a separately verified function.
    fn crc_difference(&self, diff: u32, following: u32) -> u32 {
        crc32c::difference(diff, following)
    }
}
