//! The calls of bpf(2) that the benchmarks make themselves: small programs to compare with or to feed others,
//! what they look up, and running a program many times.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_map_type, bpf_prog_type};

use crate::asm::Code;

/// Room for what the verifier says.
const LOG: u32 = 1 << 16;

/// A TC program that does nothing (TCX_NEXT).
pub(crate) fn load_empty() -> io::Result<OwnedFd> {
    load(&Code::new().returns(-1))
}

/// Loads a TC program.
pub(crate) fn load(code: &[u64]) -> io::Result<OwnedFd> {
    load_as(code, bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS, 0)
}

/// A program at a hook of sockets that does nothing and allows everything.
pub(crate) fn load_empty_at(hook: bpf_attach_type) -> io::Result<OwnedFd> {
    load_as(&Code::new().returns(1), bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR, hook as u32)
}

fn load_as(code: &[u64], kind: bpf_prog_type, attach_type: u32) -> io::Result<OwnedFd> {
    let mut attr = nothing();
    attr.__bindgen_anon_3.prog_type = kind as u32;
    attr.__bindgen_anon_3.expected_attach_type = attach_type;
    attr.__bindgen_anon_3.insns = code.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = length(code)?;
    attr.__bindgen_anon_3.license = c"GPL".as_ptr() as u64;
    let refused = match open(bpf_cmd::BPF_PROG_LOAD, &mut attr) {
        Ok(program) => return Ok(program),
        Err(error) => error,
    };
    // Once more, to hear why.
    let mut log = vec![0_u8; LOG as usize];
    attr.__bindgen_anon_3.log_level = 1;
    attr.__bindgen_anon_3.log_size = LOG;
    attr.__bindgen_anon_3.log_buf = log.as_mut_ptr() as u64;
    open(bpf_cmd::BPF_PROG_LOAD, &mut attr).map_err(|_| {
        let text = String::from_utf8_lossy(&log);
        io::Error::new(refused.kind(), format!("{refused}: {}", text.trim_end_matches('\0').trim()))
    })
}

/// Makes a map.
pub(crate) fn create_map(kind: bpf_map_type, key: u32, value: u32, entries: u32) -> io::Result<OwnedFd> {
    let mut attr = nothing();
    attr.__bindgen_anon_1.map_type = kind as u32;
    attr.__bindgen_anon_1.key_size = key;
    attr.__bindgen_anon_1.value_size = value;
    attr.__bindgen_anon_1.max_entries = entries;
    open(bpf_cmd::BPF_MAP_CREATE, &mut attr)
}

/// Writes an element; key and value are as long as the map's.
pub(crate) fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attr = nothing();
    attr.__bindgen_anon_2.map_fd = map.as_raw_fd().cast_unsigned();
    attr.__bindgen_anon_2.key = key.as_ptr() as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_ptr() as u64;
    call(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Puts a program on a hook of a cgroup, for as long as the descriptor is open.
pub(crate) fn attach(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    hook: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attr = nothing();
    attr.link_create.__bindgen_anon_1.prog_fd = program.as_raw_fd().cast_unsigned();
    attr.link_create.__bindgen_anon_2.target_fd = cgroup.as_raw_fd().cast_unsigned();
    attr.link_create.attach_type = hook as u32;
    open(bpf_cmd::BPF_LINK_CREATE, &mut attr)
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
#[expect(unsafe_code, reason = "a union of the kernel's interface")]
pub(crate) fn test_run(program: BorrowedFd<'_>, packet: &[u8], repeat: u32) -> io::Result<Run> {
    let mut out = vec![0; packet.len()];
    let mut attr = nothing();
    attr.test.prog_fd = program.as_raw_fd().cast_unsigned();
    attr.test.data_in = packet.as_ptr() as u64;
    attr.test.data_size_in = length(packet)?;
    attr.test.data_out = out.as_mut_ptr() as u64;
    attr.test.data_size_out = length(&out)?;
    attr.test.repeat = repeat;
    call(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr)?;
    // SAFETY: the call has filled this member.
    let test = unsafe { attr.test };
    Ok(Run { nanoseconds: f64::from(test.duration), returned: test.retval, packet: out })
}

fn length<T>(elements: &[T]) -> io::Result<u32> {
    u32::try_from(elements.len()).map_err(io::Error::other)
}

#[expect(unsafe_code, reason = "unions of the kernel's interface")]
fn nothing() -> bpf_attr {
    // SAFETY: the attributes are integers and pointers; zeros are values of all of them.
    unsafe { std::mem::zeroed() }
}

/// A call that answers with a descriptor.
#[expect(unsafe_code, reason = "a descriptor of the kernel's")]
fn open(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = i32::try_from(call(command, attr)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just handed this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[expect(unsafe_code, reason = "bpf(2) has no wrapper in libc")]
fn call(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: `attr` is valid for reads and writes of its size, and what it points to outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command as u32, &raw mut *attr, size_of::<bpf_attr>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}
