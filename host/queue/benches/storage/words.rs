//! What the bench was asked for: words behind `--`.

pub(crate) const DATABASES: [&str; 3] = ["sqlite", "postgres", "mariadb"];
pub(crate) const PARTS: [&str; 8] = ["submit", "producers", "path", "backlog", "queues", "finished", "pinned", "perfectqueue"];
const OPTIONS: [&str; 3] = ["quick", "--json", "--check"];

/// What was asked for.
#[derive(Debug)]
pub(crate) struct Words {
    databases: Vec<&'static str>,
    parts: Vec<&'static str>,
    /// Smaller sizes and fewer rounds: shows that it works, and says little about speed.
    pub(crate) quick: bool,
    /// One JSON object on the standard output; the text goes to the standard error.
    pub(crate) json: bool,
    /// A promise that is not kept is an error.
    pub(crate) check: bool,
}

impl Words {
    /// # Errors
    /// In words, if one is not known.
    pub(crate) fn read(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut read = Self { databases: Vec::new(), parts: Vec::new(), quick: false, json: false, check: false };
        // Cargo itself adds --bench.
        for word in words.filter(|word| word != "--bench") {
            let is_word = |known: &&&str| **known == word;
            if let Some(database) = DATABASES.iter().find(is_word) {
                read.databases.push(database);
            } else if let Some(part) = PARTS.iter().find(is_word) {
                read.parts.push(part);
            } else {
                match word.as_str() {
                    "quick" => read.quick = true,
                    "--json" => read.json = true,
                    "--check" => read.check = true,
                    _ => return Err(format!("\"{word}\" is not a word of this bench; it knows {}", Self::known())),
                }
            }
        }
        Ok(read)
    }

    fn known() -> String {
        [DATABASES.as_slice(), &PARTS, &OPTIONS].concat().join(", ")
    }

    pub(crate) fn wants_database(&self, database: &str) -> bool {
        self.databases.is_empty() || self.databases.contains(&database)
    }

    pub(crate) fn wants(&self, part: &str) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    /// Rounds in which candidates take turns.
    pub(crate) fn rounds(&self) -> usize {
        if self.quick { 2 } else { 3 }
    }

    /// `full`, or a tenth of it.
    pub(crate) fn scaled(&self, full: usize) -> usize {
        if self.quick { full / 10 } else { full }
    }
}
