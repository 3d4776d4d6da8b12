//! System calls: their names, and with which error each can fail.

use nix::errno::Errno;
use nix::libc;

/// A kind of call: its number, and the command of `bpf` or `futex`.
pub(super) type Kind = (u64, Option<u64>);

/// Lists calls by the error with which they fail.
macro_rules! calls {
    ($($error:ident: $($call:ident)*;)*) => { &[$($((libc::$call, stringify!($call), Errno::$error),)*)*] };
}

/// Those that a process as ours makes. Each error is one that the call is documented to have, and that comes by itself:
/// memory, room or descriptors run out, a disk is broken, a signal comes.
const CALLS: &[(i64, &str, Errno)] = calls! {
    EIO: SYS_read SYS_pread64 SYS_readv SYS_readlink SYS_readlinkat SYS_stat SYS_fstat SYS_lstat SYS_statx
        SYS_newfstatat SYS_statfs SYS_fstatfs SYS_getdents64 SYS_access SYS_faccessat SYS_faccessat2 SYS_lseek
        SYS_fsync SYS_fdatasync SYS_unlink SYS_unlinkat SYS_rmdir;
    ENOSPC: SYS_write SYS_pwrite64 SYS_writev SYS_mkdir SYS_mkdirat SYS_rename SYS_renameat SYS_renameat2
        SYS_ftruncate SYS_fallocate SYS_symlink SYS_link SYS_inotify_add_watch SYS_epoll_ctl;
    ENFILE: SYS_open SYS_openat SYS_openat2 SYS_socket SYS_socketpair SYS_pipe SYS_pipe2 SYS_epoll_create1
        SYS_eventfd2 SYS_inotify_init1 SYS_timerfd_create SYS_signalfd4 SYS_pidfd_open SYS_pidfd_getfd SYS_dup
        SYS_dup3 SYS_fcntl SYS_accept4 SYS_memfd_create;
    ENOBUFS: SYS_sendto SYS_sendmsg SYS_recvfrom SYS_recvmsg SYS_setsockopt SYS_getsockopt SYS_getsockname
        SYS_getpeername SYS_bind SYS_connect SYS_listen;
    EINTR: SYS_close SYS_futex SYS_epoll_wait SYS_epoll_pwait SYS_epoll_pwait2 SYS_poll SYS_ppoll SYS_select SYS_pselect6
        SYS_nanosleep SYS_clock_nanosleep SYS_wait4 SYS_waitid SYS_flock SYS_getrandom;
    ENOMEM: SYS_mmap SYS_mremap SYS_mprotect SYS_munmap SYS_madvise SYS_brk SYS_bpf SYS_ioctl SYS_mount SYS_umount2
        SYS_setns SYS_unshare;
    EAGAIN: SYS_clone SYS_clone3 SYS_fork SYS_vfork;
    EPERM: SYS_prlimit64 SYS_setrlimit SYS_prctl SYS_capget SYS_capset SYS_perf_event_open SYS_finit_module
        SYS_init_module SYS_setpriority SYS_sched_setscheduler;
};

/// Those that cannot fail as they are used, end the process, or return from a signal.
const INFALLIBLE: &[(i64, &str, Errno)] = calls! {
    UnknownErrno: SYS_execve SYS_exit SYS_exit_group SYS_rt_sigreturn SYS_restart_syscall SYS_rt_sigaction
        SYS_rt_sigprocmask SYS_sigaltstack SYS_set_tid_address SYS_set_robust_list SYS_rseq SYS_arch_prctl SYS_getpid
        SYS_gettid SYS_getppid SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_uname SYS_sysinfo SYS_sched_yield
        SYS_sched_getaffinity SYS_clock_gettime SYS_getcwd SYS_umask SYS_tgkill SYS_kill SYS_shutdown SYS_getrusage
        SYS_membarrier;
};

/// `FUTEX_CMD_MASK`, without the flags for private futexes and for the clock.
const FUTEX_COMMAND: u64 = 0x7f;
/// `FUTEX_WAKE`.
const FUTEX_WAKE: u64 = 1;

/// Commands of `bpf`, by their number.
const COMMANDS: [&str; 36] = [
    "MAP_CREATE",
    "MAP_LOOKUP_ELEM",
    "MAP_UPDATE_ELEM",
    "MAP_DELETE_ELEM",
    "MAP_GET_NEXT_KEY",
    "PROG_LOAD",
    "OBJ_PIN",
    "OBJ_GET",
    "PROG_ATTACH",
    "PROG_DETACH",
    "PROG_TEST_RUN",
    "PROG_GET_NEXT_ID",
    "MAP_GET_NEXT_ID",
    "PROG_GET_FD_BY_ID",
    "MAP_GET_FD_BY_ID",
    "OBJ_GET_INFO_BY_FD",
    "PROG_QUERY",
    "RAW_TRACEPOINT_OPEN",
    "BTF_LOAD",
    "BTF_GET_FD_BY_ID",
    "TASK_FD_QUERY",
    "MAP_LOOKUP_AND_DELETE_ELEM",
    "MAP_FREEZE",
    "BTF_GET_NEXT_ID",
    "MAP_LOOKUP_BATCH",
    "MAP_LOOKUP_AND_DELETE_BATCH",
    "MAP_UPDATE_BATCH",
    "MAP_DELETE_BATCH",
    "LINK_CREATE",
    "LINK_UPDATE",
    "LINK_GET_FD_BY_ID",
    "LINK_GET_NEXT_ID",
    "ENABLE_STATS",
    "ITER_CREATE",
    "LINK_DETACH",
    "PROG_BIND_MAP",
];

/// What a call is, of these arguments.
#[must_use]
pub(super) fn kind(number: u64, first: u64, second: u64) -> Kind {
    let command = match i64::try_from(number) {
        Ok(libc::SYS_bpf) => Some(first),
        Ok(libc::SYS_futex) => Some(second & FUTEX_COMMAND),
        _ => None,
    };
    (number, command)
}

/// Its name, as strace writes it.
#[must_use]
pub(super) fn name((number, command): Kind) -> String {
    let known = CALLS.iter().chain(INFALLIBLE).find(|(known, ..)| is(*known, number));
    let name = known.map_or_else(|| number.to_string(), |(_, name, _)| name.replace("SYS_", ""));
    match command
        .filter(|_| is(libc::SYS_bpf, number))
        .map(|command| (command, usize::try_from(command).ok().and_then(|n| COMMANDS.get(n))))
    {
        None => name,
        Some((_, Some(command))) => format!("{name} {command}"),
        Some((command, None)) => format!("{name} {command}"),
    }
}

/// The error with which it fails; none where it cannot.
#[must_use]
pub(super) fn error((number, command): Kind) -> Option<Errno> {
    // To wake somebody fails for wrong arguments only.
    let wakes = is(libc::SYS_futex, number) && command == Some(FUTEX_WAKE);
    if wakes || INFALLIBLE.iter().any(|(known, ..)| is(*known, number)) {
        return None;
    }
    // Of what is not listed no error is known that it has by itself.
    let known = CALLS.iter().find(|(known, ..)| is(*known, number));
    Some(known.map_or(Errno::ENOSYS, |(_, _, error)| *error))
}

fn is(known: i64, number: u64) -> bool {
    i64::try_from(number) == Ok(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_have_the_names_that_strace_gives_them_and_no_call_is_listed_twice() {
        let number = |call: i64| call.cast_unsigned();
        assert_eq!(name((number(libc::SYS_openat), None)), "openat");
        assert_eq!(name((number(libc::SYS_bpf), Some(28))), "bpf LINK_CREATE");
        assert_eq!(name((number(libc::SYS_bpf), Some(99))), "bpf 99");
        assert_eq!(name((9999, None)), "9999");
        assert_eq!(error((number(libc::SYS_exit), None)), None);
        assert_eq!(error((number(libc::SYS_bpf), Some(2))), Some(Errno::ENOMEM));
        let futex = |operation| error(kind(number(libc::SYS_futex), 0, operation));
        // FUTEX_WAIT_BITSET and FUTEX_WAKE, of a private futex.
        assert_eq!((futex(128 | 9), futex(128 | 1)), (Some(Errno::EINTR), None));
        let mut all: Vec<i64> = CALLS.iter().chain(INFALLIBLE).map(|(number, ..)| *number).collect();
        all.sort_unstable();
        assert!(all.windows(2).all(|pair| pair[0] != pair[1]), "{all:?}");
    }
}
