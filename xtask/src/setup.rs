//! Makes a machine ready, and does nothing twice.
//!
//! Two ways to a BPF toolchain: a rustup toolchain with rust-src and a bpf-linker that are there already are
//! used as they are; on Debian and Ubuntu the distribution's rustc comes with core's source, and bpf-linker is
//! compiled against the LLVM of the same distribution. Either way nothing of the user's own Rust changes: what is
//! compiled goes to a folder of its own in the user's cache ([`workspace::tool_dir`]).

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    cmd,
    toolchain::{self, BPF_LINKER, CARGO_DENY, LLVM, Linker, OLDEST_RUSTC, Rustc, Toolchain},
    workspace,
};

/// What to do.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only say what is missing; exit with 1 if anything is.
    #[arg(long)]
    check: bool,
}

/// Something that is not on this machine.
#[derive(Debug, PartialEq, Eq)]
enum Missing {
    /// Some rustc with core's source.
    CoreSource,
    /// bpf-linker.
    BpfLinker,
    /// A program that a package of the distribution brings.
    Program { name: &'static str, package: &'static str },
    /// cargo-deny, for `cargo xtask check`.
    CargoDeny,
}

/// What tests, demo and release call, with the package it comes in.
const PROGRAMS: [(&str, &str); 13] = [
    ("git", "git"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("nft", "nftables"),
    ("iptables-nft", "iptables"),
    ("iptables-legacy", "iptables"),
    ("ipset", "ipset"),
    ("ipvsadm", "ipvsadm"),
    ("bpftool", "bpftool"),
    ("ethtool", "ethtool"),
    ("setpriv", "util-linux"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("xz", "xz-utils"),
];

/// `cargo xtask setup`
pub(crate) fn run(args: &Args) -> Result<()> {
    let missing = missing();
    for what in &missing {
        println!("missing: {}", what.described());
    }
    if missing.is_empty() {
        return say_ready();
    }
    if args.check {
        bail!("{} missing; run: cargo xtask setup", missing.len());
    }
    install(&missing)?;
    let left = self::missing();
    if let Some(what) = left.first() {
        bail!("still missing after the installation: {}", what.described());
    }
    say_ready()
}

fn say_ready() -> Result<()> {
    let Toolchain { rustc, linker } = Toolchain::find()?;
    println!("rustc with core's source: {} ({})", rustc.version, rustc.path.display());
    println!("bpf-linker: {} ({})", linker.version, linker.path.display());
    println!("ready: cargo xtask demo, cargo xtask test");
    Ok(())
}

fn missing() -> Vec<Missing> {
    // A linker of an older LLVM that no compiler here fits is as good as none: ours goes before it.
    let usable = |linker: &Linker| {
        linker.llvm.is_none_or(|llvm| llvm >= LLVM) || Rustc::find_for(linker.llvm).is_some()
    };
    let linker = Linker::find().filter(usable);
    // Without a linker, look for a compiler that fits the one we would install.
    let llvm = linker.as_ref().map_or(Some(LLVM), |linker| linker.llvm);
    let rustc = Rustc::find_for(llvm).is_none().then_some(Missing::CoreSource);
    let linker = linker.is_none().then_some(Missing::BpfLinker);
    let programs = PROGRAMS
        .into_iter()
        .filter(|(name, _)| cmd::find(name, &[]).is_none())
        .map(|(name, package)| Missing::Program { name, package });
    let deny = cargo_deny().is_none().then_some(Missing::CargoDeny);
    rustc.into_iter().chain(linker).chain(programs).chain(deny).collect()
}

/// cargo-deny, if it is new enough.
pub(crate) fn cargo_deny() -> Option<PathBuf> {
    let path = cmd::find("cargo-deny", &workspace::tool_places(&cargo_deny_name()))?;
    let version = toolchain::tool_version(&path, &["--version"])?;
    toolchain::at_least(&version, CARGO_DENY).then_some(path)
}

fn cargo_deny_name() -> String {
    format!("cargo-deny-{CARGO_DENY}")
}

fn install(missing: &[Missing]) -> Result<()> {
    let packages = packages(missing);
    if !packages.is_empty() {
        apt_install(&packages)?;
    }
    for what in missing {
        match what {
            Missing::BpfLinker => cargo_install(
                &Linker::name(),
                &["bpf-linker", "--version", BPF_LINKER, "--no-default-features", "--features"],
                Some(format!("llvm-{LLVM}")),
            )?,
            Missing::CargoDeny => {
                cargo_install(&cargo_deny_name(), &["cargo-deny", "--version", CARGO_DENY], None)?;
            }
            Missing::CoreSource | Missing::Program { .. } => (),
        }
    }
    Ok(())
}

/// The packages of Debian and Ubuntu that bring what is missing (or what is needed to compile it).
fn packages(missing: &[Missing]) -> Vec<String> {
    let mut packages = Vec::new();
    for what in missing {
        match what {
            // Debian keeps a current compiler for its browsers, in stable releases too.
            Missing::CoreSource => packages.extend(["rustc-web", "rust-web-src"].map(str::to_owned)),
            Missing::BpfLinker => {
                packages.extend([format!("llvm-{LLVM}-dev"), format!("libpolly-{LLVM}-dev")]);
                packages.extend(["libzstd-dev", "zlib1g-dev", "g++"].map(str::to_owned));
            }
            Missing::Program { package, .. } if packages.iter().any(|known| known == package) => (),
            Missing::Program { package, .. } => packages.push((*package).to_owned()),
            Missing::CargoDeny => (),
        }
    }
    packages
}

fn apt_install(packages: &[String]) -> Result<()> {
    let list = packages.join(" ");
    if cmd::find("apt-get", &[]).is_none() {
        bail!(
            "this machine has no apt-get: install what was named above (Debian calls it {list}), or a rustup \
             toolchain with rust-src ({OLDEST_RUSTC} or newer, LLVM {LLVM} or older) and bpf-linker {BPF_LINKER}"
        );
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    if !cmd::is_root() {
        bail!("packages need root; run: sudo apt-get install --yes {list} && cargo xtask setup");
    }
    cmd::run(apt().args(["update", "--quiet"]))?;
    for package in packages {
        if !is_offered(package)? {
            bail!(
                "this release has no package {package}; instead run: rustup component add rust-src --toolchain \
                 nightly, and cargo install bpf-linker --version {BPF_LINKER}"
            );
        }
    }
    cmd::run(apt().args(["install", "--quiet", "--yes", "--no-install-recommends"]).args(packages))
}

/// Whether the package can be installed; for the compiler, also whether it is new enough.
fn is_offered(package: &str) -> Result<bool> {
    let policy = cmd::output(&mut cmd::with("apt-cache", ["policy", package]))?;
    let candidate = candidate(&policy).filter(|version| *version != "(none)");
    Ok(match package {
        "rustc-web" | "rust-web-src" => {
            candidate.is_some_and(|version| toolchain::at_least(version, OLDEST_RUSTC))
        }
        _ => candidate.is_some(),
    })
}

fn candidate(policy: &str) -> Option<&str> {
    policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))
}

fn cargo_install(name: &str, what: &[&str], feature: Option<String>) -> Result<()> {
    let folder = workspace::tool_dir(name);
    std::fs::create_dir_all(&folder).with_context(|| format!("could not create {}", folder.display()))?;
    let mut command = cmd::cargo();
    command
        .arg("install")
        .args(what)
        .args(feature)
        .args(["--locked", "--root"])
        .arg(&folder)
        // Away from the workspace: its settings are not the tool's.
        .current_dir(&folder)
        .env("LLVM_PREFIX", llvm_prefix())
        // They run for seconds: what takes long in bpf-linker is LLVM, which comes compiled.
        .envs([("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"), ("CARGO_PROFILE_RELEASE_LTO", "off")]);
    cmd::run(&mut command)
}

/// Where Debian puts the LLVM that bpf-linker is built with.
fn llvm_prefix() -> String {
    format!("/usr/lib/llvm-{LLVM}")
}

impl Missing {
    fn described(&self) -> String {
        match self {
            Self::CoreSource => {
                format!("a rustc ({OLDEST_RUSTC} or newer) with the source of core, for kernel programs")
            }
            Self::BpfLinker => format!("bpf-linker {BPF_LINKER} or newer, for kernel programs"),
            Self::Program { name, package } => format!("{name} (package {package}), for tests and demo"),
            Self::CargoDeny => format!("cargo-deny {CARGO_DENY} or newer, for cargo xtask check"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_is_installed() {
        assert_eq!(packages(&[]), [""; 0]);
        assert_eq!(packages(&[Missing::CargoDeny]), [""; 0]);
        let nft = Missing::Program { name: "nft", package: "nftables" };
        assert_eq!(packages(&[Missing::CoreSource, nft]), ["rustc-web", "rust-web-src", "nftables"]);
        assert!(packages(&[Missing::BpfLinker]).contains(&"llvm-22-dev".to_owned()));
    }

    #[test]
    fn the_version_on_offer_is_read_from_apt() {
        let policy =
            "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n  Version table:\n";
        let candidate = candidate(policy).unwrap();
        assert_eq!(candidate, "1.96.0+dfsg1-1~deb12u2");
        assert!(toolchain::at_least(candidate, OLDEST_RUSTC));
    }
}
