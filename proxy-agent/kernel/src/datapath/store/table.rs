//! One pinned map as a typed table: opened with its sizes checked, read and written in batches.

use std::fmt::Debug;
use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use aya::Pod;
use aya_obj::generated::bpf_map_type as Kind;

use super::pin::BpfRoot;
use crate::sys::{self, MapFacts};
use agent_core::capacity::size_flag;

/// Elements a batch call moves at once: large enough to save calls, small enough not to hold a CPU.
pub(crate) const CHUNK: usize = 4096;
/// `ENOTSUPP` of the kernel, which has no name in the C library: this map kind has no batches.
const NO_BATCH: i32 = 524;

/// Why a table could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The pin is not there or cannot be opened.
    #[error("cannot open map {map} at {path}")]
    Open { map: &'static str, path: PathBuf, source: io::Error },
    /// The pinned map is not the one this program knows.
    #[error(
        "map {map} at {path} has {found_key}-byte keys and {found_value}-byte values, expected {key} and \
         {value}: use the proxy-agent that made it, or run `proxy-agent cleanup` first"
    )]
    Layout {
        map: &'static str,
        path: PathBuf,
        /// Bytes of a key in the kernel.
        found_key: u32,
        /// Bytes of a value in the kernel.
        found_value: u32,
        /// Bytes of a key here.
        key: usize,
        /// Bytes of a value here.
        value: usize,
    },
    /// The table has no room.
    #[error("map {map} is full ({max} entries): no room for {object}; {}", remedy(map))]
    Full {
        map: &'static str,
        max: u32,
        /// What found no room.
        object: String,
    },
    /// A call failed.
    #[error("cannot {act} {object} in map {map}")]
    Call {
        /// What was tried.
        act: &'static str,
        /// The element.
        object: String,
        map: &'static str,
        source: io::Error,
    },
}

fn remedy(map: &str) -> String {
    match size_flag(map) {
        Some(flag) => format!("start the agent with a larger {flag}: what is in the table comes along"),
        None => "its size is fixed".into(),
    }
}

/// A map of `K` to `V`.
#[derive(Debug)]
pub(crate) struct Table<K, V> {
    fd: OwnedFd,
    name: &'static str,
    facts: MapFacts,
    types: PhantomData<fn(K) -> V>,
}

impl<K: Pod + Debug, V: Pod> Table<K, V> {
    /// Opens the pinned map `name`.
    pub(crate) fn open(root: &BpfRoot, name: &'static str) -> Result<Self, TableError> {
        let path = root.map(name);
        let failed = |source| TableError::Open { map: name, path: path.clone(), source };
        let fd = sys::obj_get(&path).map_err(failed)?;
        let facts = sys::map_facts(fd.as_fd()).map_err(failed)?;
        if (facts.key_size as usize, facts.value_size as usize) != (size_of::<K>(), size_of::<V>()) {
            return Err(TableError::Layout {
                map: name,
                path,
                found_key: facts.key_size,
                found_value: facts.value_size,
                key: size_of::<K>(),
                value: size_of::<V>(),
            });
        }
        Ok(Self { fd, name, facts, types: PhantomData })
    }

    /// Name of the map.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Entries the map is made for.
    pub(crate) fn max(&self) -> u32 {
        self.facts.max_entries
    }

    /// The elements in place, of an array that was made to be mapped.
    pub(crate) fn elements(&self) -> Result<sys::Elements, TableError> {
        sys::Elements::map(self.fd.as_fd(), &self.facts)
            .map_err(|source| self.failed("map", "elements".into(), source))
    }

    fn is_per_cpu(&self) -> bool {
        let per_cpu = [
            Kind::BPF_MAP_TYPE_PERCPU_HASH,
            Kind::BPF_MAP_TYPE_PERCPU_ARRAY,
            Kind::BPF_MAP_TYPE_LRU_PERCPU_HASH,
        ];
        per_cpu.iter().any(|kind| *kind as u32 == self.facts.kind)
    }

    /// One element (of a per-CPU map the values of all CPUs).
    pub(crate) fn get_all(&self, key: &K) -> Result<Option<Vec<V>>, TableError> {
        let failed = |source| self.failed("read", format!("{key:?}"), source);
        let mut cpus = 1;
        if self.is_per_cpu() {
            // The kernel rounds each CPU's value up to eight bytes; a type that is not would be misread.
            if !size_of::<V>().is_multiple_of(8) {
                return Err(failed(io::ErrorKind::InvalidData.into()));
            }
            cpus = aya::util::nr_cpus().map_err(|(_, source)| failed(source))?;
        }
        let mut values = sys::zeros::<V>(cpus);
        let found = sys::lookup(self.fd.as_fd(), key, &mut values).map_err(failed)?;
        Ok(found.then_some(values))
    }

    /// One element.
    pub(crate) fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        Ok(self.get_all(key)?.and_then(|values| values.into_iter().next()))
    }

    /// Writes one element.
    pub(crate) fn put(&self, key: &K, value: &V) -> Result<(), TableError> {
        sys::update(self.fd.as_fd(), key, value)
            .map_err(|source| self.failed("write", format!("{key:?}"), source))
    }

    /// Deletes one element; `false` when there was none.
    pub(crate) fn delete(&self, key: &K) -> Result<bool, TableError> {
        sys::delete(self.fd.as_fd(), key).map_err(|source| self.failed("delete", format!("{key:?}"), source))
    }

    /// Writes many elements in order. How many were written comes with the error.
    pub(crate) fn put_many(&self, keys: &[K], values: &[V]) -> Result<(), (usize, TableError)> {
        let mut done = 0;
        while let (Some(key), Some(value)) = (keys.get(done), values.get(done)) {
            let end = keys.len().min(done + CHUNK);
            let batch = sys::update_batch(self.fd.as_fd(), &keys[done..end], &values[done..end]);
            done += batch.done;
            match batch.result {
                Ok(()) => {}
                // Some map kinds have no batches on older kernels (LPM tries before 5.13).
                Err(error) if batch.done == 0 && is_no_batch(&error) => {
                    self.put(key, value).map_err(|error| (done, error))?;
                    done += 1;
                }
                Err(source) => {
                    let object = keys.get(done).map_or_else(String::new, |key| format!("{key:?}"));
                    return Err((done, self.failed("write", object, source)));
                }
            }
        }
        Ok(())
    }

    /// Deletes many elements; those that are not there count as deleted. Gives how many there were.
    pub(crate) fn delete_many(&self, keys: &[K]) -> Result<usize, (usize, TableError)> {
        let (mut done, mut there) = (0, 0);
        while let Some(key) = keys.get(done) {
            let end = keys.len().min(done + CHUNK);
            let batch = sys::delete_batch(self.fd.as_fd(), &keys[done..end]);
            done += batch.done;
            there += batch.done;
            match batch.result {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => done += 1,
                Err(error) if batch.done == 0 && is_no_batch(&error) => {
                    there += usize::from(self.delete(key).map_err(|error| (done, error))?);
                    done += 1;
                }
                Err(source) => {
                    let object = keys.get(done).map_or_else(String::new, |key| format!("{key:?}"));
                    return Err((done, self.failed("delete", object, source)));
                }
            }
        }
        Ok(there)
    }

    /// Shows every element to `see`, a chunk at a time.
    pub(crate) fn scan(&self, mut see: impl FnMut(K, V)) -> Result<(), TableError> {
        let mut cursor = Cursor::default();
        while self.chunk(&mut cursor, &mut see)? {}
        Ok(())
    }

    /// Shows the next chunk to `see` and moves the cursor; `false` after the last one, when the cursor stands
    /// at the start again. Elements that come or go meanwhile may or may not be seen.
    pub(crate) fn chunk(
        &self,
        cursor: &mut Cursor<K, V>,
        mut see: impl FnMut(K, V),
    ) -> Result<bool, TableError> {
        if cursor.one_by_one {
            return self.walk(cursor, see);
        }
        if cursor.keys.is_empty() {
            cursor.keys = sys::zeros(cursor.size);
            cursor.values = sys::zeros(cursor.size);
        }
        let mut to = [0; 8];
        let batch = sys::lookup_batch(
            self.fd.as_fd(),
            cursor.at.as_ref(),
            &mut to,
            &mut cursor.keys,
            &mut cursor.values,
        );
        match batch.result.as_ref().err().and_then(io::Error::raw_os_error) {
            // One hash bucket is longer than the buffer.
            Some(libc::ENOSPC) if batch.done == 0 => {
                let larger = cursor.keys.len().saturating_mul(2);
                cursor.keys = sys::zeros(larger);
                cursor.values = sys::zeros(larger);
                return Ok(true);
            }
            Some(libc::EINVAL | NO_BATCH | libc::EOPNOTSUPP) if batch.done == 0 && cursor.at.is_none() => {
                cursor.one_by_one = true;
                return self.walk(cursor, see);
            }
            // An LPM trie walks by key and loses its place when that key goes: begin again another time.
            None | Some(libc::ENOENT | libc::ENOSPC) => {}
            Some(_) => {
                cursor.at = None;
                let source = batch.result.err().unwrap_or_else(io::Error::last_os_error);
                return Err(self.failed("list", "entries".into(), source));
            }
        }
        for (key, value) in cursor.keys.iter().zip(&cursor.values).take(batch.done) {
            see(*key, *value);
        }
        let ended = matches!(&batch.result, Err(e) if e.raw_os_error() == Some(libc::ENOENT));
        cursor.at = (!ended).then_some(to);
        Ok(!ended)
    }

    /// The whole table at once, key by key: for map kinds without batches, which are small.
    fn walk(&self, cursor: &mut Cursor<K, V>, mut see: impl FnMut(K, V)) -> Result<bool, TableError> {
        for key in self.keys()? {
            if let Some(value) = self.get(&key)? {
                see(key, value);
            }
        }
        cursor.at = None;
        Ok(false)
    }

    /// Every key, one call each; works for all kinds that have keys to list.
    pub(crate) fn keys(&self) -> Result<Vec<K>, TableError> {
        let mut found = Vec::new();
        let mut last: Option<K> = None;
        // A deleted `last` starts the kernel's walk anew: twice the capacity is certainly the end.
        while found.len() < 2 * self.max() as usize {
            let mut next = sys::zeros::<K>(1);
            let Some(slot) = next.first_mut() else { break };
            let more = sys::next_key(self.fd.as_fd(), last.as_ref(), slot)
                .map_err(|source| self.failed("list", "keys".into(), source))?;
            if !more {
                break;
            }
            found.push(*slot);
            last = Some(*slot);
        }
        Ok(found)
    }

    fn failed(&self, act: &'static str, object: String, source: io::Error) -> TableError {
        match source.raw_os_error() {
            // A hash answers E2BIG, an LPM trie ENOSPC, an array E2BIG past its end.
            Some(libc::E2BIG | libc::ENOSPC) => TableError::Full { map: self.name, max: self.max(), object },
            _ => TableError::Call { act, object, map: self.name, source },
        }
    }
}

/// Shows every element of a map of any layout that has one value for all CPUs. Elements that come or go meanwhile
/// may or may not be seen.
pub(crate) fn scan_bytes(
    map: BorrowedFd<'_>,
    facts: &MapFacts,
    name: &'static str,
    see: &mut impl FnMut(&[u8], &[u8]),
) -> Result<(), TableError> {
    let failed = |source| TableError::Call { act: "list", object: "entries".into(), map: name, source };
    let (key_size, value_size) = (facts.key_size as usize, facts.value_size as usize);
    let (mut at, mut count) = (None, CHUNK);
    loop {
        let (mut keys, mut values) = (vec![0; key_size * count], vec![0; value_size * count]);
        let mut to = [0; 8];
        let batch = sys::lookup_batch_bytes(map, at.as_ref(), &mut to, &mut keys, &mut values, count);
        let code = batch.result.as_ref().err().and_then(io::Error::raw_os_error);
        match code {
            // One hash bucket is longer than the buffer.
            Some(libc::ENOSPC) if batch.done == 0 => {
                count = count.saturating_mul(2);
                continue;
            }
            Some(libc::EINVAL | NO_BATCH | libc::EOPNOTSUPP) if batch.done == 0 && at.is_none() => {
                return walk_bytes(map, facts, see).map_err(failed);
            }
            None | Some(libc::ENOENT | libc::ENOSPC) => {}
            Some(_) => return Err(failed(batch.result.err().unwrap_or_else(io::Error::last_os_error))),
        }
        let each = keys.chunks_exact(key_size).zip(values.chunks_exact(value_size));
        each.take(batch.done).for_each(|(key, value)| see(key, value));
        if code == Some(libc::ENOENT) {
            return Ok(());
        }
        at = Some(to);
    }
}

fn walk_bytes(map: BorrowedFd<'_>, facts: &MapFacts, see: &mut impl FnMut(&[u8], &[u8])) -> io::Result<()> {
    let mut value = vec![0; (facts.value_size as usize).next_multiple_of(8)];
    let (mut last, mut next) = (None::<Vec<u8>>, vec![0; facts.key_size as usize]);
    // A deleted `last` starts the kernel's walk anew: twice the capacity is certainly the end.
    for _ in 0..2 * u64::from(facts.max_entries) {
        if !sys::next_key_bytes(map, last.as_deref(), &mut next)? {
            break;
        }
        if sys::lookup_bytes(map, &next, &mut value)? {
            see(&next, value.get(..facts.value_size as usize).unwrap_or_default());
        }
        last = Some(next.clone());
    }
    Ok(())
}

/// A place in a table, kept between chunks.
#[derive(Debug)]
pub(crate) struct Cursor<K, V> {
    at: Option<[u64; 8]>,
    one_by_one: bool,
    /// Elements of a chunk.
    size: usize,
    keys: Vec<K>,
    values: Vec<V>,
}

impl<K, V> Default for Cursor<K, V> {
    fn default() -> Self {
        Self::of(CHUNK)
    }
}

impl<K, V> Cursor<K, V> {
    /// At the start, with chunks of so many elements.
    pub(crate) fn of(size: usize) -> Self {
        Self { at: None, one_by_one: false, size, keys: Vec::new(), values: Vec::new() }
    }
}

fn is_no_batch(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | NO_BATCH | libc::EOPNOTSUPP))
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::maps;

    use super::*;

    #[test]
    fn a_full_table_names_its_size_the_object_and_the_flag() {
        let error = TableError::Full { map: maps::FRONTENDS, max: 8, object: "10.96.0.1:80/TCP".into() };
        let said = error.to_string();
        for part in ["FRONTENDS", "8 entries", "10.96.0.1:80/TCP", "--max-frontends"] {
            assert!(said.contains(part), "{said}");
        }
    }
}
