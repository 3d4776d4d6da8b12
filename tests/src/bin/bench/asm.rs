//! Instructions of BPF by name, for the few programs that the benchmarks write by hand.
//!
//! Such a program is a straight line that may be left: a jump goes to its end, or over a few instructions. How
//! instructions are encoded is in RFC 9669; the numbers in them are those of a little-endian machine.

use std::os::fd::{AsRawFd as _, BorrowedFd};

/// A register.
#[derive(Clone, Copy)]
pub(crate) struct Reg(u8);

pub(crate) const R0: Reg = Reg(0);
pub(crate) const R1: Reg = Reg(1);
pub(crate) const R2: Reg = Reg(2);
pub(crate) const R3: Reg = Reg(3);
pub(crate) const R4: Reg = Reg(4);
pub(crate) const R5: Reg = Reg(5);
/// This one and the next survive calls.
pub(crate) const R6: Reg = Reg(6);
pub(crate) const R7: Reg = Reg(7);
/// Where the stack ends.
pub(crate) const FP: Reg = Reg(10);

/// How much is read or written.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum Width {
    Word = 0x00,
    Half = 0x08,
    Byte = 0x10,
    Double = 0x18,
}

/// What is done with two numbers.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum Alu {
    Add = 0x00,
    Sub = 0x10,
    Or = 0x40,
    And = 0x50,
    ShiftLeft = 0x60,
    ShiftRight = 0x70,
    Xor = 0xa0,
}

/// When a jump is taken; comparisons are those of unsigned numbers.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum If {
    Equal = 0x10,
    Above = 0x20,
    Differs = 0x50,
    Below = 0xa0,
}

/// Classes of instructions, and the bit that says that the second number is in a register.
const LOAD: u8 = 0x61;
const STORE_NUMBER: u8 = 0x62;
const STORE: u8 = 0x63;
const ALU32: u8 = 0x04;
const ALU: u8 = 0x07;
const MOVE: u8 = 0xb0;
const JUMP: u8 = 0x05;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const REGISTER: u8 = 0x08;

/// A program that is being written.
#[derive(Default)]
pub(crate) struct Code {
    words: Vec<u64>,
    /// The jumps to the end.
    leaves: Vec<usize>,
}

impl Code {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn push(&mut self, code: u8, to: Reg, from: Reg, offset: i16, number: i32) -> &mut Self {
        let (offset, number) = (offset.cast_unsigned(), number.cast_unsigned());
        let registers = to.0 | from.0 << 4;
        self.words.push(
            u64::from(code) | u64::from(registers) << 8 | u64::from(offset) << 16 | u64::from(number) << 32,
        );
        self
    }

    /// Reads from memory.
    pub(crate) fn load(&mut self, width: Width, to: Reg, base: Reg, offset: i16) -> &mut Self {
        self.push(LOAD | width as u8, to, base, offset, 0)
    }

    /// Writes to memory.
    pub(crate) fn store(&mut self, width: Width, base: Reg, offset: i16, from: Reg) -> &mut Self {
        self.push(STORE | width as u8, base, from, offset, 0)
    }

    /// Writes a number to memory.
    pub(crate) fn store_number(&mut self, width: Width, base: Reg, offset: i16, number: i32) -> &mut Self {
        self.push(STORE_NUMBER | width as u8, base, R0, offset, number)
    }

    pub(crate) fn copy(&mut self, to: Reg, from: Reg) -> &mut Self {
        self.push(ALU | MOVE | REGISTER, to, from, 0, 0)
    }

    pub(crate) fn set(&mut self, to: Reg, number: i32) -> &mut Self {
        self.push(ALU | MOVE, to, R0, 0, number)
    }

    pub(crate) fn alu(&mut self, what: Alu, to: Reg, from: Reg) -> &mut Self {
        self.push(ALU | what as u8 | REGISTER, to, from, 0, 0)
    }

    pub(crate) fn alu_number(&mut self, what: Alu, to: Reg, number: i32) -> &mut Self {
        self.push(ALU | what as u8, to, R0, 0, number)
    }

    /// The same in 32 bits; the upper half becomes zero.
    pub(crate) fn alu32_number(&mut self, what: Alu, to: Reg, number: i32) -> &mut Self {
        self.push(ALU32 | what as u8, to, R0, 0, number)
    }

    /// Puts 32 bits into the order of the network.
    pub(crate) fn network_order(&mut self, to: Reg) -> &mut Self {
        self.push(0xdc, to, R0, 0, 32)
    }

    /// The map of a descriptor.
    pub(crate) fn map(&mut self, to: Reg, map: BorrowedFd<'_>) -> &mut Self {
        self.push(0x18, to, R1, 0, map.as_raw_fd());
        self.words.push(0);
        self
    }

    pub(crate) fn call(&mut self, helper: i32) -> &mut Self {
        self.push(CALL, R0, R0, 0, helper)
    }

    /// Goes to the end.
    pub(crate) fn leave_if(&mut self, when: If, one: Reg, other: Reg) -> &mut Self {
        self.leaves.push(self.words.len());
        self.push(JUMP | when as u8 | REGISTER, one, other, 0, 0)
    }

    /// The same.
    pub(crate) fn leave_if_number(&mut self, when: If, one: Reg, number: i32) -> &mut Self {
        self.leaves.push(self.words.len());
        self.push(JUMP | when as u8, one, R0, 0, number)
    }

    /// Leaves out the next `count` instructions.
    pub(crate) fn skip_if_number(&mut self, when: If, one: Reg, number: i32, count: i16) -> &mut Self {
        self.push(JUMP | when as u8, one, R0, count, number)
    }

    /// The end, which returns `number`.
    pub(crate) fn returns(&mut self, number: i32) -> Vec<u64> {
        let end = self.words.len();
        for at in self.leaves.drain(..) {
            // An offset counts from the instruction behind the jump.
            let distance = u64::try_from(end - at - 1).expect("programs are short");
            self.words[at] |= distance << 16;
        }
        self.set(R0, number).push(EXIT, R0, R0, 0, 0);
        std::mem::take(&mut self.words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_those_of_the_kernel() {
        assert_eq!(Code::new().returns(-1), [0xffff_ffff_0000_00b7, 0x95]);
        let code = Code::new().load(Width::Word, R2, R6, 76).alu(Alu::Add, R4, R5).returns(0);
        assert_eq!(code[..2], [0x0000_0000_004c_6261, 0x0000_0000_0000_540f]);
    }

    #[test]
    fn a_jump_to_the_end_ends_there() {
        let code = Code::new().leave_if_number(If::Equal, R0, 0).call(1).call(1).returns(0);
        assert_eq!(code[0], 0x0000_0000_0002_0015);
    }
}
