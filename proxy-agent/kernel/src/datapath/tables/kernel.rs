//! The configuration tables in the kernel: read whole at start, then written step by step.

use std::net::IpAddr;
use std::time::Duration;

use proxy_common::abi::config::{LEAVE_MIDDLE, LEAVE_NEW};
use proxy_common::abi::{
    Backend, Config, Frontend, FrontendKey, Iface, RouteKey, ServiceName, SourceKey, maps, untext,
};
use proxy_common::addr::Addr;

use super::address_bits::AddressBits;
use crate::datapath::store::pin::BpfRoot;
use crate::datapath::store::table::{Table, TableError};
use crate::sys;
use agent_core::datapath::Datapath;
use agent_core::plan::{Actual, GRACE_MS, Step};

/// What a step of one kind says; nothing of the others.
macro_rules! part {
    ($step:pat => $said:expr) => {
        |step: &Step| match step {
            $step => Some($said),
            _ => None,
        }
    };
}

/// Why the tables could not be read or written.
pub type KernelError = TableError;

/// The pinned configuration tables.
#[derive(Debug)]
pub struct Kernel {
    pub(crate) frontends: Table<FrontendKey, Frontend>,
    pub(crate) slots: Table<u32, u32>,
    pub(crate) backends: Table<u32, Backend>,
    pub(crate) addresses: Table<Addr, u32>,
    pub(crate) address_bits: AddressBits,
    pub(crate) endpoint_bits: AddressBits,
    pub(crate) sources: Table<SourceKey, u32>,
    pub(crate) ifaces: Table<u32, Iface>,
    pub(crate) routes: Table<RouteKey, Addr>,
    pub(crate) service_ports: Table<u32, u64>,
    pub(crate) config: Table<u32, Config>,
    pub(crate) services: Table<u32, ServiceName>,
    /// How often the tries have been written to.
    pub(crate) writes: u64,
    /// Endpoints or masquerade addresses have come that were not there before.
    news: bool,
}

/// The value of every source range: only its being there counts.
pub(crate) const LISTED: u32 = 1;

impl Kernel {
    /// Opens what is pinned under `root`.
    pub fn open(root: &BpfRoot) -> Result<Self, KernelError> {
        Ok(Self {
            frontends: Table::open(root, maps::FRONTENDS)?,
            slots: Table::open(root, maps::SLOTS)?,
            backends: Table::open(root, maps::BACKENDS)?,
            addresses: Table::open(root, maps::ADDRESSES)?,
            address_bits: AddressBits::open(root, maps::ADDRESS_BITS, 1_024)?,
            // To count them takes a walk through BACKENDS, and bits too many cost less.
            endpoint_bits: AddressBits::open(root, maps::ENDPOINT_BITS, 16_384)?,
            sources: Table::open(root, maps::SOURCES)?,
            ifaces: Table::open(root, maps::IFACES)?,
            routes: Table::open(root, maps::MASQUERADE)?,
            service_ports: Table::open(root, maps::SERVICE_PORTS)?,
            config: Table::open(root, maps::CONFIG)?,
            services: Table::open(root, maps::SERVICES)?,
            writes: 0,
            news: false,
        })
    }

    /// Reads every configuration table.
    pub fn actual(&self) -> Result<Actual, KernelError> {
        let mut actual = Actual::default();
        self.frontends.scan(|key, value| {
            actual.frontends.insert(key, value);
        })?;
        self.slots.scan(|slot, backend| {
            actual.slots.insert(slot, backend);
        })?;
        self.backends.scan(|index, backend| {
            actual.backends.insert(index, backend);
        })?;
        self.addresses.scan(|addr, flags| {
            actual.addresses.insert(addr, flags);
        })?;
        self.sources.scan(|key, _| {
            actual.sources.insert(key);
        })?;
        self.services.scan(|id, name| {
            actual.services.insert(id, name.into());
        })?;
        self.ifaces.scan(|index, iface| {
            actual.ifaces.insert(index, iface);
        })?;
        self.routes.scan(|key, source| {
            actual.routes.insert(key, source);
        })?;
        self.service_ports.scan(|word, bits| {
            actual.service_ports.insert(word, bits);
        })?;
        // An array of one is all zeros before its first write, which no written configuration is.
        if let Some(config) = self.config.get(&0)?.filter(|config| !is_zero(config)) {
            actual.config = config;
        }
        Ok(actual)
    }

    /// Leaves what is new to another proxy, by the settings alone: without an agent that plans, or before it does.
    pub fn leave_new(&self) -> Result<(), KernelError> {
        let mut config = self.config.get(&0)?.unwrap_or(Config::EMPTY);
        config.flags |= LEAVE_NEW | LEAVE_MIDDLE;
        // The other proxy may serve addresses there that are not known here.
        config.service_range_count = 0;
        self.config.put(&0, &config)
    }

    /// Entries that fit each configuration table.
    #[must_use]
    pub fn sizes(&self) -> Vec<(&'static str, u32)> {
        vec![
            (self.frontends.name(), self.frontends.max()),
            (self.slots.name(), self.slots.max()),
            (self.backends.name(), self.backends.max()),
            (self.addresses.name(), self.addresses.max()),
            (self.sources.name(), self.sources.max()),
            (self.ifaces.name(), self.ifaces.max()),
            (self.routes.name(), self.routes.max()),
            (self.services.name(), self.services.max()),
        ]
    }

    /// Whether endpoints or masquerade addresses have come since this was last asked.
    pub fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// Does steps of one kind, which the caller has found to stand together. How many of them were done
    /// comes with an error.
    fn apply_run(&mut self, run: &[Step]) -> Result<(), (usize, KernelError)> {
        let Some(first) = run.first() else { return Ok(()) };
        let of_trie = matches!(
            first,
            Step::PutRoute(..) | Step::DeleteRoute(_) | Step::PutSource(_) | Step::DeleteSource(_)
        );
        self.writes += u64::from(of_trie);
        match first {
            Step::PutConfig(_) => put(&self.config, run, part!(Step::PutConfig(config) => (0, **config))),
            Step::PutIface(..) => {
                put(&self.ifaces, run, part!(Step::PutIface(index, iface) => (*index, *iface)))
            }
            Step::DeleteIface(_) => delete(&self.ifaces, run, part!(Step::DeleteIface(index) => *index)),
            Step::PutRoute(..) => {
                self.news = true;
                put(&self.routes, run, part!(Step::PutRoute(key, source) => (*key, *source)))
            }
            Step::DeleteRoute(_) => delete(&self.routes, run, part!(Step::DeleteRoute(key) => *key)),
            Step::PutServicePorts(..) => {
                put(&self.service_ports, run, part!(Step::PutServicePorts(word, bits) => (*word, *bits)))
            }
            Step::PutService(..) => {
                put(&self.services, run, part!(Step::PutService(id, name) => (*id, **name)))
            }
            Step::DeleteService(_) => delete(&self.services, run, part!(Step::DeleteService(id) => *id)),
            Step::PutBackend(..) => {
                let part = part!(Step::PutBackend(index, backend) => (*index, *backend));
                let backends = || run.iter().filter_map(part).map(|(_, backend)| backend);
                let added = self.endpoint_bits.add(backends().filter(Backend::is_live).map(|live| live.addr));
                self.news |= added.map_err(|error| (0, error))?;
                put(&self.backends, run, part)?;
                let due = self.endpoint_bits.lose(backends().filter(|backend| !backend.is_live()).count());
                if due && let Err(error) = self.count_endpoints() {
                    tracing::warn!("bits of endpoints that have gone stay for now: {error}");
                }
                Ok(())
            }
            Step::PutSlot(..) => {
                put(&self.slots, run, part!(Step::PutSlot(slot, backend) => (*slot, *backend)))
            }
            Step::PutSource(_) => put(&self.sources, run, part!(Step::PutSource(key) => (*key, LISTED))),
            Step::DeleteSource(_) => delete(&self.sources, run, part!(Step::DeleteSource(key) => *key)),
            Step::PutFrontend(..) => {
                put(&self.frontends, run, part!(Step::PutFrontend(key, frontend) => (*key, *frontend)))
            }
            Step::DeleteFrontend(_) => delete(&self.frontends, run, part!(Step::DeleteFrontend(key) => *key)),
            Step::PutAddress(..) => {
                let part = part!(Step::PutAddress(addr, flags) => (*addr, *flags));
                let added = self.address_bits.add(run.iter().filter_map(part).map(|(addr, _)| addr));
                added.map_err(|error| (0, error))?;
                put(&self.addresses, run, part)
            }
            Step::DeleteAddress(_) => {
                delete(&self.addresses, run, part!(Step::DeleteAddress(addr) => *addr))?;
                let due = self.address_bits.lose(run.len());
                // Bits too many do no harm, so an error only means that they are counted another time.
                if due && let Err(error) = self.count_addresses() {
                    tracing::warn!("bits of addresses that have gone stay for now: {error}");
                }
                Ok(())
            }
        }
    }

    fn count_endpoints(&mut self) -> Result<(), KernelError> {
        let mut endpoints = Vec::new();
        self.backends.scan(|_, backend| {
            if backend.is_live() {
                endpoints.push(backend.addr);
            }
        })?;
        self.endpoint_bits.count(endpoints.iter())
    }

    fn count_addresses(&mut self) -> Result<(), KernelError> {
        let mut addresses = Vec::new();
        self.addresses.scan(|addr, _| addresses.push(addr))?;
        self.address_bits.count(addresses.iter())
    }
}

/// Whether an element of an array was never written.
fn is_zero<T: aya::Pod + PartialEq>(value: &T) -> bool {
    sys::zeros::<T>(1).first() == Some(value)
}

impl Datapath for Kernel {
    type Error = KernelError;

    fn read(&mut self) -> Result<Actual, KernelError> {
        let actual = self.actual()?;
        self.address_bits.count(actual.addresses.keys())?;
        let live = actual.backends.values().filter(|backend| backend.is_live());
        self.endpoint_bits.count(live.map(|backend| &backend.addr))?;
        // Where there never was a backend nothing can be followed.
        if !actual.backends.is_empty() && sys::wait_for_grace().is_err() {
            // It fails with `nohz_full`.
            std::thread::sleep(Duration::from_millis(GRACE_MS));
        }
        Ok(actual)
    }

    fn apply(&mut self, steps: &[Step]) -> Result<(), (usize, KernelError)> {
        let mut done = 0;
        // Steps of one kind that stand together go to one table in one batch, in their order.
        for run in steps.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
            self.apply_run(run).map_err(|(more, error)| (done + more, error))?;
            done += run.len();
        }
        Ok(())
    }
}

/// The entries that `part` takes out of a run; all its steps are of one kind, so none is lost.
fn put<K, V>(
    table: &Table<K, V>,
    run: &[Step],
    part: impl Fn(&Step) -> Option<(K, V)>,
) -> Result<(), (usize, KernelError)>
where
    K: aya::Pod + std::fmt::Debug,
    V: aya::Pod,
{
    let (keys, values): (Vec<K>, Vec<V>) = run.iter().filter_map(part).unzip();
    table.put_many(&keys, &values).map_err(|(done, error)| (done, say(error, run.get(done))))
}

fn delete<K, V>(
    table: &Table<K, V>,
    run: &[Step],
    part: impl Fn(&Step) -> Option<K>,
) -> Result<(), (usize, KernelError)>
where
    K: aya::Pod + std::fmt::Debug,
    V: aya::Pod,
{
    let keys: Vec<K> = run.iter().filter_map(part).collect();
    table.delete_many(&keys).map(drop).map_err(|(done, error)| (done, say(error, run.get(done))))
}

/// The error with its object in words.
fn say(error: KernelError, step: Option<&Step>) -> KernelError {
    let Some(step) = step else { return error };
    match error {
        TableError::Full { map, max, .. } => TableError::Full { map, max, object: object(step) },
        TableError::Call { act, map, source, .. } => {
            TableError::Call { act, object: object(step), map, source }
        }
        other @ (TableError::Open { .. } | TableError::Layout { .. }) => other,
    }
}

/// What a step is about, for a person.
fn object(step: &Step) -> String {
    match step {
        Step::PutConfig(_) => "the settings".into(),
        Step::PutIface(index, _) | Step::DeleteIface(index) => format!("interface {index}"),
        Step::PutRoute(key, _) | Step::DeleteRoute(key) => {
            format!("route to {}/{} by interface {}", key.dst, key.bits(), u32::from_be(key.ifindex))
        }
        Step::PutServicePorts(word, _) => format!("Service ports from {}", word * 64),
        Step::PutService(id, name) => format!(
            "Service {}/{} port {:?} (id {id})",
            untext(&name.namespace),
            untext(&name.name),
            untext(&name.port)
        ),
        Step::DeleteService(id) => format!("Service id {id}"),
        Step::PutBackend(index, backend) => {
            format!("endpoint {}:{} (index {index})", backend.addr, backend.port)
        }
        Step::PutSlot(slot, backend) => format!("slot {slot} of endpoint index {backend}"),
        Step::PutSource(key) | Step::DeleteSource(key) => {
            let mapped = if key.addr.is_v4() { 96 } else { 0 };
            let bits = key.prefix_len.saturating_sub(32 + mapped);
            format!("source range {}/{bits} of Service id {}", key.addr, u32::from_be(key.service))
        }
        Step::PutFrontend(key, _) | Step::DeleteFrontend(key) => {
            format!("{}/{}", std::net::SocketAddr::new(IpAddr::from(key.addr), key.port.number()), key.proto)
        }
        Step::PutAddress(addr, _) | Step::DeleteAddress(addr) => format!("address {addr}"),
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::text;
    use proxy_common::addr::{Port, Proto};

    use super::*;

    #[test]
    fn an_error_names_its_object_in_words_of_the_operator() {
        let key = FrontendKey::new(Addr::from(IpAddr::from([10, 96, 0, 1])), Port::new(80), Proto::TCP);
        assert_eq!(object(&Step::DeleteFrontend(key)), "10.96.0.1:80/TCP");
        let range = SourceKey::range(7, Addr::from(IpAddr::from([10, 0, 0, 0])), 8);
        assert_eq!(object(&Step::PutSource(range)), "source range 10.0.0.0/8 of Service id 7");
        let name = ServiceName {
            namespace: text("default"),
            name: text("web"),
            port: text("http"),
            proto: Proto::TCP,
            family: 4,
            pad: [0; 2],
        };
        assert_eq!(object(&Step::PutService(3, name.into())), "Service default/web port \"http\" (id 3)");
        let full = TableError::Full { map: maps::SERVICES, max: 2, object: "3".into() };
        let said = say(full, Some(&Step::PutService(3, name.into()))).to_string();
        assert!(said.contains("default/web") && said.contains("--max-services"), "{said}");
    }
}
