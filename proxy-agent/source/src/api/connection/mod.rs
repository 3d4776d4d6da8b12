//! The connection to the API server: which server, with which credentials, and what happens when it does not answer.

mod body;
mod client_config;
mod connector;
mod error;
mod exec_plugin;
mod probe;
mod requests;
mod servers;
mod tls;
mod transport;

pub(super) use body::BodyError;
pub use client_config::ClientConfig;
pub(super) use client_config::Loaded;
pub use error::Error;
pub(super) use probe::run as probe;
pub use requests::Requests;
pub(super) use servers::{Origin, Servers};
pub(super) use transport::{Transport, with_responder, with_root_cause};
