//! What a host serves, as it says in the database, so that others can tell which tasks no host would run.

use serde::{Deserialize, Serialize};

/// Which queues and types a host serves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Serves {
    /// Its queues. None: all.
    pub queues: Option<Vec<String>>,
    /// Its routes, in their order: the first that takes a type decides.
    pub routes: Vec<ServedRoute>,
}

/// A route of a host.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ServedRoute {
    /// The types that it takes.
    #[serde(flatten)]
    pub types: ServedTypes,
    /// The plugin that runs them.
    pub plugin: String,
    /// Whether that plugin is there. Else its tasks wait.
    pub is_loaded: bool,
}

/// The types that a route takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServedTypes {
    /// This one.
    Type(String),
    /// Every one in which this regular expression of Rust's regex crate finds a match.
    Pattern(String),
}

impl Serves {
    pub(crate) fn to_text(&self) -> String {
        serde_json::to_string(self).expect("texts and truth values become JSON")
    }

    /// None if there is nothing, or what somebody wrote by hand: that host has not said what it serves.
    pub(crate) fn of_text(text: Option<&str>) -> Option<Self> {
        serde_json::from_str(text?).ok()
    }
}

/// How many tasks of a type wait or run in a queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QueuedType {
    /// The queue.
    pub queue: String,
    /// The type.
    #[serde(rename = "type")]
    pub task_type: String,
    /// The tasks.
    pub tasks: u64,
}

impl QueuedType {
    /// The most that [`crate::Operator::types`] answers.
    pub const MOST: u32 = 10_000;
}
