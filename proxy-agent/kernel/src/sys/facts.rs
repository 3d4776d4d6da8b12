//! What the kernel says of maps, programs and links, and the pins by which they are found.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use aya_obj::generated::{bpf_cmd, bpf_link_info, bpf_link_type, bpf_map_info, bpf_prog_info};

use super::{attr, c_path, call, call_fd, raw, text};

/// What the kernel knows of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MapFacts {
    pub(crate) id: u32,
    pub(crate) kind: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) flags: u32,
    pub(crate) name: String,
}

/// What the kernel knows of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProgramFacts {
    pub(crate) id: u32,
    pub(crate) tag: [u8; 8],
    pub(crate) name: String,
    pub(crate) maps: Vec<u32>,
    /// Bytes of machine code; 0 when it is interpreted.
    pub(crate) jited: u32,
}

/// Where a link holds its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// A cgroup by its id (inode number).
    Cgroup(u64),
    /// An interface by its index; 0 once it is gone.
    Interface(u32),
    /// Something this agent does not make.
    Other,
}

/// What the kernel knows of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkFacts {
    pub(crate) id: u32,
    pub(crate) program: u32,
    pub(crate) target: Target,
}

/// Opens what is pinned at `path`.
pub(crate) fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    call_fd(bpf_cmd::BPF_OBJ_GET, &mut attr)
}

/// Pins `fd` at `path`.
pub(crate) fn obj_pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = raw(fd);
    call(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

fn info<T>(fd: BorrowedFd<'_>, into: &mut T) -> io::Result<()> {
    let mut attr = attr();
    attr.info.bpf_fd = raw(fd);
    attr.info.info_len = size_of::<T>() as u32;
    attr.info.info = &raw mut *into as u64;
    call(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// What map `fd` is.
#[expect(unsafe_code, reason = "a C struct of integers starts as zero bytes")]
pub(crate) fn map_facts(fd: BorrowedFd<'_>) -> io::Result<MapFacts> {
    // SAFETY: made of integers alone.
    let mut found: bpf_map_info = unsafe { zeroed() };
    info(fd, &mut found)?;
    Ok(MapFacts {
        id: found.id,
        kind: found.type_,
        key_size: found.key_size,
        value_size: found.value_size,
        max_entries: found.max_entries,
        flags: found.map_flags,
        name: text(&found.name),
    })
}

/// What program `fd` is.
#[expect(unsafe_code, reason = "a C struct of integers starts as zero bytes")]
pub(crate) fn program_facts(fd: BorrowedFd<'_>) -> io::Result<ProgramFacts> {
    let mut maps = [0_u32; 64];
    // SAFETY: made of integers alone.
    let mut found: bpf_prog_info = unsafe { zeroed() };
    found.nr_map_ids = maps.len() as u32;
    found.map_ids = maps.as_mut_ptr() as u64;
    info(fd, &mut found)?;
    let count = maps.len().min(found.nr_map_ids as usize);
    Ok(ProgramFacts {
        id: found.id,
        tag: found.tag,
        name: text(&found.name),
        maps: maps.into_iter().take(count).collect(),
        jited: found.jited_prog_len,
    })
}

/// Where link `fd` is attached, and with which program.
#[expect(unsafe_code, reason = "reads the member of a union that its type field names")]
pub(crate) fn link_facts(fd: BorrowedFd<'_>) -> io::Result<LinkFacts> {
    // SAFETY: made of integers alone.
    let mut found: bpf_link_info = unsafe { zeroed() };
    info(fd, &mut found)?;
    let target = match found.type_ {
        kind if kind == bpf_link_type::BPF_LINK_TYPE_CGROUP as u32 => {
            // SAFETY: the kernel fills this member for cgroup links; any bytes are a value.
            Target::Cgroup(unsafe { found.__bindgen_anon_1.cgroup.cgroup_id })
        }
        kind if kind == bpf_link_type::BPF_LINK_TYPE_TCX as u32 => {
            // SAFETY: the kernel fills this member for TCX links; any bytes are a value.
            Target::Interface(unsafe { found.__bindgen_anon_1.tcx.ifindex })
        }
        kind if kind == bpf_link_type::BPF_LINK_TYPE_XDP as u32 => {
            // SAFETY: the kernel fills this member for XDP links; any bytes are a value.
            Target::Interface(unsafe { found.__bindgen_anon_1.xdp.ifindex })
        }
        _ => Target::Other,
    };
    Ok(LinkFacts { id: found.id, program: found.prog_id, target })
}

/// Opens a program by its id.
pub(crate) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
    call_fd(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attr)
}

/// Opens a map by its id.
pub(crate) fn map_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.__bindgen_anon_6.__bindgen_anon_1.map_id = id;
    call_fd(bpf_cmd::BPF_MAP_GET_FD_BY_ID, &mut attr)
}
