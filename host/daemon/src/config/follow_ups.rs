//! The entry `follow_ups:` of a route's grants.

use laelaps_queue::{Claim, NewTask, check_queue};
use serde_yaml::Value;

use super::document::Step;
use super::keys::{Keys as Entries, Unknown, describe, mismatch};
use crate::plugin::{FollowUps, Keys, Queues, Types, Users};

/// The most types of a grant.
const TYPES_MAX: usize = 256;

/// What is granted; a key that is left out stays as `defaults` has it.
pub(super) fn read(mut keys: Entries<'_>, defaults: &FollowUps) -> FollowUps {
    let granted = FollowUps {
        types: types(&mut keys).unwrap_or_else(|| defaults.types.clone()),
        users: users(&mut keys).unwrap_or(defaults.users),
        keys: prefix(&mut keys).unwrap_or_else(|| defaults.keys.clone()),
        queues: queues(&mut keys).unwrap_or_else(|| defaults.queues.clone()),
        depth: keys.whole("depth", 0..=1_000).unwrap_or(defaults.depth),
        waiting: keys.whole("waiting", 0..=1_000_000).unwrap_or(defaults.waiting),
    };
    keys.finish(Unknown::Refuse);
    granted
}

fn types(keys: &mut Entries<'_>) -> Option<Types> {
    const EXPECTED: &str = "a list of task types, or `any`";
    let list = match keys.take("types")? {
        Value::String(word) if word == "any" => return Some(Types::Any),
        Value::Sequence(list) if list.len() <= TYPES_MAX => list,
        Value::Sequence(list) => {
            keys.problem("types", format!("found {} entries, expected at most {TYPES_MAX}", list.len()), None);
            return None;
        }
        other => {
            let hint = other.as_str().map(|word| format!("write `types: [{word}]` for one type"));
            keys.problem("types", format!("found {}, expected {EXPECTED}", describe(&other)), hint.as_deref());
            return None;
        }
    };
    let is_type = |name: &&str| NewTask::new("key", *name, "").check().is_ok();
    let mut types = Vec::with_capacity(list.len());
    for (index, entry) in list.into_iter().enumerate() {
        let mut place = keys.place("types");
        place.push(Step::Entry(index));
        match entry.as_str().filter(is_type) {
            Some(name) if name.len() > 2 && name.starts_with('/') && name.ends_with('/') => {
                let hint = "name each type; patterns do not count here".to_owned();
                keys.report.problem(&place, format!("found {name:?}, expected a task type"), Some(hint));
            }
            Some(name) => types.push(name.to_owned()),
            None => mismatch(keys.report, &place, &entry, "a task type: a text of 1 to 255 bytes"),
        }
    }
    Some(Types::Listed(types))
}

fn users(keys: &mut Entries<'_>) -> Option<Users> {
    match keys.take("users")? {
        Value::String(word) if word == "own" => Some(Users::Own),
        Value::String(word) if word == "any" => Some(Users::Any),
        other => {
            let hint = "`own` is the user of the task that submits, within its limit; `any` is every user, and none";
            keys.problem("users", format!("found {}, expected `own` or `any`", describe(&other)), Some(hint));
            None
        }
    }
}

fn prefix(keys: &mut Entries<'_>) -> Option<Keys> {
    const EXPECTED: &str = "the beginning of the keys (a text of 1 to 255 bytes), or `any`";
    match keys.take("keys")? {
        Value::String(word) if word == "any" => Some(Keys::Any),
        Value::String(prefix) if NewTask::new(prefix.as_str(), "type", "").check().is_ok() => Some(Keys::Prefix(prefix)),
        other => {
            let hint = other.is_sequence().then_some("one beginning, not a list of them");
            keys.problem("keys", format!("found {}, expected {EXPECTED}", describe(&other)), hint);
            None
        }
    }
}

fn queues(keys: &mut Entries<'_>) -> Option<Queues> {
    const EXPECTED: &str = "a list of queues, `own` or `any`";
    let list = match keys.take("queues")? {
        Value::String(word) if word == "own" => return Some(Queues::Own),
        Value::String(word) if word == "any" => return Some(Queues::Any),
        Value::Sequence(list) if list.len() <= Claim::QUEUES_MAX => list,
        Value::Sequence(list) => {
            keys.problem("queues", format!("found {} entries, expected at most {}", list.len(), Claim::QUEUES_MAX), None);
            return None;
        }
        other => {
            let hint = other.as_str().map(|word| format!("write `queues: [{word}]` for one queue"));
            keys.problem("queues", format!("found {}, expected {EXPECTED}", describe(&other)), hint.as_deref());
            return None;
        }
    };
    let mut queues = Vec::with_capacity(list.len());
    for (index, entry) in list.into_iter().enumerate() {
        let mut place = keys.place("queues");
        place.push(Step::Entry(index));
        match entry {
            Value::String(name) => match check_queue(&name) {
                Ok(()) => queues.push(name),
                Err(problem) => keys.report.problem(&place, problem, None),
            },
            other => mismatch(keys.report, &place, &other, "a queue's name"),
        }
    }
    Some(Queues::Listed(queues))
}
