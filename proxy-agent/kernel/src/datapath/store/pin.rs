//! Every path on bpffs, and nothing else.
//!
//! `<root>/g<N>/maps/<NAME>` is a table, of the Nth generation that has been made under this root, `<root>/g<N>/flows` the program
//! that looks after its flows, and `<root>/links/<name>` a link: that belongs to no generation, since the next one takes it over.
//! A generation is made in `<root>/new` and gets its number when it is whole; the highest number counts.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, statfs};

/// Where bpffs stands on every distribution.
const BPFFS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC` of `linux/magic.h`.
const BPFFS_MAGIC: i64 = 0xcafe_4a11;
/// Link in the making; renamed over the old one when whole.
pub(crate) const NEW: &str = "new_";
/// The generation in the making.
const MAKING: &str = "new";
/// The first generation.
const FIRST: u64 = 1;

/// Why pins cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The directory could not be made.
    #[error("cannot create {path}; run as root, or name another directory with --bpf-root")]
    Create { path: PathBuf, source: io::Error },
    /// bpffs could not be mounted.
    #[error("cannot mount bpffs at {path}; run as root (CAP_SYS_ADMIN), or: mount -t bpf bpf {path}")]
    Mount {
        /// The mount point.
        path: PathBuf,
        source: io::Error,
    },
    /// The file system could not be looked at.
    #[error("cannot tell what file system {path} is on")]
    Statfs { path: PathBuf, source: io::Error },
    /// An object could not be pinned.
    #[error("cannot pin {path}")]
    Pin { path: PathBuf, source: io::Error },
    /// A directory could not be read or removed.
    #[error("cannot {act} {path}")]
    Directory {
        /// What was tried.
        act: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// The directory on bpffs under which everything of this agent is pinned, and which of its generations is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BpfRoot {
    root: PathBuf,
    tables: Tables,
}

/// Which generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tables {
    /// The newest whole one at each look.
    Newest,
    /// This one.
    Of(u64),
    /// The one in the making.
    Making,
}

/// Held by the one agent that writes under a root; ends with the process.
#[derive(Debug)]
pub struct RootLock {
    _held: Flock<File>,
}

impl BpfRoot {
    /// The root when none is named.
    pub const DEFAULT: &'static str = "/sys/fs/bpf/ebpf-proxy";

    /// A root at `path`; nothing is touched yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { root: path.into(), tables: Tables::Newest }
    }

    /// The root itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// The same root, of which only this generation is meant.
    #[must_use]
    pub(crate) fn at(&self, generation: u64) -> Self {
        Self { tables: Tables::Of(generation), ..self.clone() }
    }

    /// The same root, of which the generation is meant that is being made.
    #[must_use]
    pub(crate) fn in_making(&self) -> Self {
        Self { tables: Tables::Making, ..self.clone() }
    }

    /// The same root, with the generation that is the newest now.
    pub fn settled(&self) -> Result<Self, PinError> {
        Ok(self.generations()?.last().map_or_else(|| self.clone(), |newest| self.at(*newest)))
    }

    /// The numbers of the generations that are there, in ascending order.
    pub fn generations(&self) -> Result<Vec<u64>, PinError> {
        let number = |name: String| name.strip_prefix('g')?.parse().ok();
        let mut found: Vec<u64> = names(&self.root)?.into_iter().filter_map(number).collect();
        found.sort_unstable();
        Ok(found)
    }

    /// Where the generation is.
    #[must_use]
    pub fn generation(&self) -> PathBuf {
        let of = |number| self.root.join(format!("g{number}"));
        match self.tables {
            // What cannot be read is not there, either.
            Tables::Newest => {
                of(self.generations().ok().and_then(|all| all.last().copied()).unwrap_or(FIRST))
            }
            Tables::Of(number) => of(number),
            Tables::Making => self.root.join(MAKING),
        }
    }

    /// Where the maps are.
    #[must_use]
    pub fn maps(&self) -> PathBuf {
        self.generation().join("maps")
    }

    /// Where a map is.
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Where a program is that belongs to the tables and no hook carries.
    #[must_use]
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.generation().join(name)
    }

    /// Where the same is while it replaces another one.
    pub(crate) fn program_in_making(&self, name: &str) -> PathBuf {
        self.generation().join(format!("{NEW}{name}"))
    }

    /// Where the links are.
    #[must_use]
    pub fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// Where a link is.
    #[must_use]
    pub fn link(&self, name: &str) -> PathBuf {
        self.links().join(name)
    }

    /// Begins a generation: what an agent has left behind that died over one goes.
    pub(crate) fn begin(&self) -> Result<Self, PinError> {
        let making = self.in_making();
        clear(&making.generation())?;
        create(&making.maps())?;
        Ok(making)
    }

    /// The generation in the making is whole, and has this number from now on.
    pub(crate) fn commit(&self, number: u64) -> Result<Self, PinError> {
        let (from, to) = (self.in_making(), self.at(number));
        fs::rename(from.generation(), to.generation()).map_err(|source| PinError::Directory {
            act: "complete",
            path: to.generation(),
            source,
        })?;
        Ok(to)
    }

    /// The generation after the newest.
    pub(crate) fn next(&self) -> Result<u64, PinError> {
        Ok(self.generations()?.last().map_or(FIRST, |newest| newest + 1))
    }

    /// Removes the generation.
    pub(crate) fn remove_generation(&self) -> Result<usize, PinError> {
        clear(&self.generation())
    }

    /// Whether the root lies on a bpffs.
    #[must_use]
    pub fn is_on_bpffs(&self) -> bool {
        nearest(&self.root).is_ok_and(|path| is_bpffs(&path).unwrap_or(false))
    }

    /// Whether the root is itself where a file system is mounted.
    pub(crate) fn is_mount_point(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let device = |path: &Path| fs::metadata(path).map(|found| found.dev()).ok();
        self.root.parent().is_none_or(|above| device(above) != device(&self.root))
    }

    /// Makes the directories, mounting a bpffs first where there is none.
    pub fn prepare(&self) -> Result<(), PinError> {
        if !is_bpffs(&nearest(&self.root)?)? {
            let point = if self.root.starts_with(BPFFS) { Path::new(BPFFS) } else { &self.root };
            create(point)?;
            mount(Some("bpf"), point, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
                .map_err(|errno| PinError::Mount { path: point.to_owned(), source: errno.into() })?;
        }
        create(&self.links())
    }

    /// Claims the root for this process; `None` when another agent has it.
    pub fn lock(&self) -> Result<Option<RootLock>, PinError> {
        let opened = File::open(&self.root).map_err(|source| self.failed("open", source))?;
        match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
            Ok(held) => Ok(Some(RootLock { _held: held })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(self.failed("lock", errno.into())),
        }
    }

    /// Whether an agent has claimed the root. Asking claims it for an instant: see [`Self::lock_within`].
    pub fn is_claimed(&self) -> Result<bool, PinError> {
        let opened = match File::open(&self.root) {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(self.failed("open", source)),
        };
        match Flock::lock(opened, FlockArg::LockSharedNonblock) {
            Ok(_) => Ok(false),
            Err((_, Errno::EWOULDBLOCK)) => Ok(true),
            Err((_, errno)) => Err(self.failed("lock", errno.into())),
        }
    }

    /// Claims the root, trying for a while: an agent that ends, or somebody who only looks, lets go of it soon.
    pub fn lock_within(&self, patience: Duration) -> Result<Option<RootLock>, PinError> {
        let begun = Instant::now();
        loop {
            match self.lock()? {
                None if begun.elapsed() < patience => std::thread::sleep(Duration::from_millis(20)),
                claimed => return Ok(claimed),
            }
        }
    }

    /// Names of the pinned links; none when the directory does not exist.
    pub fn link_names(&self) -> Result<Vec<String>, PinError> {
        names(&self.links())
    }

    /// Whether programs are pinned at hooks.
    pub fn has_hooks(&self) -> Result<bool, PinError> {
        Ok(self.link_names()?.iter().any(|name| !name.starts_with(NEW)))
    }

    /// Directories of agents before generations, one for each layout.
    pub(crate) fn versions(&self) -> Result<Vec<PathBuf>, PinError> {
        let is_version = |name: &String| {
            name.strip_prefix('v').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        };
        Ok(names(&self.root)?.into_iter().filter(is_version).map(|name| self.root.join(name)).collect())
    }

    fn failed(&self, act: &'static str, source: io::Error) -> PinError {
        PinError::Directory { act, path: self.root.clone(), source }
    }
}

impl Default for BpfRoot {
    fn default() -> Self {
        Self::new(Self::DEFAULT)
    }
}

/// Names in a directory, sorted; none when it does not exist.
pub(crate) fn names(directory: &Path) -> Result<Vec<String>, PinError> {
    let failed = |source| PinError::Directory { act: "read", path: directory.to_owned(), source };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}

/// Removes a pin or an empty directory; `false` when it was not there.
pub(crate) fn remove(path: &Path, directory: bool) -> Result<bool, PinError> {
    let removed = if directory { fs::remove_dir(path) } else { fs::remove_file(path) };
    match removed {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(PinError::Directory { act: "remove", path: path.to_owned(), source }),
    }
}

/// Removes a generation's directory with all that is in it; how many maps there were.
fn clear(directory: &Path) -> Result<usize, PinError> {
    let maps = directory.join("maps");
    let mut removed = 0;
    for name in names(&maps)? {
        removed += usize::from(remove(&maps.join(name), false)?);
    }
    remove(&maps, true)?;
    for name in names(directory)? {
        remove(&directory.join(name), false)?;
    }
    remove(directory, true)?;
    Ok(removed)
}

/// The nearest directory above (or at) `path` that exists.
fn nearest(path: &Path) -> Result<PathBuf, PinError> {
    let mut at = path;
    loop {
        match fs::symlink_metadata(at) {
            Ok(_) => return Ok(at.to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(PinError::Statfs { path: at.to_owned(), source }),
        }
        match at.parent() {
            Some(above) if !above.as_os_str().is_empty() => at = above,
            _ => return Ok(PathBuf::from(".")),
        }
    }
}

fn is_bpffs(path: &Path) -> Result<bool, PinError> {
    let found =
        statfs(path).map_err(|errno| PinError::Statfs { path: path.to_owned(), source: errno.into() })?;
    Ok(found.filesystem_type() == FsType(BPFFS_MAGIC as _))
}

pub(crate) fn create(path: &Path) -> Result<(), PinError> {
    fs::create_dir_all(path).map_err(|source| PinError::Create { path: path.to_owned(), source })
}

/// Which file a pin is: device and inode.
pub(crate) type PinId = (u64, u64);

/// A new pin at `path`, made by `pin` and put in place of what stands there in one step; makes the directories, and mounts a
/// bpffs, where they have gone.
pub(crate) fn pin_at(
    root: &BpfRoot,
    path: &Path,
    pin: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<PinId, PinError> {
    let failed = |source| PinError::Pin { path: path.to_owned(), source };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let making = path.with_file_name(format!("{NEW}{name}"));
    if let Some(parent) = path.parent().filter(|parent| !parent.exists()) {
        root.prepare()?;
        create(parent)?;
    }
    remove(&making, false)?;
    pin(&making).map_err(failed)?;
    fs::rename(&making, path).map_err(failed)?;
    pin_id(path).map_err(failed)
}

pub(crate) fn pin_id(path: &Path) -> io::Result<PinId> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_belong_to_a_generation_and_links_to_none() {
        let root = BpfRoot::new("/sys/fs/bpf/ebpf-proxy");
        assert_eq!(root, BpfRoot::default());
        assert_eq!(root.at(7).map("FLOWS"), Path::new("/sys/fs/bpf/ebpf-proxy/g7/maps/FLOWS"));
        assert_eq!(root.at(7).program("flows"), Path::new("/sys/fs/bpf/ebpf-proxy/g7/flows"));
        assert_eq!(root.at(7).link("tc_7_ingress"), Path::new("/sys/fs/bpf/ebpf-proxy/links/tc_7_ingress"));
    }

    #[test]
    fn the_newest_generation_counts_and_one_in_the_making_does_not() {
        let here = tempfile::tempdir().unwrap();
        let root = BpfRoot::new(here.path());
        assert!(root.map("X").ends_with("g1/maps/X"));
        for number in [2, 10, 9] {
            let making = root.begin().unwrap();
            fs::write(making.map("X"), "").unwrap();
            fs::write(making.program("flows"), "").unwrap();
            root.commit(number).unwrap();
        }
        fs::write(root.begin().unwrap().map("X"), "").unwrap();
        assert_eq!(root.generations().unwrap(), [2, 9, 10]);
        assert!(root.map("X").ends_with("g10/maps/X") && root.next().unwrap() == 11);
        let settled = root.settled().unwrap();
        root.begin().unwrap();
        root.commit(11).unwrap();
        assert!(settled.map("X").ends_with("g10/maps/X") && root.map("X").ends_with("g11/maps/X"));
        assert_eq!(root.at(10).remove_generation().unwrap(), 1);
        assert_eq!(root.generations().unwrap(), [2, 9, 11]);
    }

    #[test]
    fn the_nearest_directory_is_found_above_what_does_not_exist() {
        let here = tempfile::tempdir().unwrap();
        let deep = here.path().join("a/b/c");
        assert_eq!(nearest(&deep).unwrap(), here.path());
        fs::create_dir(here.path().join("a")).unwrap();
        assert_eq!(nearest(&deep).unwrap(), here.path().join("a"));
    }

    #[test]
    fn a_root_that_does_not_exist_has_no_links_and_no_versions() {
        let here = tempfile::tempdir().unwrap();
        let root = BpfRoot::new(here.path().join("none"));
        assert_eq!(root.link_names().unwrap(), Vec::<String>::new());
        assert_eq!(root.versions().unwrap(), Vec::<PathBuf>::new());
        assert!(!root.is_on_bpffs());
    }

    #[test]
    fn only_version_directories_are_versions() {
        let here = tempfile::tempdir().unwrap();
        for name in ["v1", "v22", "vx", "v", "other"] {
            fs::create_dir(here.path().join(name)).unwrap();
        }
        let found = BpfRoot::new(here.path()).versions().unwrap();
        assert_eq!(found, [here.path().join("v1"), here.path().join("v22")]);
    }

    #[test]
    fn a_root_is_held_by_one_agent_at_a_time() {
        let here = tempfile::tempdir().unwrap();
        let root = BpfRoot::new(here.path());
        assert!(!root.is_claimed().unwrap());
        let held = root.lock().unwrap();
        assert!(held.is_some() && root.is_claimed().unwrap());
        assert!(root.lock().unwrap().is_none());
        assert!(root.lock_within(Duration::from_millis(30)).unwrap().is_none());
        drop(held);
        assert!(!root.is_claimed().unwrap());
        assert!(root.lock().unwrap().is_some());
        assert!(!BpfRoot::new(here.path().join("none")).is_claimed().unwrap());
    }
}
