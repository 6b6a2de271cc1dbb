//! The task as its handler sees it.

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// One attempt of one task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The name under which the task was submitted; unique in its queue.
    pub key: String,
    /// What sort of work this is. The producer calls it the task's type.
    pub kind: String,
    /// The task's data: a JSON object in UTF-8.
    pub data: Vec<u8>,
    /// The user on whose account the task runs, if the producer named one.
    pub user: Option<String>,
    /// The number of this attempt: 1 on the first. Attempts that were released do not count.
    pub attempt: u32,
}

impl Task {
    /// The task's data as a type of yours.
    ///
    /// # Errors
    /// Code `bad-data`, rejecting, naming the member that does not fit.
    pub fn data<T: DeserializeOwned>(&self) -> Result<T> {
        read("bad-data", "data", &self.data)
    }
}

/// Reads JSON; what does not fit is rejected under `code` with the path to it, which starts with `root`.
///
/// # Errors
/// `code`, rejecting.
pub(crate) fn read<T: DeserializeOwned>(code: &str, root: &str, json: &[u8]) -> Result<T> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = match error.path().to_string() {
            // The path of what is missing at the top, or of text that is no JSON at all.
            path if path == "." || path == "?" => root.to_owned(),
            path if path.starts_with('[') => format!("{root}{path}"),
            path => format!("{root}.{path}"),
        };
        Error::reject(code, format_args!("{path}: {}", error.inner()))
    })?;
    deserializer.end().map_err(|error| Error::reject(code, format_args!("{root}: {error}")))?;
    Ok(value)
}
