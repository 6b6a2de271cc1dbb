//! What stands beside the tasks and follows from them: users' accounts, counts, and where a waiting task waits.
//!
//! An operation notes its changes in [`Changes`] and appends them as its last step, in its own transaction. So they cannot drift, and no two
//! operations wait for one row. Who chooses between users folds the changes in first; see [`fold`].

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sqlx::mysql::MySqlArguments;
use sqlx::query::Query;
use sqlx::{MySql, Row as _};

use super::connect::text;
use super::failure::Failure;
use super::mend::places_of_unreadable;
use super::rows::{count, names, places};
use super::session::Session;
use crate::{State, fair};

/// Changes that a claim folds in before it chooses. Where there are more, it chooses by what it knows.
pub(super) const FOLDED_BY_CLAIM: i64 = 1_000;
/// Changes, or rows of counts, that are folded at once otherwise.
pub(super) const FOLDED_MAX: i64 = 5_000;
/// Rows of counts that are folded at once at most, where they are of many names: as long as no more than half as many types are about, the
/// table stays bounded.
const TALLY_MAX: i64 = 80_000;
/// Rows of counts that are left alone.
const TALLY_LEFT: usize = 1_000;

/// A task that begins to wait.
pub(super) struct Waiting {
    pub(super) task: i64,
    pub(super) run_at: i64,
    pub(super) priority: i64,
    pub(super) user: String,
    pub(super) max_running: Option<u32>,
    pub(super) alone: bool,
}

impl Waiting {
    /// Where it stands once it is due.
    fn turn(&self) -> i64 {
        fair::turn(self.priority, self.run_at)
    }
}

/// What an operation changed.
#[derive(Default)]
pub(super) struct Changes {
    /// For each user whose first ready task may be another one now: how many more of its tasks run.
    users: BTreeMap<String, i64>,
    types: BTreeMap<String, i64>,
    ended: BTreeMap<&'static str, i64>,
    running: i64,
    woken: bool,
}

impl Changes {
    /// Tasks were claimed; `user` of those that are not counted in its account already.
    pub(super) fn claimed(&mut self, tasks: i64) {
        self.running += tasks;
    }

    /// A task of this user began to run without its account being asked.
    pub(super) fn started(&mut self, user: &str) {
        self.user(user, 1);
    }

    /// A task of this user left the ready ones.
    pub(super) fn unready(&mut self, user: &str) {
        self.user(user, 0);
    }

    /// A task of this user runs no more. If it has a limit, another one may run now.
    pub(super) fn stopped(&mut self, user: &str, max_running: Option<u32>) {
        self.user(user, -1);
        self.running -= 1;
        self.woken |= !user.is_empty() && max_running.is_some();
    }

    /// A task of this type came into the queue.
    pub(super) fn entered(&mut self, task_type: &str) {
        *self.types.entry(task_type.to_owned()).or_default() += 1;
    }

    /// A task of this type left the queue without coming to an end.
    pub(super) fn dropped(&mut self, task_type: &str) {
        *self.types.entry(task_type.to_owned()).or_default() -= 1;
    }

    /// A task of this type came to its end.
    pub(super) fn ended(&mut self, task_type: &str, state: State) {
        *self.types.entry(task_type.to_owned()).or_default() -= 1;
        *self.ended.entry(state.as_str()).or_default() += 1;
    }

    /// An ended task was given a new life.
    pub(super) fn revived(&mut self, task_type: &str, state: State) {
        *self.types.entry(task_type.to_owned()).or_default() += 1;
        self.removed(state, 1);
    }

    /// Ended tasks were removed.
    pub(super) fn removed(&mut self, state: State, tasks: i64) {
        *self.ended.entry(state.as_str()).or_default() -= tasks;
    }

    /// Tasks without user have no account.
    fn user(&mut self, user: &str, running: i64) {
        if user.is_empty() {
            return;
        }
        match self.users.get_mut(user) {
            Some(change) => *change += running,
            None => drop(self.users.insert(user.to_owned(), running)),
        }
    }

    /// Put tasks where waiting tasks wait: ready, suspect or scheduled.
    pub(super) async fn enqueue(&mut self, session: &mut Session<'_>, waiting: &[Waiting]) -> Result<(), Failure> {
        // A row that is there already, which nothing of ours leaves behind, is as good.
        const READY: &str = "INSERT IGNORE INTO laelaps_ready (turn, task, max_running)
            SELECT s.turn, s.task, s.max_running FROM JSON_TABLE(?, '$[*]' COLUMNS (
                turn BIGINT PATH '$[0]', task BIGINT PATH '$[1]', max_running BIGINT PATH '$[2]')) AS s";
        const READY_OF_USER: &str = "INSERT IGNORE INTO laelaps_ready_of_user (user, turn, task, max_running)
            SELECT s.user, s.turn, s.task, s.max_running FROM JSON_TABLE(?, '$[*]' COLUMNS (
                user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', turn BIGINT PATH '$[1]', task BIGINT PATH '$[2]',
                max_running BIGINT PATH '$[3]')) AS s";
        const SUSPECT: &str = concat!("INSERT IGNORE INTO laelaps_suspect (turn, task) SELECT s.at, s.task FROM ", places!());
        const SCHEDULED: &str =
            concat!("INSERT IGNORE INTO laelaps_scheduled (run_at, task) SELECT s.at, s.task FROM ", places!());
        let now = session.now;
        let (due, later): (Vec<&Waiting>, Vec<&Waiting>) = waiting.iter().partition(|task| task.run_at <= now);
        let (suspect, ready): (Vec<&Waiting>, Vec<&Waiting>) = due.into_iter().partition(|task| task.alone);
        let (of_users, ready): (Vec<&Waiting>, Vec<&Waiting>) = ready.into_iter().partition(|task| !task.user.is_empty());
        for rows in session.chunks(ready.iter().map(|task| (task.turn(), task.task, task.max_running))) {
            sqlx::query(READY).bind(rows).execute(session.db()).await?;
        }
        for rows in session.chunks(of_users.iter().map(|task| (&task.user, task.turn(), task.task, task.max_running))) {
            sqlx::query(READY_OF_USER).bind(rows).execute(session.db()).await?;
        }
        for task in &of_users {
            self.user(&task.user, 0);
        }
        for rows in session.chunks(suspect.iter().map(|task| (task.turn(), task.task))) {
            sqlx::query(SUSPECT).bind(rows).execute(session.db()).await?;
        }
        for rows in session.chunks(later.iter().map(|task| (task.run_at, task.task))) {
            sqlx::query(SCHEDULED).bind(rows).execute(session.db()).await?;
        }
        // Also a task for later: the claimer has to learn when it is due.
        self.woken |= !waiting.is_empty();
        Ok(())
    }

    /// Append what was noted.
    pub(super) async fn write(self, session: &mut Session<'_>) -> Result<(), Failure> {
        const USERS: &str =
            "INSERT INTO laelaps_account_change (user, running) SELECT s.user, s.running FROM JSON_TABLE(?, '$[*]' COLUMNS (
            user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', running BIGINT PATH '$[1]')) AS s";
        session.wake |= self.woken;
        for users in session.chunks(&self.users) {
            sqlx::query(USERS).bind(users).execute(session.db()).await?;
        }
        let types = self.types.iter().map(|(name, tasks)| ("type", name.as_str(), *tasks));
        let ended = self.ended.iter().map(|(name, tasks)| ("ended", *name, *tasks));
        let running = std::iter::once(("running", "", self.running));
        add_to_tally(session, types.chain(ended).chain(running).filter(|(_, _, tasks)| *tasks != 0).collect()).await
    }
}

async fn add_to_tally(session: &mut Session<'_>, changes: Vec<(&str, &str, i64)>) -> Result<(), Failure> {
    const TALLY: &str =
        "INSERT INTO laelaps_tally (what, name, tasks) SELECT s.what, s.name, s.tasks FROM JSON_TABLE(?, '$[*]' COLUMNS (
        what VARCHAR(10) CHARACTER SET utf8mb4 PATH '$[0]', name VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[1]',
        tasks BIGINT PATH '$[2]')) AS s";
    for changes in session.chunks(changes) {
        sqlx::query(TALLY).bind(changes).execute(session.db()).await?;
    }
    Ok(())
}

/// A change of an account that is about to be written.
pub(super) struct AccountChange {
    pub(super) user: String,
    /// So many more tasks of the user run.
    pub(super) running: i64,
    /// The number of its last pick, if it was picked.
    pub(super) picked: Option<i64>,
}

/// What folding has come to.
pub(super) struct Folded {
    /// The last change; None if there was none.
    pub(super) last: Option<i64>,
    /// Where tasks of users stand whose names cannot be read.
    pub(super) broken: Vec<(i64, i64)>,
}

/// Fold at most so many changes behind `after` into users' accounts, oldest first. The caller holds the counter's row, whose pick a new
/// account enters at, and mends what is broken.
pub(super) async fn fold(session: &mut Session<'_>, pick: i64, after: i64, most: i64) -> Result<Folded, Failure> {
    const CHANGES: &str =
        "SELECT id, user, running FROM laelaps_account_change WHERE id > ? ORDER BY id LIMIT ? FOR UPDATE SKIP LOCKED";
    let rows = sqlx::query(CHANGES).bind(after).bind(most).fetch_all(session.db()).await?;
    let mut users: BTreeMap<String, i64> = BTreeMap::new();
    let mut ids: Vec<i64> = Vec::with_capacity(rows.len());
    let mut unreadable: BTreeSet<Vec<u8>> = BTreeSet::new();
    for row in &rows {
        ids.push(row.try_get(0)?);
        match String::from_utf8(row.try_get(1)?) {
            Ok(user) => *users.entry(user).or_default() += row.try_get::<i64, _>(2)?,
            Err(error) => drop(unreadable.insert(error.into_bytes())),
        }
    }
    let last = ids.last().copied();
    if !ids.is_empty() {
        remove_by_id(
            session,
            "DELETE r FROM JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$')) AS s
            STRAIGHT_JOIN laelaps_account_change AS r FORCE INDEX (PRIMARY) ON r.id = s.id",
            &ids,
        )
        .await?;
        let changes = users.into_iter().map(|(user, running)| AccountChange { user, running, picked: None }).collect();
        write_accounts(session, pick, changes).await?;
    }
    let mut broken = Vec::new();
    for user in unreadable {
        broken.extend(places_of_unreadable(session, &user).await?);
    }
    Ok(Folded { last, broken })
}

async fn remove_by_id(session: &mut Session<'_>, sql: &'static str, ids: &[i64]) -> Result<(), Failure> {
    for ids in session.chunks(ids) {
        sqlx::query(sql).bind(ids).execute(session.db()).await?;
    }
    Ok(())
}

/// Write changes of accounts, each with its user's first ready task as it is now. The caller holds the counter's row.
pub(super) async fn write_accounts(session: &mut Session<'_>, pick: i64, changes: Vec<AccountChange>) -> Result<(), Failure> {
    // As the place says it, whatever the task's own row says: so it is chosen, found out, and mended.
    const HEADS: &str = concat!(
        "SELECT s.name, (SELECT CONCAT_WS(',', r.turn, r.task, r.max_running) FROM laelaps_ready_of_user AS r WHERE r.user = s.name
            ORDER BY r.turn, r.task LIMIT 1) FROM ",
        names!()
    );
    const WRITE: &str = "INSERT INTO laelaps_account (user, running, head_turn, head_task, head_max, picked)
        SELECT s.user, s.running, s.head_turn, s.head_task, s.head_max, s.picked FROM JSON_TABLE(?, '$[*]' COLUMNS (
            user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', running BIGINT PATH '$[1]', head_turn BIGINT PATH '$[2]',
            head_task BIGINT PATH '$[3]', head_max BIGINT PATH '$[4]', picked BIGINT PATH '$[5]', was_picked INT PATH '$[6]')) AS s
        ON DUPLICATE KEY UPDATE running = laelaps_account.running + VALUES(running), head_turn = VALUES(head_turn),
            head_task = VALUES(head_task), head_max = VALUES(head_max),
            picked = IF(s.was_picked = 1, VALUES(picked), laelaps_account.picked)";
    /// The account of the tasks without user stays.
    const LEAVE: &str = concat!(
        "DELETE a FROM ",
        names!(),
        " STRAIGHT_JOIN laelaps_account AS a FORCE INDEX (PRIMARY) ON a.user = s.name WHERE a.running = 0 AND a.head_task IS NULL AND a.user <> ''"
    );
    if changes.is_empty() {
        return Ok(());
    }
    let mut heads: HashMap<String, (i64, i64, Option<u32>)> = HashMap::with_capacity(changes.len());
    for users in session.chunks(changes.iter().map(|change| change.user.as_str())) {
        for row in sqlx::query(HEADS).bind(users).fetch_all(session.db()).await? {
            let words: Option<String> = row.try_get(1)?;
            if let Some(head) = words.as_deref().and_then(head) {
                heads.insert(row.try_get(0)?, head);
            }
        }
    }
    let rows = session.chunks(changes.iter().map(|change| {
        let (head_turn, head_task, head_max) = match heads.get(&change.user).filter(|_| !change.user.is_empty()) {
            Some((turn, task, max_running)) => (Some(*turn), Some(*task), *max_running),
            None => (None, None, None),
        };
        let picked = change.picked.unwrap_or(pick);
        (&change.user, change.running, head_turn, head_task, head_max, picked, u8::from(change.picked.is_some()))
    }));
    for rows in rows {
        sqlx::query(WRITE).bind(rows).execute(session.db()).await?;
    }
    let idle = changes.iter().filter(|change| !heads.contains_key(&change.user)).map(|change| change.user.as_str());
    for idle in session.chunks(idle) {
        sqlx::query(LEAVE).bind(idle).execute(session.db()).await?;
    }
    Ok(())
}

/// Turn, task and max_running of a first ready task.
fn head(words: &str) -> Option<(i64, i64, Option<u32>)> {
    let mut words = words.split(',');
    let (turn, task) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some((turn, task, words.next().and_then(|most| most.parse().ok())))
}

/// Fold rows of counts together, if there are many. Answers where to begin the next time.
pub(super) async fn fold_tally(session: &mut Session<'_>, after: i64) -> Result<i64, Failure> {
    const ROWS: &str =
        "SELECT id, CAST(what AS CHAR), name, tasks FROM laelaps_tally WHERE id > ? ORDER BY id LIMIT ? FOR UPDATE SKIP LOCKED";
    let mut sums: BTreeMap<(String, String), i64> = BTreeMap::new();
    let mut ids: Vec<i64> = Vec::new();
    let mut last = after;
    // Folding what is of many names makes nothing smaller: then more of it is looked at.
    while count(ids.len()) < TALLY_MAX {
        let rows = sqlx::query(ROWS).bind(last).bind(FOLDED_MAX).fetch_all(session.db()).await?;
        for row in &rows {
            ids.push(row.try_get(0)?);
            *sums.entry((row.try_get(1)?, text(row, 2)?)).or_default() += row.try_get::<i64, _>(3)?;
        }
        last = ids.last().copied().unwrap_or(last);
        if sums.len() * 2 <= ids.len() || count(rows.len()) < FOLDED_MAX {
            break;
        }
    }
    if ids.len() <= TALLY_LEFT || sums.len() * 2 > ids.len() {
        return Ok(after);
    }
    remove_by_id(
        session,
        "DELETE r FROM JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$')) AS s
        STRAIGHT_JOIN laelaps_tally AS r FORCE INDEX (PRIMARY) ON r.id = s.id",
        &ids,
    )
    .await?;
    let sums = sums.iter().filter(|(_, tasks)| **tasks != 0);
    add_to_tally(session, sums.map(|((what, name), tasks)| (what.as_str(), name.as_str(), *tasks)).collect()).await?;
    Ok(last)
}

/// Whether there are so many rows of counts that folding them is worth it.
pub(super) fn tally_is_long(after: i64) -> Query<'static, MySql, MySqlArguments> {
    const LONG: &str = "SELECT COUNT(*) > ? FROM (SELECT id FROM laelaps_tally WHERE id > ? LIMIT ?) AS some";
    let left = count(TALLY_LEFT);
    sqlx::query(LONG).bind(left).bind(after).bind(left + 1)
}
