//! The agent beside what else shapes traffic on a node: rules of the CNI, other routes, other devices, other machines.
//!
//! Every scene that netfilter could serve as well is played twice: first with rules of kube-proxy's shape, which shows
//! that the scene itself is right, then with the agent.

#[cfg(test)]
mod addresses;
#[cfg(test)]
mod common;
#[cfg(test)]
mod detours;
#[cfg(test)]
mod masquerade;
#[cfg(test)]
mod others;
#[cfg(test)]
mod outgoing;
#[cfg(test)]
mod routes;
#[cfg(test)]
mod sockets;
#[cfg(test)]
mod takeover;
#[cfg(test)]
mod talk;
