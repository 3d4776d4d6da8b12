//! `cargo xtask image` as a user calls it: a program goes in, and comes out of the image unharmed.
#![cfg(test)]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use flate2::read::GzDecoder;
use serde_json::Value;

fn xtask(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask")).args(args).output().unwrap()
}

/// A small static program that answers `--version`.
fn static_program(folder: &Path) -> String {
    let (source, program) = (folder.join("agent.rs"), folder.join("agent"));
    fs::write(&source, r#"fn main() { println!("agent {}", std::env::args().nth(1).unwrap_or_default()); }"#)
        .unwrap();
    let compiled = Command::new("rustc")
        .args(["--edition=2024", "-Ctarget-feature=+crt-static", "-Copt-level=s", "-Cstrip=symbols", "-o"])
        .args([&program, &source])
        .status()
        .unwrap();
    assert!(compiled.success());
    program.display().to_string()
}

fn json(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

#[test]
fn the_program_in_the_image_runs() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let program = static_program(folder);
    let image = folder.join("image.tar").display().to_string();
    let out = xtask(&["image", "--binary", &program, "--output", &image]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(said.contains("the program in the image says: agent --version"), "{said}");

    // As `docker load` reads it: from manifest.json to configuration and layer.
    let unpacked = folder.join("unpacked");
    tar::Archive::new(fs::File::open(&image).unwrap()).unpack(&unpacked).unwrap();
    let manifest = json(&unpacked.join("manifest.json"));
    let config = json(&unpacked.join(manifest[0]["Config"].as_str().unwrap()));
    let layer = fs::File::open(unpacked.join(manifest[0]["Layers"][0].as_str().unwrap())).unwrap();
    let rootfs = folder.join("rootfs");
    tar::Archive::new(GzDecoder::new(layer)).unpack(&rootfs).unwrap();
    let entrypoint = config["config"]["Entrypoint"][0].as_str().unwrap();
    assert_eq!(config["config"]["User"], "0:0");
    let said = Command::new(rootfs.join(entrypoint.trim_start_matches('/'))).arg("hello").output().unwrap();
    assert_eq!(said.stdout, b"agent hello\n");
}

#[test]
fn a_program_that_needs_a_loader_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image.tar");
    let out = xtask(&["image", "--binary", "/bin/sh", "--output", &image.display().to_string()]);
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("is not static"));
    assert!(!image.exists());
}
