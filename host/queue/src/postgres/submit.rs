//! New tasks: one statement for a batch, which is its own transaction.

use std::collections::{HashMap, HashSet};

use super::failure::Failure;
use super::heads::Places;
use super::operate;
use super::pooled::Db;
use super::session::Session;
use crate::batch::{self, Batch, Row};
use crate::{Descent, NewTask, Result, Submitted};

/// Data of one statement, unless one task alone has more.
const CHUNK_BYTES: usize = 32 << 20;

/// Numbers are given in the order of the tasks, rows are entered in the order of keys: two batches with keys in common then wait for each
/// other in one direction only. $9 and $10 are empty where there is no follow-up, $11 where each has the usual priority,
/// and $12 where each is in the default queue: the rows have NULL then.
const STORE: &str = "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    given AS MATERIALIZED (
        SELECT nextval('laelaps.task_number') AS id, clock.now, greatest(asked.run_at, clock.now) AS due_at, asked.*
        FROM clock, unnest($1::text[], $2::text[], $3::text[], $4::int8[], $5::int8[], $6::int8[], $7::int4[], $8::bytea[],
            $9::int8[], $10::int4[], $11::int2[], $12::text[])
            AS asked (key, type, user_name, max_running, max_attempts, run_at, bytes, data, root, depth, priority, queue)),
    created AS (
        INSERT INTO laelaps.task (id, created_at, run_at, bytes, max_running, max_attempts, priority, key, type, user_name, queue, root, depth, data)
        SELECT id, now, due_at, bytes, max_running, max_attempts, coalesce(priority, 0), key, type, user_name, coalesce(queue, ''), root, depth,
            CASE WHEN octet_length(data) <= 256 THEN data END
        FROM given ORDER BY key COLLATE \"C\"
        ON CONFLICT (key) DO NOTHING RETURNING id, created_at, run_at, turn, bytes, max_running, key, type, user_name, queue, root),
    beside AS (
        INSERT INTO laelaps.task_data (task, data)
        SELECT id, data FROM given WHERE octet_length(data) > 256 AND (id IN (SELECT id FROM created)) IS TRUE),
    ready AS (
        INSERT INTO laelaps.ready (turn, task, bytes, max_running, user_name, queue)
        SELECT turn, id, bytes, max_running, user_name, queue FROM created WHERE run_at <= created_at ORDER BY id),
    later AS (INSERT INTO laelaps.scheduled (run_at, task) SELECT run_at, id FROM created WHERE run_at > created_at),
    descended AS (INSERT INTO laelaps.descendant (task, root) SELECT id, root FROM created WHERE root IS NOT NULL),
    changed AS (
        INSERT INTO laelaps.account_change (user_name, queue, turn, task, max_running)
        SELECT DISTINCT ON (queue, user_name) user_name, queue, turn, id, max_running
        FROM created WHERE user_name <> '' AND run_at <= created_at ORDER BY queue, user_name, turn, id),
    counted AS (
        INSERT INTO laelaps.tally (type, queue, live, scheduled)
        SELECT type, queue, count(*), count(*) FILTER (WHERE run_at > created_at) FROM created GROUP BY type, queue)
    SELECT key, CASE WHEN run_at <= created_at THEN turn END, id FROM created";

/// Store a batch. Answers stand in the order of its tasks.
pub(super) async fn submit(session: &mut Session, batch: &Batch) -> Result<Vec<Submitted>, Failure> {
    let one = batch::chunk(&batch.rows, NewTask::BATCH_MAX, CHUNK_BYTES).1.is_empty();
    let earlier = if session.again { stored_before(session, &batch.rows).await? } else { HashSet::new() };
    let mut created = Created::default();
    if one {
        // Mostly all are new, and this is all there is to do.
        created = store_new(session.db()?, &batch.rows).await?;
    }
    if created.keys.len() + earlier.len() < batch.rows.len() && (!one || any_over(session.db()?, &batch.rows).await?) {
        let rest = created.missing(&batch.rows);
        session.begin().await?;
        created.add(store(session.db()?, &rest).await?);
        session.commit().await?;
    }
    session.counts(1);
    let firsts = std::mem::take(&mut created.firsts);
    session.afterwards(move |shared| {
        for (queue, place) in firsts.iter() {
            shared.marks.stored(queue, place);
        }
    });
    created.keys.extend(earlier);
    Ok(answers(batch, &created.keys))
}

/// What was stored.
#[derive(Default)]
pub(super) struct Created {
    pub(super) keys: HashSet<String>,
    /// The first places among what is ready.
    pub(super) firsts: Places,
}

impl Created {
    fn add(&mut self, more: Self) {
        self.keys.extend(more.keys);
        self.firsts.extend(more.firsts);
    }

    /// The rows that were not.
    fn missing(&self, rows: &[Row]) -> Vec<Row> {
        rows.iter().filter(|row| !self.keys.contains(&row.key)).cloned().collect()
    }
}

/// The rows that an earlier try of the same submit stored, whose answer was lost: those of their keys that are just so and came about since it
/// began.
async fn stored_before(session: &mut Session, rows: &[Row]) -> Result<HashSet<String>, Failure> {
    const STORED: &str = "SELECT asked.key FROM unnest($1::text[], $2::text[], $3::text[], $4::int8[], $5::int8[], $6::int4[], $8::text[])
            AS asked (key, type, user_name, max_running, max_attempts, bytes, queue)
        CROSS JOIN LATERAL (SELECT FROM laelaps.task WHERE task.key = asked.key AND task.type = asked.type AND task.user_name = asked.user_name
            AND task.queue = asked.queue
            AND task.max_running IS NOT DISTINCT FROM asked.max_running AND task.max_attempts IS NOT DISTINCT FROM asked.max_attempts
            AND task.bytes = asked.bytes AND task.created_at >= $7 OFFSET 0) AS same";
    let began = session.began_at().await?;
    let column = |of: fn(&Row) -> &str| rows.iter().map(of).collect::<Vec<&str>>();
    let numbers = |of: fn(&Row) -> Option<i64>| rows.iter().map(of).collect::<Vec<Option<i64>>>();
    let keys: Vec<String> = sqlx::query_scalar(STORED)
        .bind(column(|row| &row.key))
        .bind(column(|row| &row.task_type))
        .bind(column(|row| &row.user))
        .bind(numbers(|row| row.max_running.map(i64::from)))
        .bind(numbers(|row| row.max_attempts.map(i64::from)))
        .bind(rows.iter().map(|row| i32::try_from(row.bytes).unwrap_or(i32::MAX)).collect::<Vec<i32>>())
        .bind(began)
        .bind(column(|row| &row.queue))
        .fetch_all(session.db()?)
        .await?;
    Ok(keys.into_iter().collect())
}

/// Ended tasks with these keys whose retention has ended too.
pub(super) const OVER_BY_KEY: &str =
    "SELECT array_agg(id), (extract(epoch FROM clock_timestamp()) * 1000)::int8 FROM laelaps.task
    WHERE key = ANY($1) AND state IN ('finished', 'failed', 'cancelled')
        AND retained_until <= (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8)";

async fn over(db: Db<'_>, rows: &[Row]) -> Result<(Vec<i64>, i64), Failure> {
    let keys: Vec<&str> = rows.iter().map(|row| row.key.as_str()).collect();
    let (over, now): (Option<Vec<i64>>, i64) = sqlx::query_as(OVER_BY_KEY).bind(keys).fetch_one(db).await?;
    Ok((over.unwrap_or_default(), now))
}

async fn any_over(db: Db<'_>, rows: &[Row]) -> Result<bool, Failure> {
    Ok(!over(db, rows).await?.0.is_empty())
}

/// Store a batch in a caller's transaction, which the caller ends, and wake hosts when it commits.
pub(super) async fn submit_in(mut transaction: Db<'_>, batch: &Batch) -> Result<Vec<Submitted>, Failure> {
    const WAKE: &str = "SELECT laelaps.wake()";
    let created = store(transaction.again(), &batch.rows).await?;
    if !created.keys.is_empty() {
        sqlx::query(WAKE).execute(transaction).await?;
    }
    Ok(answers(batch, &created.keys))
}

fn answers(batch: &Batch, created: &HashSet<String>) -> Vec<Submitted> {
    Batch::answers(&batch.places, |row| created.contains(&batch.rows[row].key))
}

/// A descent as the table has it.
fn columns_of(descent: Descent) -> (i64, i32) {
    (descent.root.0, i32::try_from(descent.depth).unwrap_or(i32::MAX))
}

/// Store the rows whose key is new or free again. Of two rows with one key the first wins. In a transaction: a task whose
/// retention has ended and that clean-up has not come to yet goes first.
pub(super) async fn store(mut db: Db<'_>, rows: &[Row]) -> Result<Created, Failure> {
    let mut created = store_new(db.again(), rows).await?;
    if created.keys.len() < rows.len() {
        let rest = created.missing(rows);
        let (over, now) = over(db.again(), &rest).await?;
        if !over.is_empty() {
            operate::remove(db.again(), &over, now).await?;
            created.add(store_new(db, &rest).await?);
        }
    }
    Ok(created)
}

/// Store the rows whose key is new.
async fn store_new(mut db: Db<'_>, rows: &[Row]) -> Result<Created, Failure> {
    let mut created = Created { keys: HashSet::with_capacity(rows.len()), firsts: Places::default() };
    let mut rest = rows;
    while !rest.is_empty() {
        let (chunk, others) = batch::chunk(rest, NewTask::BATCH_MAX, CHUNK_BYTES);
        let column = |of: fn(&Row) -> &str| chunk.iter().map(of).collect::<Vec<&str>>();
        let numbers = |of: fn(&Row) -> Option<i64>| chunk.iter().map(of).collect::<Vec<Option<i64>>>();
        let (roots, depths): (Vec<Option<i64>>, Vec<Option<i32>>) = if chunk.iter().any(|row| row.descent.is_some()) {
            chunk.iter().map(|row| row.descent.map(columns_of).unzip()).unzip()
        } else {
            Default::default()
        };
        let priorities: Vec<i16> = if chunk.iter().any(|row| row.priority != 0) {
            chunk.iter().map(|row| i16::try_from(row.priority).unwrap_or_default()).collect()
        } else {
            Vec::new()
        };
        let is_queued = chunk.iter().any(|row| !row.queue.is_empty());
        let queues = if is_queued { column(|row| &row.queue) } else { Vec::new() };
        let queue_of: HashMap<&str, &str> =
            chunk.iter().filter(|_| is_queued).map(|row| (row.key.as_str(), row.queue.as_str())).collect();
        let stored: Vec<(String, Option<i64>, i64)> = sqlx::query_as(STORE)
            .bind(column(|row| &row.key))
            .bind(column(|row| &row.task_type))
            .bind(column(|row| &row.user))
            .bind(numbers(|row| row.max_running.map(i64::from)))
            .bind(numbers(|row| row.max_attempts.map(i64::from)))
            .bind(numbers(|row| row.run_at))
            .bind(chunk.iter().map(|row| i32::try_from(row.bytes).unwrap_or(i32::MAX)).collect::<Vec<i32>>())
            .bind(chunk.iter().map(|row| row.stored.as_slice()).collect::<Vec<&[u8]>>())
            .bind(roots)
            .bind(depths)
            .bind(priorities)
            .bind(queues)
            .fetch_all(db.again())
            .await?;
        for (key, turn, task) in stored {
            if let Some(turn) = turn {
                created.firsts.add(queue_of.get(key.as_str()).copied().unwrap_or_default(), (turn, task));
            }
            created.keys.insert(key);
        }
        rest = others;
    }
    Ok(created)
}
