//! New tasks.

use std::collections::HashMap;

use sqlx::Row as _;

use super::accounts::{Changes, Owner, Waiting, json};
use super::failure::Failure;
use super::operate;
use super::writer::Session;
use crate::batch::{self, Batch, Row};
use crate::{Compression, Submitted};

/// Rows of one statement.
const CHUNK_ROWS: usize = 1_000;
/// Data of one statement, unless one task alone has more.
const CHUNK_BYTES: usize = 32 << 20;

/// Store the batches' tasks whose key is new; the caller writes the changes.
pub(super) async fn store_all(batches: Vec<Batch>, session: &mut Session, changes: &mut Changes) -> Result<(), Failure> {
    let rows: Vec<Row> = batches.into_iter().flat_map(|batch| batch.rows).collect();
    store_rows(session, &rows, changes).await.map(drop)
}

/// Store those tasks of several batches whose key is new; of two with one key the first wins. Answers stand in the order of the tasks.
pub(super) async fn store_together(batches: Vec<Batch>, session: &mut Session) -> Result<Vec<Vec<Submitted>>, Failure> {
    let mut rows = Vec::with_capacity(batches.iter().map(|batch| batch.rows.len()).sum());
    let mut places = Vec::with_capacity(batches.len());
    for mut batch in batches {
        places.push((rows.len(), batch.places));
        rows.append(&mut batch.rows);
    }
    let mut changes = Changes::default();
    let created = store_rows(session, &rows, &mut changes).await?;
    changes.write(session).await?;
    Ok(places.into_iter().map(|(first, places)| Batch::answers(&places, |row| created[first + row])).collect())
}

/// Store the rows whose key is new. Answers for each whether it was.
async fn store_rows(session: &mut Session, rows: &[Row], changes: &mut Changes) -> Result<Vec<bool>, Failure> {
    let mut created = Vec::with_capacity(rows.len());
    let mut rest = rows;
    while !rest.is_empty() {
        let (chunk, others) = batch::chunk(rest, CHUNK_ROWS, CHUNK_BYTES);
        store_chunk(session, chunk, changes, &mut created).await?;
        rest = others;
    }
    Ok(created)
}

async fn store_chunk(
    session: &mut Session,
    chunk: &[Row],
    changes: &mut Changes,
    created: &mut Vec<bool>,
) -> Result<(), Failure> {
    const TASK: &str = "INSERT INTO task (key, type, user, max_running, max_attempts, created_at, run_at, root, depth, priority, queue)
        SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, ?2, value ->> 5, value ->> 6, value ->> 7, value ->> 8, value ->> 9
        FROM json_each(?1) WHERE true ON CONFLICT (key) DO NOTHING RETURNING id, key";
    // Somebody may have written there before the task was.
    const DATA: &str = "INSERT OR REPLACE INTO task_data (task, bytes, data)
        SELECT value ->> 0, value ->> 1,
            CASE value ->> 4 WHEN 0 THEN CAST(substr(?2, value ->> 2, value ->> 3) AS TEXT) ELSE substr(?2, value ->> 2, value ->> 3) END
        FROM json_each(?1)";
    let now = session.now;
    let run_at = |row: &Row| row.run_at.map_or(now, |moment| moment.max(now));
    let rows = |those: &mut dyn Iterator<Item = &Row>| {
        json(those.map(|row| {
            let (root, depth) = row.descent.map(|descent| (descent.root, descent.depth)).unzip();
            let Row { key, task_type, queue, user, max_running, max_attempts, priority, .. } = row;
            (key, task_type, user, max_running, max_attempts, run_at(row), root, depth, priority, queue)
        }))
    };
    let mut stored = sqlx::query(TASK).bind(rows(&mut chunk.iter())).bind(now).fetch_all(session.db()).await?;
    if stored.len() < chunk.len() && free_keys(session, chunk, changes).await? {
        // What has a number already is met again as a key that exists.
        stored.extend(sqlx::query(TASK).bind(rows(&mut chunk.iter())).bind(now).fetch_all(session.db()).await?);
    }
    let mut ids = HashMap::with_capacity(stored.len());
    for row in stored {
        ids.insert(row.try_get::<String, _>(1)?, row.try_get::<i64, _>(0)?);
    }

    let mut bytes = Vec::with_capacity(chunk.iter().map(|row| row.stored.len()).sum());
    let mut parts = Vec::with_capacity(ids.len());
    let mut waiting = Vec::with_capacity(ids.len());
    let mut descendants = Vec::new();
    for row in chunk {
        // Follow-ups of several attempts may share a key: the first one was stored, and takes the number.
        let id = ids.remove(row.key.as_str());
        created.push(id.is_some());
        let Some(task) = id else { continue };
        parts.push((task, row.bytes, bytes.len() + 1, row.stored.len(), u8::from(row.compression == Compression::Gzip)));
        bytes.extend_from_slice(&row.stored);
        descendants.extend(row.descent.map(|descent| (task, descent.root.0)));
        waiting.push(Waiting {
            task,
            run_at: run_at(row),
            priority: i64::from(row.priority),
            owner: Owner { queue: row.queue.clone(), user: row.user.clone() },
            max_running: row.max_running.map(i64::from),
            alone: false,
        });
        changes.entered(&row.queue, &row.task_type);
    }
    if !parts.is_empty() {
        sqlx::query(DATA).bind(json(parts)).bind(bytes).execute(session.db()).await?;
        changes.enqueue(session, &waiting).await?;
    }
    descend(session, &descendants).await
}

/// Remove tasks of these keys whose retention has ended: their keys are free, whether or not clean-up has come to them. Answers whether there
/// were any.
async fn free_keys(session: &mut Session, chunk: &[Row], changes: &mut Changes) -> Result<bool, Failure> {
    const OVER: &str = "SELECT id FROM task WHERE key IN (SELECT value FROM json_each(?1)) AND retained_until <= ?2";
    let now = session.now;
    let keys = json(chunk.iter().map(|row| &row.key));
    let over: Vec<i64> = sqlx::query_scalar(OVER).bind(keys).bind(now).fetch_all(session.db()).await?;
    Ok(!over.is_empty() && !operate::remove_over(session, &over, changes).await?.is_empty())
}

/// Note follow-ups that have not ended, each with its root.
pub(super) async fn descend(session: &mut Session, descendants: &[(i64, i64)]) -> Result<(), Failure> {
    const DESCEND: &str = "INSERT INTO descendant (task, root) SELECT value ->> 0, value ->> 1 FROM json_each(?1) WHERE true
        ON CONFLICT (task) DO NOTHING";
    if !descendants.is_empty() {
        sqlx::query(DESCEND).bind(json(descendants)).execute(session.db()).await?;
    }
    Ok(())
}

/// Follow-ups have ended.
pub(super) async fn end_descent(session: &mut Session, tasks: &[i64]) -> Result<(), Failure> {
    const END: &str = "DELETE FROM descendant WHERE task IN (SELECT value FROM json_each(?1))";
    if !tasks.is_empty() {
        sqlx::query(END).bind(json(tasks)).execute(session.db()).await?;
    }
    Ok(())
}
