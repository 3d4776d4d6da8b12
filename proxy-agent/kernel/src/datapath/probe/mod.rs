//! What this kernel can do, found out by asking it: versions lie where distributions backport.

pub mod netns;

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya_obj::generated::{bpf_attach_type, bpf_prog_type};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use proxy_common::abi::{absent, feature};

use crate::sys;
use crate::sys::instruction::{
    BYTE, DOUBLE, EXIT, Register, call, helper, load as load_from, set, skip_if_null,
};

/// `BPF_F_PSEUDO_HDR | BPF_F_IPV6`.
const PSEUDO_HEADER_IPV6: u32 = 1 << 4 | 1 << 7;
/// `BPF_F_XDP_HAS_FRAGS`.
const IN_PIECES: u32 = 1 << 5;
/// No interface has this index.
const NO_INTERFACE: u32 = i32::MAX as u32;

/// One thing a kernel has or lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    pub name: &'static str,
    /// Its bit in [`AgentState::absent`](proxy_common::abi::AgentState::absent); 0 where there is no fall-back.
    pub bit: u32,
    /// Whether it is there.
    pub present: bool,
    /// What it means when it is not.
    pub when_absent: &'static str,
    /// Whether the agent cannot run without it.
    pub required: bool,
}

/// What this kernel can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    /// Programs of the kinds we need can be loaded at all.
    pub bpf: bool,
    /// Programs are compiled to machine code.
    pub jit: bool,
    /// The kernel describes its types.
    pub btf: bool,
    /// TC links (6.6).
    pub tcx: bool,
    /// The cheap clock (5.11).
    pub coarse_clock: bool,
    /// A socket hook can choose the error (5.18).
    pub set_retval: bool,
    /// Hardware checksums of IPv6 stay true when an address is rewritten (6.16).
    pub csum_ipv6: bool,
    /// Socket hooks can tell the host's network namespace from a pod's (5.8).
    pub netns_cookie: bool,
    /// Socket hooks find the MPTCP socket that a subflow belongs to (5.19).
    pub mptcp_socket: bool,
    /// TC programs can ask for the cookie, too.
    pub netns_cookie_tc: bool,
    /// Programs at drivers may have packets in several pieces (5.18).
    pub xdp_frags: bool,
    /// We know the cookie of our own network namespace, which is the host's.
    pub host_netns: bool,
    /// Where cgroup v2 is mounted.
    pub cgroup2: Option<PathBuf>,
}

impl Features {
    /// Asks the kernel.
    #[must_use]
    pub fn probe() -> Self {
        raise_memlock();
        let tc = |body: &[u64]| load(bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS, None, body);
        let sock = |body: &[u64]| {
            let hook = bpf_attach_type::BPF_CGROUP_INET4_CONNECT;
            load(bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR, Some(hook), body)
        };
        let empty = tc(&[set(Register::RESULT, 0), EXIT]);
        Self {
            bpf: empty.is_ok() && sock(&[set(Register::RESULT, 1), EXIT]).is_ok(),
            jit: empty.as_ref().is_ok_and(|fd| sys::program_facts(fd.as_fd()).is_ok_and(|p| p.jited > 0)),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            tcx: empty.as_ref().is_ok_and(has_tcx),
            coarse_clock: tc(&[call(helper::KTIME_GET_COARSE_NS), set(Register::RESULT, 0), EXIT]).is_ok(),
            set_retval: sock(&[
                set(Register::ARGUMENTS[0], 0),
                call(helper::SET_RETVAL),
                set(Register::RESULT, 1),
                EXIT,
            ])
            .is_ok(),
            csum_ipv6: has_csum_ipv6(),
            netns_cookie: sock(&[call(helper::GET_NETNS_COOKIE), set(Register::RESULT, 1), EXIT]).is_ok(),
            mptcp_socket: sock(&MPTCP_STATE).is_ok(),
            netns_cookie_tc: tc(&[call(helper::GET_NETNS_COOKIE), set(Register::RESULT, 0), EXIT]).is_ok(),
            xdp_frags: has_xdp_frags(),
            host_netns: netns::cookie().is_some(),
            cgroup2: cgroup2_mount(),
        }
    }

    /// The bits that the programs are loaded with: those of [`feature`].
    #[must_use]
    pub fn bits(&self) -> u32 {
        let bit = |present, bit| if present { bit } else { 0 };
        bit(self.coarse_clock, feature::COARSE_CLOCK)
            | bit(self.set_retval, feature::SET_RETVAL)
            | bit(self.csum_ipv6, feature::CSUM_IPV6)
            | bit(self.netns_cookie, feature::NETNS_COOKIE)
            | bit(self.mptcp_socket, feature::MPTCP_SOCKET)
            // Both came with the same kernels, near enough.
            | bit(self.tcx, feature::WRAP)
    }

    /// Every feature for a person.
    #[must_use]
    pub fn list(&self) -> Vec<Feature> {
        let feature =
            |name, bit, present, when_absent| Feature { name, bit, present, when_absent, required: bit == 0 };
        vec![
            feature(
                "BPF programs (TC, cgroup sockets)",
                0,
                self.bpf,
                "nothing can be translated: run as root on a kernel with CONFIG_BPF_SYSCALL, \
                 CONFIG_NET_CLS_BPF and CONFIG_CGROUP_BPF",
            ),
            feature(
                "cgroup v2",
                0,
                self.cgroup2.is_some(),
                "sockets cannot be translated: mount -t cgroup2 none /sys/fs/cgroup/unified, or start with \
                 --socket-lb=off",
            ),
            feature(
                "JIT compiler",
                absent::JIT,
                self.jit,
                "programs are interpreted and many times slower: sysctl -w net.core.bpf_jit_enable=1",
            ),
            feature(
                "kernel BTF",
                absent::BTF,
                self.btf,
                "tools such as bpftool show tables as bare bytes; translation is not affected",
            ),
            feature(
                "TCX links",
                absent::TCX,
                self.tcx,
                "interfaces carry clsact filters instead (kernels before 6.6)",
            ),
            feature(
                "coarse clock",
                absent::COARSE_CLOCK,
                self.coarse_clock,
                "the precise clock is used: 30 ns more a packet (kernels before 5.11)",
            ),
            feature(
                "socket hook errors",
                absent::SET_RETVAL,
                self.set_retval,
                "a refused connect fails with EPERM and not ECONNREFUSED (kernels before 5.18)",
            ),
            feature(
                "IPv6 hardware checksums",
                absent::CSUM_IPV6,
                self.csum_ipv6,
                "received IPv6 packets lose their hardware checksum when translated (kernels before 6.16)",
            ),
            feature(
                "network namespace cookies",
                absent::NETNS_COOKIE,
                self.netns_cookie,
                "sockets of the host and of pods cannot be told apart, all count as the host's: start with \
                 --socket-lb=off where pods have rules of their own (kernels before 5.8)",
            ),
            feature(
                "the host's namespace cookie",
                absent::HOST_NETNS,
                self.host_netns,
                "sockets of the host and of pods cannot be told apart, all count as the host's: mount cgroup v2, \
                 or start with --socket-lb=off where pods have rules of their own",
            ),
            feature(
                "MPTCP sockets",
                absent::MPTCP_SOCKET,
                self.mptcp_socket,
                "getpeername of an MPTCP socket shows the pod and not the Service (kernels before 5.19)",
            ),
            feature(
                "direct server return",
                absent::WRAP,
                self.tcx,
                "what comes from outside is masqueraded, whatever Services ask for (kernels before 6.6)",
            ),
        ]
    }

    /// What the agent does without, as bits of `AgentState::absent`.
    #[must_use]
    pub fn absent(&self) -> u32 {
        self.list().iter().filter(|feature| !feature.present).fold(0, |bits, feature| bits | feature.bit)
    }

    /// Nothing at all.
    const NONE: Self = Self {
        bpf: false,
        jit: false,
        btf: false,
        tcx: false,
        coarse_clock: false,
        set_retval: false,
        csum_ipv6: false,
        netns_cookie: false,
        mptcp_socket: false,
        netns_cookie_tc: false,
        xdp_frags: false,
        host_netns: false,
        cgroup2: None,
    };
}

/// The features behind the bits of `AgentState::absent`, in the words of [`Features::list`].
#[must_use]
pub fn fall_backs(absent: u32) -> Vec<Feature> {
    Features::NONE.list().into_iter().filter(|feature| feature.bit & absent != 0).collect()
}

/// Lifts the limit on locked memory, which maps count against before 5.11. A refusal (no CAP_SYS_RESOURCE)
/// matters only there, and then the maps say so themselves.
pub(crate) fn raise_memlock() {
    if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        tracing::debug!("RLIMIT_MEMLOCK stays as it is: {error}");
    }
}

/// Where cgroup v2 is mounted (the first place, when there are several).
#[must_use]
pub fn cgroup2_mount() -> Option<PathBuf> {
    cgroup2_in(&fs::read_to_string("/proc/self/mounts").ok()?)
}

fn cgroup2_in(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
        // proc(5): space, tab, newline and backslash are octal escapes.
        let point = point.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\");
        (kind == "cgroup2").then(|| PathBuf::from(point))
    })
}

/// What a socket hook does to find an MPTCP socket and read its state.
const MPTCP_STATE: [u64; 6] = [
    load_from(DOUBLE, Register::ARGUMENTS[0], Register::ARGUMENTS[0], 64),
    call(helper::SKC_TO_MPTCP_SOCK),
    skip_if_null(Register::RESULT, 1),
    load_from(BYTE, Register::RESULT, Register::RESULT, 18),
    set(Register::RESULT, 1),
    EXIT,
];

fn has_xdp_frags() -> bool {
    let body = [set(Register::RESULT, 2), EXIT];
    insist(|| sys::program_load(bpf_prog_type::BPF_PROG_TYPE_XDP, None, IN_PIECES, &body)).is_ok()
}

fn load(kind: bpf_prog_type, hook: Option<bpf_attach_type>, body: &[u64]) -> io::Result<OwnedFd> {
    insist(|| sys::program_load(kind, hook, 0, body))
}

/// How often a kernel is asked that has no room for a question at the moment.
const TRIES: u32 = 10;
/// From one try to the next.
const PAUSE: Duration = Duration::from_millis(10);

/// Asks again where the answer says nothing about the kernel. To be taken for an older one would change what programs do:
/// without its network namespace's cookie, a client of the node would be another one.
fn insist<T>(ask: impl Fn() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..TRIES {
        match ask().map_err(|error| (error.raw_os_error(), error)) {
            Err((
                Some(libc::ENOMEM | libc::EAGAIN | libc::EINTR | libc::ENFILE | libc::EMFILE | libc::ENOBUFS),
                _,
            )) => {
                std::thread::sleep(PAUSE);
            }
            answer => return answer.map_err(|(_, error)| error),
        }
    }
    ask()
}

/// A kernel with TCX looks for the interface and does not find it; an older one does not know the hook.
fn has_tcx(program: &OwnedFd) -> bool {
    matches!(
        insist(|| sys::link_tcx(program.as_fd(), NO_INTERFACE, false)),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV)
    )
}

/// The flag is checked before the packet is touched: the helper answers 0 or `EINVAL`. The difference that
/// is added to the checksum is zero.
fn has_csum_ipv6() -> bool {
    let body = [
        set(Register::ARGUMENTS[1], 34),
        set(Register::ARGUMENTS[2], 0),
        set(Register::ARGUMENTS[3], 0),
        set(Register::ARGUMENTS[4], PSEUDO_HEADER_IPV6),
        call(helper::L4_CSUM_REPLACE),
        EXIT,
    ];
    load(bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS, None, &body)
        .and_then(|program| insist(|| sys::program_run(program.as_fd(), &[0; 64])))
        .is_ok_and(|answer| answer == 0)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn an_answer_that_says_nothing_of_the_kernel_is_no_answer() {
        let asked = Cell::new(0);
        let ask = |answers: &'static [i32]| {
            asked.set(0);
            insist(|| {
                let n = asked.replace(asked.get() + 1);
                match answers.get(n).copied().unwrap_or(0) {
                    0 => Ok(()),
                    error => Err(io::Error::from_raw_os_error(error)),
                }
            })
        };
        ask(&[libc::ENOMEM, libc::EAGAIN]).unwrap();
        assert_eq!(asked.get(), 3);
        let absent = ask(&[libc::EINVAL]).unwrap_err();
        assert_eq!((asked.get(), absent.raw_os_error()), (1, Some(libc::EINVAL)));
        let always = ask(&[libc::ENOMEM; 64]).unwrap_err();
        assert_eq!((asked.get(), always.raw_os_error()), (TRIES as usize, Some(libc::ENOMEM)));
    }

    #[test]
    fn cgroup_v2_is_found_beside_version_one_and_with_spaces_in_its_path() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/my\\040unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_in(mounts), Some(PathBuf::from("/sys/fs/cgroup/my unified")));
        assert_eq!(cgroup2_in("tmpfs /cgroup2 tmpfs rw 0 0\n"), None);
    }

    #[test]
    fn a_kernel_that_lacks_something_is_told_what_it_means() {
        let none = Features::NONE;
        assert_eq!(none.bits(), 0);
        assert!(none.list().iter().all(|f| !f.present && !f.when_absent.is_empty()));
        let some = Features { coarse_clock: true, netns_cookie: true, ..Features::NONE };
        assert_eq!(some.bits(), feature::COARSE_CLOCK | feature::NETNS_COOKIE);
    }

    #[test]
    fn what_was_found_absent_is_known_again_by_its_bit() {
        let all = Features::NONE.absent();
        assert_eq!(all.count_ones() as usize, Features::NONE.list().iter().filter(|f| !f.required).count());
        let without = Features { tcx: false, set_retval: false, jit: true, ..Features::NONE };
        let names: Vec<_> =
            fall_backs(without.absent() & (absent::TCX | absent::JIT)).iter().map(|f| f.name).collect();
        assert_eq!(names, ["TCX links"]);
        assert_eq!(fall_backs(0), []);
    }
}
