//! Lists of tasks: see [`crate::listing`] for how a page is found.

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::postgres::PgArguments;
use sqlx::query::Query;

use super::claim::count;
use super::failure::Failure;
use super::read::{PAGE_MAX, beside, end_of, task, task_columns, task_with_data, with_data};
use super::session::Session;
use crate::listing::{self, Found, Look, PLACE_MAX, Places};
use crate::task::stored_queue;
use crate::{Filter, Page, State, Task, TaskId};

/// The most data and output of a page, unless one task alone has more.
const PAGE_BYTES_MAX: usize = 64 << 20;

/// Whether a task is wanted: $1 type, $2 user, $3 states, $4 first key, $5 the first one behind, $6 queue.
macro_rules! is_wanted {
    () => {
        "($1::text IS NULL OR task.type = $1) AND ($2::text IS NULL OR task.user_name = $2)
            AND ($3::text[] IS NULL OR task.state::text = ANY($3))
            AND ($4::text IS NULL OR (task.key >= $4 AND task.key < $5)) AND ($6::text IS NULL OR task.queue = $6)"
    };
}

pub(super) const AHEAD: &str = concat!(
    "SELECT id, coalesce(",
    is_wanted!(),
    ", false) FROM (SELECT id, type, user_name, queue, state, key FROM laelaps.task WHERE id > $7 ORDER BY id LIMIT $8) AS task ORDER BY id"
);

pub(super) const WANTED: &str =
    concat!("SELECT id FROM laelaps.task WHERE id = ANY($7::int8[]) AND ", is_wanted!(), " ORDER BY id");

/// What waits or runs; the tables have it in the order of its turn.
pub(super) const UNSORTED: &str = "(SELECT task FROM laelaps.ready WHERE $1 LIMIT $3)
    UNION ALL (SELECT task FROM laelaps.scheduled WHERE $1 LIMIT $3) UNION ALL (SELECT task FROM laelaps.suspect WHERE $1 LIMIT $3)
    UNION ALL (SELECT task FROM laelaps.unserved WHERE $1 LIMIT $3)
    UNION ALL (SELECT unnest(tasks) FROM laelaps.claim WHERE $2 LIMIT $3)";

pub(super) const FAILED: &str = "SELECT task FROM laelaps.failure WHERE task > $1 ORDER BY task LIMIT $2";
pub(super) const CANCELLED: &str = "SELECT task FROM laelaps.cancelled WHERE task > $1 ORDER BY task LIMIT $2";

pub(super) const OF_KEYS: &str = "SELECT id FROM laelaps.task WHERE key >= $1 AND key < $2 ORDER BY key LIMIT $3";

/// Looks for the tasks of a page.
struct Lister<'l> {
    session: &'l mut Session,
    filter: &'l Filter,
    states: Option<Vec<&'static str>>,
    /// The first key, and the first one behind.
    keys: Option<(String, String)>,
}

impl<'l> Lister<'l> {
    fn new(session: &'l mut Session, filter: &'l Filter) -> Self {
        let states: Vec<&str> = filter.states.iter().map(|state| state.as_str()).collect();
        let prefix = filter.key_prefix.as_deref().filter(|prefix| !prefix.is_empty());
        let keys = prefix.map(|prefix| (prefix.to_owned(), end_of(prefix)));
        Self { session, filter, states: (!states.is_empty()).then_some(states), keys }
    }

    /// Bind what [`is_wanted`] asks for.
    fn bind<'q>(&self, sql: &'static str) -> Query<'q, sqlx::Postgres, PgArguments> {
        let (first, end) = self.keys.clone().unzip();
        let query = sqlx::query(sql).bind(self.filter.task_type.clone()).bind(self.filter.user.clone());
        let queue = self.filter.queue.as_deref().map(|queue| stored_queue(Some(queue)).to_owned());
        query.bind(self.states.clone()).bind(first).bind(end).bind(queue)
    }
}

#[async_trait]
impl Look for Lister<'_> {
    type Error = Failure;

    async fn ahead(&mut self, after: i64, most: usize) -> Result<Vec<(i64, bool)>, Failure> {
        let rows = self.bind(AHEAD).bind(after).bind(count(most)).fetch_all(self.session.db()?).await?;
        Ok(rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect::<Result<_, sqlx::Error>>()?)
    }

    async fn places(&mut self, after: i64) -> Result<Option<Places>, Failure> {
        let most = count(PLACE_MAX + 1);
        if let Some((first, end)) = self.keys.clone() {
            let query = sqlx::query_scalar(OF_KEYS).bind(first).bind(end).bind(most);
            return Ok(Some(Places { unsorted: query.fetch_all(self.session.db()?).await?, sorted: Vec::new() }));
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
            places.unsorted = query.fetch_all(self.session.db()?).await?;
        }
        for (_, sql) in ended.into_iter().filter(|(asked, _)| *asked) {
            places.sorted.push(sqlx::query_scalar(sql).bind(after).bind(most).fetch_all(self.session.db()?).await?);
        }
        Ok(Some(places))
    }

    async fn wanted(&mut self, tasks: &[i64]) -> Result<Vec<i64>, Failure> {
        let rows = self.bind(WANTED).bind(tasks.to_vec()).fetch_all(self.session.db()?).await?;
        Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, sqlx::Error>>()?)
    }
}

pub(super) async fn list(session: &mut Session, filter: &Filter) -> Result<Page, Failure> {
    const PLAIN: &str =
        concat!("SELECT ", task_columns!(), " FROM laelaps.task ", beside!(), " WHERE task.id = ANY($1) ORDER BY task.id");
    const WITH_DATA: &str = concat!(
        "SELECT ",
        task_columns!(),
        with_data!(),
        " FROM laelaps.task ",
        beside!(),
        " WHERE task.id = ANY($1) ORDER BY task.id"
    );
    const BYTES: &str =
        "SELECT greatest(bytes, coalesce(octet_length(data), (SELECT octet_length(data) FROM laelaps.task_data WHERE task_data.task = task.id), 0))::int8
            + coalesce((SELECT octet_length(output) FROM laelaps.output WHERE output.task = task.id), 0)
        FROM laelaps.task WHERE id = ANY($1) ORDER BY id";
    let texts = [&filter.task_type, &filter.user, &filter.queue, &filter.key_prefix];
    if texts.into_iter().flatten().any(|text| text.contains('\0')) {
        return Ok(Page { tasks: Vec::new(), next: None });
    }
    let limit = usize::try_from(filter.limit.clamp(1, PAGE_MAX)).unwrap_or(1);
    let after = filter.after.map_or(0, |after| after.0);
    // Page and tasks have to fit together.
    session.begin_reading().await?;
    let Found { tasks: mut ids, looked } = listing::page(&mut Lister::new(session, filter), after, limit).await?;
    let mut more = ids.len() > limit;
    ids.truncate(limit);
    if filter.with_data {
        let bytes: Vec<i64> = sqlx::query_scalar(BYTES).bind(&ids).fetch_all(session.db()?).await?;
        let mut sum = 0_usize;
        let fitting = bytes.iter().take_while(|bytes| {
            sum += usize::try_from(**bytes).unwrap_or(usize::MAX / 2);
            sum <= PAGE_BYTES_MAX
        });
        let fitting = fitting.count().max(1);
        more |= fitting < ids.len();
        ids.truncate(fitting);
    }
    let sql = if filter.with_data { WITH_DATA } else { PLAIN };
    let read = if filter.with_data { task_with_data } else { task };
    let rows = sqlx::query(sql).bind(&ids).fetch_all(session.db()?).await?;
    session.commit().await?;
    let mut tasks: Vec<Task> = Vec::with_capacity(rows.len());
    let mut sum = 0_usize;
    for row in &rows {
        let task = read(row)?;
        // Rows may say less than they have.
        sum += task.data.as_ref().map_or(0, Vec::len) + task.output.as_ref().map_or(0, Vec::len);
        if sum > PAGE_BYTES_MAX && !tasks.is_empty() {
            more = true;
            break;
        }
        tasks.push(task);
    }
    let next = if more { tasks.last().map(|task| task.id) } else { looked.map(TaskId) };
    Ok(Page { tasks, next })
}

#[cfg(test)]
mod tests {
    use laelaps_test_databases::postgres;
    use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

    use super::*;
    use crate::Config;
    use crate::postgres::{Connections, Shared};

    /// So many tasks of one state stand in the table, and three of each other.
    const MANY: usize = 50_000;

    /// Tasks of one state, as far as a list looks at them: how many, and of which type, user and key.
    fn fill_state(state: State, name: &str, count: usize) -> String {
        let is_ended = matches!(state, State::Finished | State::Failed | State::Cancelled);
        let (until, ended) = (if state == State::Running { "9" } else { "NULL" }, if is_ended { "9" } else { "NULL" });
        let place = match state {
            State::Waiting => {
                "INSERT INTO laelaps.ready (turn, task, bytes, user_name) SELECT turn, id, bytes, user_name FROM filled"
            }
            State::Running => "INSERT INTO laelaps.claim (id, host, check_at, tasks) SELECT id, 1, 9, ARRAY[id] FROM filled",
            State::Failed => "INSERT INTO laelaps.failure (task) SELECT id FROM filled",
            State::Cancelled => "INSERT INTO laelaps.cancelled (task) SELECT id FROM filled",
            State::Finished => "SELECT count(*) FROM filled",
        };
        format!(
            "WITH filled AS (INSERT INTO laelaps.task (key, type, user_name, state, created_at, run_at, until, finished_at, retained_until, bytes)
            SELECT '{name} ' || number || '{state}', '{name}', '{name}', '{state}', 1, 1, {until}, {ended}, {ended}, 2
            FROM generate_series(1, {count}) AS number RETURNING id, turn, bytes, user_name) {place}",
            state = state.as_str()
        )
    }

    /// Rows and entries of indexes that this session has read, but for those that were added up already.
    async fn rows_read(session: &mut Session) -> i64 {
        const READ: &str = "SELECT sum(pg_stat_get_xact_tuples_returned(oid))::int8 FROM pg_class
            WHERE relnamespace = 'laelaps'::regnamespace AND relkind IN ('r', 'i')";
        sqlx::query_scalar(READ).fetch_one(session.db().unwrap()).await.unwrap()
    }

    #[tokio::test]
    async fn a_page_of_a_list_costs_what_a_page_costs_whatever_else_there_is() {
        for standing in State::ALL {
            let runtime = tokio::runtime::Handle::current();
            let url = move || runtime.block_on(async { postgres::shared().await.create_database().await });
            let url = tokio::task::spawn_blocking(url).await.unwrap();
            let queue = crate::Queue::open(&Config::new(url.clone())).await.unwrap();
            queue.init().await.unwrap();
            queue.close().await;
            let others = State::ALL.into_iter().filter(|state| *state != standing);
            let mut connection = PgConnection::connect(&url).await.unwrap();
            for (state, name, count) in
                [(standing, "many", MANY)].into_iter().chain(others.clone().map(|state| (state, "few", 3)))
            {
                sqlx::raw_sql(AssertSqlSafe(fill_state(state, name, count))).execute(&mut connection).await.unwrap();
            }
            let few = || Some("few".to_owned());
            let mut filters: Vec<(Filter, usize, i64)> = others
                .map(|state| {
                    (
                        Filter { states: vec![state], ..Filter::default() },
                        3,
                        if state == State::Finished { 15_000 } else { 1_500 },
                    )
                })
                .collect();
            filters.extend([
                (Filter { states: vec![standing], ..Filter::default() }, 20, 1_500),
                (Filter { task_type: few(), ..Filter::default() }, 12, 15_000),
                (Filter { user: few(), ..Filter::default() }, 12, 15_000),
                (Filter { key_prefix: few(), ..Filter::default() }, 12, 1_500),
            ]);
            let config = Config::new(url);
            let connections = Connections::open(&config).await.unwrap();
            let shared = Shared::new(connections, crate::schema::Steps::new(&[], &config), std::time::Duration::ZERO, false);
            for (filter, count, most) in filters {
                let asked = filter.clone();
                let costs = shared.repeat("listing", move |session| {
                    let mut filter = Filter { limit: 20, ..asked.clone() };
                    Box::pin(async move {
                        let (mut costs, mut found) = (Vec::new(), 0);
                        while found < count {
                            session.begin_reading().await?;
                            let before = rows_read(session).await;
                            let after = filter.after.map_or(0, |after| after.0);
                            let page = listing::page(&mut Lister::new(session, &filter), after, 20).await?;
                            costs.push(rows_read(session).await - before);
                            session.roll_back().await?;
                            found += page.tasks.len().min(20);
                            if found < count && page.looked.is_none() {
                                break;
                            }
                            filter.after = page.looked.map(TaskId);
                        }
                        Ok((costs, found))
                    })
                });
                let (costs, found) = costs.await.unwrap();
                assert_eq!(found, count, "{filter:?} beside {standing:?}");
                let worst = costs.into_iter().max().unwrap();
                assert!(worst <= most, "{worst} rows for {filter:?} among {MANY} that are {standing:?}");
            }
            shared.connections.close().await;
        }
    }
}
