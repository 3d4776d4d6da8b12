//! What the kernel can do, and what stands in for what it cannot.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns};
use aya_ebpf::programs::SockAddrContext;
use proxy_common::abi::feature;

use crate::maps;

/// Whether the kernel has a feature; folded by the verifier.
#[inline(always)]
pub fn has(bit: u32) -> bool {
    maps::FEATURES.load() & bit != 0
}

/// `CLOCK_MONOTONIC_COARSE`, or the precise clock where the kernel has no other.
#[inline(always)]
pub fn clock() -> u64 {
    if has(feature::COARSE_CLOCK) {
        // SAFETY: takes no arguments.
        unsafe { bpf_ktime_get_coarse_ns() }
    } else {
        // SAFETY: takes no arguments.
        unsafe { bpf_ktime_get_ns() }
    }
}

/// The cookie of the network namespace that a socket call is made in; 0 when the kernel does not say.
#[inline(always)]
pub fn netns_cookie(ctx: &SockAddrContext) -> u64 {
    if has(feature::NETNS_COOKIE) {
        // SAFETY: the context is the one the program was called with.
        unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
    } else {
        0
    }
}
