//! Directories with edits, as an operator, an editor and a ConfigMap mount make them.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;

use super::*;
use agent_core::model::Node;

const PATIENCE: Duration = Duration::from_secs(20);
/// Instead of [`POLL`].
const QUICK: Duration = Duration::from_millis(100);

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n---\n"
    )
}

fn slice(name: &str, service: &str, ip: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}\n  \
         labels: {{kubernetes.io/service-name: {service}}}\nports: [{{port: 8080}}]\n\
         endpoints: [{{addresses: [{ip}]}}]\n---\n"
    )
}

fn endpoints(service: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Endpoints\nmetadata: {{name: {service}}}\n\
         subsets: [{{addresses: [{{ip: {ip}}}], ports: [{{port: 8080}}]}}]\n---\n"
    )
}

/// What a receiver knows after all changes.
#[derive(Debug, Default)]
struct Received {
    services: BTreeMap<String, String>,
    slices: BTreeMap<String, String>,
    node: Option<Node>,
    service_ranges: BTreeMap<String, Vec<String>>,
    warnings: BTreeMap<String, Vec<String>>,
    synced: Vec<Kind>,
    connected: bool,
    incomplete: bool,
    count: usize,
}

impl Received {
    fn take(&mut self, change: Change) {
        self.count += 1;
        match change {
            Change::Service(name, Some(service)) => {
                self.services.insert(name.to_string(), service.cluster_ips[0].to_string());
            }
            Change::Service(name, None) => assert!(self.services.remove(&name.to_string()).is_some()),
            Change::Slice(name, Some(slice)) => {
                self.slices.insert(name.to_string(), slice.endpoints[0].ip.to_string());
            }
            Change::Slice(name, None) => assert!(self.slices.remove(&name.to_string()).is_some()),
            Change::Node(node) => self.node = node,
            Change::ServiceRanges(name, Some(ranges)) => {
                self.service_ranges.insert(name, ranges.iter().map(ToString::to_string).collect());
            }
            Change::ServiceRanges(name, None) => assert!(self.service_ranges.remove(&name).is_some()),
            Change::Warnings { object, lines } if lines.is_empty() => {
                assert!(self.warnings.remove(&object).is_some());
            }
            Change::Warnings { object, lines } => {
                self.warnings.insert(object, lines);
            }
            Change::Synced(kind) => self.synced.push(kind),
            Change::Connected(connected) => self.connected = connected,
            Change::Whole(whole) => self.incomplete = !whole,
            Change::Links(_) | Change::Routes(_) => panic!("a directory has no links"),
            Change::Triggered(..) | Change::Repeated(_) | Change::Excluded(..) => {
                panic!("a directory only sends changes")
            }
        }
    }
}

/// A store over its own directory, without the watching.
struct Bench {
    dir: tempfile::TempDir,
    store: ManifestStore,
    received: Received,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = ManifestStore::new(dir.path().to_owned(), "n1".into());
        Self { dir, store, received: Received::default() }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }

    /// Reads the directory; how many changes that gave.
    fn look(&mut self) -> usize {
        let changes = self.store.refresh().unwrap();
        let count = changes.len();
        changes.into_iter().for_each(|change| self.received.take(change));
        count
    }
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn every_way_to_write_objects_is_read() {
    let mut bench = Bench::new();
    bench.write("a.yaml", &(service("one", "10.96.0.1") + &slice("one-x", "one", "10.0.0.1")));
    bench.write(
        "b.json",
        r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"two","namespace":"shop"},
            "spec":{"clusterIPs":["10.96.0.2","fd00::2"],"ports":[{"port":80}]}}"#,
    );
    bench.write(
        "c.yml",
        "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: three}\n  \
         spec: {clusterIP: 10.96.0.3, ports: [{port: 80}]}\n- apiVersion: v1\n  kind: Node\n  \
         metadata: {name: n1, labels: {topology.kubernetes.io/zone: a}}\n\
         - {apiVersion: v1, kind: Node, metadata: {name: n2}}\n",
    );
    bench.write(
        "d.json",
        r#"{"apiVersion":"v1","kind":"ServiceList","items":[{"metadata":{"name":"four"},
            "spec":{"clusterIP":"10.96.0.4","ports":[{"port":80}]}}]}"#,
    );
    bench.write("e.yaml", "# nothing but a comment\n---\n---\napiVersion: apps/v1\nkind: Deployment\n");
    bench.write("f.yaml", "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: five}\n");
    bench.write("g.txt", &service("six", "10.96.0.6"));
    bench.write(".h.yaml", &service("seven", "10.96.0.7"));
    fs::create_dir(bench.dir.path().join("i")).unwrap();
    bench.look();
    let expected = map(&[
        ("default/four", "10.96.0.4"),
        ("default/one", "10.96.0.1"),
        ("default/three", "10.96.0.3"),
        ("shop/two", "10.96.0.2"),
    ]);
    assert_eq!(bench.received.services, expected);
    assert_eq!(bench.received.slices, map(&[("default/one-x", "10.0.0.1")]));
    assert_eq!(bench.received.node.as_ref().unwrap().zone.as_deref(), Some("a"));
    assert_eq!(bench.received.warnings, BTreeMap::new());
    assert_eq!(bench.look(), 0, "nothing has changed");
}

#[test]
fn of_a_broken_file_the_previous_content_stays_and_the_line_is_named() {
    let mut bench = Bench::new();
    bench.write("web.yaml", &service("web", "10.96.0.1"));
    bench.write("other.yaml", &service("other", "10.96.0.2"));
    bench.look();
    let before = bench.received.services.clone();

    bench.write("web.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: [unclosed\n");
    bench.write("other.json", "{\n\"kind\": ");
    bench.look();
    assert_eq!(bench.received.services, before);
    assert!(bench.received.incomplete, "other.json was never understood");
    let places: Vec<&String> = bench.received.warnings.keys().collect();
    assert_eq!(places.len(), 2, "{:?}", bench.received.warnings);
    assert_eq!(places[0], "other.json:2");
    assert!(places[1].starts_with("web.yaml:"), "{places:?}");
    let ends = ["nothing in it is used until it can be read", "its previous content stays in use"];
    for (lines, end) in bench.received.warnings.values().zip(ends) {
        assert!(lines[0].ends_with(end), "{lines:?}");
    }

    bench.write("web.yaml", &service("web", "10.96.0.9"));
    fs::remove_file(bench.dir.path().join("other.json")).unwrap();
    bench.look();
    assert_eq!(bench.received.services["default/web"], "10.96.0.9");
    assert_eq!(bench.received.warnings, BTreeMap::new());
}

#[test]
fn an_object_that_cannot_be_read_does_not_stop_its_neighbours() {
    let mut bench = Bench::new();
    bench.write("all.yaml", &(service("bad", "10.96.0.1") + &service("good", "10.96.0.2")));
    bench.look();
    let bad = service("bad", "10.96.0.7").replace("port: 80", "port: http");
    bench.write("all.yaml", &("# one line\n".to_owned() + &bad + &service("good", "10.96.0.3")));
    bench.look();
    assert_eq!(bench.received.services, map(&[("default/bad", "10.96.0.1"), ("default/good", "10.96.0.3")]));
    let (place, lines) = bench.received.warnings.first_key_value().unwrap();
    assert_eq!(place, "all.yaml:2");
    assert!(lines[0].starts_with("Service default/bad cannot be read"), "{lines:?}");
    assert!(lines[0].ends_with("; its previous version stays in use"), "{lines:?}");

    bench.write("all.yaml", "just a text\n---\nkind: Service\napiVersion: v1\n");
    bench.look();
    assert_eq!(bench.received.services, BTreeMap::new());
    let lines: Vec<&str> = bench.received.warnings.values().map(|lines| lines[0].as_str()).collect();
    assert_eq!(lines, ["is not a Kubernetes object: it has no `kind`", "has no `metadata.name`"]);
}

#[test]
fn of_an_object_in_two_files_the_first_one_counts_until_it_goes() {
    let mut bench = Bench::new();
    bench.write("b.yaml", &service("web", "10.96.0.2"));
    bench.look();
    bench.write("a.yaml", &service("web", "10.96.0.1"));
    bench.look();
    assert_eq!(bench.received.services, map(&[("default/web", "10.96.0.1")]));
    let lines = &bench.received.warnings["Service default/web"];
    assert_eq!(*lines, ["in b.yaml is ignored: a.yaml comes first and has it, too"]);
    fs::remove_file(bench.dir.path().join("a.yaml")).unwrap();
    bench.look();
    assert_eq!(bench.received.services, map(&[("default/web", "10.96.0.2")]));
    assert_eq!(bench.received.warnings, BTreeMap::new());
}

#[test]
fn slices_replace_legacy_endpoints() {
    let mut bench = Bench::new();
    bench.write("e.yaml", &(endpoints("web", "10.0.0.1") + &endpoints("api", "10.0.0.2")));
    bench.look();
    let legacy = map(&[("default/api/endpoints-0", "10.0.0.2"), ("default/web/endpoints-0", "10.0.0.1")]);
    assert_eq!(bench.received.slices, legacy);
    bench.write("s.yaml", &slice("web-x", "web", "10.0.0.3"));
    bench.look();
    let both = map(&[("default/api/endpoints-0", "10.0.0.2"), ("default/web-x", "10.0.0.3")]);
    assert_eq!(bench.received.slices, both);
    fs::remove_file(bench.dir.path().join("s.yaml")).unwrap();
    bench.look();
    assert_eq!(bench.received.slices, legacy);
}

#[test]
fn warnings_name_the_file_and_the_part() {
    let mut bench = Bench::new();
    bench.write("web.yaml", &service("web", "10.96.0.1").replace("ports:", "externalIPs: [bad], ports:"));
    bench.look();
    let lines = &bench.received.warnings["Service default/web"];
    assert_eq!(*lines, ["in web.yaml: spec.externalIPs[0] \"bad\" is not an IP address: skipped"]);
}

#[test]
fn of_what_is_no_regular_file_any_more_the_previous_content_stays_and_nothing_blocks() {
    // Y-6.
    let mut bench = Bench::new();
    let at = bench.dir.path().join("a.yaml");
    let other = |bench: &Bench, n: u8| bench.write("b.yaml", &service("other", &format!("10.96.1.{n}")));
    type Make = fn(&Path);
    let kinds: [(&str, Make); 7] = [
        ("is a broken link", |at| symlink("nowhere", at).unwrap()),
        ("is a FIFO", |at| nix::unistd::mkfifo(at, nix::sys::stat::Mode::S_IRWXU).unwrap()),
        ("is a directory", |at| fs::create_dir(at).unwrap()),
        ("is a device", |at| symlink("/dev/zero", at).unwrap()),
        ("is a socket", |at| drop(std::os::unix::net::UnixListener::bind(at).unwrap())),
        ("is a pseudo-file", |at| symlink("/proc/kmsg", at).unwrap()),
        ("has 2147483648 bytes", |at| fs::File::create(at).unwrap().set_len(2 << 30).unwrap()),
    ];
    for (n, (warning, make)) in kinds.into_iter().enumerate() {
        bench.write("a.yaml", &service("web", "10.96.0.1"));
        bench.look();
        assert_eq!(bench.received.warnings, BTreeMap::new());
        fs::remove_file(&at).unwrap();
        make(&at);
        other(&bench, u8::try_from(n).unwrap() + 1);
        bench.look();
        let expected = format!("10.96.1.{}", n + 1);
        assert_eq!(
            bench.received.services,
            map(&[("default/other", &*expected), ("default/web", "10.96.0.1")]),
            "{warning}"
        );
        let [line] = &bench.received.warnings["a.yaml:1"][..] else {
            panic!("{:?}", bench.received.warnings)
        };
        assert!(line.starts_with(warning) && line.ends_with("; its previous content stays in use"), "{line}");
        assert!(bench.received.connected && !bench.received.incomplete);
        if fs::symlink_metadata(&at).unwrap().is_dir() {
            fs::remove_dir(&at).unwrap();
        } else {
            fs::remove_file(&at).unwrap();
        }
    }
    // What goes altogether takes its objects along.
    bench.look();
    assert_eq!(bench.received.services.keys().collect::<Vec<_>>(), ["default/other"]);
    // What was never read leaves in doubt what belongs to whom.
    symlink("nowhere", &at).unwrap();
    bench.look();
    assert!(bench.received.incomplete);
}

#[test]
fn of_files_over_the_total_limit_the_previous_content_stays() {
    let mut bench = Bench::new();
    for (name, ip) in [("a", "10.96.0.1"), ("b", "10.96.0.2"), ("c", "10.96.0.3")] {
        bench.write(&format!("{name}.yaml"), &service(name, ip));
    }
    bench.look();
    bench.store.total = 1000;
    bench.write("b.yaml", &(service("b", "10.96.0.9") + "#" + &" ".repeat(1000)));
    bench.write("c.yaml", &service("c", "10.96.0.4"));
    bench.look();
    let as_before =
        map(&[("default/a", "10.96.0.1"), ("default/b", "10.96.0.2"), ("default/c", "10.96.0.4")]);
    assert_eq!(bench.received.services, as_before);
    let line = &bench.received.warnings[&bench.dir.path().display().to_string()][0];
    assert!(line.contains("more than 1000 bytes") && line.contains("b.yaml and 0 files after it"), "{line}");
    bench.write("b.yaml", &service("b", "10.96.0.9"));
    bench.look();
    assert_eq!(bench.received.services["default/b"], "10.96.0.9");
    assert_eq!(bench.received.warnings, BTreeMap::new());
}

#[test]
fn aliases_that_stand_for_more_than_a_file_may_hold_are_refused() {
    let mut bench = Bench::new();
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for n in 1..10 {
        let items = vec![format!("*a{}", n - 1); 10].join(", ");
        bomb += &format!("a{n}: &a{n} [{items}]\n");
    }
    bench.write("bomb.yaml", &bomb);
    let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(1 << 16), ["*a"; 4096].join(", "));
    bench.write("long.yaml", &long);
    bench.write("web.yaml", &service("web", "10.96.0.1"));
    bench.look();
    assert_eq!(bench.received.services, map(&[("default/web", "10.96.0.1")]));
    let warned: Vec<&String> = bench.received.warnings.keys().collect();
    assert_eq!(warned.len(), 2, "{:?}", bench.received.warnings);
}

/// A running source and what it has sent so far.
struct Running {
    rx: mpsc::Receiver<Change>,
    received: Received,
}

impl Running {
    async fn start(path: &Path) -> Self {
        let (tx, rx) = mpsc::channel(64);
        tokio::spawn(run_polling(path.to_owned(), "n1".into(), tx, QUICK));
        let mut running = Self { rx, received: Received::default() };
        running.until("it has synced", |received| received.synced.len() == 3).await;
        running
    }

    async fn until(&mut self, what: &str, done: impl Fn(&Received) -> bool) {
        let waited = timeout(PATIENCE, async {
            while !done(&self.received) {
                self.received.take(self.rx.recv().await.unwrap());
            }
        });
        assert!(waited.await.is_ok(), "waited in vain until {what}: {:?}", self.received);
    }
}

#[tokio::test]
async fn edits_additions_and_removals_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("a.yaml"), service("web", "10.96.0.1")).unwrap();
    let mut running = Running::start(dir.path()).await;
    assert_eq!(running.received.services, map(&[("default/web", "10.96.0.1")]));
    assert!(running.received.connected);

    fs::write(path("a.yaml"), service("web", "10.96.0.2")).unwrap();
    running.until("an edit is noticed", |received| received.services["default/web"] == "10.96.0.2").await;

    fs::write(path("b.yaml"), service("api", "10.96.0.3")).unwrap();
    running.until("an addition is noticed", |received| received.services.contains_key("default/api")).await;

    // As editors do it: a new file takes the old one's place.
    fs::write(path("a.yaml.new"), service("web", "10.96.0.4")).unwrap();
    fs::rename(path("a.yaml.new"), path("a.yaml")).unwrap();
    running.until("a rename is noticed", |received| received.services["default/web"] == "10.96.0.4").await;

    fs::remove_file(path("b.yaml")).unwrap();
    running.until("a removal is noticed", |received| received.services.len() == 1).await;
    assert_eq!(running.received.warnings, BTreeMap::new());
    assert_eq!(running.received.synced, [Kind::Service, Kind::Slice, Kind::Node]);
}

#[tokio::test]
async fn a_config_map_mount_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("..2024_1")).unwrap();
    fs::write(path("..2024_1/web.yaml"), service("web", "10.96.0.1")).unwrap();
    symlink("..2024_1", path("..data")).unwrap();
    symlink("..data/web.yaml", path("web.yaml")).unwrap();
    let mut running = Running::start(dir.path()).await;
    assert_eq!(running.received.services, map(&[("default/web", "10.96.0.1")]));

    fs::create_dir(path("..2024_2")).unwrap();
    fs::write(path("..2024_2/web.yaml"), service("web", "10.96.0.2")).unwrap();
    symlink("..2024_2", path("..data_tmp")).unwrap();
    fs::rename(path("..data_tmp"), path("..data")).unwrap();
    running.until("the swap is noticed", |received| received.services["default/web"] == "10.96.0.2").await;
}

#[tokio::test]
async fn what_a_link_leads_to_is_read_when_it_comes() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let target = elsewhere.path().join("web.yaml");
    symlink(&target, dir.path().join("web.yaml")).unwrap();
    let mut running = Running::start(dir.path()).await;
    running.until("it warns", |received| received.warnings.contains_key("web.yaml:1")).await;
    fs::write(&target, service("web", "10.96.0.1")).unwrap();
    running
        .until("it is read", |received| received.services.len() == 1 && received.warnings.is_empty())
        .await;
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("missing");
    let (tx, _rx) = mpsc::channel(1);
    let error = run(path.clone(), "n1".into(), tx).await.unwrap_err();
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
}

#[tokio::test]
async fn a_directory_that_is_replaced_is_found_again_and_its_absence_takes_nothing_away() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("manifests");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("a.yaml"), service("web", "10.96.0.1")).unwrap();
    let mut running = Running::start(&path).await;
    fs::rename(&path, parent.path().join("gone")).unwrap();
    running.until("the loss is noticed", |received| !received.connected).await;
    assert_eq!(running.received.services, map(&[("default/web", "10.96.0.1")]));

    fs::create_dir(&path).unwrap();
    fs::write(path.join("a.yaml"), service("web", "10.96.0.2")).unwrap();
    running.until("the new one is noticed", |received| received.connected).await;
    running.until("it is read", |received| received.services["default/web"] == "10.96.0.2").await;
    assert_eq!(running.received.warnings, BTreeMap::new());
}

#[tokio::test]
async fn the_source_ends_when_its_receiver_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let (tx, mut rx) = mpsc::channel(64);
    let source = tokio::spawn(run(dir.path().to_owned(), "n1".into(), tx));
    let first = rx.recv().await;
    assert!(first.is_some());
    drop(rx);
    timeout(PATIENCE, source).await.unwrap().unwrap().unwrap();
}

#[test]
fn a_directory_that_could_not_be_listed_is_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = ManifestStore::new(directory.path().to_owned(), "n1".into());
    store.refresh().unwrap();
    assert!(!store.needs_retry());
    // Nothing has changed in it: no event will come.
    let changes = store.unreadable(&io::Error::from_raw_os_error(libc::ENFILE));
    assert!(changes.contains(&Change::Connected(false)) && store.needs_retry());
    let changes = store.refresh().unwrap();
    assert!(changes.contains(&Change::Connected(true)) && !store.needs_retry());
}
