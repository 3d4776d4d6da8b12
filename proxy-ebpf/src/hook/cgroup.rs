//! Socket hooks. A socket that cannot remember its Service is left to TC.

use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr};
use aya_ebpf::programs::{SockAddrContext, SockContext};
use proxy_common::abi::SocketEntry;
use proxy_common::abi::socket::EXCLUDED;
use proxy_common::lb::socket::{Decision, original, translate};

use crate::sock::{ALLOW, FAIL, HookSocket, addr, call, exclude, port, proto, reject, set};
use crate::tables::SocketTables;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    decide::<false>(&ctx, true)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    decide::<true>(&ctx, true)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    decide::<false>(&ctx, false)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    decide::<true>(&ctx, false)
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

/// Runs where the cgroup of a pod is that is left to its packets.
#[cgroup_sock(sock_create)]
pub fn exclude_socket(ctx: SockContext) -> i32 {
    exclude(&ctx, EXCLUDED);
    ALLOW
}

#[inline(always)]
fn decide<const V6: bool>(ctx: &SockAddrContext, connect: bool) -> i32 {
    let call = call::<V6>(ctx, connect);
    let Some(socket) = HookSocket::calling(ctx, &call) else {
        return ALLOW;
    };
    let mut entry = SocketEntry::EMPTY;
    match translate(&SocketTables::NO_PACKET, &socket, socket.state(), &call, &mut entry) {
        Decision::Pass => ALLOW,
        Decision::Reject => reject(ctx),
        Decision::Deny => FAIL,
        Decision::Translate => {
            set::<V6>(ctx, &entry.addr, entry.port);
            ALLOW
        }
    }
}

#[inline(always)]
fn show_original<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let socket = HookSocket::shown(ctx);
    if let Some(state) = socket.state()
        && let Some((vip, vport)) = original(&socket, state, &addr::<V6>(ctx), port(ctx), proto(ctx))
    {
        set::<V6>(ctx, &vip, vport);
    }
    ALLOW
}
