//! The virtual machine: file systems, modules, its kernel's log, its end.

use std::ffi::CStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

/// Where the modules lie, and the order in which they can be loaded.
const MODULES: &str = "/modules";
const ORDER: &str = "/modules/order";

/// File systems: type and place. bpffs is missing on purpose: the agent mounts its own.
const MOUNTS: [(&str, &str); 7] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("tracefs", "/sys/kernel/tracing"),
    ("cgroup2", "/sys/fs/cgroup"),
];

pub(crate) fn mount_file_systems() -> Result<()> {
    for (kind, place) in MOUNTS {
        // The kernel may have mounted /dev itself; tracing is not in every kernel, and only of use in a failure.
        match mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>) {
            Ok(()) | Err(Errno::EBUSY) => {}
            Err(Errno::ENOENT | Errno::ENODEV) if kind == "tracefs" => {}
            Err(error) => return Err(error).with_context(|| format!("mounting {kind} on {place}")),
        }
    }
    Ok(())
}

/// Keeps the kernel's ordinary messages off the console, where they could get into the middle of a line of ours.
/// While it boots they are welcome: they say where it has got to if it stops.
pub(crate) fn quieten() -> Result<()> {
    const PATH: &str = "/proc/sys/kernel/printk";
    std::fs::write(PATH, "4").with_context(|| format!("writing {PATH}"))
}

/// Loads every module that was packed, each after those that it needs.
pub(crate) fn load_modules() -> Result<()> {
    let order = std::fs::read_to_string(ORDER).with_context(|| format!("reading {ORDER}"))?;
    for name in order.lines() {
        let path = Path::new(MODULES).join(name);
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let no_parameters: &CStr = c"";
        match finit_module(file, no_parameters, ModuleInitFlags::empty()) {
            // ENODEV: for other hardware.
            Ok(()) | Err(Errno::EEXIST | Errno::ENODEV) => {}
            Err(error) => return Err(error).with_context(|| format!("loading module {name}")),
        }
    }
    Ok(())
}

/// What the kernel has warned of since it started, a line each.
pub(crate) fn warnings() -> Result<Vec<String>> {
    const PATH: &str = "/dev/kmsg";
    let nonblocking = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let mut log = File::options()
        .read(true)
        .custom_flags(nonblocking)
        .open(PATH)
        .with_context(|| format!("opening {PATH}"))?;
    let mut found = Vec::new();
    let mut record = [0; 8192];
    loop {
        match log.read(&mut record) {
            Ok(0) => return Ok(found),
            Ok(length) => {
                let text = String::from_utf8_lossy(&record[..length]);
                // "priority,number,time,flags;text", then lines of further facts.
                let line =
                    text.lines().next().and_then(|line| line.split_once(';')).map_or("", |(_, line)| line);
                if is_warning(line) {
                    found.push(line.to_owned());
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(found),
            // The record was overwritten while we read: the next one follows.
            Err(error) if error.raw_os_error() == Some(Errno::EPIPE as i32) => {}
            Err(error) => return Err(error).with_context(|| format!("reading {PATH}")),
        }
    }
}

fn is_warning(line: &str) -> bool {
    ["BUG:", "WARNING:", "Oops", "Call Trace", "rcu: INFO:", "soft lockup", "unregister_netdevice: waiting"]
        .iter()
        .any(|sign| line.contains(sign))
}

/// Ends the machine; returns only where that is impossible.
pub(crate) fn switch_off() {
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    println!("\nguest: the machine cannot be switched off: {error}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_says_when_it_is_ill_is_told_from_what_it_always_says() {
        assert!(is_warning("WARNING: CPU: 0 PID: 77 at kernel/bpf/verifier.c:9 do_check+0x1/0x2"));
        assert!(!is_warning("Linux version 6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org)"));
    }
}
