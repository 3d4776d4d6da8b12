//! The file system that a virtual machine starts with: modules, the agent, the program that probes, and a few
//! tools of this machine with their libraries.
//!
//! Its format is the kernel's (Documentation/driver-api/early-userspace/buffer-format.rst): entries with a header of
//! hexadecimal numbers, one behind the other.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{modules, packages::Kernel};
use crate::cmd;

/// What is not the kernel's.
pub(super) struct Programs {
    /// The static agent: it must find everything in itself.
    pub(super) agent: PathBuf,
    /// Programs that need libraries.
    pub(super) others: Vec<PathBuf>,
}

/// For the clusters of namespaces, and for what a kube-proxy leaves.
const TOOLS: [&str; 4] = ["ip", "bridge", "nft", "ipvsadm"];
/// Folders that are mounted on, or written to.
const FOLDERS: [&str; 9] = ["dev", "proc", "sys", "run", "tmp", "etc", "var", "bin", "modules"];

const FOLDER: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const LINK: u32 = 0o120_777;

/// Writes the file system for a kernel.
pub(super) fn write(kernel: &Kernel, programs: &Programs) -> Result<PathBuf> {
    let mut archive = Archive::default();
    for folder in FOLDERS {
        archive.folder(folder);
    }
    archive.add("var/run", LINK, b"/run");
    let mut order = String::new();
    for module in modules::chosen(kernel)? {
        archive.add(&format!("modules/{}", module.file_name), FILE, &module.contents);
        order.push_str(&module.file_name);
        order.push('\n');
    }
    archive.add("modules/order", FILE, order.as_bytes());
    archive.file("bin/proxy-agent", &programs.agent)?;
    let tools = TOOLS
        .map(|tool| cmd::find(tool, &[]).with_context(|| format!("no {tool} here; run: cargo xtask setup")));
    let mut libraries = BTreeSet::new();
    for program in tools.into_iter().chain(programs.others.iter().cloned().map(Ok)) {
        let program = program?;
        libraries.extend(needed(&program)?);
        let name = program.file_name().and_then(|name| name.to_str()).context("a program without a name")?;
        archive.add(&format!("bin/{name}"), EXECUTABLE, &stripped(&program)?);
    }
    for library in libraries {
        archive.file(library.trim_start_matches('/'), Path::new(&library))?;
    }
    let path = super::directory().join(format!("{}.initramfs", kernel.release));
    fs::write(&path, archive.finish()).with_context(|| format!("could not write {}", path.display()))?;
    Ok(path)
}

/// The libraries that a program loads, its loader among them, each where it looks for it.
fn needed(program: &Path) -> Result<Vec<String>> {
    let said = cmd::output(Command::new("ldd").arg(program))?;
    if let Some(line) = said.lines().find(|line| line.contains("not found")) {
        bail!("{} lacks a library here: {}", program.display(), line.trim());
    }
    Ok(libraries(&said))
}

/// `ldd` says "name => path (address)", or the path alone for the loader.
fn libraries(said: &str) -> Vec<String> {
    let words = said.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    words.map(str::to_owned).collect()
}

/// A program without what only a debugger reads, which is most of it.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let folder = super::directory();
    let to = tempfile::Builder::new()
        .prefix("stripped")
        .tempfile_in(&folder)
        .with_context(|| format!("could not write to {}", folder.display()))?;
    cmd::output(Command::new("strip").arg("-o").arg(to.path()).arg(program))?;
    fs::read(to.path()).with_context(|| format!("could not read {}", to.path().display()))
}

/// Entries, one behind the other.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    /// A folder with those above it; none twice.
    fn folder(&mut self, path: &str) {
        if path.is_empty() || self.folders.contains(path) {
            return;
        }
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above);
        }
        self.folders.insert(path.to_owned());
        self.entry(path, FOLDER, &[]);
    }

    /// A copy of a file, executable.
    fn file(&mut self, path: &str, from: &Path) -> Result<()> {
        let contents = fs::read(from).with_context(|| format!("could not read {}", from.display()))?;
        self.add(path, EXECUTABLE, &contents);
        Ok(())
    }

    fn add(&mut self, path: &str, mode: u32, contents: &[u8]) {
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above);
        }
        self.entry(path, mode, contents);
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.entries += 1;
        // inode, mode, uid, gid, links, time, size, four numbers of devices, length of the name, no checksum.
        let fields =
            [self.entries, mode, 0, 0, 1, 0, contents.len() as u32, 0, 0, 0, 0, path.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_laid_out_as_the_kernel_reads_it() {
        let mut archive = Archive::default();
        archive.add("a/b", FILE, b"hello");
        let text = String::from_utf8(archive.finish()).unwrap();
        let entries: Vec<&str> = text.split("070701").skip(1).collect();
        assert_eq!(entries.len(), 3, "the folder, the file, the end");
        assert!(entries[1].starts_with("00000002000081a4"), "{}", entries[1]);
        // 104 digits, the name with its end, filled up; the contents, filled up.
        assert_eq!(&entries[1][104..], "a/b\0\0\0hello\0\0\0");
        assert_eq!((6 + entries[1].len()) % 4, 0);
        assert!(entries[2].contains("TRAILER!!!\0"));
    }

    #[test]
    fn libraries_are_what_ldd_finds_and_the_loader() {
        let said = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x2)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        assert_eq!(libraries(said), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
    }
}
