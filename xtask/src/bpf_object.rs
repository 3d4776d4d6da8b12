//! Reads a compiled BPF object: which programs it holds, how long they are, and whether a panic is left in it.

use std::fmt;

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, SectionKind, SymbolKind};

/// Every BPF instruction takes eight bytes (a 64-bit load takes two of them).
const INSTRUCTION: u64 = 8;

/// A function of the object.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Function {
    /// Its section tells the program type, e.g. `cgroup/connect4`; `.text` holds the subprograms.
    pub(crate) section: String,
    pub(crate) name: String,
    pub(crate) instructions: u64,
}

/// The functions of a BPF object, programs first. Refuses an object that the kernel would not load.
pub(crate) fn functions(elf: &[u8]) -> Result<Vec<Function>> {
    let file = object::File::parse(elf).context("not an ELF file")?;
    if file.architecture() != object::Architecture::Bpf {
        bail!("not a BPF object but one for {:?}", file.architecture());
    }
    refuse_panics(&file)?;
    let mut found = Vec::new();
    for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0) {
        let Some(index) = symbol.section_index() else { continue };
        let section = file.section_by_index(index).context("a symbol of a section that is not there")?;
        if section.kind() == SectionKind::Text {
            let (section, name) = (section.name()?.to_owned(), symbol.name()?.to_owned());
            found.push(Function { section, name, instructions: symbol.size() / INSTRUCTION });
        }
    }
    if !found.iter().any(Function::is_program) {
        bail!("the object holds no program");
    }
    found.sort_by(|a, b| (!a.is_program(), &a.section, &a.name).cmp(&(!b.is_program(), &b.section, &b.name)));
    Ok(found)
}

/// A panic that the compiler could not prove away ends in an endless loop, and the verifier's message about that
/// ("last insn is not an exit or jmp") does not say where. The symbol does.
fn refuse_panics(file: &object::File<'_>) -> Result<()> {
    let names = file.symbols().filter_map(|symbol| symbol.name().ok().map(str::to_owned));
    let panics: Vec<String> = names.filter(|name| name.contains("panicking")).collect();
    if !panics.is_empty() {
        bail!(
            "a panic is left in the kernel programs ({}): look for an index, a division or a slice copy \
             whose range the compiler cannot prove",
            panics.join(", ")
        );
    }
    Ok(())
}

impl Function {
    /// A program has a section of its own type; subprograms share `.text`.
    pub(crate) fn is_program(&self) -> bool {
        !self.section.starts_with(".text")
    }
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<20} {:<24} {:>6} instructions", self.section, self.name, self.instructions)
    }
}

#[cfg(test)]
mod tests {
    use object::{
        Architecture, BinaryFormat, Endianness, SymbolFlags, SymbolScope,
        write::{Object, Symbol, SymbolSection},
    };

    use super::*;

    /// An object with one function of `size` bytes per (section, name).
    fn object_with(architecture: Architecture, functions: &[(&str, &str, u64)]) -> Vec<u8> {
        let mut object = Object::new(BinaryFormat::Elf, architecture, Endianness::Little);
        for &(section, name, size) in functions {
            let section = object.add_section(Vec::new(), section.into(), SectionKind::Text);
            let value = object.append_section_data(section, &vec![0; usize::try_from(size).unwrap()], 8);
            object.add_symbol(Symbol {
                name: name.into(),
                value,
                size,
                kind: SymbolKind::Text,
                scope: SymbolScope::Linkage,
                weak: false,
                section: SymbolSection::Section(section),
                flags: SymbolFlags::None,
            });
        }
        object.write().unwrap()
    }

    #[test]
    fn programs_come_before_subprograms_and_are_counted() {
        let elf =
            object_with(Architecture::Bpf, &[(".text", "helper", 16), ("classifier", "tc_ingress", 800)]);
        let found = functions(&elf).unwrap();
        assert_eq!(
            found.iter().map(|f| (f.name.as_str(), f.instructions)).collect::<Vec<_>>(),
            [("tc_ingress", 100), ("helper", 2)]
        );
    }

    #[test]
    fn an_object_with_a_panic_is_refused_by_name() {
        let panic = "_ZN4core9panicking18panic_bounds_checkE";
        let elf =
            object_with(Architecture::Bpf, &[("classifier", "tc_ingress", 8), (".text.unlikely.", panic, 8)]);
        assert!(functions(&elf).unwrap_err().to_string().contains(panic));
    }

    #[test]
    fn an_object_without_programs_is_refused() {
        assert!(functions(&object_with(Architecture::Bpf, &[(".text", "helper", 16)])).is_err());
        assert!(functions(&object_with(Architecture::X86_64, &[("classifier", "tc_ingress", 8)])).is_err());
        assert!(functions(b"").is_err());
    }
}
