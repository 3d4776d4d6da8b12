//! What compiles for the kernel: a rustc that has core's source, and bpf-linker. Every pinned version is here.
//!
//! No nightly is needed: any rustc from [`OLDEST_RUSTC`] on will do under `RUSTC_BOOTSTRAP=1`, as long as its
//! sysroot holds the source of `core` and its LLVM is not newer than that of bpf-linker (which reads its bitcode).

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use object::read::elf::ElfFile64;
use semver::Version;

use crate::{cmd, workspace};

/// bpf-linker that `setup` installs, and the oldest one that is accepted.
pub(crate) const BPF_LINKER: &str = "0.13.0";
/// LLVM that `setup` builds bpf-linker with; also part of the names of the Debian packages.
pub(crate) const LLVM: u32 = 22;
/// cargo-deny that `setup` installs, and the oldest one that is accepted.
pub(crate) const CARGO_DENY: &str = "0.20.2";
/// The first rustc that compiles the kernel programs (its BPF target is new enough for aya-ebpf).
pub(crate) const OLDEST_RUSTC: &str = "1.87.0";
/// The kernel programs' target.
pub(crate) const TARGET: &str = "bpfel-unknown-none";
/// The profile of the workspace that they are compiled with.
pub(crate) const PROFILE: &str = "bpf";

/// A pair of tools that fit each other.
#[derive(Debug)]
pub(crate) struct Toolchain {
    pub(crate) rustc: Rustc,
    pub(crate) linker: Linker,
}

/// A compiler with the source of core.
#[derive(Debug)]
pub(crate) struct Rustc {
    pub(crate) path: PathBuf,
    pub(crate) version: String,
    sysroot: PathBuf,
    llvm: u32,
}

/// bpf-linker.
#[derive(Debug)]
pub(crate) struct Linker {
    pub(crate) path: PathBuf,
    pub(crate) version: String,
    /// `None` when LLVM is linked in statically: then it cannot be told.
    pub(crate) llvm: Option<u32>,
}

impl Toolchain {
    /// Finds the tools, or says in one line what to do.
    pub(crate) fn find() -> Result<Self> {
        let Some(linker) = Linker::find() else {
            bail!("no bpf-linker {BPF_LINKER} or newer; run: cargo xtask setup");
        };
        let Some(rustc) = Rustc::find_for(linker.llvm) else {
            bail!("no rustc with the source of core that fits bpf-linker; run: cargo xtask setup");
        };
        Ok(Self { rustc, linker })
    }

    /// A cargo command for the kernel programs, free of what the caller's environment says about host builds.
    pub(crate) fn cargo(&self, subcommand: &str, target_dir: &Path, more_flags: &[&str]) -> Command {
        let own = self.rustc.sysroot.join("bin/cargo");
        let mut command = Command::new(if own.is_file() { own } else { cmd::cargo_path() });
        for (name, _) in std::env::vars_os() {
            if is_about_host_builds(&name.to_string_lossy()) {
                command.env_remove(name);
            }
        }
        command
            .current_dir(workspace::root())
            .args([subcommand, "--package", "proxy-ebpf", "--profile", PROFILE])
            .args(["-Z", "build-std=core", "--target", TARGET, "--target-dir"])
            .arg(target_dir)
            .env("RUSTC", &self.rustc.path)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", self.flags(more_flags));
        command
    }

    fn flags(&self, more: &[&str]) -> OsString {
        let mut linker = OsString::from("-Clinker=");
        linker.push(&self.linker.path);
        let fixed = [
            "-Cpanic=abort",
            "-Cdebuginfo=2",
            // v3 has 32-bit jumps and fetching atomics; generic is v1.
            "-Ctarget-cpu=v3",
            // Working storage lies in one per-CPU value that functions reach by themselves and not by their arguments
            // (see proxy-ebpf/src/scratch.rs): a reference into it does not mean that nobody else reads or writes there.
            "-Zmutable-noalias=no",
            // Type information: the kernel needs it for maps with locks and timers, people for bpftool.
            "-Clink-arg=--btf",
            // What is no subprogram is inlined, closures too, which cannot be told so one by one: a function that is left
            // over gets pointers into frames and working storage that old verifiers do not follow.
            "-Clink-arg=--llvm-args=--inline-threshold=100000",
            // Without it small memset and memcpy become byte loops: three times the instructions to verify.
            "-Clink-arg=--disable-expand-memcpy-in-order",
        ];
        let rest = fixed.iter().chain(more).flat_map(|flag| ["\x1f", flag]);
        rest.for_each(|part| linker.push(part));
        linker
    }
}

/// Whether a variable would leak a setting of host builds (wrappers, flags, targets, profiles) into ours.
fn is_about_host_builds(name: &str) -> bool {
    const EXACT: [&str; 9] = [
        "CARGO",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_INCREMENTAL",
        "CARGO_TARGET_DIR",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTDOCFLAGS",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
    ];
    const PREFIXES: [&str; 4] = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_BPF", "CARGO_PKG_"];
    EXACT.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

impl Rustc {
    /// The first compiler that has core's source and whose LLVM bpf-linker can read.
    pub(crate) fn find_for(linker_llvm: Option<u32>) -> Option<Self> {
        let newest = linker_llvm.unwrap_or(u32::MAX);
        candidates().iter().filter_map(|path| Self::inspect(path).ok()).find(|rustc| rustc.llvm <= newest)
    }

    fn inspect(path: &Path) -> Result<Self> {
        let sysroot = PathBuf::from(cmd::output(&mut clean(path, &["--print", "sysroot"]))?.trim());
        // A rustup toolchain without the component rust-src compiles for the host only.
        if !sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file() {
            bail!("{} has no source of core", path.display());
        }
        let about = cmd::output(&mut clean(path, &["-vV"]))?;
        let version = field(&about, "release:")?;
        if !at_least(&version, OLDEST_RUSTC) {
            bail!("{} is {version}, older than {OLDEST_RUSTC}", path.display());
        }
        let llvm = field(&about, "LLVM version:")?;
        let llvm = llvm.split('.').next().unwrap_or_default().parse().context("odd LLVM version")?;
        Ok(Self { path: path.to_path_buf(), version, sysroot, llvm })
    }

    /// Whether the toolchain can lint as well as compile.
    pub(crate) fn has_clippy(&self) -> bool {
        ["bin/cargo-clippy", "bin/clippy-driver"].iter().all(|tool| self.sysroot.join(tool).is_file())
    }
}

/// The question must reach the compiler named, not the toolchain that rustup's variable names.
fn clean(rustc: &Path, args: &[&str]) -> Command {
    let mut command = cmd::with(rustc, args);
    command.env_remove("RUSTUP_TOOLCHAIN");
    command
}

/// Where a compiler with core's source may be, best first: the one asked for, rustup's, the distribution's.
fn candidates() -> Vec<PathBuf> {
    let asked = std::env::var_os("EBPF_RUSTC").map(PathBuf::from);
    let rustup_home = std::env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".rustup")));
    let toolchains = rustup_home.and_then(|home| std::fs::read_dir(home.join("toolchains")).ok());
    let mut rustup: Vec<PathBuf> =
        toolchains.into_iter().flatten().flatten().map(|entry| entry.path().join("bin/rustc")).collect();
    // `nightly-…` before `stable-…` before a number only because most people add rust-src to nightly.
    rustup.sort_by_key(|path| (!path.to_string_lossy().contains("nightly"), path.clone()));
    let distribution = PathBuf::from("/usr/bin/rustc");
    asked.into_iter().chain(rustup).chain([distribution]).filter(|path| path.is_file()).collect()
}

impl Linker {
    /// What `setup` compiles, with its version and what it is compiled against.
    pub(crate) fn name() -> String {
        format!("bpf-linker-{BPF_LINKER}-llvm{LLVM}")
    }

    /// bpf-linker as `setup` installed it, else from PATH; `EBPF_LINKER` overrides.
    pub(crate) fn find() -> Option<Self> {
        let asked = std::env::var_os("EBPF_LINKER").map(PathBuf::from);
        let path = asked.or_else(|| cmd::find("bpf-linker", &workspace::tool_places(&Self::name())))?;
        let version = tool_version(&path, &["--version"])?;
        let llvm = std::fs::read(&path).ok().and_then(|elf| shared_llvm(&elf));
        at_least(&version, BPF_LINKER).then_some(Self { path, version, llvm })
    }
}

/// The major version of the LLVM library that a program loads, from its list of needed libraries.
fn shared_llvm(elf: &[u8]) -> Option<u32> {
    let file = ElfFile64::<object::Endianness>::parse(elf).ok()?;
    let table = file.elf_dynamic_table().ok()?;
    let needed = table.iter().filter(|entry| entry.tag == object::elf::DT_NEEDED);
    let mut names = needed.filter_map(|entry| table.string(entry).ok());
    names.find_map(|name| llvm_major(std::str::from_utf8(name).ok()?))
}

/// `libLLVM.so.22.1` and `libLLVM-18.so.1` both name their version.
fn llvm_major(library: &str) -> Option<u32> {
    let rest = library.strip_prefix("libLLVM")?;
    rest.split(['.', '-']).find_map(|part| part.parse().ok())
}

/// The second word of what a tool prints about itself.
pub(crate) fn tool_version(path: &Path, args: &[&str]) -> Option<String> {
    let said = cmd::output(&mut cmd::with(path, args)).ok()?;
    said.split_whitespace().nth(1).map(str::to_owned)
}

fn field(text: &str, name: &str) -> Result<String> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    Ok(line.with_context(|| format!("rustc -vV printed no `{name}`"))?.trim().to_owned())
}

/// Whether a version is as new as another; what follows the three numbers (`-nightly`, `+dfsg1`) does not count.
pub(crate) fn at_least(version: &str, wanted: &str) -> bool {
    let numbers = |text: &str| Version::parse(text.split(['-', '+']).next()?).ok();
    numbers(version).zip(numbers(wanted)).is_some_and(|(version, wanted)| version >= wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        for (version, wanted, enough) in [
            ("1.96.0", "1.87.0", true),
            ("1.87.0", "1.87.0", true),
            ("1.100.0-nightly", "1.87.0", true),
            ("1.85.0+dfsg3", "1.87.0", false),
            ("0.9.15", "0.13.0", false),
            ("nonsense", "0.1.0", false),
        ] {
            assert_eq!(at_least(version, wanted), enough, "{version} >= {wanted}");
        }
    }

    #[test]
    fn the_name_of_the_library_tells_the_llvm() {
        assert_eq!(llvm_major("libLLVM.so.22.1"), Some(22));
        assert_eq!(llvm_major("libLLVM-18.so.1"), Some(18));
        assert_eq!(llvm_major("libc.so.6"), None);
    }

    #[test]
    fn settings_of_host_builds_do_not_reach_kernel_builds() {
        for name in [
            "RUSTFLAGS",
            "RUSTC_WRAPPER",
            "CARGO_BUILD_TARGET",
            "CARGO_PROFILE_RELEASE_LTO",
            "RUSTUP_TOOLCHAIN",
        ] {
            assert!(is_about_host_builds(name), "{name}");
        }
        for name in
            ["PATH", "HOME", "CARGO_HOME", "RUSTUP_HOME", "CARGO_NET_OFFLINE", "CARGO_REGISTRIES_X_INDEX"]
        {
            assert!(!is_about_host_builds(name), "{name}");
        }
    }

    #[test]
    fn flags_reach_the_compiler_one_by_one() {
        let rustc = Rustc { path: "rustc".into(), version: String::new(), sysroot: "/".into(), llvm: LLVM };
        let linker = Linker { path: "/a b/bpf-linker".into(), version: String::new(), llvm: None };
        let flags = Toolchain { rustc, linker }.flags(&["-Dwarnings"]).into_string().unwrap();
        let flags: Vec<&str> = flags.split('\x1f').collect();
        assert_eq!(flags.first(), Some(&"-Clinker=/a b/bpf-linker"));
        assert_eq!(flags.last(), Some(&"-Dwarnings"));
        assert!(flags.contains(&"-Ctarget-cpu=v3"));
    }
}
