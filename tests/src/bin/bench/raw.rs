//! The two calls of bpf(2) that the benchmarks make themselves: loading a program of two instructions to compare with,
//! and running a program many times.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_prog_type};

/// `r0 = -1; exit`: a TC program that does nothing (TCX_NEXT), as the bytes the kernel takes.
const EMPTY: [u64; 2] = [0xffff_ffff_0000_00b7, 0x0000_0000_0000_0095];

/// Loads the empty program.
#[expect(unsafe_code, reason = "a union of the kernel's interface, and a descriptor out of it")]
pub(crate) fn load_empty() -> io::Result<OwnedFd> {
    // SAFETY: the attributes are integers and pointers; zeros are values of all of them.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    attr.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32;
    attr.__bindgen_anon_3.insns = EMPTY.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = 2;
    attr.__bindgen_anon_3.license = c"GPL".as_ptr() as u64;
    let fd = call(bpf_cmd::BPF_PROG_LOAD, &mut attr)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just handed this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What many runs of a program came to.
pub(crate) struct Run {
    /// Mean time of one run in nanoseconds, by the kernel's clock.
    pub(crate) nanoseconds: f64,
    /// What the last run returned.
    pub(crate) returned: u32,
    /// The packet as the last run left it.
    pub(crate) packet: Vec<u8>,
}

/// Runs a program `repeat` times on one packet; each run finds the packet as the one before left it.
#[expect(unsafe_code, reason = "unions of the kernel's interface")]
pub(crate) fn test_run(program: BorrowedFd<'_>, packet: &[u8], repeat: u32) -> io::Result<Run> {
    let mut out = vec![0; packet.len()];
    // SAFETY: as above.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    attr.test.prog_fd = program.as_raw_fd().cast_unsigned();
    attr.test.data_in = packet.as_ptr() as u64;
    attr.test.data_size_in = u32::try_from(packet.len()).map_err(io::Error::other)?;
    attr.test.data_out = out.as_mut_ptr() as u64;
    attr.test.data_size_out = attr_len(&out)?;
    attr.test.repeat = repeat;
    call(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr)?;
    // SAFETY: the call has filled this member.
    let test = unsafe { attr.test };
    Ok(Run { nanoseconds: f64::from(test.duration), returned: test.retval, packet: out })
}

fn attr_len(bytes: &[u8]) -> io::Result<u32> {
    u32::try_from(bytes.len()).map_err(io::Error::other)
}

#[expect(unsafe_code, reason = "bpf(2) has no wrapper in libc")]
fn call(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: `attr` is valid for reads and writes of its size, and what it points to outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command as u32, &raw mut *attr, size_of::<bpf_attr>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}
