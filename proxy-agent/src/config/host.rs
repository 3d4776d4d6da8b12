//! What the settings ask of the machine: its name, a few files, its environment. A trait, so that tests answer.

use std::io;
use std::path::Path;

use agent_kernel::datapath::probe::netns;

/// The machine as far as settings depend on it.
pub trait Host {
    /// The host name.
    fn hostname(&self) -> io::Result<String>;
    /// A small text file.
    fn read(&self, path: &Path) -> io::Result<String>;
    /// A variable of the environment.
    fn env(&self, name: &str) -> Option<String>;
    /// Cookie of the network namespace we are in; 0 when the kernel does not tell.
    fn netns_cookie(&self) -> u64;
    /// How many CPUs the machine has, whatever this process may use of them.
    fn cpus(&self) -> u64;
}

/// The machine we run on.
#[derive(Clone, Copy, Debug, Default)]
pub struct ThisHost;

impl Host for ThisHost {
    fn hostname(&self) -> io::Result<String> {
        let names = nix::sys::utsname::uname()?;
        let name = names.nodename().to_str();
        name.map(str::to_owned).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
    }

    fn read(&self, path: &Path) -> io::Result<String> {
        std::fs::read_to_string(path)
    }

    fn env(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn netns_cookie(&self) -> u64 {
        netns::cookie().unwrap_or(0)
    }

    fn cpus(&self) -> u64 {
        use nix::unistd::{SysconfVar, sysconf};
        let online = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
        online.and_then(|n| u64::try_from(n).ok()).unwrap_or(1)
    }
}
