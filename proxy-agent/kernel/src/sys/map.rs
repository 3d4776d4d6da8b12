//! Maps: made, and their elements read and written, one by one or in batches.

use std::ffi::c_char;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use aya::Pod;
use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_map_type};

use super::{attr, call, call_fd, raw};

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
