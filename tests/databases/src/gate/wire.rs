//! Just enough of two protocols to see where a statement begins: what a client sends is cut into units, each answered by the server as a whole.

use std::collections::HashMap;

/// What a server and its clients speak, unencrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// PostgreSQL's, version 3.
    Postgres,
    /// MySQL's and MariaDB's, uncompressed.
    MySql,
}

/// What a client sends before it waits for the server.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) bytes: Vec<u8>,
    /// The statement that it runs, if it runs one: not what only prepares one, says who the client is, or says goodbye.
    pub(super) statement: Option<String>,
    /// The statement that it prepares. MySQL's server answers with the number that it has from then on.
    pub(super) prepares: Option<String>,
}

/// Cuts what one client sends.
#[derive(Debug)]
pub(super) struct Splitter {
    protocol: Protocol,
    bytes: Vec<u8>,
    /// The bytes of the unit so far that were looked at.
    looked: usize,
    /// PostgreSQL: the client has said who it is.
    introduced: bool,
    /// PostgreSQL: the prepared statements by their names.
    named: HashMap<Vec<u8>, String>,
    /// PostgreSQL: the statement that is bound, and the one that is run.
    bound: Option<String>,
    statement: Option<String>,
}

impl Splitter {
    pub(super) fn new(protocol: Protocol) -> Self {
        Self { protocol, bytes: Vec::new(), looked: 0, introduced: false, named: HashMap::new(), bound: None, statement: None }
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next unit that is there in full. `numbered` knows MySQL's prepared statements.
    pub(super) fn next(&mut self, numbered: impl Fn(u32) -> Option<String>) -> Option<Unit> {
        match self.protocol {
            Protocol::Postgres => self.next_of_postgres(),
            Protocol::MySql => self.next_of_mysql(numbered),
        }
    }

    fn take(&mut self, length: usize) -> Unit {
        let rest = self.bytes.split_off(length);
        self.looked = 0;
        Unit { bytes: std::mem::replace(&mut self.bytes, rest), statement: self.statement.take(), prepares: None }
    }

    fn next_of_postgres(&mut self) -> Option<Unit> {
        if !self.introduced {
            let length = usize::try_from(number_at(&self.bytes, 0)?).ok()?;
            // Requests for encryption come first; the server refuses them with one byte.
            let is_request = matches!(number_at(&self.bytes, 4)?, 80_877_103 | 80_877_104);
            if self.bytes.len() < length {
                return None;
            }
            self.introduced = !is_request;
            return Some(self.take(length));
        }
        loop {
            let message = &self.bytes[self.looked..];
            let kind = *message.first()?;
            let length = 1 + usize::try_from(number_at(message, 1)?).ok()?;
            let body = message.get(5..length)?;
            match kind {
                b'P' => {
                    let (name, rest) = text(body)?;
                    let statement = text(rest).map(|(statement, _)| words(statement))?;
                    self.named.insert(name.to_vec(), statement);
                }
                b'B' => {
                    let (name, _) = text(text(body)?.1)?;
                    self.bound = self.named.get(name).cloned();
                }
                b'E' => self.statement = Some(self.bound.take().unwrap_or_else(|| "?".to_owned())),
                b'Q' => self.statement = Some(words(text(body)?.0)),
                _ => {}
            }
            self.looked += length;
            // The client waits after these, or has nothing more to say.
            if matches!(kind, b'S' | b'Q' | b'H' | b'p' | b'X') {
                return Some(self.take(self.looked));
            }
        }
    }

    fn next_of_mysql(&mut self, numbered: impl Fn(u32) -> Option<String>) -> Option<Unit> {
        const HEADER: usize = 4;
        let header: [u8; HEADER] = self.bytes.get(..HEADER)?.try_into().ok()?;
        let length = HEADER + usize::try_from(u32::from_le_bytes([header[0], header[1], header[2], 0])).ok()?;
        let payload = self.bytes.get(HEADER..length)?;
        let mut prepares = None;
        // A command begins with packet 0; others are the rest of a long one, or part of the greeting.
        if header[3] == 0 {
            match payload.split_first() {
                Some((0x03, statement)) => self.statement = Some(words(statement)),
                Some((0x16, statement)) => prepares = Some(words(statement)),
                Some((0x17, run)) => {
                    let number = run.get(..4).and_then(|number| number.try_into().ok()).map(u32::from_le_bytes);
                    self.statement = Some(number.and_then(numbered).unwrap_or_else(|| "?".to_owned()));
                }
                _ => {}
            }
        }
        Some(Unit { prepares, ..self.take(length) })
    }
}

/// The number under which MySQL's server has prepared a statement, from its answer.
pub(super) fn prepared_number(answer: &[u8]) -> Option<u32> {
    let payload = answer.get(4..)?;
    (payload.first() == Some(&0)).then(|| payload.get(1..5)?.try_into().ok().map(u32::from_le_bytes))?
}

/// The number of the session in the greeting of MySQL's server.
pub(super) fn session_number(greeting: &[u8]) -> Option<u32> {
    let version = greeting.get(5..)?;
    let end = version.iter().position(|byte| *byte == 0)?;
    version.get(end + 1..end + 5)?.try_into().ok().map(u32::from_le_bytes)
}

fn number_at(bytes: &[u8], place: usize) -> Option<u32> {
    bytes.get(place..place + 4)?.try_into().ok().map(u32::from_be_bytes)
}

/// What stands before the first zero byte, and what follows it.
fn text(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    Some((&bytes[..end], &bytes[end + 1..]))
}

/// A statement for people: on one line, and not all of a long one.
fn words(statement: &[u8]) -> String {
    const CHARACTERS_MAX: usize = 160;
    let text = String::from_utf8_lossy(statement);
    let line: Vec<&str> = text.split_whitespace().collect();
    line.join(" ").chars().take(CHARACTERS_MAX).collect()
}
