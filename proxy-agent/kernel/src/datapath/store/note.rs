//! Notes: what outlives the agent and no program reads, as text in an array of one element.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_ARRAY;

use super::pin::{BpfRoot, PinError, pin_at};
use crate::sys::{self, MapFacts};

/// What one may be long.
const LONGEST: u32 = 1 << 20;

/// A note under a root, outside all generations.
#[derive(Clone, Debug)]
pub struct Note {
    root: BpfRoot,
    name: &'static str,
}

impl Note {
    /// API servers that were learnt.
    pub const SERVERS: &'static str = "servers";
    /// All of them.
    pub(crate) const ALL: [&'static str; 1] = [Self::SERVERS];

    /// The one of this name; nothing is touched yet.
    #[must_use]
    pub fn new(root: &BpfRoot, name: &'static str) -> Self {
        Self { root: root.clone(), name }
    }

    fn path(&self) -> PathBuf {
        self.root.path().join(self.name)
    }

    /// What it says; nothing if there is none.
    pub fn read(&self) -> io::Result<String> {
        match read(&self.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            said => String::from_utf8(said?).map_err(io::Error::other),
        }
    }

    /// Says something else from now on, in one step.
    pub fn write(&self, text: &str) -> Result<(), PinError> {
        pin_at(&self.root, &self.path(), |path| pin(self.name, text.as_bytes(), path).map(drop)).map(drop)
    }
}

/// What is pinned at a path, up to the first zero.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let map = sys::obj_get(path)?;
    let MapFacts { kind, key_size, value_size, .. } = sys::map_facts(map.as_fd())?;
    if kind != BPF_MAP_TYPE_ARRAY as u32 || key_size != 4 || value_size > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no note"));
    }
    let mut text = vec![0; value_size.next_multiple_of(8) as usize];
    sys::lookup_bytes(map.as_fd(), &0_u32.to_ne_bytes(), &mut text)?;
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    text.truncate(end);
    Ok(text)
}

/// Pins a new one.
pub(crate) fn pin(name: &str, text: &[u8], path: &Path) -> io::Result<OwnedFd> {
    let mut text = text.to_vec();
    text.resize((text.len() + 1).next_multiple_of(8), 0);
    let size = u32::try_from(text.len()).map_err(io::Error::other)?;
    let map = sys::note_create(name, size)?;
    sys::update_bytes(map.as_fd(), &0_u32.to_ne_bytes(), &text)?;
    sys::obj_pin(map.as_fd(), path)?;
    Ok(map)
}
