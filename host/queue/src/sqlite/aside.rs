//! Rows that others have written, or that contradict each other: none of them may stop a claim, or anything else.
//!
//! A task whose row cannot be read is set aside: it fails, with words that say why and what can be done. A place that does not fit its task is
//! removed, and the task stands where its own row says. All of it works on numbers and in SQL alone, since names may be no text.

use std::time::Duration;

use sqlx::sqlite::SqlitePool;

use super::accounts::{Changes, Owner, Waiting, json};
use super::failure::Failure;
use super::rows::{Columns, lossy};
use super::settle::retain;
use super::writer::Session;
use crate::Policy;
use crate::outcome::ms;

/// Why a task was set aside: the code of its failure.
pub(super) const CODE: &str = "unreadable";
/// The code of one whose data alone is damaged.
pub(super) const DAMAGED: &str = "damaged-data";
/// Places of one user that are mended in one go.
const PLACES_MAX: i64 = 1_000;

/// Queue and user of an account, as bytes, since either may be no text.
pub(super) type Account = (Vec<u8>, Vec<u8>);

/// A row of `ready` or `suspect`.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) account: Account,
    /// Its turn.
    pub(super) turn: i64,
    pub(super) task: i64,
}

/// What is wrong with a task's row, if anything is, in words.
async fn problem(session: &mut Session, task: i64) -> Result<Option<String>, Failure> {
    const ROW: &str = "SELECT key, type, user, max_running, attempts, max_attempts, releases, lost, lost_alone, depth, queue
        FROM task WHERE id = ?1";
    let Some(row) = sqlx::query(ROW).bind(task).fetch_optional(session.db()).await? else { return Ok(None) };
    let mut columns = Columns::of(&row);
    for (at, name) in ["key", "type", "user"].into_iter().enumerate() {
        columns.text(at, name);
    }
    for (at, name) in
        ["max_running", "attempts", "max_attempts", "releases", "lost", "lost_alone", "depth"].into_iter().enumerate()
    {
        columns.maybe_count(at + 3, name);
    }
    columns.queue(10);
    Ok(columns.problem())
}

/// Fail waiting or running tasks that cannot be read, so that they stop nobody.
pub(super) async fn set_aside(session: &mut Session, tasks: &[i64]) -> Result<(), Failure> {
    const FAIL: &str =
        "UPDATE task SET state = 'failed', until = NULL, event = 'unreadable', finished_at = ?2, retained_until = ?3
        WHERE id = ?1 AND state IN ('waiting', 'running')";
    const WORDS: &str = "INSERT INTO failure (task, code, message) VALUES (?1, ?2, ?3)
        ON CONFLICT (task) DO UPDATE SET code = excluded.code, message = excluded.message";
    const DESCENT: &str = "DELETE FROM descendant WHERE task = ?1";
    const FAILED: &str = "INSERT INTO tally (what, name, tasks) VALUES ('ended', 'failed', 1)
        ON CONFLICT (what, queue, name) DO UPDATE SET tasks = tasks + 1";
    let now = session.now;
    let until = now.saturating_add(ms(Policy::default().failed_retention));
    let mut ended = Vec::with_capacity(tasks.len());
    for &task in tasks {
        let problem = problem(session, task).await?.unwrap_or_else(|| "its row contradicts others".to_owned());
        leave_queue(session, task).await?;
        if sqlx::query(FAIL).bind(task).bind(now).bind(until).execute(session.db()).await?.rows_affected() == 0 {
            continue;
        }
        tracing::error!(
            task,
            problem,
            "a task cannot be read; it is set aside as failed: see `laelaps show --id`, `laelaps cancel --id`"
        );
        let words = format!("{problem}; `laelaps show --id {task}` shows it, `laelaps cancel --id {task}` removes it");
        sqlx::query(WORDS).bind(task).bind(CODE).bind(words).execute(session.db()).await?;
        sqlx::query(DESCENT).bind(task).execute(session.db()).await?;
        sqlx::query(FAILED).execute(session.db()).await?;
        ended.push((until, task));
    }
    retain(session, ended).await
}

/// Take a task out of wherever it waits, and out of what is counted of waiting and running tasks. The state in its row is yet to follow.
pub(super) async fn leave_queue(session: &mut Session, task: i64) -> Result<(), Failure> {
    const READY: &str =
        "DELETE FROM ready WHERE (queue, user, turn, task) = (SELECT queue, user, turn, id FROM task WHERE id = ?1)";
    const SCHEDULED: &str = "DELETE FROM scheduled WHERE (run_at, task) = (SELECT run_at, id FROM task WHERE id = ?1)";
    const SUSPECT: &str = "DELETE FROM suspect WHERE (turn, task) = (SELECT turn, id FROM task WHERE id = ?1)";
    const UNSERVED: &str = "DELETE FROM unserved
        WHERE (queue, type, user, turn, task) = (SELECT queue, type, user, turn, id FROM task WHERE id = ?1)";
    const ACCOUNT: &str = "UPDATE account SET ready = max(ready - ?2, 0),
            running = max(running - (SELECT state = 'running' FROM task WHERE id = ?1), 0),
            (head_turn, head_task, head_max) = (SELECT turn, task, max_running FROM ready
                WHERE ready.queue = account.queue AND ready.user = account.user ORDER BY turn, task LIMIT 1)
        WHERE (queue, user) = (SELECT queue, user FROM task WHERE id = ?1)";
    const LEAVE: &str = "DELETE FROM account WHERE (queue, user) = (SELECT queue, user FROM task WHERE id = ?1)
        AND (queue <> '' OR user <> '') AND head_task IS NULL AND running = 0";
    const TYPE: &str = "UPDATE tally SET tasks = max(tasks - 1, 0)
        WHERE (what, queue, name) = (SELECT 'type', queue, type FROM task WHERE id = ?1 AND state IN ('waiting', 'running'))";
    const NO_TYPE: &str =
        "DELETE FROM tally WHERE (what, queue, name) = (SELECT 'type', queue, type FROM task WHERE id = ?1) AND tasks = 0";
    let ready = sqlx::query(READY).bind(task).execute(session.db()).await?.rows_affected();
    for sql in [SCHEDULED, SUSPECT, UNSERVED] {
        sqlx::query(sql).bind(task).execute(session.db()).await?;
    }
    sqlx::query(ACCOUNT).bind(task).bind(i64::from(ready == 1)).execute(session.db()).await?;
    for sql in [LEAVE, TYPE, NO_TYPE] {
        sqlx::query(sql).bind(task).execute(session.db()).await?;
    }
    // It may have been what kept its user back.
    session.wake = true;
    Ok(())
}

/// Set a user's account in a queue to what is ready and what runs. With an account that does not fit, a user could wait for ever.
pub(super) async fn recount(session: &mut Session, (queue, user): &Account) -> Result<(), Failure> {
    const ENTER: &str = "INSERT INTO account (queue, user, picked)
        SELECT coalesce(CAST(?1 AS TEXT), ''), coalesce(CAST(?2 AS TEXT), ''), coalesce(max(pick), 0) FROM counter WHERE true
        ON CONFLICT (queue, user) DO NOTHING";
    const COUNT: &str = "UPDATE account SET
            ready = (SELECT count(*) FROM ready WHERE ready.queue = account.queue AND ready.user = account.user),
            running = (SELECT count(*) FROM task INDEXED BY task_running
                WHERE task.state = 'running' AND task.queue = account.queue AND task.user = account.user),
            (head_turn, head_task, head_max) = (SELECT turn, task, max_running FROM ready
                WHERE ready.queue = account.queue AND ready.user = account.user ORDER BY turn, task LIMIT 1)
        WHERE queue = coalesce(CAST(?1 AS TEXT), '') AND user = coalesce(CAST(?2 AS TEXT), '')";
    const LEAVE: &str =
        "DELETE FROM account WHERE queue = coalesce(CAST(?1 AS TEXT), '') AND user = coalesce(CAST(?2 AS TEXT), '')
        AND (queue <> '' OR user <> '') AND head_task IS NULL AND running = 0";
    for sql in [ENTER, COUNT, LEAVE] {
        sqlx::query(sql).bind(queue.clone()).bind(user.clone()).execute(session.db()).await?;
    }
    Ok(())
}

/// Make the counter anew that somebody has deleted: no lease is given out twice of which anything is left.
pub(super) async fn restore_counter(session: &mut Session) -> Result<(), Failure> {
    const RESTORE: &str = "INSERT INTO counter (id, lease, pick)
        SELECT 1, max(coalesce((SELECT max(lease) FROM task), 0), coalesce((SELECT max(lease) FROM attempt), 0)),
            coalesce((SELECT max(picked) FROM account), 0)";
    tracing::error!("the row of the table counter is missing; it is made anew from the leases that are known");
    sqlx::query(RESTORE).execute(session.db()).await?;
    Ok(())
}

/// Remove places that do not fit their tasks. A task that waits and stands nowhere then is put where its own row says.
pub(super) async fn drop_places(session: &mut Session, places: &[Place]) -> Result<(), Failure> {
    const READY: &str = "DELETE FROM ready
        WHERE queue = coalesce(CAST(?1 AS TEXT), '') AND user = coalesce(CAST(?2 AS TEXT), '') AND turn = ?3 AND task = ?4";
    const SUSPECT: &str = "DELETE FROM suspect WHERE turn = ?1 AND task = ?2";
    let mut accounts: Vec<&Account> = Vec::with_capacity(places.len());
    for place in places {
        let (queue, user) = &place.account;
        tracing::error!(task = place.task, queue = %lossy(queue), user = %lossy(user), "a place in the queue does not fit its task; it is removed");
        let ready = sqlx::query(READY).bind(queue.clone()).bind(user.clone()).bind(place.turn).bind(place.task);
        ready.execute(session.db()).await?;
        sqlx::query(SUSPECT).bind(place.turn).bind(place.task).execute(session.db()).await?;
        accounts.push(&place.account);
    }
    accounts.sort_unstable();
    accounts.dedup();
    for account in accounts {
        recount(session, account).await?;
    }
    put_back(session, &places.iter().map(|place| place.task).collect::<Vec<_>>()).await
}

/// Put waiting tasks that stand nowhere where their rows say, or aside.
pub(super) async fn put_back(session: &mut Session, tasks: &[i64]) -> Result<(), Failure> {
    const NOWHERE: &str =
        "SELECT id, run_at, user, max_running, alone, priority, queue FROM task WHERE id IN (SELECT value FROM json_each(?1))
        AND state = 'waiting' AND NOT EXISTS (SELECT 1 FROM ready WHERE (queue, user, turn, task) = (task.queue, task.user, task.turn, task.id))
        AND NOT EXISTS (SELECT 1 FROM scheduled WHERE (run_at, task) = (task.run_at, task.id))
        AND NOT EXISTS (SELECT 1 FROM suspect WHERE (turn, task) = (task.turn, task.id))
        AND NOT EXISTS (SELECT 1 FROM unserved WHERE (queue, type, user, turn, task) = (task.queue, task.type, task.user, task.turn, task.id))";
    let rows = sqlx::query(NOWHERE).bind(json(tasks)).fetch_all(session.db()).await?;
    let (waiting, unreadable) = waiting(rows.iter());
    let mut changes = Changes::default();
    changes.enqueue(session, &waiting).await?;
    changes.write(session).await?;
    set_aside(session, &unreadable).await
}

/// Tasks as they wait, by number, time, user, most running, whether alone, priority and queue; and the numbers of those whose row cannot be read.
pub(super) fn waiting<'r>(rows: impl Iterator<Item = &'r sqlx::sqlite::SqliteRow>) -> (Vec<Waiting>, Vec<i64>) {
    let mut waiting = Vec::new();
    let mut unreadable = Vec::new();
    for row in rows {
        let mut columns = Columns::of(row);
        let task = Waiting {
            task: columns.whole(0, "number"),
            run_at: columns.whole(1, "run_at"),
            priority: columns.whole(5, "priority"),
            owner: Owner { queue: columns.queue(6), user: columns.text(2, "user") },
            max_running: columns.maybe_count(3, "max_running").map(i64::from),
            alone: columns.whole(4, "alone") != 0,
        };
        if columns.problem().is_none() { waiting.push(task) } else { unreadable.push(task.task) }
    }
    (waiting, unreadable)
}

/// Set aside what is ready in an account whose queue or user is no text, and settle the account.
pub(super) async fn of_account(session: &mut Session, account: &Account) -> Result<(), Failure> {
    const PLACES: &str = "SELECT ready.turn, ready.task, task.id IS NOT NULL FROM ready
        LEFT JOIN task ON task.id = ready.task AND task.queue = ready.queue AND task.user = ready.user AND task.turn = ready.turn AND task.state = 'waiting'
        WHERE ready.queue = coalesce(CAST(?1 AS TEXT), '') AND ready.user = coalesce(CAST(?2 AS TEXT), '') LIMIT ?3";
    let (queue, user) = account;
    let rows: Vec<(i64, i64, bool)> =
        sqlx::query_as(PLACES).bind(queue.clone()).bind(user.clone()).bind(PLACES_MAX).fetch_all(session.db()).await?;
    let (fitting, others): (Vec<_>, Vec<_>) = rows.into_iter().partition(|(.., fits)| *fits);
    set_aside(session, &fitting.iter().map(|(_, task, _)| *task).collect::<Vec<_>>()).await?;
    let others: Vec<Place> = others.into_iter().map(|(turn, task, _)| Place { account: account.clone(), turn, task }).collect();
    drop_places(session, &others).await?;
    recount(session, account).await
}

/// Users whose accounts do not fit what is ready and what runs, at most a batch. Reads, and takes time that grows with the backlog.
pub(super) async fn misfits(readers: &SqlitePool) -> Result<Vec<Account>, sqlx::Error> {
    const MISFITS: &str = "WITH counted (queue, user, ready, running) AS (
            SELECT queue, user, sum(ready), sum(running) FROM (
                SELECT queue, user, count(*) AS ready, 0 AS running FROM ready GROUP BY queue, user
                UNION ALL SELECT queue, user, 0, count(*) FROM task INDEXED BY task_running WHERE state = 'running' GROUP BY queue, user)
            GROUP BY queue, user)
        SELECT CAST(account.queue AS BLOB), CAST(account.user AS BLOB)
            FROM account LEFT JOIN counted ON counted.queue = account.queue AND counted.user = account.user
            WHERE account.ready <> coalesce(counted.ready, 0) OR account.running <> coalesce(counted.running, 0)
                OR account.head_task IS NOT (SELECT task FROM ready
                    WHERE ready.queue = account.queue AND ready.user = account.user ORDER BY turn, task LIMIT 1)
                OR ((account.queue <> '' OR account.user <> '') AND counted.user IS NULL)
        UNION ALL
        SELECT CAST(queue AS BLOB), CAST(user AS BLOB) FROM counted
            WHERE NOT EXISTS (SELECT 1 FROM account WHERE account.queue = counted.queue AND account.user = counted.user)
        LIMIT ?1";
    sqlx::query_as(MISFITS).bind(PLACES_MAX).fetch_all(readers).await
}

/// How often accounts are compared with what they count, at most.
pub(super) const REPAIR_INTERVAL: Duration = Duration::from_secs(60);
