//! What this kernel can do, found out by asking it: versions lie where distributions backport.

use std::fs;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya_obj::generated::{bpf_attach_type, bpf_prog_type};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use proxy_common::abi::feature;

use super::sys;

/// Helper numbers of `linux/bpf.h`.
mod helper {
    pub(super) const L4_CSUM_REPLACE: u32 = 11;
    pub(super) const GET_NETNS_COOKIE: u32 = 122;
    pub(super) const KTIME_GET_COARSE_NS: u32 = 160;
    pub(super) const SET_RETVAL: u32 = 187;
}

/// `SO_NETNS_COOKIE` of `asm-generic/socket.h`.
const SO_NETNS_COOKIE: i32 = 71;
/// `BPF_F_PSEUDO_HDR | BPF_F_IPV6`.
const PSEUDO_HEADER_IPV6: u32 = 1 << 4 | 1 << 7;
/// No interface has this index.
const NO_INTERFACE: u32 = i32::MAX as u32;

/// One thing a kernel has or lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Its name.
    pub name: &'static str,
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
    /// TC programs can ask for the cookie, too.
    pub netns_cookie_tc: bool,
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
        let empty = tc(&[set(0, 0), EXIT]);
        Self {
            bpf: empty.is_ok() && sock(&[set(0, 1), EXIT]).is_ok(),
            jit: empty.as_ref().is_ok_and(|fd| sys::program_facts(fd.as_fd()).is_ok_and(|p| p.jited > 0)),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            tcx: empty.as_ref().is_ok_and(has_tcx),
            coarse_clock: tc(&[helper_call(helper::KTIME_GET_COARSE_NS), set(0, 0), EXIT]).is_ok(),
            set_retval: sock(&[set(1, 0), helper_call(helper::SET_RETVAL), set(0, 1), EXIT]).is_ok(),
            csum_ipv6: has_csum_ipv6(),
            netns_cookie: sock(&[helper_call(helper::GET_NETNS_COOKIE), set(0, 1), EXIT]).is_ok(),
            netns_cookie_tc: tc(&[helper_call(helper::GET_NETNS_COOKIE), set(0, 0), EXIT]).is_ok(),
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
    }

    /// Every feature for a person.
    #[must_use]
    pub fn list(&self) -> Vec<Feature> {
        let required = |name, present, when_absent| Feature { name, present, when_absent, required: true };
        let optional = |name, present, when_absent| Feature { name, present, when_absent, required: false };
        vec![
            required(
                "BPF programs (TC, cgroup sockets)",
                self.bpf,
                "nothing can be translated: run as root on a kernel with CONFIG_BPF_SYSCALL, \
                 CONFIG_NET_CLS_BPF and CONFIG_CGROUP_BPF",
            ),
            required(
                "cgroup v2",
                self.cgroup2.is_some(),
                "sockets cannot be translated: mount -t cgroup2 none /sys/fs/cgroup/unified, or start with \
                 --socket-lb=off",
            ),
            optional(
                "JIT compiler",
                self.jit,
                "programs are interpreted and many times slower: sysctl -w net.core.bpf_jit_enable=1",
            ),
            optional(
                "kernel BTF",
                self.btf,
                "tools such as bpftool show tables as bare bytes; translation is not affected",
            ),
            optional("TCX links", self.tcx, "interfaces carry clsact filters instead (kernels before 6.6)"),
            optional(
                "coarse clock",
                self.coarse_clock,
                "the precise clock is used: 30 ns more a packet (kernels before 5.11)",
            ),
            optional(
                "socket hook errors",
                self.set_retval,
                "a refused connect fails with EPERM and not ECONNREFUSED (kernels before 5.18)",
            ),
            optional(
                "IPv6 hardware checksums",
                self.csum_ipv6,
                "received IPv6 packets lose their hardware checksum when translated (kernels before 6.16)",
            ),
            optional(
                "network namespace cookies",
                self.netns_cookie,
                "sockets of the host and of pods cannot be told apart: --socket-lb=host acts on none \
                 (kernels before 5.8)",
            ),
        ]
    }
}

/// Lifts the limit on locked memory, which maps count against before 5.11. A refusal (no CAP_SYS_RESOURCE)
/// matters only there, and then the maps say so themselves.
pub(super) fn raise_memlock() {
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
}

/// Cookie of this thread's network namespace; 0 when the kernel does not tell it.
#[must_use]
pub fn host_netns_cookie() -> u64 {
    let cookie = || -> io::Result<u64> {
        let socket = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("[::1]:0"))?;
        sys::socket_u64(socket.as_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE)
    };
    cookie().unwrap_or(0)
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

/// An instruction from its fields, as `struct bpf_insn` lays them out on a little-endian machine.
const fn instruction(code: u8, registers: u8, imm: u32) -> u64 {
    code as u64 | (registers as u64) << 8 | (imm as u64) << 32
}

/// `BPF_ALU64 | BPF_MOV | BPF_K`: a register := a constant.
const fn set(register: u8, imm: u32) -> u64 {
    instruction(0xb7, register, imm)
}

/// `BPF_JMP | BPF_CALL`.
const fn helper_call(helper: u32) -> u64 {
    instruction(0x85, 0, helper)
}

/// `BPF_JMP | BPF_EXIT`.
const EXIT: u64 = instruction(0x95, 0, 0);

fn load(kind: bpf_prog_type, hook: Option<bpf_attach_type>, body: &[u64]) -> io::Result<OwnedFd> {
    sys::program_load(kind, hook, body)
}

/// A kernel with TCX looks for the interface and does not find it; an older one does not know the hook.
fn has_tcx(program: &OwnedFd) -> bool {
    matches!(
        sys::link_tcx(program.as_fd(), NO_INTERFACE, false),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV)
    )
}

/// The flag is checked before the packet is touched: the helper answers 0 or `EINVAL`. The difference that
/// is added to the checksum is zero.
fn has_csum_ipv6() -> bool {
    let body = [
        set(2, 34),
        set(3, 0),
        set(4, 0),
        set(5, PSEUDO_HEADER_IPV6),
        helper_call(helper::L4_CSUM_REPLACE),
        EXIT,
    ];
    load(bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS, None, &body)
        .and_then(|program| sys::program_run(program.as_fd(), &[0; 64]))
        .is_ok_and(|answer| answer == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_v2_is_found_beside_version_one_and_with_spaces_in_its_path() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/my\\040unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_in(mounts), Some(PathBuf::from("/sys/fs/cgroup/my unified")));
        assert_eq!(cgroup2_in("tmpfs /cgroup2 tmpfs rw 0 0\n"), None);
    }

    #[test]
    fn a_kernel_that_lacks_something_is_told_what_it_means() {
        let none = Features {
            bpf: false,
            jit: false,
            btf: false,
            tcx: false,
            coarse_clock: false,
            set_retval: false,
            csum_ipv6: false,
            netns_cookie: false,
            netns_cookie_tc: false,
            cgroup2: None,
        };
        assert_eq!(none.bits(), 0);
        assert!(none.list().iter().all(|f| !f.present && !f.when_absent.is_empty()));
        let some = Features { coarse_clock: true, netns_cookie: true, ..none };
        assert_eq!(some.bits(), feature::COARSE_CLOCK | feature::NETNS_COOKIE);
    }

    #[test]
    fn instructions_are_laid_out_as_the_kernel_reads_them() {
        assert_eq!(set(5, 7).to_le_bytes(), [0xb7, 5, 0, 0, 7, 0, 0, 0]);
        assert_eq!(helper_call(160).to_le_bytes(), [0x85, 0, 0, 0, 160, 0, 0, 0]);
    }
}
