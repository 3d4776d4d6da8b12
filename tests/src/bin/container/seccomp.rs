//! The system calls that container runtimes reject by default (seccomp profile `RuntimeDefault`), as containerd 1.7
//! and Docker 23 and later have it: some always, some to who lacks a capability.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use caps::Capability;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

/// Refused to everybody.
const NEVER: [libc::c_long; 18] = [
    libc::SYS__sysctl,
    libc::SYS_add_key,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_nfsservctl,
    libc::SYS_pivot_root,
    libc::SYS_request_key,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_sysfs,
    libc::SYS_userfaultfd,
    libc::SYS_ustat,
];

/// Refused to who has none of the capabilities.
const GATED: [(&[Capability], &[libc::c_long]); 11] = {
    use Capability::*;
    [
        (&[CAP_SYS_ADMIN, CAP_BPF], &[libc::SYS_bpf]),
        (&[CAP_SYS_ADMIN, CAP_PERFMON], &[libc::SYS_perf_event_open]),
        (&[CAP_SYS_ADMIN, CAP_SYSLOG], &[libc::SYS_syslog]),
        (
            &[CAP_SYS_ADMIN],
            &[
                libc::SYS_fanotify_init,
                libc::SYS_fsconfig,
                libc::SYS_fsmount,
                libc::SYS_fsopen,
                libc::SYS_fspick,
                libc::SYS_lookup_dcookie,
                libc::SYS_mount,
                libc::SYS_mount_setattr,
                libc::SYS_move_mount,
                libc::SYS_open_tree,
                libc::SYS_quotactl,
                libc::SYS_quotactl_fd,
                libc::SYS_setdomainname,
                libc::SYS_sethostname,
                libc::SYS_setns,
                libc::SYS_umount2,
                libc::SYS_unshare,
            ],
        ),
        (&[CAP_DAC_READ_SEARCH], &[libc::SYS_open_by_handle_at]),
        (&[CAP_SYS_BOOT], &[libc::SYS_reboot]),
        (&[CAP_SYS_CHROOT], &[libc::SYS_chroot]),
        (&[CAP_SYS_MODULE], &[libc::SYS_delete_module, libc::SYS_init_module, libc::SYS_finit_module]),
        (&[CAP_SYS_PACCT], &[libc::SYS_acct]),
        (
            &[CAP_SYS_PTRACE],
            &[
                libc::SYS_kcmp,
                libc::SYS_pidfd_getfd,
                libc::SYS_process_madvise,
                libc::SYS_process_vm_readv,
                libc::SYS_process_vm_writev,
                libc::SYS_ptrace,
            ],
        ),
        (&[CAP_SYS_TIME], &[libc::SYS_settimeofday, libc::SYS_clock_settime, libc::SYS_clock_adjtime]),
    ]
};

/// `CLONE_NEW…` of `linux/sched.h`, all of them.
const NAMESPACES: [u64; 7] =
    [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];

/// Makes it hold for this process from now on.
pub(crate) fn apply(capabilities: &caps::CapsHashSet) -> Result<()> {
    let lacks = |caps: &[Capability]| !caps.iter().any(|cap| capabilities.contains(cap));
    let gated = GATED.iter().filter(|(caps, _)| lacks(caps)).flat_map(|(_, calls)| *calls);
    let mut refused: BTreeMap<i64, Vec<SeccompRule>> =
        NEVER.iter().chain(gated).map(|call| (*call, Vec::new())).collect();
    let argument =
        |n, op, value| SeccompRule::new(vec![SeccompCondition::new(n, SeccompCmpArgLen::Dword, op, value)?]);
    refused.insert(libc::SYS_socket, vec![argument(0, SeccompCmpOp::Eq, libc::AF_VSOCK as u64)?]);
    let mut unknown = BTreeMap::new();
    if lacks(&[Capability::CAP_SYS_ADMIN]) {
        let namespaces = NAMESPACES.iter().map(|flag| argument(0, SeccompCmpOp::MaskedEq(*flag), *flag));
        refused.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
        // Its arguments lie in memory: who learns that there is no such call takes the older one.
        unknown.insert(libc::SYS_clone3, Vec::new());
    }
    for (calls, error) in [(unknown, libc::ENOSYS), (refused, libc::EPERM)] {
        if calls.is_empty() {
            continue;
        }
        let architecture = std::env::consts::ARCH.try_into()?;
        let filter = SeccompFilter::new(
            calls,
            SeccompAction::Allow,
            SeccompAction::Errno(u32::try_from(error)?),
            architecture,
        )?;
        let program: BpfProgram = filter.try_into().context("compiling the filter")?;
        apply_filter(&program).context("applying the filter")?;
    }
    Ok(())
}
