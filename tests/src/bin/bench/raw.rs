//! The calls of bpf(2) that the benchmarks make themselves: loading small programs to compare with or to feed others,
//! and running a program many times.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_map_type, bpf_prog_type};

/// `r0 = -1; exit`: a TC program that does nothing (TCX_NEXT), as the bytes the kernel takes.
const EMPTY: [u64; 2] = [0xffff_ffff_0000_00b7, 0x0000_0000_0000_0095];

/// Loads the empty program.
pub(crate) fn load_empty() -> io::Result<OwnedFd> {
    load(&EMPTY)
}

/// An instruction: operation, destination and source register, offset, immediate number.
const fn op(code: u8, registers: u8, offset: i16, number: i32) -> u64 {
    let (offset, number) = (offset.cast_unsigned() as u64, number.cast_unsigned() as u64);
    code as u64 | (registers as u64) << 8 | offset << 16 | number << 32
}

/// Where an Ethernet frame with IPv4 has the identification and the destination.
const COUNTED: i32 = 18;
const NUMBERED: i32 = 30;
/// `tc_index` in `struct __sk_buff`.
const MARK: i16 = 44;
/// How the destination begins.
const NETWORK: [u8; 2] = [10, 3];

/// A program that makes each packet another one and hands it to `program`: it counts up in the identification, and
/// writes the number to the end of the destination address, 10.3.0.0. And one that does only that, to compare with; they work while the third
/// descriptor is open.
pub(crate) fn load_feeders(program: BorrowedFd<'_>) -> io::Result<[OwnedFd; 3]> {
    let programs = program_array(program)?;
    let feeder = |index: i32| {
        // bpf_skb_load_bytes and bpf_skb_store_bytes, of bytes on the stack that end at -6; the context waits in r6.
        let bytes = |helper: i32, at: i32, length: i32| {
            [
                op(0xbf, 0x61, 0, 0),
                op(0xb7, 0x02, 0, at),
                op(0xbf, 0xa3, 0, 0),
                op(0x07, 0x03, 0, -6 - length),
                op(0xb7, 0x04, 0, length),
                op(0xb7, 0x05, 0, 0),
                op(0x85, 0, 0, helper),
            ]
        };
        let mut code = vec![op(0xbf, 0x16, 0, 0)];
        code.extend(bytes(26, COUNTED, 2));
        // r7 = the number, in the order of the network, and one more.
        code.extend([op(0x69, 0xa7, -8, 0), op(0xdc, 0x07, 0, 16), op(0x07, 0x07, 0, 1)]);
        code.extend([op(0xdc, 0x07, 0, 16), op(0x6b, 0x7a, -8, 0)]);
        code.extend(bytes(9, COUNTED, 2));
        code.push(op(0x6a, 0x0a, -10, u16::from_ne_bytes(NETWORK).into()));
        code.extend(bytes(9, NUMBERED, 4));
        // bpf_tail_call, which returns only when there is no such program.
        code.extend([op(0xbf, 0x61, 0, 0), op(0x18, 0x12, 0, programs.as_raw_fd()), 0]);
        code.extend([op(0xb7, 0x03, 0, index), op(0x85, 0, 0, 12), EMPTY[0], EMPTY[1]]);
        load(&code)
    };
    // The kernel empties the array when the last descriptor of it is closed.
    Ok([feeder(0)?, feeder(1)?, programs])
}

/// The same without making another packet: it only takes away the mark that the program leaves at one it has rewritten.
pub(crate) fn load_wipers(program: BorrowedFd<'_>) -> io::Result<[OwnedFd; 3]> {
    let programs = program_array(program)?;
    let wiper = |index: i32| {
        load(&[
            op(0xb7, 0x02, 0, 0),
            op(0x63, 0x21, MARK, 0),
            op(0x18, 0x12, 0, programs.as_raw_fd()),
            0,
            op(0xb7, 0x03, 0, index),
            op(0x85, 0, 0, 12),
            EMPTY[0],
            EMPTY[1],
        ])
    };
    Ok([wiper(0)?, wiper(1)?, programs])
}

/// An array of two programs whose second one is missing.
#[expect(unsafe_code, reason = "unions of the kernel's interface, and a descriptor out of it")]
fn program_array(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the attributes are integers and pointers; zeros are values of all of them.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    attr.__bindgen_anon_1.map_type = bpf_map_type::BPF_MAP_TYPE_PROG_ARRAY as u32;
    attr.__bindgen_anon_1.key_size = 4;
    attr.__bindgen_anon_1.value_size = 4;
    attr.__bindgen_anon_1.max_entries = 2;
    let fd = i32::try_from(call(bpf_cmd::BPF_MAP_CREATE, &mut attr)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just handed this descriptor to us alone.
    let array = unsafe { OwnedFd::from_raw_fd(fd) };
    let (key, value) = (0_u32, program.as_raw_fd());
    // SAFETY: as above.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    attr.__bindgen_anon_2.map_fd = array.as_raw_fd().cast_unsigned();
    attr.__bindgen_anon_2.key = &raw const key as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = &raw const value as u64;
    call(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr)?;
    Ok(array)
}

#[expect(unsafe_code, reason = "a union of the kernel's interface, and a descriptor out of it")]
fn load(code: &[u64]) -> io::Result<OwnedFd> {
    // SAFETY: the attributes are integers and pointers; zeros are values of all of them.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    attr.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32;
    attr.__bindgen_anon_3.insns = code.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = u32::try_from(code.len()).map_err(io::Error::other)?;
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
