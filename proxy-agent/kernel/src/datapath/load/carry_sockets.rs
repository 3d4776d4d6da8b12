//! Carrying over what sockets remember of their Services, when its layout has changed.
//!
//! Nobody can open a socket's storage without a descriptor of the socket, but an iterator over the old map sees all sockets, and
//! may write to the new map (Linux 5.11). Its program is made here: it copies field by field, as both layouts say.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use proxy_common::abi::maps;

use super::generation::Generation;
use crate::datapath::flow::sockets::{SocketError, Storage};
use crate::datapath::store::layout::Translation;
use crate::sys::instruction::{
    BYTE, DOUBLE, EXIT, HALF, Register, WORD, call, load, map, move_register, set, skip_if_null,
    skip_unless_null, store_sized,
};

/// `bpf_sk_storage_get` of `linux/bpf.h`.
const STORAGE_GET: u32 = 107;
/// `BPF_SK_STORAGE_GET_F_CREATE`.
const CREATE: u32 = 1;

/// The way from one generation's storage to the next one's. Making it takes the kernel's types and its verifier; using it does
/// not.
pub(crate) struct SocketCarrier {
    all: Storage,
    absent: Storage,
}

impl SocketCarrier {
    /// From one generation to another; `None` if both have the same map.
    pub(crate) fn open(old: &Generation, new: &Generation) -> Result<Option<Self>, SocketError> {
        let (Some(from), Some(to)) = (old.map(maps::SOCKETS), new.map(maps::SOCKETS)) else {
            return Ok(None);
        };
        let tables = (old.layout.table(maps::SOCKETS), new.layout.table(maps::SOCKETS));
        let (Some(theirs), Some(ours)) = tables else { return Ok(None) };
        if from.facts.id == to.facts.id {
            return Ok(None);
        }
        let translation = Translation::of_values(&theirs, &ours);
        let way = |which| Storage::over(from.fd.as_fd(), &program(&translation, to.fd.as_fd(), which));
        Ok(Some(Self { all: way(Which::All)?, absent: way(Which::Absent)? }))
    }

    /// Everything, while only the old programs run.
    pub(crate) fn all(&self) -> Result<(), SocketError> {
        self.all.read().map(drop)
    }

    /// What sockets have that remember nothing in the new map: the new programs write there.
    pub(crate) fn absent(&self) -> Result<(), SocketError> {
        self.absent.read().map(drop)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    All,
    Absent,
}

/// The context holds four pointers: `meta`, the map, the socket, the value. A socket that has no memory left for it forgets.
fn program(translation: &Translation, to: BorrowedFd<'_>, which: Which) -> Vec<u64> {
    let [first, second, third, fourth, _] = Register::ARGUMENTS;
    let (context, value) = (Register::KEPT, Register::ALSO_KEPT);
    let get = |flags| {
        let [low, high] = map(first, to.as_raw_fd());
        [low, high, load(DOUBLE, second, context, 16), set(third, 0), set(fourth, flags), call(STORAGE_GET)]
    };
    let mut copy = Vec::new();
    if which == Which::Absent {
        copy.extend(get(0));
        // Over the rest, which is not known yet.
        copy.push(0);
    }
    let skip_at = copy.len().checked_sub(1);
    copy.extend(get(CREATE));
    let moves: Vec<u64> = translation.moves().flat_map(|part| copied(part, value)).collect();
    copy.push(skip_if_null(Register::RESULT, distance(moves.len())));
    copy.extend(moves);
    if let Some(at) = skip_at {
        copy[at] = skip_unless_null(Register::RESULT, distance(copy.len() - at - 1));
    }
    let mut program = vec![
        move_register(context, first),
        load(DOUBLE, value, context, 24),
        skip_if_null(value, distance(copy.len() + 2)),
        load(DOUBLE, second, context, 16),
        skip_if_null(second, distance(copy.len())),
    ];
    program.extend(copy);
    program.extend([set(Register::RESULT, 0), EXIT]);
    program
}

/// A storage has some hundred bytes, and a program two instructions for each at most.
fn distance(instructions: usize) -> i16 {
    i16::try_from(instructions).expect("a short program")
}

/// Copies bytes of the value to where the result points, in pieces as large as their places allow.
fn copied((from, to, len): (usize, usize, usize), value: Register) -> Vec<u64> {
    let scratch = Register::ARGUMENTS[0];
    let (mut done, mut instructions) = (0, Vec::new());
    while done < len {
        let fits = |size: usize| {
            len - done >= size && (from + done).is_multiple_of(size) && (to + done).is_multiple_of(size)
        };
        let sizes = [(8, DOUBLE), (4, WORD), (2, HALF), (1, BYTE)];
        let (bytes, size) = sizes.into_iter().find(|(bytes, _)| fits(*bytes)).unwrap_or((1, BYTE));
        instructions.push(load(size, scratch, value, distance(from + done)));
        instructions.push(store_sized(size, Register::RESULT, distance(to + done), scratch));
        done += bytes;
    }
    instructions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_as_large_as_their_places_allow() {
        let sizes = |part| {
            copied(part, Register::ALSO_KEPT)
                .iter()
                .step_by(2)
                .map(|load| *load as u8 & 0x18)
                .collect::<Vec<_>>()
        };
        assert_eq!(sizes((8, 16, 24)), [DOUBLE; 3]);
        assert_eq!(sizes((8, 20, 8)), [WORD, WORD]);
        assert_eq!(sizes((6, 2, 7)), [HALF, WORD, BYTE]);
    }
}
