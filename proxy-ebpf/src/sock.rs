//! A `bpf_sock_addr` as a call, an answer written back, and what its socket remembers.

use core::ffi::c_void;
use core::marker::PhantomData;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_ANY, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{
    bpf_get_socket_cookie, bpf_set_retval, bpf_sk_storage_get, bpf_skc_to_mptcp_sock,
};
use aya_ebpf::programs::{SockAddrContext, SockContext};
use proxy_common::abi::{PeerKey, SocketEntry, SocketState, feature};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::lb::socket::{Call, Memory};

use crate::feature::{has, netns_cookie};
use crate::maps::{PEERS, SOCKETS};

/// Let the call go on.
pub const ALLOW: i32 = 1;
/// Fail the call.
pub const FAIL: i32 = 0;

const ECONNREFUSED: i32 = 111;
/// Multipath TCP: its first subflow connects as TCP.
const IPPROTO_MPTCP: u32 = 262;
/// `TCP_SYN_SENT`.
const CONNECTING: u8 = 2;
/// Where `skc_state` stands in the kernel's `struct sock_common`, with which every kind of socket begins:
/// behind two addresses, a hash, two ports and the family. The verifier, and before it the agent's probe,
/// checks that there is a number there.
const STATE_AT: usize = 18;

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
    let (peer, peer_port) = if connect { (Addr::ANY_V6, Port(0)) } else { connected_to::<V6>(ctx) };
    Call {
        dst: addr::<V6>(ctx),
        dport: port(ctx),
        proto: proto(ctx),
        netns: netns_cookie(ctx),
        connect,
        peer,
        peer_port,
    }
}

/// The only peer the socket receives from. A disconnect clears the port, and the address only of IPv4.
#[inline(always)]
fn connected_to<const V6: bool>(ctx: &SockAddrContext) -> (Addr, Port) {
    let sk = field!(ctx, __bindgen_anon_1.sk);
    if sk.is_null() {
        return (Addr::ANY_V6, Port(0));
    }
    /// Reads a field of the socket.
    macro_rules! of_socket {
        ($($path:tt)+) => {
            // SAFETY: a socket that the context shows stays while the program runs.
            unsafe { (&raw const (*sk).$($path)+).read_volatile() }
        };
    }
    let addr = if V6 {
        Addr([of_socket!(dst_ip6[0]), of_socket!(dst_ip6[1]), of_socket!(dst_ip6[2]), of_socket!(dst_ip6[3])])
    } else {
        Addr::v4(of_socket!(dst_ip4))
    };
    (addr, Port(of_socket!(dst_port)))
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

/// Fails the call with "connection refused", or with EPERM where the kernel knows no other way.
#[inline(always)]
pub fn reject(_ctx: &SockAddrContext) -> i32 {
    if has(feature::SET_RETVAL) {
        // SAFETY: takes a number.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    FAIL
}

/// The socket of a hook, as far as it remembers something.
pub struct HookSocket<'a> {
    ctx: &'a SockAddrContext,
    /// What the process holds: with MPTCP not the context's socket.
    sk: *mut c_void,
    lives: PhantomData<&'a bpf_sock>,
}

impl<'a> HookSocket<'a> {
    /// The socket of a call; `None` for a further subflow of an MPTCP connection, which goes where its peer says.
    #[inline(always)]
    pub fn calling(ctx: &'a SockAddrContext, call: &Call) -> Option<Self> {
        let socket = Self::shown(ctx);
        if !has(feature::MPTCP_SOCKET) || !call.connect || call.proto != Proto::TCP {
            return Some(socket);
        }
        // SAFETY: the socket is the context's.
        let whole = unsafe { bpf_skc_to_mptcp_sock(socket.sk) };
        if whole.is_null() {
            return Some(socket);
        }
        // SAFETY: it lives as long as its subflow; the verifier checks the field.
        let state = unsafe { whole.cast::<u8>().add(STATE_AT).read_volatile() };
        (state == CONNECTING).then_some(Self { sk: whole.cast(), ..socket })
    }

    /// The socket whose peer is shown.
    #[inline(always)]
    pub fn shown(ctx: &'a SockAddrContext) -> Self {
        Self { ctx, sk: field!(ctx, __bindgen_anon_1.sk).cast(), lives: PhantomData }
    }

    /// What it remembers.
    #[inline(always)]
    pub fn state(&self) -> Option<&'a mut SocketState> {
        self.storage(0)
    }

    #[inline(always)]
    fn storage(&self, flags: u32) -> Option<&'a mut SocketState> {
        // SAFETY: storage lives as long as its socket. A socket's calls are serialised by its lock; who only
        // shows a peer may read an entry that is being replaced.
        unsafe { storage(self.sk, flags).as_mut() }
    }
}

#[inline(always)]
fn storage(sk: *mut c_void, flags: u32) -> *mut SocketState {
    let map = (&raw const SOCKETS).cast_mut().cast();
    // Created zeroed: an empty state is all zeros. SAFETY: the map and the socket are what they are.
    unsafe { bpf_sk_storage_get(map, sk, core::ptr::null_mut(), flags.into()).cast() }
}

impl<'a> Memory<'a> for HookSocket<'a> {
    #[inline(always)]
    fn new_state(&self) -> Option<&'a mut SocketState> {
        self.storage(BPF_SK_STORAGE_GET_F_CREATE)
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the context is the one the program was called with.
        unsafe { bpf_get_socket_cookie(self.ctx.as_ptr()) }
    }

    #[inline(always)]
    fn peer<R>(&self, key: &PeerKey, see: impl FnOnce(&SocketEntry) -> R) -> Option<R> {
        // SAFETY: what is replaced while it is read is as good as none, or as the new one.
        unsafe { PEERS.get(key) }.map(see)
    }

    #[inline(always)]
    fn set_peer(&self, key: &PeerKey, entry: &SocketEntry) -> bool {
        PEERS.insert(key, entry, BPF_ANY.into()).is_ok()
    }

    #[inline(always)]
    fn forget_peer(&self, key: &PeerKey) {
        // An absent key is what was wanted.
        let _ = PEERS.remove(key);
    }
}

/// Notes something of a new socket.
#[inline(always)]
pub fn exclude(ctx: &SockContext, flags: u32) {
    // SAFETY: the context of this hook is the socket itself.
    if let Some(state) = unsafe { storage(ctx.as_ptr(), BPF_SK_STORAGE_GET_F_CREATE).as_mut() } {
        state.flags |= flags;
    }
}
