//! Compiles `proxy-ebpf`, looks at what came out, and puts it where the agent's build script finds it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    bpf_loops, bpf_object, bpf_stack, cmd, compile,
    toolchain::{PROFILE, TARGET, Toolchain},
    workspace,
};

/// `cargo xtask build-ebpf`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Those with the made-up next layout of the tables, to `target/bpf/proxy-ebpf-next`, and the agent that embeds them
    /// (`target/debug/proxy-agent-next`): a test upgrades to it and back.
    #[arg(long)]
    next: bool,
}

/// The feature of all crates that makes the next layout.
const NEXT: &str = "next-layout";

/// `cargo xtask build-ebpf`
pub(crate) fn command(args: &Args) -> Result<()> {
    if args.next { next() } else { run() }
}

/// The kernel programs.
pub(crate) fn run() -> Result<()> {
    make(&workspace::bpf_object(), false)
}

/// The same with the next layout, and their agent.
pub(crate) fn next() -> Result<()> {
    make(&workspace::bpf_object().with_file_name("proxy-ebpf-next"), true)?;
    compile::program_with("proxy-agent-next", NEXT)
}

fn make(object: &Path, next: bool) -> Result<()> {
    let toolchain = Toolchain::find()?;
    let target_dir = workspace::bpf_dir().join("build");
    println!(
        "kernel programs: rustc {} ({}), bpf-linker {} ({})",
        toolchain.rustc.version,
        toolchain.rustc.path.display(),
        toolchain.linker.version,
        toolchain.linker.path.display()
    );
    let mut build = toolchain.cargo("build", &target_dir, &[]);
    if next {
        build.args(["--features", NEXT]);
    }
    cmd::quiet(&mut build)?;

    let built = target_dir.join(TARGET).join(PROFILE).join("proxy-ebpf");
    let elf =
        fs::read(&built).with_context(|| format!("no compiled kernel programs at {}", built.display()))?;
    let functions = bpf_object::functions(&elf).with_context(|| format!("refused {}", built.display()))?;
    let (programs, subprograms): (Vec<_>, Vec<_>) =
        functions.iter().partition(|function| function.is_program());
    for program in programs {
        println!("  {program}");
    }
    let instructions: u64 = subprograms.iter().map(|function| function.instructions).sum();
    println!("  and {} subprograms with {instructions} instructions", subprograms.len());
    let stack = bpf_stack::deepest(&elf).with_context(|| format!("refused {}", built.display()))?;
    let frames: Vec<&str> = stack.chain.iter().map(|(name, _)| name.as_str()).collect();
    println!("  {} bytes of stack at most, in {}", stack.bytes, frames.join(" → "));
    bpf_loops::check(&elf).with_context(|| format!("refused {}", built.display()))?;
    let news = if replace(object, &elf)? { "written" } else { "unchanged" };
    println!("{}: {} bytes, {news}", object.display(), elf.len());
    Ok(())
}

/// Writes the file in one step, and only if it differs: an untouched file spares a rebuild of the agent.
fn replace(file: &Path, contents: &[u8]) -> Result<bool> {
    if fs::read(file).is_ok_and(|old| old == contents) {
        return Ok(false);
    }
    let new = file.with_extension("new");
    fs::write(&new, contents).with_context(|| format!("could not write {}", new.display()))?;
    fs::rename(&new, file).with_context(|| format!("could not replace {}", file.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_object_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("object");
        assert!(replace(&file, b"one").unwrap());
        assert!(!replace(&file, b"one").unwrap());
        assert!(replace(&file, b"two").unwrap());
        assert_eq!(fs::read(&file).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
