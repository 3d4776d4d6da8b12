//! Calls about processes and sockets that no crate in use has.

use std::ffi::c_void;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A descriptor of another process, duplicated into this one.
#[expect(unsafe_code, reason = "the C library has no wrapper")]
pub(crate) fn descriptor_of(process: i32, descriptor: RawFd) -> io::Result<OwnedFd> {
    let new = |ret: libc::c_long| {
        if ret < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(ret as RawFd) })
    };
    // SAFETY: takes numbers.
    let process = new(unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) })?;
    // SAFETY: takes numbers, the first of a descriptor that is open.
    new(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), descriptor, 0) })
}

/// Waits for a grace period of the kernel: whatever runs between two of them now, as all that receives packets does, has
/// ended when this returns (membarrier(2), `MEMBARRIER_CMD_GLOBAL`).
pub(crate) fn wait_for_grace() -> io::Result<()> {
    const GLOBAL: libc::c_int = 1;
    #[expect(unsafe_code, reason = "the C library has no function for this call")]
    // SAFETY: takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has all threads take memory from the same place from now on: what one has freed another can use. glibc has a place for each.
pub(crate) fn share_memory() {
    #[cfg(target_env = "gnu")]
    {
        #[expect(unsafe_code, reason = "no crate in use has this call")]
        // SAFETY: takes numbers. Where it is refused all is as it was.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1)
        };
    }
}

/// Gives memory back to the kernel that has been freed. glibc keeps what lies below something in use; other C libraries do not.
pub(crate) fn trim() {
    #[cfg(target_env = "gnu")]
    {
        #[expect(unsafe_code, reason = "no crate in use has this call")]
        // SAFETY: takes a number, and touches nothing that is in use.
        unsafe {
            libc::malloc_trim(0)
        };
    }
}

/// Whether this thread goes before all threads that have no such right; what it begins does not.
pub(crate) fn go_first(first: bool) -> io::Result<()> {
    let (policy, priority) = match first {
        true => (libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, 1),
        false => (libc::SCHED_OTHER, 0),
    };
    let parameters = libc::sched_param { sched_priority: priority };
    #[expect(unsafe_code, reason = "no crate in use has this call")]
    // SAFETY: the kernel reads one structure, which lives through the call; 0 is this thread.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `getsockopt` of a plain integer option.
pub(crate) fn socket_u64(fd: BorrowedFd<'_>, level: i32, option: i32) -> io::Result<u64> {
    let mut value = [0; size_of::<u64>()];
    socket_bytes(fd, level, option, &mut value)?;
    Ok(u64::from_ne_bytes(value))
}

/// `getsockopt` of any option: what `value` holds is asked with, and replaced by the answer.
#[expect(unsafe_code, reason = "the wrappers know only some options")]
pub(crate) fn socket_bytes(fd: BorrowedFd<'_>, level: i32, option: i32, value: &mut [u8]) -> io::Result<()> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: `value` is valid for reads and writes of `len` bytes, and `len` for writes.
    let ret = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, option, value.as_mut_ptr().cast::<c_void>(), &raw mut len)
    };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
