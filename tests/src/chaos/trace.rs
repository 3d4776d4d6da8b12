//! A process whose system calls are watched one by one, so that it can be killed at one, or one can fail.
//!
//! A seccomp filter has it stop at the calls that are of interest, for the thread that traces it (ptrace).

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::ops::Range;
use std::process::Command;
use std::sync::mpsc::Sender;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::calls;
use crate::pod::Place;

/// A place of the program that makes a system call.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Site {
    /// What it calls.
    pub(super) kind: calls::Kind,
    /// The addresses inside the program that stand on the stack, innermost first: those that are returned to, and now and
    /// then one that is left of an earlier call. They count from where the program's text begins.
    stack: Vec<u64>,
    /// Whether the loader calls, before the program begins.
    pub(super) of_loader: bool,
}

/// How often a site has called, and which call of the whole run its first was.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Made {
    pub(super) times: u32,
    pub(super) first: u32,
}

/// So many addresses tell one site from another.
const DEPTH: usize = 12;
/// Bytes of the stack that are looked at.
const STACK: usize = 8192;

/// What is done at a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// The process is killed when it begins.
    Kill,
    /// It is not done, and returns this error.
    Fail(Errno),
}

/// How a run went.
#[derive(Clone, Debug)]
pub(super) struct Traced {
    /// Every site that has called; of a run in which something was done, until then.
    pub made: BTreeMap<Site, Made>,
    /// Whether the call was made for which something was to be done.
    pub reached: bool,
    /// How the process has ended.
    pub ended: WaitStatus,
}

/// Runs a command in a place and does something at one of its system calls. Its process id is reported once it runs; it ends
/// by itself, or is killed by whoever is called then.
pub(super) fn run(
    place: &Place,
    command: Command,
    at: Option<(&Site, Act)>,
    started: &Sender<Pid>,
) -> Result<Traced> {
    // Only the thread that has started it can wait for it, and is notified of nobody else's processes.
    let number = at.map(|(site, _)| site.kind.0);
    let filter = filter(number)?;
    let child = place.spawn_last(command, move || traced(&filter))?;
    let pid = Pid::from_raw(i32::try_from(child.id()).context("a process id")?);
    let first = wait(Some(pid))?;
    ensure!(
        matches!(first, WaitStatus::Stopped(_, Signal::SIGTRAP)),
        "{pid} does not stop where it begins: {first:?}"
    );
    // What it starts is under the filter, too, and goes on at once.
    let options = [
        Options::PTRACE_O_TRACESECCOMP,
        Options::PTRACE_O_TRACECLONE,
        Options::PTRACE_O_TRACEFORK,
        Options::PTRACE_O_TRACEVFORK,
        Options::PTRACE_O_EXITKILL,
    ];
    ptrace::setoptions(pid, options.into_iter().collect()).context("setting what a trace is to tell")?;
    let (text, loader) = texts(pid)?;
    let mut trace = Trace { pid, at, calls: 0, made: BTreeMap::new(), text, loader, reached: false };
    go_on(pid, None)?;
    // Nobody may listen any more; the process is ended then by whoever ends this thread.
    started.send(pid).ok();
    loop {
        match wait(None)? {
            WaitStatus::PtraceEvent(thread, _, libc::PTRACE_EVENT_SECCOMP) => {
                gone(trace.look(thread)).context("looking at a system call")?;
                go_on(thread, None)?;
            }
            WaitStatus::PtraceEvent(thread, ..)
            | WaitStatus::Stopped(thread, Signal::SIGSTOP | Signal::SIGTRAP) => {
                go_on(thread, None)?;
            }
            WaitStatus::Stopped(thread, signal) => go_on(thread, Some(signal))?,
            ended @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..)) if ended.pid() == Some(pid) => {
                return Ok(Traced { made: trace.made, reached: trace.reached, ended });
            }
            _ => {}
        }
    }
}

/// A filter that has the tracer look at one call, or at all.
fn filter(number: Option<u64>) -> Result<[libc::sock_filter; 5]> {
    let code = |code: u32| u16::try_from(code).context("an instruction of a filter");
    let load = code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS)?;
    let (compare, end) =
        (code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K)?, code(libc::BPF_RET | libc::BPF_K)?);
    let (trace, allow) = (libc::SECCOMP_RET_TRACE, libc::SECCOMP_RET_ALLOW);
    let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let wanted = number.map(u32::try_from).transpose().context("the number of a system call")?;
    let this = u32::try_from(libc::SYS_execve)?;
    Ok([
        statement(load, 0),
        // The process is not traced yet when it makes this one.
        libc::sock_filter { code: compare, jt: 1, jf: 0, k: this },
        // Where all are wanted this compares with what no call has.
        libc::sock_filter {
            code: compare,
            jt: 1,
            jf: u8::from(wanted.is_none()),
            k: wanted.unwrap_or(u32::MAX),
        },
        statement(end, allow),
        statement(end, trace),
    ])
}

/// Has this process traced by who has started it, at what the filter says.
#[expect(unsafe_code, reason = "the kernel is handed a filter by its address")]
fn traced(filter: &[libc::sock_filter; 5]) -> std::io::Result<()> {
    ptrace::traceme().map_err(std::io::Error::from)?;
    let program = libc::sock_fprog { len: 5, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the filter and the description of it live until the call returns, and the kernel only reads them.
    let outcome = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    Errno::result(outcome).map(drop).map_err(std::io::Error::from)
}

/// Lets a thread go on.
fn go_on(thread: Pid, signal: Option<Signal>) -> Result<()> {
    gone(ptrace::cont(thread, signal)).context("letting a thread go on that is traced")
}

/// The next thing that a process of this thread does.
fn wait(of: Option<Pid>) -> Result<WaitStatus> {
    loop {
        match waitpid(of, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)) {
            Err(Errno::EINTR) => {}
            other => return other.context("waiting for a process that is traced"),
        }
    }
}

struct Trace<'a> {
    pid: Pid,
    calls: u32,
    at: Option<(&'a Site, Act)>,
    made: BTreeMap<Site, Made>,
    /// Where the program's own text lies.
    text: Range<u64>,
    /// Where the loader's lies.
    loader: Range<u64>,
    reached: bool,
}

impl Trace<'_> {
    /// A thread is about to make a call.
    fn look(&mut self, thread: Pid) -> nix::Result<()> {
        if self.reached {
            return Ok(());
        }
        let mut registers = ptrace::getregs(thread)?;
        let site = Site {
            kind: calls::kind(registers.orig_rax, registers.rdi, registers.rsi),
            stack: self.stack(thread, registers.rsp)?,
            of_loader: self.loader.contains(&registers.rip),
        };
        self.calls += 1;
        let wanted = self.at.filter(|(wanted, _)| **wanted == site);
        self.made.entry(site).or_insert(Made { times: 0, first: self.calls }).times += 1;
        match wanted {
            None => Ok(()),
            Some((_, act)) => {
                self.reached = true;
                match act {
                    Act::Kill => kill(self.pid, Signal::SIGKILL),
                    Act::Fail(error) => {
                        // It tells that it has failed by an end that is lower than what was asked for.
                        let is_brk = i64::try_from(registers.orig_rax) == Ok(libc::SYS_brk);
                        let failed = (-i64::from(error as i32)).cast_unsigned();
                        // There is no such call: the kernel does nothing, and returns what is here.
                        registers.orig_rax = u64::MAX;
                        registers.rax = if is_brk { 0 } else { failed };
                        ptrace::setregs(thread, registers)
                    }
                }
            }
        }
    }

    /// The addresses inside the program that stand on a thread's stack.
    fn stack(&self, thread: Pid, pointer: u64) -> nix::Result<Vec<u64>> {
        let mut bytes = [0; STACK];
        let base = usize::try_from(pointer).map_err(|_| Errno::EFAULT)?;
        // What is read ends where the stack does.
        let from = [RemoteIoVec { base, len: STACK }];
        let read = process_vm_readv(thread, &mut [IoSliceMut::new(&mut bytes)], &from)?;
        let words = bytes[..read].as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word));
        let own = words.filter(|word| self.text.contains(word));
        Ok(own.take(DEPTH).map(|address| address - self.text.start).collect())
    }
}

/// Where the text of a program lies that is about to begin, and that of its loader; a static program has none.
fn texts(pid: Pid) -> Result<(Range<u64>, Range<u64>)> {
    let maps =
        std::fs::read_to_string(format!("/proc/{pid}/maps")).context("reading a process's memory map")?;
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).context("reading a process's program")?;
    let program = program.to_string_lossy();
    let (mut text, mut loader) = (None, 0..0);
    // `start-end r-xp offset device inode path`
    for line in maps.lines().filter(|line| line.contains(" r-xp ") && line.contains('/')) {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let (start, end) = range.with_context(|| format!("no range of addresses: {line}"))?;
        let number =
            |text: &str| u64::from_str_radix(text, 16).with_context(|| format!("an address: {line}"));
        let range = number(start)?..number(end)?;
        if line.ends_with(&*program) {
            text = Some(range);
        } else {
            loader = range;
        }
    }
    Ok((text.with_context(|| format!("no text of {program} among {maps}"))?, loader))
}

/// A thread that has been killed meanwhile is no error: its end comes next.
fn gone(outcome: nix::Result<()>) -> nix::Result<()> {
    match outcome {
        Err(Errno::ESRCH) => Ok(()),
        other => other,
    }
}
