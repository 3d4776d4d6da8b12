//! Programs that are written by hand, and one run of a program.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use aya_obj::generated::{bpf_attach_type, bpf_cmd, bpf_prog_type};

use super::{attr, call, call_fd, raw};

/// Loads a program of hand-written instructions, each as its eight bytes.
pub(crate) fn program_load(
    kind: bpf_prog_type,
    hook: Option<bpf_attach_type>,
    flags: u32,
    instructions: &[u64],
) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.__bindgen_anon_3.prog_type = kind as u32;
    attr.__bindgen_anon_3.expected_attach_type = hook.map_or(0, |hook| hook as u32);
    attr.__bindgen_anon_3.prog_flags = flags;
    attr.__bindgen_anon_3.insns = instructions.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = instructions.len() as u32;
    attr.__bindgen_anon_3.license = c"GPL".as_ptr() as u64;
    call_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr)
}

/// Loads an iterator over what the kernel function with this BTF id lists.
pub(crate) fn iterator_load(function: u32, instructions: &[u64]) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_TRACING as u32;
    attr.__bindgen_anon_3.expected_attach_type = bpf_attach_type::BPF_TRACE_ITER as u32;
    attr.__bindgen_anon_3.attach_btf_id = function;
    attr.__bindgen_anon_3.insns = instructions.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = instructions.len() as u32;
    attr.__bindgen_anon_3.license = c"GPL".as_ptr() as u64;
    call_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr)
}

/// Runs a program once on `packet` and gives its return value.
pub(crate) fn program_run(program: BorrowedFd<'_>, packet: &[u8]) -> io::Result<u32> {
    let mut attr = attr();
    attr.test.prog_fd = raw(program);
    attr.test.data_in = packet.as_ptr() as u64;
    attr.test.data_size_in = packet.len() as u32;
    attr.test.repeat = 1;
    call(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr)?;
    #[expect(unsafe_code, reason = "reads back the member that the call has filled")]
    // SAFETY: the call above used this member; any bytes are a value.
    let ret = unsafe { attr.test.retval };
    Ok(ret)
}
