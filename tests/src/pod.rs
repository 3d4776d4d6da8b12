//! A place where a process can run: a network namespace and a cgroup.

use std::io::{ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

use crate::netns::Netns;
use crate::probe::eventually;

/// How long a program may be busy.
const BUSY: Duration = Duration::from_secs(5);

/// A pod, the host side of a node, or a client: where processes run, and which addresses they have there.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its name in the cluster.
    pub name: String,
    /// The node it is on; `None` for a client outside.
    pub node: Option<String>,
    /// Its network namespace: the node's own for a host-network pod.
    pub netns: Arc<Netns>,
    /// Its cgroup.
    pub cgroup: PathBuf,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// The node's interface that leads to it, when it has one of its own.
    pub host_interface: Option<String>,
}

impl Place {
    /// Its address in the family of `other`.
    #[must_use]
    pub fn address_like(&self, other: IpAddr) -> IpAddr {
        match other {
            IpAddr::V4(_) => self.v4.into(),
            IpAddr::V6(_) => self.v6.into(),
        }
    }

    /// Both addresses.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Both addresses with a port.
    #[must_use]
    pub fn at(&self, port: u16) -> [SocketAddr; 2] {
        self.addresses().map(|address| SocketAddr::new(address, port))
    }

    /// Starts a process here: in the cgroup and the network namespace before its first instruction.
    pub fn spawn(&self, command: Command) -> Result<Child> {
        self.spawn_last(command, || Ok(()))
    }

    /// The same, with this as the last thing that it does before it becomes the program. It may do what can be done
    /// between fork and exec: make system calls, and allocate nothing.
    #[expect(unsafe_code, reason = "a process enters its cgroup and namespace between fork and exec")]
    pub(crate) fn spawn_last(
        &self,
        mut command: Command,
        mut last: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Result<Child> {
        let mut door = crate::cgroup::door(&self.cgroup)?;
        let netns = self.netns.file().try_clone().context("duplicating a namespace's descriptor")?;
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; this closure makes two system
        // calls on descriptors that were opened before, and allocates nothing; nor does `last`.
        unsafe {
            command.pre_exec(move || {
                door.write_all(b"0")?;
                setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)?;
                last()
            });
        }
        // A program or script that was written just now is busy as long as a process that a test beside this one has forked
        // holds it open: until that process becomes another program.
        let started = eventually(BUSY, || match command.spawn() {
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => Err(error.into()),
            started => Ok(started),
        })?;
        started.with_context(|| format!("starting {} in {}", command.get_program().display(), self.name))
    }
}
