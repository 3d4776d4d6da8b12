//! The few `bpf(2)` calls with which somebody else gets at what an agent has left in the kernel.

use std::ffi::CString;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use aya_obj::generated::{
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_map_info, bpf_map_type, bpf_prog_type,
};

#[expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]
fn call(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    let size = size_of::<bpf_attr>();
    // SAFETY: `attr` is valid for so many bytes; pointers in it were made from buffers that outlive this call.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, cmd as u32, &raw mut *attr, size) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

#[expect(unsafe_code, reason = "takes ownership of a descriptor")]
fn open(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = call(cmd, attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) })
}

#[expect(unsafe_code, reason = "a C union of integers starts as zero bytes")]
fn attr() -> bpf_attr {
    // SAFETY: made of integers alone.
    unsafe { zeroed() }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Opens what is pinned at `path`.
pub fn get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    open(bpf_cmd::BPF_OBJ_GET, &mut attr)
}

/// Pins `fd` at `path`.
pub fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = raw(fd);
    call(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

fn info<T>(fd: BorrowedFd<'_>, into: &mut T) -> io::Result<()> {
    let mut attr = attr();
    attr.info.bpf_fd = raw(fd);
    attr.info.info_len = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    attr.info.info = &raw mut *into as u64;
    call(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// Id of the program behind a link.
#[expect(unsafe_code, reason = "a C struct of integers starts as zero bytes")]
pub fn program_of(link: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: made of integers alone.
    let mut found: bpf_link_info = unsafe { zeroed() };
    info(link, &mut found)?;
    Ok(found.prog_id)
}

/// A program that does nothing: it lets everything go on (`SCHED_CLS`: the next program), or pass.
pub fn idle_program(kind: bpf_prog_type, hook: bpf_attach_type) -> io::Result<OwnedFd> {
    let verdict: i64 = if kind == bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS { -1 } else { 1 };
    // r0 = verdict; exit
    let instructions: [u64; 2] = [0xb7 | verdict.cast_unsigned() << 32, 0x95];
    let mut attr = attr();
    attr.__bindgen_anon_3.prog_type = kind as u32;
    attr.__bindgen_anon_3.expected_attach_type = hook as u32;
    attr.__bindgen_anon_3.insns = instructions.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = 2;
    attr.__bindgen_anon_3.license = c"GPL".as_ptr() as u64;
    open(bpf_cmd::BPF_PROG_LOAD, &mut attr)
}

/// Puts another program behind a link.
pub fn replace(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = attr();
    attr.link_update.link_fd = raw(link);
    attr.link_update.__bindgen_anon_1.new_prog_fd = raw(program);
    call(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches a link, whoever holds it.
pub fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = attr();
    attr.link_detach.link_fd = raw(link);
    call(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

/// Attaches a program to an interface of this thread's network namespace, as long as the link lives.
pub fn attach(program: BorrowedFd<'_>, index: u32, hook: bpf_attach_type) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_ifindex = index;
    attr.link_create.attach_type = hook as u32;
    open(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// Attaches a program to a cgroup so that there is no place for another one, until it is detached.
pub fn attach_alone(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    hook: bpf_attach_type,
) -> io::Result<()> {
    alone(bpf_cmd::BPF_PROG_ATTACH, program, cgroup, hook)
}

/// Takes it away again.
pub fn detach_alone(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    hook: bpf_attach_type,
) -> io::Result<()> {
    alone(bpf_cmd::BPF_PROG_DETACH, program, cgroup, hook)
}

fn alone(
    act: bpf_cmd,
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    hook: bpf_attach_type,
) -> io::Result<()> {
    let mut attr = attr();
    attr.__bindgen_anon_5.__bindgen_anon_1.target_fd = raw(cgroup);
    attr.__bindgen_anon_5.attach_bpf_fd = raw(program);
    attr.__bindgen_anon_5.attach_type = hook as u32;
    call(act, &mut attr).map(drop)
}

/// A map of any layout, its keys and values as bytes.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    kind: u32,
    key: usize,
    value: usize,
    entries: u32,
}

impl Map {
    /// Opens a pinned one.
    #[expect(unsafe_code, reason = "a C struct of integers starts as zero bytes")]
    pub fn open(path: &Path) -> io::Result<Self> {
        use std::os::fd::AsFd as _;
        let fd = get(path)?;
        // SAFETY: made of integers alone.
        let mut found: bpf_map_info = unsafe { zeroed() };
        info(fd.as_fd(), &mut found)?;
        let size = |bytes: u32| bytes as usize;
        Ok(Self {
            fd,
            kind: found.type_,
            key: size(found.key_size),
            value: size(found.value_size),
            entries: found.max_entries,
        })
    }

    /// Makes one of the same layout with nothing in it.
    pub fn make_alike(&self) -> io::Result<OwnedFd> {
        /// `BPF_F_NO_PREALLOC`, which tries ask for.
        const NO_PREALLOC: u32 = 1;
        let mut attr = attr();
        attr.__bindgen_anon_1.map_type = self.kind;
        attr.__bindgen_anon_1.key_size = u32::try_from(self.key).map_err(io::Error::other)?;
        attr.__bindgen_anon_1.value_size = u32::try_from(self.value).map_err(io::Error::other)?;
        attr.__bindgen_anon_1.max_entries = self.entries;
        attr.__bindgen_anon_1.map_flags =
            if self.kind == bpf_map_type::BPF_MAP_TYPE_LPM_TRIE as u32 { NO_PREALLOC } else { 0 };
        open(bpf_cmd::BPF_MAP_CREATE, &mut attr)
    }

    /// Whether it is an array, whose elements cannot be deleted.
    #[must_use]
    pub fn is_array(&self) -> bool {
        self.kind == bpf_map_type::BPF_MAP_TYPE_ARRAY as u32
    }

    /// All keys.
    pub fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut found: Vec<Vec<u8>> = Vec::new();
        loop {
            let mut next = vec![0; self.key];
            let mut attr = self.attr();
            attr.__bindgen_anon_2.key = found.last().map_or(0, |last| last.as_ptr() as u64);
            attr.__bindgen_anon_2.__bindgen_anon_1.next_key = next.as_mut_ptr() as u64;
            match call(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) {
                Ok(_) => found.push(next),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
                Err(error) => return Err(error),
            }
        }
    }

    /// A value; `None` where there is no such key.
    pub fn value(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; self.value];
        let mut attr = self.attr();
        attr.__bindgen_anon_2.key = key.as_ptr() as u64;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_mut_ptr() as u64;
        match call(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a value.
    pub fn put(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        assert_eq!((key.len(), value.len()), (self.key, self.value), "bytes of a key and a value");
        let mut attr = self.attr();
        attr.__bindgen_anon_2.key = key.as_ptr() as u64;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_ptr() as u64;
        call(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
    }

    /// Deletes an entry.
    pub fn delete(&self, key: &[u8]) -> io::Result<()> {
        let mut attr = self.attr();
        attr.__bindgen_anon_2.key = key.as_ptr() as u64;
        call(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr).map(drop)
    }

    /// Bytes of a key and of a value.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        (self.key, self.value)
    }

    fn attr(&self) -> bpf_attr {
        use std::os::fd::AsFd as _;
        let mut attr = attr();
        attr.__bindgen_anon_2.map_fd = raw(self.fd.as_fd());
        attr
    }
}
