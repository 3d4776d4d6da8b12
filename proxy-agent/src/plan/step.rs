//! One write to one table.

use proxy_common::abi::{Backend, Config, Frontend, FrontendKey, Iface, ServiceName, SourceKey};
use proxy_common::addr::Addr;

/// One write or delete. Applying it twice is the same as applying it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write CONFIG.
    PutConfig(Config),
    /// Write an entry of IFACES.
    PutIface(u32, Iface),
    /// Delete an entry of IFACES.
    DeleteIface(u32),
    /// Write an entry of SERVICES.
    PutService(u32, ServiceName),
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
