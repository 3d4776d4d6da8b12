//! Short grace periods while programs are attached.
//!
//! Attaching to an interface makes the kernel wait for a grace period of RCU, with the lock held that every change of
//! the network needs: 8 to 30 ms for each direction, 20 to 40 s for 600 interfaces. While `/sys/kernel/rcu_expedited`
//! says 1 it asks each processor instead of waiting for it, which takes microseconds. That is a setting of the whole
//! machine, so it stands only while something is attached, and a directory beside the pins says that it does: an agent
//! that is killed in between leaves it to the next one, or to `cleanup`. Where it cannot be written (a read-only /sys)
//! attaching takes as long as it takes, and `status` and `doctor` say so.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::datapath::store::pin::BpfRoot;

/// The kernel's setting.
const SETTING: &str = "/sys/kernel/rcu_expedited";
/// Says that it is ours to take back.
const MARK: &str = "expedited";

/// The setting, as long as this lives.
#[derive(Debug)]
pub(crate) struct Expedited {
    setting: PathBuf,
    mark: PathBuf,
}

impl Expedited {
    /// Sets it, unless somebody has, or it cannot be set.
    pub(crate) fn begin(root: &BpfRoot) -> Option<Self> {
        // Where the pins have just gone, the note would soon be hidden below a new file system.
        root.is_on_bpffs().then(|| Self::set(Path::new(SETTING), &root.path().join(MARK)))?
    }

    fn set(setting: &Path, mark: &Path) -> Option<Self> {
        if !fs::read_to_string(setting).is_ok_and(|now| now.trim() == "0") {
            return None;
        }
        // Without a note that it is ours nobody would take it back.
        fs::create_dir(mark).ok()?;
        let begun = Self { setting: setting.to_owned(), mark: mark.to_owned() };
        match fs::write(setting, "1") {
            Ok(()) => Some(begun),
            Err(error) => {
                tracing::debug!("grace periods stay long: {} cannot be written: {error}", setting.display());
                None
            }
        }
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        // Whatever has become of the note.
        if let Err(error) = undo(&self.setting, &self.mark) {
            tracing::warn!(
                "{} may still say 1: write 0 to it if it was 0 before: {error}",
                self.setting.display()
            );
        }
    }
}

/// Why attaching is slow below this root directory, if it is. Nothing is written.
pub fn slow(root: &Path) -> Option<String> {
    let setting = root.join(SETTING.trim_start_matches('/'));
    match fs::OpenOptions::new().write(true).open(setting) {
        Ok(_) => None,
        // A kernel for one processor waits for nobody.
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(format!(
            "without {SETTING}, which cannot be written ({error}), attaching to an interface takes tens of milliseconds"
        )),
    }
}

/// Takes back what an agent has left that was killed.
pub(crate) fn recover(root: &BpfRoot) -> io::Result<()> {
    take_back(Path::new(SETTING), &root.path().join(MARK))
}

fn take_back(setting: &Path, mark: &Path) -> io::Result<()> {
    if mark.exists() { undo(setting, mark) } else { Ok(()) }
}

fn undo(setting: &Path, mark: &Path) -> io::Result<()> {
    match fs::write(setting, "0") {
        // Then it has never been set.
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            return Err(error);
        }
        _ => {}
    }
    match fs::remove_dir(mark) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(value: &str) -> (tempfile::TempDir, PathBuf, PathBuf) {
        let here = tempfile::tempdir().unwrap();
        let (setting, mark) = (here.path().join("rcu_expedited"), here.path().join(MARK));
        fs::write(&setting, value).unwrap();
        (here, setting, mark)
    }

    #[test]
    fn it_is_set_as_long_as_it_is_wanted_and_then_as_it_was() {
        let (_here, setting, mark) = paths("0\n");
        let begun = Expedited::set(&setting, &mark).unwrap();
        assert_eq!((fs::read_to_string(&setting).unwrap().as_str(), mark.exists()), ("1", true));
        // Another agent of this machine leaves it alone meanwhile.
        assert!(Expedited::set(&setting, &mark.with_extension("other")).is_none());
        fs::remove_dir(&mark).unwrap();
        drop(begun);
        assert_eq!((fs::read_to_string(&setting).unwrap().as_str(), mark.exists()), ("0", false));
    }

    #[test]
    fn that_it_cannot_be_written_is_said_and_that_there_is_none_is_well() {
        let (here, setting, _) = paths("0\n");
        let root = here.path();
        assert_eq!(slow(root), None, "there is none");
        let place = root.join(SETTING.trim_start_matches('/'));
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::rename(setting, &place).unwrap();
        assert_eq!((slow(root), fs::read_to_string(&place).unwrap().as_str()), (None, "0\n"));
        fs::remove_file(&place).unwrap();
        fs::create_dir(&place).unwrap();
        let said = slow(root).unwrap();
        assert!(
            said.starts_with("without /sys/kernel/rcu_expedited, which cannot be written (Is a directory"),
            "{said}"
        );
    }

    #[test]
    fn what_somebody_else_has_set_stays_and_what_a_killed_agent_has_set_does_not() {
        let (_here, setting, mark) = paths("1\n");
        assert!(Expedited::set(&setting, &mark).is_none());
        take_back(&setting, &mark).unwrap();
        assert_eq!(fs::read_to_string(&setting).unwrap(), "1\n");
        fs::write(&setting, "0").unwrap();
        std::mem::forget(Expedited::set(&setting, &mark).unwrap());
        take_back(&setting, &mark).unwrap();
        assert_eq!((fs::read_to_string(&setting).unwrap().as_str(), mark.exists()), ("0", false));
    }
}
