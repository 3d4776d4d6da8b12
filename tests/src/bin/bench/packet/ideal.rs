//! The floor: what a program can cost at least that translates packets of flows, written by hand.
//!
//! It reads Ethernet, IPv4 and TCP headers, looks the tuple up in one hash map with keys of 16 bytes, writes
//! an address and a port with both checksums, and lets the packet go on. There it ends: it knows no IPv6, no
//! UDP, no fragments, no checksum that is left to the device, no age and no end of a flow, and it counts
//! nothing.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result};
use aya_obj::generated::bpf_map_type;
use proxy_common::abi::{Tuple, capacity};
use proxy_common::addr::{Addr, Port};
use proxy_common::wire::End;

use crate::asm::{Alu, Code, FP, If, R0, R1, R2, R3, R4, R5, R6, R7, Reg, Width};
use crate::raw;

/// `data` and `data_end` in `struct __sk_buff`.
pub(super) const DATA: i16 = 76;
pub(super) const DATA_END: i16 = 80;

/// Offsets in a frame with IPv4 without options, and TCP.
const ETHERTYPE: i16 = 12;
const VERSION: i16 = 14;
const FRAGMENT: i16 = 20;
const PROTOCOL: i16 = 23;
const IP_CHECKSUM: i16 = 24;
const SOURCE: i16 = 26;
const DESTINATION: i16 = 30;
const PORTS: i16 = 34;
const TCP_CHECKSUM: i16 = 50;
const HEADERS: i32 = 54;

const TCP: i32 = 6;
/// `bpf_map_lookup_elem`.
const LOOK_UP: i32 = 1;

/// What it looks up, and a program for each end of a packet.
pub(super) struct Ideal {
    flows: OwnedFd,
    destination: OwnedFd,
    source: OwnedFd,
}

impl Ideal {
    pub(super) fn load() -> Result<Self> {
        // As large as the table of flows that it is compared with.
        let flows = raw::create_map(bpf_map_type::BPF_MAP_TYPE_HASH, 16, 8, capacity::FLOWS as u32)
            .context("making a map for the floor")?;
        let load =
            |end| raw::load(&code(flows.as_fd(), end)).context("loading the program that is the floor");
        let (destination, source) = (load(End::Dst)?, load(End::Src)?);
        Ok(Self { flows, destination, source })
    }

    pub(super) fn program(&self, end: End) -> BorrowedFd<'_> {
        match end {
            End::Dst => self.destination.as_fd(),
            End::Src => self.source.as_fd(),
        }
    }

    /// Teaches it what to write over a packet.
    pub(super) fn learn(&self, packet: &Tuple, addr: &Addr, port: Port) -> io::Result<()> {
        let ports = u32::from(packet.sport.0) | u32::from(packet.dport.0) << 16;
        let key = [packet.src.word_v4(), packet.dst.word_v4(), ports, packet.proto.0.into()];
        let value = [addr.word_v4(), port.0.into()];
        raw::update(self.flows.as_fd(), &bytes(&key), &bytes(&value))
    }
}

impl Ideal {
    /// Gives it an entry that no packet asks for.
    pub(super) fn fill(&self, n: u32) -> io::Result<()> {
        raw::update(self.flows.as_fd(), &bytes(&[n, 0, 0, 0]), &[0; 8])
    }
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn code(flows: BorrowedFd<'_>, end: End) -> Vec<u64> {
    let mut code = Code::new();
    // R7 is the packet from here on.
    code.load(Width::Word, R7, R1, DATA).load(Width::Word, R3, R1, DATA_END);
    code.copy(R4, R7).alu_number(Alu::Add, R4, HEADERS).leave_if(If::Above, R4, R3);
    for (width, at, wanted) in [
        (Width::Half, ETHERTYPE, i32::from(u16::from_ne_bytes([0x08, 0x00]))),
        (Width::Byte, VERSION, 0x45),
        (Width::Byte, PROTOCOL, TCP),
    ] {
        code.load(width, R5, R7, at).leave_if_number(If::Differs, R5, wanted);
    }
    let fragment = i32::from(u16::from_ne_bytes([0x3f, 0xff]));
    code.load(Width::Half, R5, R7, FRAGMENT).alu_number(Alu::And, R5, fragment).leave_if_number(
        If::Differs,
        R5,
        0,
    );
    // The key, in two pieces: a processor passes on what it has just written only if it is not read in larger ones.
    code.load(Width::Word, R5, R7, SOURCE).load(Width::Word, R4, R7, DESTINATION);
    code.alu_number(Alu::ShiftLeft, R4, 32).alu(Alu::Or, R5, R4).store(Width::Double, FP, -16, R5);
    code.load(Width::Word, R5, R7, PORTS).set(R4, TCP);
    code.alu_number(Alu::ShiftLeft, R4, 32).alu(Alu::Or, R5, R4).store(Width::Double, FP, -8, R5);
    code.map(R1, flows).copy(R2, FP).alu_number(Alu::Add, R2, -16).call(LOOK_UP);
    code.leave_if_number(If::Equal, R0, 0);
    rewrite(&mut code, end);
    code.returns(-1)
}

/// Writes what was found, at R0, over an end of the packet at R7, and adds the differences to the checksums
/// (RFC 1624).
fn rewrite(code: &mut Code, end: End) {
    let (address, port) = match end {
        End::Src => (SOURCE, PORTS),
        End::Dst => (DESTINATION, PORTS + 2),
    };
    code.load(Width::Word, R1, R0, 0).load(Width::Half, R2, R0, 4);
    code.load(Width::Word, R3, R7, address).load(Width::Half, R4, R7, port);
    code.store(Width::Word, R7, address, R1).store(Width::Half, R7, port, R2);
    // What is new, and the complement of what was there: R1 for the addresses, R2 for all.
    code.alu32_number(Alu::Xor, R3, -1).alu(Alu::Add, R1, R3);
    code.alu32_number(Alu::Xor, R4, 0xffff).alu(Alu::Add, R2, R4).alu(Alu::Add, R2, R1);
    add_to_checksum(code, IP_CHECKSUM, R1);
    add_to_checksum(code, TCP_CHECKSUM, R2);
}

fn add_to_checksum(code: &mut Code, at: i16, difference: Reg) {
    code.load(Width::Half, R5, R7, at).alu32_number(Alu::Xor, R5, 0xffff).alu(Alu::Add, R5, difference);
    // Folded from 34 bits to 18, to 16 and a carry, to 16.
    for _ in 0..2 {
        code.copy(R6, R5).alu_number(Alu::ShiftRight, R6, 16);
        code.alu_number(Alu::And, R5, 0xffff).alu(Alu::Add, R5, R6);
    }
    code.copy(R6, R5).alu_number(Alu::ShiftRight, R6, 16).alu(Alu::Add, R5, R6);
    code.alu_number(Alu::Xor, R5, 0xffff).store(Width::Half, R7, at, R5);
}
