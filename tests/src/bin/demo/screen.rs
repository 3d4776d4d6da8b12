//! What the reader sees: headings, paragraphs, tables; bold and colours only on a terminal.

use std::io::{IsTerminal, Write};

use anyhow::{Context, Result};
use comfy_table::{ContentArrangement, Table, presets};

/// Columns of a paragraph.
const WIDTH: usize = 100;

/// Where it is written.
pub(crate) struct Screen {
    colours: bool,
}

impl Screen {
    /// Standard output; colours unless it is piped or `NO_COLOR` is set (no-color.org).
    pub(crate) fn stdout() -> Self {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colours: std::io::stdout().is_terminal() && !no_color }
    }

    pub(crate) fn title(&self, text: &str) -> Result<()> {
        self.write(&format!("{}\n\n", self.paint("1;36", text)))
    }

    pub(crate) fn heading(&self, text: &str) -> Result<()> {
        self.write(&format!("\n{}\n", self.paint("1", &format!("== {text}"))))
    }

    /// A paragraph, wrapped.
    pub(crate) fn text(&self, text: &str) -> Result<()> {
        let mut line = String::new();
        for word in text.split_whitespace() {
            if !line.is_empty() && line.chars().count() + word.chars().count() >= WIDTH {
                self.write(&format!("{line}\n"))?;
                line.clear();
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        self.write(&format!("{line}\n"))
    }

    /// A step of what is going on.
    pub(crate) fn step(&self, text: &str) -> Result<()> {
        self.write(&format!("   {text}\n"))
    }

    /// What a program printed.
    pub(crate) fn quote(&self, command: &str, output: &str) -> Result<()> {
        self.write(&format!("\n   {}\n", self.paint("1", &format!("$ {command}"))))?;
        output.lines().try_for_each(|line| self.write(&format!("   {}\n", self.paint("2", line.trim_end()))))
    }

    pub(crate) fn table(&self, header: &[&str], rows: &[Vec<String>]) -> Result<()> {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(header.to_vec());
        for row in rows {
            table.add_row(row);
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        self.write("\n")?;
        for (number, line) in table.trim_fmt().lines().enumerate() {
            let line = if number == 0 { self.paint("1", line) } else { line.to_owned() };
            self.write(&format!("   {line}\n"))?;
        }
        Ok(())
    }

    /// What is to be said about a table.
    pub(crate) fn remark(&self, text: &str) -> Result<()> {
        self.write("\n")?;
        self.text(text)
    }

    /// `kept` in green or `BROKEN` in red.
    pub(crate) fn verdict(&self, kept: bool) -> String {
        if kept { self.paint("32", "kept") } else { self.paint("1;31", "BROKEN") }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }

    /// A reader who is gone ends the demo: with an error, so that everything is taken down.
    fn write(&self, text: &str) -> Result<()> {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("writing to the terminal")
    }
}
