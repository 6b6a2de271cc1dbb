//! What stands beside the tasks and follows from them: users' accounts in their queues, counts, and where a waiting task waits.
//!
//! An operation notes its changes in [`Changes`] and appends them as its last step, in its own transaction. So they cannot drift, and no two
//! operations wait for one row. Who chooses between users folds the changes in first; see [`fold`].

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sqlx::mysql::MySqlArguments;
use sqlx::query::Query;
use sqlx::{MySql, Row as _};

use super::connect::text;
use super::failure::Failure;
use super::mend::{Spot, placed_queue, places_of_unreadable, queue_of};
use super::rows::{count, places};
use super::session::{Entered, Session};
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

/// Whose account: a user's, in one queue. Both are empty for the tasks without user, which share one account over all queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Owner {
    pub(super) queue: String,
    pub(super) user: String,
}

impl Owner {
    pub(super) fn new(queue: &str, user: &str) -> Self {
        Self { queue: queue.to_owned(), user: user.to_owned() }
    }

    /// Whose account counts a task of this queue and user.
    pub(super) fn of_task(queue: &str, user: &str) -> Self {
        if user.is_empty() { Self::default() } else { Self::new(queue, user) }
    }

    /// It is that of the tasks without user.
    pub(super) fn is_nobody(&self) -> bool {
        self.user.is_empty()
    }
}

/// A task that begins to wait.
pub(super) struct Waiting {
    pub(super) task: i64,
    /// As it stands in the tables.
    pub(super) queue: String,
    pub(super) run_at: i64,
    pub(super) priority: i64,
    pub(super) user: String,
    pub(super) max_running: Option<u32>,
    pub(super) alone: bool,
}

impl Waiting {
    /// Where it stands once it is due.
    pub(super) fn turn(&self) -> i64 {
        fair::turn(self.priority, self.run_at)
    }
}

/// The type and the turn are those of the row: what is read of a type may be less.
pub(super) const INTO_UNSERVED: &str = "INSERT IGNORE INTO laelaps_unserved (queue, type, user, turn, task)
    SELECT s.queue, t.type, s.user, t.turn, t.id FROM JSON_TABLE(?, '$[*]' COLUMNS (
        task BIGINT PATH '$[0]', queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[1]',
        user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[2]')) AS s
    STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.task";

/// What an operation changed.
#[derive(Default)]
pub(super) struct Changes {
    /// For each account whose first ready task may be another one now: how many more of its tasks run.
    owners: BTreeMap<Owner, i64>,
    /// By queue and type.
    types: BTreeMap<(String, String), i64>,
    ended: BTreeMap<&'static str, i64>,
    running: i64,
    woken: bool,
    /// Where tasks became ready.
    entered: Vec<Entered>,
}

impl Changes {
    /// Tasks were claimed; `user` of those that are not counted in its account already.
    pub(super) fn claimed(&mut self, tasks: i64) {
        self.running += tasks;
    }

    /// A task of this owner began to run without its account being asked.
    pub(super) fn started(&mut self, owner: &Owner) {
        self.owner(owner, 1);
    }

    /// A task of this owner left the ready ones.
    pub(super) fn unready(&mut self, owner: &Owner) {
        self.owner(owner, 0);
    }

    /// A task of this owner runs no more. If it has a limit, another one may run now.
    pub(super) fn stopped(&mut self, owner: &Owner, max_running: Option<u32>) {
        self.owner(owner, -1);
        self.running -= 1;
        self.woken |= !owner.is_nobody() && max_running.is_some();
    }

    /// A task of this type was stored in a queue.
    pub(super) fn entered(&mut self, queue: &str, task_type: &str) {
        self.waits_or_runs(queue, task_type, 1);
    }

    /// A task of this type left its queue without coming to an end.
    pub(super) fn dropped(&mut self, queue: &str, task_type: &str) {
        self.waits_or_runs(queue, task_type, -1);
    }

    /// A task of this type came to its end.
    pub(super) fn ended(&mut self, queue: &str, task_type: &str, state: State) {
        self.waits_or_runs(queue, task_type, -1);
        *self.ended.entry(state.as_str()).or_default() += 1;
    }

    /// An ended task was given a new life.
    pub(super) fn revived(&mut self, queue: &str, task_type: &str, state: State) {
        self.waits_or_runs(queue, task_type, 1);
        self.removed(state, 1);
    }

    /// Ended tasks were removed.
    pub(super) fn removed(&mut self, state: State, tasks: i64) {
        *self.ended.entry(state.as_str()).or_default() -= tasks;
    }

    /// So many more tasks of a type wait or run.
    fn waits_or_runs(&mut self, queue: &str, task_type: &str, tasks: i64) {
        *self.types.entry((queue.to_owned(), task_type.to_owned())).or_default() += tasks;
    }

    /// What runs of the tasks without user is not counted.
    fn owner(&mut self, owner: &Owner, running: i64) {
        if owner.is_nobody() {
            return;
        }
        match self.owners.get_mut(owner) {
            Some(change) => *change += running,
            None => drop(self.owners.insert(owner.clone(), running)),
        }
    }

    /// Put tasks where waiting tasks wait: ready, suspect or scheduled.
    pub(super) async fn enqueue(&mut self, session: &mut Session<'_>, waiting: &[Waiting]) -> Result<(), Failure> {
        // A row that is there already, which nothing of ours leaves behind, is as good.
        const READY: &str = "INSERT IGNORE INTO laelaps_ready (queue, turn, task, max_running)
            SELECT s.queue, s.turn, s.task, s.max_running FROM JSON_TABLE(?, '$[*]' COLUMNS (
                turn BIGINT PATH '$[0]', task BIGINT PATH '$[1]', max_running BIGINT PATH '$[2]',
                queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[3]')) AS s";
        const READY_OF_USER: &str = "INSERT IGNORE INTO laelaps_ready_of_user (queue, user, turn, task, max_running)
            SELECT s.queue, s.user, s.turn, s.task, s.max_running FROM JSON_TABLE(?, '$[*]' COLUMNS (
                user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', turn BIGINT PATH '$[1]', task BIGINT PATH '$[2]',
                max_running BIGINT PATH '$[3]', queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[4]')) AS s";
        const SUSPECT: &str = "INSERT IGNORE INTO laelaps_suspect (turn, task, queue)
            SELECT s.turn, s.task, s.queue FROM JSON_TABLE(?, '$[*]' COLUMNS (
                turn BIGINT PATH '$[0]', task BIGINT PATH '$[1]', queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[2]')) AS s";
        const SCHEDULED: &str =
            concat!("INSERT IGNORE INTO laelaps_scheduled (run_at, task) SELECT s.at, s.task FROM ", places!());
        let now = session.now;
        let (due, later): (Vec<&Waiting>, Vec<&Waiting>) = waiting.iter().partition(|task| task.run_at <= now);
        let (suspect, ready): (Vec<&Waiting>, Vec<&Waiting>) = due.into_iter().partition(|task| task.alone);
        let (of_users, ready): (Vec<&Waiting>, Vec<&Waiting>) = ready.into_iter().partition(|task| !task.user.is_empty());
        for rows in session.chunks(ready.iter().map(|task| (task.turn(), task.task, task.max_running, &task.queue))) {
            sqlx::query(READY).bind(rows).execute(session.db()).await?;
        }
        for rows in
            session.chunks(of_users.iter().map(|task| (&task.user, task.turn(), task.task, task.max_running, &task.queue)))
        {
            sqlx::query(READY_OF_USER).bind(rows).execute(session.db()).await?;
        }
        for task in &of_users {
            self.owner(&Owner::new(&task.queue, &task.user), 0);
        }
        let mut entered: BTreeMap<(&str, bool), i64> = BTreeMap::new();
        for task in ready.iter().chain(&of_users) {
            let first = entered.entry((task.queue.as_str(), !task.user.is_empty())).or_insert(i64::MAX);
            *first = task.turn().min(*first);
        }
        let entered = entered.into_iter();
        self.entered.extend(entered.map(|((queue, of_user), turn)| Entered { queue: queue.to_owned(), of_user, turn }));
        for rows in session.chunks(suspect.iter().map(|task| (task.turn(), task.task, &task.queue))) {
            sqlx::query(SUSPECT).bind(rows).execute(session.db()).await?;
        }
        for rows in session.chunks(later.iter().map(|task| (task.run_at, task.task))) {
            sqlx::query(SCHEDULED).bind(rows).execute(session.db()).await?;
        }
        // Also a task for later: the claimer has to learn when it is due.
        self.woken |= !waiting.is_empty();
        Ok(())
    }

    /// Put due tasks, whose rows are written, apart for hosts that serve their types: each with its queue and its user as places name them. A host
    /// of this process may be one.
    pub(super) async fn put_apart(&mut self, session: &mut Session<'_>, tasks: &[(i64, &str, &str)]) -> Result<(), Failure> {
        for rows in session.chunks(tasks) {
            sqlx::query(INTO_UNSERVED).bind(rows).execute(session.db()).await?;
        }
        self.woken |= !tasks.is_empty();
        Ok(())
    }

    /// Append what was noted.
    pub(super) async fn write(self, session: &mut Session<'_>) -> Result<(), Failure> {
        const OWNERS: &str = "INSERT INTO laelaps_account_change (queue, user, running) SELECT s.queue, s.user, s.running
            FROM JSON_TABLE(?, '$[*]' COLUMNS (user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', running BIGINT PATH '$[1]',
                queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[2]')) AS s";
        session.wake |= self.woken;
        session.entered.extend(self.entered);
        for owners in session.chunks(self.owners.iter().map(|(owner, running)| (&owner.user, running, &owner.queue))) {
            sqlx::query(OWNERS).bind(owners).execute(session.db()).await?;
        }
        let types = self.types.iter().map(|((queue, name), tasks)| ("type", name.as_str(), *tasks, queue.as_str()));
        let ended = self.ended.iter().map(|(name, tasks)| ("ended", *name, *tasks, ""));
        let running = std::iter::once(("running", "", self.running, ""));
        add_to_tally(session, types.chain(ended).chain(running).filter(|(_, _, tasks, _)| *tasks != 0).collect()).await
    }
}

/// What is counted, its name, how many more, and the queue.
async fn add_to_tally(session: &mut Session<'_>, changes: Vec<(&str, &str, i64, &str)>) -> Result<(), Failure> {
    const TALLY: &str =
        "INSERT INTO laelaps_tally (what, queue, name, tasks) SELECT s.what, s.queue, s.name, s.tasks FROM JSON_TABLE(?, '$[*]' COLUMNS (
        what VARCHAR(10) CHARACTER SET utf8mb4 PATH '$[0]', name VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[1]',
        tasks BIGINT PATH '$[2]', queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[3]')) AS s";
    for changes in session.chunks(changes) {
        sqlx::query(TALLY).bind(changes).execute(session.db()).await?;
    }
    Ok(())
}

/// A change of an account that is about to be written.
pub(super) struct AccountChange {
    pub(super) owner: Owner,
    /// So many more tasks of the owner run.
    pub(super) running: i64,
    /// The number of its last pick, if it was picked.
    pub(super) picked: Option<i64>,
}

/// What folding has come to.
pub(super) struct Folded {
    /// The last change; None if there was none.
    pub(super) last: Option<i64>,
    /// They were as many as were asked for: there may be more.
    pub(super) full: bool,
    /// Accounts of other queues than the default one were among those that changed.
    pub(super) of_others: bool,
    /// Where tasks of users stand whose names, or the names of whose queues, cannot be read.
    pub(super) broken: Vec<Spot>,
}

/// Fold at most so many changes behind `after` into users' accounts, oldest first. The caller holds the counter's row, whose pick a new
/// account enters at, and mends what is broken.
pub(super) async fn fold(session: &mut Session<'_>, pick: i64, after: i64, most: i64) -> Result<Folded, Failure> {
    const CHANGES: &str =
        "SELECT id, queue, user, running FROM laelaps_account_change WHERE id > ? ORDER BY id LIMIT ? FOR UPDATE SKIP LOCKED";
    let rows = sqlx::query(CHANGES).bind(after).bind(most).fetch_all(session.db()).await?;
    let mut owners: BTreeMap<Owner, i64> = BTreeMap::new();
    let mut ids: Vec<i64> = Vec::with_capacity(rows.len());
    let mut unreadable: BTreeSet<(Vec<u8>, Vec<u8>)> = BTreeSet::new();
    for row in &rows {
        ids.push(row.try_get(0)?);
        let (queue, user): (Vec<u8>, Vec<u8>) = (row.try_get(1)?, row.try_get(2)?);
        match readable(&queue, &user) {
            Some(owner) => *owners.entry(owner).or_default() += row.try_get::<i64, _>(3)?,
            None => drop(unreadable.insert((queue, user))),
        }
    }
    let last = ids.last().copied();
    let of_others = owners.keys().any(|owner| !owner.queue.is_empty());
    if !ids.is_empty() {
        remove_by_id(
            session,
            "DELETE r FROM JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$')) AS s
            STRAIGHT_JOIN laelaps_account_change AS r FORCE INDEX (PRIMARY) ON r.id = s.id",
            &ids,
        )
        .await?;
        let changes = owners.into_iter().map(|(owner, running)| AccountChange { owner, running, picked: None }).collect();
        write_accounts(session, pick, changes).await?;
    }
    let mut broken = Vec::new();
    for (queue, user) in unreadable {
        broken.extend(places_of_unreadable(session, &queue, &user).await?);
    }
    Ok(Folded { last, full: count(rows.len()) >= most, of_others, broken })
}

/// The owner of an account, unless its names cannot be read or are none.
pub(super) fn readable(queue: &[u8], user: &[u8]) -> Option<Owner> {
    let user = std::str::from_utf8(user).ok()?;
    let placed = placed_queue(queue.to_vec());
    (placed.as_bytes() == queue).then(|| Owner { queue: placed, user: user.to_owned() })
}

async fn remove_by_id(session: &mut Session<'_>, sql: &'static str, ids: &[i64]) -> Result<(), Failure> {
    for ids in session.chunks(ids) {
        sqlx::query(sql).bind(ids).execute(session.db()).await?;
    }
    Ok(())
}

/// The rows of a set of accounts' owners.
macro_rules! owners {
    () => {
        "JSON_TABLE(?, '$[*]' COLUMNS (user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]',
            queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[1]')) AS s"
    };
}

/// Write changes of accounts, each with its user's first ready task as it is now. The caller holds the counter's row.
pub(super) async fn write_accounts(session: &mut Session<'_>, pick: i64, changes: Vec<AccountChange>) -> Result<(), Failure> {
    // As the place says it, whatever the task's own row says: so it is chosen, found out, and mended.
    const HEADS: &str = concat!(
        "SELECT s.queue, s.user, (SELECT CONCAT_WS(',', r.turn, r.task, r.max_running) FROM laelaps_ready_of_user AS r
            WHERE r.queue = s.queue AND r.user = s.user ORDER BY r.turn, r.task LIMIT 1) FROM ",
        owners!()
    );
    const WRITE: &str = "INSERT INTO laelaps_account (queue, user, running, head_turn, head_task, head_max, picked)
        SELECT s.queue, s.user, s.running, s.head_turn, s.head_task, s.head_max, s.picked FROM JSON_TABLE(?, '$[*]' COLUMNS (
            user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', running BIGINT PATH '$[1]', head_turn BIGINT PATH '$[2]',
            head_task BIGINT PATH '$[3]', head_max BIGINT PATH '$[4]', picked BIGINT PATH '$[5]', was_picked INT PATH '$[6]',
            queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[7]')) AS s
        ON DUPLICATE KEY UPDATE running = laelaps_account.running + VALUES(running), head_turn = VALUES(head_turn),
            head_task = VALUES(head_task), head_max = VALUES(head_max),
            picked = IF(s.was_picked = 1, VALUES(picked), laelaps_account.picked)";
    /// The account of the tasks without user stays.
    const LEAVE: &str = concat!(
        "DELETE a FROM ",
        owners!(),
        " STRAIGHT_JOIN laelaps_account AS a FORCE INDEX (PRIMARY) ON a.queue = s.queue AND a.user = s.user
        WHERE a.running = 0 AND a.head_task IS NULL AND a.user <> ''"
    );
    if changes.is_empty() {
        return Ok(());
    }
    let mut heads: HashMap<Owner, (i64, i64, Option<u32>)> = HashMap::with_capacity(changes.len());
    for owners in session.chunks(changes.iter().map(|change| (&change.owner.user, &change.owner.queue))) {
        for row in sqlx::query(HEADS).bind(owners).fetch_all(session.db()).await? {
            let words: Option<String> = row.try_get(2)?;
            if let Some(head) = words.as_deref().and_then(head) {
                heads.insert(Owner { queue: row.try_get(0)?, user: row.try_get(1)? }, head);
            }
        }
    }
    let rows = session.chunks(changes.iter().map(|change| {
        let (head_turn, head_task, head_max) = match heads.get(&change.owner).filter(|_| !change.owner.is_nobody()) {
            Some((turn, task, max_running)) => (Some(*turn), Some(*task), *max_running),
            None => (None, None, None),
        };
        let (picked, was_picked) = (change.picked.unwrap_or(pick), u8::from(change.picked.is_some()));
        (&change.owner.user, change.running, head_turn, head_task, head_max, picked, was_picked, &change.owner.queue)
    }));
    for rows in rows {
        sqlx::query(WRITE).bind(rows).execute(session.db()).await?;
    }
    let idle = changes.iter().filter(|change| !heads.contains_key(&change.owner));
    for idle in session.chunks(idle.map(|change| (&change.owner.user, &change.owner.queue))) {
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
    const ROWS: &str = "SELECT id, CAST(what AS CHAR), name, tasks, queue FROM laelaps_tally WHERE id > ? ORDER BY id LIMIT ? FOR UPDATE SKIP LOCKED";
    let mut sums: BTreeMap<(String, String, String), i64> = BTreeMap::new();
    let mut ids: Vec<i64> = Vec::new();
    let mut last = after;
    // Folding what is of many names makes nothing smaller: then more of it is looked at.
    while count(ids.len()) < TALLY_MAX {
        let rows = sqlx::query(ROWS).bind(last).bind(FOLDED_MAX).fetch_all(session.db()).await?;
        for row in &rows {
            ids.push(row.try_get(0)?);
            *sums.entry((row.try_get(1)?, text(row, 2)?, queue_of(row, 4)?)).or_default() += row.try_get::<i64, _>(3)?;
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
    let sums = sums.map(|((what, name, queue), tasks)| (what.as_str(), name.as_str(), *tasks, queue.as_str()));
    add_to_tally(session, sums.collect()).await?;
    Ok(last)
}

/// Whether there are so many rows of counts that folding them is worth it.
pub(super) fn tally_is_long(after: i64) -> Query<'static, MySql, MySqlArguments> {
    const LONG: &str = "SELECT COUNT(*) > ? FROM (SELECT id FROM laelaps_tally WHERE id > ? LIMIT ?) AS some";
    let left = count(TALLY_LEFT);
    sqlx::query(LONG).bind(left).bind(after).bind(left + 1)
}
