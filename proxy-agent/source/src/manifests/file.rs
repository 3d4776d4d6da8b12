//! Safe reading of an unknown file: only regular files of bounded size are read, and reading never blocks.
//!
//! A directory of manifests may hold anything: a FIFO without a writer, a device, an endless pseudo-file, one of 2 GB. Opening
//! some of them has effects, or blocks for ever. So a file is first opened with `O_PATH`, checked, and then reopened through
//! that descriptor: replacing the file meanwhile has no effect.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::statfs::{self, FsType, fstatfs};

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    /// A broken link, or one in a circle.
    #[error("is a broken link: its target does not exist")]
    Dangling,
    /// Not a regular file.
    #[error("is {0}, not a regular file: it is not read")]
    Kind(&'static str),
    /// A file of /proc, /sys and their like.
    #[error("is a pseudo-file, such as those of /proc: it is not read")]
    PseudoFile,
    /// Over the limit for one file.
    #[error("has {size} bytes, and {limit} are the most that is read of one file: split it")]
    TooLarge { size: u64, limit: u64 },
    /// Over the limit for all files together.
    #[error("is too large together with the files before it")]
    OverTotal,
    /// It is being written to.
    #[error("changed while it was read: it will be read again")]
    Changing,
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// Reads a regular file of at most `limit` bytes, and at most `remaining`, following links.
pub(super) fn read(path: &Path, limit: u64, remaining: u64) -> Result<Vec<u8>, ReadError> {
    let found = match open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(found) => File::from(found),
        Err(nix::Error::ENOENT) => return Err(ReadError::Dangling),
        Err(error) => return Err(io::Error::from(error).into()),
    };
    let before = found.metadata()?;
    if let Some(kind) = odd_kind(&before) {
        return Err(ReadError::Kind(kind));
    }
    if is_pseudo(fstatfs(&found).map_err(io::Error::from)?.filesystem_type()) {
        return Err(ReadError::PseudoFile);
    }
    let size = before.len();
    if size > limit {
        return Err(ReadError::TooLarge { size, limit });
    }
    if size > remaining {
        return Err(ReadError::OverTotal);
    }
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1);
    // One byte more shows that it has grown; a file system with wrong sizes does not make us read for ever.
    (&file).take(size + 1).read_to_end(&mut bytes)?;
    let after = file.metadata()?;
    let stamp = |of: &Metadata| (of.len(), of.mtime(), of.mtime_nsec());
    if bytes.len() as u64 != size || stamp(&before) != stamp(&after) {
        return Err(ReadError::Changing);
    }
    Ok(bytes)
}

/// The kind of a file that is not a regular one.
fn odd_kind(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    match () {
        () if kind.is_file() => None,
        () if kind.is_dir() => Some("a directory"),
        () if kind.is_fifo() => Some("a FIFO"),
        () if kind.is_socket() => Some("a socket"),
        () => Some("a device"),
    }
}

/// Whether the kernel generates these files when they are read: that may block, never end, or consume something.
fn is_pseudo(kind: FsType) -> bool {
    const SYSFS: i64 = 0x6265_6572;
    const DEBUGFS: i64 = 0x6462_6720;
    const CONFIGFS: i64 = 0x6265_6570;
    let named = [
        statfs::PROC_SUPER_MAGIC,
        statfs::CGROUP_SUPER_MAGIC,
        statfs::CGROUP2_SUPER_MAGIC,
        statfs::TRACEFS_MAGIC,
        statfs::BPF_FS_MAGIC,
        statfs::SECURITYFS_MAGIC,
    ];
    named.contains(&kind) || [SYSFS, DEBUGFS, CONFIGFS].map(|magic| FsType(magic as _)).contains(&kind)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;

    use nix::unistd::mkfifo;

    use super::*;

    const LIMIT: u64 = 100;

    fn why(path: &Path) -> String {
        read(path, LIMIT, LIMIT).unwrap_err().to_string()
    }

    #[test]
    fn a_regular_file_is_read_through_links_up_to_its_limits() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("a"), dir.path().join("b"));
        symlink("a", &link).unwrap();
        fs::write(&file, vec![b'x'; 100]).unwrap();
        assert_eq!(read(&link, LIMIT, LIMIT).unwrap().len(), 100);
        assert!(matches!(read(&link, LIMIT, 99), Err(ReadError::OverTotal)));
        fs::write(&file, "").unwrap();
        assert_eq!(read(&file, LIMIT, 0).unwrap(), b"");
        File::create(&file).unwrap().set_len(2 << 30).unwrap();
        assert!(why(&link).starts_with("has 2147483648 bytes, and 100 are the most"), "{}", why(&link));
    }

    #[test]
    fn everything_else_is_named_and_nothing_waits() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        symlink("nowhere", at("dangling")).unwrap();
        symlink("loop", at("loop")).unwrap();
        symlink("fifo", at("link")).unwrap();
        for (path, expected) in [
            (at("fifo"), "is a FIFO"),
            (at("link"), "is a FIFO"),
            (at("socket"), "is a socket"),
            (dir.path().to_owned(), "is a directory"),
            (at("dangling"), "is a broken link"),
            (at("loop"), "cannot be read: "),
            (PathBuf::from("/dev/zero"), "is a device"),
            (PathBuf::from("/dev/null"), "is a device"),
            (PathBuf::from("/proc/kmsg"), "is a pseudo-file"),
            (PathBuf::from("/proc/version"), "is a pseudo-file"),
            (PathBuf::from("/sys/kernel/mm/transparent_hugepage/enabled"), "is a pseudo-file"),
        ] {
            if path.exists() || !path.starts_with("/sys") {
                assert!(why(&path).starts_with(expected), "{}: {}", path.display(), why(&path));
            }
        }
    }
}
