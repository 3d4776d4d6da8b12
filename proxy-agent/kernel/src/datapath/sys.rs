//! The `bpf(2)` calls that aya does not offer: batches, links by interface index, atomic link updates.
//!
//! Every unsafe line of the agent is here (and in the two socket calls of `probe` and `sockets`). An error
//! is the kernel's own `io::Error`; callers name the act and the object.

use std::ffi::{CString, c_char, c_void};
use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use aya::Pod;
use aya_obj::generated::{
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type, bpf_map_info, bpf_map_type,
    bpf_prog_info, bpf_prog_type,
};

/// `BPF_F_REPLACE`: a link update names the program it expects to replace.
const REPLACE: u32 = 1 << 2;
/// `BPF_F_BEFORE`: before all others when no other is named.
const BEFORE: u32 = 1 << 3;
/// `BPF_F_AFTER`: after all others when no other is named.
const AFTER: u32 = 1 << 4;

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

#[expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]
fn call(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: `attr` is valid for reads and writes of the size given; pointers inside it were made from
    // buffers that outlive this call, by the functions of this file.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, cmd as u32, &raw mut *attr, size_of::<bpf_attr>()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// The same for calls that return a new descriptor (the kernel sets close-on-exec on all of them).
#[expect(unsafe_code, reason = "takes ownership of a descriptor")]
fn call_fd(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = call(cmd, attr)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

#[expect(unsafe_code, reason = "a C union of integers starts as zero bytes")]
fn attr() -> bpf_attr {
    // SAFETY: every member is made of integers and pointers-as-integers: zero bytes are a value.
    unsafe { zeroed() }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn text(name: &[c_char]) -> String {
    let bytes: Vec<u8> = name.iter().map(|c| *c as u8).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
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

/// Makes a map; its keys and values have the sizes given.
pub(crate) fn map_create(
    kind: bpf_map_type,
    key_size: usize,
    value_size: usize,
    max_entries: u32,
) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.__bindgen_anon_1.map_type = kind as u32;
    attr.__bindgen_anon_1.key_size = key_size as u32;
    attr.__bindgen_anon_1.value_size = value_size as u32;
    attr.__bindgen_anon_1.max_entries = max_entries;
    call_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr)
}

/// Makes an array of one element for user space, with this name.
pub(crate) fn note_create(name: &str, value_size: u32) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.__bindgen_anon_1.map_type = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    attr.__bindgen_anon_1.key_size = size_of::<u32>() as u32;
    attr.__bindgen_anon_1.value_size = value_size;
    attr.__bindgen_anon_1.max_entries = 1;
    let mut text = [0 as c_char; 16];
    for (to, from) in text.iter_mut().take(15).zip(name.bytes()) {
        *to = from as c_char;
    }
    attr.__bindgen_anon_1.map_name = text;
    call_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr)
}

/// Loads a program of hand-written instructions, each as its eight bytes.
pub(crate) fn program_load(
    kind: bpf_prog_type,
    hook: Option<bpf_attach_type>,
    instructions: &[u64],
) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.__bindgen_anon_3.prog_type = kind as u32;
    attr.__bindgen_anon_3.expected_attach_type = hook.map_or(0, |hook| hook as u32);
    attr.__bindgen_anon_3.insns = instructions.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = instructions.len() as u32;
    attr.__bindgen_anon_3.license = c"GPL".as_ptr() as u64;
    call_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr)
}

/// Loads an iterator over what the kernel function with this BTF id lists.
pub(crate) fn iterator_load(function: u32, instructions: &[u64]) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_TRACING as u32;
    attr.__bindgen_anon_3.expected_attach_type = bpf_attach_type::BPF_TRACE_ITER as u32;
    attr.__bindgen_anon_3.attach_btf_id = function;
    attr.__bindgen_anon_3.insns = instructions.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = instructions.len() as u32;
    attr.__bindgen_anon_3.license = c"GPL".as_ptr() as u64;
    call_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr)
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

/// The values that `bytes` begin with, one after the other.
#[expect(unsafe_code, reason = "Pod types are values whatever their bytes")]
pub(crate) fn values<T: Pod>(bytes: &[u8]) -> Vec<T> {
    let chunks = bytes.chunks_exact(size_of::<T>());
    // SAFETY: each chunk has the length of a value, `Pod` promises that any bytes are one, and it is copied from
    // wherever it lies.
    chunks.map(|chunk| unsafe { chunk.as_ptr().cast::<T>().read_unaligned() }).collect()
}

/// A descriptor of another process, duplicated into this one.
#[expect(unsafe_code, reason = "the C library has no wrapper")]
pub(crate) fn descriptor_of(process: i32, descriptor: RawFd) -> io::Result<OwnedFd> {
    let new = |ret: libc::c_long| {
        if ret < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(ret as RawFd) })
    };
    // SAFETY: takes numbers.
    let process = new(unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) })?;
    // SAFETY: takes numbers, the first of a descriptor that is open.
    new(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), descriptor, 0) })
}

/// Runs a program once on `packet` and gives its return value.
pub(crate) fn program_run(program: BorrowedFd<'_>, packet: &[u8]) -> io::Result<u32> {
    let mut attr = attr();
    attr.test.prog_fd = raw(program);
    attr.test.data_in = packet.as_ptr() as u64;
    attr.test.data_size_in = packet.len() as u32;
    attr.test.repeat = 1;
    call(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr)?;
    #[expect(unsafe_code, reason = "reads back the member that the call has filled")]
    // SAFETY: the call above used this member; any bytes are a value.
    let ret = unsafe { attr.test.retval };
    Ok(ret)
}

/// `n` zeroed values.
#[expect(unsafe_code, reason = "Pod types are values whatever their bytes")]
pub(crate) fn zeros<T: Pod>(n: usize) -> Vec<T> {
    // SAFETY: `Pod` promises that any bytes, so zeros, too, are a value.
    vec![unsafe { zeroed() }; n]
}

/// Waits for a grace period of the kernel: whatever runs between two of them now, as all that receives packets does, has
/// ended when this returns (membarrier(2), `MEMBARRIER_CMD_GLOBAL`).
pub(crate) fn wait_for_grace() -> io::Result<()> {
    const GLOBAL: libc::c_int = 1;
    #[expect(unsafe_code, reason = "the C library has no function for this call")]
    // SAFETY: takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether this thread goes before all threads that have no such right; what it begins does not.
pub(crate) fn go_first(first: bool) -> io::Result<()> {
    let (policy, priority) = match first {
        true => (libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, 1),
        false => (libc::SCHED_OTHER, 0),
    };
    let parameters = libc::sched_param { sched_priority: priority };
    #[expect(unsafe_code, reason = "no crate in use has this call")]
    // SAFETY: the kernel reads one structure, which lives through the call; 0 is this thread.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The bytes of a value.
#[expect(unsafe_code, reason = "Pod types have no padding that would be read uninitialised")]
pub(crate) fn bytes<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: a reference to so many bytes, all of them written, which live as long.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }
}

/// Reads an element; `None` when there is none. `value` must have room for the map's value (per-CPU maps:
/// one for each possible CPU), which the caller has checked against the kernel's word.
pub(crate) fn lookup<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, values: &mut [V]) -> io::Result<bool> {
    let mut attr = attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = &raw const *key as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = values.as_mut_ptr() as u64;
    match call(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes an element.
pub(crate) fn update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr = attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = &raw const *key as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = &raw const *value as u64;
    call(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Deletes an element; `false` when there was none.
pub(crate) fn delete<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = &raw const *key as u64;
    match call(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The key after `key` (the first without one), written to `next`; `false` at the end.
pub(crate) fn next_key<K: Pod>(map: BorrowedFd<'_>, key: Option<&K>, next: &mut K) -> io::Result<bool> {
    let mut attr = attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = key.map_or(0, |key| &raw const *key as u64);
    attr.__bindgen_anon_2.__bindgen_anon_1.next_key = &raw mut *next as u64;
    match call(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// What a batch call did: how many elements it got through, and why it stopped short.
pub(crate) struct Batch {
    pub(crate) done: usize,
    pub(crate) result: io::Result<()>,
}

#[expect(unsafe_code, reason = "reads back the member that the call has filled")]
fn batch(cmd: bpf_cmd, mut attr: bpf_attr) -> Batch {
    // SAFETY: the callers below have filled this member; any bytes are a value.
    let asked = unsafe { attr.batch.count };
    let result = call(cmd, &mut attr).map(drop);
    // SAFETY: as above; the kernel writes the count back before it returns.
    let count = unsafe { attr.batch.count }.min(asked);
    // A call that fails before its first element may leave the count as it was (EINVAL, ENOTSUPP).
    let refused = matches!(&result, Err(e) if count == asked && e.raw_os_error() != Some(libc::ENOENT));
    Batch { done: if refused { 0 } else { count as usize }, result }
}

/// Writes many elements; the slices must be of one length.
pub(crate) fn update_batch<K: Pod, V: Pod>(map: BorrowedFd<'_>, keys: &[K], values: &[V]) -> Batch {
    let mut attr = attr();
    attr.batch.map_fd = raw(map);
    attr.batch.keys = keys.as_ptr() as u64;
    attr.batch.values = values.as_ptr() as u64;
    attr.batch.count = keys.len().min(values.len()) as u32;
    batch(bpf_cmd::BPF_MAP_UPDATE_BATCH, attr)
}

/// Deletes many elements; ends at the first that does not exist.
pub(crate) fn delete_batch<K: Pod>(map: BorrowedFd<'_>, keys: &[K]) -> Batch {
    let mut attr = attr();
    attr.batch.map_fd = raw(map);
    attr.batch.keys = keys.as_ptr() as u64;
    attr.batch.count = keys.len() as u32;
    batch(bpf_cmd::BPF_MAP_DELETE_BATCH, attr)
}

/// Reads the elements after `from` (from the start without it) into both slices and leaves the new position
/// in `to`. `ENOENT` is the end (what was read counts), `ENOSPC` asks for a larger buffer. Positions have
/// room for the longest key.
pub(crate) fn lookup_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    from: Option<&[u64; 8]>,
    to: &mut [u64; 8],
    keys: &mut [K],
    values: &mut [V],
) -> Batch {
    let mut attr = attr();
    attr.batch.map_fd = raw(map);
    attr.batch.in_batch = from.map_or(0, |from| from.as_ptr() as u64);
    attr.batch.out_batch = to.as_mut_ptr() as u64;
    attr.batch.keys = keys.as_mut_ptr() as u64;
    attr.batch.values = values.as_mut_ptr() as u64;
    attr.batch.count = keys.len().min(values.len()) as u32;
    batch(bpf_cmd::BPF_MAP_LOOKUP_BATCH, attr)
}

/// Reads an element of any size; `value` must have room for what the map has of each element (of a per-CPU map, of all
/// CPUs).
pub(crate) fn lookup_bytes(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = key.as_ptr() as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_mut_ptr() as u64;
    match call(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes an element whose key and value have the sizes of the map's.
pub(crate) fn update_bytes(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attr = attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = key.as_ptr() as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_ptr() as u64;
    call(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// [`next_key`] for keys of any size.
pub(crate) fn next_key_bytes(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
    let mut attr = attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = key.map_or(0, |key| key.as_ptr() as u64);
    attr.__bindgen_anon_2.__bindgen_anon_1.next_key = next.as_mut_ptr() as u64;
    match call(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// [`lookup_batch`] for keys and values of any size: both buffers have room for `count`.
pub(crate) fn lookup_batch_bytes(
    map: BorrowedFd<'_>,
    from: Option<&[u64; 8]>,
    to: &mut [u64; 8],
    keys: &mut [u8],
    values: &mut [u8],
    count: usize,
) -> Batch {
    let mut attr = attr();
    attr.batch.map_fd = raw(map);
    attr.batch.in_batch = from.map_or(0, |from| from.as_ptr() as u64);
    attr.batch.out_batch = to.as_mut_ptr() as u64;
    attr.batch.keys = keys.as_mut_ptr() as u64;
    attr.batch.values = values.as_mut_ptr() as u64;
    attr.batch.count = count as u32;
    batch(bpf_cmd::BPF_MAP_LOOKUP_BATCH, attr)
}

/// The elements of an array that was made to be mapped (`BPF_F_MMAPABLE`), as words of 64 bits that programs may change at
/// any moment.
#[derive(Debug)]
pub(crate) struct Elements {
    words: std::ptr::NonNull<u64>,
    count: usize,
}

// SAFETY: the words are only ever read and written as a whole, and stay mapped as long as this lives.
#[expect(unsafe_code, reason = "a pointer to memory that is shared with the kernel")]
unsafe impl Send for Elements {}

impl Elements {
    /// Maps the elements of `map`, whose values take so many bytes each.
    #[expect(unsafe_code, reason = "mmap(2)")]
    pub(crate) fn map(map: BorrowedFd<'_>, facts: &MapFacts) -> io::Result<Self> {
        let count = (facts.value_size as usize).div_ceil(8) * facts.max_entries as usize;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * 8,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words = std::ptr::NonNull::new(at.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { words, count })
    }

    /// The word at a place; zero past the end.
    #[expect(unsafe_code, reason = "memory that is shared with the kernel")]
    pub(crate) fn get(&self, at: usize) -> u64 {
        if at >= self.count {
            return 0;
        }
        // SAFETY: within the mapping, and aligned, since it begins at a page.
        unsafe { self.words.add(at).read_volatile() }
    }

    /// Writes the word at a place; nothing past the end.
    #[expect(unsafe_code, reason = "memory that is shared with the kernel")]
    pub(crate) fn set(&self, at: usize, word: u64) {
        if at < self.count {
            // SAFETY: as above.
            unsafe { self.words.add(at).write_volatile(word) };
        }
    }
}

impl Elements {
    /// Writes a single byte; nothing past the end.
    #[expect(unsafe_code, reason = "memory that is shared with the kernel")]
    pub(crate) fn set_byte(&self, at: usize, byte: u8) {
        if at < self.count * 8 {
            // SAFETY: within the mapping.
            unsafe { self.words.cast::<u8>().add(at).write_volatile(byte) };
        }
    }
}

impl Drop for Elements {
    #[expect(unsafe_code, reason = "munmap(2)")]
    fn drop(&mut self) {
        // SAFETY: what `map` has mapped, and nobody else has a pointer to it.
        unsafe { libc::munmap(self.words.as_ptr().cast(), self.count * 8) };
    }
}

/// `getsockopt` of a plain integer option.
pub(crate) fn socket_u64(fd: BorrowedFd<'_>, level: i32, option: i32) -> io::Result<u64> {
    let mut value = [0; size_of::<u64>()];
    socket_bytes(fd, level, option, &mut value)?;
    Ok(u64::from_ne_bytes(value))
}

/// `getsockopt` of any option: what `value` holds is asked with, and replaced by the answer.
#[expect(unsafe_code, reason = "the wrappers know only some options")]
pub(crate) fn socket_bytes(fd: BorrowedFd<'_>, level: i32, option: i32, value: &mut [u8]) -> io::Result<()> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: `value` is valid for reads and writes of `len` bytes, and `len` for writes.
    let ret = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, option, value.as_mut_ptr().cast::<c_void>(), &raw mut len)
    };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
