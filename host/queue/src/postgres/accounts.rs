//! Users' accounts: what runs, and which task is each user's candidate.
//!
//! Submits and settlements only append to `account_change`; whoever is about to choose between users enters those changes first. An account
//! is changed only under its lock, and so is what is ready of its user taken away: whoever holds the lock and then looks (with a statement that
//! began later) sees the user's first ready task as it is. What enters brings a change along, so that it is not forgotten.

use super::failure::Failure;
use super::mark::From;
use super::session::Session;

/// The least and the most changes that one claim enters; between them four for each task it asks for.
pub(super) const CHANGES_MIN: usize = 100;
const CHANGES_MAX: usize = 4_000;
/// Changes entered together in the background.
const CHANGES_TOGETHER: usize = 1_000;

/// Take changes, and enter them: running is less by what stopped, and the candidate is no later than what became ready. In the order of
/// users, so that two do not wait for each other.
macro_rules! enter {
    ($lock:literal) => {
        concat!(
            "WITH taken AS (
        DELETE FROM laelaps.account_change WHERE id = ANY(ARRAY(
            SELECT id FROM laelaps.account_change WHERE id >= $1 ORDER BY id LIMIT $2 ",
            $lock,
            "))
        RETURNING id, user_name, stopped, turn, task, max_running),
    changed AS MATERIALIZED (
        SELECT user_name, sum(stopped)::int8 AS stopped, min(turn) AS head_turn,
            (array_agg(task ORDER BY turn, task))[1] AS head_task, (array_agg(max_running ORDER BY turn, task))[1] AS head_max,
            max(id) AS last
        FROM taken GROUP BY user_name),
    entered AS (
        INSERT INTO laelaps.account AS account (user_name, running, head_turn, head_task, head_max, picked)
        SELECT user_name, -stopped, head_turn, head_task, head_max, (SELECT last_value FROM laelaps.pick_number)
        FROM changed ORDER BY user_name
        ON CONFLICT (user_name) DO UPDATE SET running = account.running + excluded.running,
            (head_turn, head_task, head_max) = (SELECT * FROM (VALUES (account.head_turn, account.head_task, account.head_max),
                (excluded.head_turn, excluded.head_task, excluded.head_max)) AS head (turn, task, max_running)
                ORDER BY turn NULLS LAST, task LIMIT 1)
        RETURNING user_name, running, head_task)
    SELECT (SELECT max(last) FROM changed), array_agg(user_name) FILTER (WHERE (running = 0 AND head_task IS NULL)
        OR ((user_name, head_task) IN (SELECT user_name, head_task FROM changed)) IS TRUE) FROM entered"
        )
    };
}

pub(super) const ENTER: &str = enter!("FOR UPDATE SKIP LOCKED");

/// Also waits for changes that somebody else is entering at this moment.
pub(super) const ENTER_WAITING: &str = enter!("FOR UPDATE");

/// Look again for the first ready task of users whose candidate is not there any more, from where it was on. To be run under the users'
/// locks, after whatever was taken away.
pub(super) const HEADS: &str = "UPDATE laelaps.account SET (head_turn, head_task, head_max) = (
        SELECT turn, task, max_running FROM laelaps.ready
        WHERE ready.user_name = account.user_name AND (ready.turn, ready.task) >= (account.head_turn, account.head_task)
        ORDER BY turn, task LIMIT 1)
    WHERE user_name = ANY($1) AND head_task IS NOT NULL AND (SELECT ready.task FROM laelaps.ready
        WHERE ready.user_name = account.user_name AND ready.turn = account.head_turn AND ready.task = account.head_task) IS NULL";

/// Let go of users without any work.
pub(super) const LEAVE: &str = "DELETE FROM laelaps.account WHERE user_name = ANY($1) AND running = 0 AND head_task IS NULL";

/// Enter what came about, as much of it as a claim of so many tasks should.
pub(super) async fn enter_changes(session: &mut Session, limit: usize, from: From, sql: &'static str) -> Result<(), Failure> {
    let most = (limit * 4).clamp(CHANGES_MIN, CHANGES_MAX);
    if let Some(last) = enter(session, most, from.change, sql).await? {
        session.shared.marks.entered(from, last);
    }
    Ok(())
}

/// Enter what came about; answers whether there was anything.
pub(super) async fn enter_many(session: &mut Session) -> Result<bool, Failure> {
    let from = session.shared.marks.here().change;
    Ok(enter(session, CHANGES_TOGETHER, from, ENTER).await?.is_some())
}

/// Enter at most so many changes from one on; answers the last.
async fn enter(session: &mut Session, most: usize, from: i64, sql: &'static str) -> Result<Option<i64>, Failure> {
    session.begin().await?;
    let entered: (Option<i64>, Option<Vec<String>>) =
        sqlx::query_as(sql).bind(from).bind(i64::try_from(most).unwrap_or(i64::MAX)).fetch_one(session.db()?).await?;
    let (Some(last), users) = entered else {
        session.roll_back().await?;
        return Ok(None);
    };
    look_again(session, &users.unwrap_or_default()).await?;
    session.commit().await?;
    Ok(Some(last))
}

/// Take the locks of users' accounts, made anew where there is none, so that what is theirs can be taken away. In the order of users.
pub(super) async fn lock(session: &mut Session, mut users: Vec<String>) -> Result<(), Failure> {
    const LOCK: &str = "INSERT INTO laelaps.account (user_name, picked)
        SELECT user_name, (SELECT last_value FROM laelaps.pick_number) FROM unnest($1::text[]) AS asked (user_name)
        ON CONFLICT (user_name) DO UPDATE SET running = account.running";
    users.sort_unstable();
    users.dedup();
    users.retain(|user| !user.is_empty());
    if !users.is_empty() {
        sqlx::query(LOCK).bind(users).execute(session.db()?).await?;
    }
    Ok(())
}

/// Look again for the first ready tasks of users whose locks are held, and let go of those without any work.
pub(super) async fn look_again(session: &mut Session, users: &[String]) -> Result<(), Failure> {
    if !users.is_empty() {
        sqlx::query(HEADS).bind(users).execute(session.db()?).await?;
        sqlx::query(LEAVE).bind(users).execute(session.db()?).await?;
    }
    Ok(())
}
