//! Credentials that a program gives (`exec` of a kubeconfig, client-go's credential plugins).
//!
//! `kube` runs such a program where it stands, for each connection anew, and waits for it for ever. Here it runs on a thread
//! of its own, for a bounded time, once for each credential; its output is kept in memory, so nobody waits for who holds a
//! pipe.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use kube::config::{AuthInfo, ExecConfig};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Deserialize;
use serde_json::json;

use crate::blocking::run_blocking;

/// How long a plugin may take. Those of clouds ask a server, too.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often it is looked whether it has ended.
const POLL: Duration = Duration::from_millis(20);
/// What a credential may be long.
const LONGEST: u64 = 1 << 20;

/// Why there is no credential.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// The kubeconfig names no program.
    #[error("exec names no command")]
    Nameless,
    /// It could not be run.
    #[error("cannot run {command}")]
    Run {
        /// The program.
        command: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not end.
    #[error("{command} has not ended within {PATIENCE:?}")]
    Hangs {
        /// The program.
        command: PathBuf,
    },
    /// It says that it has failed.
    #[error("{command} has failed ({status}): {said}")]
    Failed {
        /// The program.
        command: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The last line that it said.
        said: String,
    },
    /// What it says is no credential.
    #[error("{command} gives no ExecCredential with a token, or a certificate and its key")]
    Useless {
        /// The program.
        command: PathBuf,
        /// Why.
        source: Option<Box<serde_saphyr::Error>>,
    },
}

#[derive(Deserialize)]
struct Answer {
    status: Option<Status>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    token: Option<String>,
    client_certificate_data: Option<String>,
    client_key_data: Option<String>,
    expiration_timestamp: Option<Timestamp>,
}

/// Replaces the plugin of this user by what it gives; until when that holds, if it says so. A command with a slash in it is
/// looked for beside the kubeconfig.
pub(super) async fn ask(user: &mut AuthInfo, home: &Path) -> Result<Option<Timestamp>, PluginError> {
    let Some(exec) = user.exec.take() else { return Ok(None) };
    let name = exec.command.clone().ok_or(PluginError::Nameless)?;
    let command = if name.contains('/') { home.join(name) } else { name.into() };
    let (program, spec) = (command.clone(), exec);
    let ran = run_blocking("plugin", move || run(&program, &spec, PATIENCE)).await;
    let said = ran.map_err(|source| PluginError::Run { command: command.clone(), source })??;
    let useless = |source| PluginError::Useless { command: command.clone(), source };
    let answer: Answer = serde_saphyr::from_slice(&said).map_err(|error| useless(Some(Box::new(error))))?;
    let status = answer.status.ok_or_else(|| useless(None))?;
    let certificate = status.client_certificate_data.zip(status.client_key_data);
    if status.token.is_none() && certificate.is_none() {
        return Err(useless(None));
    }
    if let Some(token) = status.token {
        user.token = Some(token.into());
    }
    if let Some((certificate, key)) = certificate {
        user.client_certificate_data = Some(STANDARD.encode(certificate));
        user.client_key_data = Some(STANDARD.encode(key).into());
    }
    Ok(status.expiration_timestamp)
}

/// What a plugin says, if it ends well and in time.
fn run(command: &Path, exec: &ExecConfig, patience: Duration) -> Result<Vec<u8>, PluginError> {
    let failed = |source| PluginError::Run { command: command.to_owned(), source };
    let (mut out, mut err) = (memory().map_err(failed)?, memory().map_err(failed)?);
    let info = json!({
        "apiVersion": exec.api_version, "kind": "ExecCredential",
        "spec": { "interactive": false, "cluster": exec.cluster.as_ref().filter(|_| exec.provide_cluster_info) },
    });
    let named =
        |pair: &HashMap<String, String>| Some((pair.get("name")?.clone(), pair.get("value")?.clone()));
    let mut child = Command::new(command)
        .args(exec.args.iter().flatten())
        .envs(exec.env.iter().flatten().filter_map(named))
        .env("KUBERNETES_EXEC_INFO", info.to_string())
        .stdin(Stdio::null())
        .stdout(out.try_clone().map_err(failed)?)
        .stderr(err.try_clone().map_err(failed)?)
        .spawn()
        .map_err(failed)?;
    let begun = Instant::now();
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if begun.elapsed() < patience => sleep(POLL),
            None => {
                child.kill().and_then(|()| child.wait()).map_err(failed)?;
                return Err(PluginError::Hangs { command: command.to_owned() });
            }
        }
    };
    let read = |file: &mut File| -> io::Result<Vec<u8>> {
        file.rewind()?;
        let mut said = Vec::new();
        file.take(LONGEST).read_to_end(&mut said)?;
        Ok(said)
    };
    if status.success() {
        return read(&mut out).map_err(failed);
    }
    let said = String::from_utf8_lossy(&read(&mut err).map_err(failed)?).trim_end().to_owned();
    let said = said.lines().last().unwrap_or("it says nothing").to_owned();
    Err(PluginError::Failed { command: command.to_owned(), status, said })
}

fn memory() -> io::Result<File> {
    Ok(memfd_create("plugin", MFdFlags::MFD_CLOEXEC)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> ExecConfig {
        serde_json::from_value(json!({
            "apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "args": ["-c", script],
            "env": [{ "name": "GREETING", "value": "hello" }],
        }))
        .unwrap()
    }

    async fn asked(script: &str) -> Result<(AuthInfo, Option<Timestamp>), String> {
        let mut user = AuthInfo { exec: Some(shell(script)), ..AuthInfo::default() };
        let until = ask(&mut user, Path::new("/")).await.map_err(|error| error.to_string())?;
        assert!(user.exec.is_none(), "nobody else is to run it");
        Ok((user, until))
    }

    #[tokio::test]
    async fn a_plugin_gives_a_token_or_a_certificate_and_says_until_when() {
        let (user, until) = asked(
            "echo \"{kind: ExecCredential, status: {token: $GREETING, expirationTimestamp: '2030-01-02T03:04:05Z'}}\"",
        )
        .await
        .unwrap();
        assert_eq!(serde_json::to_value(&user).unwrap()["token"], "hello");
        assert_eq!(until.unwrap().to_string(), "2030-01-02T03:04:05Z");
        let (user, until) =
            asked("echo '{\"status\": {\"clientCertificateData\": \"c\", \"clientKeyData\": \"k\"}}'")
                .await
                .unwrap();
        assert_eq!((user.client_certificate_data.as_deref(), until), (Some("Yw=="), None));
    }

    #[tokio::test]
    async fn what_a_plugin_does_wrong_is_named() {
        for (script, said) in [
            ("echo no >&2; exit 3", "sh has failed (exit status: 3): no"),
            ("echo '{\"kind\": \"ExecCredential\"}'", "sh gives no ExecCredential"),
            ("echo welcome to the hotel", "sh gives no ExecCredential"),
        ] {
            let error = asked(script).await.unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        let mut user = AuthInfo { exec: Some(shell("")), ..AuthInfo::default() };
        user.exec.as_mut().unwrap().command = Some("./none".into());
        let error = ask(&mut user, Path::new("/home")).await.unwrap_err().to_string();
        assert_eq!(error, "cannot run /home/./none");
    }

    #[test]
    fn one_that_does_not_end_is_ended_whoever_holds_its_output() {
        let begun = Instant::now();
        let error = run(Path::new("sh"), &shell("sleep 30"), Duration::from_millis(200)).unwrap_err();
        assert!(
            matches!(error, PluginError::Hangs { .. }) && begun.elapsed() < Duration::from_secs(10),
            "{error}"
        );
        let said =
            run(Path::new("sh"), &shell("sleep 30 & echo $KUBERNETES_EXEC_INFO"), Duration::from_secs(5))
                .unwrap();
        let said: serde_json::Value = serde_json::from_slice(&said).unwrap();
        assert_eq!((&said["kind"], &said["spec"]["interactive"]), (&json!("ExecCredential"), &json!(false)));
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
