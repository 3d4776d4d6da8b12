//! The command tree, over tables in memory.

use clap::CommandFactory;

use super::*;

fn rooms() -> Rooms {
    Rooms {
        run: |config| bail!("ran as {}", config.settings.node_name),
        open: |root| match root.to_str() {
            Some("/none") => Ok(None),
            Some("/alive") => {
                let mut memory = memory::small_cluster();
                memory.agent.beat_ms = Now::read()?.unix_ms;
                Ok(Some(Box::new(memory)))
            }
            Some("/broken") => bail!("permission denied"),
            _ => Ok(Some(Box::new(memory::small_cluster()))),
        },
        remove: |_| Ok(vec![]),
        leftovers: Vec::new,
        clean: || Cleaned {
            removed: vec!["nftables table ip kube-proxy".to_owned()],
            left: vec!["IP set KUBE-LOOP-BACK: busy".to_owned()],
        },
        others: |_| Others::default(),
        trial: || doctor::Trial { outcome: Ok(12), fall_backs: vec![] },
        object: b"\x7fELF",
    }
}

fn run(line: &[&str]) -> (Result<ExitCode>, String) {
    let cli = Cli::try_parse_from([&["proxy-agent"], line].concat()).unwrap();
    let mut out = Vec::new();
    let code = dispatch(cli, &rooms(), &mut out);
    (code, String::from_utf8(out).unwrap())
}

fn json(line: &[&str]) -> serde_json::Value {
    let (code, out) = run(line);
    code.unwrap();
    serde_json::from_str(&out).unwrap()
}

#[test]
fn the_command_tree_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn every_listing_comes_as_table_and_as_json() {
    for line in [["service", "list"], ["backend", "list"], ["conntrack", "list"]] {
        let (code, text) = run(&line);
        assert_eq!(code.unwrap(), ExitCode::SUCCESS);
        assert!(text.lines().count() >= 4, "{text}");
        // How long a flow has been idle grows from one reading to the next.
        let timeless = |flags: &[&str]| {
            let mut rows = json(&[&line[..], flags].concat());
            rows.as_array_mut().into_iter().flatten().for_each(|row| row["idle_ms"] = 0.into());
            rows
        };
        let rows = timeless(&["--output", "json"]);
        assert_eq!(rows.as_array().map(Vec::len), Some(3), "{rows}");
        assert_eq!(rows, timeless(&["-o", "json", "--bpf-root=/x"]));
    }
}

#[test]
fn flush_wants_to_be_told_what() {
    let parse = |line: &[&str]| Cli::try_parse_from([&["proxy-agent", "conntrack", "flush"], line].concat());
    assert!(parse(&[]).is_err());
    assert!(parse(&["--all"]).is_ok());
    assert!(parse(&["--all", "--client=10.0.0.1"]).is_err());
    assert!(parse(&["--client=10.0.0.1", "--service=a/b"]).is_ok());
    let (code, text) = run(&["conntrack", "flush", "--client=10.244.1.3"]);
    assert_eq!(code.unwrap(), ExitCode::SUCCESS);
    assert_eq!(text, "removed 2 flows (4 entries)\n");
    assert_eq!(
        json(&["conntrack", "flush", "--all", "--output=json"]),
        serde_json::json!({"flows": 3, "entries": 7})
    );
}

#[test]
fn status_exits_with_one_when_not_healthy() {
    let (code, text) = run(&["status", "--bpf-root=/alive"]);
    assert_eq!(code.unwrap(), ExitCode::SUCCESS);
    assert!(text.starts_with("healthy\n"), "{text}");
    let (code, text) = run(&["status", "--bpf-root=/none"]);
    assert_eq!(code.unwrap(), ExitCode::FAILURE);
    assert!(text.starts_with("not healthy: no agent has run here"), "{text}");
    let status = json(&["--bpf-root=/none", "status", "--output=json"]);
    assert_eq!((&status["healthy"], &status["agent"]), (&false.into(), &serde_json::Value::Null));
}

#[test]
fn a_listing_without_tables_says_what_to_do() {
    let error = run(&["service", "list", "--bpf-root=/none"]).0.unwrap_err();
    assert!(format!("{error:#}").contains("nothing is pinned under /none: start `proxy-agent run`"));
    let error = run(&["backend", "list", "--bpf-root=/broken"]).0.unwrap_err();
    assert_eq!(format!("{error:#}"), "opening the tables under /broken: permission denied");
}

#[test]
fn run_hands_over_a_checked_config() {
    let error = run(&["run", "--manifests=/x", "--hostname-override=Node-A", "-vv"]).0.unwrap_err();
    assert_eq!(error.to_string(), "ran as node-a");
    let error = run(&["run", "--manifests=/x", "--cluster-cidr=junk"]).0.unwrap_err();
    assert!(error.to_string().contains("--cluster-cidr \"junk\""), "{error}");
    let error = run(&["run", "--manifests=/x", "--bpf-root=relative"]).0.unwrap_err();
    assert!(error.to_string().contains("--bpf-root \"relative\": must be an absolute path"), "{error}");
}

#[test]
fn versions_are_told_by_every_command() {
    // F-8.
    for line in [&["--version"][..], &["run", "--version"]] {
        let said = Cli::try_parse_from([&["proxy-agent"], line].concat()).unwrap_err();
        assert_eq!(said.kind(), clap::error::ErrorKind::DisplayVersion);
        assert!(said.to_string().trim().ends_with(env!("CARGO_PKG_VERSION")), "{said}");
    }
}

#[test]
fn the_settings_are_written_to_a_file_that_says_the_same() {
    // F-6.
    let there = tempfile::tempdir().unwrap();
    let [first, second] = ["a", "b"].map(|name| there.path().join(name).display().to_string());
    let write = |flags: &[&str], to: &str| {
        let to = format!("--write-config-to={to}");
        let (code, out) = run(&[&["run", &to, "--hostname-override=n1"], flags].concat());
        assert_eq!((code.unwrap(), out.as_str()), (ExitCode::SUCCESS, ""));
    };
    write(
        &["--cluster-cidr=10.244.0.0/16", "--masquerade-all", "--conntrack-min=7", "--bind-address=::"],
        &first,
    );
    write(&[&format!("--config={first}")], &second);
    let [first, second] = [first, second].map(|path| std::fs::read_to_string(path).unwrap());
    assert_eq!(first, second);
    for line in ["clusterCIDR: 10.244.0.0/16", "masqueradeAll: true", "min: 7", "configSyncPeriod: 15m"] {
        assert!(first.contains(line), "no {line}:\n{first}");
    }
    assert!(first.contains("[::]:10256") && first.contains("[::1]:10249"), "{first}");
}

#[test]
fn kube_proxy_s_verbosity_is_understood() {
    let more = |v: &str| {
        let cli = Cli::try_parse_from(["proxy-agent", "run", &format!("--v={v}")]).unwrap();
        let Command::Run(args) = cli.command else { panic!("not run") };
        args.verbosity()
    };
    assert_eq!(["0", "2", "4", "5", "6", "9"].map(more), [0, 0, 1, 1, 2, 2]);
    assert_eq!(
        ["-v=2", "-vv", "--v=2", "-v"].map(|arg| verbosity(arg.into())),
        ["--v=2", "-vv", "--v=2", "-v"]
    );
}

/// What `run` understands of the arguments of a DaemonSet under `deploy/`.
fn arguments(file: &str) -> Box<RunArgs> {
    let text = std::fs::read_to_string(format!("{}/../deploy/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(&text).unwrap();
    let set = documents.iter().find(|document| document["kind"] == "DaemonSet").unwrap();
    let args = set["spec"]["template"]["spec"]["containers"][0]["args"].as_array().unwrap();
    let line: Vec<String> =
        args.iter().map(|arg| arg.as_str().unwrap().replace("$(NODE_NAME)", "Node1")).collect();
    let cli = Cli::try_parse_from(std::iter::once("proxy-agent".to_owned()).chain(line)).unwrap();
    let Command::Run(args) = cli.command else { panic!("not run") };
    assert_eq!(args.hostname_override.as_deref(), Some("Node1"));
    assert_eq!(args.cgroup_root.as_deref().and_then(Path::to_str), Some("/host/sys/fs/cgroup"));
    args
}

#[test]
fn the_daemonsets_arguments_are_understood() {
    // F-14.
    let args = arguments("daemonset.yaml");
    assert_eq!(args.kube_proxy.client_connection.kubeconfig, "/etc/ebpf-proxy/kubeconfig");
    assert_eq!(args.config, None);
    let args = arguments("kubeadm.yaml");
    assert_eq!(args.config.as_deref().and_then(Path::to_str), Some("/var/lib/kube-proxy/config.conf"));
}

#[test]
fn cleanup_fails_when_something_of_kube_proxy_is_left() {
    // Z-1.
    let (code, out) = run(&["cleanup", "--kube-proxy", "--bpf-root=/none"]);
    assert_eq!(out, "removed 1:\n  nftables table ip kube-proxy\n");
    let said = code.unwrap_err().to_string();
    assert!(said.contains("IP set KUBE-LOOP-BACK: busy"), "{said}");
    let (code, out) = run(&["cleanup", "--bpf-root=/none"]);
    assert_eq!((code.unwrap(), out.as_str()), (ExitCode::SUCCESS, "nothing to remove under /none\n"));
}
