//! Loops that old kernels refuse for how they lie.
//!
//! Before it follows the values, the verifier walks over the instructions of a function, to the next one first and to
//! the target of a jump then. Where it comes back to one that it is still below of, there is a loop; up to 6.1 that must
//! be by a jump. A compiler that lays a loop out with a part of its body before its head falls through into the head
//! instead, and the kernel says `back-edge from insn`. Newer ones do not mind, so the developer's kernel does not show it.

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, SymbolKind};

/// Refuses an object with such a loop, by the name of its function.
pub(crate) fn check(elf: &[u8]) -> Result<()> {
    let file = object::File::parse(elf).context("not an ELF file")?;
    let mut refused = Vec::new();
    for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0) {
        let Some(index) = symbol.section_index() else { continue };
        let code = file.section_by_index(index)?.data()?;
        let (start, end) = (symbol.address() as usize, (symbol.address() + symbol.size()) as usize);
        let code = code.get(start..end).context("a function beyond the end of its section")?;
        if let Some(at) = fallen_into(code) {
            refused.push(format!("{} at instruction {at}", symbol.name()?));
        }
    }
    if !refused.is_empty() {
        bail!(
            "a loop is entered by falling through from its own body, which kernels up to 6.1 refuse: {}; write the \
             loop another way, or without one",
            refused.join(", ")
        );
    }
    Ok(())
}

/// The head of the first loop that its own body falls through into, as the number of an instruction.
fn fallen_into(code: &[u8]) -> Option<usize> {
    #[derive(Clone, Copy, PartialEq)]
    enum State {
        New,
        Below,
        Done,
    }
    let mut states = vec![State::New; code.len() / 8];
    let mut path = vec![(0, 0)];
    while let Some((at, edge)) = path.last_mut() {
        let (from, n) = (*at, *edge);
        *edge += 1;
        *states.get_mut(from)? = State::Below;
        let Some(&(to, is_jump)) = edges(code, from).get(n) else {
            states[from] = State::Done;
            path.pop();
            continue;
        };
        match states.get(to) {
            Some(State::New) => path.push((to, 0)),
            Some(State::Below) if !is_jump => return Some(to),
            _ => {}
        }
    }
    None
}

/// Where the kernel goes on from an instruction, in its order, and whether that is by a jump instruction (RFC 9669 §4.3).
fn edges(code: &[u8], at: usize) -> Vec<(usize, bool)> {
    let Some(word) = code.get(8 * at..8 * at + 8) else { return Vec::new() };
    let offset = |distance: i64| (at as i64 + 1 + distance) as usize;
    let short = i64::from(i16::from_le_bytes([word[2], word[3]]));
    let long = i64::from(i32::from_le_bytes([word[4], word[5], word[6], word[7]]));
    match (word[0] & 7, word[0] & 0xf0) {
        (5, 0x90) => Vec::new(),
        (5 | 6, 0x80) => vec![(at + 1, false)],
        (5, 0) => vec![(offset(short), true)],
        (6, 0) => vec![(offset(long), true)],
        (5 | 6, _) => vec![(at + 1, true), (offset(short), true)],
        _ => vec![(at + 1, false)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOV: [u8; 8] = [0xb7, 1, 0, 0, 0, 0, 0, 0];
    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];

    /// `if r1 == 0 goto` so many instructions on.
    fn unless(distance: i16) -> [u8; 8] {
        let [low, high] = distance.to_le_bytes();
        [0x15, 1, low, high, 0, 0, 0, 0]
    }

    #[test]
    fn a_loop_that_jumps_back_is_allowed() {
        assert_eq!(fallen_into(&[MOV, MOV, unless(-2), EXIT].concat()), None);
    }

    #[test]
    fn a_loop_whose_body_lies_before_its_head_and_falls_into_it_is_not() {
        // 0: to the head; 1: the body; 2: the head, back to the body.
        let to_head = [0x05, 0, 1, 0, 0, 0, 0, 0];
        assert_eq!(fallen_into(&[to_head, MOV, unless(-2), EXIT].concat()), Some(2));
    }
}
