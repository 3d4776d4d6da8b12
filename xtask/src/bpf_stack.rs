//! How much stack the programs of a BPF object take with everything they call.
//!
//! The kernel refuses a program whose frames, one inside the other, need more than 512 bytes. It rounds each frame up,
//! before 6.8 and without a just-in-time compiler to 32 bytes: an object that loads on the developer's kernel is to load
//! on an old one. And the frames themselves may take less than that: another compiler spills other registers, and what
//! is written next needs room as well.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SymbolKind};

/// What the kernel has for all frames of a chain of calls together, in bytes.
const KERNEL: u64 = 512;
/// What they may take as they are.
const LIMIT: u64 = 400;
/// What a frame is rounded up to.
const ROUND: u64 = 32;
/// The register that points to the end of the frame.
const FRAME: u8 = 10;

/// The deepest chain of calls.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Deepest {
    /// Bytes, each frame rounded up.
    pub(crate) bytes: u64,
    /// The functions with their own frames, the program first.
    pub(crate) chain: Vec<(String, u64)>,
}

impl Deepest {
    /// Bytes of the frames as they are.
    fn taken(&self) -> u64 {
        self.chain.iter().map(|(_, frame)| frame).sum()
    }
}

/// A function: its frame, and whom it calls.
struct Function {
    name: String,
    is_program: bool,
    frame: u64,
    calls: Vec<Place>,
}

/// Where a function begins: in which section, at which byte.
type Place = (usize, u64);

/// The chain of calls that takes the most stack; an error if that is more than is allowed.
pub(crate) fn deepest(elf: &[u8]) -> Result<Deepest> {
    let file = object::File::parse(elf).context("not an ELF file")?;
    let functions = functions(&file)?;
    let mut deepest = Deepest { bytes: 0, chain: Vec::new() };
    for (place, function) in &functions {
        if function.is_program {
            let found = chain(&functions, *place, 0)?;
            if found.bytes > deepest.bytes {
                deepest = found;
            }
        }
    }
    if deepest.bytes > KERNEL || deepest.taken() > LIMIT {
        let frames: Vec<String> =
            deepest.chain.iter().map(|(name, frame)| format!("{name} {frame}")).collect();
        bail!(
            "{} bytes of stack, {} with each frame rounded up to {ROUND}, where {LIMIT} are allowed and the kernel \
             has {KERNEL}: {}; move what is large to the per-CPU working storage, or into a function of its own that \
             is called elsewhere",
            deepest.taken(),
            deepest.bytes,
            frames.join(" → ")
        );
    }
    Ok(deepest)
}

fn functions(file: &object::File<'_>) -> Result<BTreeMap<Place, Function>> {
    let mut found = BTreeMap::new();
    for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0) {
        let Some(index) = symbol.section_index() else { continue };
        let section = file.section_by_index(index).context("a symbol of a section that is not there")?;
        let (start, end) = (symbol.address(), symbol.address() + symbol.size());
        let called: BTreeMap<u64, (usize, Option<u64>)> = section
            .relocations()
            .filter_map(|(at, relocation)| match relocation.target() {
                RelocationTarget::Symbol(target) => {
                    let target = file.symbol_by_index(target).ok()?;
                    let begins = target.kind() != SymbolKind::Section;
                    Some((at, (target.section_index()?.0, begins.then(|| target.address()))))
                }
                _ => None,
            })
            .collect();
        let code = section.data()?;
        let code =
            code.get(start as usize..end as usize).context("a function beyond the end of its section")?;
        let (frame, calls) = read(code, start, index.0, &called);
        let (name, is_program) = (symbol.name()?.to_owned(), !section.name()?.starts_with(".text"));
        found.insert((index.0, start), Function { name, is_program, frame, calls });
    }
    Ok(found)
}

/// The frame of a function in bytes, and the places of those that it calls (RFC 9669 §3). A call that is relocated
/// leads to a symbol, or into a section: then its instruction says how far, as if it were the first one there.
fn read(
    code: &[u8],
    start: u64,
    section: usize,
    relocated: &BTreeMap<u64, (usize, Option<u64>)>,
) -> (u64, Vec<Place>) {
    let (mut frame, mut calls) = (0, Vec::new());
    // Registers that point into the frame, with their distance from its end.
    let mut pointers: [Option<i64>; 16] = [None; 16];
    pointers[usize::from(FRAME)] = Some(0);
    for (n, word) in code.chunks_exact(8).enumerate() {
        let (opcode, dst, src) = (word[0], word[1] & 0xf, word[1] >> 4);
        let offset = i64::from(i16::from_le_bytes([word[2], word[3]]));
        let imm = i64::from(i32::from_le_bytes([word[4], word[5], word[6], word[7]]));
        let mut reach = |distance: i64| frame = frame.max(u64::try_from(-distance).unwrap_or(0));
        match opcode & 7 {
            // Loads; those of constants (class 0) have no address.
            1 => {
                if let Some(base) = pointers[usize::from(src)] {
                    reach(base + offset);
                }
                pointers[usize::from(dst)] = None;
            }
            // Stores.
            2 | 3 => {
                if let Some(base) = pointers[usize::from(dst)] {
                    reach(base + offset);
                }
            }
            // 64-bit arithmetic: a copy, a constant added, anything else.
            7 => {
                let known = match opcode {
                    0xbf => pointers[usize::from(src)],
                    0x07 => pointers[usize::from(dst)].map(|base| base + imm),
                    _ => None,
                };
                if let Some(distance) = known {
                    reach(distance);
                }
                pointers[usize::from(dst)] = known;
            }
            5 if opcode == 0x85 => {
                let at = start + 8 * n as u64;
                if src == 1 {
                    let from = |at: u64| (at + 8).wrapping_add_signed(8 * imm);
                    calls.push(match relocated.get(&at) {
                        Some((section, begins)) => (*section, begins.unwrap_or(from(0))),
                        None => (section, from(at)),
                    });
                }
                // A call leaves nothing in the registers for arguments and the result.
                pointers[..6].fill(None);
            }
            _ => {}
        }
    }
    (frame, calls)
}

fn chain(functions: &BTreeMap<Place, Function>, place: Place, above: usize) -> Result<Deepest> {
    let function = functions.get(&place).context("a call to where no function begins")?;
    if above > 8 {
        bail!("{}: more than 8 functions call each other, or one calls itself", function.name);
    }
    let mut below = Deepest { bytes: 0, chain: Vec::new() };
    for callee in &function.calls {
        let found = chain(functions, *callee, above + 1)?;
        if found.bytes > below.bytes {
            below = found;
        }
    }
    let mut chain = vec![(function.name.clone(), function.frame)];
    chain.append(&mut below.chain);
    Ok(Deepest { bytes: function.frame.max(1).next_multiple_of(ROUND) + below.bytes, chain })
}

#[cfg(test)]
mod tests {
    use object::write::{Object, Relocation, SectionId, Symbol, SymbolSection};
    use object::{
        Architecture, BinaryFormat, Endianness, RelocationFlags, SectionKind, SymbolFlags, SymbolScope,
    };

    use super::*;

    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];

    /// `*(u64 *)(r10 - bytes) = 0`
    fn store(bytes: i16) -> [u8; 8] {
        let [low, high] = (-bytes).to_le_bytes();
        [0x7a, FRAME, low, high, 0, 0, 0, 0]
    }

    /// A call of the function that begins `instructions` after the next one.
    fn call(instructions: i32) -> [u8; 8] {
        let [a, b, c, d] = instructions.to_le_bytes();
        [0x85, 0x10, 0, 0, a, b, c, d]
    }

    /// Adds a section of functions, one behind the other.
    fn add(object: &mut Object<'_>, section: &[u8], functions: &[(&str, &[[u8; 8]])]) -> SectionId {
        let section = object.add_section(Vec::new(), section.to_vec(), SectionKind::Text);
        for (name, code) in functions {
            let value = object.append_section_data(section, &code.concat(), 8);
            object.add_symbol(Symbol {
                name: name.as_bytes().to_vec(),
                value,
                size: 8 * code.len() as u64,
                kind: SymbolKind::Text,
                scope: SymbolScope::Linkage,
                weak: false,
                section: SymbolSection::Section(section),
                flags: SymbolFlags::None,
            });
        }
        section
    }

    /// A program and what it calls, in one section.
    fn object(functions: &[(&str, &[[u8; 8]])]) -> Vec<u8> {
        let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
        add(&mut object, b"classifier", functions);
        object.write().unwrap()
    }

    #[test]
    fn frames_add_up_along_the_deepest_chain() {
        let found = deepest(&object(&[
            ("outer", &[store(40), call(1), EXIT]),
            ("inner", &[store(8), store(100), EXIT]),
        ]))
        .unwrap();
        assert_eq!(found.chain, [("outer".to_owned(), 40), ("inner".to_owned(), 100)]);
        assert_eq!(found.bytes, 64 + 128);
    }

    #[test]
    fn a_call_into_another_section_leads_to_where_its_instruction_says() {
        let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
        let text: [(&str, &[_]); 2] =
            [("first", &[store(8), EXIT]), ("second", &[store(80), store(90), EXIT])];
        let text = add(&mut object, b".text", &text);
        // The second function begins at the third instruction there; calls count from the one after them.
        let program = add(&mut object, b"classifier", &[("program", &[store(40), call(1), EXIT])]);
        let symbol = object.section_symbol(text);
        let flags = RelocationFlags::Elf { r_type: object::elf::R_BPF_64_32 };
        object.add_relocation(program, Relocation { offset: 8, symbol, addend: 0, flags }).unwrap();
        let found = deepest(&object.write().unwrap()).unwrap();
        assert_eq!(found.chain, [("program".to_owned(), 40), ("second".to_owned(), 90)]);
    }

    #[test]
    fn a_pointer_into_the_frame_counts_like_a_store() {
        // r1 = r10; r1 += -200
        let [a, b, c, d] = (-200_i32).to_le_bytes();
        let code = [[0xbf, FRAME << 4 | 1, 0, 0, 0, 0, 0, 0], [0x07, 1, 0, 0, a, b, c, d], EXIT];
        assert_eq!(deepest(&object(&[("one", &code)])).unwrap().chain, [("one".to_owned(), 200)]);
    }

    #[test]
    fn a_chain_near_what_the_kernel_has_is_refused_by_name() {
        let chain = |inner| {
            deepest(&object(&[("outer", &[store(256), call(1), EXIT]), ("inner", &[store(inner), EXIT])]))
        };
        assert_eq!(chain(144).unwrap().bytes, 416);
        let said = chain(152).unwrap_err().to_string();
        assert!(said.contains("408 bytes") && said.contains("outer 256 → inner 152"), "{said}");
        assert!(said.contains("400 are allowed"), "{said}");
    }

    #[test]
    fn a_function_that_calls_itself_is_refused() {
        assert!(deepest(&object(&[("loop", &[call(-1), EXIT])])).is_err());
    }
}
