//! The real agent on the real kernel: what users would see.

#[cfg(test)]
mod account;
#[cfg(test)]
mod adopted;
#[cfg(test)]
mod api_scene;
#[cfg(test)]
mod api_server;
#[cfg(test)]
mod api_silence;
#[cfg(test)]
mod api_trouble;
#[cfg(test)]
mod api_way;
#[cfg(test)]
mod bad_objects;
#[cfg(test)]
mod basics;
#[cfg(test)]
mod chaos;
#[cfg(test)]
mod cleanup;
#[cfg(test)]
mod commands;
#[cfg(test)]
mod common;
#[cfg(test)]
mod configuration;
#[cfg(test)]
mod directory;
#[cfg(test)]
mod dsr;
#[cfg(test)]
mod endpoint_loss;
#[cfg(test)]
mod errors;
#[cfg(test)]
mod events;
#[cfg(test)]
mod flood;
#[cfg(test)]
mod follow;
#[cfg(test)]
mod frozen;
#[cfg(test)]
mod growth;
mod growth_traffic;
#[cfg(test)]
mod hairpin;
#[cfg(test)]
mod health;
#[cfg(test)]
mod kube_proxy;
#[cfg(test)]
mod kubeconfig;
#[cfg(test)]
mod large;
#[cfg(test)]
mod life;
#[cfg(test)]
mod loadbalancer;
#[cfg(test)]
mod local_trouble;
#[cfg(test)]
mod localhost;
#[cfg(test)]
mod metrics;
#[cfg(test)]
mod node;
#[cfg(test)]
mod nodeport;
#[cfg(test)]
mod packets;
#[cfg(test)]
mod reject;
#[cfg(test)]
mod repair;
#[cfg(test)]
mod restart;
#[cfg(test)]
mod rights;
#[cfg(test)]
mod scene;
#[cfg(test)]
mod service_health;
#[cfg(test)]
mod socket_storage;
mod sockets;
#[cfg(test)]
mod sources;
#[cfg(test)]
mod updates;
mod xdp;
