//! A network namespace as a value: named, entered by a thread or a process, gone on drop.
//!
//! The name stands under /run/netns, so `ip netns exec <name>` works while a test is being looked at. Namespaces
//! belong to threads: code runs in one on a fresh thread that ends with it, so that no thread of the test is ever
//! left in the wrong place.

use std::fs::File;
use std::io::Write;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// Where `ip netns` keeps its names.
pub const DIRECTORY: &str = "/run/netns";

/// A network namespace. Dropping it removes the name; the kernel removes the rest when nobody is in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
}

impl Netns {
    /// A new namespace called `<unique>-<label>`, with `lo` up.
    pub fn new(label: &str) -> Result<Self> {
        Self::named(format!("{}-{label}", crate::unique()))
    }

    /// A new namespace with exactly this name, with `lo` up and no waiting for duplicate addresses.
    pub fn named(name: String) -> Result<Self> {
        crate::sweep::once();
        let path = Path::new(DIRECTORY).join(&name);
        std::fs::create_dir_all(DIRECTORY).with_context(|| format!("making {DIRECTORY}"))?;
        File::create_new(&path).with_context(|| format!("making {}", path.display()))?;
        let made = std::thread::scope(|scope| scope.spawn(|| pin_new(&path)).join());
        let pinned =
            made.map_err(|_| anyhow::anyhow!("the thread that makes namespace {name} panicked")).flatten();
        let file = match pinned.and_then(|()| Ok(File::open(&path)?)) {
            Ok(file) => file,
            Err(error) => {
                remove(&path);
                return Err(error.context(format!("making network namespace {name}")));
            }
        };
        let netns = Self { name, file };
        netns.sysctls(&[
            ("ipv6/conf/all/disable_ipv6", "0"),
            ("ipv6/conf/default/disable_ipv6", "0"),
            ("ipv6/conf/all/accept_dad", "0"),
            ("ipv6/conf/default/accept_dad", "0"),
        ])?;
        netns.ip("link set lo up\n")?;
        Ok(netns)
    }

    /// Its name for `ip netns exec`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its name stands.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// The open namespace, for `setns`.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Runs `work` on a fresh thread inside the namespace; a panic in it goes on in the caller.
    pub fn run_in<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let entered = scope.spawn(|| {
                setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("entering network namespace {}", self.name))
                    .map(|()| work())
            });
            entered.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Writes values to `/proc/sys/net/<key>`, which shows the namespace of the thread that opens it.
    pub fn sysctls(&self, settings: &[(&str, &str)]) -> Result<()> {
        let write = || {
            settings.iter().try_for_each(|(key, value)| {
                let path = format!("/proc/sys/net/{key}");
                std::fs::write(&path, value).with_context(|| format!("writing {value} to {path}"))
            })
        };
        self.run_in(write)?.with_context(|| format!("in network namespace {}", self.name))
    }

    /// Runs a batch of `ip` commands (one a line, without the word `ip`) in the namespace.
    pub fn ip(&self, batch: &str) -> Result<()> {
        self.batch("ip", batch)
    }

    /// Runs a batch of `bridge` commands (one a line, without the word `bridge`) in the namespace.
    pub fn bridge(&self, batch: &str) -> Result<()> {
        self.batch("bridge", batch)
    }

    /// Runs a batch of `tc` commands (one a line, without the word `tc`) in the namespace.
    pub fn tc(&self, batch: &str) -> Result<()> {
        self.batch("tc", batch)
    }

    fn batch(&self, program: &str, batch: &str) -> Result<()> {
        let mut command = Command::new(program);
        command.args(["-n", &self.name, "-batch", "-"]);
        feed(command, batch)
            .with_context(|| format!("{program} in network namespace {}:\n{batch}", self.name))
    }

    /// Loads nftables rules in the namespace, all of them or none.
    pub fn nft(&self, rules: &str) -> Result<()> {
        let mut command = Command::new("nft");
        command.args(["-f", "-"]);
        self.run_in(|| feed(command, rules))?
            .with_context(|| format!("nft in network namespace {}:\n{rules}", self.name))
    }

    /// Joins two namespaces with one more veth pair: the name of its end here, and of that there. Both are up.
    pub fn join(&self, own: &str, other: &Self, theirs: &str) -> Result<()> {
        self.ip(&format!(
            "link add {own} type veth peer name {theirs} netns {}\nlink set {own} up\n",
            other.name
        ))?;
        other.ip(&format!("link set {theirs} up\n"))
    }

    /// The Ethernet address of an interface.
    pub fn mac(&self, interface: &str) -> Result<[u8; 6]> {
        let output = self.output("ip", &["-json", "link", "show", interface])?;
        let links: serde_json::Value = serde_json::from_str(&output).with_context(|| output.clone())?;
        let text = links[0]["address"].as_str().with_context(|| output.clone())?;
        let bytes: Vec<u8> = text.split(':').map_while(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        bytes.try_into().map_err(|_| anyhow::anyhow!("{interface} has no Ethernet address: {output}"))
    }

    /// Runs a program of iproute2 and the like in the namespace; its output.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = self
            .run_in(|| Command::new(program).args(arguments).stdin(Stdio::null()).output())?
            .with_context(|| format!("running {program} in {}", self.name))?;
        ensure!(
            output.status.success(),
            "{program} {arguments:?} in {}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A listening socket in the namespace, to be served from any thread.
    pub fn listen(&self, address: std::net::SocketAddr) -> Result<TcpListener> {
        self.run_in(|| TcpListener::bind(address))?
            .with_context(|| format!("listening on {address} in {}", self.name))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if crate::keep() {
            crate::say(&format!("kept: ip netns exec {} bash", self.name));
        } else {
            remove(&self.path());
        }
    }
}

/// Takes a name away, whether a namespace is mounted on it or not.
pub(crate) fn remove(path: &Path) {
    // An error means that somebody else was quicker, or that nothing was mounted there.
    umount2(path, MntFlags::MNT_DETACH).ok();
    std::fs::remove_file(path).ok();
}

fn pin_new(path: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET)")?;
    mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("mounting the namespace on {}", path.display()))
}

fn feed(mut command: Command, input: &str) -> Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("running it (iproute2 and nftables are needed)")?;
    let written = child.stdin.take().context("its stdin")?.write_all(input.as_bytes());
    let output = child.wait_with_output().context("waiting for it")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    written.context("writing to it")
}
