//! Trouble on the node itself: clients that hold the agent's ports, few descriptors, a log that cannot be written, files
//! that are none, and an agent that is started again and again.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use proxy_tests::agent::Agent;
use proxy_tests::chaos::crowd::{Crowd, Manner};
use proxy_tests::manifests::{EndpointController, ManifestDir};
use proxy_tests::object::{Key, Kind, Object, Publish};
use proxy_tests::patience;
use proxy_tests::pod::Place;
use proxy_tests::probe::eventually;
use proxy_tests::require::agent_binary;
use proxy_tests::test_cluster::TestCluster;
use serde_json::Value;

use crate::common::{ip, manifests, vips, web};
use crate::health::http;
use crate::life::{FLAGS, SOON, answers, one_node, servers, service, status_until, warns, with_node_ports};
use proxy_tests::manifests::ServicePlan;

/// An agent that a shell has prepared.
fn start(cluster: &TestCluster, dir: &ManifestDir, before: &str, flags: &[&str]) -> Result<Agent> {
    let mut agent = Agent::prepare(&agent_binary()?, cluster, "node1", dir, flags)?;
    agent.before(before);
    agent.spawn()?;
    agent.wait_ready()?;
    Ok(agent)
}

/// What the agent's own page says of a figure.
fn figure(host: &Place, name: &str) -> Result<f64> {
    let (code, page) = http(host, "127.0.0.1:10249", "/metrics")?;
    ensure!(code == 200, "{code}: {page}");
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.parse().ok()).with_context(|| format!("no {name} in\n{page}"))
}

/// A change of endpoints and a new pod are served, and whoever asks how the agent is gets an answer: all of it soon.
fn is_at_work(
    cluster: &mut TestCluster,
    web: &mut EndpointController<'_>,
    agent: &Agent,
    (to, pod): (&str, &str),
) -> Result<()> {
    /// On a machine that is busy with other tests.
    const AT_ONCE: Duration = Duration::from_secs(4);
    let interfaces = |status: &Value| status["agent"]["interfaces"].as_u64();
    let before = interfaces(&agent.status_json()?);
    let begun = Instant::now();
    web.replace(&[cluster.place(to)])?;
    answers(cluster.place("a"), service(1)[0], to)?;
    ensure!(begun.elapsed() < AT_ONCE * patience(), "the endpoint changed only after {:?}", begun.elapsed());
    let begun = Instant::now();
    cluster.add_pod("node1", pod)?;
    // Left to its packets: they are translated at its interface.
    answers(cluster.place(pod), service(1)[0], to)?;
    ensure!(begun.elapsed() < AT_ONCE * patience(), "the pod was served only after {:?}", begun.elapsed());
    status_until(agent, "one more interface", |status| interfaces(status) == before.map(|n| n + 1))?;
    let (host, outside) = (cluster.place("node1"), cluster.place("outside"));
    for (from, at, path) in [
        (outside, format!("{}:10256", host.v4), "/healthz"),
        (host, "127.0.0.1:10249".to_owned(), "/healthz"),
        (host, "127.0.0.1:10249".to_owned(), "/metrics"),
        (outside, format!("{}:30999", host.v4), "/"),
    ] {
        let begun = Instant::now();
        let (code, page) = http(from, &at, path)?;
        ensure!(code == 200, "{at}{path}: {code}: {page}");
        ensure!(
            begun.elapsed() < AT_ONCE * patience(),
            "{at}{path} answered only after {:?}",
            begun.elapsed()
        );
    }
    Ok(())
}

fn crowds_are_borne(descriptors: u64) -> Result<()> {
    let (mut cluster, dir) = (one_node(&["a", "b", "c"])?, manifests()?);
    let _servers = servers(&cluster, &["b", "c"])?;
    let with_check = |plan: ServicePlan| {
        plan.port("tcp", "TCP", 80, 8080).load_balancer(&[ip("203.0.113.7")]).external_local(Some(30_999))
    };
    let mut web = web(&dir, &cluster, "web", 1, &["b"], |_| with_check(ServicePlan::new("web", &vips(1))))?;
    let limits = format!("ulimit -Sn 128; ulimit -Hn {descriptors}");
    let agent = start(&cluster, &dir, &limits, &[&FLAGS[..], &["--socket-lb=host"]].concat())?;
    is_at_work(&mut cluster, &mut web, &agent, ("c", "p1"))?;
    let host = cluster.place("node1").clone();
    ensure!(figure(&host, "process_max_fds")? == descriptors as f64);
    let resident = figure(&host, "process_resident_memory_bytes")?;
    let open = figure(&host, "process_open_fds")?;

    let outside = cluster.place("outside").clone();
    let health = std::net::SocketAddr::new(host.v4.into(), 10256);
    let metrics = "127.0.0.1:10249".parse()?;
    let check = std::net::SocketAddr::new(host.v4.into(), 30999);
    let crowds = [
        Crowd::gather(&outside, health, 1000, Manner::Idle)?,
        Crowd::gather(&outside, health, 300, Manner::Slow)?,
        Crowd::gather(&outside, check, 300, Manner::Insistent)?,
        Crowd::gather(&host, metrics, 300, Manner::Deaf)?,
    ];
    is_at_work(&mut cluster, &mut web, &agent, ("b", "p2"))?;
    is_at_work(&mut cluster, &mut web, &agent, ("c", "p3"))?;
    let most = descriptors as f64;
    let (now, displaced) = (
        figure(&host, "process_open_fds")?,
        figure(&host, "proxy_agent_http_connections_closed_total{why=\"displaced\"}")?,
    );
    ensure!(now < most * 0.75, "{now} of {most} descriptors are open");
    ensure!(displaced > 500.0, "only {displaced} were sent away");
    let grown = figure(&host, "process_resident_memory_bytes")? - resident;
    ensure!(grown < 64e6, "{grown} bytes more memory");
    eventually(SOON, || {
        ensure!(crowds.iter().all(|crowd| crowd.closed() > 0), "{crowds:?}");
        Ok(())
    })?;
    drop(crowds);
    is_at_work(&mut cluster, &mut web, &agent, ("b", "p4"))?;
    eventually(SOON, || {
        let now = figure(&host, "process_open_fds")?;
        // Three pods have come.
        ensure!(now <= open + 16.0, "{now} descriptors are open, {open} were before");
        Ok(())
    })?;
    ensure!(!agent.log_text().contains("Too many open files"), "{}", agent.log_text());
    Ok(())
}

#[test]
fn a_thousand_idle_clients_delay_nothing_with_1024_descriptors() -> Result<()> {
    crowds_are_borne(1024)
}

#[test]
fn a_thousand_idle_clients_delay_nothing_with_256_descriptors() -> Result<()> {
    crowds_are_borne(256)
}

/// What stderr is led to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stderr {
    FullDisk,
    FileLimit,
    ClosedPipe,
    UnreadPipe,
}

#[test]
fn a_log_that_cannot_be_written_neither_ends_nor_delays_the_agent() -> Result<()> {
    for stderr in [Stderr::FullDisk, Stderr::FileLimit, Stderr::ClosedPipe, Stderr::UnreadPipe] {
        logs_to(stderr).with_context(|| format!("{stderr:?}"))?;
    }
    Ok(())
}

fn logs_to(stderr: Stderr) -> Result<()> {
    let (mut cluster, dir) = (one_node(&["a", "b", "c"])?, manifests()?);
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    let elsewhere = tempfile::tempdir()?;
    let file = elsewhere.path().join("log");
    mkfifo(&elsewhere.path().join("pipe"), Mode::S_IRWXU)?;
    // Both ends: who opens it for writing need not wait for a reader.
    let pipe = OpenOptions::new().read(true).write(true).open(elsewhere.path().join("pipe"))?;
    let to = match stderr {
        Stderr::FullDisk => "exec 2>/dev/full".to_owned(),
        Stderr::FileLimit => format!("ulimit -f 1; exec 2>{}", file.display()),
        Stderr::ClosedPipe | Stderr::UnreadPipe => format!("exec 2>{}/pipe", elsewhere.path().display()),
    };
    let mut agent = start(&cluster, &dir, &to, &FLAGS)?;
    let pipe = (stderr == Stderr::UnreadPipe).then_some(pipe);
    let host = cluster.place("node1").clone();
    let mut lost = 0.0;
    for n in 0.. {
        let to = if n % 2 == 0 { "c" } else { "b" };
        // Each of them is worth a line, and so many fill what waits soon.
        let bad = |i| {
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: bad-{n}-{i}}}\nspec: {{ports: x}}\n---\n"
            )
        };
        dir.write("bad.yaml", &(0..500).map(bad).collect::<String>())?;
        web.replace(&[cluster.place(to)])?;
        answers(cluster.place("a"), service(1)[0], to)?;
        let before = std::mem::replace(&mut lost, figure(&host, "proxy_agent_log_lines_lost_total")?);
        if lost > before && before > 0.0 {
            break;
        }
        ensure!(n < 50, "{lost} lines are lost");
    }
    cluster.add_pod("node1", "d")?;
    web.replace(&[cluster.place("c")])?;
    answers(cluster.place("d"), service(1)[0], "c")?;
    warns(&agent, &["the log: ", "lines were lost"], true)?;
    ensure!(http(&host, "127.0.0.1:10256", "/healthz")?.0 == 200);
    if let Some(pipe) = pipe {
        said_when_read(pipe)?;
    }
    let begun = Instant::now();
    let status = agent.stop()?;
    ensure!(status.success(), "{status}");
    ensure!(
        begun.elapsed() < Duration::from_secs(10) * patience(),
        "it ended only after {:?}",
        begun.elapsed()
    );
    Ok(())
}

/// Reads what has waited, until it says how much did not.
fn said_when_read(mut pipe: File) -> Result<()> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut chunk = [0; 65536];
        // The end that is held here keeps the pipe open: it goes with the test.
        while let Ok(n) = pipe.read(&mut chunk) {
            if sender.send(chunk[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    let mut text = Vec::new();
    loop {
        text.extend(receiver.recv_timeout(SOON).context("nothing is said of lost lines")?);
        if String::from_utf8_lossy(&text).contains("lines of the log were lost") {
            return Ok(());
        }
    }
}

#[test]
fn a_command_whose_output_nobody_reads_ends_quietly() -> Result<()> {
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    let agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    for arguments in [&["status"][..], &["service", "list"], &["backend", "list", "--output", "json"]] {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let mut command = Command::new(agent_binary()?);
        command.args(arguments).arg("--bpf-root").arg(agent.bpf_root()).stdin(Stdio::null());
        command.stdout(writer).stderr(Stdio::piped());
        let output = cluster.place("node1").spawn(command)?.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && said.is_empty(), "{arguments:?}: {}: {said}", output.status);
    }
    Ok(())
}

#[test]
fn a_manifest_that_is_no_file_any_more_is_reported_and_keeps_what_it_said() -> Result<()> {
    // Y-6.
    let (cluster, dir) = (one_node(&["a", "b", "c"])?, manifests()?);
    let _servers = servers(&cluster, &["b", "c"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    let mut other = web(&dir, &cluster, "other", 2, &["b"], |plan| plan)?;
    let mut agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let (pod, host) = (cluster.place("a"), cluster.place("node1").clone());
    let key = Key { kind: Kind::Service, namespace: "default".into(), name: "web".into() };
    let file = dir.path().join(ManifestDir::file_name(&key));
    let resident = figure(&host, "process_resident_memory_bytes")?;
    type Make = fn(&Path) -> Result<()>;
    let kinds: [(&str, Make); 5] = [
        ("is a FIFO", |at| Ok(mkfifo(at, Mode::S_IRWXU)?)),
        ("is a pseudo-file", |at| Ok(symlink("/proc/kmsg", at)?)),
        ("is a broken link", |at| Ok(symlink("/nowhere", at)?)),
        ("is a directory", |at| Ok(std::fs::create_dir(at)?)),
        ("has 2147483648 bytes", |at| Ok(File::create(at)?.set_len(2 << 30)?)),
    ];
    for (n, (said, make)) in kinds.into_iter().enumerate() {
        std::fs::remove_file(&file)?;
        make(&file)?;
        warns(&agent, &["service-default-web.yaml:1", said, "stays in use"], true)?;
        let to = ["c", "b"][n % 2];
        other.replace(&[cluster.place(to)])?;
        answers(pod, service(2)[0], to)?;
        answers(pod, service(1)[0], "b")?;
        ensure!(http(&host, "127.0.0.1:10256", "/healthz")?.0 == 200);
        eventually(SOON, || {
            let warnings = figure(&host, "proxy_agent_warnings")?;
            ensure!(warnings == 1.0, "{warnings} warnings");
            Ok(())
        })?;
        if n == 0 {
            // An agent that has never read it takes nothing away.
            agent.kill()?;
            agent.spawn()?;
            agent.wait_ready()?;
            warns(&agent, &["service-default-web.yaml:1", said], true)?;
            answers(pod, service(1)[0], "b")?;
        }
        if file.is_dir() && !file.is_symlink() {
            std::fs::remove_dir(&file)?;
        } else {
            std::fs::remove_file(&file)?;
        }
        dir.publish(&Object::from(&with_node_ports("web", 1, 30080).build()))?;
        warns(&agent, &["service-default-web.yaml"], false)?;
        answers(cluster.place("outside"), host.at(30080)[0], "b")?;
    }
    let grown = figure(&host, "process_resident_memory_bytes")? - resident;
    ensure!(grown < 64e6, "{grown} bytes more memory");
    Ok(())
}

/// How many entries of these tables are in use.
fn used(agent: &Agent) -> Result<Vec<(String, u64)>> {
    let status = agent.status_json()?;
    let tables = status["tables"].as_array().context("status has no tables")?;
    let of = |table: &Value| Some((table["name"].as_str()?.to_owned(), table["used"].as_u64()?));
    let by_agent =
        ["FRONTENDS", "SLOTS", "BACKENDS", "ADDRESSES", "SOURCES", "IFACES", "MASQUERADE", "SERVICES"];
    Ok(tables.iter().filter_map(of).filter(|(name, _)| by_agent.contains(&name.as_str())).collect())
}

#[test]
fn an_agent_that_is_started_again_and_again_runs_out_of_nothing_and_uses_no_more() -> Result<()> {
    // Room for what there is and for what replaces it, and for little more.
    let flags = [
        "--cluster-cidr=10.244.0.0/16,fd00:244::/32",
        "--max-slots=24",
        "--max-backends=24",
        "--max-services=16",
        "--max-frontends=16",
        "--max-addresses=32",
        "--max-flows=16384",
    ];
    let (cluster, dir) = (one_node(&["a", "b", "c"])?, manifests()?);
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut web = web(&dir, &cluster, "web", 1, &["b", "c"], |plan| plan)?;
    let mut agent = Agent::start(&cluster, "node1", &dir, &flags)?;
    web.replace(&[cluster.place("b")])?;
    answers(cluster.place("a"), service(1)[0], "b")?;
    // What the change replaced is gone a moment after the change is in force.
    let mut first = Vec::new();
    eventually(SOON, || {
        first = used(&agent)?;
        let one_set = first.contains(&("SLOTS".into(), 4)) && first.contains(&("BACKENDS".into(), 4));
        ensure!(one_set, "{first:?}");
        Ok(())
    })?;
    let mut name = String::new();
    for n in 0..30 {
        agent.kill()?;
        let to = ["c", "b"][n % 2];
        web.replace(&[cluster.place(to)])?;
        // And another Service each time.
        let gone = std::mem::replace(&mut name, format!("extra{n}"));
        if !gone.is_empty() {
            dir.retract(&Key { kind: Kind::Service, namespace: "default".into(), name: gone })?;
        }
        dir.publish(&Object::from(&ServicePlan::new(&name, &vips(9)).port("tcp", "TCP", 80, 8080).build()))?;
        agent.spawn()?;
        agent.wait_ready()?;
        answers(cluster.place("a"), service(1)[0], to)?;
        let status = agent.status_json()?;
        let warnings = status["object_warnings"].to_string();
        ensure!(!warnings.contains("is full"), "start {n}: {warnings}");
    }
    dir.retract(&Key { kind: Kind::Service, namespace: "default".into(), name })?;
    eventually(SOON, || {
        let last = used(&agent)?;
        ensure!(last == first, "{last:?}, at first {first:?}");
        Ok(())
    })
}

#[test]
fn clients_that_are_remembered_no_more_do_not_count() -> Result<()> {
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan.affinity(3))?;
    let agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    answers(cluster.place("a"), service(1)[0], "b")?;
    let remembered = |wanted: u64| {
        let of = |status: &Value| {
            let tables = status["tables"].as_array()?;
            tables.iter().find(|table| table["name"] == "AFFINITY")?["used"].as_u64()
        };
        status_until(&agent, &format!("{wanted} clients"), |status| of(status) == Some(wanted)).map(drop)
    };
    remembered(1)?;
    remembered(0)
}
