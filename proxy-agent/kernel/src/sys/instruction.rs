//! Instructions of hand-written programs (RFC 9669), each as its eight bytes: what the kernel is asked with, and what
//! no compiler is worth running for.

/// Numbers of helpers (`linux/bpf.h`).
pub(crate) mod helper {
    pub(crate) const MAP_UPDATE: u32 = 2;
    pub(crate) const L4_CSUM_REPLACE: u32 = 11;
    pub(crate) const GET_SOCKET_COOKIE: u32 = 46;
    pub(crate) const PROBE_READ_KERNEL: u32 = 113;
    pub(crate) const GET_NETNS_COOKIE: u32 = 122;
    pub(crate) const SEQ_WRITE: u32 = 127;
    pub(crate) const KTIME_GET_COARSE_NS: u32 = 160;
    pub(crate) const SET_RETVAL: u32 = 187;
    pub(crate) const SKC_TO_MPTCP_SOCK: u32 = 196;
}

/// A register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Register(u8);

impl Register {
    /// What a function returns.
    pub(crate) const RESULT: Self = Self(0);
    /// What it is called with.
    pub(crate) const ARGUMENTS: [Self; 5] = [Self(1), Self(2), Self(3), Self(4), Self(5)];
    /// One that calls leave as it is.
    pub(crate) const KEPT: Self = Self(6);
    /// Another one.
    pub(crate) const ALSO_KEPT: Self = Self(7);
    /// The end of the stack frame.
    pub(crate) const FRAME: Self = Self(10);
}

/// An instruction from its fields, as `struct bpf_insn` lays them out on a little-endian machine.
const fn instruction(code: u8, to: Register, from: u8, offset: i16, imm: u32) -> u64 {
    let registers = to.0 | from << 4;
    code as u64 | (registers as u64) << 8 | (offset as u16 as u64) << 16 | (imm as u64) << 32
}

/// `BPF_ALU64 | BPF_MOV | BPF_K`: a register := a constant.
pub(crate) const fn set(to: Register, imm: u32) -> u64 {
    instruction(0xb7, to, 0, 0, imm)
}

/// `BPF_ALU64 | BPF_MOV | BPF_X`: a register := another.
pub(crate) const fn move_register(to: Register, from: Register) -> u64 {
    instruction(0xbf, to, from.0, 0, 0)
}

/// `BPF_ALU64 | BPF_ADD | BPF_K`: a register += a constant.
pub(crate) const fn add(to: Register, imm: i32) -> u64 {
    instruction(0x07, to, 0, 0, imm as u32)
}

/// `BPF_STX | BPF_MEM | BPF_DW`: eight bytes at a register's address and an offset := a register.
pub(crate) const fn store(to: Register, offset: i16, from: Register) -> u64 {
    instruction(0x7b, to, from.0, offset, 0)
}

/// `BPF_STX | BPF_MEM` of a size: the same of fewer bytes.
pub(crate) const fn store_sized(size: u8, to: Register, offset: i16, from: Register) -> u64 {
    instruction(0x63 | size, to, from.0, offset, 0)
}

/// `BPF_B`, a size.
pub(crate) const BYTE: u8 = 0x10;
/// `BPF_H`, a size.
pub(crate) const HALF: u8 = 0x08;
/// `BPF_W`, a size.
pub(crate) const WORD: u8 = 0x00;
/// `BPF_DW`, a size.
pub(crate) const DOUBLE: u8 = 0x18;

/// `BPF_LDX | BPF_MEM` of a size: a register := what another one and an offset point to.
pub(crate) const fn load(size: u8, to: Register, from: Register, offset: i16) -> u64 {
    instruction(0x61 | size, to, from.0, offset, 0)
}

/// `BPF_JMP | BPF_JEQ | BPF_K`: skips instructions when a register is zero.
pub(crate) const fn skip_if_null(register: Register, instructions: i16) -> u64 {
    instruction(0x15, register, 0, instructions, 0)
}

/// `BPF_JMP | BPF_JNE | BPF_K`: skips instructions when a register is not zero.
pub(crate) const fn skip_unless_null(register: Register, instructions: i16) -> u64 {
    instruction(0x55, register, 0, instructions, 0)
}

/// `BPF_LD | BPF_IMM | BPF_DW` with `BPF_PSEUDO_MAP_FD`: a register := a map, by its descriptor. Two instructions long.
pub(crate) const fn map(to: Register, fd: i32) -> [u64; 2] {
    [instruction(0x18, to, 1, 0, fd as u32), 0]
}

/// `BPF_JMP | BPF_CALL`.
pub(crate) const fn call(helper: u32) -> u64 {
    instruction(0x85, Register::RESULT, 0, 0, helper)
}

/// `BPF_JMP | BPF_EXIT`.
pub(crate) const EXIT: u64 = instruction(0x95, Register::RESULT, 0, 0, 0);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_laid_out_as_the_kernel_reads_them() {
        assert_eq!(set(Register::ARGUMENTS[4], 7).to_le_bytes(), [0xb7, 5, 0, 0, 7, 0, 0, 0]);
        assert_eq!(call(160).to_le_bytes(), [0x85, 0, 0, 0, 160, 0, 0, 0]);
        // *(u64 *)(r10 - 8) = r0
        let stored = store(Register::FRAME, -8, Register::RESULT);
        assert_eq!(stored.to_le_bytes(), [0x7b, 0x0a, 0xf8, 0xff, 0, 0, 0, 0]);
        assert_eq!(store_sized(DOUBLE, Register::FRAME, -8, Register::RESULT), stored);
        // *(u16 *)(r0 + 2) = r1
        let short = store_sized(HALF, Register::RESULT, 2, Register::ARGUMENTS[0]);
        assert_eq!(short.to_le_bytes(), [0x6b, 0x10, 2, 0, 0, 0, 0, 0]);
        assert_eq!(add(Register::ARGUMENTS[1], -8).to_le_bytes(), [0x07, 2, 0, 0, 0xf8, 0xff, 0xff, 0xff]);
        assert_eq!(
            move_register(Register::KEPT, Register::ARGUMENTS[0]).to_le_bytes(),
            [0xbf, 0x16, 0, 0, 0, 0, 0, 0]
        );
        // r2 = *(u64 *)(r1 + 24); if r2 == 0 goto +6
        let loaded = load(DOUBLE, Register::ARGUMENTS[1], Register::ARGUMENTS[0], 24);
        assert_eq!(loaded.to_le_bytes(), [0x79, 0x12, 24, 0, 0, 0, 0, 0]);
        assert_eq!(skip_if_null(Register::ARGUMENTS[1], 6).to_le_bytes(), [0x15, 2, 6, 0, 0, 0, 0, 0]);
        assert_eq!(skip_unless_null(Register::RESULT, 3).to_le_bytes(), [0x55, 0, 3, 0, 0, 0, 0, 0]);
        assert_eq!(map(Register::ARGUMENTS[0], 5)[0].to_le_bytes(), [0x18, 0x11, 0, 0, 5, 0, 0, 0]);
    }
}
