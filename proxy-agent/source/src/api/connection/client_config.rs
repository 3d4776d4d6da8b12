//! Credentials and servers: from a kubeconfig, a pod's service account, or a URL alone.
//!
//! All of it may change while the agent runs: certificates and tokens are rotated, mounted files are replaced by moving a
//! link. So all files are read again every few seconds, and a change replaces the whole configuration.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Uri;
use jiff::{SignedDuration, Timestamp};
use kube::config::{AuthInfo, Cluster, KubeConfigOptions, Kubeconfig};
use tokio::sync::Notify;

use super::error::Error;
use super::exec_plugin;
use super::servers::{Origin, Servers};
use super::transport::{Transport, with_root_cause};

/// How often files are checked for changes. They are read rather than watched: each may be behind a chain of links, and
/// every directory on the way would need a watch.
const POLL: Duration = Duration::from_secs(5);
/// How long before its expiry a plugin's credential is renewed.
const RENEW_BEFORE: SignedDuration = SignedDuration::from_secs(60);
/// A plugin is not run more often than this.
const PLUGIN_INTERVAL: Duration = Duration::from_secs(15);
/// Where a pod's service account is mounted.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The subject of the problem that is shown when something cannot be read.
const PROBLEM: &str = "credentials";

/// Where to read credentials and servers from.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Without one, a pod's service account, if there is one.
    pub kubeconfig: Option<PathBuf>,
    /// Servers that replace those of the kubeconfig or of the pod.
    pub servers: Vec<String>,
}

/// What was read.
pub(in crate::api) struct Loaded {
    pub(in crate::api) config: kube::Config,
    pub(in crate::api) servers: Vec<Uri>,
    /// Whether it is a pod's service account.
    pub(in crate::api) pod: bool,
    /// The files it was read from.
    files: Vec<PathBuf>,
    plugin: Option<PluginCredential>,
}

/// When an exec plugin was last run, and when its credential expires.
struct PluginCredential {
    at: Instant,
    until: Option<Timestamp>,
}

impl PluginCredential {
    /// Whether to run the plugin again: before the expiry, or after a 401; but not too often.
    fn is_due(&self, unauthorized: bool) -> bool {
        let ends = self.until.is_some_and(|until| until.duration_since(Timestamp::now()) <= RENEW_BEFORE);
        (ends || unauthorized) && self.at.elapsed() >= PLUGIN_INTERVAL
    }
}

impl ClientConfig {
    /// Reads all files, and runs the exec plugin if there is one.
    pub(in crate::api) async fn read(&self) -> Result<Loaded, Error> {
        let configured = self.servers.iter().map(|url| parse(url)).collect::<Result<Vec<Uri>, Error>>()?;
        let mut loaded = match &self.kubeconfig {
            Some(path) => from_kubeconfig(path).await?,
            None => match kube::Config::incluster_env() {
                Ok(config) => {
                    let servers = vec![config.cluster_url.clone()];
                    let files =
                        ["ca.crt", "token"].map(|name| Path::new(SERVICE_ACCOUNT).join(name)).to_vec();
                    Loaded { config, servers, pod: true, files, plugin: None }
                }
                Err(error) => {
                    let Some(first) = configured.first() else { return Err(Error::InCluster(error)) };
                    let config = kube::Config::new(first.clone());
                    Loaded { config, servers: Vec::new(), pod: false, files: Vec::new(), plugin: None }
                }
            },
        };
        if let Some(first) = configured.first() {
            loaded.config.cluster_url = first.clone();
            (loaded.servers, loaded.pod) = (configured, false);
        }
        // Otherwise `kube` would read the CA's file again by itself; we do that with all files.
        loaded.config.root_cert_file = None;
        if loaded.config.root_cert.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::Authority { url: loaded.config.cluster_url.to_string() });
        }
        read_token(&mut loaded.config.auth_info)?;
        warn_of_ignored_proxy(&loaded.config);
        Ok(loaded)
    }

    /// Reads everything again when a file changes, for ever, and gives it to `transport`. `reload`: a 401 was answered.
    pub(in crate::api) async fn follow_changes(
        self,
        mut loaded: Loaded,
        transport: Transport,
        servers: Arc<Servers>,
        reload: Arc<Notify>,
    ) {
        let mut known = fingerprint(&loaded.files);
        loop {
            let unauthorized = tokio::select! {
                () = tokio::time::sleep(POLL) => false,
                () = reload.notified() => true,
            };
            let now = fingerprint(&loaded.files);
            let due = loaded.plugin.as_ref().is_some_and(|plugin| plugin.is_due(unauthorized));
            if now == known && !due {
                servers.set_problem(PROBLEM, None); // A file may have its old content again.
                continue;
            }
            let replaced = match self.read().await {
                Ok(new) => {
                    loaded = new;
                    let built = transport.replace(loaded.config.clone());
                    built.map_err(|source| Error::Client {
                        url: loaded.config.cluster_url.to_string(),
                        source,
                    })
                }
                Err(error) => Err(error),
            };
            match replaced {
                Ok(()) => {
                    servers.set(Origin::Configured, &loaded.servers);
                    servers.set_problem(PROBLEM, None);
                    // A new kubeconfig may name other files.
                    known = fingerprint(&loaded.files);
                    tracing::info!("the credentials for the API server have changed: reconnecting");
                }
                Err(error) => {
                    if let Some(plugin) = &mut loaded.plugin {
                        plugin.at = Instant::now();
                    }
                    let line = format!("{}: the previous credentials stay in use", with_root_cause(&error));
                    servers.set_problem(PROBLEM, Some(line));
                }
            }
        }
    }
}

fn parse(url: &str) -> Result<Uri, Error> {
    let uri: Uri = url.parse().map_err(|source| Error::Url { url: url.to_owned(), source })?;
    // `Uri` also accepts a host alone, without a scheme.
    if uri.scheme().is_none() || uri.authority().is_none() {
        let source = "http://".parse::<Uri>().expect_err("a scheme alone");
        return Err(Error::Url { url: url.to_owned(), source });
    }
    Ok(uri)
}

/// A node's proxy for outside traffic seldom leads to the API server, and most kubelets do without. So only a kubeconfig's
/// `proxy-url` counts.
fn warn_of_ignored_proxy(config: &kube::Config) {
    let named = ["HTTPS_PROXY", "https_proxy"].into_iter().find(|name| std::env::var_os(name).is_some());
    if let (Some(name), None) = (named, &config.proxy_url) {
        tracing::warn!(
            "{name} is not followed: set a proxy for the API server in the kubeconfig (proxy-url)"
        );
    }
}

fn proxy_url(url: &str) -> Result<Uri, Error> {
    let known =
        |uri: &Uri| matches!(uri.scheme_str(), Some("http" | "https" | "socks5")) && uri.host().is_some();
    url.parse().ok().filter(known).ok_or_else(|| Error::Proxy { url: url.to_owned() })
}

/// The current context's cluster and user, and further servers of the same cluster: those with the same CA. `kube` reads the
/// file; but which files it names, and which entries have the same CA, it does not show.
async fn from_kubeconfig(path: &Path) -> Result<Loaded, Error> {
    let fault = |source| Error::Kubeconfig { path: path.to_owned(), source };
    let file = Kubeconfig::read_from(path).map_err(fault)?;
    let context = file.contexts.iter().find(|c| Some(&c.name) == file.current_context.as_ref());
    let context = context.and_then(|c| c.context.as_ref());
    let cluster = context.and_then(|context| {
        let named = file.clusters.iter().find(|c| c.name == context.cluster);
        named.and_then(|named| named.cluster.as_ref())
    });
    let user = context.and_then(|context| {
        let named = file.auth_infos.iter().find(|u| Some(&u.name) == context.user.as_ref());
        named.and_then(|named| named.auth_info.as_ref())
    });
    let mut files = vec![path.to_owned()];
    files.extend(cluster.and_then(|cluster| cluster.certificate_authority.as_ref()).map(PathBuf::from));
    if let Some(user) = user {
        let named = [&user.token_file, &user.client_certificate, &user.client_key];
        files.extend(named.into_iter().flatten().map(PathBuf::from));
    }
    let more: Vec<Uri> = cluster.map_or_else(Vec::new, |cluster| {
        let same = file.clusters.iter().filter_map(|named| named.cluster.as_ref());
        let same =
            same.filter(|other| authority(cluster).is_some() && authority(other) == authority(cluster));
        same.filter_map(|cluster| cluster.server.as_ref()?.parse().ok()).collect()
    });
    let proxy = cluster.and_then(|cluster| cluster.proxy_url.clone()).filter(|url| !url.is_empty());
    let options = KubeConfigOptions::default();
    let mut config = kube::Config::from_custom_kubeconfig(file, &options).await.map_err(fault)?;
    // Not the proxy of the environment, which `kube` takes without regard to NO_PROXY.
    config.proxy_url = proxy.as_deref().map(proxy_url).transpose()?;
    let has_plugin = config.auth_info.exec.is_some();
    let home = path.parent().unwrap_or(Path::new(""));
    let until = exec_plugin::resolve(&mut config.auth_info, home).await;
    let until = until.map_err(|source| Error::Plugin { path: path.to_owned(), source })?;
    let plugin = has_plugin.then(|| PluginCredential { at: Instant::now(), until });
    let mut servers = vec![config.cluster_url.clone()];
    for url in more {
        if !servers.contains(&url) {
            servers.push(url);
        }
    }
    Ok(Loaded { config, servers, pod: false, files, plugin })
}

/// Two entries with the same CA, as it is written in the kubeconfig, are the same cluster.
fn authority(cluster: &Cluster) -> Option<(Option<&String>, Option<&String>)> {
    let (data, file) = (&cluster.certificate_authority_data, &cluster.certificate_authority);
    (data.is_some() || file.is_some()).then_some((data.as_ref(), file.as_ref()))
}

/// Reads the token from its file, without the newline that editors add; `kube` leaves it, and no header may have one. If the
/// file cannot be read, a token in the kubeconfig counts.
fn read_token(user: &mut AuthInfo) -> Result<(), Error> {
    let Some(path) = user.token_file.take() else { return Ok(()) };
    match std::fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => user.token = Some(text.trim().to_owned().into()),
        Ok(_) if user.token.is_some() => {}
        Err(_) if user.token.is_some() => {}
        Ok(_) => {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidData, "it is empty");
            return Err(Error::Token { path: path.into(), source });
        }
        Err(source) => return Err(Error::Token { path: path.into(), source }),
    }
    Ok(())
}

/// A hash over the content of all files; a missing file counts, too.
fn fingerprint(files: &[PathBuf]) -> u64 {
    let contents: Vec<Option<Vec<u8>>> = files.iter().map(|file| std::fs::read(file).ok()).collect();
    crate::hash((files, contents))
}

#[cfg(test)]
#[path = "client_config_tests.rs"]
mod tests;
