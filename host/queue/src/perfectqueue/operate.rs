//! What operators and producers do to tasks by hand, and the removal of what is over.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use sqlx::mysql::{MySqlArguments, MySqlConnection};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, MySql, Row as _};

use super::Shared;
use super::read::{self, Found};
use super::run::{Operation, begin, commit, roll_back};
use super::settle::{ended_timeout, seconds};
use super::side::{self, Record, Side};
use super::table::{Names, is_token, json};
use crate::earlier::Earlier;
use crate::mysql::connect::text;
use crate::mysql::failure::Failure;
use crate::{Error, Result, State, TaskId};

/// Rows removed in one transaction.
const REMOVED_MAX: u32 = 1_000;
/// Such transactions after one claim.
const REMOVALS_MAX: u32 = 20;
/// Rows of our table that one removal looks at for tasks that Ruby has removed.
const STRAYS_LOOK: u16 = 500;
/// It looks again as long as at least one part of so many was such a row, and so many times at most.
const STRAYS_SHARE: usize = 8;
const STRAYS_LOOKS_MAX: usize = 40;

/// A task as an operator names it. Its number is that of [`super::table::Names::sql`]: the first 60 bits of the SHA-256 of its key in UTF-8, so that a later task of the
/// same key has the same.
pub(super) enum Which {
    Key(String),
    Number(TaskId),
}

impl Which {
    /// There is none.
    pub(super) fn unknown(&self) -> Error {
        match self {
            Self::Key(key) => Error::NotFound(key.clone()),
            Self::Number(number) => Error::NoSuchId(*number),
        }
    }

    /// The row that was found, as a statement names it at its end. A key that cannot be read names nothing.
    fn row(&self) -> &'static str {
        match self {
            Self::Key(_) => "t.id = ?",
            Self::Number(_) => "t.timeout = ? AND {number} = ?",
        }
    }

    /// A statement about it, with the row's name at its end.
    fn sql(&self, statement: &str, names: &Names) -> AssertSqlSafe<String> {
        let by = match self {
            Self::Key(_) => "FORCE INDEX (PRIMARY)",
            Self::Number(_) => "{index}",
        };
        names.sql(&format!("{} WHERE {}", statement.replace("{by}", by), self.row()))
    }

    /// Bind what [`Which::row`] names.
    fn bind<'q>(&self, query: Query<'q, MySql, MySqlArguments>, found: &Found) -> Query<'q, MySql, MySqlArguments> {
        match self {
            Self::Key(_) => query.bind(found.key.clone()),
            Self::Number(_) => query.bind(found.timeout).bind(found.number),
        }
    }
}

impl Shared {
    /// End a task by hand. It may have been one that its user's others waited for.
    pub(super) async fn end(self: &Arc<Self>, which: Which, state: State, retention: Duration) -> Result<()> {
        self.perform(End { which, state, retention, earlier: Earlier::default() }).await?;
        self.wake();
        Ok(())
    }

    /// Retry a task by hand.
    pub(super) async fn retry(self: &Arc<Self>, which: Which) -> Result<()> {
        self.perform(Retry { which, earlier: Earlier::default() }).await?;
        self.wake();
        Ok(())
    }
}

/// End a waiting or running task, as finished or cancelled. A running attempt loses its lease, as our token goes. One that is set aside goes at once if it is
/// named by its number.
struct End {
    which: Which,
    state: State,
    retention: Duration,
    /// An earlier try has ended it; it does not say more.
    earlier: Earlier<()>,
}

#[async_trait]
impl Operation for End {
    type Answer = ();
    const DOING: &'static str = "ending a task by hand";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<(), Failure> {
        const END: &str = "UPDATE {t} AS t {by} SET t.created_at = NULL, t.resource = NULL, t.owner = 0, t.timeout = ?";
        const REMOVE: &str = "DELETE t FROM {t} AS t {by}";
        begin(connection).await?;
        let is_repeated = self.earlier.get().is_some();
        let (found, side) = match read::lock(&self.which, names, connection).await {
            // The earlier try has removed it, or its retention is over since.
            Err(Failure::Queue(error)) if is_repeated && matches!(*error, Error::NotFound(_) | Error::NoSuchId(_)) => {
                roll_back(connection).await?;
                return Ok(());
            }
            locked => locked?,
        };
        if is_repeated && found.created_at.is_none() {
            roll_back(connection).await?;
            return Ok(());
        }
        if matches!(self.which, Which::Number(_)) && found.is_set_aside() {
            let query = sqlx::query(self.which.sql(REMOVE, names));
            self.which.bind(query, &found).execute(&mut *connection).await?;
            forget(&[found.key], names, connection).await?;
            self.earlier.note(());
            commit(connection).await?;
            return Ok(());
        }
        let Some(created_at) = found.created_at else {
            let state = found.state(side.as_ref());
            return Err(Failure::from(Error::AlreadyEnded { key: found.key, state }));
        };
        let timeout = ended_timeout(found.now_ms / 1_000, seconds(self.retention));
        let query = sqlx::query(self.which.sql(END, names)).bind(timeout);
        self.which.bind(query, &found).execute(&mut *connection).await?;
        if names.has_side() {
            let mut side = side.unwrap_or_else(|| Side::new(created_at));
            if is_token(found.owner) && found.state(Some(&side)) == State::Running {
                let event = if self.state == State::Cancelled { "cancel" } else { "force-finish" };
                let attempt = side.attempts.saturating_add(1);
                side.record(Record::new(attempt, found.owner, "a host that had it then".to_owned(), found.now_ms, event));
            }
            (side.state, side.timeout, side.ended_ms) = (Some(self.state), Some(timeout), Some(found.now_ms));
            side.user = found.user.or(side.user);
            side.progress = None;
            side::store(&[(&found.key, side)], names, connection).await?;
        }
        self.earlier.note(());
        commit(connection).await?;
        if !names.has_side() && self.state == State::Cancelled {
            tracing::warn!(task = found.key, "a task is cancelled; PerfectQueue's table shows it as finished");
        }
        Ok(())
    }
}

/// Make a waiting task due now, or give a failed or cancelled one a new life.
struct Retry {
    which: Which,
    /// How an earlier try found its row: time, owner, when it was made. If it is not like that any more, that try was committed, and whatever became of the
    /// task since is left alone.
    earlier: Earlier<(i64, u64, Option<i64>)>,
}

#[async_trait]
impl Operation for Retry {
    type Answer = ();
    const DOING: &'static str = "retrying a task";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<(), Failure> {
        const DUE: &str = "UPDATE {t} AS t {by} SET t.timeout = ?, t.owner = 0, t.created_at = ?, t.resource = ?";
        begin(connection).await?;
        let earlier = self.earlier.get();
        let (found, side) = match read::lock(&self.which, names, connection).await {
            Err(Failure::Queue(error)) if earlier.is_some() && matches!(*error, Error::NotFound(_) | Error::NoSuchId(_)) => {
                roll_back(connection).await?;
                return Ok(());
            }
            locked => locked?,
        };
        let was = (found.timeout, found.owner, found.created_at);
        if earlier.is_some_and(|earlier| earlier != was) {
            roll_back(connection).await?;
            return Ok(());
        }
        let now = found.now_ms / 1_000;
        let state = found.state(side.as_ref());
        if found.is_held() {
            return Err(refused(found, state, "it is held, and has its turn when whoever holds it releases it; cancel ends it"));
        }
        if state == State::Waiting && found.timeout <= now {
            // It is due, and keeps its place.
            roll_back(connection).await?;
            return Ok(());
        }
        if !names.has_side() && !found.is_set_aside() {
            return Err(Failure::from(unknown(found, state)));
        }
        let mut side = match (state, side) {
            (State::Running, _) => return Err(refused(found, state, "it has an attempt under way, or waits for its time")),
            (State::Finished, _) => {
                return Err(refused(found, state, "finished work is not done again; submit it under another key"));
            }
            (_, side) => side.unwrap_or_else(|| Side::new(found.created_at.unwrap_or(now))),
        };
        let user = found.user.as_ref().or(side.user.as_ref());
        let created_at = found.created_at.unwrap_or(side.created_at);
        let query = sqlx::query(self.which.sql(DUE, names)).bind(now).bind(created_at).bind(user.cloned());
        self.which.bind(query, &found).execute(&mut *connection).await?;
        if names.has_side() {
            if state != State::Waiting {
                let Side { created_at, max_attempts, records, descent, .. } = side;
                side = Side { max_attempts, records, descent, ..Side::new(created_at) };
            }
            (side.state, side.timeout) = (None, None);
            side::store(&[(&found.key, side)], names, connection).await?;
        }
        self.earlier.note(was);
        commit(connection).await?;
        Ok(())
    }
}

fn refused(found: Found, state: State, problem: &'static str) -> Failure {
    Failure::from(Error::WrongState { key: found.key, state, problem })
}

fn unknown(found: Found, state: State) -> Error {
    let what = "retrying this task";
    let why = if state == State::Running {
        "PerfectQueue's table does not tell a task that waits for its time from one that runs"
    } else {
        "PerfectQueue's table does not tell failed and cancelled tasks from finished ones, nor whose they were"
    };
    Error::NotSupported { what, why: format!("task {:?}: {why}; `side_table` keeps it", found.key) }
}

/// How far the search for rows of our table whose task Ruby has removed has come.
#[derive(Debug, Default)]
pub(super) struct Strays(Mutex<Walk>);

#[derive(Debug, Default)]
struct Walk {
    from: String,
    /// The next look does not begin there, but at the beginning.
    from_beginning: bool,
}

impl Strays {
    /// Where a look begins, and whether that is the beginning.
    fn begin(&self) -> (String, bool) {
        let mut walk = self.lock();
        walk.from_beginning = !walk.from_beginning;
        if walk.from_beginning { (String::new(), true) } else { (walk.from.clone(), false) }
    }

    fn lock(&self) -> MutexGuard<'_, Walk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Remove rows whose retention has ended.
struct CleanUp {
    limit: u32,
    strays: Arc<Strays>,
    /// The keys that an earlier try was about to remove, and how many of their rows were there.
    earlier: Earlier<(Vec<String>, u64)>,
}

impl Shared {
    /// Remove at most `limit` rows; answers how many.
    pub(super) async fn clean_up(self: &Arc<Self>, limit: u32) -> Result<u64> {
        let mut removed = 0;
        let mut left = limit.clamp(1, 100_000);
        while left > 0 {
            let batch = left.min(REMOVED_MAX);
            let gone =
                self.perform(CleanUp { limit: batch, strays: Arc::clone(&self.strays), earlier: Earlier::default() }).await?;
            removed += gone;
            left -= batch;
            if gone < u64::from(batch) {
                break;
            }
        }
        Ok(removed)
    }

    /// What follows a claim now and then.
    pub(super) async fn clean_up_once(self: &Arc<Self>) -> Result<()> {
        self.clean_up(REMOVED_MAX * REMOVALS_MAX).await.map(drop)
    }
}

#[async_trait]
impl Operation for CleanUp {
    type Answer = u64;
    const DOING: &'static str = "removing old tasks";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<u64, Failure> {
        const OVER: &str = "SELECT t.id FROM {t} AS t {index} WHERE t.timeout <= UNIX_TIMESTAMP() - 1000000000
            ORDER BY t.timeout LIMIT ?";
        if let Some((keys, removed)) = self.earlier.get().filter(|(_, removed)| *removed > 0)
            && !is_any_over(&keys, names, connection).await?
        {
            return Ok(removed);
        }
        let over: Vec<String> =
            sqlx::query_scalar(names.sql(OVER)).bind(i64::from(self.limit)).fetch_all(&mut *connection).await?;
        let mut removed = 0;
        if !over.is_empty() {
            begin(connection).await?;
            removed = remove(over.clone(), names, connection).await?;
            self.earlier.note((over, removed));
            commit(connection).await?;
        }
        if names.has_side() {
            self.forget_strays(names, connection).await?;
        }
        Ok(removed)
    }
}

/// Whether one of these rows is still there, and its retention over.
async fn is_any_over(keys: &[String], names: &Names, connection: &mut MySqlConnection) -> Result<bool, sqlx::Error> {
    const OVER: &str =
        "SELECT EXISTS (SELECT 1 FROM JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$')) AS f
        STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key} WHERE t.timeout <= UNIX_TIMESTAMP() - 1000000000)";
    sqlx::query_scalar(names.sql(OVER)).bind(json(keys)).fetch_one(connection).await
}

/// Remove rows whose retention is over, with what is noted of them. Answers how many there were.
pub(super) async fn remove(mut over: Vec<String>, names: &Names, connection: &mut MySqlConnection) -> Result<u64, sqlx::Error> {
    const REMOVE: &str = "DELETE t FROM JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$')) AS f
        STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key} WHERE t.timeout <= UNIX_TIMESTAMP() - 1000000000";
    over.sort_unstable();
    let removed = sqlx::query(names.sql(REMOVE)).bind(json(&over)).execute(&mut *connection).await?.rows_affected();
    forget(&over, names, connection).await?;
    Ok(removed)
}

/// Remove what is noted of keys that have no row, and answer how many keys that were. Looks first, since a statement that looks for rows while
/// it deletes would wait for those that others have locked.
pub(super) async fn forget(keys: &[String], names: &Names, connection: &mut MySqlConnection) -> Result<usize, sqlx::Error> {
    const STRAY: &str =
        "SELECT s.id, CAST(s.created_at AS SIGNED) FROM JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$')) AS f
        STRAIGHT_JOIN {s} AS s FORCE INDEX (PRIMARY) ON s.id = {as_side_key}
        LEFT JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key} WHERE t.id IS NULL";
    // One that was noted since belongs to a new task.
    const FORGET: &str =
        "DELETE s FROM JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', created_at BIGINT PATH '$[1]')) AS f
        STRAIGHT_JOIN {s} AS s FORCE INDEX (PRIMARY) ON s.id = {as_side_key} WHERE s.created_at = f.created_at";
    if !names.has_side() || keys.is_empty() {
        return Ok(0);
    }
    let strays = sqlx::query(names.sql(STRAY)).bind(json(keys)).fetch_all(&mut *connection).await?;
    let mut strays =
        strays.iter().map(|row| Ok((text(row, 0)?, row.try_get(1)?))).collect::<Result<Vec<(String, i64)>, sqlx::Error>>()?;
    if strays.is_empty() {
        return Ok(0);
    }
    strays.sort_unstable();
    sqlx::query(names.sql(FORGET)).bind(json(&strays)).execute(connection).await?;
    Ok(strays.len())
}

impl CleanUp {
    /// Look at a few rows of our table, and remove those whose task Ruby has removed; go on for as long as many are such. Every other time
    /// from the beginning, where the oldest are where keys grow. So our table stays about as long as PerfectQueue's, whoever removes rows.
    async fn forget_strays(&self, names: &Names, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
        const LOOK: &str = "SELECT id FROM {s} WHERE id > ? ORDER BY id LIMIT ?";
        let (mut from, from_beginning) = self.strays.begin();
        for _ in 0..STRAYS_LOOKS_MAX {
            let keys: Vec<String> =
                sqlx::query_scalar(names.sql(LOOK)).bind(from).bind(STRAYS_LOOK).fetch_all(&mut *connection).await?;
            let strays = forget(&keys, names, connection).await?;
            let (is_many, is_last) = (strays * STRAYS_SHARE >= keys.len(), keys.len() < usize::from(STRAYS_LOOK));
            from = if is_last { String::new() } else { keys.into_iter().next_back().unwrap_or_default() };
            if is_last || !is_many {
                break;
            }
        }
        if !from_beginning {
            self.strays.lock().from = from;
        }
        Ok(())
    }
}
