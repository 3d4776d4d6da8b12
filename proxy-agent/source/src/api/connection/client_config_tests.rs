//! What is read of an config, and what is found when it changes.

use std::fs;

use super::*;

fn kubeconfig(dir: &Path, more: &str) -> PathBuf {
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: one, user: u}}}}]\n\
         users: [{{name: u, user: {{tokenFile: token}}}}]\n\
         clusters:\n- {{name: one, cluster: {{server: 'https://10.0.0.1:6443', insecure-skip-tls-verify: true}}}}\n{more}"
    );
    let path = dir.join("config");
    fs::write(&path, text).unwrap();
    path
}

fn config(path: PathBuf, servers: &[&str]) -> ClientConfig {
    ClientConfig { kubeconfig: Some(path), servers: servers.iter().map(ToString::to_string).collect() }
}

#[tokio::test]
async fn whitespace_around_a_token_is_no_part_of_it_and_an_empty_one_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(kubeconfig(dir.path(), ""), &[]);
    fs::write(dir.path().join("token"), "  secret\r\n\n").unwrap();
    let loaded = config.read().await.unwrap();
    let token = serde_json::to_value(&loaded.config.auth_info).unwrap()["token"].clone();
    assert_eq!(token, "secret");
    fs::write(dir.path().join("token"), "\n").unwrap();
    let error = config.read().await.err().unwrap().to_string();
    assert!(error.contains("token") && error.contains(&dir.path().display().to_string()), "{error}");
}

#[tokio::test]
async fn flags_replace_the_servers_of_a_file_and_others_of_its_cluster_come_after_the_first() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("token"), "secret").unwrap();
    // Without a CA nothing says that it is the same cluster.
    let more = "- {name: two, cluster: {server: 'https://10.0.0.2:6443', insecure-skip-tls-verify: true}}\n";
    let path = kubeconfig(dir.path(), more);
    let loaded = config(path.clone(), &[]).read().await.unwrap();
    assert_eq!(loaded.servers, ["https://10.0.0.1:6443"]);
    let loaded = config(path, &["https://a:1", "https://b:2"]).read().await.unwrap();
    assert_eq!(loaded.servers, ["https://a:1", "https://b:2"]);
    assert_eq!(loaded.config.cluster_url, "https://a:1");

    let ca = rcgen::CertificateParams::new(vec!["ca".to_owned()]).unwrap();
    let ca = ca.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
    for name in ["ca", "other"] {
        fs::write(dir.path().join(name), &ca).unwrap();
    }
    let text = "apiVersion: v1\nkind: Config\ncurrent-context: c\nusers: []\n\
                contexts: [{name: c, context: {cluster: two}}]\nclusters:\n\
                - {name: one, cluster: {server: 'https://10.0.0.1:6443', certificate-authority: ca}}\n\
                - {name: two, cluster: {server: 'https://10.0.0.2:6443', certificate-authority: ca}}\n\
                - {name: far, cluster: {server: 'https://10.9.9.9:6443', certificate-authority: other}}\n";
    let path = dir.path().join("two");
    fs::write(&path, text).unwrap();
    let loaded = config(path, &[]).read().await.unwrap();
    assert_eq!(loaded.servers, ["https://10.0.0.2:6443", "https://10.0.0.1:6443"]);
}

#[tokio::test]
async fn a_link_that_leads_elsewhere_is_seen_as_a_change() {
    let dir = tempfile::tempdir().unwrap();
    for (name, token) in [("old", "a"), ("new", "b")] {
        fs::write(dir.path().join(name), token).unwrap();
    }
    let link = dir.path().join("token");
    std::os::unix::fs::symlink("old", &link).unwrap();
    let config = config(kubeconfig(dir.path(), ""), &[]);
    let loaded = config.read().await.unwrap();
    let before = fingerprint(&loaded.files);
    assert_eq!(fingerprint(&loaded.files), before);
    fs::remove_file(&link).unwrap();
    assert_ne!(fingerprint(&loaded.files), before, "gone is a change, too");
    std::os::unix::fs::symlink("new", &link).unwrap();
    assert_ne!(fingerprint(&loaded.files), before);
}
