//! Socket hooks. A socket that cannot remember its Service is left to TC.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use proxy_common::abi::{Reason, SocketEntry};
use proxy_common::lb::Tables as _;
use proxy_common::lb::socket::{Answer, decide, passes_ingress};

use crate::maps::SOCKETS;
use crate::sock::{ALLOW, FAIL, addr, call, fits, port, proto, refuse, set};
use crate::tables::Kernel;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    translate::<false>(&ctx, true)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    translate::<true>(&ctx, true)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    translate::<false>(&ctx, false)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    translate::<true>(&ctx, false)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    show_original::<false>(&ctx)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    show_original::<true>(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    show_original::<false>(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    show_original::<true>(&ctx)
}

#[inline(always)]
fn translate<const V6: bool>(ctx: &SockAddrContext, connect: bool) -> i32 {
    let call = call::<V6>(ctx, connect);
    if !connect && let Some(known) = remembered(ctx, &call) {
        set::<V6>(ctx, &known.addr, known.port);
        return ALLOW;
    }
    match decide(&Kernel, &call) {
        Answer::Leave => ALLOW,
        Answer::Refuse => refuse(ctx),
        Answer::Deny => FAIL,
        Answer::Use(entry) => {
            if fits::<V6>(&entry) && remember(ctx, &entry, passes_ingress(&Kernel, &call)) {
                set::<V6>(ctx, &entry.addr, entry.port);
            } else {
                Kernel.count(Reason::SocketStorage);
            }
            ALLOW
        }
    }
}

#[inline(always)]
fn remembered(ctx: &SockAddrContext, call: &proxy_common::lb::socket::Call) -> Option<SocketEntry> {
    // SAFETY: the socket is the context's; storage lives as long as it.
    let state = unsafe { SOCKETS.get_ptr_mut(ctx).as_ref() }?;
    state.translation(&Kernel, call)
}

#[inline(always)]
fn remember(ctx: &SockAddrContext, entry: &SocketEntry, elsewhere: bool) -> bool {
    // Created zeroed: an empty state is all zeros. SAFETY: as above; a socket's calls are serialised by its
    // lock or, for datagrams on several CPUs, overwrite whole entries of the same kind.
    match unsafe { SOCKETS.get_or_insert_ptr_mut(ctx, None).as_mut() } {
        Some(state) => state.remember(entry, elsewhere),
        None => false,
    }
}

#[inline(always)]
fn show_original<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    // SAFETY: as above.
    if let Some(state) = unsafe { SOCKETS.get_ptr_mut(ctx).as_ref() }
        && let Some((vip, vport)) = state.original(&addr::<V6>(ctx), port(ctx), proto(ctx))
    {
        set::<V6>(ctx, &vip, vport);
    }
    ALLOW
}
