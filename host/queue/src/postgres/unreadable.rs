//! Rows that nobody can use: with numbers or names that no task can have, or data that is damaged. Their tasks are set aside as failed, so
//! that they stop nobody else.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use super::session::Shared;
use super::settle::Group;
use crate::task::check_queue;
use crate::{Attempt, ClaimedTask, Event, FailureKind, LeaseRef, NewTask, Policy, Result, Settlement};

/// The short names of the failures of tasks that were set aside: their rows cannot be read, or only their data.
pub(super) const CODES: [&str; 2] = ["unreadable", "damaged-data"];

/// The range of counters.
pub(super) const COUNTER: RangeInclusive<i64> = 0..=i32::MAX as i64;
/// The range of a user's limit.
pub(super) const MAX_RUNNING: RangeInclusive<i64> = 0..=u32::MAX as i64;
/// The range of a task's most attempts.
pub(super) const MAX_ATTEMPTS: RangeInclusive<i64> = 1..=u32::MAX as i64;
/// The range of moments: from the year 1 to the moment of held tasks.
pub(super) const MOMENT: RangeInclusive<i64> = -62_135_596_800_000..=NewTask::HELD_AT.0;
/// The range of the size of data.
pub(super) const BYTES: RangeInclusive<i64> = 0..=NewTask::DATA_BYTES_MAX as i64;

/// A claimed task that nobody can use.
pub(super) struct Broken {
    pub(super) lease_ref: LeaseRef,
    attempt: Attempt,
    code: &'static str,
    problem: String,
}

impl Broken {
    /// A task whose data is damaged.
    pub(super) fn by_data(task: &ClaimedTask, problem: String) -> Self {
        let problem = format!("the stored data cannot be used: {problem}");
        Self { lease_ref: task.lease_ref, attempt: Attempt::of(task), code: CODES[1], problem }
    }

    /// A task whose row cannot be read.
    pub(super) fn by_row(lease_ref: LeaseRef, problem: &str) -> Self {
        let id = lease_ref.task.0;
        let attempt = Attempt {
            attempt: 1,
            max_attempts: None,
            releases: 0,
            lost: 0,
            lost_alone: 0,
            alone: false,
            lost_for: Duration::ZERO,
        };
        let problem = format!(
            "the row of task {id} cannot be read: {problem}; `laelaps show --id {id}` shows what can, `laelaps cancel --id {id}` removes it"
        );
        Self { lease_ref, attempt, code: CODES[0], problem }
    }
}

/// Whether a failure of this short name is one of a task that was set aside.
pub(super) fn is_aside(code: Option<&str>) -> bool {
    code.is_some_and(|code| CODES.contains(&code))
}

/// What is wrong with a row: the first of the names that no task can have, its queue, or the first of the numbers.
pub(super) fn problem(
    names: [(&str, &str); 3],
    queue: &str,
    numbers: impl IntoIterator<Item = (&'static str, Option<i64>, RangeInclusive<i64>)>,
) -> Option<String> {
    let wrong_name = names.into_iter().find_map(|(what, name)| name_problem(what, name));
    wrong_name.or_else(|| queue_problem(queue)).or_else(|| {
        let wrong = numbers.into_iter().find(|(_, number, range)| number.is_some_and(|number| !range.contains(&number)));
        wrong.map(|(what, number, _)| format!("{what} is {}", number.unwrap_or_default()))
    })
}

fn queue_problem(queue: &str) -> Option<String> {
    match queue {
        "" => None,
        // Nobody would find it under this name.
        NewTask::DEFAULT_QUEUE => Some(format!("the queue is {queue:?}, which stands as '' in the tables")),
        queue => check_queue(queue).err(),
    }
}

fn name_problem(what: &str, name: &str) -> Option<String> {
    if name.is_empty() {
        // No user is the empty one.
        return (what != "user").then(|| format!("the {what} is empty"));
    }
    if name.len() > NewTask::NAME_BYTES_MAX {
        return Some(format!("the {what} has {} bytes", name.len()));
    }
    let character = name.chars().find(|character| character.is_control())?;
    Some(format!("the {what} contains the control character {character:?}"))
}

/// Fail claimed tasks that nobody can use.
pub(super) async fn set_aside(shared: &Arc<Shared>, broken: Vec<Broken>) -> Result<()> {
    if broken.is_empty() {
        return Ok(());
    }
    let policy = Policy::default();
    let mut settlements = Vec::with_capacity(broken.len());
    for Broken { lease_ref, attempt, code, problem } in broken {
        tracing::error!(task = lease_ref.task.0, problem, "a task cannot be used; it is set aside as failed");
        let event = Event::Failure { kind: FailureKind::Reject, code: code.to_owned(), message: problem };
        settlements.push(Settlement::of(lease_ref, event, attempt, &policy, 0.0, None, Vec::new()));
    }
    Group::new(&settlements)?.write_within(shared, "setting aside unreadable tasks").await.map(drop)
}
