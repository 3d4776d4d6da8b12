//! Exec credential plugins (`exec` in a kubeconfig).
//!
//! `kube` has this, too, but runs the plugin inside the event loop, each time a client is made, and waits for it for ever.
//! Here it runs on its own thread, with a time-out, once for each credential. Its output goes to memory, not to a pipe: a
//! child that keeps a pipe open would make us wait.

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

/// How long a plugin may take. Those of clouds send requests themselves.
const TIMEOUT: Duration = Duration::from_secs(15);
/// How often to check whether it has ended.
const POLL: Duration = Duration::from_millis(20);
/// Bytes of output that are read.
const MAX_OUTPUT: u64 = 1 << 20;

/// Why there is no credential.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// The kubeconfig names no program.
    #[error("exec names no command")]
    NoCommand,
    /// It could not be run.
    #[error("cannot run {command}")]
    Run { command: PathBuf, source: io::Error },
    /// It does not end.
    #[error("{command} has not ended within {TIMEOUT:?}")]
    TimedOut { command: PathBuf },
    /// Its exit status is not 0.
    #[error("{command} has failed ({status}): {stderr}")]
    Failed {
        command: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The last line of its standard error.
        stderr: String,
    },
    /// Its output is no credential.
    #[error("{command} gives no ExecCredential with a token, or a certificate and its key")]
    Invalid { command: PathBuf, source: Option<Box<serde_saphyr::Error>> },
}

#[derive(Deserialize)]
struct ExecCredential {
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

/// Runs the plugin of this user and puts its credential in the plugin's place. Returns when that expires, if ever. A command
/// with a slash in it is relative to the kubeconfig's directory.
pub(super) async fn resolve(user: &mut AuthInfo, home: &Path) -> Result<Option<Timestamp>, PluginError> {
    let Some(exec) = user.exec.take() else { return Ok(None) };
    let name = exec.command.clone().ok_or(PluginError::NoCommand)?;
    let command = if name.contains('/') { home.join(name) } else { name.into() };
    let (program, spec) = (command.clone(), exec);
    let ran = run_blocking("plugin", move || run(&program, &spec, TIMEOUT)).await;
    let output = ran.map_err(|source| PluginError::Run { command: command.clone(), source })??;
    let invalid = |source| PluginError::Invalid { command: command.clone(), source };
    let answer: ExecCredential =
        serde_saphyr::from_slice(&output).map_err(|error| invalid(Some(Box::new(error))))?;
    let status = answer.status.ok_or_else(|| invalid(None))?;
    let certificate = status.client_certificate_data.zip(status.client_key_data);
    if status.token.is_none() && certificate.is_none() {
        return Err(invalid(None));
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

/// The output of a plugin that succeeds in time.
fn run(command: &Path, exec: &ExecConfig, limit: Duration) -> Result<Vec<u8>, PluginError> {
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
            None if begun.elapsed() < limit => sleep(POLL),
            None => {
                child.kill().and_then(|()| child.wait()).map_err(failed)?;
                return Err(PluginError::TimedOut { command: command.to_owned() });
            }
        }
    };
    let read = |file: &mut File| -> io::Result<Vec<u8>> {
        file.rewind()?;
        let mut output = Vec::new();
        file.take(MAX_OUTPUT).read_to_end(&mut output)?;
        Ok(output)
    };
    if status.success() {
        return read(&mut out).map_err(failed);
    }
    let stderr = String::from_utf8_lossy(&read(&mut err).map_err(failed)?).trim_end().to_owned();
    let stderr = stderr.lines().last().unwrap_or("no output").to_owned();
    Err(PluginError::Failed { command: command.to_owned(), status, stderr })
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
        let until = resolve(&mut user, Path::new("/")).await.map_err(|error| error.to_string())?;
        assert!(user.exec.is_none(), "`kube` is not to run it again");
        Ok((user, until))
    }

    #[tokio::test]
    async fn a_plugin_gives_a_token_or_a_certificate_and_its_expiry() {
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
    async fn failures_of_a_plugin_are_named() {
        for (script, expected) in [
            ("echo no >&2; exit 3", "sh has failed (exit status: 3): no"),
            ("echo '{\"kind\": \"ExecCredential\"}'", "sh gives no ExecCredential"),
            ("echo welcome to the hotel", "sh gives no ExecCredential"),
        ] {
            let error = asked(script).await.unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let mut user = AuthInfo { exec: Some(shell("")), ..AuthInfo::default() };
        user.exec.as_mut().unwrap().command = Some("./none".into());
        let error = resolve(&mut user, Path::new("/home")).await.unwrap_err().to_string();
        assert_eq!(error, "cannot run /home/./none");
    }

    #[test]
    fn a_plugin_that_hangs_is_killed_whoever_holds_its_output() {
        let begun = Instant::now();
        let error = run(Path::new("sh"), &shell("sleep 30"), Duration::from_millis(200)).unwrap_err();
        assert!(
            matches!(error, PluginError::TimedOut { .. }) && begun.elapsed() < Duration::from_secs(10),
            "{error}"
        );
        let info =
            run(Path::new("sh"), &shell("sleep 30 & echo $KUBERNETES_EXEC_INFO"), Duration::from_secs(5))
                .unwrap();
        let info: serde_json::Value = serde_json::from_slice(&info).unwrap();
        assert_eq!((&info["kind"], &info["spec"]["interactive"]), (&json!("ExecCredential"), &json!(false)));
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
