//! Columns of rows that anybody may have written: what cannot be read is never an error, it is put into words.

use sqlx::sqlite::SqliteRow;
use sqlx::{Row as _, TypeInfo as _, ValueRef as _};

use crate::{NewTask, check_queue};

/// Reads a row, and remembers what of it is not as it should be.
pub(super) struct Columns<'r> {
    row: &'r SqliteRow,
    problems: Vec<String>,
}

impl<'r> Columns<'r> {
    pub(super) fn of(row: &'r SqliteRow) -> Self {
        Self { row, problems: Vec::new() }
    }

    /// A text, or None for NULL. Bytes that are no text become U+FFFD.
    pub(super) fn maybe_text(&mut self, at: usize, name: &str) -> Option<String> {
        let bytes = self.bytes(at)?;
        Some(String::from_utf8(bytes).unwrap_or_else(|error| {
            self.problems.push(format!("the {name} is not UTF-8"));
            String::from_utf8_lossy(error.as_bytes()).into_owned()
        }))
    }

    /// A text; NULL is empty.
    pub(super) fn text(&mut self, at: usize, name: &str) -> String {
        self.maybe_text(at, name).unwrap_or_default()
    }

    /// A queue's name as the tables have it: '' is the default one.
    pub(super) fn queue(&mut self, at: usize) -> String {
        let name = self.text(at, "queue");
        if name == NewTask::DEFAULT_QUEUE {
            self.problems.push(format!("the queue is {name:?}; in the tables the default queue is ''"));
        } else if !name.is_empty()
            && let Err(problem) = check_queue(&name)
        {
            self.problems.push(problem);
        }
        name
    }

    /// A whole number, or None for NULL.
    pub(super) fn maybe_whole(&mut self, at: usize, name: &str) -> Option<i64> {
        match self.type_name(at).as_str() {
            "NULL" => return None,
            "INTEGER" | "BOOLEAN" => {}
            other => self.problems.push(format!("the {name} is {other}, not a whole number")),
        }
        // SQLite makes a number of everything.
        self.row.try_get_unchecked(at).ok().flatten()
    }

    /// A whole number; NULL is 0.
    pub(super) fn whole(&mut self, at: usize, name: &str) -> i64 {
        self.maybe_whole(at, name).unwrap_or_default()
    }

    /// A count, held to its range, or None for NULL.
    pub(super) fn maybe_count(&mut self, at: usize, name: &str) -> Option<u32> {
        let number = self.maybe_whole(at, name)?;
        Some(u32::try_from(number).unwrap_or_else(|_| {
            self.problems.push(format!("the {name} is {number}; 0 to {} can be", u32::MAX));
            if number < 0 { 0 } else { u32::MAX }
        }))
    }

    /// A count; NULL is 0.
    pub(super) fn count(&mut self, at: usize, name: &str) -> u32 {
        self.maybe_count(at, name).unwrap_or_default()
    }

    /// The bytes of whatever it is, or None for NULL.
    pub(super) fn bytes(&self, at: usize) -> Option<Vec<u8>> {
        self.row.try_get_unchecked::<Option<Vec<u8>>, _>(at).ok().flatten()
    }

    /// What sort of value it is, as SQLite calls it.
    pub(super) fn type_name(&self, at: usize) -> String {
        let value = self.row.try_get_raw(at);
        value.map_or_else(
            |_| "NULL".to_owned(),
            |value| if value.is_null() { "NULL".to_owned() } else { value.type_info().name().to_owned() },
        )
    }

    pub(super) fn complain(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// What is wrong, in words.
    pub(super) fn problem(self) -> Option<String> {
        (!self.problems.is_empty()).then(|| self.problems.join("; "))
    }
}

/// Text as it is to be shown, whatever its bytes are.
pub(super) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
