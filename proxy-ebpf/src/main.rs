//! The kernel programs: parse, ask `proxy_common::lb`, apply, count. No file here decides anything.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![deny(unsafe_op_in_unsafe_fn)]

mod feature;
mod hook;
mod maps;
mod scratch;
mod skb;
mod sock;
mod subprog;
mod tables;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // Never reached: the build refuses an object that refers to a panic.
    loop {}
}

/// "Dual MIT/GPL": some helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
