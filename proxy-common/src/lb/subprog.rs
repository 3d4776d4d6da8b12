//! Calls that stand for themselves: each is one function of this crate.
//!
//! The kernel programs override each by a call of a separate function, a *subprogram*, which the verifier
//! checks once whatever its callers know: its work adds up instead of multiplying, and stack frames stay
//! small. Everywhere else the function is called as it is.

use super::flow::{self, Entered};
use super::fragment::{self, Recalled};
use super::select::Choice;
use super::{Inserted, Ring, Tables, Verdict, direct, masquerade, open};
use crate::abi::{FlowId, Role, Run, Timeouts};
use crate::addr::Port;
use crate::wire::{Edit, Packet};

/// The calls, over the tables that they work on.
pub trait Subprograms: Tables + Sized {
    /// [`Config::snat_port`](crate::abi::Config::snat_port) of the node's settings.
    fn snat_port(&self, n: u32) -> Port {
        self.config().map_or(Port(0), |config| config.snat_port(n))
    }
    /// [`Config::is_snat_port`](crate::abi::Config::is_snat_port) of the node's settings.
    fn is_snat_port(&self, port: Port) -> bool {
        self.config().is_some_and(|config| config.is_snat_port(port))
    }
    /// [`open::open`].
    fn open(&self, packet: &Packet, known: u32, edit: &mut Edit) -> Verdict {
        open::open(self, packet, known, edit, &mut Choice { ..Choice::NONE })
    }
    /// [`open::choose`].
    fn choose(
        &self,
        packet: &Packet,
        known: u32,
        attempt: u32,
        last: bool,
        choice: &mut Choice,
    ) -> Option<Verdict> {
        open::choose(self, packet, known, attempt, last, choice)
    }
    /// [`direct::hinted`].
    fn hinted(&self, run: Run, service: u32, hint: u16) -> u32 {
        direct::hinted(self, run, service, hint)
    }
    /// [`direct::meant`].
    fn meant(&self, slot: u32, service: u32, hint: u16) -> u32 {
        direct::meant(self, slot, service, hint)
    }
    /// [`flow::take`].
    fn take(&self, ring: Ring) -> FlowId {
        flow::take(self, ring)
    }
    /// [`flow::make`].
    fn make(&self, packet: &Packet, choice: &Choice, middle_port: Port, id: FlowId) -> u32 {
        flow::make(self, packet, choice, middle_port, id)
    }
    /// [`flow::join`].
    fn join(&self, packet: &Packet, id: FlowId) -> Inserted {
        flow::join(self, packet, id)
    }
    /// [`flow::progress`].
    fn progress(&self, packet: &Packet, id: FlowId, forward: bool) -> u32 {
        flow::progress(self, packet, id, forward)
    }
    /// [`flow::look_after`].
    fn look_after(&self, id: FlowId) -> u32 {
        flow::look_after(self, id)
    }
    /// [`flow::enter`].
    fn enter(&self, id: FlowId, role: Role, holder: &mut FlowId) -> Entered {
        flow::enter(self, id, role, holder)
    }
    /// [`flow::dissolve`].
    fn dissolve(&self, id: FlowId) -> u32 {
        flow::dissolve(self, id)
    }
    /// [`flow::take_apart`].
    fn take_apart(&self, id: FlowId) -> u32 {
        flow::take_apart(self, id)
    }
    /// [`flow::make_own`].
    fn make_own(&self, packet: &Packet, guest: bool) -> FlowId {
        flow::make_own(self, packet, guest)
    }
    /// [`flow::join_own`].
    fn join_own(&self, id: FlowId) -> u32 {
        flow::join_own(self, id)
    }
    /// [`flow::sweep`].
    fn sweep(&self, index: u32, timeouts: &Timeouts) -> u32 {
        flow::sweep(self, index, timeouts)
    }
    /// [`fragment::recall`].
    fn recall_fragment(&self, packet: &mut Packet) -> Recalled {
        fragment::recall(self, packet)
    }
    /// [`fragment::remember`].
    fn remember_fragment(&self, packet: &Packet) -> u32 {
        fragment::remember(self, packet)
    }
    /// [`masquerade::find_source`].
    fn find_source(&self, packet: &mut Packet) -> u32 {
        masquerade::find_source(self, packet)
    }
    /// [`masquerade::find_port`].
    fn find_port(&self, packet: &mut Packet, start: u32, call: u32) -> u32 {
        masquerade::find_port(self, packet, start, call)
    }
    /// [`masquerade::price`].
    fn price(&self, packet: &mut Packet, at: u32) -> u64 {
        masquerade::price(self, packet, at)
    }
    /// [`masquerade::enter_source`].
    fn enter_source(&self, packet: &Packet, id: FlowId) -> Entered {
        masquerade::enter_source(self, packet, id)
    }
}
