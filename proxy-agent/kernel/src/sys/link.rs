//! Links: made, exchanged in one step, ended; and who is at a hook.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use aya_obj::generated::{bpf_attach_type, bpf_cmd};

use super::{attr, call, call_fd, raw};

/// `BPF_F_REPLACE`: a link update names the program it expects to replace.
const REPLACE: u32 = 1 << 2;

/// `BPF_F_BEFORE`: before all others when no other is named.
const BEFORE: u32 = 1 << 3;

/// `BPF_F_AFTER`: after all others when no other is named.
const AFTER: u32 = 1 << 4;

/// Attaches to interface `index` through TCX: before all others at ingress, after all others at egress, so
/// that other programs see endpoint addresses.
pub(crate) fn link_tcx(program: BorrowedFd<'_>, index: u32, egress: bool) -> io::Result<OwnedFd> {
    let (hook, order) = if egress {
        (bpf_attach_type::BPF_TCX_EGRESS, AFTER)
    } else {
        (bpf_attach_type::BPF_TCX_INGRESS, BEFORE)
    };
    let mut attr = attr();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_ifindex = index;
    attr.link_create.attach_type = hook as u32;
    attr.link_create.flags = order;
    call_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// `XDP_FLAGS_DRV_MODE` of `linux/if_link.h`.
const AT_THE_DRIVER: u32 = 1 << 2;

/// Attaches to the driver of interface `index`.
pub(crate) fn link_xdp(program: BorrowedFd<'_>, index: u32) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_ifindex = index;
    attr.link_create.attach_type = bpf_attach_type::BPF_XDP as u32;
    attr.link_create.flags = AT_THE_DRIVER;
    call_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// Attaches to a cgroup, beside what others have attached there.
pub(crate) fn link_cgroup(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    hook: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_fd = raw(cgroup);
    attr.link_create.attach_type = hook as u32;
    call_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// Where programs may be asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum At<'a> {
    /// An interface, by its index.
    Interface(u32),
    /// A cgroup's directory.
    Cgroup(BorrowedFd<'a>),
}

/// The ids of the programs that are attached at a hook itself, in the order in which they run.
#[expect(unsafe_code, reason = "reads back the member that the call has filled")]
pub(crate) fn programs_at(at: At<'_>, hook: bpf_attach_type) -> io::Result<Vec<u32>> {
    /// More than any hook takes.
    const ROOM: usize = 128;
    let mut ids = [0_u32; ROOM];
    let mut attr = attr();
    match at {
        At::Interface(index) => attr.query.__bindgen_anon_1.target_ifindex = index,
        At::Cgroup(directory) => attr.query.__bindgen_anon_1.target_fd = raw(directory),
    }
    attr.query.attach_type = hook as u32;
    attr.query.prog_ids = ids.as_mut_ptr() as u64;
    attr.query.__bindgen_anon_2.count = ROOM as u32;
    match call(bpf_cmd::BPF_PROG_QUERY, &mut attr) {
        Ok(_) => {}
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    }
    // SAFETY: the call above used this member; any bytes are a value.
    let count = unsafe { attr.query.__bindgen_anon_2.count } as usize;
    Ok(ids.into_iter().take(count).collect())
}

/// Swaps the program behind a link; with `old` only if that is the one it holds (otherwise `EPERM`).
pub(crate) fn link_update(
    link: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    old: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut attr = attr();
    attr.link_update.link_fd = raw(link);
    attr.link_update.__bindgen_anon_1.new_prog_fd = raw(program);
    if let Some(old) = old {
        attr.link_update.flags = REPLACE;
        attr.link_update.__bindgen_anon_2.old_prog_fd = raw(old);
    }
    call(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches a link, even while others hold descriptors of it.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = attr();
    attr.link_detach.link_fd = raw(link);
    call(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

/// Lets an iterator list the elements of a map.
pub(crate) fn link_iterator(program: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // The first member of `union bpf_iter_link_info`.
    let over = raw(map);
    let mut attr = attr();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.attach_type = bpf_attach_type::BPF_TRACE_ITER as u32;
    attr.link_create.__bindgen_anon_3.__bindgen_anon_1.iter_info = &raw const over as u64;
    attr.link_create.__bindgen_anon_3.__bindgen_anon_1.iter_info_len = size_of::<u32>() as u32;
    call_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// One run of an iterator, as a file to be read to its end.
pub(crate) fn iterate(link: BorrowedFd<'_>) -> io::Result<File> {
    let mut attr = attr();
    attr.iter_create.link_fd = raw(link);
    call_fd(bpf_cmd::BPF_ITER_CREATE, &mut attr).map(File::from)
}
