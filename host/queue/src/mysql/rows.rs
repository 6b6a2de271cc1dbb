//! Sets as one parameter: JSON that the server unfolds with JSON_TABLE, and bytes in parts beside it.

/// A set as one parameter: a JSON array.
pub(super) fn json<T: serde::Serialize>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<T> = items.into_iter().collect();
    serde_json::to_string(&items).unwrap_or_else(|error| unreachable!("numbers and texts are JSON: {error}"))
}

/// A set as several parameters: each of at most so many bytes, unless one item alone has more. None for an empty set.
pub(super) fn json_in_chunks<T: serde::Serialize>(items: impl IntoIterator<Item = T>, bytes_max: usize) -> Vec<String> {
    let mut chunks: Vec<String> = Vec::new();
    for item in items {
        let item = serde_json::to_string(&item).unwrap_or_else(|error| unreachable!("numbers and texts are JSON: {error}"));
        match chunks.last_mut().filter(|chunk| chunk.len() + item.len() + 2 <= bytes_max) {
            Some(chunk) => {
                chunk.push(',');
                chunk.push_str(&item);
            }
            None => {
                if let Some(full) = chunks.last_mut() {
                    full.push(']');
                }
                chunks.push(format!("[{item}"));
            }
        }
    }
    if let Some(last) = chunks.last_mut() {
        last.push(']');
    }
    chunks
}

/// A number of tasks as the database counts.
pub(super) fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The most bytes of one parameter, which a server takes by default (max_allowed_packet of 16 MiB).
const PARAMETER_BYTES: usize = 8 << 20;
/// The least that a server has to take (its own default is at least 4 MiB).
pub(crate) const PACKET_BYTES_MIN: usize = 128 << 10;
/// Of a packet, what is left to a statement's text and its short parameters.
const STATEMENT_BYTES: usize = 12 << 10;
/// The most rows of one statement.
const STATEMENT_ROWS: usize = 1_000;

/// The most bytes of one parameter on a server that takes packets of this size. A statement has two large ones at most.
pub(super) fn parameter_bytes(packet_bytes: usize) -> usize {
    (packet_bytes.max(PACKET_BYTES_MIN) - STATEMENT_BYTES).div_euclid(2).min(PARAMETER_BYTES)
}

/// Bytes to be stored in parts, as many statements as they need.
pub(super) struct Parts {
    statements: Vec<Statement>,
    /// The most bytes of one parameter.
    bytes_max: usize,
}

/// Task, part, size of the whole (on the first part), place of its first byte, length.
type Part = (i64, usize, usize, usize, usize);

#[derive(Default)]
struct Statement {
    parts: Vec<Part>,
    bytes: Vec<u8>,
}

impl Parts {
    /// For statements whose parameters have at most so many bytes.
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { statements: Vec::new(), bytes_max }
    }

    /// Add what a task has; answers in how many parts. `size` is noted on the first one.
    pub(super) fn push(&mut self, task: i64, size: usize, bytes: &[u8]) -> usize {
        let empty: &[u8] = &[];
        // So that two parts of two tasks go together. A part's row is shorter than 100 bytes.
        let (part_bytes, rows_max) = (self.bytes_max / 2, STATEMENT_ROWS.min(self.bytes_max / 100));
        let chunks = bytes.chunks(part_bytes).chain(bytes.is_empty().then_some(empty));
        let count = bytes.len().div_ceil(part_bytes).max(1);
        for (part, chunk) in chunks.enumerate() {
            let has_room =
                |statement: &Statement| statement.parts.len() < rows_max && statement.bytes.len() + chunk.len() <= self.bytes_max;
            if !self.statements.last().is_some_and(has_room) {
                self.statements.push(Statement::default());
            }
            let Some(statement) = self.statements.last_mut() else { continue };
            let size = if part == 0 { size } else { 0 };
            statement.parts.push((task, part, size, statement.bytes.len() + 1, chunk.len()));
            statement.bytes.extend_from_slice(chunk);
        }
        count
    }

    /// For each statement: the bytes, and the parts as [`PARTS`] unfolds them.
    pub(super) fn into_statements(self) -> impl Iterator<Item = (Vec<u8>, String)> {
        self.statements.into_iter().map(|statement| (statement.bytes, json(statement.parts)))
    }
}

/// The rows of a statement's parts; the parameter is what [`Parts::into_statements`] answers.
macro_rules! parts {
    () => {
        "JSON_TABLE(?, '$[*]' COLUMNS (task BIGINT PATH '$[0]', part INT PATH '$[1]', size BIGINT PATH '$[2]', start BIGINT PATH '$[3]',
            length BIGINT PATH '$[4]')) AS s"
    };
}
pub(super) use parts;

/// The rows of a set of numbers, in their order.
macro_rules! ids {
    () => {
        "JSON_TABLE(?, '$[*]' COLUMNS (place FOR ORDINALITY, id BIGINT PATH '$')) AS s"
    };
}
pub(super) use ids;

/// The rows of a set of places: a turn, or the time of what is scheduled, and the task.
macro_rules! places {
    () => {
        "JSON_TABLE(?, '$[*]' COLUMNS (at BIGINT PATH '$[0]', task BIGINT PATH '$[1]')) AS s"
    };
}
pub(super) use places;

/// What every change of tasks' rows sets as well. MariaDB holds each change of a row to all constraints of the table: a priority that has got around
/// its own would refuse the change, and with it that of other tasks in the statement. The turn stays the same.
macro_rules! priority_in_range {
    () => {
        "priority = LEAST(GREATEST(priority, -100), 100)"
    };
}
pub(super) use priority_in_range;

/// The rows of a set of names.
macro_rules! names {
    () => {
        "JSON_TABLE(?, '$[*]' COLUMNS (name VARCHAR(255) CHARACTER SET utf8mb4 PATH '$')) AS s"
    };
}
pub(super) use names;

/// The rows of a set for a statement that locks what it joins to them, FOR UPDATE or LOCK IN SHARE MODE. MySQL refuses to lock beside a table
/// function (3569: it "appears in multiple locking clauses"), and locks beside a subquery.
macro_rules! lockable {
    ($($set:tt)+) => {
        concat!("(SELECT s.* FROM ", $($set)+, ") AS s")
    };
}
pub(super) use lockable;

/// Bytes that came back in parts, in whatever order.
#[derive(Default)]
pub(super) struct Joined(Vec<(u16, Vec<u8>)>);

impl Joined {
    pub(super) fn add(&mut self, part: u16, bytes: Vec<u8>) {
        self.0.push((part, bytes));
    }

    pub(super) fn into_bytes(mut self) -> Vec<u8> {
        if self.0.len() == 1 {
            return self.0.pop().map(|(_, bytes)| bytes).unwrap_or_default();
        }
        self.0.sort_unstable_by_key(|(part, _)| *part);
        self.0.into_iter().flat_map(|(_, bytes)| bytes).collect()
    }
}
