//! Runs a program as a container runtime runs the container that it is told of: a root of its own with a few directories
//! of the machine in it, its volumes, its capabilities, and its system calls. Network and cgroup are those that it is started in.

mod seccomp;

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use caps::{CapSet, Capability, CapsHashSet};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{chdir, pivot_root};
use proxy_tests::container::{Container, ENTRYPOINT, Propagation};

/// What of the machine a program needs that is linked with libraries.
const LIBRARIES: [&str; 3] = ["/usr", "/lib", "/lib64"];
/// Read-only in a container that is not privileged.
const READ_ONLY: [&str; 5] = ["proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger"];
/// Hidden in such a container.
const MASKED: [&str; 4] = ["proc/kcore", "proc/keys", "proc/timer_list", "proc/latency_stats"];
/// Says that the second part is to be done: in the namespace of processes that the first one has made.
const INSIDE: &str = "--inside";

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [spec] => outside(spec),
        [inside, spec] if inside == INSIDE => {
            self::inside(&serde_json::from_str(spec)?).map(|never| match never {})
        }
        _ => anyhow::bail!("wanted: a container, as JSON"),
    }
}

/// A process cannot move to another namespace of processes, only its children.
fn outside(spec: &str) -> Result<ExitCode> {
    let container: Container = serde_json::from_str(spec).context("reading what container to run")?;
    let mut namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    namespaces.set(CloneFlags::CLONE_NEWPID, !container.host_pid);
    unshare(namespaces).context("making namespaces")?;
    let own = std::env::current_exe().context("finding this program")?;
    let status = Command::new(own).args([INSIDE, spec]).status().context("starting inside")?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(255)).unwrap_or(255)))
}

fn inside(container: &Container) -> Result<std::convert::Infallible> {
    prctl::set_pdeathsig(Signal::SIGKILL).context("dying with the runtime")?;
    make_root(container)?;
    if container.privileged {
        ensure!(caps::read(None, CapSet::Effective)?.len() > 30, "a privileged container needs root");
    } else {
        restrict(container)?;
    }
    Err(Command::new(ENTRYPOINT).args(&container.arguments).env_clear().exec())
        .with_context(|| format!("starting {ENTRYPOINT}"))
}

fn restrict(container: &Container) -> Result<()> {
    let wanted: CapsHashSet = container
        .capabilities
        .iter()
        .map(|name| format!("CAP_{name}").parse::<Capability>().with_context(|| format!("capability {name}")))
        .collect::<Result<_>>()?;
    if !container.no_new_privileges && container.default_seccomp {
        seccomp::apply(&wanted)?;
    }
    for cap in caps::runtime::thread_all_supported() {
        if !wanted.contains(&cap) {
            caps::drop(None, CapSet::Bounding, cap).with_context(|| format!("dropping {cap}"))?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &wanted).with_context(|| format!("setting {set:?}"))?;
    }
    if container.no_new_privileges {
        prctl::set_no_new_privs().context("no new privileges")?;
        if container.default_seccomp {
            seccomp::apply(&wanted)?;
        }
    }
    Ok(())
}

fn attach(from: &str, to: &Path, kind: Option<&str>, flags: MsFlags) -> Result<()> {
    mount(Some(from), to, kind, flags, None::<&str>)
        .with_context(|| format!("mounting {from} at {}", to.display()))
}

/// Binds something of the host, with what is mounted below.
fn bind(from: &Path, to: &Path, read_only: bool) -> Result<()> {
    if from.is_dir() { fs::create_dir_all(to) } else { fs::File::create(to).map(drop) }
        .with_context(|| format!("making {}", to.display()))?;
    attach(&from.to_string_lossy(), to, None, MsFlags::MS_BIND | MsFlags::MS_REC)?;
    if read_only { remount_read_only(to) } else { Ok(()) }
}

fn remount_read_only(at: &Path) -> Result<()> {
    attach("none", at, None, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY)
}

fn make_root(container: &Container) -> Result<()> {
    let root = &container.root;
    // What is mounted below comes from there, and must not go back.
    attach("none", Path::new("/"), None, MsFlags::MS_PRIVATE)?;
    attach("none", root, None, MsFlags::MS_PRIVATE)?;
    attach("tmpfs", root, Some("tmpfs"), MsFlags::empty())?;
    let inside = |path: &str| root.join(path.trim_start_matches('/'));
    for path in LIBRARIES.map(PathBuf::from).into_iter().filter(|path| path.exists()) {
        bind(&path, &inside(&path.to_string_lossy()), true)?;
        attach("none", &inside(&path.to_string_lossy()), None, MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
    }
    bind(&container.program, &inside(ENTRYPOINT), true)?;
    for directory in ["proc", "sys", "dev", "tmp", "old"] {
        fs::create_dir_all(inside(directory))?;
    }
    for device in ["null", "zero", "random", "urandom"] {
        bind(&Path::new("/dev").join(device), &inside("dev").join(device), false)?;
    }
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if container.host_pid {
        bind(Path::new("/proc"), &inside("proc"), false)?;
    } else {
        attach("proc", &inside("proc"), Some("proc"), safe)?;
    }
    attach("sysfs", &inside("sys"), Some("sysfs"), safe)?;
    for volume in &container.mounts {
        let to = inside(&volume.to.to_string_lossy());
        // Where it is to be mounted from is not to change what it is: it stays one of its peers only if both want that.
        bind(&volume.from, &to, volume.read_only)?;
        match volume.propagation {
            Propagation::Bidirectional => {}
            Propagation::HostToContainer => attach("none", &to, None, MsFlags::MS_SLAVE | MsFlags::MS_REC)?,
            Propagation::None => attach("none", &to, None, MsFlags::MS_PRIVATE | MsFlags::MS_REC)?,
        }
    }
    if !container.privileged {
        for path in READ_ONLY.map(&inside).into_iter().filter(|path| path.exists()) {
            attach(&path.to_string_lossy(), &path, None, MsFlags::MS_BIND)?;
            remount_read_only(&path)?;
        }
        for path in MASKED.map(&inside).into_iter().filter(|path| path.exists()) {
            attach("/dev/null", &path, None, MsFlags::MS_BIND)?;
        }
        remount_read_only(&inside("sys"))?;
    }
    pivot_root(root, &inside("old")).context("entering the root")?;
    chdir("/")?;
    // Or what is taken away here would go from the machine, too, where it is shared.
    attach("none", Path::new("/old"), None, MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
    umount2("/old", MntFlags::MNT_DETACH).context("leaving the machine's root")?;
    if container.read_only_root { remount_read_only(Path::new("/")) } else { Ok(()) }
}
