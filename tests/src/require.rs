//! What a run needs: root, kernel, cgroup2, the binaries. What is absent fails the run; nothing is skipped.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};

/// Oldest kernel the programs are written for.
const OLDEST_KERNEL: (u32, u32) = (5, 10);

/// Root, a recent kernel and a cgroup2 mount: what every cluster needs.
pub fn world() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "these tests make network namespaces: run them as root");
    kernel()?;
    cgroup2()?;
    Ok(())
}

fn kernel() -> Result<()> {
    let release =
        std::fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's release")?;
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    ensure!(
        version >= OLDEST_KERNEL,
        "kernel {} is too old: {}.{} or later is needed",
        release.trim(),
        OLDEST_KERNEL.0,
        OLDEST_KERNEL.1
    );
    ensure!(
        Path::new("/proc/sys/kernel/unprivileged_bpf_disabled").exists(),
        "this kernel has no bpf(2): CONFIG_BPF_SYSCALL is needed"
    );
    ensure!(
        Path::new("/proc/sys/net/ipv6").exists(),
        "this kernel has no IPv6: the tests are dual-stack, boot without ipv6.disable"
    );
    Ok(())
}

/// Where cgroup v2 is mounted.
pub fn cgroup2() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (target, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(target))
        })
        .context("no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// The agent: `PROXY_AGENT_BIN`, or `proxy-agent` beside the test executable, with its BPF object inside.
pub fn agent_binary() -> Result<PathBuf> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    if let Some(path) = FOUND.get() {
        // Looking into a large program takes its time; tests start many agents.
        return Ok(path.clone());
    }
    let path = binary("PROXY_AGENT_BIN", "proxy-agent", "cargo build -p proxy-agent")?;
    let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    ensure!(
        holds_bpf_object(&bytes),
        "{} has no BPF object inside: run `cargo xtask build-ebpf`, then `cargo build -p proxy-agent`",
        path.display()
    );
    Ok(FOUND.get_or_init(|| path).clone())
}

/// The agent with the made-up next layout of the tables: `PROXY_AGENT_NEXT_BIN`, or `proxy-agent-next` beside the test
/// executable.
pub fn next_agent_binary() -> Result<PathBuf> {
    binary("PROXY_AGENT_NEXT_BIN", "proxy-agent-next", "cargo xtask build-ebpf --next")
}

/// The test-pod program: `PROXY_TESTPOD_BIN`, or `testpod` beside the test executable.
pub fn testpod_binary() -> Result<PathBuf> {
    binary("PROXY_TESTPOD_BIN", "testpod", "cargo build -p proxy-tests --bin testpod")
}

/// The program that runs containers: `PROXY_CONTAINER_BIN`, or `container` beside the test executable.
pub fn container_binary() -> Result<PathBuf> {
    binary("PROXY_CONTAINER_BIN", "container", "cargo build -p proxy-tests --bin container")
}

fn binary(variable: &str, name: &str, remedy: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable).map(PathBuf::from) {
        ensure!(path.is_file(), "{variable} names {}, which is no file", path.display());
        return Ok(path);
    }
    let own = std::env::current_exe().context("finding the test executable")?;
    // Tests lie in target/<profile>/deps, programs in target/<profile>.
    for directory in own.ancestors().skip(1).take(2) {
        let path = directory.join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    bail!("no {name} near {}: run `{remedy}`, or set {variable}", own.display())
}

/// Looks for the header of a 64-bit ELF file for the machine `EM_BPF` (247) inside the program's bytes.
fn holds_bpf_object(bytes: &[u8]) -> bool {
    const EM_BPF: [u8; 2] = 247_u16.to_le_bytes();
    bytes.windows(20).any(|window| window.starts_with(b"\x7fELF\x02") && window[18..20] == EM_BPF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bpf_object_is_found_inside_a_program_and_a_program_alone_is_not_one() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let mut header = [0; 64];
        header[..5].copy_from_slice(b"\x7fELF\x02");
        header[18] = 247;
        assert!(!holds_bpf_object(&own[..4096]));
        assert!(holds_bpf_object(&[&own[..100], &header[..]].concat()));
    }
}
