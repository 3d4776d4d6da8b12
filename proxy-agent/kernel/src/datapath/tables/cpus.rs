//! How many CPUs tables are made for.

/// CPUs that may ever run.
pub(crate) fn cpus() -> u32 {
    aya::util::nr_cpus().map_or(1, |n| u32::try_from(n).unwrap_or(1))
}
