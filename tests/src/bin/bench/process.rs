//! What processes and threads take, as the kernel tells it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::time::ClockId;
use nix::unistd::{SysconfVar, sysconf};

/// Bytes of a MiB.
pub(crate) const MIB: f64 = 1_048_576.0;

/// Memory of a process, in MiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// What it has.
    pub(crate) resident: f64,
    /// The most that it ever had.
    pub(crate) peak: f64,
}

impl Memory {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let status = read(&format!("/proc/{pid}/status"))?;
        let field = |name: &str| -> Result<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.trim_start_matches(':').split_whitespace().next());
            let kib: f64 = number.with_context(|| format!("no {name}"))?.parse()?;
            Ok(kib * 1024.0 / MIB)
        };
        Ok(Self { resident: field("VmRSS")?, peak: field("VmHWM")? })
    }
}

/// Processor time of a process so far, with what the kernel did for it and with threads that have ended.
pub(crate) fn cpu(pid: u32) -> Result<Duration> {
    let stat = read(&format!("/proc/{pid}/stat"))?;
    // The name stands in parentheses and may be anything; user and system time are fields 14 and 15.
    let (_, rest) = stat.rsplit_once(')').context("a process without a name")?;
    let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    let hertz = sysconf(SysconfVar::CLK_TCK)?.context("the kernel tells no length of a tick")?;
    Ok(Duration::from_secs_f64(ticks as f64 / hertz as f64))
}

/// Time that passes, and processor time of the thread that asks: on a machine that does other things, too, they differ.
pub(crate) struct Clock {
    begun: Instant,
    cpu: Duration,
}

impl Clock {
    pub(crate) fn start() -> Result<Self> {
        Ok(Self { begun: Instant::now(), cpu: Self::cpu()? })
    }

    /// Both since the start, in milliseconds.
    pub(crate) fn stop(&self) -> Result<[f64; 2]> {
        let cpu = Self::cpu()?.saturating_sub(self.cpu);
        Ok([self.begun.elapsed(), cpu].map(|time| time.as_secs_f64() * 1e3))
    }

    fn cpu() -> Result<Duration> {
        Ok(ClockId::CLOCK_THREAD_CPUTIME_ID.now().context("reading the thread's processor time")?.into())
    }
}

/// Processor time of our own threads of this name.
pub(crate) fn cpu_of_threads(name: &str) -> Result<Duration> {
    let mut nanoseconds = 0;
    for entry in Path::new("/proc/self/task").read_dir().context("reading our own threads")? {
        let thread = entry?.path();
        // A thread may end meanwhile.
        let Ok(comm) = std::fs::read_to_string(thread.join("comm")) else { continue };
        if comm.trim_end() == name {
            let stat = read(&thread.join("schedstat").display().to_string())?;
            nanoseconds += stat.split(' ').next().context("an empty schedstat")?.parse::<u64>()?;
        }
    }
    Ok(Duration::from_nanos(nanoseconds))
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_of_a_thread_is_counted_under_its_name_and_under_the_process() {
        let work = || {
            let clock = Clock::start().unwrap();
            let worked = loop {
                let [passed, worked] = clock.stop().unwrap();
                if worked >= 60.0 {
                    assert!(passed >= worked, "{passed} {worked}");
                    break worked;
                }
            };
            let counted = cpu_of_threads("hard-worker").unwrap();
            assert!(counted.as_secs_f64() * 1e3 >= worked, "{counted:?} {worked}");
            counted
        };
        let worked =
            std::thread::Builder::new().name("hard-worker".into()).spawn(work).unwrap().join().unwrap();
        assert!(worked > Duration::ZERO);
        assert!(cpu(std::process::id()).unwrap() > Duration::ZERO);
        assert_eq!(cpu_of_threads("nobody").unwrap(), Duration::ZERO);
        let memory = Memory::of(std::process::id()).unwrap();
        assert!(memory.resident > 0.0 && memory.peak >= memory.resident);
    }
}
