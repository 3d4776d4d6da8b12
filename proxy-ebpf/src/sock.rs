//! A `bpf_sock_addr` as a call, and an answer written back.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::bpf_set_retval;
use aya_ebpf::programs::SockAddrContext;
use proxy_common::abi::{SocketEntry, feature};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::lb::socket::Call;

use crate::tables::{has, netns_cookie};

/// Let the call go on.
pub const ALLOW: i32 = 1;
/// Fail the call.
pub const FAIL: i32 = 0;

const ECONNREFUSED: i32 = 111;
/// Multipath TCP: its first subflow connects as TCP.
const IPPROTO_MPTCP: u32 = 262;

/// Reads a field of the context; volatile, since the verifier wants each read by itself.
macro_rules! field {
    ($ctx:expr, $($path:tt)+) => {{
        let raw: *mut bpf_sock_addr = $ctx.sock_addr;
        // SAFETY: the context is the one the program was called with.
        unsafe { (&raw const (*raw).$($path)+).read_volatile() }
    }};
}

/// Writes a field of the context.
macro_rules! set_field {
    ($ctx:expr, $value:expr, $($path:tt)+) => {{
        let raw: *mut bpf_sock_addr = $ctx.sock_addr;
        // SAFETY: as above.
        unsafe { (&raw mut (*raw).$($path)+).write_volatile($value) }
    }};
}

/// The address in the context.
#[inline(always)]
pub fn addr<const V6: bool>(ctx: &SockAddrContext) -> Addr {
    if V6 {
        Addr([
            field!(ctx, user_ip6[0]),
            field!(ctx, user_ip6[1]),
            field!(ctx, user_ip6[2]),
            field!(ctx, user_ip6[3]),
        ])
    } else {
        Addr::v4(field!(ctx, user_ip4))
    }
}

/// The port in the context.
#[inline(always)]
pub fn port(ctx: &SockAddrContext) -> Port {
    Port(field!(ctx, user_port) as u16)
}

/// The protocol of the socket.
#[inline(always)]
pub fn proto(ctx: &SockAddrContext) -> Proto {
    match field!(ctx, protocol) {
        IPPROTO_MPTCP => Proto::TCP,
        other => Proto(other as u8),
    }
}

/// The call the context stands for.
#[inline(always)]
pub fn call<const V6: bool>(ctx: &SockAddrContext, connect: bool) -> Call {
    Call { dst: addr::<V6>(ctx), dport: port(ctx), proto: proto(ctx), netns: netns_cookie(ctx), connect }
}

/// Writes an address and a port into the context. An IPv6 call that named an IPv4-mapped address gets one
/// back: that is what an IPv4 endpoint's [`Addr`] is.
#[inline(always)]
pub fn set<const V6: bool>(ctx: &SockAddrContext, addr: &Addr, port: Port) {
    if V6 {
        set_field!(ctx, addr.0[0], user_ip6[0]);
        set_field!(ctx, addr.0[1], user_ip6[1]);
        set_field!(ctx, addr.0[2], user_ip6[2]);
        set_field!(ctx, addr.0[3], user_ip6[3]);
    } else {
        set_field!(ctx, addr.word_v4(), user_ip4);
    }
    set_field!(ctx, u32::from(port.0), user_port);
}

/// Whether the context can take the entry's address: a call over IPv4 cannot be given an IPv6 endpoint.
#[inline(always)]
pub fn fits<const V6: bool>(entry: &SocketEntry) -> bool {
    V6 || entry.addr.is_v4()
}

/// Fails the call with "connection refused", or with EPERM where the kernel knows no other way.
#[inline(always)]
pub fn refuse(_ctx: &SockAddrContext) -> i32 {
    if has(feature::SET_RETVAL) {
        // SAFETY: takes a number.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    FAIL
}
