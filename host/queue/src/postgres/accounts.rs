//! Users' accounts: what runs, and which task is each user's candidate.
//!
//! Submits and settlements only append to `account_change`; whoever is about to choose between users enters those changes first. An account
//! is changed only under its lock, and so is what is ready of its user taken away: whoever holds the lock and then looks (with a statement that
//! began later) sees the user's first ready task as it is. What enters brings a change along, so that it is not forgotten.

use super::failure::Failure;
use super::mark::From;
use super::session::Session;

/// Whose account: a user in a queue. An empty user is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Owner {
    pub(super) queue: String,
    pub(super) user: String,
}

impl Owner {
    pub(super) fn is_nobody(&self) -> bool {
        self.user.is_empty()
    }
}

/// Queues and users, to be bound.
pub(super) fn columns(owners: &[Owner]) -> (Vec<&str>, Vec<&str>) {
    owners.iter().map(|owner| (owner.queue.as_str(), owner.user.as_str())).unzip()
}

/// The least and the most changes that one claim enters; between them four for each task it asks for.
pub(super) const CHANGES_MIN: usize = 100;
const CHANGES_MAX: usize = 4_000;
/// Changes entered together in the background.
const CHANGES_TOGETHER: usize = 1_000;

/// Take changes, and enter them: running is less by what stopped, and the candidate is no later than what became ready. In the order of
/// queues and users, so that two do not wait for each other.
macro_rules! enter {
    ($lock:literal) => {
        concat!(
            "WITH taken AS (
        DELETE FROM laelaps.account_change WHERE id = ANY(ARRAY(
            SELECT id FROM laelaps.account_change WHERE id >= $1 ORDER BY id LIMIT $2 ",
            $lock,
            "))
        RETURNING id, user_name, queue, stopped, turn, task, max_running),
    changed AS MATERIALIZED (
        SELECT queue, user_name, sum(stopped)::int8 AS stopped, min(turn) AS head_turn,
            (array_agg(task ORDER BY turn, task))[1] AS head_task, (array_agg(max_running ORDER BY turn, task))[1] AS head_max,
            max(id) AS last
        FROM taken GROUP BY queue, user_name),
    entered AS (
        INSERT INTO laelaps.account AS account (queue, user_name, running, head_turn, head_task, head_max, picked)
        SELECT queue, user_name, -stopped, head_turn, head_task, head_max, (SELECT last_value FROM laelaps.pick_number)
        FROM changed ORDER BY queue, user_name
        ON CONFLICT (queue, user_name) DO UPDATE SET running = account.running + excluded.running,
            (head_turn, head_task, head_max) = (SELECT * FROM (VALUES (account.head_turn, account.head_task, account.head_max),
                (excluded.head_turn, excluded.head_task, excluded.head_max)) AS head (turn, task, max_running)
                ORDER BY turn NULLS LAST, task LIMIT 1)
        RETURNING queue, user_name, running, head_task),
    again AS MATERIALIZED (
        SELECT queue, user_name FROM entered WHERE (running = 0 AND head_task IS NULL)
            OR ((queue, user_name, head_task) IN (SELECT queue, user_name, head_task FROM changed)) IS TRUE)
    SELECT (SELECT max(last) FROM changed), array_agg(queue), array_agg(user_name) FROM again"
        )
    };
}

pub(super) const ENTER: &str = enter!("FOR UPDATE SKIP LOCKED");

/// Also waits for changes that somebody else is entering at this moment.
pub(super) const ENTER_WAITING: &str = enter!("FOR UPDATE");

/// The rows of accounts, $1 queues and $2 users, that are locked by this transaction and so stay where they are.
macro_rules! these {
    () => {
        "ctid = ANY(ARRAY(SELECT one.place FROM unnest($1::text[], $2::text[]) AS asked (queue, user_name) CROSS JOIN LATERAL (
        SELECT ctid AS place FROM laelaps.account WHERE account.queue = asked.queue AND account.user_name = asked.user_name OFFSET 0) AS one))"
    };
}
pub(super) use these;

/// Look again for the first ready task of users whose candidate is not there any more, from where it was on. To be run under the users'
/// locks, after whatever was taken away.
pub(super) const HEADS: &str = concat!(
    "UPDATE laelaps.account SET (head_turn, head_task, head_max) = (
        SELECT turn, task, max_running FROM laelaps.ready WHERE ready.queue = account.queue AND ready.user_name = account.user_name
            AND (ready.turn, ready.task) >= (account.head_turn, account.head_task)
        ORDER BY turn, task LIMIT 1)
    WHERE ",
    these!(),
    " AND head_task IS NOT NULL AND (SELECT ready.task FROM laelaps.ready WHERE ready.queue = account.queue
        AND ready.user_name = account.user_name AND ready.turn = account.head_turn AND ready.task = account.head_task) IS NULL"
);

/// Let go of users without any work.
pub(super) const LEAVE: &str = concat!("DELETE FROM laelaps.account WHERE ", these!(), " AND running = 0 AND head_task IS NULL");

/// Enter what came about, as much of it as a claim of so many tasks should.
///
/// Answers whether there was anything. A claim of some queues enters more at once: what is its own may stand behind changes of others.
pub(super) async fn enter_changes(session: &mut Session, limit: usize, from: &From, sql: &'static str) -> Result<bool, Failure> {
    let least = if from.way.queues.is_some() { CHANGES_TOGETHER } else { CHANGES_MIN };
    let most = (limit * 4).clamp(least, CHANGES_MAX);
    let last = enter(session, most, from.change, sql).await?;
    if let Some(last) = last {
        session.shared.marks.entered(from, last);
    }
    Ok(last.is_some())
}

/// Enter what came about; answers whether there was anything.
pub(super) async fn enter_many(session: &mut Session) -> Result<bool, Failure> {
    let from = session.shared.marks.change();
    Ok(enter(session, CHANGES_TOGETHER, from, ENTER).await?.is_some())
}

/// Enter at most so many changes from one on; answers the last.
async fn enter(session: &mut Session, most: usize, from: i64, sql: &'static str) -> Result<Option<i64>, Failure> {
    session.begin().await?;
    let entered: (Option<i64>, Option<Vec<String>>, Option<Vec<String>>) =
        sqlx::query_as(sql).bind(from).bind(i64::try_from(most).unwrap_or(i64::MAX)).fetch_one(session.db()?).await?;
    let (Some(last), queues, users) = entered else {
        session.roll_back().await?;
        return Ok(None);
    };
    let owners = queues.into_iter().flatten().zip(users.into_iter().flatten());
    let owners: Vec<Owner> = owners.map(|(queue, user)| Owner { queue, user }).collect();
    look_again(session, &owners).await?;
    session.commit().await?;
    Ok(Some(last))
}

/// Take the locks of users' accounts, made anew where there is none, so that what is theirs can be taken away. In the order of queues and users.
pub(super) async fn lock(session: &mut Session, mut owners: Vec<Owner>) -> Result<(), Failure> {
    const LOCK: &str = "INSERT INTO laelaps.account (queue, user_name, picked)
        SELECT queue, user_name, (SELECT last_value FROM laelaps.pick_number) FROM unnest($1::text[], $2::text[]) AS asked (queue, user_name)
        ON CONFLICT (queue, user_name) DO UPDATE SET running = account.running";
    owners.sort_unstable();
    owners.dedup();
    owners.retain(|owner| !owner.is_nobody());
    if !owners.is_empty() {
        let (queues, users) = columns(&owners);
        sqlx::query(LOCK).bind(queues).bind(users).execute(session.db()?).await?;
    }
    Ok(())
}

/// Look again for the first ready tasks of users whose locks are held, and let go of those without any work.
pub(super) async fn look_again(session: &mut Session, owners: &[Owner]) -> Result<(), Failure> {
    if !owners.is_empty() {
        let (queues, users) = columns(owners);
        sqlx::query(HEADS).bind(&queues).bind(&users).execute(session.db()?).await?;
        sqlx::query(LEAVE).bind(queues).bind(users).execute(session.db()?).await?;
    }
    Ok(())
}
