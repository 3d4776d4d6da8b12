//! A release: one version everywhere, the files that users fetch, and their checksums.
//!
//! What is to be true before is looked at first, all of it, and nothing is written unless it is: no change that is not
//! committed, a section of CHANGELOG.md for the version, no such tag yet. The commit, the tag and the upload are left
//! to a person; the last lines say how.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use semver::Version;
use toml_edit::DocumentMut;

use crate::{build, cmd, image, workspace};

/// What to release.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The version to release [default: the one that Cargo.toml has].
    #[arg(long)]
    version: Option<Version>,
    /// Only look at what must be true, and say what would be written and built.
    #[arg(long)]
    dry_run: bool,
}

/// Where the version stands; all crates inherit it.
const MANIFEST: &str = "Cargo.toml";
/// Where the versions of our own crates are locked.
const LOCKS: [&str; 2] = ["Cargo.lock", "proxy-common/fuzz/Cargo.lock"];
/// Manifests that name the image with its tag, and are released beside it.
const DEPLOY: [&str; 3] =
    ["deploy/daemonset.yaml", "deploy/daemonset-restricted.yaml", "deploy/kubeadm.yaml"];
/// One that names none, and is released all the same.
const AGENTS: &str = "deploy/kubeadm-agents.yaml";
const CHANGELOG: &str = "CHANGELOG.md";

/// `cargo xtask release`
pub(crate) fn run(args: &Args) -> Result<()> {
    let root = workspace::root();
    let before = current(&root)?;
    let version = args.version.clone().unwrap_or_else(|| before.clone());
    let edits = edits(&root, &before, &version)?;
    let wrong = wrong(&root, &before, &version)?;
    if !wrong.is_empty() {
        bail!("{version} cannot be released:\n  {}", wrong.join("\n  "));
    }
    for Edit { file, .. } in &edits {
        println!("{file}: {before} -> {version}");
    }
    let folder = PathBuf::from(format!("target/release-{version}"));
    if args.dry_run {
        println!("to be built in {}: the static agent, the image, {SUMS}", folder.display());
        println!("nothing was written");
        return Ok(());
    }
    for Edit { file, text } in &edits {
        fs::write(root.join(file), text).with_context(|| format!("could not write {file}"))?;
    }
    gather(&root, &root.join(&folder), &version, &build::static_agent()?)?;
    println!("\nin {}; look at it, then:", folder.display());
    if !edits.is_empty() {
        println!("  git commit --all --message 'release {version}'");
    }
    println!("  git tag --annotate v{version} --message {version} && git push origin HEAD v{version}");
    println!("  and publish the files with the section of {CHANGELOG}");
    Ok(())
}

/// The version that the workspace has.
fn current(root: &Path) -> Result<Version> {
    let document = toml(root, MANIFEST)?;
    let package = document.get("workspace").and_then(|workspace| workspace.get("package"));
    let version = package.and_then(|package| package.get("version")?.as_str());
    let version = version.with_context(|| format!("{MANIFEST} has no workspace.package.version"))?;
    Version::parse(version).with_context(|| format!("{MANIFEST}: {version}"))
}

/// Everything that speaks against this release.
fn wrong(root: &Path, before: &Version, version: &Version) -> Result<Vec<String>> {
    let git = |args: &[&str]| cmd::output(cmd::with("git", args).current_dir(root));
    let mut wrong = Vec::new();
    if version < before {
        wrong.push(format!("Cargo.toml has {before}, which is newer"));
    }
    let changed = git(&["status", "--porcelain"])?;
    if !changed.is_empty() {
        wrong.push(format!(
            "not committed: {}",
            changed.lines().map(str::trim).collect::<Vec<_>>().join(", ")
        ));
    }
    if !git(&["tag", "--list", &format!("v{version}")])?.is_empty() {
        wrong.push(format!("the tag v{version} is there already"));
    }
    if let Err(error) = notes(&read(root, CHANGELOG)?, version) {
        wrong.push(format!("{CHANGELOG}: {error}"));
    }
    Ok(wrong)
}

/// What users are told about a version: the section `## [1.2.3] - 2026-01-31`.
fn notes<'a>(changelog: &'a str, version: &Version) -> Result<&'a str> {
    let heading = format!("\n## [{version}] - ");
    let (_, section) = changelog
        .split_once(&heading)
        .with_context(|| format!("no section `{}DATE`", heading.trim_start()))?;
    let (date, notes) = section.split_once('\n').unwrap_or((section, ""));
    let digits = date.split('-').map(|part| part.parse::<u16>().map(|_| part.len()));
    ensure!(digits.eq([Ok(4), Ok(2), Ok(2)]), "{version} has no date but {date:?}");
    let notes = notes.split("\n## ").next().unwrap_or_default().trim();
    ensure!(!notes.is_empty(), "nothing is said about {version}");
    Ok(notes)
}

/// A file and its new text.
#[derive(Debug)]
struct Edit {
    file: &'static str,
    text: String,
}

/// What is to be written so that everything says `version`. Fails where it does not say `before`.
fn edits(root: &Path, before: &Version, version: &Version) -> Result<Vec<Edit>> {
    let (old, new) = (before.to_string(), version.to_string());
    let mut manifest = toml(root, MANIFEST)?;
    manifest["workspace"]["package"]["version"] = toml_edit::value(new.as_str());
    let mut edits = vec![Edit { file: MANIFEST, text: manifest.to_string() }];
    for file in LOCKS {
        let mut lock = toml(root, file)?;
        let packages = lock.get_mut("package").and_then(|item| item.as_array_of_tables_mut());
        // What comes from nowhere is ours.
        let packages = packages.into_iter().flat_map(|packages| packages.iter_mut());
        for package in packages.filter(|package| !package.contains_key("source")) {
            if package.get("version").and_then(|item| item.as_str()) == Some(&old) {
                package["version"] = toml_edit::value(new.as_str());
            }
        }
        edits.push(Edit { file, text: lock.to_string() });
    }
    for file in DEPLOY {
        let text = read(root, file)?;
        let tag = |version| format!("image: {}:{version}\n", image::NAME);
        ensure!(text.contains(&tag(before)), "{file} does not name the image of {before}");
        edits.push(Edit { file, text: text.replace(&tag(before), &tag(version)) });
    }
    edits.retain(|_| before != version);
    Ok(edits)
}

fn read(root: &Path, file: &str) -> Result<String> {
    fs::read_to_string(root.join(file)).with_context(|| format!("could not read {file}"))
}

fn toml(root: &Path, file: &str) -> Result<DocumentMut> {
    read(root, file)?.parse().with_context(|| format!("could not understand {file}"))
}

/// The list of checksums, as `sha256sum --check` reads it.
const SUMS: &str = "SHA256SUMS";

/// Gathers what users fetch, round a static agent.
fn gather(root: &Path, folder: &Path, version: &Version, agent: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("could not empty {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("could not make {}", folder.display()))?;
    let architecture = image::architecture(&fs::read(agent)?)?;
    let name = format!("proxy-agent-{version}-linux-{architecture}");
    image::write(Some(agent), &folder.join(format!("{name}.image.tar")))?;
    fs::copy(agent, folder.join(&name)).with_context(|| format!("could not copy {}", agent.display()))?;
    for file in DEPLOY.into_iter().chain([AGENTS]).map(Path::new) {
        let name = file.file_name().context("a file without a name")?;
        let copied = fs::copy(root.join(file), folder.join(name));
        copied.with_context(|| format!("could not copy {}", file.display()))?;
    }
    fs::write(folder.join("NOTES.md"), notes(&read(root, CHANGELOG)?, version)?)?;
    let sums = sums(folder)?;
    print!("{sums}");
    fs::write(folder.join(SUMS), sums).with_context(|| format!("could not write {SUMS}"))
}

/// A line for each file of a folder.
fn sums(folder: &Path) -> Result<String> {
    let mut sums = String::new();
    for file in workspace::entries(folder)? {
        let contents = fs::read(&file).with_context(|| format!("could not read {}", file.display()))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        // Writing to a string does not fail.
        writeln!(sums, "{}  {name}", image::sha256(&contents)).ok();
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANGES: &str = "# Changes\n\n## [Unreleased]\n\n## [0.2.0] - 2026-12-01\n\n### Added\n\n- This.\n\n\
                           ## [0.1.1] - soon\n\n- That.\n\n## [0.1.0] - 2026-11-01\n";

    fn version(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    #[test]
    fn users_are_told_what_the_changelog_says_of_the_version() {
        assert_eq!(notes(CHANGES, &version("0.2.0")).unwrap(), "### Added\n\n- This.");
        let error = |of| notes(CHANGES, &version(of)).unwrap_err().to_string();
        assert_eq!(error("0.3.0"), "no section `## [0.3.0] - DATE`");
        assert_eq!(error("0.1.1"), "0.1.1 has no date but \"soon\"");
        assert_eq!(error("0.1.0"), "nothing is said about 0.1.0");
    }

    #[test]
    fn the_version_of_this_tree_stands_where_a_release_looks_for_it() {
        let root = workspace::root();
        let before = current(&root).unwrap();
        assert_eq!(before.to_string(), env!("CARGO_PKG_VERSION"));
        assert!(edits(&root, &before, &before).unwrap().is_empty());
        let after = Version::new(before.major, before.minor, before.patch + 1);
        let edits = edits(&root, &before, &after).unwrap();
        assert_eq!(edits.len(), 1 + LOCKS.len() + DEPLOY.len());
        for Edit { file, text } in edits {
            let was = read(&root, file).unwrap();
            let lines = was.lines().zip(text.lines()).filter(|(was, is)| was != is);
            let changed: Vec<_> = lines.map(|(was, is)| (was.to_owned(), is.to_owned())).collect();
            assert!(!changed.is_empty(), "{file}");
            for (was, is) in changed {
                assert_eq!(was.replace(&before.to_string(), &after.to_string()), is, "{file}");
            }
        }
    }

    #[test]
    fn what_users_fetch_is_gathered_with_its_checksums() {
        let place = tempfile::tempdir().unwrap();
        let (source, agent) = (place.path().join("agent.rs"), place.path().join("agent"));
        fs::write(&source, "fn main() { println!(\"agent\"); }").unwrap();
        let flags = ["-Ctarget-feature=+crt-static", "-Cstrip=symbols", "-o"];
        cmd::output(cmd::with("rustc", flags).args([&agent, &source])).unwrap();
        for file in DEPLOY.into_iter().chain([AGENTS]) {
            fs::create_dir_all(place.path().join(file).parent().unwrap()).unwrap();
            fs::copy(workspace::root().join(file), place.path().join(file)).unwrap();
        }
        fs::write(place.path().join(CHANGELOG), CHANGES).unwrap();
        let folder = place.path().join("release");
        gather(place.path(), &folder, &version("0.2.0"), &agent).unwrap();
        let files = workspace::entries(&folder).unwrap();
        let names: Vec<_> = files.iter().map(|file| file.file_name().unwrap().to_str().unwrap()).collect();
        let architecture = image::architecture(&fs::read(&agent).unwrap()).unwrap();
        let (program, image) = (
            format!("proxy-agent-0.2.0-linux-{architecture}"),
            format!("proxy-agent-0.2.0-linux-{architecture}.image.tar"),
        );
        let manifests =
            ["daemonset-restricted.yaml", "daemonset.yaml", "kubeadm-agents.yaml", "kubeadm.yaml"];
        assert_eq!(names, [&["NOTES.md", SUMS][..], &manifests, &[&program, &image]].concat());
        cmd::output(cmd::with("sha256sum", ["--check", "--strict", SUMS]).current_dir(&folder)).unwrap();
    }

    #[test]
    fn checksums_are_those_of_sha256sum() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("b"), "").unwrap();
        fs::write(folder.path().join("a"), "abc").unwrap();
        let sums = sums(folder.path()).unwrap();
        fs::write(folder.path().join(SUMS), &sums).unwrap();
        let check = ["--check", "--strict", SUMS];
        let said = cmd::output(cmd::with("sha256sum", check).current_dir(folder.path())).unwrap();
        assert_eq!(said, "a: OK\nb: OK\n");
    }
}
