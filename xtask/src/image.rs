//! Writes a container image without a container engine: one tar file that is both an OCI layout (containerd,
//! podman, skopeo) and a docker archive (`docker load`, `kind load image-archive`).
//!
//! The same binary always gives the same bytes: no times, no names of users, entries in a fixed order. What is
//! written is read back and run before the command says that it is done.
//!
//! Formats: OCI image-spec v1.1 (image-layout.md, manifest.md, config.md); docker image spec v1.2 for
//! `manifest.json`, whose paths may point into `blobs/`.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use flate2::{Compression, GzBuilder, read::GzDecoder};
use object::{Architecture, Object as _};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{build, cmd, workspace, workspace::Metadata};

/// The image's name; the tag is the version. deploy/daemonset.yaml asks for it.
pub(crate) const NAME: &str = "ebpf-proxy/proxy-agent";
/// What the binary is called inside.
const BINARY: &str = "proxy-agent";

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// What to pack, and where to.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The tar file to write [default: target/image/proxy-agent.tar].
    #[arg(long)]
    output: Option<PathBuf>,
    /// Pack this static program instead of building the agent (say, one for another architecture).
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// `cargo xtask image`
pub(crate) fn run(args: &Args) -> Result<()> {
    let output = args.output.clone().unwrap_or_else(default_output);
    let tag = write(args.binary.as_deref(), &output)?;
    println!("{}: {tag}", output.display());
    println!("load it with one of:");
    println!("  docker load --input {0}\n  ctr --namespace k8s.io images import {0}", output.display());
    println!("  kind load image-archive {}", output.display());
    Ok(())
}

/// Where the image goes when nobody says where.
pub(crate) fn default_output() -> PathBuf {
    workspace::root().join("target/image/proxy-agent.tar")
}

/// Packs a static binary (the agent unless another is given), checks the result, and returns the image's tag.
pub(crate) fn write(binary: Option<&Path>, output: &Path) -> Result<String> {
    let binary = match binary {
        Some(binary) => binary.to_path_buf(),
        None => build::static_agent()?,
    };
    build::require_static(&binary)?;
    let elf = fs::read(&binary).with_context(|| format!("could not read {}", binary.display()))?;
    let version = Metadata::read()?.package("proxy-agent")?.version.to_string();
    let tag = format!("{NAME}:{version}");
    let image = pack(&elf, &version)?;
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("could not create {}", folder.display()))?;
    fs::write(output, image).with_context(|| format!("could not write {}", output.display()))?;
    try_it(output).with_context(|| format!("{} does not work", output.display()))?;
    Ok(tag)
}

/// The whole archive.
fn pack(elf: &[u8], version: &str) -> Result<Vec<u8>> {
    let architecture = architecture(elf)?;
    let layer_tar = archive(&BTreeMap::from([(BINARY.to_owned(), (elf.to_vec(), 0o755))]))?;
    let diff_id = digest(&layer_tar);
    let layer = gzip(&layer_tar)?;
    let tag = format!("{NAME}:{version}");

    let mut blobs = Blobs::default();
    let layer = blobs.add(LAYER, layer);
    let labels = json!({
        "org.opencontainers.image.title": BINARY,
        "org.opencontainers.image.description": "An eBPF replacement for kube-proxy",
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.licenses": "MIT OR Apache-2.0",
    });
    let config = blobs.add_json(
        CONFIG,
        &json!({
            "architecture": architecture,
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {
                "User": "0:0",
                "Entrypoint": [format!("/{BINARY}")],
                "Cmd": ["run"],
                "WorkingDir": "/",
                "Labels": labels,
            },
            "rootfs": { "type": "layers", "diff_ids": [diff_id] },
            "history": [{ "created": "1970-01-01T00:00:00Z", "created_by": "cargo xtask image" }],
        }),
    )?;
    let manifest = blobs.add_json(MANIFEST, &json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer], "annotations": labels,
    }))?;
    let docker = json!([{ "Config": path(&config)?, "RepoTags": [tag], "Layers": [path(&layer)?] }]);
    let mut entry = manifest;
    entry["platform"] = json!({ "architecture": architecture, "os": "linux" });
    // containerd takes the full name from the first, others the tag from the second.
    entry["annotations"] = json!({
        "io.containerd.image.name": format!("docker.io/{tag}"),
        "org.opencontainers.image.ref.name": version,
    });
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [entry] });

    let mut files = blobs.files;
    files.insert("index.json".to_owned(), (serde_json::to_vec(&index)?, 0o644));
    files.insert("manifest.json".to_owned(), (serde_json::to_vec(&docker)?, 0o644));
    files.insert("oci-layout".to_owned(), (br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(), 0o644));
    archive(&files)
}

/// Contents by digest.
#[derive(Default)]
struct Blobs {
    files: Files,
}

/// Contents and mode by path: sorted, so that the archive is always the same.
type Files = BTreeMap<String, (Vec<u8>, u32)>;

impl Blobs {
    /// Adds a blob and returns its descriptor.
    fn add(&mut self, media_type: &str, contents: Vec<u8>) -> Value {
        let digest = digest(&contents);
        let descriptor = json!({ "mediaType": media_type, "digest": digest, "size": contents.len() });
        self.files.insert(blob_path(&digest), (contents, 0o644));
        descriptor
    }

    fn add_json(&mut self, media_type: &str, contents: &Value) -> Result<Value> {
        Ok(self.add(media_type, serde_json::to_vec(contents)?))
    }
}

fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

/// Where a descriptor's blob is.
fn path(descriptor: &Value) -> Result<String> {
    Ok(blob_path(descriptor["digest"].as_str().context("a descriptor without digest")?))
}

fn digest(contents: &[u8]) -> String {
    format!("sha256:{}", sha256(contents))
}

/// The SHA-256 of something, in hexadecimal.
pub(crate) fn sha256(contents: &[u8]) -> String {
    Sha256::digest(contents).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn gzip(contents: &[u8]) -> Result<Vec<u8>> {
    // No time and no operating system in the header: see "reproducible" above.
    let mut encoder = GzBuilder::new().mtime(0).operating_system(255).write(Vec::new(), Compression::best());
    encoder.write_all(contents)?;
    Ok(encoder.finish()?)
}

/// A tar archive of plain files and the folders above them.
fn archive(files: &Files) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut folders = Vec::new();
    for (path, (contents, mode)) in files {
        for (slash, _) in path.match_indices('/') {
            let folder = path.get(..=slash).unwrap_or_default();
            if !folders.iter().any(|seen| seen == folder) {
                folders.push(folder.to_owned());
                tar.append_data(
                    &mut header(tar::EntryType::Directory, 0, 0o755),
                    folder,
                    [0_u8; 0].as_slice(),
                )?;
            }
        }
        let size = u64::try_from(contents.len())?;
        tar.append_data(&mut header(tar::EntryType::Regular, size, *mode), path, contents.as_slice())?;
    }
    Ok(tar.into_inner()?)
}

fn header(kind: tar::EntryType, size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// Go's name of the architecture, which images use.
pub(crate) fn architecture(elf: &[u8]) -> Result<&'static str> {
    match object::File::parse(elf).context("not an ELF file")?.architecture() {
        Architecture::X86_64 => Ok("amd64"),
        Architecture::Aarch64 => Ok("arm64"),
        other => bail!("no image for {other:?}"),
    }
}

/// Unpacks the image as a container engine would, by its index, and runs what is in it.
fn try_it(image: &Path) -> Result<()> {
    let files = unpack(&fs::read(image)?)?;
    let folder = tempfile::tempdir().context("could not make a folder to try the image in")?;
    let (entrypoint, layer) = resolve(&files)?;
    tar::Archive::new(layer.as_slice()).unpack(folder.path())?;
    let program = folder.path().join(entrypoint.trim_start_matches('/'));
    let host = architecture(&fs::read("/proc/self/exe")?)?;
    if architecture(&fs::read(&program)?)? != host {
        println!("the image is for another architecture than this machine's: its program was not run");
        return Ok(());
    }
    let said = cmd::output(&mut cmd::with(&program, ["--version"]))?;
    println!("the program in the image says: {}", said.trim());
    Ok(())
}

/// From the index to the program's path and the layer's tar, every digest and size checked on the way.
fn resolve(files: &BTreeMap<String, Vec<u8>>) -> Result<(String, Vec<u8>)> {
    let read = |path: &str| files.get(path).with_context(|| format!("the image has no {path}"));
    let blob = |descriptor: &Value| -> Result<&Vec<u8>> {
        let contents = read(&path(descriptor)?)?;
        if descriptor["digest"] != digest(contents) || descriptor["size"] != contents.len() {
            bail!("a blob is not what its descriptor says: {descriptor}");
        }
        Ok(contents)
    };
    let index: Value = serde_json::from_slice(read("index.json")?)?;
    let manifest: Value = serde_json::from_slice(blob(&index["manifests"][0])?)?;
    let config: Value = serde_json::from_slice(blob(&manifest["config"])?)?;
    let mut layer = Vec::new();
    GzDecoder::new(blob(&manifest["layers"][0])?.as_slice()).read_to_end(&mut layer)?;
    if config["rootfs"]["diff_ids"][0] != digest(&layer) {
        bail!("the layer is not the one that the configuration names");
    }
    let docker: Value = serde_json::from_slice(read("manifest.json")?)?;
    for file in [&docker[0]["Config"], &docker[0]["Layers"][0]] {
        read(file.as_str().context("manifest.json names no file")?)?;
    }
    Ok((config["config"]["Entrypoint"][0].as_str().context("no entrypoint")?.to_owned(), layer))
}

fn unpack(image: &[u8]) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(image).entries()? {
        let mut entry = entry?;
        let mut contents = Vec::new();
        entry.read_to_end(&mut contents)?;
        files.insert(entry.path()?.to_string_lossy().into_owned(), contents);
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Our own executable: an ELF file of this machine that is sure to exist.
    fn elf() -> Vec<u8> {
        let mut elf = fs::read("/proc/self/exe").unwrap();
        // The head is enough to tell the architecture; compressing all of it takes seconds.
        elf.truncate(64);
        // No sections: their table would lie behind the end.
        elf[40..48].fill(0);
        elf[56..64].fill(0);
        elf
    }

    #[test]
    fn the_same_binary_gives_the_same_image() {
        assert_eq!(pack(&elf(), "1.2.3").unwrap(), pack(&elf(), "1.2.3").unwrap());
        assert_ne!(pack(&elf(), "1.2.3").unwrap(), pack(&elf(), "1.2.4").unwrap());
    }

    #[test]
    fn what_was_packed_can_be_found_through_the_index() {
        let files = unpack(&pack(&elf(), "1.2.3").unwrap()).unwrap();
        assert_eq!(files["oci-layout"], br#"{"imageLayoutVersion":"1.0.0"}"#);
        let (entrypoint, layer) = resolve(&files).unwrap();
        assert_eq!(entrypoint, "/proxy-agent");
        let mut layer = tar::Archive::new(layer.as_slice());
        let mut entries = layer.entries().unwrap();
        let mut entry = entries.next().unwrap().unwrap();
        assert_eq!(entry.path().unwrap().to_str(), Some("proxy-agent"));
        assert_eq!((entry.header().mode().unwrap(), entry.header().mtime().unwrap()), (0o755, 0));
        let mut contents = Vec::new();
        entry.read_to_end(&mut contents).unwrap();
        assert_eq!(contents, elf());
        assert!(entries.next().is_none());
    }

    #[test]
    fn both_names_of_the_image_are_the_same() {
        let files = unpack(&pack(&elf(), "1.2.3").unwrap()).unwrap();
        let docker: Value = serde_json::from_slice(&files["manifest.json"]).unwrap();
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        assert_eq!(docker[0]["RepoTags"][0], "ebpf-proxy/proxy-agent:1.2.3");
        let name = &index["manifests"][0]["annotations"]["io.containerd.image.name"];
        assert_eq!(name, "docker.io/ebpf-proxy/proxy-agent:1.2.3");
    }

    #[test]
    fn a_changed_blob_is_noticed() {
        let mut files = unpack(&pack(&elf(), "1.2.3").unwrap()).unwrap();
        for (path, contents) in &mut files {
            if path.starts_with("blobs/sha256/") && !path.ends_with('/') {
                contents.push(0);
            }
        }
        let error = resolve(&files).unwrap_err().to_string();
        assert!(error.contains("not what its descriptor says"), "{error}");
    }

    #[test]
    fn digests_are_those_of_the_specification() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest(b""), empty);
    }

    #[test]
    fn only_programs_are_packed() {
        assert!(pack(b"#!/bin/sh\n", "1").is_err());
    }
}
