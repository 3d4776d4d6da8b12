//! The `bpf(2)` calls that aya does not offer: batches, links by interface index, atomic link updates.
//!
//! Every unsafe line of the agent is here. An error
//! is the kernel's own `io::Error`; callers name the act and the object.

mod elements;
mod facts;
pub(crate) mod instruction;
mod link;
mod map;
mod process;
mod program;

use std::ffi::{CString, c_char};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use aya::Pod;
use aya_obj::generated::{bpf_attr, bpf_cmd};

pub(crate) use elements::Elements;
pub(crate) use facts::*;
pub(crate) use link::*;
pub(crate) use map::*;
pub(crate) use process::*;
pub(crate) use program::*;

#[expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]
fn call(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: `attr` is valid for reads and writes of the size given; pointers inside it were made from
    // buffers that outlive this call, by the functions of this file.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, cmd as u32, &raw mut *attr, size_of::<bpf_attr>()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// The same for calls that return a new descriptor (the kernel sets close-on-exec on all of them).
#[expect(unsafe_code, reason = "takes ownership of a descriptor")]
fn call_fd(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = call(cmd, attr)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

#[expect(unsafe_code, reason = "a C union of integers starts as zero bytes")]
fn attr() -> bpf_attr {
    // SAFETY: every member is made of integers and pointers-as-integers: zero bytes are a value.
    unsafe { zeroed() }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn text(name: &[c_char]) -> String {
    let bytes: Vec<u8> = name.iter().map(|c| *c as u8).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The values that `bytes` begin with, one after the other.
#[expect(unsafe_code, reason = "Pod types are values whatever their bytes")]
pub(crate) fn values<T: Pod>(bytes: &[u8]) -> Vec<T> {
    let chunks = bytes.chunks_exact(size_of::<T>());
    // SAFETY: each chunk has the length of a value, `Pod` promises that any bytes are one, and it is copied from
    // wherever it lies.
    chunks.map(|chunk| unsafe { chunk.as_ptr().cast::<T>().read_unaligned() }).collect()
}

/// `n` zeroed values.
#[expect(unsafe_code, reason = "Pod types are values whatever their bytes")]
pub(crate) fn zeros<T: Pod>(n: usize) -> Vec<T> {
    // SAFETY: `Pod` promises that any bytes, so zeros, too, are a value.
    vec![unsafe { zeroed() }; n]
}

/// The bytes of a value.
#[expect(unsafe_code, reason = "Pod types have no padding that would be read uninitialised")]
pub(crate) fn bytes<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: a reference to so many bytes, all of them written, which live as long.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }
}
