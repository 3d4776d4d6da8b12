//! What the kernel and its settings offer.

use super::{Check, Node, Trial};
use agent_kernel::datapath::attach::grace;

/// The oldest kernel the programs are made for.
const OLDEST: (u32, u32) = (5, 10);

const NET_ADMIN: u32 = 12;
const NET_RAW: u32 = 13;
const SYS_ADMIN: u32 = 21;
const SYS_RESOURCE: u32 = 24;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

pub(super) fn checks(node: &Node<'_>) -> Vec<Check> {
    let release = node.read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let version = version(&release);
    let caps = capabilities(node);
    vec![
        privileges(caps),
        kernel(&release, version),
        btf(node),
        jit(node),
        cgroup(node),
        bpffs(node),
        memlock(node, version, caps),
        forwarding(node),
        reverse_path(node),
        host_processes(),
        attaching(node),
        direct(node, caps),
    ]
}

/// Whether the kernel takes the programs: only trying tells.
pub(super) fn programs(trial: &Trial) -> [Check; 2] {
    const NAME: &str = "programs";
    let outcome = match &trial.outcome {
        Ok(count) => Check::ok(NAME, format!("{count} load")),
        Err(lines) => match lines.rsplit_once('\n') {
            Some((found, last)) => Check::fail(NAME, found, last.trim_start_matches("what to do: ")),
            None => Check::fail(NAME, lines, "run doctor as root, on the node itself"),
        },
    };
    let fall_backs = match trial.fall_backs.as_slice() {
        [] => "none: the kernel has everything".to_owned(),
        lines => lines.join("\n"),
    };
    [outcome, Check::ok("fall-backs", fall_backs)]
}

/// The first two numbers of a release such as `6.1.0-18-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The effective capabilities as bits (proc_pid_status(5)).
fn capabilities(node: &Node<'_>) -> u64 {
    let status = node.read("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

fn privileges(caps: u64) -> Check {
    const NAME: &str = "privileges";
    let has = |bit: u32| caps & (1 << bit) != 0;
    let bpf = has(SYS_ADMIN) || has(BPF) && has(PERFMON);
    // Mounting a bpffs and attaching to cgroups by path wants SYS_ADMIN, or a bpffs that is there already.
    match (bpf && has(NET_ADMIN), has(SYS_ADMIN)) {
        (true, true) => Check::ok(NAME, "CAP_SYS_ADMIN and CAP_NET_ADMIN"),
        (true, false) => Check::ok(NAME, "CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"),
        (false, _) => Check::fail(
            NAME,
            "programs cannot be loaded and attached",
            "run as root, or with CAP_NET_ADMIN and CAP_SYS_ADMIN (or CAP_BPF and CAP_PERFMON)",
        ),
    }
}

fn kernel(release: &str, version: Option<(u32, u32)>) -> Check {
    const NAME: &str = "kernel";
    match version {
        Some(version) if version >= OLDEST => Check::ok(NAME, release),
        _ => Check::fail(
            NAME,
            if release.is_empty() { "its release cannot be read" } else { release },
            format!("run Linux {}.{} or later", OLDEST.0, OLDEST.1),
        ),
    }
}

fn btf(node: &Node<'_>) -> Check {
    const NAME: &str = "BTF";
    match node.path("/sys/kernel/btf/vmlinux").exists() {
        true => Check::ok(NAME, "/sys/kernel/btf/vmlinux"),
        false => Check::warn(
            NAME,
            "the kernel does not describe its types",
            "use a kernel with CONFIG_DEBUG_INFO_BTF: on others the programs are not tested",
        ),
    }
}

fn jit(node: &Node<'_>) -> Check {
    const NAME: &str = "JIT";
    match node.read("/proc/sys/net/core/bpf_jit_enable").as_deref() {
        Some("0") => Check::warn(
            NAME,
            "off: programs are interpreted, several times slower",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Some(_) => Check::ok(NAME, "on"),
        // The file exists in the initial network namespace only.
        None => Check::ok(NAME, "not told here; kernels of distributions have it on"),
    }
}

fn attaching(node: &Node<'_>) -> Check {
    const NAME: &str = "attaching";
    match grace::slow(node.root) {
        None => Check::ok(NAME, "waits for no grace period of the kernel"),
        Some(why) => Check::warn(
            NAME,
            why,
            "mount /sys/kernel/rcu_expedited of the host there, writable, as deploy/daemonset-restricted.yaml does",
        ),
    }
}

/// Whether other nodes can be asked if they are reached by wrapped packets.
fn direct(node: &Node<'_>, caps: u64) -> Check {
    const NAME: &str = "direct server return";
    match ((node.direct)(), caps & (1 << NET_RAW) != 0) {
        (false, _) => Check::ok(NAME, "no Service asks for it"),
        (true, true) => Check::ok(NAME, "CAP_NET_RAW; `proxy-agent status` says which nodes are reached"),
        (true, false) => Check::warn(
            NAME,
            "other nodes cannot be asked whether they are reached: everything is masqueraded",
            "give CAP_NET_RAW, as deploy/daemonset-restricted.yaml does",
        ),
    }
}

fn cgroup(node: &Node<'_>) -> Check {
    const NAME: &str = "cgroup v2";
    match node.mounts().into_iter().find(|(_, kind)| kind == "cgroup2") {
        Some((at, _)) => Check::ok(NAME, format!("mounted at {at}")),
        None => Check::fail(
            NAME,
            "not mounted: sockets cannot be translated",
            "mount -t cgroup2 none /sys/fs/cgroup, or mount the host's into this container",
        ),
    }
}

fn bpffs(node: &Node<'_>) -> Check {
    const NAME: &str = "bpffs";
    let mounts = node.mounts();
    // The longest mount point above the root is the one it lies in; a later mount hides an earlier one.
    let above = mounts.iter().filter(|(at, _)| node.bpf_root.starts_with(at));
    let found = above.max_by_key(|(at, _)| at.len());
    let known = node.read("/proc/filesystems").unwrap_or_default();
    match found {
        Some((at, kind)) if kind == "bpf" => Check::ok(NAME, format!("mounted at {at}")),
        _ if known.lines().any(|line| line.split_whitespace().last() == Some("bpf")) => {
            Check::ok(NAME, format!("none at {} yet; the agent mounts one", node.bpf_root.display()))
        }
        _ => Check::fail(
            NAME,
            "the kernel has none: pins, and with them the data plane, would die with the agent",
            "use a kernel with CONFIG_BPF_SYSCALL",
        ),
    }
}

fn memlock(node: &Node<'_>, version: Option<(u32, u32)>, caps: u64) -> Check {
    const NAME: &str = "locked memory";
    // Since 5.11 maps are charged to the memory cgroup.
    if version.is_some_and(|version| version >= (5, 11)) {
        return Check::ok(NAME, "not limited on this kernel");
    }
    let limits = node.read("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    let soft = line.and_then(|line| line.split_whitespace().next()).unwrap_or("unknown");
    match (soft, caps & (1 << SYS_RESOURCE) != 0) {
        ("unlimited", _) => Check::ok(NAME, "unlimited"),
        (limit, true) => Check::ok(NAME, format!("{limit} bytes; the agent may raise it")),
        (limit, false) => Check::fail(
            NAME,
            format!("limited to {limit} bytes: tables cannot be made"),
            "give CAP_SYS_RESOURCE, or start with `ulimit -l unlimited`",
        ),
    }
}

/// A limit of every kernel: what the node itself sends passes no program that could translate it.
fn host_processes() -> Check {
    Check::ok(
        "host processes",
        "reach Services with TCP and UDP sockets; not with SCTP or raw ones, nor with --socket-lb=off",
    )
}

fn forwarding(node: &Node<'_>) -> Check {
    const NAME: &str = "forwarding";
    let on = |path| node.read(path).as_deref() == Some("1");
    let v4 = on("/proc/sys/net/ipv4/ip_forward");
    // No file: a kernel without IPv6, which forwards none either way.
    let v6_path = "/proc/sys/net/ipv6/conf/all/forwarding";
    let v6 = !node.path(v6_path).exists() || on(v6_path);
    match (v4, v6) {
        (true, true) => Check::ok(NAME, "on"),
        (true, false) => Check::warn(
            NAME,
            "off for IPv6: no IPv6 traffic from pods or to other nodes' endpoints",
            "the CNI turns it on where it uses IPv6: sysctl -w net.ipv6.conf.all.forwarding=1",
        ),
        (false, _) => Check::warn(
            NAME,
            "off: no traffic from pods or to other nodes' endpoints",
            "the CNI turns it on; by hand: sysctl -w net.ipv4.ip_forward=1",
        ),
    }
}

/// Strict reverse-path filtering drops packets whose way back is another one (RFC 3704; ip-sysctl.rst).
fn reverse_path(node: &Node<'_>) -> Check {
    const NAME: &str = "rp_filter";
    const DIR: &str = "/proc/sys/net/ipv4/conf";
    let value = |name: &str| -> u32 {
        node.read(&format!("{DIR}/{name}/rp_filter")).and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    let all = value("all");
    // The larger of `all` and the interface's own is used.
    let names = node.list(DIR).into_iter().filter(|name| !matches!(name.as_str(), "all" | "default" | "lo"));
    let strict: Vec<_> = names.filter(|name| value(name).max(all) == 1).collect();
    match strict.as_slice() {
        [] => Check::ok(NAME, "not strict"),
        [first, rest @ ..] => Check::warn(
            NAME,
            match rest.len() {
                0 => format!("strict on {first}: replies that come another way are dropped"),
                n => format!("strict on {first} and {n} more: replies that come another way are dropped"),
            },
            "if traffic enters and leaves by different interfaces: sysctl -w net.ipv4.conf.all.rp_filter=2",
        ),
    }
}
