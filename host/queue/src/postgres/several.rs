//! Ready tasks of several queues in one order.
//!
//! Each queue of a [`Group`] is a branch of the statement that is read only as far as the order of all needs it: beside what is taken, one row of
//! each. What may be taken is looked for without locks, and more of it than is wanted; then that many rows are locked, and those that others have
//! locked are passed over. So nothing is locked that is not taken.

use sqlx::Row as _;

use super::claim::count;
use super::failure::Failure;
use super::heads::{END, Ended, Group, Heads, Met, Place, Sort, TOGETHER};
use super::session::Session;

/// One queue's tasks, from its mark on.
macro_rules! branch {
    ($number:literal, $of_user:literal, $whose:literal, ($queues:literal, $turns:literal, $tasks:literal, $most:literal)) => {
        concat!(
            "(SELECT ",
            $number,
            " AS head, ",
            $of_user,
            " AS of_user, turn, task, max_running, bytes, user_name, ctid AS place FROM laelaps.ready WHERE queue = (",
            $queues,
            "::text[])[",
            $number,
            "] AND user_name ",
            $whose,
            " '' AND (turn, task) >= ((",
            $turns,
            "::int8[])[",
            $number,
            "], (",
            $tasks,
            "::int8[])[",
            $number,
            "]) ORDER BY turn, task LIMIT ",
            $most,
            "::int8)"
        )
    };
}
pub(super) use branch;

/// The tasks of [`TOGETHER`] queues.
macro_rules! branches {
    ($of_user:literal, $whose:literal, $columns:tt) => {
        concat!(
            branch!("1", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("2", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("3", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("4", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("5", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("6", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("7", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("8", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("9", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("10", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("11", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("12", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("13", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("14", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("15", $of_user, $whose, $columns),
            " UNION ALL ",
            branch!("16", $of_user, $whose, $columns)
        )
    };
}
pub(super) use branches;

macro_rules! read {
    ($branches:expr) => {
        concat!(
            "WITH met AS MATERIALIZED (SELECT * FROM (",
            $branches,
            ") AS each ORDER BY turn, task LIMIT $6),
            ours AS MATERIALIZED (
                SELECT ctid AS place FROM laelaps.ready WHERE ctid = ANY(ARRAY(
                    SELECT place FROM met WHERE (turn, task) < ($4::int8, $5::int8))) ORDER BY turn, task LIMIT $7::int8
                FOR UPDATE SKIP LOCKED)
            SELECT head, of_user, turn, task, max_running, bytes::int8, user_name, place::text, place = ANY(ARRAY(SELECT place FROM ours))
            FROM met ORDER BY turn, task"
        )
    };
}

/// $1 queues, $2 and $3 where each begins, $4 and $5 from where on nothing is taken, $6 how many to look at, $7 how many to lock.
pub(super) const NOBODYS: &str = read!(branches!("false", "=", ("$1", "$2", "$3", "$6")));

/// As [`NOBODYS`], with $8 and $9 where each queue's tasks of users begin.
pub(super) const EVERYBODYS: &str = read!(concat!(
    branches!("false", "=", ("$1", "$2", "$3", "$6")),
    " UNION ALL ",
    branches!("true", "<>", ("$1", "$8", "$9", "$6"))
));

/// A ready task, which is locked.
pub(super) struct Read {
    pub(super) queue: String,
    pub(super) sort: Sort,
    pub(super) place: Place,
    pub(super) max_running: Option<i64>,
    pub(super) bytes: i64,
    pub(super) user: String,
    /// Its row.
    pub(super) row: String,
}

/// How many tasks are looked at where so many are wanted: others may be about to take as many, and each queue shows where it goes on.
pub(super) fn most(wanted: usize) -> usize {
    2 * wanted + TOGETHER
}

/// So many statements at the most for so many tasks.
pub(super) fn rounds_max(wanted: usize) -> usize {
    wanted / (TOGETHER / 2) + 8
}

/// Read and lock the first tasks of these sorts, at most so many, behind those that were read before.
pub(super) async fn read(session: &mut Session, heads: &mut Heads, sorts: &[Sort], wanted: usize) -> Result<Vec<Read>, Failure> {
    let mut read = Vec::with_capacity(wanted);
    for _ in 0..rounds_max(wanted) {
        let group = heads.group(sorts);
        read.extend(read_group(session, heads, group, sorts, wanted - read.len()).await?);
        if read.len() >= wanted || !heads.has_more(sorts) {
            break;
        }
    }
    Ok(read)
}

async fn read_group(
    session: &mut Session,
    heads: &mut Heads,
    group: Group,
    sorts: &[Sort],
    wanted: usize,
) -> Result<Vec<Read>, Failure> {
    let with_users = sorts.contains(&Sort::Users);
    let (nobodys, (turn, task)) = (heads.columns(group, Sort::Nobodys), group.bound.unwrap_or(END));
    let query = sqlx::query(if with_users { EVERYBODYS } else { NOBODYS });
    let query = query.bind(&nobodys.queues).bind(&nobodys.turns).bind(&nobodys.tasks).bind(turn).bind(task);
    let mut query = query.bind(count(most(wanted))).bind(count(wanted));
    if with_users {
        let users = heads.columns(group, Sort::Users);
        query = query.bind(users.turns).bind(users.tasks);
    }
    let rows = query.fetch_all(session.db()?).await?;
    let (mut met, mut read) = (Vec::with_capacity(rows.len()), Vec::with_capacity(wanted));
    for row in &rows {
        let number: i32 = row.try_get(0)?;
        let head = usize::try_from(number - 1).unwrap_or_default();
        let sort = if row.try_get(1)? { Sort::Users } else { Sort::Nobodys };
        let place = (row.try_get(2)?, row.try_get(3)?);
        met.push(Met { head, sort, place });
        if row.try_get(8)? {
            let queue = nobodys.queues.get(head).cloned().unwrap_or_default();
            let (max_running, bytes, user, row) = (row.try_get(4)?, row.try_get(5)?, row.try_get(6)?, row.try_get(7)?);
            read.push(Read { queue, sort, place, max_running, bytes, user, row });
        }
    }
    let upto = if read.len() == wanted { read.last().map(|read| read.place) } else { group.last_of(&met) };
    heads.learn(group, sorts, &met, Ended { upto, is_full: met.len() == most(wanted) });
    Ok(read)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;
    use std::time::Duration;

    use laelaps_test_databases::postgres;
    use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

    use super::*;
    use crate::postgres::asked::Asked;
    use crate::postgres::between::PICKS;
    use crate::postgres::claim;
    use crate::postgres::open_accounts::{OPEN_ACCOUNTS, OPEN_ACCOUNTS_OF};
    use crate::postgres::suspects::RESERVE;
    use crate::postgres::{Connections, Shared};
    use crate::{Claim, Config, HostDescription, HostId};

    /// A database with that much in it, and a host.
    async fn filled(sql: &'static str) -> (Arc<Shared>, HostId) {
        let runtime = tokio::runtime::Handle::current();
        let url = move || runtime.block_on(async { postgres::shared().await.create_database().await });
        let url = tokio::task::spawn_blocking(url).await.unwrap();
        let queue = crate::Queue::open(&Config::new(url.clone())).await.unwrap();
        queue.init().await.unwrap();
        let host = HostDescription { name: "here".to_owned(), process_id: 1, identity: None };
        let host = queue.backend().register_host(&host).await.unwrap();
        fill(&url, sql).await;
        let config = Config::new(url);
        let connections = Connections::open(&config).await.unwrap();
        (Shared::new(connections, crate::schema::Steps::new(&[], &config), Duration::ZERO, false), host)
    }

    /// Tasks of these numbers, queues and users, all ready, and from some number on as many suspects.
    async fn fill(url: &str, sql: &'static str) {
        let tasks = "INSERT INTO laelaps.task (created_at, run_at, bytes, key, type, user_name, queue, data)
            SELECT 1, n, 2, 'task ' || n, 'type', user_name, queue, '{}' FROM filled ORDER BY n;
            INSERT INTO laelaps.ready (turn, task, bytes, user_name, queue)
            SELECT turn, id, bytes, user_name, queue FROM laelaps.task ORDER BY id;
            INSERT INTO laelaps.account (queue, user_name, head_turn, head_task, picked)
            SELECT DISTINCT ON (queue, user_name) queue, user_name, turn, id, 1 FROM laelaps.task WHERE user_name <> ''
            ORDER BY queue, user_name, turn, id;
            INSERT INTO laelaps.suspect (turn, task, queue) SELECT -n, -n, queue FROM filled WHERE n > 30000";
        let mut connection = PgConnection::connect(url).await.unwrap();
        let sql = AssertSqlSafe(format!("CREATE TEMP TABLE filled AS {sql}; {tasks}"));
        sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    }

    fn asking(host: HostId, queues: Option<Arc<[String]>>) -> Claim {
        let alive_time = Duration::from_secs(300);
        Claim { queues, ..Claim::new(host, 10, alive_time) }
    }

    fn named(count: usize) -> Arc<[String]> {
        (0..count).map(|number| format!("q{number}")).collect()
    }

    /// Rows and entries of indexes that this session has read, but for those that were added up already.
    async fn rows_read(session: &mut Session) -> i64 {
        const READ: &str = "SELECT sum(pg_stat_get_xact_tuples_returned(oid))::int8 FROM pg_class
            WHERE relnamespace = 'laelaps'::regnamespace AND relkind IN ('r', 'i')";
        sqlx::query_scalar(READ).fetch_one(session.db().unwrap()).await.unwrap()
    }

    /// What the cheapest of some claims has read, since a dear one may come once a second; and the keys that they took.
    async fn claimed(shared: &Arc<Shared>, host: HostId, queues: Option<&[&str]>) -> (i64, Vec<String>) {
        let queues: Option<Arc<[String]>> =
            queues.map(|queues| queues.iter().map(|queue| (*queue).to_owned()).collect::<Vec<String>>().into());
        let (mut least, mut keys) = (i64::MAX, Vec::new());
        for _ in 0..5 {
            let queues = queues.clone();
            let claiming = shared.repeat("claiming", move |session| {
                let claim = asking(host, queues.clone());
                Box::pin(async move {
                    session.begin().await?;
                    let before = rows_read(session).await;
                    let taken = claim::claim(session, &Asked::new(claim)).await?;
                    let read = rows_read(session).await - before;
                    session.commit().await?;
                    Ok((read, taken.into_claimed().tasks))
                })
            });
            let (read, tasks) = claiming.await.unwrap();
            least = read.min(least);
            keys.extend(tasks.into_iter().map(|task| task.key));
        }
        (least, keys)
    }

    #[tokio::test]
    async fn a_claim_of_a_thousand_queues_costs_about_as_much_as_one_of_one() {
        let (shared, host) =
            filled("SELECT n, 'q' || n % 1000 AS queue, '' AS user_name FROM generate_series(1, 5000) AS n").await;
        let (all, keys) = claimed(&shared, host, None).await;
        let expected: Vec<String> = (1..=50).map(|number| format!("task {number}")).collect();
        assert_eq!(keys, expected, "in the order of their turns");
        let (one, keys) = claimed(&shared, host, Some(&["q77"])).await;
        assert_eq!(keys.len(), 5);
        assert!(one <= 100 && all <= 250, "{one} rows for one queue, {all} for a thousand");
        let names = named(1_000);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (named, keys) = claimed(&shared, host, Some(&names)).await;
        let first: HashSet<String> = (51..=101).filter(|number| *number != 77).map(|number| format!("task {number}")).collect();
        assert_eq!(keys.into_iter().collect::<HashSet<String>>(), first);
        assert!(named <= 250, "{named} rows for a thousand that are named");
        shared.connections.close().await;
    }

    #[tokio::test]
    async fn what_waits_in_other_queues_costs_a_claim_nothing() {
        let (shared, host) = filled(
            "SELECT n, CASE WHEN n <= 3 THEN 'mail' WHEN n <= 30000 THEN 'bulk' ELSE '' END AS queue,
                CASE WHEN n BETWEEN 10000 AND 20000 OR n > 35000 THEN 'user ' || n ELSE '' END AS user_name
            FROM generate_series(1, 40000) AS n",
        )
        .await;
        let (mail, keys) = claimed(&shared, host, Some(&["mail"])).await;
        assert_eq!(keys, ["task 1", "task 2", "task 3"]);
        let (none, _) = claimed(&shared, host, Some(&["none", "mail"])).await;
        assert!(mail <= 100 && none <= 100, "{mail} and {none} rows");
        let rows = shared.repeat("looking for accounts", |session| {
            Box::pin(async move {
                let mut costs = Vec::new();
                let (mail, bulk) = (["mail", "none"].as_slice(), ["bulk"].as_slice());
                for queues in [Some(mail), Some(bulk), Some(&[""]), None] {
                    session.begin().await?;
                    let before = rows_read(session).await;
                    sqlx::query(PICKS).bind(queues).execute(session.db()?).await?;
                    let query = sqlx::query(if queues.is_some() { OPEN_ACCOUNTS_OF } else { OPEN_ACCOUNTS });
                    let query = query.bind(10_i64).bind(0_i64).bind(2_i64).bind(10_i64);
                    let query = if queues.is_some() { query.bind(queues) } else { query };
                    let found = query.fetch_all(session.db()?).await?.len();
                    sqlx::query(RESERVE).bind(1_i64).bind(20_i64).bind(1_i64).bind(queues).execute(session.db()?).await?;
                    costs.push((found, rows_read(session).await - before));
                    session.roll_back().await?;
                }
                Ok(costs)
            })
        });
        let costs = rows.await.unwrap();
        assert_eq!(costs.iter().map(|(found, _)| *found).collect::<Vec<usize>>(), [0, 10, 10, 10]);
        assert!(costs.iter().all(|(_, read)| *read <= 250), "{costs:?}");
        shared.connections.close().await;
    }

    #[tokio::test]
    async fn of_many_queues_the_users_that_are_first_among_them_are_found_whoever_is_first_elsewhere() {
        let (shared, host) =
            filled("SELECT n, 'q' || n % 200 AS queue, 'user ' || n AS user_name FROM generate_series(1, 20000) AS n").await;
        for (sql, numbers) in [
            ("SELECT", 1..=10),
            // Now the heaviest are all of queues that are not asked for, and so are those that were passed over longest.
            ("UPDATE laelaps.account SET head_max = 9, picked = -900 WHERE queue IN ('q100', 'q101', 'q102')", 11..=20),
        ] {
            let claiming = shared.repeat("claiming", move |session| {
                Box::pin(async move {
                    sqlx::query(sql).execute(session.db()?).await?;
                    let claim = asking(host, Some(named(TOGETHER * 3)));
                    Ok(claim::claim(session, &Asked::new(claim)).await?.into_claimed().tasks)
                })
            });
            let keys: HashSet<String> = claiming.await.unwrap().into_iter().map(|task| task.key).collect();
            assert_eq!(keys, numbers.map(|number| format!("task {number}")).collect());
        }
        shared.connections.close().await;
    }
}
