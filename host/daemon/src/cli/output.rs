//! Standard output for people: tables, moments, and text that a terminal cannot mistake for commands.

use std::io::{self, BufWriter, IsTerminal as _, StdoutLock, Write as _};

use comfy_table::{ContentArrangement, Table, presets};
use laelaps_queue::{Task, Timestamp};

use crate::log::is_unprintable;

/// Standard output, written in large pieces. A reader that goes away is an error of kind `BrokenPipe`, which ends the program in silence.
pub(super) struct Output {
    writer: BufWriter<StdoutLock<'static>>,
}

impl Output {
    pub(super) fn open() -> Self {
        Self { writer: BufWriter::new(io::stdout().lock()) }
    }

    pub(super) fn line(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.writer, "{line}")
    }

    /// Bytes as they are, without a line end.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.writer.write_all(bytes)
    }

    /// A value as one line of JSON.
    pub(super) fn json(&mut self, value: &impl serde::Serialize) -> anyhow::Result<()> {
        serde_json::to_writer(&mut self.writer, value).map_err(io::Error::from)?;
        Ok(self.writer.write_all(b"\n")?)
    }

    /// The rows of a table, as wide as the terminal allows; as wide as they are where there is none.
    pub(super) fn table(&mut self, table: &Table) -> io::Result<()> {
        for line in table.lines() {
            writeln!(self.writer, "{}", line.trim_end())?;
        }
        Ok(())
    }

    /// Show what was written so far, before something is said on standard error.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }

    /// Make sure that all of it was taken.
    pub(super) fn close(mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// An empty table.
pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    } else {
        table.force_no_tty();
    }
    table.set_header(header.iter().copied());
    if let Some(first) = table.column_mut(0) {
        first.set_padding((0, 1));
    }
    table
}

/// A number with its noun: `1 route`, `2 routes`.
pub(super) fn counted(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// A moment to the second, in UTC.
pub(super) fn moment(timestamp: Timestamp) -> String {
    match civil(timestamp) {
        Some(moment) => moment.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        None => format!("{} ms", timestamp.0),
    }
}

/// A moment in UTC. Not a [`jiff::Timestamp`], which ends a day before the year 9999 does.
fn civil(timestamp: Timestamp) -> Option<jiff::civil::DateTime> {
    let epoch = jiff::civil::date(1970, 1, 1).to_datetime(jiff::civil::Time::midnight());
    epoch.checked_add(jiff::SignedDuration::from_millis(timestamp.0)).ok()
}

/// When a task may run, in UTC to the second; in a word if that is up to somebody.
pub(super) fn run_at(task: &Task) -> String {
    if task.is_held() { "held".to_owned() } else { moment(task.run_at) }
}

/// A moment to the millisecond, in UTC, as JSON carries it.
pub(super) fn exact_moment(timestamp: Timestamp) -> String {
    match civil(timestamp) {
        Some(moment) => moment.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string(),
        None => format!("{} ms", timestamp.0),
    }
}

/// Text of a task or handler without control characters, which could move a terminal's cursor or colour what follows. Line ends and tabs
/// stay.
pub(super) fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\t' => printable.push(character),
            control if is_unprintable(control) => printable.extend(control.escape_default()),
            other => printable.push(other),
        }
    }
    printable
}

/// As [`printable`], in one line of at most `width` characters.
pub(super) fn in_one_line(text: &str, width: usize) -> String {
    let line = printable(text).replace(['\n', '\t'], " ");
    if line.chars().count() <= width {
        return line;
    }
    let mut cut: String = line.chars().take(width.saturating_sub(1)).collect();
    cut.push('…');
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handlers_text_cannot_command_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mred\r\nb\u{202e}"), "a\\u{1b}[31mred\\r\nb\\u{202e}");
    }

    #[test]
    fn moments_are_utc() {
        assert_eq!(moment(Timestamp(1_700_000_000_123)), "2023-11-14T22:13:20Z");
        assert_eq!(exact_moment(Timestamp(1_700_000_000_123)), "2023-11-14T22:13:20.123Z");
        assert_eq!(exact_moment(laelaps_queue::NewTask::RUN_AT_MAX), "9999-12-31T23:59:59.999Z");
        assert_eq!(moment(Timestamp(i64::MAX)), format!("{} ms", i64::MAX));
    }
}
