//! `cargo xtask release --dry-run` in a repository of its own: what is looked at, and that nothing is written.
#![cfg(test)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

const FILES: [&str; 7] = [
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "deploy/daemonset-restricted.yaml",
    "deploy/daemonset.yaml",
    "deploy/kubeadm.yaml",
    "proxy-common/fuzz/Cargo.lock",
];

/// What a release touches, committed; the changelog also has 99.0.0.
fn repository() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for file in FILES {
        let to = folder.path().join(file);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from.join(file), to).unwrap();
    }
    let changelog = folder.path().join("CHANGELOG.md");
    let text = fs::read_to_string(&changelog).unwrap();
    fs::write(changelog, text + "\n## [99.0.0] - 2099-01-31\n\n- Everything.\n").unwrap();
    git(folder.path(), &["init", "--quiet"]);
    commit(folder.path());
    folder
}

fn git(folder: &Path, args: &[&str]) {
    let who = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"];
    assert!(
        Command::new("git").current_dir(folder).args(who).args(args).status().unwrap().success(),
        "{args:?}"
    );
}

fn commit(folder: &Path) {
    git(folder, &["add", "."]);
    git(folder, &["commit", "--quiet", "--message", "everything"]);
}

/// The command finds the workspace as cargo would tell it.
fn release(folder: &Path, version: &str) -> Output {
    let mut xtask = Command::new(env!("CARGO_BIN_EXE_xtask"));
    xtask.env("CARGO_MANIFEST_DIR", folder.join("xtask"));
    xtask.args(["release", "--dry-run", "--version", version]).output().unwrap()
}

fn contents(folder: &Path) -> Vec<(PathBuf, String)> {
    FILES.iter().map(|file| (file.into(), fs::read_to_string(folder.join(file)).unwrap())).collect()
}

#[test]
fn a_dry_run_says_what_it_would_do_and_writes_nothing() {
    let folder = repository();
    let before = contents(folder.path());
    let out = release(folder.path(), "99.0.0");
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    for file in FILES.iter().filter(|file| **file != "CHANGELOG.md") {
        let line = format!("{file}: {} -> 99.0.0\n", env!("CARGO_PKG_VERSION"));
        assert!(said.contains(&line), "{line} in {said}");
    }
    assert!(said.ends_with("nothing was written\n"), "{said}");
    assert_eq!(contents(folder.path()), before);
    assert!(!folder.path().join("target").exists());
}

#[test]
fn everything_that_speaks_against_a_release_is_said_at_once() {
    let folder = repository();
    git(folder.path(), &["tag", "v0.0.1"]);
    fs::write(folder.path().join("notes"), "").unwrap();
    let out = release(folder.path(), "0.0.1");
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(!out.status.success());
    for wrong in
        ["which is newer", "not committed: ?? notes", "the tag v0.0.1 is there", "no section `## [0.0.1] - "]
    {
        assert!(said.contains(wrong), "{wrong} in {said}");
    }
}

#[test]
fn a_file_that_has_another_version_is_no_release() {
    let folder = repository();
    let manifest = folder.path().join("deploy/kubeadm.yaml");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("ebpf-proxy/proxy-agent:", "ebpf-proxy/proxy-agent:9")).unwrap();
    commit(folder.path());
    let said = String::from_utf8(release(folder.path(), "99.0.0").stderr).unwrap();
    assert!(said.contains("deploy/kubeadm.yaml does not name the image of"), "{said}");
}
