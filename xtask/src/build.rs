//! Compiles the agent for release, with the kernel programs inside; statically on request.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use object::{
    Object as _, ObjectSegment as _,
    read::elf::{ElfFile64, ProgramHeader as _},
};

use crate::{
    build_ebpf, cmd,
    workspace::{self, Metadata},
};

/// What to build.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// One file that runs on any distribution, and in an empty container.
    #[arg(long = "static")]
    static_: bool,
}

/// `cargo xtask build`
pub(crate) fn run(args: &Args) -> Result<()> {
    let binary = if args.static_ { static_agent()? } else { agent()? };
    println!("{}", binary.display());
    Ok(())
}

/// The agent, linked to the system's C library.
fn agent() -> Result<PathBuf> {
    build_ebpf::run()?;
    cmd::run(cmd::cargo().current_dir(workspace::root()).args(["build", "--release", "-p", "proxy-agent"]))?;
    Ok(Metadata::read()?.target_directory.join("release/proxy-agent"))
}

/// The agent as a file that needs nothing else.
pub(crate) fn static_agent() -> Result<PathBuf> {
    build_ebpf::run()?;
    let target = static_target()?;
    let mut command = cmd::cargo();
    command
        .current_dir(workspace::root())
        .args(["build", "--release", "-p", "proxy-agent", "--target", &target])
        // Naming a target, even our own, keeps the flags away from build scripts and procedural macros, which
        // cannot be static.
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static");
    println!("RUSTFLAGS=-Ctarget-feature=+crt-static \\");
    cmd::run(&mut command)?;
    let binary = Metadata::read()?.target_directory.join(target).join("release/proxy-agent");
    require_static(&binary)?;
    Ok(binary)
}

/// musl where the toolchain has it and C code can be compiled for it, else glibc: its static form looks names up
/// by itself since 2.34, so nothing is lost.
fn static_target() -> Result<String> {
    let about = cmd::output(&mut cmd::with("rustc", ["-vV"]))?;
    let host =
        about.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV printed no host")?;
    let sysroot = PathBuf::from(cmd::output(&mut cmd::with("rustc", ["--print", "sysroot"]))?.trim());
    let musl = host.replace("-gnu", "-musl");
    let has_musl =
        sysroot.join("lib/rustlib").join(&musl).join("lib").is_dir() && cmd::find("musl-gcc", &[]).is_some();
    Ok(if has_musl { musl } else { host.to_owned() })
}

/// Fails if the program asks for a loader.
pub(crate) fn require_static(binary: &Path) -> Result<()> {
    let elf = fs::read(binary).with_context(|| format!("could not read {}", binary.display()))?;
    if has_loader(&elf).with_context(|| format!("could not understand {}", binary.display()))? {
        bail!("{} is not static: it asks for a loader; run: cargo xtask build --static", binary.display());
    }
    Ok(())
}

/// A dynamic program names its loader (PT_INTERP) and the libraries that it needs; a static one does neither, be
/// it position-independent or not.
fn has_loader(elf: &[u8]) -> Result<bool> {
    let file = ElfFile64::<object::Endianness>::parse(elf)?;
    let headers = file.elf_program_headers();
    let interpreter = headers.iter().any(|header| header.p_type(file.endian()) == object::elf::PT_INTERP);
    let libraries = file.elf_dynamic_table()?.iter().any(|entry| entry.tag == object::elf::DT_NEEDED);
    if file.segments().all(|segment| segment.size() == 0) {
        bail!("the file holds no code");
    }
    Ok(interpreter || libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_a_loader_is_not_static() {
        let error = require_static(Path::new("/bin/sh")).unwrap_err().to_string();
        assert!(error.contains("is not static"), "{error}");
    }

    #[test]
    fn what_is_no_program_is_an_error() {
        assert!(require_static(Path::new("/etc/passwd")).is_err());
        assert!(require_static(Path::new("/absent")).is_err());
    }
}
