//! New tasks, stored as Ruby stores them.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::mysql::MySqlConnection;

use super::candidates::marked;
use super::run::{Operation, begin, commit};
use super::table::{Fit, Names, TIME_MAX, json, parts};
use super::{blob, operate};
use crate::mysql::failure::{Failure, number};
use crate::{Descent, Error, NewTask, Result, Submitted};

/// The server's number for a key that is there already.
const DUPLICATE: u16 = 1062;

/// Instead of a time: nobody may acquire it until it is released.
const HELD: i64 = -1;

/// Tasks that keep their bounds, ready to be stored.
#[derive(Debug, Default)]
pub(super) struct Batch {
    rows: Vec<Row>,
    /// For each task that was asked for: its row, or None if an earlier one has the same key.
    places: Vec<Option<usize>>,
    /// When the first try began, and whether it is not known what became of one.
    began: Option<Instant>,
    is_repeated: AtomicBool,
}

#[derive(Debug)]
struct Row {
    key: String,
    stored: Vec<u8>,
    /// Unix seconds; 0: now; [`HELD`].
    run_at: i64,
    user: Option<String>,
    max_running: Option<u32>,
    max_attempts: Option<u32>,
    descent: Option<Descent>,
}

/// Whether the table has room for a task.
pub(super) fn check(task: &NewTask, has_side: bool) -> Result<()> {
    let invalid = |problem: String| Error::InvalidTask { key: task.key.clone(), problem };
    task.check()?;
    if run_at(task) >= TIME_MAX {
        return Err(invalid("run_at is later than January 2038, where the times of PerfectQueue's table end".to_owned()));
    }
    if task.max_running.is_some_and(|most| i32::try_from(most).is_err()) {
        return Err(invalid(format!("max_running is above {}, the most that PerfectQueue's table can hold", i32::MAX)));
    }
    if task.priority != 0 {
        let why = "the workers that share PerfectQueue's table go by time alone".to_owned();
        return Err(Error::NotSupported { what: "a priority", why });
    }
    if !crate::task::stored_queue(task.queue.as_deref()).is_empty() {
        let why = "a table of PerfectQueue's is one queue".to_owned();
        return Err(Error::NotSupported { what: "a queue", why });
    }
    if task.max_attempts.is_some() && !has_side {
        let why = "PerfectQueue's table cannot count attempts; turn `side_table` on".to_owned();
        return Err(Error::NotSupported { what: "max_attempts", why });
    }
    Ok(())
}

/// When it may run, in whole seconds and not before the moment; 0: now.
fn run_at(task: &NewTask) -> i64 {
    task.run_at.filter(|_| !task.held).map_or(0, |moment| moment.0.saturating_add(999).div_euclid(1_000))
}

impl Row {
    fn of(task: &NewTask, has_side: bool) -> Result<Self> {
        check(task, has_side)?;
        let invalid = |problem: String| Error::InvalidTask { key: task.key.clone(), problem };
        let data: &[u8] = if task.data.is_empty() { b"{}" } else { &task.data };
        Ok(Self {
            key: task.key.clone(),
            stored: blob::write(&task.task_type, data, task.compression).map_err(invalid)?,
            run_at: if task.held { HELD } else { run_at(task).max(0) },
            user: task.user.clone().filter(|user| !user.is_empty()),
            max_running: task.max_running,
            max_attempts: task.max_attempts,
            descent: task.descent,
        })
    }
}

impl Row {
    /// Whether it has something that the table has no room for.
    fn is_noted(&self) -> bool {
        self.run_at > 0 || self.max_attempts.is_some() || self.descent.is_some()
    }
}

/// The rows of a set: place, key, time, where its data is among all data, user, most running, most attempts, root, depth.
macro_rules! rows {
    () => {
        "JSON_TABLE(?, '$[*]' COLUMNS (place INT PATH '$[0]', id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[1]', run_at BIGINT PATH '$[2]',
            first BIGINT PATH '$[3]', bytes BIGINT PATH '$[4]', user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[5]', max_running BIGINT PATH '$[6]',
            max_attempts BIGINT PATH '$[7]', root BIGINT PATH '$[8]', depth BIGINT PATH '$[9]')) AS f"
    };
}

macro_rules! insert {
    () => {
        concat!(
            "INSERT INTO {t} (id, timeout, data, created_at, resource, max_running)
            SELECT f.id, IF(f.run_at = -1, 1300000000, IF(f.run_at <= 1300000000, UNIX_TIMESTAMP(), f.run_at)), SUBSTRING(?, f.first, f.bytes), UNIX_TIMESTAMP(),
                NULLIF(f.user, ''), NULLIF(f.max_running, -1) FROM ",
            rows!()
        )
    };
}

impl Batch {
    /// Check, and bring into the form that is stored.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] for the first task that breaks a bound, [`Error::NotSupported`] for what the table cannot hold.
    pub(super) fn new(tasks: &[NewTask], has_side: bool) -> Result<Self> {
        if tasks.len() > NewTask::BATCH_MAX {
            let problem = format!("the batch has {} tasks; at most {} are taken at once", tasks.len(), NewTask::BATCH_MAX);
            return Err(Error::InvalidTask { key: tasks[0].key.clone(), problem });
        }
        let mut batch = Self { began: Some(Instant::now()), ..Self::default() };
        let mut seen = HashSet::with_capacity(tasks.len());
        for task in tasks {
            let first = seen.insert(task.key.as_str());
            let row = Row::of(task, has_side)?;
            batch.places.push(first.then_some(batch.rows.len()));
            if first {
                batch.rows.push(row);
            }
        }
        Ok(batch)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    fn answers(&self, created: &[bool]) -> Vec<Submitted> {
        let answer = |place: &Option<usize>| match place {
            Some(row) if created[*row] => Submitted::Created,
            _ => Submitted::AlreadyExists,
        };
        self.places.iter().map(answer).collect()
    }

    /// Refuse what the columns cannot hold, as Ruby's programs are refused by the server's strict mode. Else the server would store question
    /// marks, and two tasks might become one.
    async fn fits(&self, names: &Names, connection: &mut MySqlConnection) -> Result<(), Failure> {
        const MISFITS: &str = concat!(
            "SELECT f.place, CONVERT({as_key} USING utf8mb4) COLLATE utf8mb4_bin <> f.id COLLATE utf8mb4_bin FROM ",
            rows!(),
            " WHERE CONVERT({as_key} USING utf8mb4) COLLATE utf8mb4_bin <> f.id COLLATE utf8mb4_bin
                OR CONVERT({as_user} USING utf8mb4) COLLATE utf8mb4_bin <> f.user COLLATE utf8mb4_bin LIMIT 1"
        );
        let refused = |row: &Row, problem: String| Failure::from(Error::InvalidTask { key: row.key.clone(), problem });
        let mut unknown = Vec::new();
        for (place, row) in self.rows.iter().enumerate() {
            match names.fit(&row.key, row.user.as_deref()) {
                Fit::Yes => {}
                Fit::No(problem) => return Err(refused(row, problem)),
                Fit::Unknown => {
                    unknown.push((place, &row.key, 0, 0, 0, row.user.as_deref().unwrap_or_default()));
                }
            }
        }
        if unknown.is_empty() {
            return Ok(());
        }
        let misfit = sqlx::query(names.sql(MISFITS)).bind(json(unknown)).fetch_optional(connection).await?;
        let Some(misfit) = misfit else { return Ok(()) };
        let (place, is_key): (i32, Option<i64>) = (misfit.try_get(0)?, misfit.try_get(1)?);
        let row = usize::try_from(place).ok().and_then(|place| self.rows.get(place));
        row.map_or(Ok(()), |row| Err(refused(row, names.misfit(is_key == Some(1)))))
    }

    /// Store the follow-ups of settlements inside their transaction. One whose key is there counts as submitted.
    pub(super) async fn store_new(&self, names: &Names, connection: &mut MySqlConnection) -> Result<(), Failure> {
        self.fits(names, connection).await?;
        self.store(names, connection).await.map(drop)
    }

    /// An earlier try may have been stored although its answer was lost: which rows are there as it would have made them, since then.
    async fn own(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Vec<bool>, Failure> {
        const OWN: &str = concat!(
            "SELECT f.place FROM ",
            rows!(),
            " STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key}
            WHERE t.created_at >= UNIX_TIMESTAMP() - ? AND t.data = SUBSTRING(?, f.first, f.bytes)
                AND COALESCE(t.resource, '') = {as_user}"
        );
        let since = self.began.map_or(0, |began| began.elapsed().as_secs() + 1);
        let mut own = Vec::with_capacity(self.rows.len());
        for chunk in chunks(&self.rows) {
            let mut bytes = Vec::new();
            let rows = json(chunk.iter().enumerate().map(|(place, row)| {
                let first = bytes.len() + 1;
                bytes.extend_from_slice(&row.stored);
                (place, &row.key, 0, first, row.stored.len(), row.user.as_deref().unwrap_or_default())
            }));
            let query = sqlx::query_scalar(names.sql(OWN)).bind(rows).bind(since).bind(bytes);
            let places: Vec<i32> = query.fetch_all(&mut *connection).await?;
            own.extend(marked(chunk.len(), &places));
        }
        Ok(own)
    }

    /// Store as part of a transaction that is open.
    pub(super) async fn store_in(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Vec<Submitted>, Failure> {
        self.fits(names, connection).await?;
        Ok(self.answers(&self.store(names, connection).await?))
    }

    async fn store(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Vec<bool>, Failure> {
        let mut created = Vec::with_capacity(self.rows.len());
        for chunk in chunks(&self.rows) {
            let stored = store_chunk(chunk, names, connection).await?;
            if names.has_side() {
                note(chunk.iter().zip(&stored).filter(|(_, stored)| **stored).map(|(row, _)| row), names, connection).await?;
            }
            created.extend(stored);
        }
        Ok(created)
    }
}

#[async_trait]
impl Operation for Batch {
    type Answer = Vec<Submitted>;
    const DOING: &'static str = "submitting tasks";

    fn is_repeated(&self) {
        self.is_repeated.store(true, Ordering::Release);
    }

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Self::Answer, Failure> {
        self.fits(names, connection).await?;
        // One statement is a transaction by itself: the way of nearly all submits.
        let alone = !(names.has_side() && self.rows.iter().any(Row::is_noted)) && chunks(&self.rows).count() == 1;
        if alone && let Some(stored) = unless_duplicate(insert(insert!(), &self.rows, names, connection).await)? {
            return Ok(self.answers(&vec![stored; self.rows.len()]));
        }
        let is_known = alone && self.rows.len() == 1 && !self.is_repeated.load(Ordering::Acquire);
        if is_known && over(&self.rows, names, connection).await?.is_empty() {
            return Ok(self.answers(&[false]));
        }
        begin(connection).await?;
        let own = if self.is_repeated.load(Ordering::Acquire) { self.own(names, connection).await? } else { Vec::new() };
        let mut created = self.store(names, connection).await?;
        created.iter_mut().zip(own).for_each(|(created, own)| *created |= own);
        let answers = self.answers(&created);
        commit(connection).await?;
        Ok(answers)
    }
}

/// Parts that fit into a statement.
fn chunks(rows: &[Row]) -> impl Iterator<Item = &[Row]> {
    parts(rows, |row| row.stored.len())
}

/// True if it was stored, None if a key was there.
fn unless_duplicate(inserted: Result<(), Failure>) -> Result<Option<bool>, Failure> {
    match inserted {
        Ok(()) => Ok(Some(true)),
        Err(Failure::Sql(error)) if number(&error) == Some(DUPLICATE) => Ok(None),
        Err(failure) => Err(failure),
    }
}

async fn insert<'r>(
    statement: &str,
    rows: impl IntoIterator<Item = &'r Row>,
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<(), Failure> {
    let mut bytes = Vec::new();
    let rows = json(rows.into_iter().enumerate().map(|(place, row)| {
        let first = bytes.len() + 1;
        bytes.extend_from_slice(&row.stored);
        let user = row.user.as_deref().unwrap_or_default();
        let max_running = row.max_running.map_or(-1, i64::from);
        (place, &row.key, row.run_at, first, row.stored.len(), user, max_running)
    }));
    sqlx::query(names.sql(statement)).bind(bytes).bind(rows).execute(connection).await?;
    Ok(())
}

/// Of these keys, those that no task has any more although its row is still there: its retention is over.
async fn over(rows: &[Row], names: &Names, connection: &mut MySqlConnection) -> Result<Vec<String>, sqlx::Error> {
    const OVER: &str = concat!(
        "SELECT t.id FROM ",
        rows!(),
        " STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key} WHERE t.timeout <= UNIX_TIMESTAMP() - 1000000000"
    );
    let keys = json(rows.iter().enumerate().map(|(place, row)| (place, &row.key)));
    sqlx::query_scalar(names.sql(OVER)).bind(keys).fetch_all(connection).await
}

/// Store those whose key is new: all at once if all are, else those that are, and if others are quicker or two keys are one to the
/// table (which may be blind to case), one by one.
async fn store_chunk(rows: &[Row], names: &Names, connection: &mut MySqlConnection) -> Result<Vec<bool>, Failure> {
    const THERE: &str =
        concat!("SELECT f.place FROM ", rows!(), " STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key}");
    const INSERT: &str = insert!();
    if unless_duplicate(insert(INSERT, rows, names, connection).await)?.is_some() {
        return Ok(vec![true; rows.len()]);
    }
    let over = over(rows, names, connection).await?;
    if !over.is_empty() {
        operate::remove(over, names, connection).await?;
    }
    let keys = json(rows.iter().enumerate().map(|(place, row)| (place, &row.key)));
    let there: Vec<i32> = sqlx::query_scalar(names.sql(THERE)).bind(keys).fetch_all(&mut *connection).await?;
    let mut created = vec![true; rows.len()];
    for place in there {
        created[usize::try_from(place).unwrap_or_default()] = false;
    }
    let new: Vec<&Row> = rows.iter().zip(&created).filter(|(_, new)| **new).map(|(row, _)| row).collect();
    if new.is_empty() || unless_duplicate(insert(INSERT, new, names, connection).await)?.is_some() {
        return Ok(created);
    }
    for (row, created) in rows.iter().zip(&mut created).filter(|(_, created)| **created) {
        *created = unless_duplicate(insert(INSERT, [row], names, connection).await)?.is_some();
    }
    Ok(created)
}

/// Note beside the table what it has no room for: the most attempts, that a task waits for its time, and where a follow-up comes from.
async fn note<'r>(
    rows: impl IntoIterator<Item = &'r Row>,
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<(), Failure> {
    const NOTE: &str = concat!(
        "INSERT INTO {s} (id, created_at, state, timeout, max_attempts, root, depth)
        SELECT t.id, t.created_at, IF(t.timeout > t.created_at, 'waiting', NULL), t.timeout, NULLIF(f.max_attempts, -1), f.root,
            COALESCE(f.depth, 0)
        FROM ",
        rows!(),
        " STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key}
        WHERE t.created_at IS NOT NULL AND t.owner = 0 AND (t.timeout > t.created_at OR f.max_attempts > 0 OR f.root IS NOT NULL)
        ON DUPLICATE KEY UPDATE state = IF({s}.created_at = VALUES(created_at), {s}.state, VALUES(state)),
            timeout = IF({s}.created_at = VALUES(created_at), {s}.timeout, VALUES(timeout)),
            max_attempts = IF({s}.created_at = VALUES(created_at), {s}.max_attempts, VALUES(max_attempts)),
            root = IF({s}.created_at = VALUES(created_at), {s}.root, VALUES(root)),
            depth = IF({s}.created_at = VALUES(created_at), {s}.depth, VALUES(depth)),
            attempts = IF({s}.created_at = VALUES(created_at), {s}.attempts, 0),
            releases = IF({s}.created_at = VALUES(created_at), {s}.releases, 0),
            lost = IF({s}.created_at = VALUES(created_at), {s}.lost, 0),
            lost_alone = IF({s}.created_at = VALUES(created_at), {s}.lost_alone, 0),
            alone = IF({s}.created_at = VALUES(created_at), {s}.alone, 0),
            alone_for = IF({s}.created_at = VALUES(created_at), {s}.alone_for, 0),
            alone_until = IF({s}.created_at = VALUES(created_at), {s}.alone_until, 0),
            lost_at = IF({s}.created_at = VALUES(created_at), {s}.lost_at, NULL),
            lost_owner = IF({s}.created_at = VALUES(created_at), {s}.lost_owner, 0),
            records = IF({s}.created_at = VALUES(created_at), {s}.records, NULL),
            user = IF({s}.created_at = VALUES(created_at), {s}.user, NULL),
            ended_ms = IF({s}.created_at = VALUES(created_at), {s}.ended_ms, NULL),
            plugin = IF({s}.created_at = VALUES(created_at), {s}.plugin, NULL),
            error_code = IF({s}.created_at = VALUES(created_at), {s}.error_code, NULL),
            error_message = IF({s}.created_at = VALUES(created_at), {s}.error_message, NULL),
            output = IF({s}.created_at = VALUES(created_at), {s}.output, NULL),
            progress = IF({s}.created_at = VALUES(created_at), {s}.progress, NULL),
            created_at = VALUES(created_at)"
    );
    let noted = rows.into_iter().filter(|row| row.is_noted()).map(|row| {
        let (root, depth) = row.descent.map(|descent| (descent.root, descent.depth)).unzip();
        (0, &row.key, 0, 0, 0, "", -1, row.max_attempts.map_or(-1, i64::from), root, depth)
    });
    let noted: Vec<_> = noted.collect();
    if !noted.is_empty() {
        sqlx::query(names.sql(NOTE)).bind(json(noted)).execute(connection).await?;
    }
    Ok(())
}
