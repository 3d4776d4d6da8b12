//! Arrays that are mapped into memory.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::facts::MapFacts;

/// The elements of an array that was made to be mapped (`BPF_F_MMAPABLE`), as words of 64 bits that programs may change at
/// any moment.
#[derive(Debug)]
pub(crate) struct Elements {
    words: std::ptr::NonNull<u64>,
    count: usize,
}

// SAFETY: the words are only ever read and written as a whole, and stay mapped as long as this lives.
#[expect(unsafe_code, reason = "a pointer to memory that is shared with the kernel")]
unsafe impl Send for Elements {}

impl Elements {
    /// Maps the elements of `map`, whose values take so many bytes each.
    #[expect(unsafe_code, reason = "mmap(2)")]
    pub(crate) fn map(map: BorrowedFd<'_>, facts: &MapFacts) -> io::Result<Self> {
        let count = (facts.value_size as usize).div_ceil(8) * facts.max_entries as usize;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * 8,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words = std::ptr::NonNull::new(at.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { words, count })
    }

    /// The word at a place; zero past the end.
    #[expect(unsafe_code, reason = "memory that is shared with the kernel")]
    pub(crate) fn get(&self, at: usize) -> u64 {
        if at >= self.count {
            return 0;
        }
        // SAFETY: within the mapping, and aligned, since it begins at a page.
        unsafe { self.words.add(at).read_volatile() }
    }

    /// Writes the word at a place; nothing past the end.
    #[expect(unsafe_code, reason = "memory that is shared with the kernel")]
    pub(crate) fn set(&self, at: usize, word: u64) {
        if at < self.count {
            // SAFETY: as above.
            unsafe { self.words.add(at).write_volatile(word) };
        }
    }
}

impl Elements {
    /// Writes a single byte; nothing past the end.
    #[expect(unsafe_code, reason = "memory that is shared with the kernel")]
    pub(crate) fn set_byte(&self, at: usize, byte: u8) {
        if at < self.count * 8 {
            // SAFETY: within the mapping.
            unsafe { self.words.cast::<u8>().add(at).write_volatile(byte) };
        }
    }
}

impl Drop for Elements {
    #[expect(unsafe_code, reason = "munmap(2)")]
    fn drop(&mut self) {
        // SAFETY: what `map` has mapped, and nobody else has a pointer to it.
        unsafe { libc::munmap(self.words.as_ptr().cast(), self.count * 8) };
    }
}
