//! Taking everything away again: links, filters, maps and directories, of every generation.

use std::path::Path;

use crate::datapath::attach::{AttachError, PinName, drop_pin_at};
use crate::datapath::store::note::Note;
use crate::datapath::store::pin::{self, BpfRoot, NEW};

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
    if let Err(error) = crate::datapath::attach::grace::recover(root) {
        tracing::warn!("grace periods of the kernel may stay short: {error}");
    }
    let mut removed = remove_versions(root)?;
    removed.links += remove_links(&root.links())?;
    for generation in root.generations()? {
        removed.maps += root.at(generation).remove_generation()?;
    }
    root.in_making().remove_generation()?;
    for name in Note::ALL {
        pin::remove(&root.path().join(name), false)?;
        pin::remove(&root.path().join(format!("{NEW}{name}")), false)?;
    }
    if root.is_on_bpffs() && !root.is_mount_point() && pin::names(root.path())?.is_empty() {
        pin::remove(root.path(), true)?;
    }
    Ok(removed)
}

/// The same for what agents have left behind that knew no generations: nobody can carry it over.
pub(crate) fn remove_versions(root: &BpfRoot) -> Result<Removed, AttachError> {
    let mut removed = Removed::default();
    for version in root.versions()? {
        let maps = version.join("maps");
        removed.links += remove_links(&version.join("links"))?;
        for name in pin::names(&maps)? {
            removed.maps += usize::from(pin::remove(&maps.join(name), false)?);
        }
        pin::remove(&maps, true)?;
        pin::remove(&version, true)?;
    }
    Ok(removed)
}

/// Detaches what is pinned in a directory, and removes it; how many programs ran there.
fn remove_links(links: &Path) -> Result<usize, AttachError> {
    let mut removed = 0;
    // A filter goes before the qdisc it hangs on.
    let mut pins: Vec<(String, Option<PinName>)> =
        pin::names(links)?.into_iter().map(|name| (name.clone(), PinName::parse(&name))).collect();
    pins.sort_by_key(|(_, pin)| matches!(pin, Some(PinName::Qdisc(_))));
    for (name, pin) in pins {
        let path = links.join(name);
        let gone = match &pin {
            Some(pin) => drop_pin_at(&path, pin)?,
            None => pin::remove(&path, false)?,
        };
        // The qdisc's pin is a note, not a program that runs; those without a place run nowhere.
        removed += usize::from(gone && !matches!(pin, None | Some(PinName::Qdisc(_))));
    }
    pin::remove(links, true)?;
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
    fn directories_of_every_generation_are_removed_and_others_left_alone() {
        let here = tempfile::tempdir().unwrap();
        for directory in
            ["g1/maps", "g12/maps", "links", "new/maps", "v1/maps", "v1/links", "v0/maps", "mine"]
        {
            std::fs::create_dir_all(here.path().join(directory)).unwrap();
        }
        for file in ["v1/maps/FLOWS", "g1/maps/FLOWS", "g12/maps/FLOWS", "servers", "new_servers"] {
            std::fs::write(here.path().join(file), "").unwrap();
        }
        let root = BpfRoot::new(here.path());
        assert_eq!(remove_all(&root).unwrap(), Removed { links: 0, maps: 3 });
        assert_eq!(pin::names(here.path()).unwrap(), ["mine"]);
    }
}
