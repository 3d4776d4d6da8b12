//! Who we are to the API server, and where it is: a kubeconfig, a pod's service account, or a URL alone.
//!
//! All of it may change while the agent runs: certificates and tokens are rotated, mounted files are exchanged by moving
//! a link. So everything that is read is read again every few seconds, and used as a whole when it says something else.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Uri;
use jiff::{SignedDuration, Timestamp};
use kube::config::{AuthInfo, Cluster, KubeConfigOptions, Kubeconfig};
use tokio::sync::Notify;

use super::connect::Way;
use super::kubernetes::Error;
use super::plugin;
use super::servers::{Origin, Servers};

/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// A credential of a plugin is renewed so long before it ends.
const BEFORE: SignedDuration = SignedDuration::from_secs(60);
/// A plugin is not run more often than this.
const PLUGIN: Duration = Duration::from_secs(15);
/// Where a pod finds its account.
const POD: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// What the warning of an account that cannot be read is about.
const ABOUT: &str = "account";

/// What was given.
#[derive(Clone, Debug)]
pub struct Account {
    /// The kubeconfig; without one a pod's service account, if there is one.
    pub kubeconfig: Option<PathBuf>,
    /// Servers that replace those of the kubeconfig or of the pod.
    pub servers: Vec<String>,
}

/// What it says at the moment.
pub(super) struct Read {
    pub(super) config: kube::Config,
    pub(super) servers: Vec<Uri>,
    /// Whether it is a pod's.
    pub(super) pod: bool,
    /// Files that have gone into it.
    files: Vec<PathBuf>,
    /// What a plugin has given.
    plugin: Option<Given>,
}

/// A credential of a plugin's.
struct Given {
    at: Instant,
    until: Option<Timestamp>,
}

impl Given {
    /// Whether another one is to be asked for: in time, and when this one is refused; but not all the time.
    fn is_due(&self, refused: bool) -> bool {
        let ends = self.until.is_some_and(|until| until.duration_since(Timestamp::now()) <= BEFORE);
        (ends || refused) && self.at.elapsed() >= PLUGIN
    }
}

impl Account {
    /// Reads everything.
    pub(super) async fn read(&self) -> Result<Read, Error> {
        let given = self.servers.iter().map(|url| parse(url)).collect::<Result<Vec<Uri>, Error>>()?;
        let mut read = match &self.kubeconfig {
            Some(path) => from_kubeconfig(path).await?,
            None => match kube::Config::incluster_env() {
                Ok(config) => {
                    let servers = vec![config.cluster_url.clone()];
                    let files = ["ca.crt", "token"].map(|name| Path::new(POD).join(name)).to_vec();
                    Read { config, servers, pod: true, files, plugin: None }
                }
                Err(error) => {
                    let Some(first) = given.first() else { return Err(Error::InCluster(error)) };
                    let config = kube::Config::new(first.clone());
                    Read { config, servers: Vec::new(), pod: false, files: Vec::new(), plugin: None }
                }
            },
        };
        if let Some(first) = given.first() {
            read.config.cluster_url = first.clone();
            (read.servers, read.pod) = (given, false);
        }
        // `kubectl` reads the CA when it starts; we read it again ourselves.
        read.config.root_cert_file = None;
        if read.config.root_cert.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::Authority { url: read.config.cluster_url.to_string() });
        }
        token(&mut read.config.auth_info)?;
        warn_of_proxy(&read.config);
        Ok(read)
    }

    /// Replaces `way`'s manner whenever another account is found, for ever. `look` asks for it at once.
    pub(super) async fn follow(self, mut read: Read, way: Way, servers: Arc<Servers>, look: Arc<Notify>) {
        let mut known = fingerprint(&self, &read);
        loop {
            let refused = tokio::select! {
                () = tokio::time::sleep(LOOK) => false,
                () = look.notified() => true,
            };
            let now = fingerprint(&self, &read);
            let due = read.plugin.as_ref().is_some_and(|given| given.is_due(refused));
            if now == known && !due {
                servers.trouble(ABOUT, None); // It may be as it was before.
                continue;
            }
            let replaced = match self.read().await {
                Ok(new) => {
                    read = new;
                    let built = way.replace(read.config.clone());
                    built.map_err(|source| Error::Client { url: read.config.cluster_url.to_string(), source })
                }
                Err(error) => Err(error),
            };
            match replaced {
                Ok(()) => {
                    servers.set(Origin::Given, &read.servers);
                    servers.trouble(ABOUT, None);
                    // The new one may name other files.
                    known = fingerprint(&self, &read);
                    tracing::info!("the account for the API server has changed: connecting anew");
                }
                Err(error) => {
                    if let Some(given) = &mut read.plugin {
                        given.at = Instant::now();
                    }
                    let line =
                        format!("{}: what was read before stays in use", super::connect::cause(&error));
                    servers.trouble(ABOUT, Some(line));
                }
            }
        }
    }
}

fn parse(url: &str) -> Result<Uri, Error> {
    let uri: Uri = url.parse().map_err(|source| Error::Url { url: url.to_owned(), source })?;
    // A host alone is no URL: nobody could tell its scheme.
    if uri.scheme().is_none() || uri.authority().is_none() {
        let source = "http://".parse::<Uri>().expect_err("a scheme alone");
        return Err(Error::Url { url: url.to_owned(), source });
    }
    Ok(uri)
}

/// A proxy for everything that a node says to the outside is none for the API server: kubelets of most nodes do without,
/// too. Who needs it there says so.
fn warn_of_proxy(config: &kube::Config) {
    let named = ["HTTPS_PROXY", "https_proxy"].into_iter().find(|name| std::env::var_os(name).is_some());
    if let (Some(name), None) = (named, &config.proxy_url) {
        tracing::warn!(
            "{name} is not followed: a proxy towards the API server is to be named by the kubeconfig (proxy-url)"
        );
    }
}

fn proxy_url(url: &str) -> Result<Uri, Error> {
    let known =
        |uri: &Uri| matches!(uri.scheme_str(), Some("http" | "https" | "socks5")) && uri.host().is_some();
    url.parse().ok().filter(known).ok_or_else(|| Error::Proxy { url: url.to_owned() })
}

/// The current context's cluster and user, and further servers of the same cluster: those with the same CA.
async fn from_kubeconfig(path: &Path) -> Result<Read, Error> {
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
    // And not that of the environment, which `kube` takes without looking at NO_PROXY.
    config.proxy_url = proxy.as_deref().map(proxy_url).transpose()?;
    let has_plugin = config.auth_info.exec.is_some();
    let home = path.parent().unwrap_or(Path::new(""));
    let until = plugin::ask(&mut config.auth_info, home).await;
    let until = until.map_err(|source| Error::Plugin { path: path.to_owned(), source })?;
    let plugin = has_plugin.then(|| Given { at: Instant::now(), until });
    let mut servers = vec![config.cluster_url.clone()];
    for url in more {
        if !servers.contains(&url) {
            servers.push(url);
        }
    }
    Ok(Read { config, servers, pod: false, files, plugin })
}

/// What tells the clusters of a kubeconfig apart: the CA as it is written there.
fn authority(cluster: &Cluster) -> Option<(Option<&String>, Option<&String>)> {
    let (data, file) = (&cluster.certificate_authority_data, &cluster.certificate_authority);
    (data.is_some() || file.is_some()).then_some((data.as_ref(), file.as_ref()))
}

/// Takes the token out of its file: editors end files with a newline, which is no part of it. A file that cannot be read
/// leaves the token beside it, if there is one.
fn token(user: &mut AuthInfo) -> Result<(), Error> {
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

/// What the files say, whatever it is; a file that is not there is something, too.
fn fingerprint(account: &Account, read: &Read) -> u64 {
    let mut hasher = DefaultHasher::new();
    account.kubeconfig.hash(&mut hasher);
    for file in &read.files {
        (file, std::fs::read(file).ok()).hash(&mut hasher);
    }
    hasher.finish()
}

#[cfg(test)]
#[path = "account_tests.rs"]
mod tests;
