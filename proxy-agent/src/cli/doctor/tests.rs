//! Nodes made of files in a temporary directory.

use super::super::memory::{NOW, small_cluster};
use super::*;
use agent_kernel::datapath::store::pin::BpfRoot;

struct Fake {
    dir: tempfile::TempDir,
    leftovers: Vec<String>,
    trial: Trial,
    others: Others,
    direct: bool,
}

/// Everything loads, and nothing is lacking.
fn good_trial() -> Trial {
    Trial { outcome: Ok(12), fall_backs: vec![] }
}

impl Fake {
    /// A node that has everything.
    fn ready() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let fake =
            Self { dir, leftovers: vec![], trial: good_trial(), others: Others::default(), direct: false };
        for (path, text) in [
            ("proc/self/status", "Name:\tx\nCapEff:\t000001ffffffffff\n"),
            ("proc/sys/kernel/osrelease", "6.12.38+deb13-amd64\n"),
            ("sys/kernel/btf/vmlinux", ""),
            ("proc/sys/net/core/bpf_jit_enable", "1\n"),
            (
                "proc/self/mounts",
                "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\n",
            ),
            ("proc/filesystems", "nodev\tproc\nnodev\tbpf\n\text4\n"),
            ("proc/sys/net/ipv4/ip_forward", "1\n"),
            ("proc/sys/net/ipv6/conf/all/forwarding", "1\n"),
            ("proc/sys/net/ipv4/conf/all/rp_filter", "0\n"),
            ("proc/sys/net/ipv4/conf/eth0/rp_filter", "2\n"),
            ("proc/1/comm", "systemd\n"),
        ] {
            fake.put(path, text);
        }
        fake
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn remove(&self, path: &str) {
        std::fs::remove_file(self.dir.path().join(path)).unwrap();
    }

    fn report(&self, object: &[u8]) -> Report {
        let leftovers = || self.leftovers.clone();
        let bpf_root = Path::new(BpfRoot::DEFAULT);
        let trial = || self.trial.clone();
        let others = || self.others.clone();
        let node = Node {
            root: self.dir.path(),
            leftovers: &leftovers,
            trial: &trial,
            others: &others,
            direct: &|| self.direct,
            bpf_root,
        };
        let status = Status::read(&small_cluster(), "6.12.0", NOW).unwrap();
        examine(&node, object, Ok(&status))
    }

    /// The checks that are not well: name, verdict, what was found.
    fn unwell(&self) -> Vec<(&'static str, Verdict, String)> {
        let report = self.report(b"\x7fELF");
        let checks = report.checks.into_iter().filter(|check| check.verdict != Verdict::Ok);
        checks
            .map(|check| {
                assert!(check.remedy.is_some(), "{check:?} has no remedy");
                (check.name, check.verdict, check.found)
            })
            .collect()
    }
}

/// What is unwell on a node after `change`: name and verdict.
fn after(change: impl FnOnce(&mut Fake)) -> Vec<(&'static str, Verdict)> {
    let mut fake = Fake::ready();
    change(&mut fake);
    fake.unwell().into_iter().map(|(name, verdict, _)| (name, verdict)).collect()
}

use Verdict::{Fail, Warn};

#[test]
fn a_node_that_has_everything_is_ready() {
    let report = Fake::ready().report(b"\x7fELF");
    assert!(report.ready);
    super::super::memory::golden("doctor_ready", &text(&report));
}

#[test]
fn a_bare_node_is_told_what_it_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake { dir, leftovers: vec![], trial: good_trial(), others: Others::default(), direct: false };
    let report = fake.report(b"");
    assert!(!report.ready);
    super::super::memory::golden("doctor_bare", &text(&report));
}

#[test]
fn each_lack_has_its_verdict() {
    assert_eq!(after(|_| {}), []);
    assert_eq!(after(|f| f.put("proc/self/status", "CapEff:\t0000000000000000\n")), [("privileges", Fail)]);
    // CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN; then without CAP_PERFMON.
    assert_eq!(after(|f| f.put("proc/self/status", "CapEff:\t000000c000001000\n")), []);
    assert_eq!(after(|f| f.put("proc/self/status", "CapEff:\t0000008000001000\n")), [("privileges", Fail)]);
    // CAP_NET_RAW besides where a Service asks for what needs it.
    let direct = |caps: &'static str| {
        after(move |f| {
            f.direct = true;
            f.put("proc/self/status", caps);
        })
    };
    assert_eq!(direct("CapEff:\t000000c000003000\n"), []);
    assert_eq!(direct("CapEff:\t000000c000001000\n"), [("direct server return", Warn)]);
    assert_eq!(after(|f| f.put("proc/sys/kernel/osrelease", "5.4.0-26\n")), [("kernel", Fail)]);
    assert_eq!(after(|f| f.put("proc/sys/kernel/osrelease", "5.10.0\n")), []);
    assert_eq!(after(|f| f.remove("sys/kernel/btf/vmlinux")), [("BTF", Warn)]);
    assert_eq!(after(|f| f.put("proc/sys/net/core/bpf_jit_enable", "0\n")), [("JIT", Warn)]);
    assert_eq!(after(|f| f.remove("proc/sys/net/core/bpf_jit_enable")), []);
    assert_eq!(after(|f| f.put("sys/kernel/rcu_expedited/no-file", "")), [("attaching", Warn)]);
    assert_eq!(after(|f| f.put("proc/sys/net/ipv4/ip_forward", "0\n")), [("forwarding", Warn)]);
    assert_eq!(after(|f| f.remove("proc/sys/net/ipv6/conf/all/forwarding")), []);
    assert_eq!(after(|f| f.put("proc/sys/net/ipv4/conf/eth0/rp_filter", "1\n")), [("rp_filter", Warn)]);
    assert_eq!(after(|f| f.put("proc/sys/net/ipv4/conf/all/rp_filter", "1\n")), []);
}

#[test]
fn a_kernel_that_refuses_a_program_is_not_ready_and_says_why_where_and_what_to_do() {
    let mut fake = Fake::ready();
    fake.trial.outcome = Err("kernel 5.10.0 refused program x: R2 !read_ok (Permission denied)\n\
                              the verifier's log: /run/x\nwhat to do: use another"
        .to_owned());
    let found =
        "kernel 5.10.0 refused program x: R2 !read_ok (Permission denied)\nthe verifier's log: /run/x";
    assert_eq!(fake.unwell(), [("programs", Fail, found.to_owned())]);
    let remedy =
        fake.report(b"\x7fELF").checks.into_iter().find(|check| check.name == "programs").unwrap().remedy;
    assert_eq!(remedy.as_deref(), Some("use another"));
    assert_eq!(after(|f| f.trial.outcome = Err("no memory".to_owned())), [("programs", Fail)]);
    // What something else stands in for is told, and is no fault.
    assert_eq!(after(|f| f.trial.fall_backs = vec!["TCX links: clsact".to_owned()]), []);
}

#[test]
fn mounts_are_looked_at() {
    assert_eq!(after(|f| f.put("proc/self/mounts", "bpf /sys/fs/bpf bpf rw 0 0\n")), [("cgroup v2", Fail)]);
    let no_bpf = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
    assert_eq!(after(|f| f.put("proc/self/mounts", no_bpf)), []);
    assert_eq!(
        after(|f| {
            f.put("proc/self/mounts", no_bpf);
            f.put("proc/filesystems", "nodev\tproc\n");
        }),
        [("bpffs", Fail)]
    );
}

#[test]
fn locked_memory_matters_before_5_11() {
    let limited = "Max locked memory         65536                65536                bytes\n";
    let old = |caps: &'static str| {
        after(move |f| {
            f.put("proc/sys/kernel/osrelease", "5.10.0-30\n");
            f.put("proc/self/limits", limited);
            f.put("proc/self/status", caps);
        })
    };
    assert_eq!(old("CapEff:\t000001ffffffffff\n"), []);
    assert_eq!(old("CapEff:\t000000c000001000\n"), [("locked memory", Fail)]);
}

#[test]
fn others_who_translate_are_found() {
    assert_eq!(after(|f| f.put("proc/77/comm", "kube-proxy\n")), [("kube-proxy", Warn)]);
    let mut fake = Fake::ready();
    fake.leftovers = vec!["IP set KUBE-LOOP-BACK".to_owned(), "nftables table ip kube-proxy".to_owned()];
    assert_eq!(fake.unwell(), [("kube-proxy's rules", Warn, fake.leftovers.join("\n"))]);
    assert_eq!(
        after(|f| f.put("sys/fs/bpf/tc/globals/cilium_lb4_services_v2", "")),
        [("other eBPF proxies", Warn)]
    );
    assert_eq!(
        after(|f| {
            f.put("sys/fs/bpf/tc/globals/cali_v4_nat_fe3", "");
            f.put("proc/9/comm", "calico-node\n");
        }),
        [("other eBPF proxies", Fail)]
    );
}

#[test]
fn the_agents_health_counts_and_its_absence_warns() {
    let mut memory = small_cluster();
    memory.agent.interfaces_failed = 1;
    let ill = Status::read(&memory, "6.12.0", NOW).unwrap();
    assert_eq!(running(Ok(&ill)).verdict, Fail);
    assert_eq!(running(Ok(&Status::never_run(Path::new("/x"), ""))).verdict, Warn);
    assert_eq!(running(Err("permission denied".to_owned())).verdict, Fail);
}

#[test]
fn the_json_form_keeps_its_names() {
    let json = serde_json::to_value(Fake::ready().report(b"")).unwrap();
    assert_eq!(json["ready"], false);
    assert_eq!(
        json["checks"][0],
        serde_json::json!({
            "name": "BPF object", "verdict": "fail",
            "found": "this binary was built without the BPF programs",
            "remedy": "run `cargo xtask build-ebpf`, then build again",
        })
    );
}
