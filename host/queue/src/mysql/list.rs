//! Lists of tasks: see [`crate::listing`] for how a page is found.

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::mysql::MySqlArguments;
use sqlx::query::Query;

use super::MySql;
use super::failure::Failure;
use super::read::{PAGE_MAX, beside, successor, task, task_columns, with_data};
use super::rows::{count, ids, json};
use super::session::Session;
use crate::listing::{self, Found, Look, PLACE_MAX, Places};
use crate::task::stored_queue;
use crate::{Filter, Page, Result, State, Task, TaskId};

/// The most data and output of a page, unless one task alone has more.
const PAGE_BYTES_MAX: i64 = 64 << 20;

/// Whether a task is wanted: queue, type, user, states, first and last key.
macro_rules! is_wanted {
    () => {
        "(? IS NULL OR t.queue = ?) AND (? IS NULL OR t.type = ?) AND (? IS NULL OR t.user = ?) AND (? IS NULL OR FIND_IN_SET(t.state, ?))
            AND (? IS NULL OR (t.`key` >= ? AND t.`key` < ?))"
    };
}

pub(super) const AHEAD: &str = concat!(
    "SELECT t.id, COALESCE(",
    is_wanted!(),
    ", 0) FROM laelaps_task AS t FORCE INDEX (PRIMARY) WHERE t.id > ? ORDER BY t.id LIMIT ?"
);

pub(super) const WANTED: &str = concat!(
    "SELECT t.id FROM ",
    ids!(),
    " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id WHERE ",
    is_wanted!(),
    " ORDER BY t.id"
);

/// What waits or runs; the tables have it in the order of its turn.
pub(super) const UNSORTED: &str = "(SELECT task AS id FROM laelaps_ready WHERE ? LIMIT ?)
    UNION ALL (SELECT task FROM laelaps_ready_of_user WHERE ? LIMIT ?)
    UNION ALL (SELECT task FROM laelaps_scheduled WHERE ? LIMIT ?) UNION ALL (SELECT task FROM laelaps_suspect WHERE ? LIMIT ?)
    UNION ALL (SELECT task FROM laelaps_unserved WHERE ? LIMIT ?)
    UNION ALL (SELECT s.id FROM laelaps_claim AS c
        STRAIGHT_JOIN JSON_TABLE(IF(JSON_VALID(c.tasks), c.tasks, '[]'), '$[*]' COLUMNS (id BIGINT PATH '$')) AS s WHERE ? LIMIT ?)";

pub(super) const ASIDE: &str = "SELECT task FROM laelaps_set_aside WHERE task > ? ORDER BY task LIMIT ?";

pub(super) const OF_KEYS: &str =
    "SELECT id FROM laelaps_task FORCE INDEX (by_key) WHERE `key` >= ? AND `key` < ? ORDER BY `key` LIMIT ?";

/// Looks for the tasks of a page.
struct Lister<'l, 's> {
    session: &'l mut Session<'s>,
    filter: &'l Filter,
    states: Option<String>,
    /// The first key, and the first one behind.
    keys: Option<(Vec<u8>, Vec<u8>)>,
}

impl<'l, 's> Lister<'l, 's> {
    fn new(session: &'l mut Session<'s>, filter: &'l Filter) -> Self {
        let states: Vec<&str> = filter.states.iter().map(|state| state.as_str()).collect();
        let prefix = filter.key_prefix.as_deref().filter(|prefix| !prefix.is_empty());
        Self {
            session,
            filter,
            states: (!states.is_empty()).then(|| states.join(",")),
            keys: prefix.map(|prefix| (prefix.as_bytes().to_vec(), successor(prefix))),
        }
    }

    /// Bind what [`is_wanted`] asks for.
    fn bind<'q>(&self, mut query: Query<'q, sqlx::MySql, MySqlArguments>) -> Query<'q, sqlx::MySql, MySqlArguments> {
        let queue = self.filter.queue.as_deref().map(|queue| stored_queue(Some(queue)));
        for name in [queue, self.filter.task_type.as_deref(), self.filter.user.as_deref()] {
            let name = name.map(|name| name.as_bytes().to_vec());
            query = query.bind(name.clone()).bind(name);
        }
        let (first, end) = self.keys.clone().unzip();
        query.bind(self.states.clone()).bind(self.states.clone()).bind(first.clone()).bind(first).bind(end)
    }
}

#[async_trait]
impl Look for Lister<'_, '_> {
    type Error = Failure;

    async fn ahead(&mut self, after: i64, most: usize) -> Result<Vec<(i64, bool)>, Failure> {
        let query = self.bind(sqlx::query(AHEAD)).bind(after).bind(count(most));
        let rows = query.fetch_all(self.session.db()).await?;
        Ok(rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect::<Result<_, sqlx::Error>>()?)
    }

    async fn places(&mut self, after: i64) -> Result<Option<Places>, Failure> {
        let most = count(PLACE_MAX + 1);
        if let Some((first, end)) = self.keys.clone() {
            let query = sqlx::query_scalar(OF_KEYS).bind(first).bind(end).bind(most);
            return Ok(Some(Places { unsorted: query.fetch_all(self.session.db()).await?, sorted: Vec::new() }));
        }
        let of = |state: State| self.filter.states.contains(&state);
        let (waiting, running) = (of(State::Waiting), of(State::Running));
        let aside = of(State::Failed) || of(State::Cancelled);
        if self.states.is_none() || of(State::Finished) {
            return Ok(None);
        }
        let mut places = Places::default();
        if waiting || running {
            let mut query = sqlx::query_scalar(UNSORTED);
            for asked in [waiting, waiting, waiting, waiting, waiting, running] {
                query = query.bind(asked).bind(most);
            }
            places.unsorted = query.fetch_all(self.session.db()).await?;
        }
        if aside {
            places.sorted.push(sqlx::query_scalar(ASIDE).bind(after).bind(most).fetch_all(self.session.db()).await?);
        }
        Ok(Some(places))
    }

    async fn wanted(&mut self, tasks: &[i64]) -> Result<Vec<i64>, Failure> {
        let rows = self.bind(sqlx::query(WANTED).bind(json(tasks))).fetch_all(self.session.db()).await?;
        Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, sqlx::Error>>()?)
    }
}

pub(super) async fn page(session: &mut Session<'_>, filter: &Filter) -> Result<Page, Failure> {
    const TASKS: &str = concat!(
        "SELECT ",
        task_columns!(),
        " FROM ",
        ids!(),
        " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id",
        beside!()
    );
    const BYTES: &str = concat!(
        "SELECT s.id, CAST(COALESCE((SELECT SUM(d.bytes) FROM laelaps_task_data AS d WHERE d.task = s.id), 0)
            + COALESCE((SELECT SUM(LENGTH(o.output)) FROM laelaps_output AS o WHERE o.task = s.id), 0) AS SIGNED) FROM ",
        ids!(),
        " ORDER BY s.place"
    );
    let limit = usize::try_from(filter.limit.clamp(1, PAGE_MAX)).unwrap_or(1);
    let after = filter.after.map_or(0, |after| after.0);
    let Found { tasks: mut ids, looked } = listing::page(&mut Lister::new(session, filter), after, limit).await?;
    let mut more = ids.len() > limit;
    ids.truncate(limit);
    if filter.with_data {
        let bytes: Vec<(i64, i64)> = sqlx::query_as(BYTES).bind(json(&ids)).fetch_all(session.db()).await?;
        let mut sum = 0_i64;
        let fitting = bytes.iter().take_while(|(_, bytes)| {
            sum += bytes;
            sum <= PAGE_BYTES_MAX
        });
        let fitting = fitting.count().max(1);
        more |= fitting < ids.len();
        ids.truncate(fitting);
    }
    let rows = sqlx::query(TASKS).bind(json(&ids)).fetch_all(session.db()).await?;
    let mut tasks: Vec<Task> = rows.iter().map(task).collect::<Result<_, _>>()?;
    tasks.sort_unstable_by_key(|task| task.id);
    if filter.with_data {
        with_data(session, &mut tasks).await?;
    }
    let next = if more { tasks.last().map(|task| task.id) } else { looked.map(TaskId) };
    Ok(Page { tasks, next })
}

impl MySql {
    pub(super) async fn page_of(&self, filter: &Filter) -> Result<Page> {
        let filter = std::sync::Arc::new(filter.clone());
        self.runner
            .read_together("listing tasks", move |session| {
                let filter = std::sync::Arc::clone(&filter);
                Box::pin(async move { page(session, &filter).await })
            })
            .await
    }
}
