//! The entry `queues:`: which queues the host serves, and how much of itself it gives to each.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use laelaps_queue::{Claim, Kind, check_queue};
use serde_yaml::Value;

use super::document::Step;
use super::keys::{Keys, Unknown, describe};
use super::quantity::grouped;

const EXAMPLE: &str = "write, for example, `queues: {mail: {processors: 4}, default: {}}`";

/// Which queues a host serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Queues {
    /// All of them.
    #[default]
    All,
    /// These: 1 to [`Claim::QUEUES_MAX`], each once, in the order of the file.
    Named(Arc<[ServedQueue]>),
}

/// One queue that a host serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedQueue {
    /// Its name.
    pub name: String,
    /// The most tasks of it that this host holds at once, running or claimed ahead: 1 to the host's processors. None: no bound of its own.
    pub processors: Option<u32>,
}

impl fmt::Display for Queues {
    /// As people read it: `all`, or `mail (at most 4), default`.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Named(queues) = self else { return formatter.write_str("all") };
        for (index, queue) in queues.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(formatter, "{comma}{}", queue.name)?;
            if let Some(processors) = queue.processors {
                write!(formatter, " (at most {processors})")?;
            }
        }
        Ok(())
    }
}

/// Read the entry. `processors` is the host's number; None if the file has none that can be used.
pub(super) fn read(keys: &mut Keys<'_>, kind: &Kind, processors: Option<u32>) -> Queues {
    if !keys.is_named("queues") {
        keys.take("queues");
        return Queues::All;
    }
    if matches!(kind, Kind::PerfectQueue(_)) {
        keys.take("queues");
        keys.problem(
            "queues",
            "a table of PerfectQueue's is one queue".to_owned(),
            Some("leave it out; the host serves the table"),
        );
        return Queues::All;
    }
    let entries = match keys.take("queues") {
        Some(Value::Mapping(entries)) => entries,
        None => serde_yaml::Mapping::new(),
        Some(other) => {
            let found = describe(&other);
            keys.problem("queues", format!("found {found}, expected a mapping from names to settings"), Some(EXAMPLE));
            return Queues::All;
        }
    };
    if entries.is_empty() {
        let hint = format!("{EXAMPLE}; leave it out, and the host serves all queues");
        keys.problem("queues", "found no queue, expected one or more".to_owned(), Some(&hint));
        return Queues::All;
    }
    if entries.len() > Claim::QUEUES_MAX {
        let (found, most) = (grouped(entries.len() as u128), grouped(Claim::QUEUES_MAX as u128));
        let hint = "leave it out, and the host serves all queues; or divide them between hosts";
        keys.problem("queues", format!("found {found} queues, expected at most {most}"), Some(hint));
        return Queues::All;
    }
    let place = keys.place("queues");
    Queues::Named(entries.into_iter().filter_map(|(name, settings)| entry(keys, &place, &name, settings, processors)).collect())
}

fn entry(keys: &mut Keys<'_>, queues: &[Step], name: &Value, settings: Value, processors: Option<u32>) -> Option<ServedQueue> {
    let place = |key: String| [queues, &[Step::Key(key)]].concat();
    let Value::String(name) = name else {
        let (found, hint) = (describe(name), "write it in quotes".to_owned());
        let hint = matches!(name, Value::Number(_) | Value::Bool(_)).then_some(hint);
        keys.report.problem(&place(found.clone()), format!("found {found}, expected a queue's name"), hint);
        return None;
    };
    let place = place(name.clone());
    if let Err(problem) = check_queue(name) {
        let hint = "a name has 1 to 64 letters, digits and characters out of _-.:/".to_owned();
        keys.report.problem(&place, problem, Some(hint));
        return None;
    }
    let served = |processors| Some(ServedQueue { name: name.clone(), processors });
    match settings {
        Value::Null => served(None),
        Value::Mapping(settings) => {
            let mut settings = Keys::new(settings, place, keys.report);
            let share = settings.whole("processors", 1..=1024);
            if let (Some(share), Some(processors)) = (share, processors.filter(|most| share.is_some_and(|share| share > *most))) {
                let message = format!("found {share}, but the host has {processors}");
                settings.problem("processors", message, Some("lower it, leave it out, or raise `processors` of the host"));
            }
            settings.finish(Unknown::Refuse);
            served(share)
        }
        other => {
            let hint = other.as_u64().map(|number| format!("write `{name}: {{processors: {number}}}`"));
            let found = describe(&other);
            keys.report.problem(&place, format!("found {found}, expected a mapping with processors, or nothing"), hint);
            None
        }
    }
}

impl Queues {
    /// As a log line has it: the first of them.
    pub(crate) fn in_short(&self) -> String {
        const NAMED_MAX: usize = 20;
        let Self::Named(queues) = self else { return self.to_string() };
        let mut text = Self::Named(queues.iter().take(NAMED_MAX).cloned().collect()).to_string();
        if queues.len() > NAMED_MAX {
            let _ = write!(text, " and {} more", queues.len() - NAMED_MAX);
        }
        text
    }
}
