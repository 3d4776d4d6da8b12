//! The sockets of the node that a packet may belong to.

use aya_ebpf::bindings::{__sk_buff, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp};
use proxy_common::abi::Tuple;
use proxy_common::addr::Proto;

use crate::scratch::scratch;

/// `BPF_F_CURRENT_NETNS` of `linux/bpf.h`, as the helpers take it.
const CURRENT_NETNS: u64 = u32::MAX as u64;
/// `AF_INET` addresses and ports in a `bpf_sock_tuple`.
const TUPLE_V4: u32 = 12;
/// The same for `AF_INET6`.
const TUPLE_V6: u32 = 36;

#[inline(always)]
pub(super) fn is_there(ctx: *mut __sk_buff, tuple: &Tuple) -> bool {
    let Some(scratch) = scratch() else { return false };
    let asked = &mut scratch.asked;
    // As a packet from the other end would ask: addresses, then ports.
    let (v4, ports) = (tuple.src.is_v4(), u32::from(tuple.dport.0) | u32::from(tuple.sport.0) << 16);
    if v4 {
        (asked[0], asked[1], asked[2]) = (tuple.dst.word_v4(), tuple.src.word_v4(), ports);
    } else {
        let (s, d) = (&tuple.dst.0, &tuple.src.0);
        *asked = [s[0], s[1], s[2], s[3], d[0], d[1], d[2], d[3], ports];
    }
    let asked = asked.as_mut_ptr().cast::<bpf_sock_tuple>();
    // SAFETY: the tuple is written as far as its length says, and a socket that is found is released.
    unsafe {
        match tuple.proto {
            Proto::TCP => {
                let found = if v4 {
                    bpf_skc_lookup_tcp(ctx.cast(), asked, TUPLE_V4, CURRENT_NETNS, 0)
                } else {
                    bpf_skc_lookup_tcp(ctx.cast(), asked, TUPLE_V6, CURRENT_NETNS, 0)
                };
                !found.is_null() && bpf_sk_release(found.cast()) == 0
            }
            Proto::UDP => {
                let found = if v4 {
                    bpf_sk_lookup_udp(ctx.cast(), asked, TUPLE_V4, CURRENT_NETNS, 0)
                } else {
                    bpf_sk_lookup_udp(ctx.cast(), asked, TUPLE_V6, CURRENT_NETNS, 0)
                };
                !found.is_null() && bpf_sk_release(found.cast()) == 0
            }
            _ => false,
        }
    }
}

#[inline(always)]
pub(super) fn is_of_others(ctx: *mut __sk_buff, tuple: &Tuple) -> bool {
    // SAFETY: the context is the one the program was called with.
    if unsafe { (&raw const (*ctx).ingress_ifindex).read_volatile() } != 0 {
        return true;
    }
    // SAFETY: as above; the pointer is read once, and the verifier sees that it is compared with null.
    let sock = unsafe { (&raw const (*ctx).__bindgen_anon_2.sk).read_volatile() };
    if sock.is_null() {
        return false;
    }
    // SAFETY: the packet holds its socket while it is looked at. Of the addresses one is meant; all are read,
    // because the verifier knows no place that is one or the other.
    let (port, other_port, v4, v6) = unsafe {
        let word = |n: usize| (&raw const (*sock).src_ip6[n]).read_volatile();
        (
            (&raw const (*sock).src_port).read_volatile(),
            (&raw const (*sock).dst_port).read_volatile(),
            (&raw const (*sock).src_ip4).read_volatile(),
            [word(0), word(1), word(2), word(3)],
        )
    };
    // A packet of a tunnel has the socket of what it carries, which has another destination, too.
    if port == 0 || other_port != 0 && other_port != tuple.dport.0 {
        return false;
    }
    let [a, b, c, d] =
        if tuple.src.is_v4() { [tuple.src.0[0], tuple.src.0[1], tuple.src.0[2], v4] } else { v6 };
    let own = &tuple.src.0;
    let differs = (a ^ own[0]) | (b ^ own[1]) | (c ^ own[2]) | (d ^ own[3]) != 0;
    // A socket that sends from any address has none.
    port != u32::from(tuple.sport.number()) || differs && d != 0
}
