//! What pages name exists: files that they link to, and paths that they write in backticks.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

use crate::workspace;

/// Where pages are, besides those beside the workspace's Cargo.toml.
const FOLDERS: [&str; 4] = ["docs", "deploy", "tests", ".github"];
/// With what a path begins that is one of the repository.
const ROOTS: [&str; 9] = [
    ".ci/",
    ".github/",
    "deploy/",
    "docs/",
    "proxy-agent/",
    "proxy-common/",
    "proxy-ebpf/",
    "tests/",
    "xtask/",
];

/// All pages of the repository.
pub(crate) fn all(root: &Path) -> Result<Vec<std::path::PathBuf>> {
    let mut pages = workspace::files_beside(root, "md")?;
    for folder in FOLDERS {
        pages.extend(workspace::files(&root.join(folder), "md")?);
    }
    Ok(pages)
}

/// Fails with every name of nothing.
pub(crate) fn check() -> Result<()> {
    let root = workspace::root();
    let pages = all(&root)?;
    let mut broken = Vec::new();
    for page in &pages {
        let text = fs::read_to_string(page).with_context(|| format!("could not read {}", page.display()))?;
        let name = page.strip_prefix(&root).unwrap_or(page).display();
        let folder = page.parent().unwrap_or(&root);
        for (line, text) in (1..).zip(text.lines()) {
            let absent_links = links(text).filter(|link| !folder.join(link).exists());
            let absent_paths =
                paths(text).filter(|path| !root.join(path).exists() && !folder.join(path).exists());
            broken.extend(absent_links.chain(absent_paths).map(|what| format!("{name}:{line}: no {what}")));
        }
    }
    if !broken.is_empty() {
        bail!("{}", broken.join("\n"));
    }
    println!("{} pages: all that they name is there", pages.len());
    Ok(())
}

/// Files of the repository that a line links to.
fn links(line: &str) -> impl Iterator<Item = &str> {
    let links = line.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    links.filter(|link| !link.is_empty() && !link.contains("://"))
}

/// Files and folders that a line writes in backticks.
fn paths(line: &str) -> impl Iterator<Item = &str> {
    let quoted = line.split('`').skip(1).step_by(2);
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    quoted.filter(move |path| ROOTS.iter().any(|root| path.starts_with(root)) && path.chars().all(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_paths_are_found_and_others_are_not() {
        let line = "[a](docs/a.md#b), [c](https://c.d), [e](#e), `tests/src/f.rs`, `tests/{g,h}`, `lb/i.rs`, `docs/` of";
        assert_eq!(links(line).collect::<Vec<_>>(), ["docs/a.md"]);
        assert_eq!(paths(line).collect::<Vec<_>>(), ["tests/src/f.rs", "docs/"]);
    }
}
