//! Embeds the BPF object that `cargo xtask build-ebpf` has made.
//!
//! Without one the crate builds all the same, with an empty object: what needs it says so at run time.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("proxy-ebpf");
    println!("cargo::rerun-if-env-changed=PROXY_EBPF_OBJECT");
    let named = env::var_os("PROXY_EBPF_OBJECT").filter(|value| !value.is_empty()).map(PathBuf::from);
    let next = env::var_os("CARGO_FEATURE_NEXT_LAYOUT").is_some();
    let made = if next { "../../target/bpf/proxy-ebpf-next" } else { "../../target/bpf/proxy-ebpf" };
    let object = named.clone().unwrap_or_else(|| manifest.join(made));
    println!("cargo::rerun-if-changed={}", object.display());
    match fs::read(&object) {
        Ok(bytes) => write(&out, &bytes),
        Err(error) if named.is_some() => {
            panic!("PROXY_EBPF_OBJECT names {}, which cannot be read: {error}", object.display())
        }
        Err(_) => {
            println!(
                "cargo::warning=no BPF object at {}: run `cargo xtask build-ebpf`, then build again",
                object.display()
            );
            write(&out, &[]);
        }
    }
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}
