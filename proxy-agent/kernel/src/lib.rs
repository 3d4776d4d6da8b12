//! The part of the node agent that talks to the kernel.
//!
//! `sys` has the calls of the kernel that no crate offers. `datapath` is the only room that talks to BPF, `netlink` the only one that talks netlink; `kube_proxy` is what another
//! proxy has left in netfilter, `tunnel` what agents ask each other. None of them knows of Kubernetes.

pub mod datapath;
pub mod kube_proxy;
pub mod netlink;
mod sys;
pub mod tunnel;

/// Has all threads take memory from the same place from now on.
pub fn share_memory() {
    sys::share_memory();
}

/// Gives memory back to the kernel that has been freed.
pub fn trim() {
    sys::trim();
}
