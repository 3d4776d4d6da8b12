//! What the process itself costs, under the names every Prometheus client uses (H-48).

use std::fmt;
use std::path::PathBuf;

use nix::sys::resource::{Resource, getrlimit};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// Reads `/proc/self` at each scrape.
#[derive(Debug)]
pub(super) struct Process {
    proc: PathBuf,
    ticks: f64,
    page: u64,
}

/// CPU seconds and resident bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Usage {
    cpu_seconds: f64,
    resident_bytes: u64,
    start_seconds: Option<f64>,
}

impl Process {
    /// This process.
    pub(super) fn this() -> Self {
        let conf = |var| nix::unistd::sysconf(var).ok().flatten();
        Self {
            proc: "/proc".into(),
            ticks: conf(nix::unistd::SysconfVar::CLK_TCK).unwrap_or(100) as f64,
            page: conf(nix::unistd::SysconfVar::PAGE_SIZE).and_then(|n| n.try_into().ok()).unwrap_or(4096),
        }
    }

    /// From proc_pid_stat(5); `None` where there is no /proc.
    fn usage(&self) -> Option<Usage> {
        let stat = std::fs::read_to_string(self.proc.join("self/stat")).ok()?;
        // The second field is a name in parentheses that may hold anything; the third follows the last one.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
        let boot = std::fs::read_to_string(self.proc.join("stat")).unwrap_or_default();
        let boot = boot.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<f64>().ok());
        let start = number(22)? as f64 / self.ticks;
        Some(Usage {
            cpu_seconds: (number(14)? + number(15)?) as f64 / self.ticks,
            resident_bytes: number(24)? * self.page,
            start_seconds: boot.map(|boot| boot + start),
        })
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(usage) = self.usage() else { return Ok(()) };
        let cpu = ConstCounter::new(usage.cpu_seconds);
        let help = "CPU time of the agent";
        cpu.encode(encoder.encode_descriptor("process_cpu_seconds", help, None, MetricTypeOf::COUNTER)?)?;
        let mut gauge = |name: &str, help: &str, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricTypeOf::GAUGE)?)
        };
        gauge("process_resident_memory_bytes", "Resident memory of the agent", usage.resident_bytes as f64)?;
        if let Ok(open) = std::fs::read_dir(self.proc.join("self/fd")) {
            gauge("process_open_fds", "Open file descriptors", open.count() as f64)?;
        }
        if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
            gauge("process_max_fds", "File descriptors that may be open", soft as f64)?;
        }
        match usage.start_seconds {
            Some(start) => gauge("process_start_time_seconds", "When the agent started, Unix time", start),
            None => Ok(()),
        }
    }
}

/// The two kinds of metric that are read off and not kept.
pub(super) struct MetricTypeOf;

impl MetricTypeOf {
    pub(super) const COUNTER: prometheus_client::metrics::MetricType =
        prometheus_client::metrics::MetricType::Counter;
    pub(super) const GAUGE: prometheus_client::metrics::MetricType =
        prometheus_client::metrics::MetricType::Gauge;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_blanks_does_not_shift_the_fields() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("self")).unwrap();
        let fields: Vec<String> = (4..=52).map(|n| n.to_string()).collect();
        let stat = format!("7 (a) b) S {}", fields.join(" "));
        std::fs::write(dir.path().join("self/stat"), stat).unwrap();
        std::fs::write(dir.path().join("stat"), "cpu 1 2\nbtime 1000\n").unwrap();
        let process = Process { proc: dir.path().into(), ticks: 100.0, page: 4096 };
        assert_eq!(
            process.usage(),
            Some(Usage { cpu_seconds: 0.29, resident_bytes: 24 * 4096, start_seconds: Some(1000.22) })
        );
    }

    #[test]
    fn this_process_uses_memory() {
        assert!(Process::this().usage().unwrap().resident_bytes > 0);
    }
}
