//! The modules that the probes need, each after those that it depends on: the virtual machine has nobody who would look
//! for them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _};

use super::packages::Kernel;
use crate::cmd;

/// Without these there is no cluster of namespaces and no place for the programs.
const NEEDED: [&str; 5] = ["veth", "bridge", "vxlan", "cls_bpf", "sch_ingress"];

/// What a node has besides: a kernel has them built in, as a module or not at all.
const USUAL: [&str; 27] = [
    // Asked for by name, as an algorithm, by others: it must be there first.
    "crc32c_generic",
    "nf_conntrack",
    "nf_defrag_ipv4",
    "nf_defrag_ipv6",
    "nf_tables",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_chain_nat",
    "nft_fib_ipv4",
    "nft_fib_ipv6",
    "ip_vs",
    "ip_vs_rr",
    "nf_conntrack_netlink",
    "nft_reject_inet",
    "nft_compat",
    "ip_tables",
    "ip6_tables",
    "br_netfilter",
    "ifb",
    "dummy",
    "8021q",
    "tcp_diag",
    "udp_diag",
    "sctp",
    "act_mirred",
    "sch_fq_codel",
];

/// A module as the kernel takes it.
pub(super) struct Module {
    /// `veth.ko`
    pub(super) file_name: String,
    /// The module, not compressed.
    pub(super) contents: Vec<u8>,
}

/// The modules to be loaded, in an order in which they can be.
pub(super) fn chosen(kernel: &Kernel) -> Result<Vec<Module>> {
    let folder = kernel.modules()?;
    let mut files = BTreeMap::new();
    find(&folder.join("kernel"), &mut files)?;
    let builtin = builtin(&kernel.root, &kernel.release)?;
    let mut choice = Choice { files, builtin, taken: BTreeSet::new(), modules: Vec::new() };
    for name in USUAL {
        if choice.files.contains_key(name) {
            choice.take(name)?;
        }
    }
    for name in NEEDED {
        choice.take(name).with_context(|| format!("kernel {} is of no use here", kernel.release))?;
    }
    Ok(choice.modules)
}

struct Choice {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    taken: BTreeSet<String>,
    modules: Vec<Module>,
}

impl Choice {
    fn take(&mut self, name: &str) -> Result<()> {
        if self.builtin.contains(name) || !self.taken.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.files.get(name).with_context(|| format!("it has no module {name}"))?;
        let contents = read(path)?;
        for needed in depends(&contents).with_context(|| format!("could not read {}", path.display()))? {
            self.take(&needed)?;
        }
        self.modules.push(Module { file_name: format!("{name}.ko"), contents });
        Ok(())
    }
}

/// Every module below a folder by its name, in which the kernel does not tell `-` from `_`.
fn find(folder: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let listed = || format!("could not list {}", folder.display());
    for entry in fs::read_dir(folder).with_context(listed)? {
        let path = entry.with_context(listed)?.path();
        if path.is_dir() {
            find(&path, found)?;
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str()).and_then(module_name) {
            found.insert(name, path);
        }
    }
    Ok(())
}

fn module_name(file_name: &str) -> Option<String> {
    let (name, end) = file_name.split_once(".ko")?;
    matches!(end, "" | ".xz").then(|| name.replace('-', "_"))
}

/// Names of what is no module because it is part of the kernel.
fn builtin(root: &Path, release: &str) -> Result<BTreeSet<String>> {
    let places = ["usr/lib/modules", "lib/modules"];
    let mut files = places.iter().map(|folder| root.join(folder).join(release).join("modules.builtin"));
    let file = files.find(|path| path.is_file()).context("the packages hold no list of what is built in")?;
    let text = fs::read_to_string(&file).with_context(|| format!("could not read {}", file.display()))?;
    Ok(text.lines().filter_map(|line| module_name(line.rsplit('/').next()?)).collect())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|end| end == "ko") {
        return fs::read(path).with_context(|| format!("could not read {}", path.display()));
    }
    let mut command = Command::new("xz");
    command.args(["--decompress", "--stdout"]).arg(path);
    let output = command.output().with_context(|| format!("could not start: {}", cmd::shown(&command)))?;
    if !output.status.success() {
        bail!("failed ({}): {}", output.status, cmd::shown(&command));
    }
    Ok(output.stdout)
}

/// The modules that a module says it needs: `depends=a,b` among the words of its section `.modinfo`.
fn depends(module: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(module).context("not an ELF file")?;
    let section = file.section_by_name(".modinfo").context("not a module: it has no .modinfo")?;
    let words = section.data()?.split(|byte| *byte == 0);
    let list = words.filter_map(|word| word.strip_prefix(b"depends=")).next().unwrap_or_default();
    let list = std::str::from_utf8(list).context("names that are no text")?;
    Ok(list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect())
}

#[cfg(test)]
mod tests {
    use object::write::Object;
    use object::{Architecture, BinaryFormat, Endianness, SectionKind};

    use super::*;

    fn module(info: &[u8]) -> Vec<u8> {
        let mut object = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let section = object.add_section(Vec::new(), b".modinfo".to_vec(), SectionKind::ReadOnlyData);
        object.append_section_data(section, info, 1);
        object.write().unwrap()
    }

    #[test]
    fn a_module_comes_after_those_that_it_needs_and_none_twice() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = BTreeMap::new();
        for (name, info) in [
            ("nft-nat", &b"license=GPL\0depends=nf_nat,nf_tables\0"[..]),
            ("nf_nat", b"depends=nf-conntrack,libcrc32c\0"),
            ("nf_conntrack", b"depends=libcrc32c\0"),
            ("nf_tables", b"depends=\0"),
        ] {
            let path = folder.path().join(format!("{name}.ko"));
            fs::write(&path, module(info)).unwrap();
        }
        find(folder.path(), &mut files).unwrap();
        let builtin = BTreeSet::from(["libcrc32c".to_owned()]);
        let mut choice = Choice { files, builtin, taken: BTreeSet::new(), modules: Vec::new() };
        choice.take("nf_tables").unwrap();
        choice.take("nft_nat").unwrap();
        let names: Vec<&str> = choice.modules.iter().map(|module| module.file_name.as_str()).collect();
        assert_eq!(names, ["nf_tables.ko", "nf_conntrack.ko", "nf_nat.ko", "nft_nat.ko"]);
        assert_eq!(choice.take("absent").unwrap_err().to_string(), "it has no module absent");
    }

    #[test]
    fn compressed_modules_are_found_by_the_same_name() {
        assert_eq!(module_name("nft-ct.ko").as_deref(), Some("nft_ct"));
        assert_eq!(module_name("veth.ko.xz").as_deref(), Some("veth"));
        assert_eq!(module_name("modules.order"), None);
    }
}
