//! New tasks.
//!
//! Neither server can tell which rows an INSERT of many has made, so each submit marks its rows with a number of its own, where the lease
//! will stand. The same mark tells a repeated submit that the first one was committed after all.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use sqlx::{MySqlConnection, Row as _};

use super::MySql;
use super::accounts::{Changes, Waiting};
use super::connect::text;
use super::failure::{Failure, state_or_failed};
use super::operate::remove;
use super::rows::{Parts, ids, json, lockable, names, parts};
use super::session::{Session, Waiting as LockWait};
use crate::batch::{Batch, Row};
use crate::patience::Patience;
use crate::{Error, NewTask, Result, Submitted};

/// Tasks of one statement.
const CHUNK_ROWS: usize = 1_000;
/// The most bytes of one of them in a statement, but for its data: three names with each byte escaped, the queue, and numbers.
const ROW_BYTES: usize = 2 * 3 * 255 + 64 + 200;
/// Before another look whether a key is free.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// Store the rows whose key is new; the caller writes the changes. Answers for each whether it was.
pub(super) async fn store_rows(
    session: &mut Session<'_>,
    rows: &[Row],
    mark: i64,
    changes: &mut Changes,
) -> Result<Vec<bool>, Failure> {
    let mut created = Vec::with_capacity(rows.len());
    let mut waiting = Vec::with_capacity(rows.len());
    let mut stored = Parts::new(session.bytes_max);
    let mut descendants = Vec::new();
    // A row has at most so many bytes as a parameter, its names escaped.
    let chunk_rows = CHUNK_ROWS.min(session.bytes_max / ROW_BYTES).max(1);
    for chunk in rows.chunks(chunk_rows) {
        for (row, task, run_at) in store_chunk(session, chunk, mark, changes).await? {
            created.push(task.is_some());
            let Some(task) = task else { continue };
            stored.push(task, row.bytes, &row.stored);
            changes.entered(&row.queue, &row.task_type);
            descendants.extend(row.descent.map(|descent| (task, descent.root.0)));
            let (priority, queue, user) = (i64::from(row.priority), row.queue.clone(), row.user.clone());
            waiting.push(Waiting { task, queue, run_at, priority, user, max_running: row.max_running, alone: false });
        }
    }
    store_data(session, stored).await?;
    descend(session, &descendants).await?;
    changes.enqueue(session, &waiting).await?;
    Ok(created)
}

/// A number for the rows of a submit that no other has.
pub(super) fn new_mark() -> i64 {
    -fastrand::i64(1..i64::MAX)
}

pub(super) const INSERT: &str = "INSERT IGNORE INTO laelaps_task
        (`key`, type, queue, user, max_running, max_attempts, created_at, run_at, root, depth, priority, lease)
    SELECT s.name, s.type, s.queue, s.user, s.max_running, s.max_attempts, ?, s.run_at, s.root, s.depth, s.priority, ? FROM JSON_TABLE(?, '$[*]' COLUMNS (
        place FOR ORDINALITY, name VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', type VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[1]',
        user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[2]', max_running BIGINT PATH '$[3]', max_attempts BIGINT PATH '$[4]',
        run_at BIGINT PATH '$[5]', root BIGINT PATH '$[6]', depth BIGINT PATH '$[7]', priority INT PATH '$[8]',
        queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[9]')) AS s ORDER BY s.place";

/// Rows of one submit stand together or nearly so, whatever others insert meanwhile.
pub(super) const INSERTED: &str = "SELECT id, `key` FROM laelaps_task WHERE id >= ? AND lease = ? ORDER BY id LIMIT ?";

/// Wait until nobody else is about to store one of these keys. A statement that stores keeps all others from storing while it waits for a key
/// (InnoDB's lock of the next number), this one keeps nobody. It locks nothing but what is there already.
pub(super) async fn wait_for_keys(session: &mut Session<'_>, rows: &[Row]) -> Result<(), Failure> {
    let mut keys: Vec<&str> = rows.iter().map(|row| row.key.as_str()).collect();
    keys.sort_unstable();
    for keys in session.chunks(keys) {
        sqlx::query(TAKEN).bind(keys).fetch_all(session.db()).await?;
    }
    Ok(())
}

pub(super) const TAKEN: &str = concat!(
    "SELECT t.`key` FROM ",
    lockable!(names!()),
    " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (by_key) ON t.`key` = s.name LOCK IN SHARE MODE"
);

/// Each row of a chunk with the number of its task, if it was stored, and when it may run.
async fn store_chunk<'r>(
    session: &mut Session<'_>,
    chunk: &'r [Row],
    mark: i64,
    changes: &mut Changes,
) -> Result<Vec<(&'r Row, Option<i64>, i64)>, Failure> {
    let mut ids = insert(session, chunk.iter(), mark).await?;
    let refused: Vec<&Row> = chunk.iter().filter(|row| !ids.contains_key(row.key.as_str())).collect();
    if !refused.is_empty() && free_keys(session, &refused, changes).await? {
        ids.extend(insert(session, refused.into_iter(), mark).await?);
    }
    // Follow-ups of several attempts may share a key: the first one was stored, and takes the number.
    let now = session.now;
    Ok(chunk.iter().map(|row| (row, ids.remove(row.key.as_str()), run_at(row, now))).collect())
}

fn run_at(row: &Row, now: i64) -> i64 {
    row.run_at.map_or(now, |moment| moment.max(now))
}

/// A key is free once its retention has ended: remove the tasks that still have one of these. Answers whether there was one.
async fn free_keys(session: &mut Session<'_>, rows: &[&Row], changes: &mut Changes) -> Result<bool, Failure> {
    const OVER: &str = concat!(
        "SELECT t.id FROM ",
        names!(),
        " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (by_key) ON t.`key` = s.name WHERE t.retained_until <> 0 AND t.retained_until <= ?"
    );
    const HELD: &str = concat!(
        "SELECT t.id, CAST(t.state AS CHAR) FROM ",
        lockable!(ids!()),
        " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id
        WHERE t.retained_until <> 0 AND t.retained_until <= ? FOR UPDATE"
    );
    let now = session.now;
    let mut over: Vec<i64> = Vec::new();
    for keys in session.chunks(rows.iter().map(|row| row.key.as_str())) {
        over.extend(sqlx::query_scalar::<_, i64>(OVER).bind(keys).bind(now).fetch_all(session.db()).await?);
    }
    if over.is_empty() {
        return Ok(false);
    }
    over.sort_unstable();
    let mut removed = Vec::with_capacity(over.len());
    for row in sqlx::query(HELD).bind(json(over)).bind(now).fetch_all(session.db()).await? {
        removed.push(row.try_get(0)?);
        changes.removed(state_or_failed(&text(&row, 1)?), 1);
    }
    remove(session, &removed).await?;
    Ok(!removed.is_empty())
}

/// Insert the rows whose key is new; answers their numbers by key.
async fn insert<'r>(
    session: &mut Session<'_>,
    chunk: impl Iterator<Item = &'r Row>,
    mark: i64,
) -> Result<HashMap<String, i64>, Failure> {
    let now = session.now;
    let mut chunk: Vec<&Row> = chunk.collect();
    // Tasks have their numbers in the order of the caller. Two callers that have run into each other store the same keys in one order instead.
    if session.conflicts > 0 {
        chunk.sort_unstable_by(|one, other| one.key.cmp(&other.key));
    }
    let rows = json(chunk.into_iter().map(|row| {
        let (root, depth) = row.descent.map(|descent| (descent.root, descent.depth)).unzip();
        let (max_running, max_attempts, run_at) = (row.max_running, row.max_attempts, run_at(row, now));
        (&row.key, &row.task_type, &row.user, max_running, max_attempts, run_at, root, depth, row.priority, &row.queue)
    }));
    let inserted = sqlx::query(INSERT).bind(now).bind(mark).bind(rows).execute(session.db()).await?;
    let mut ids = HashMap::new();
    if inserted.rows_affected() > 0 {
        let first = i64::try_from(inserted.last_insert_id()).unwrap_or(i64::MAX);
        let most = i64::try_from(inserted.rows_affected()).unwrap_or(i64::MAX);
        for row in sqlx::query(INSERTED).bind(first).bind(mark).bind(most).fetch_all(session.db()).await? {
            ids.insert(text(&row, 1)?, row.try_get::<i64, _>(0)?);
        }
    }
    Ok(ids)
}

async fn store_data(session: &mut Session<'_>, stored: Parts) -> Result<(), Failure> {
    const DATA: &str = concat!(
        "INSERT INTO laelaps_task_data (task, part, bytes, data) SELECT s.task, s.part, s.size, SUBSTRING(?, s.start, s.length) FROM ",
        parts!()
    );
    for (bytes, rows) in stored.into_statements() {
        sqlx::query(DATA).bind(bytes).bind(rows).execute(session.db()).await?;
    }
    Ok(())
}

/// Note follow-ups that have not ended, each with its root.
pub(super) async fn descend(session: &mut Session<'_>, descendants: &[(i64, i64)]) -> Result<(), Failure> {
    const DESCEND: &str = "INSERT IGNORE INTO laelaps_descendant (task, root) SELECT s.task, s.root
        FROM JSON_TABLE(?, '$[*]' COLUMNS (task BIGINT PATH '$[0]', root BIGINT PATH '$[1]')) AS s";
    for descendants in session.chunks(descendants) {
        sqlx::query(DESCEND).bind(descendants).execute(session.db()).await?;
    }
    Ok(())
}

/// Follow-ups have ended.
pub(super) async fn end_descent(session: &mut Session<'_>, tasks: &[i64]) -> Result<(), Failure> {
    const END: &str =
        concat!("DELETE d FROM ", ids!(), " STRAIGHT_JOIN laelaps_descendant AS d FORCE INDEX (PRIMARY) ON d.task = s.id");
    if !tasks.is_empty() {
        sqlx::query(END).bind(json(tasks)).execute(session.db()).await?;
    }
    Ok(())
}

/// Which rows an earlier try of the same submit has stored after all; None if it has stored none.
async fn stored_before(session: &mut Session<'_>, rows: &[Row], mark: i64) -> Result<Option<Vec<bool>>, Failure> {
    const MARKED: &str = concat!(
        "SELECT t.`key` FROM ",
        names!(),
        " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (by_key) ON t.`key` = s.name WHERE t.lease = ?"
    );
    let mut found: HashSet<String> = HashSet::new();
    for keys in session.chunks(rows.iter().map(|row| row.key.as_str())) {
        for row in sqlx::query(MARKED).bind(keys).bind(mark).fetch_all(session.db()).await? {
            found.insert(text(&row, 0)?);
        }
    }
    // Of several rows with one key the first is the one that was stored.
    Ok((!found.is_empty()).then(|| rows.iter().map(|row| found.remove(row.key.as_str())).collect()))
}

/// Store batches in the session's transaction, or find out what an earlier try of the same has stored. The answers of each batch.
pub(super) async fn submit(session: &mut Session<'_>, batches: &[Batch], mark: i64) -> Result<Vec<Vec<Submitted>>, Failure> {
    let rows: Cow<'_, [Row]> = match batches {
        [only] => Cow::Borrowed(&only.rows),
        several => Cow::Owned(several.iter().flat_map(|batch| batch.rows.iter().cloned()).collect()),
    };
    let before = if session.repeated { stored_before(session, &rows, mark).await? } else { None };
    let created = match before {
        Some(created) => {
            session.wake = true;
            created
        }
        None => {
            if session.conflicts > 0 {
                wait_for_keys(session, &rows).await?;
            }
            let mut changes = Changes::default();
            let created = store_rows(session, &rows, mark, &mut changes).await?;
            changes.write(session).await?;
            created
        }
    };
    let mut first = 0;
    let mut answers = Vec::with_capacity(batches.len());
    for batch in batches {
        answers.push(Batch::answers(&batch.places, |row| created[first + row]));
        first += batch.rows.len();
    }
    Ok(answers)
}

impl MySql {
    /// Store a batch by itself, durably when it returns: somebody may hold one of its keys. It waits for that a moment at a time, in turn with
    /// others, so that such batches do not use up the connections.
    pub(super) async fn store(&self, batch: Batch) -> Result<Vec<Submitted>> {
        let (batch, mark) = (Arc::new([batch]), new_mark());
        let mut patience = Patience::new(self.runner.patience);
        patience.begin();
        loop {
            let batch = Arc::clone(&batch);
            let turn = self.alone.acquire().await.map_err(|_| Error::Closed)?;
            let stored = self
                .run_waiting(LockWait::OrBusy, "submitting tasks", move |session| {
                    let batch = Arc::clone(&batch);
                    Box::pin(async move {
                        wait_for_keys(session, &batch[0].rows).await?;
                        submit(session, &*batch, mark).await
                    })
                })
                .await;
            drop(turn);
            match stored {
                Err(Error::Busy { .. }) if patience.outlasts_conflict(BUSY_PAUSE) => tokio::time::sleep(BUSY_PAUSE).await,
                stored => return Ok(stored?.into_iter().flatten().collect()),
            }
        }
    }
}

/// Store tasks in the transaction of a caller, who commits it or takes it back.
///
/// # Errors
/// [`crate::Error::InvalidTask`] if one of the tasks breaks a bound, and errors of the database; the caller's transaction has to be taken back.
pub(super) async fn submit_in(
    connection: &mut MySqlConnection,
    tasks: &[NewTask],
    place: &super::failure::Place,
) -> Result<Vec<Submitted>> {
    let batch = [Batch::new(tasks)?];
    let storing = async { submit(&mut Session::joining(connection).await?, &batch, new_mark()).await };
    let answers = storing.await.map_err(|failure: Failure| failure.into_error("submitting tasks", place))?;
    Ok(answers.into_iter().flatten().collect())
}
