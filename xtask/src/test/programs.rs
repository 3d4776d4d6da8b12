//! The test programs: compiled together, then found by what cargo says it has made.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use cargo_metadata::{Message, TargetKind};

use crate::{cmd, compile};

/// A compiled test program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    /// The folder of its package below the workspace's, as in `proxy-agent/core`: where cargo would start it.
    pub(super) package: PathBuf,
    pub(super) kind: TargetKind,
    pub(super) name: String,
    executable: PathBuf,
}

impl Program {
    /// A command that runs it.
    pub(super) fn command(&self, root: &Path) -> Command {
        let folder = root.join(&self.package);
        let mut command = Command::new(&self.executable);
        // Cargo says it so; some tests look at their package's files.
        command.env("CARGO_MANIFEST_DIR", &folder).current_dir(folder);
        command
    }
}

/// Compiles what these flags of `cargo test` choose.
pub(super) fn compile(root: &Path, flags: &[String]) -> Result<Vec<Program>> {
    let mut command = compile::whole("test");
    command.arg("--no-run").args(flags);
    println!("$ {}", cmd::shown(&command));
    command.arg("--message-format=json-render-diagnostics").stdin(Stdio::null()).stderr(Stdio::inherit());
    let out = command.output().with_context(|| format!("could not start: {}", cmd::shown(&command)))?;
    if !out.status.success() {
        bail!("failed ({}): {}", out.status, cmd::shown(&command));
    }
    read(root, &out.stdout)
}

/// The test programs that cargo names.
fn read(root: &Path, lines: &[u8]) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    for message in Message::parse_stream(lines) {
        let Message::CompilerArtifact(made) = message.context("could not read what cargo says")? else {
            continue;
        };
        let (true, Some(executable)) = (made.profile.test, made.executable) else { continue };
        let package = made.manifest_path.parent().and_then(|folder| folder.strip_prefix(root).ok());
        let package = package.with_context(|| format!("{} is not of this workspace", made.manifest_path))?;
        let kind =
            made.target.kind.into_iter().next().with_context(|| format!("{executable} is of no kind"))?;
        let (package, executable) = (package.into(), executable.into());
        programs.push(Program { package, kind, name: made.target.name, executable });
    }
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_programs_with_tests_are_found_each_with_its_package() {
        let artifact = |manifest: &str, kind: &str, test: bool, executable: &str| {
            json!({
                "reason": "compiler-artifact",
                "package_id": "path+file:///w/tests#0.1.0",
                "manifest_path": manifest,
                "target": {"kind": [kind], "crate_types": ["bin"], "name": "e2e", "src_path": "/w", "edition": "2024"},
                "profile": {
                    "opt_level": "0", "debuginfo": 1, "debug_assertions": true, "overflow_checks": true, "test": test
                },
                "features": [], "filenames": [], "executable": executable, "fresh": true,
            })
            .to_string()
        };
        let lines = [
            artifact("/w/tests/Cargo.toml", "test", true, "/w/target/debug/deps/e2e-1"),
            artifact("/w/tests/Cargo.toml", "bin", false, "/w/target/debug/e2e"),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ]
        .join("\n");
        let wanted = Program {
            package: "tests".into(),
            kind: TargetKind::Test,
            name: "e2e".into(),
            executable: "/w/target/debug/deps/e2e-1".into(),
        };
        assert_eq!(read(Path::new("/w"), lines.as_bytes()).unwrap(), [wanted]);
        assert!(read(Path::new("/elsewhere"), lines.as_bytes()).is_err());
    }
}
