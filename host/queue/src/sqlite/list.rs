//! Lists of tasks: see [`crate::listing`] for how a page is found.

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteConnection, SqlitePool};

use super::accounts::json;
use super::claim::count;
use super::pieces::{data_bytes, whole_data};
use super::read::{PAGE_MAX, beside, data_and_output, data_beside, successor, task, task_columns, task_with_data};
use crate::listing::{self, Found, Look, PLACE_MAX, Places};
use crate::task::stored_queue;
use crate::{Filter, Page, State, Task, TaskId};

/// The most data and output of a page, unless one task alone has more.
const PAGE_BYTES_MAX: usize = 64 << 20;

/// Whether a task is wanted: 1 type, 2 user, 3 states, 4 first key, 5 the first one behind, 6 queue. Any blob is greater than any text.
macro_rules! is_wanted {
    () => {
        "(?1 IS NULL OR task.type = ?1) AND (?2 IS NULL OR task.user = ?2)
            AND (?3 IS NULL OR task.state IN (SELECT value FROM json_each(?3)))
            AND (?6 IS NULL OR task.queue = ?6) AND (?4 IS NULL OR (task.key >= ?4 AND task.key < coalesce(?5, x'')))"
    };
}

pub(super) const AHEAD: &str = concat!("SELECT id, coalesce(", is_wanted!(), ", 0) FROM task WHERE id > ?7 ORDER BY id LIMIT ?8");

pub(super) const WANTED: &str = concat!(
    "SELECT task.id FROM json_each(?7) AS some CROSS JOIN task ON task.id = some.value WHERE ",
    is_wanted!(),
    " ORDER BY task.id"
);

/// What waits or runs; the tables have it in the order of its turn.
pub(super) const UNSORTED: &str = "SELECT * FROM (SELECT task FROM ready WHERE ?1 LIMIT ?3)
    UNION ALL SELECT * FROM (SELECT task FROM scheduled WHERE ?1 LIMIT ?3) UNION ALL SELECT * FROM (SELECT task FROM suspect WHERE ?1 LIMIT ?3)
    UNION ALL SELECT * FROM (SELECT task FROM unserved WHERE ?1 LIMIT ?3)
    UNION ALL SELECT * FROM (SELECT id FROM task INDEXED BY task_running WHERE state = 'running' AND ?2 LIMIT ?3)";

pub(super) const FAILED: &str =
    "SELECT id FROM task INDEXED BY task_failed WHERE state = 'failed' AND id > ?1 ORDER BY id LIMIT ?2";
pub(super) const CANCELLED: &str =
    "SELECT id FROM task INDEXED BY task_cancelled WHERE state = 'cancelled' AND id > ?1 ORDER BY id LIMIT ?2";

pub(super) const OF_KEYS: &str =
    "SELECT id FROM task INDEXED BY task_key WHERE key >= ?1 AND key < coalesce(?2, x'') ORDER BY key LIMIT ?3";

/// Looks for the tasks of a page.
struct Lister<'l> {
    reading: &'l mut SqliteConnection,
    filter: &'l Filter,
    states: Option<String>,
    /// The first key, and the first one behind.
    keys: Option<(String, Option<String>)>,
}

impl<'l> Lister<'l> {
    fn new(reading: &'l mut SqliteConnection, filter: &'l Filter) -> Self {
        let prefix = filter.key_prefix.as_deref().filter(|prefix| !prefix.is_empty());
        Self {
            reading,
            filter,
            states: (!filter.states.is_empty()).then(|| json(filter.states.iter().map(|state| state.as_str()))),
            keys: prefix.map(|prefix| (prefix.to_owned(), successor(prefix))),
        }
    }

    /// Bind what [`is_wanted`] asks for.
    fn bind<'q>(&self, sql: &'static str) -> Query<'q, sqlx::Sqlite, SqliteArguments> {
        let (first, end) = self.keys.clone().unzip();
        let query = sqlx::query(sql).bind(self.filter.task_type.clone()).bind(self.filter.user.clone());
        let queue = self.filter.queue.as_deref().map(|queue| stored_queue(Some(queue)).to_owned());
        query.bind(self.states.clone()).bind(first).bind(end.flatten()).bind(queue)
    }
}

#[async_trait]
impl Look for Lister<'_> {
    type Error = sqlx::Error;

    async fn ahead(&mut self, after: i64, most: usize) -> Result<Vec<(i64, bool)>, sqlx::Error> {
        let rows = self.bind(AHEAD).bind(after).bind(count(most)).fetch_all(&mut *self.reading).await?;
        rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
    }

    async fn places(&mut self, after: i64) -> Result<Option<Places>, sqlx::Error> {
        let most = count(PLACE_MAX + 1);
        if let Some((first, end)) = self.keys.clone() {
            let query = sqlx::query_scalar(OF_KEYS).bind(first).bind(end).bind(most);
            return Ok(Some(Places { unsorted: query.fetch_all(&mut *self.reading).await?, sorted: Vec::new() }));
        }
        let of = |state: State| self.filter.states.contains(&state);
        let (waiting, running) = (of(State::Waiting), of(State::Running));
        let ended = [(of(State::Failed), FAILED), (of(State::Cancelled), CANCELLED)];
        if self.states.is_none() || of(State::Finished) {
            return Ok(None);
        }
        let mut places = Places::default();
        if waiting || running {
            let query = sqlx::query_scalar(UNSORTED).bind(waiting).bind(running).bind(most);
            places.unsorted = query.fetch_all(&mut *self.reading).await?;
        }
        for (_, sql) in ended.into_iter().filter(|(asked, _)| *asked) {
            places.sorted.push(sqlx::query_scalar(sql).bind(after).bind(most).fetch_all(&mut *self.reading).await?);
        }
        Ok(Some(places))
    }

    async fn wanted(&mut self, tasks: &[i64]) -> Result<Vec<i64>, sqlx::Error> {
        let rows = self.bind(WANTED).bind(json(tasks)).fetch_all(&mut *self.reading).await?;
        rows.iter().map(|row| row.try_get(0)).collect()
    }
}

pub(super) async fn list(readers: &SqlitePool, filter: &Filter) -> Result<Page, sqlx::Error> {
    const PLAIN: &str = concat!(
        "SELECT ",
        task_columns!(),
        " FROM json_each(?1) AS page CROSS JOIN task ON task.id = page.value ",
        beside!(),
        " ORDER BY task.id"
    );
    const WITH_DATA: &str = concat!(
        "SELECT ",
        task_columns!(),
        data_and_output!(),
        " FROM json_each(?1) AS page CROSS JOIN task ON task.id = page.value ",
        beside!(),
        data_beside!(),
        " ORDER BY task.id"
    );
    const BYTES: &str = concat!(
        "SELECT page.value,
            max(min(max(coalesce(task_data.bytes, 0), 0), 16777216), min(coalesce(",
        data_bytes!(),
        ", 0), 17825792))
                + coalesce(octet_length(output.output), 0)
        FROM json_each(?1) AS page LEFT JOIN task_data ON task_data.task = page.value LEFT JOIN output ON output.task = page.value
        ORDER BY page.value"
    );
    let limit = usize::try_from(filter.limit.clamp(1, PAGE_MAX)).unwrap_or(1);
    let after = filter.after.map_or(i64::MIN, |after| after.0);
    // Page and tasks have to fit together.
    let mut reading = readers.begin().await?;
    let Found { tasks: mut ids, looked } = listing::page(&mut Lister::new(&mut reading, filter), after, limit).await?;
    let mut more = ids.len() > limit;
    ids.truncate(limit);
    if filter.with_data {
        let bytes: Vec<(i64, i64)> = sqlx::query_as(BYTES).bind(json(&ids)).fetch_all(&mut *reading).await?;
        let mut sum = 0_usize;
        let fitting = bytes.iter().take_while(|(_, bytes)| {
            sum += usize::try_from(*bytes).unwrap_or(usize::MAX / 2);
            sum <= PAGE_BYTES_MAX
        });
        let fitting = fitting.count().max(1);
        more |= fitting < ids.len();
        ids.truncate(fitting);
    }
    let sql = if filter.with_data { WITH_DATA } else { PLAIN };
    let read = if filter.with_data { task_with_data } else { task };
    let rows = sqlx::query(sql).bind(json(&ids)).fetch_all(&mut *reading).await?;
    let tasks: Vec<Task> = rows.iter().map(read).collect();
    let next = if more { tasks.last().map(|task| task.id) } else { looked.map(TaskId) };
    Ok(Page { tasks, next })
}
