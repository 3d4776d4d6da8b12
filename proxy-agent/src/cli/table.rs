//! The one printer: what every listing looks like, as a table or as JSON.
//!
//! Left-aligned columns, two spaces apart, no borders, no colour, nothing cut off: fit for eyes, grep and awk.

use std::io::{self, Write};

use anyhow::Context;
use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

/// How a listing is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// Rows under a header. A cell may have several lines.
#[must_use]
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row.iter().map(|cell| plain(cell)).collect::<Vec<_>>());
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt() + "\n"
}

/// `text` without control characters: names come from the cluster, and a terminal obeys escape sequences.
#[must_use]
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '?' } else { c }).collect()
}

/// Writes `text`. Who closes the pipe early (`| head`) has seen enough.
pub fn write(out: &mut dyn Write, text: &str) -> anyhow::Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("writing the output"),
    }
}

/// Writes `value` as JSON, indented, with a newline at its end.
pub fn write_json(out: &mut dyn Write, value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value).context("turning the output into JSON")?;
    write(out, &(text + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_nothing_trails() {
        let rows = vec![
            vec!["a".to_owned(), "one\ntwo".to_owned(), "x".to_owned()],
            vec!["longer".to_owned(), "é".to_owned(), String::new()],
        ];
        assert_eq!(
            table(&["NAME", "LINES", "END"], rows),
            "NAME    LINES  END\n\
             a       one    x\n\
             \x20       two\n\
             longer  é\n"
        );
    }

    #[test]
    fn a_name_cannot_speak_to_the_terminal() {
        assert_eq!(plain("web\x1b[31m\u{9b}x"), "web?[31m?x");
    }

    #[test]
    fn a_closed_pipe_is_no_failure_but_a_full_disk_is() {
        struct Fails(io::ErrorKind);
        impl Write for Fails {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(self.0.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert!(write(&mut Fails(io::ErrorKind::BrokenPipe), "x").is_ok());
        assert!(write(&mut Fails(io::ErrorKind::StorageFull), "x").is_err());
    }
}
