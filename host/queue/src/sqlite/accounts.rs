//! What stands beside the tasks and follows from them: users' accounts, counts, and where a waiting task waits.
//!
//! An operation notes its changes in [`Changes`] and writes them as its last step, in its own transaction, so that they cannot drift. What others
//! write into the tables can make them drift all the same: then no count goes below zero, and clean-up sets them right.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use sqlx::AssertSqlSafe;

use super::aside;
use super::failure::Failure;
use super::writer::Session;
use crate::{State, fair};

/// Whose account it is: a user's in a queue, as the tables name them. '' is the default queue, and the tasks without user.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub(super) struct Owner {
    pub(super) queue: String,
    pub(super) user: String,
}

impl Owner {
    /// The tasks without user in the default queue, which most are.
    fn is_nobody(&self) -> bool {
        self.user.is_empty() && self.queue.is_empty()
    }
}

/// A task that begins to wait.
pub(super) struct Waiting {
    pub(super) task: i64,
    pub(super) run_at: i64,
    pub(super) priority: i64,
    pub(super) owner: Owner,
    pub(super) max_running: Option<i64>,
    pub(super) alone: bool,
}

impl Waiting {
    fn turn(&self) -> i64 {
        fair::turn(self.priority, self.run_at)
    }
}

/// A task that waits apart: queue, type, user, turn and number.
pub(super) type Apart<'a> = (&'a str, &'a str, &'a str, i64, i64);

/// Changes of a user's numbers.
#[derive(Default)]
struct Account {
    ready: i64,
    running: i64,
    /// The number of its last pick between users.
    picked: Option<i64>,
}

/// What an operation changed.
#[derive(Default)]
pub(super) struct Changes {
    accounts: BTreeMap<Owner, Account>,
    /// Of the tasks without user in the default queue, which most are: apart, since to look up an empty name is the dearest look-up there is (to compare nothing at a
    /// dangling address takes the processor an assist).
    nobody: Option<Account>,
    /// By queue and type.
    types: BTreeMap<(String, String), i64>,
    ended: BTreeMap<&'static str, i64>,
    /// Users whose counts are not known, and have to be taken.
    uncounted: BTreeSet<Owner>,
    woken: bool,
}

impl Changes {
    /// A task of this user began to run, or was claimed out of order.
    pub(super) fn claimed(&mut self, owner: &Owner, picked: Option<i64>) {
        let account = self.account(owner);
        account.running += 1;
        account.picked = account.picked.max(picked);
    }

    /// A task of this user left the ready ones.
    pub(super) fn unready(&mut self, owner: &Owner) {
        self.account(owner).ready -= 1;
    }

    /// A task of this user runs no more.
    pub(super) fn stopped(&mut self, owner: &Owner) {
        self.account(owner).running -= 1;
    }

    /// What this user has ready and running is not known.
    pub(super) fn uncounted(&mut self, owner: &Owner) {
        self.uncounted.insert(owner.clone());
    }

    /// A task of this type came into the queue.
    pub(super) fn entered(&mut self, queue: &str, task_type: &str) {
        self.count(queue, task_type, 1);
    }

    /// A task of this type left the queue without coming to an end.
    pub(super) fn dropped(&mut self, queue: &str, task_type: &str) {
        self.count(queue, task_type, -1);
    }

    /// A task of this type came to its end.
    pub(super) fn ended(&mut self, queue: &str, task_type: &str, state: State) {
        self.count(queue, task_type, -1);
        *self.ended.entry(state.as_str()).or_default() += 1;
    }

    /// An ended task was given a new life.
    pub(super) fn revived(&mut self, queue: &str, task_type: &str, state: State) {
        self.count(queue, task_type, 1);
        self.removed(state, 1);
    }

    /// Ended tasks were removed.
    pub(super) fn removed(&mut self, state: State, tasks: i64) {
        *self.ended.entry(state.as_str()).or_default() -= tasks;
    }

    fn count(&mut self, queue: &str, task_type: &str, more: i64) {
        *self.types.entry((queue.to_owned(), task_type.to_owned())).or_default() += more;
    }

    fn account(&mut self, owner: &Owner) -> &mut Account {
        if owner.is_nobody() {
            return self.nobody.get_or_insert_default();
        }
        if !self.accounts.contains_key(owner) {
            self.accounts.insert(owner.clone(), Account::default());
        }
        self.accounts.entry(owner.clone()).or_default()
    }

    /// Put tasks where waiting tasks wait: ready, suspect or scheduled.
    pub(super) async fn enqueue(&mut self, session: &mut Session, waiting: &[Waiting]) -> Result<(), Failure> {
        // Somebody else may have put it there already.
        const READY: &str = "INSERT OR IGNORE INTO ready (queue, user, turn, task, max_running)
            SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4 FROM json_each(?1)";
        const SUSPECT: &str = "INSERT OR IGNORE INTO suspect (turn, task) SELECT value ->> 0, value ->> 1 FROM json_each(?1)";
        const SCHEDULED: &str =
            "INSERT OR IGNORE INTO scheduled (run_at, task) SELECT value ->> 0, value ->> 1 FROM json_each(?1)";
        let now = session.now;
        let (due, later): (Vec<&Waiting>, Vec<&Waiting>) = waiting.iter().partition(|task| task.run_at <= now);
        let (suspect, ready): (Vec<&Waiting>, Vec<&Waiting>) = due.into_iter().partition(|task| task.alone);
        if !ready.is_empty() {
            let rows = json(ready.iter().map(|task| {
                let Owner { queue, user } = &task.owner;
                (queue, user, task.turn(), task.task, task.max_running)
            }));
            let entered = sqlx::query(READY).bind(rows).execute(session.db()).await?.rows_affected();
            let all_entered = entered == ready.len() as u64;
            for task in &ready {
                self.account(&task.owner).ready += 1;
                if !all_entered {
                    self.uncounted(&task.owner);
                }
            }
        }
        if !suspect.is_empty() {
            let rows = json(suspect.iter().map(|task| (task.turn(), task.task)));
            sqlx::query(SUSPECT).bind(rows).execute(session.db()).await?;
        }
        if !later.is_empty() {
            let rows = json(later.iter().map(|task| (task.run_at, task.task)));
            sqlx::query(SCHEDULED).bind(rows).execute(session.db()).await?;
        }
        // Also a task for later: the claimer has to learn when it is due.
        self.woken |= !waiting.is_empty();
        Ok(())
    }

    /// Put tasks where hosts look that serve their types.
    pub(super) async fn put_apart(&mut self, session: &mut Session, tasks: &[Apart<'_>]) -> Result<(), Failure> {
        const UNSERVED: &str = "INSERT OR IGNORE INTO unserved (queue, type, user, turn, task)
            SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4 FROM json_each(?1)";
        if !tasks.is_empty() {
            sqlx::query(UNSERVED).bind(json(tasks)).execute(session.db()).await?;
            self.woken = true;
        }
        Ok(())
    }

    /// Write what was noted.
    pub(super) async fn write(self, session: &mut Session) -> Result<(), Failure> {
        session.wake |= self.woken;
        let types = self.types.iter().map(|((queue, name), tasks)| ("type", queue.as_str(), name.as_str(), *tasks));
        let ended = self.ended.iter().map(|(name, tasks)| ("ended", "", *name, *tasks));
        let nobody = self.nobody.iter().map(|change| ("", "", change));
        let users = self.accounts.iter().map(|(owner, change)| (owner.queue.as_str(), owner.user.as_str(), change));
        let written = Written {
            accounts: nobody
                .chain(users)
                .map(|(queue, user, change)| (queue, user, change.ready, change.running, change.picked))
                .collect(),
            tally: types.chain(ended).filter(|(.., tasks)| *tasks != 0).collect(),
        };
        if written.accounts.iter().any(|(_, user, _, running, _)| !user.is_empty() && *running < 0) {
            let sql = WRITE_ALL_AND_LOOK.as_str();
            let opened: bool = sqlx::query_scalar(AssertSqlSafe(sql)).bind(one_json(&written)).fetch_one(session.db()).await?;
            session.wake |= opened;
        } else if !written.accounts.is_empty() || !written.tally.is_empty() {
            sqlx::query(AssertSqlSafe(WRITE_ALL.as_str())).bind(one_json(&written)).execute(session.db()).await?;
        }
        for Owner { queue, user } in self.uncounted {
            aside::recount(session, &(queue.into_bytes(), user.into_bytes())).await?;
        }
        Ok(())
    }
}

/// What the statements that write changes have to know.
#[derive(serde::Serialize)]
struct Written<'a> {
    /// Queue, user, more ready, more running, last pick.
    accounts: Vec<(&'a str, &'a str, i64, i64, Option<i64>)>,
    /// What, queue, name, more tasks.
    tally: Vec<(&'a str, &'a str, &'a str, i64)>,
}

const ENTER_ACCOUNTS: &str = "INSERT INTO account (queue, user, picked)
        SELECT value ->> 0, value ->> 1, (SELECT coalesce(max(pick), 0) FROM counter)
        FROM json_each(?1, '$.accounts') WHERE value ->> 2 > 0 OR value ->> 3 > 0
        ON CONFLICT (queue, user) DO NOTHING";

pub(super) const CHANGE_ACCOUNTS: &str =
    "UPDATE account SET ready = max(ready + change.more_ready, 0), running = max(running + change.more_running, 0),
            picked = coalesce(change.at_pick, picked),
            (head_turn, head_task, head_max) = (SELECT first.turn, first.task, first.max_running FROM ready AS first
                WHERE first.queue = account.queue AND first.user = account.user ORDER BY first.turn, first.task LIMIT 1)
        FROM (SELECT value ->> 0 AS queue, value ->> 1 AS name, value ->> 2 AS more_ready, value ->> 3 AS more_running, value ->> 4 AS at_pick
            FROM json_each(?1, '$.accounts')) AS change
        WHERE account.queue = change.queue AND account.user = change.name";

/// The account of the tasks without user in the default queue stays.
pub(super) const LEAVE_ACCOUNTS: &str = "DELETE FROM account
        WHERE (queue, user) IN (SELECT value ->> 0, value ->> 1 FROM json_each(?1, '$.accounts')
                WHERE (value ->> 0 <> '' OR value ->> 1 <> '') AND value ->> 2 + value ->> 3 < 0)
            AND head_task IS NULL AND running = 0";

const ENTER_TALLY: &str = "INSERT INTO tally (what, queue, name, tasks)
        SELECT value ->> 0, value ->> 1, value ->> 2, 0 FROM json_each(?1, '$.tally') WHERE value ->> 3 > 0
        ON CONFLICT (what, queue, name) DO NOTHING";

pub(super) const CHANGE_TALLY: &str = "UPDATE tally SET tasks = max(tasks + change.more, 0)
        FROM (SELECT value ->> 0 AS kind, value ->> 1 AS place, value ->> 2 AS label, value ->> 3 AS more FROM json_each(?1, '$.tally')) AS change
        WHERE tally.what = change.kind AND tally.queue = change.place AND tally.name = change.label";

pub(super) const LEAVE_TALLY: &str = "DELETE FROM tally
        WHERE (what, queue, name) IN (SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?1, '$.tally') WHERE value ->> 3 < 0)
            AND tasks = 0";

/// Whether a user that was kept back by its limit, or has a task that must run alone, may run another task now.
pub(super) const OPENED: &str = "SELECT EXISTS (SELECT 1 FROM json_each(?1, '$.accounts') AS change
            CROSS JOIN account ON account.queue = change.value ->> 0 AND account.user = change.value ->> 1
            WHERE change.value ->> 3 < 0 AND account.open AND account.head_max IS NOT NULL
                AND account.running - (change.value ->> 3) >= max(account.head_max, 1))
        OR EXISTS (SELECT 1 FROM suspect)";

/// In one go, since each has the same parameter, and each way to SQLite's thread and back has its price.
static WRITE_ALL: LazyLock<String> =
    LazyLock::new(|| [ENTER_ACCOUNTS, CHANGE_ACCOUNTS, LEAVE_ACCOUNTS, ENTER_TALLY, CHANGE_TALLY, LEAVE_TALLY].join(";\n"));

static WRITE_ALL_AND_LOOK: LazyLock<String> = LazyLock::new(|| [WRITE_ALL.as_str(), OPENED].join(";\n"));

/// A set as one parameter: a JSON array.
pub(super) fn json<T: serde::Serialize>(items: impl IntoIterator<Item = T>) -> String {
    one_json(&items.into_iter().collect::<Vec<T>>())
}

/// A value as one parameter.
pub(super) fn one_json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| unreachable!("numbers and texts are JSON: {error}"))
}
