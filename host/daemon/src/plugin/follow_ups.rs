//! Which follow-up tasks a handler may submit, decided in the call from facts alone.
//!
//! A follow-up is stored with its host's rights, so a handler that may submit anything has more than it was granted: it can let another
//! plugin with more grants work for it, take a key before the producer does, spend another user's share, or multiply without end.

use std::sync::Arc;

use laelaps_queue::{ClaimedTask, Descent, NewTask, Timestamp};

/// What follow-up tasks an attempt may submit. How many, and with how much data, is in [`super::Limits`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FollowUps {
    /// Of which types.
    pub types: Types,
    /// On whose account.
    pub users: Users,
    /// Under which keys.
    pub keys: Keys,
    /// In which queues.
    pub queues: Queues,
    /// The deepest generation: see [`Descent`]. 0: none, except one that waits for [`Descent::FRESH_AFTER`].
    pub depth: u32,
    /// The most follow-ups of one root that have not ended, other than the task that submits. Attempts that run at the same moment on several
    /// hosts do not see each other's, so that it can be exceeded by what they submit together.
    pub waiting: u32,
}

/// Types of follow-ups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Types {
    /// Those that the host's routes lead to the same plugin.
    Own,
    /// These.
    Listed(Vec<String>),
    /// All.
    Any,
}

/// Users of follow-ups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Users {
    /// The task's own, within its limit. A follow-up without a user gets both.
    Own,
    /// All, and none.
    Any,
}

/// Keys of follow-ups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keys {
    /// Those that begin with the plugin's name and a slash, and those that extend the task's own.
    Own,
    /// Those that begin like this, and those that extend the task's own.
    Prefix(String),
    /// All.
    Any,
}

/// Queues of follow-ups. One that names none waits in its task's own, whatever is granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Queues {
    /// The task's own.
    Own,
    /// These, and the task's own.
    Listed(Vec<String>),
    /// All.
    Any,
}

impl FollowUps {
    /// What PerfectQueue's handlers could do: anything. Only where the queue keeps them do depth and number count.
    #[must_use]
    pub fn of_perfectqueue() -> Self {
        Self { types: Types::Any, users: Users::Any, keys: Keys::Any, ..Self::default() }
    }
}

impl Default for FollowUps {
    fn default() -> Self {
        Self { types: Types::Own, users: Users::Own, keys: Keys::Own, queues: Queues::Own, depth: 10, waiting: 10_000 }
    }
}

/// The facts about the task whose attempt submits.
#[derive(Clone, Debug)]
pub(super) struct Parent {
    pub(super) plugin: Arc<str>,
    pub(super) key: String,
    pub(super) user: Option<String>,
    pub(super) max_running: Option<u32>,
    pub(super) queue: String,
    pub(super) descent: Descent,
    pub(super) claimed_at: Timestamp,
}

impl Parent {
    pub(super) fn of(task: &ClaimedTask, plugin: Arc<str>) -> Self {
        Self {
            plugin,
            key: task.key.clone(),
            user: task.user.clone(),
            max_running: task.max_running,
            queue: task.queue.clone(),
            descent: task.descent,
            claimed_at: task.claimed_at,
        }
    }
}

/// Why a follow-up is not taken, in the contract's words.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) code: &'static str,
    pub(super) message: String,
}

impl Refused {
    fn not_granted(message: String) -> Self {
        Self { code: "not-granted", message }
    }
}

impl FollowUps {
    /// The follow-up as it is to be stored, or why it is not granted. `leads_here` tells whether the host's routes lead a type to the plugin.
    ///
    /// # Errors
    /// `not-granted` for its type, key, user or queue, `too-deep` for its generation.
    pub(super) fn grant(
        &self,
        parent: &Parent,
        task: NewTask,
        leads_here: impl FnOnce(&str) -> bool,
    ) -> Result<NewTask, Refused> {
        self.check_type(&task.task_type, leads_here)?;
        self.check_key(parent, &task.key)?;
        let task = self.of_user(parent, task)?;
        let queue = self.queue(parent, task.queue)?;
        let descent = parent.descent.of_follow_up(task.run_at, parent.claimed_at);
        if descent.depth > self.depth {
            let message = format!(
                "the follow-up would be generation {} of follow-ups, and follow_ups of the route's grants allows {}; \
                 one that is due {} s after its task began starts again",
                descent.depth,
                self.depth,
                Descent::FRESH_AFTER.as_secs()
            );
            return Err(Refused { code: "too-deep", message });
        }
        Ok(NewTask { queue: Some(queue), descent: Some(descent), ..task })
    }

    fn check_type(&self, task_type: &str, leads_here: impl FnOnce(&str) -> bool) -> Result<(), Refused> {
        let problem = match &self.types {
            Types::Any => return Ok(()),
            Types::Listed(types) if types.iter().any(|listed| listed == task_type) => return Ok(()),
            Types::Listed(_) => "is not among the types",
            Types::Own if leads_here(task_type) => return Ok(()),
            Types::Own => "is not one of a route to the same plugin, and not among the types",
        };
        Err(Refused::not_granted(format!("the type {task_type:?} {problem} that follow_ups of the route's grants names")))
    }

    fn check_key(&self, parent: &Parent, key: &str) -> Result<(), Refused> {
        let own_prefix;
        let prefix = match &self.keys {
            Keys::Any => return Ok(()),
            Keys::Prefix(prefix) => prefix,
            Keys::Own => {
                own_prefix = format!("{}/", parent.plugin);
                &own_prefix
            }
        };
        if key.starts_with(prefix.as_str()) || extends(key, &parent.key) {
            return Ok(());
        }
        let message = format!(
            "the key {key:?} begins neither with {prefix:?} nor with the task's own key and a sign that is no letter or digit; \
             follow_ups of the route's grants can name another beginning"
        );
        Err(Refused::not_granted(message))
    }

    fn of_user(&self, parent: &Parent, task: NewTask) -> Result<NewTask, Refused> {
        let given = task.user.as_deref().filter(|user| !user.is_empty());
        if self.users == Users::Any {
            return Ok(task);
        }
        if given.is_some() && given != parent.user.as_deref() {
            let message =
                "the user is another than the task's own; follow_ups of the route's grants does not allow that".to_owned();
            return Err(Refused::not_granted(message));
        }
        if parent.user.is_none() {
            return Ok(task);
        }
        // Without the task's own limit a follow-up would run beside all that its user has.
        if let (Some(asked), Some(own)) = (task.max_running, parent.max_running)
            && asked > own
        {
            let message = format!(
                "max-running is {asked}, more than the {own} of the task's own user; follow_ups of the route's grants does not allow that"
            );
            return Err(Refused::not_granted(message));
        }
        Ok(NewTask { user: parent.user.clone(), max_running: task.max_running.or(parent.max_running), ..task })
    }

    /// The queue in which it waits.
    fn queue(&self, parent: &Parent, asked: Option<String>) -> Result<String, Refused> {
        let Some(asked) = asked.filter(|asked| *asked != parent.queue) else { return Ok(parent.queue.clone()) };
        let is_granted = match &self.queues {
            Queues::Own => false,
            Queues::Listed(queues) => queues.contains(&asked),
            Queues::Any => true,
        };
        if is_granted {
            return Ok(asked);
        }
        let own = &parent.queue;
        let message = format!(
            "the queue {asked:?} is neither the task's own, {own:?}, nor among those that follow_ups of the route's grants names"
        );
        Err(Refused::not_granted(message))
    }

    /// How many may be submitted where so many of the same root have not ended.
    pub(super) fn room(&self, relatives: u32) -> u32 {
        self.waiting.saturating_sub(relatives)
    }

    /// Why none may be submitted where there is no room.
    pub(super) fn too_many_waiting(&self) -> Refused {
        let message = format!(
            "{} follow-ups that come from the same task have not ended, as many as follow_ups of the route's grants allows",
            self.waiting
        );
        Refused { code: "too-many-waiting", message }
    }
}

/// Whether a key is another one, or that one and more behind a sign that is no letter or digit: `invoice-7` is no extension of `invoice-`
/// or `invo`, nor `invoice-70` of `invoice-7`.
fn extends(key: &str, own: &str) -> bool {
    let rest = key.strip_prefix(own);
    rest.is_some_and(|rest| rest.chars().next().is_none_or(|next| !next.is_alphanumeric()))
}

#[cfg(test)]
mod tests;
