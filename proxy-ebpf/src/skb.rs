//! [`Frame`] over a `__sk_buff`: direct reads and writes, and the one helper that knows whether a transport
//! checksum is complete or left to the hardware.

use core::mem::size_of;

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
};
use aya_ebpf::helpers::generated::{
    bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_pull_data,
    bpf_skb_store_bytes,
};
use proxy_common::abi::{Flow, ask, feature};
use proxy_common::lb::Tables as _;
use proxy_common::wire::reject::Reply;
use proxy_common::wire::{Frame, MAX_OFFSET, Words, checksum, crc32c};

use crate::feature::has;
use crate::tables::TcTables;

/// `BPF_F_IPV6` (6.16): newer than the bindings.
const BPF_F_IPV6: u64 = 1 << 7;

/// `ETH_P_IP` of `linux/if_ether.h`, as the context has it.
const ETHERTYPE_IPV4: u32 = 0x0800_u16.to_be() as u32;
/// `PACKET_HOST` of `linux/if_packet.h`.
const PACKET_HOST: u32 = 0;
/// `PACKET_OTHERHOST`.
const PACKET_OTHERHOST: u32 = 3;

/// What is pulled into the linear part when a packet's headers may lie outside.
const PULL: u32 = 192;

/// A packet.
pub struct Skb(pub *mut __sk_buff);

impl Skb {
    /// Makes the headers of most packets directly readable. A failure shows as a short packet later.
    ///
    /// What this node sends over TCP has its headers, and nothing else, where they can be read: to ask for
    /// more would copy that part of a packet that others hold as well.
    #[inline(always)]
    pub fn pull(&self) {
        // SAFETY: as below.
        let protocol = unsafe { (&raw const (*self.0).protocol).read_volatile() };
        // Ethernet, IP without options or extensions, TCP without options.
        let wanted = if protocol == ETHERTYPE_IPV4 { 14 + 20 + 20 } else { 14 + 40 + 20 };
        let (start, end, len) = (self.data(), self.data_end(), self.len());
        if start + wanted > end && len as usize > end - start {
            self.pull_all();
        }
    }

    /// Whether more of the packet could be made readable.
    #[inline(always)]
    pub fn has_more(&self) -> bool {
        let (start, end, len) = (self.data(), self.data_end(), self.len());
        start + PULL as usize > end && len as usize > end - start
    }

    /// Pulls as much as headers with options, or an ICMP error with its embedded packet, can need.
    #[inline(always)]
    pub fn pull_more(&self) {
        if self.has_more() {
            self.pull_all();
        }
    }

    #[inline(always)]
    fn pull_all(&self) {
        let len = self.len();
        // SAFETY: the context is the one the program was called with; pointers are derived afresh after.
        unsafe { bpf_skb_pull_data(self.0, if len < PULL { len } else { PULL }) };
    }

    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: the context is valid; volatile keeps the compiler from merging the read with another.
        unsafe { (&raw const (*self.0).data).read_volatile() as usize }
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).data_end).read_volatile() as usize }
    }

    #[inline(always)]
    pub fn len(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).len).read_volatile() }
    }

    /// Of several segments that have been put together, how much each carries; else 0.
    #[inline(always)]
    pub fn segment_size(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).gso_size).read_volatile() }
    }

    /// The interface the packet is on.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).ifindex).read_volatile() }
    }

    /// Whether the stack of this host would take the frame at this interface and forward it: frames to
    /// everybody are never forwarded, nor do they reach a TCP socket.
    #[inline(always)]
    pub fn is_for_this_host(&self) -> bool {
        // SAFETY: as above.
        let (kind, tagged, tag) = unsafe {
            (
                (&raw const (*self.0).pkt_type).read_volatile(),
                (&raw const (*self.0).vlan_present).read_volatile(),
                (&raw const (*self.0).vlan_tci).read_volatile(),
            )
        };
        // A tag of VLAN 0 is one of priority only (IEEE 802.1Q).
        (kind == PACKET_HOST || kind == PACKET_OTHERHOST && self.is_for_the_bridge())
            && (tagged == 0 || tag & 0xfff == 0)
    }

    /// Whether the frame bears this host's address and no VLAN's tag.
    #[inline(always)]
    pub fn is_addressed_here(&self) -> bool {
        // SAFETY: as above.
        let (kind, tagged) = unsafe {
            (
                (&raw const (*self.0).pkt_type).read_volatile(),
                (&raw const (*self.0).vlan_present).read_volatile(),
            )
        };
        kind == PACKET_HOST && tagged == 0
    }

    /// Whether the frame is for the bridge that the interface is a port of: then it is the host's, and
    /// translated here, because netfilter may look at it on the bridge already (br_netfilter).
    #[inline(always)]
    fn is_for_the_bridge(&self) -> bool {
        let Some(iface) = TcTables::NO_PACKET.iface(self.ifindex()) else { return false };
        let [a, b, c, d, e, f] = iface.bridge.map(u16::from);
        // One look for all of it: verifiers up to 6.1 do not see that a second one implies the first.
        let Some(to) = self.at::<[u16; 3]>(0) else { return false };
        // SAFETY: `at` has checked the bounds; frames begin at an even address.
        let [x, y, z] = unsafe { to.read() }.map(u16::from_be);
        (x | y | z) != 0 && (x ^ (a << 8 | b)) | (y ^ (c << 8 | d)) | (z ^ (e << 8 | f)) == 0
    }

    /// Copies the record of a flow that lies in the packet from `at` on over one of RECORDS, but for what is
    /// the record's own; false if it is not all there.
    #[inline(always)]
    pub fn copy_record(&self, at: u32, record: &mut Flow) -> bool {
        const LENGTH: u32 = (size_of::<Flow>() - ask::RECORD_AT) as u32;
        // SAFETY: the bytes behind `RECORD_AT` are the record's, any bytes are a record, and the caller has
        // claimed it.
        unsafe {
            let to = (&raw mut *record).cast::<u8>().add(ask::RECORD_AT);
            bpf_skb_load_bytes(self.0.cast(), at + ask::RECORD_AT as u32, to.cast(), LENGTH) == 0
        }
    }

    /// What was left at the packet on its way through this node.
    #[inline(always)]
    pub fn mark(&self) -> u16 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).tc_index).read_volatile() as u16 }
    }

    /// Leaves something at the packet. The kernel itself has no use for the field.
    #[inline(always)]
    pub fn set_mark(&self, mark: u16) {
        // SAFETY: as above; programs of this kind may write the field.
        unsafe { (&raw mut (*self.0).tc_index).write_volatile(mark.into()) };
    }

    /// Puts the packet at the end of the queue of what this CPU has received, to enter by the same interface
    /// again.
    #[inline(always)]
    pub fn wait(&self) -> i32 {
        // SAFETY: takes numbers.
        unsafe { bpf_redirect(self.ifindex(), BPF_F_INGRESS.into()) as i32 }
    }

    #[inline(always)]
    fn at<T>(&self, off: usize) -> Option<*mut T> {
        if off > MAX_OFFSET {
            return None;
        }
        let mut off = off;
        // SAFETY: changes nothing that is in bounds. The verifier of 5.10 to 6.8 loses a bound when the compiler
        // reloads the compared register from the stack: here it sees one at the register that is used.
        unsafe { core::arch::asm!("{0} &= 0x7ff", inout(reg) off, options(pure, nomem, nostack)) };
        let start = self.data();
        if start + off + size_of::<T>() > self.data_end() { None } else { Some((start + off) as *mut T) }
    }

    /// Replaces the packet by `reply`, its Ethernet header (if there is one) turned round. False when a
    /// helper fails.
    #[inline(always)]
    pub fn become_reject_reply<const ETHERNET: bool>(&mut self, reply: &Reply) -> bool {
        let l3: u32 = if ETHERNET { 14 } else { 0 };
        if ETHERNET {
            let Some(macs) = self.load::<[u32; 3]>(0) else {
                return false;
            };
            // Destination: three halves; source: three halves; exchanged.
            let turned =
                [macs[1] >> 16 | macs[2] << 16, macs[2] >> 16 | macs[0] << 16, macs[0] >> 16 | macs[1] << 16];
            if !self.store(0, turned) {
                return false;
            }
        }
        let [rst4, icmp4, rst6, icmp6] = Reply::SIZES;
        // A constant length at each call: the verifier wants to know how much of the stack is read.
        if reply.len == rst4 {
            self.resize_and_store(l3, reply, (rst4 * 4) as u32)
        } else if reply.len == icmp4 {
            self.resize_and_store(l3, reply, (icmp4 * 4) as u32)
        } else if reply.len == rst6 {
            self.resize_and_store(l3, reply, (rst6 * 4) as u32)
        } else if reply.len == icmp6 {
            self.resize_and_store(l3, reply, (icmp6 * 4) as u32)
        } else {
            false
        }
    }

    #[inline(always)]
    fn resize_and_store(&mut self, l3: u32, reply: &Reply, len: u32) -> bool {
        // SAFETY: the context is valid, and `len` bytes of `words` are initialised.
        unsafe {
            bpf_skb_change_tail(self.0, l3 + len, 0) == 0
                && bpf_skb_store_bytes(
                    self.0,
                    l3,
                    reply.words.as_ptr().cast(),
                    len,
                    BPF_F_RECOMPUTE_CSUM.into(),
                ) == 0
        }
    }
}

impl Frame for Skb {
    #[inline(always)]
    fn load<T: Words>(&self, off: usize) -> Option<T> {
        // SAFETY: `at` has checked the bounds; words in a packet are aligned as its headers are.
        self.at::<T>(off).map(|p| unsafe { p.read() })
    }

    #[inline(always)]
    fn load_at<T: Words, const OFF: usize>(&self) -> Option<T> {
        let from = self.data() + OFF;
        // SAFETY: in bounds, and as above.
        if from + size_of::<T>() > self.data_end() { None } else { Some(unsafe { (from as *mut T).read() }) }
    }

    #[inline(always)]
    fn store<T: Words>(&mut self, off: usize, value: T) -> bool {
        match self.at::<T>(off) {
            Some(p) => {
                // SAFETY: as above.
                unsafe { p.write(value) };
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn update<T: Words>(&mut self, off: usize, f: impl FnOnce(&mut T)) -> bool {
        match self.at::<T>(off) {
            Some(p) => {
                // SAFETY: `at` has checked the bounds; nobody else has the packet, and words in it are
                // aligned as its headers are.
                f(unsafe { &mut *p });
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn update_checksum(&mut self, off: usize, pseudo: u32, body: u32, flags: u32) -> bool {
        // A size of zero in the low bits: `to` is a difference.
        let mut mode = 0;
        if flags & checksum::UDP != 0 {
            mode |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        if pseudo != 0 {
            let mut mode = mode | u64::from(BPF_F_PSEUDO_HDR);
            if flags & checksum::IPV6 != 0 && has(feature::CSUM_IPV6) {
                mode |= BPF_F_IPV6;
            }
            // SAFETY: the context is valid.
            if unsafe { bpf_l4_csum_replace(self.0, off as u32, 0, pseudo.into(), mode) } != 0 {
                return false;
            }
        }
        if body != 0 {
            // SAFETY: the context is valid.
            if unsafe { bpf_l4_csum_replace(self.0, off as u32, 0, body.into(), mode) } != 0 {
                return false;
            }
        }
        true
    }

    #[inline(always)]
    fn crc_difference(&self, diff: u32, following: u32) -> u32 {
        subprog_crc(diff, following)
    }
}

/// A global function like those of [`crate::subprog`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_crc(diff: u32, following: u32) -> u32 {
    crc32c::difference_by(|a, b| subprog_multiply(a, b), diff, following)
}

/// Likewise.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_multiply(a: u32, b: u32) -> u32 {
    crc32c::multiply(a, b)
}
