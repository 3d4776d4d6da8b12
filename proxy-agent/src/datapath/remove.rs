//! Taking everything away again: links, filters, maps and directories, of every layout version.

use super::attach::{AttachError, PinName, drop_pin_at};
use super::pin::{self, BpfRoot};

/// What was there and is gone now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Removed {
    /// Links and filters.
    pub links: usize,
    /// Maps.
    pub maps: usize,
}

/// Detaches and unpins everything under `root`. Doing it twice is the same as doing it once.
pub fn remove_all(root: &BpfRoot) -> Result<Removed, AttachError> {
    let mut removed = Removed::default();
    if let Err(error) = super::grace::recover(root) {
        tracing::warn!("grace periods of the kernel may stay short: {error}");
    }
    for version in root.versions()? {
        let (links, maps) = (version.join("links"), version.join("maps"));
        // A filter goes before the qdisc it hangs on.
        let mut pins: Vec<(String, Option<PinName>)> =
            pin::names(&links)?.into_iter().map(|name| (name.clone(), PinName::parse(&name))).collect();
        pins.sort_by_key(|(_, pin)| matches!(pin, Some(PinName::Qdisc(_))));
        for (name, pin) in pins {
            let path = links.join(name);
            let gone = match &pin {
                Some(pin) => drop_pin_at(&path, pin)?,
                None => pin::remove(&path, false)?,
            };
            // The qdisc's pin is a note, not a program that runs; those without a place run nowhere.
            removed.links += usize::from(gone && !matches!(pin, None | Some(PinName::Qdisc(_))));
        }
        for name in pin::names(&maps)? {
            removed.maps += usize::from(pin::remove(&maps.join(name), false)?);
        }
        for directory in [links, maps, version] {
            pin::remove(&directory, true)?;
        }
    }
    if root.is_on_bpffs() && !root.is_mount_point() && pin::names(root.path())?.is_empty() {
        pin::remove(root.path(), true)?;
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_removed_where_nothing_is() {
        let here = tempfile::tempdir().unwrap();
        let root = BpfRoot::new(here.path().join("none"));
        assert_eq!(remove_all(&root).unwrap(), Removed::default());
    }

    #[test]
    fn directories_of_every_version_are_removed_and_others_left_alone() {
        let here = tempfile::tempdir().unwrap();
        for directory in ["v1/maps", "v1/links", "v0/maps", "mine"] {
            std::fs::create_dir_all(here.path().join(directory)).unwrap();
        }
        std::fs::write(here.path().join("v1/maps/FLOWS"), "").unwrap();
        let root = BpfRoot::new(here.path());
        assert_eq!(remove_all(&root).unwrap(), Removed { links: 0, maps: 1 });
        assert_eq!(pin::names(here.path()).unwrap(), ["mine"]);
    }
}
