//! The flags for the sizes of tables: one for each size that the core lists, and one for their memory.

use std::sync::LazyLock;

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

use agent_core::capacity::{Capacities, MOST_ENTRIES, SIZES};
use agent_kernel::datapath::tables::growth::Limits;

const HEADING: &str = "Sizes of tables, in entries: they begin small and grow up to these";
const MEMORY: &str = "map-memory";
/// In MiB.
const DEFAULT_MEMORY: u32 = 512;

/// How many entries the tables may have. They begin with less and grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSizes {
    pub each: Capacities,
    /// All together, in MiB.
    pub memory: u32,
}

impl TableSizes {
    /// What the tables may become.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        Limits { each: self.each, memory: self.memory }
    }
}

/// A table that holds nothing helps nobody; indices have 32 bits.
fn entries(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(0) => Err("a table needs room for at least one entry".to_owned()),
        Ok(n) if n > MOST_ENTRIES => Err(format!("no table can have more than {MOST_ENTRIES} entries")),
        Ok(n) => Ok(n),
        Err(e) => Err(e.to_string()),
    }
}

impl Args for TableSizes {
    fn augment_args(command: Command) -> Command {
        /// Lives as long as the command: clap borrows it.
        static DEFAULTS: LazyLock<Vec<String>> =
            LazyLock::new(|| SIZES.iter().map(|size| size.default.to_string()).collect());
        static MEMORY_DEFAULT: LazyLock<String> = LazyLock::new(|| DEFAULT_MEMORY.to_string());
        let flag = |name: &'static str, unit: &'static str, default: &'static str| {
            let arg =
                Arg::new(name).long(name.trim_start_matches('-')).value_name(unit).help_heading(HEADING);
            arg.default_value(default).value_parser(entries)
        };
        let sizes = SIZES.iter().zip(DEFAULTS.iter());
        let sizes = sizes.map(|(size, default)| flag(size.flag, "N", default).help(size.help.trim()));
        let memory = flag(MEMORY, "MIB", &MEMORY_DEFAULT).help(
            "Memory that all tables together may grow to, in MiB. At least what the smallest take: 13, and more with many \
             CPUs. Tables begin with half of it at most",
        );
        command.args(sizes).arg(memory)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for TableSizes {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |name: &str| matches.get_one::<u32>(name).copied();
        let mut each = Capacities::DEFAULT;
        for (size, (_, value)) in SIZES.iter().zip(each.fields()) {
            *value = given(size.flag).unwrap_or(size.default);
        }
        Ok(Self { each, memory: given(MEMORY).unwrap_or(DEFAULT_MEMORY) })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
