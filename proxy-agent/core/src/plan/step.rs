//! One write to one table.

use std::sync::Arc;

use proxy_common::abi::{Backend, Config, Frontend, FrontendKey, Iface, RouteKey, ServiceName, SourceKey};
use proxy_common::addr::Addr;

/// One write or delete. Applying it twice is the same as applying it once.
///
/// A plan may have hundreds of thousands of them, nearly all for slots, backends and frontends: the two values that are
/// far larger than those live elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write CONFIG.
    PutConfig(Box<Config>),
    /// Write an entry of IFACES.
    PutIface(u32, Iface),
    /// Delete an entry of IFACES.
    DeleteIface(u32),
    /// Write an entry of MASQUERADE.
    PutRoute(RouteKey, Addr),
    /// Delete an entry of MASQUERADE.
    DeleteRoute(RouteKey),
    /// Write a word of SERVICE_PORTS: 64 ports.
    PutServicePorts(u32, u64),
    /// Write an entry of SERVICES.
    PutService(u32, Arc<ServiceName>),
    /// Delete an entry of SERVICES.
    DeleteService(u32),
    /// Write an entry of BACKENDS (a retired one is written, too: it keeps its generation).
    PutBackend(u32, Backend),
    /// Write an entry of SLOTS.
    PutSlot(u32, u32),
    /// Write an entry of SOURCES.
    PutSource(SourceKey),
    /// Delete an entry of SOURCES.
    DeleteSource(SourceKey),
    /// Write an entry of FRONTENDS.
    PutFrontend(FrontendKey, Frontend),
    /// Delete an entry of FRONTENDS.
    DeleteFrontend(FrontendKey),
    /// Write an entry of ADDRESSES.
    PutAddress(Addr, u32),
    /// Delete an entry of ADDRESSES.
    DeleteAddress(Addr),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_no_larger_than_a_frontend_and_its_key() {
        let frontend = size_of::<FrontendKey>() + size_of::<Frontend>();
        assert!(size_of::<Step>() <= frontend + align_of::<Step>(), "{} bytes", size_of::<Step>());
    }
}
