//! Rows that contradict each other, although no operation of ours leaves such: somebody wrote into the tables. A task's own row is right; its
//! places and its user's account follow from it. Each is told with its number.

use std::collections::HashSet;

use super::accounts;
use super::failure::Failure;
use super::session::Session;

/// Users looked at in one go.
const USERS_MAX: i64 = 1_000;

const FROM_READY: &str = "DELETE FROM laelaps.ready WHERE ctid = ANY($2::text[]::tid[]) AND task = ANY($1)";
const FROM_SUSPECT: &str = "DELETE FROM laelaps.suspect WHERE ctid = ANY($2::text[]::tid[]) AND task = ANY($1)";

/// Tasks whose place was taken away although they do not wait there go where their rows say.
const PUT: &str = "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    waiting AS MATERIALIZED (
        SELECT id, run_at, turn, bytes, max_running, user_name, alone, run_at <= (SELECT now FROM clock) AS is_due
        FROM laelaps.task WHERE id = ANY($1) AND state = 'waiting' ORDER BY id FOR UPDATE),
    missing AS MATERIALIZED (
        SELECT * FROM waiting WHERE NOT EXISTS (SELECT FROM laelaps.scheduled WHERE scheduled.run_at = waiting.run_at AND scheduled.task = id)),
    ready AS (
        INSERT INTO laelaps.ready (turn, task, bytes, max_running, user_name)
        SELECT turn, id, bytes, max_running, user_name FROM missing WHERE is_due AND NOT alone ON CONFLICT DO NOTHING),
    suspect AS (
        INSERT INTO laelaps.suspect (turn, task) SELECT turn, id FROM missing WHERE is_due AND alone ON CONFLICT DO NOTHING),
    later AS (INSERT INTO laelaps.scheduled (run_at, task) SELECT run_at, id FROM missing WHERE NOT is_due ON CONFLICT DO NOTHING),
    changed AS (
        INSERT INTO laelaps.account_change (user_name, turn, task, max_running)
        SELECT user_name, turn, id, max_running FROM missing WHERE is_due AND NOT alone AND user_name <> '')
    SELECT min(turn), (array_agg(id ORDER BY turn, id))[1] FROM missing";

/// Tell of places that were not as their tasks' rows say.
pub(super) fn told(tasks: &[i64]) {
    for task in tasks {
        tracing::error!(task, "a place of a task contradicts its row, and was cleared away; somebody wrote into the tables");
    }
}

/// Tasks whose places in ready or suspect, already taken away in this transaction, were wrong.
pub(super) async fn strangers(session: &mut Session, tasks: &[i64]) -> Result<(), Failure> {
    told(tasks);
    let place: (Option<i64>, Option<i64>) = sqlx::query_as(PUT).bind(tasks).fetch_one(session.db()?).await?;
    if let (Some(turn), Some(task)) = place {
        session.afterwards(move |shared| shared.marks.lower((turn, task)));
    }
    Ok(())
}

/// As [`strangers`], with the places in ready.
pub(super) async fn strangers_in_ready(session: &mut Session, tasks: &[i64], places: &[String]) -> Result<(), Failure> {
    strangers_in(session, FROM_READY, tasks, places).await
}

/// As [`strangers`], with the places in suspect.
pub(super) async fn strangers_in_suspect(session: &mut Session, tasks: &[i64], places: &[String]) -> Result<(), Failure> {
    strangers_in(session, FROM_SUSPECT, tasks, places).await
}

async fn strangers_in(session: &mut Session, sql: &'static str, tasks: &[i64], places: &[String]) -> Result<(), Failure> {
    session.begin().await?;
    sqlx::query(sql).bind(tasks).bind(places).execute(session.db()?).await?;
    strangers(session, tasks).await?;
    session.commit().await
}

/// Users from one on, $1, at most $2: those with an account and those with something ready, in order; with what their accounts say and what
/// follows from the tasks. One statement sees one moment, in which accounts and their changes agree with the tasks.
pub(super) const USERS: &str = "WITH RECURSIVE with_ready AS (
        (SELECT user_name FROM laelaps.ready WHERE user_name > $1 ORDER BY user_name LIMIT 1)
        UNION ALL
        SELECT (SELECT ready.user_name FROM laelaps.ready WHERE ready.user_name > with_ready.user_name ORDER BY ready.user_name LIMIT 1)
        FROM with_ready WHERE user_name IS NOT NULL),
    asked AS MATERIALIZED (
        SELECT user_name FROM (
            (SELECT user_name FROM laelaps.account WHERE user_name > $1 ORDER BY user_name LIMIT $2)
            UNION (SELECT user_name FROM with_ready WHERE user_name IS NOT NULL LIMIT $2)) AS either
        ORDER BY user_name LIMIT $2),
    running AS MATERIALIZED (
        SELECT user_name, count(*) AS tasks FROM laelaps.task WHERE state = 'running' AND user_name <> ''
            AND id = ANY(ARRAY(SELECT unnest(tasks) FROM laelaps.claim)) GROUP BY user_name),
    changes AS MATERIALIZED (
        SELECT user_name, sum(stopped) AS stopped, bool_or(task IS NOT NULL) AS became_ready FROM laelaps.account_change GROUP BY user_name),
    users AS MATERIALIZED (
        SELECT user_name FROM asked UNION SELECT user_name FROM running
        WHERE user_name > $1 AND user_name <= coalesce((SELECT max(user_name) FROM asked), user_name))
    SELECT users.user_name,
        coalesce(running.tasks, 0)::float8 - coalesce(account.running, 0)::float8 + coalesce(changes.stopped, 0)::float8 AS more,
        NOT coalesce(changes.became_ready, false) AND account.head_task IS DISTINCT FROM first.task AS other_head,
        first.turn, first.task, first.max_running,
        (SELECT CASE WHEN count(*) >= $2 THEN max(user_name) END FROM asked) AS next
    FROM users LEFT JOIN running USING (user_name) LEFT JOIN changes USING (user_name)
        LEFT JOIN LATERAL (SELECT running, head_task FROM laelaps.account WHERE account.user_name = users.user_name OFFSET 0) AS account ON true
        LEFT JOIN LATERAL (SELECT turn, task, max_running FROM laelaps.ready WHERE ready.user_name = users.user_name
            ORDER BY turn, task LIMIT 1) AS first ON true";

/// What one look at users found.
struct Looked {
    /// Users whose account counts what does not run, or not what runs, and by how many it has to be more.
    counts: Vec<(String, i64)>,
    /// Users whose account does not know their first ready task.
    heads: Vec<String>,
    /// Where the next look begins.
    next: Option<String>,
}

async fn look(session: &mut Session, after: &str, most: i64) -> Result<Looked, Failure> {
    type Row = (String, f64, bool, Option<i64>, Option<i64>, Option<i64>, Option<String>);
    let rows: Vec<Row> = sqlx::query_as(USERS).bind(after).bind(most).fetch_all(session.db()?).await?;
    let mut looked = Looked { counts: Vec::new(), heads: Vec::new(), next: None };
    for (user, more, other_head, .., next) in rows {
        looked.next = looked.next.or(next);
        #[allow(clippy::cast_possible_truncation, reason = "a difference of counts; beyond the range it saturates")]
        let more = more as i64;
        if other_head {
            looked.heads.push(user.clone());
        }
        if more != 0 {
            looked.counts.push((user, more));
        }
    }
    Ok(looked)
}

/// Compare some users' accounts with the leases and with what is ready, and mend those that differ: what two programs find at once is mended
/// once, since it is compared again under the accounts' locks. Goes on where the last call of this process came to.
pub(super) async fn accounts(session: &mut Session) -> Result<(), Failure> {
    const MORE: &str = "UPDATE laelaps.account SET running = running + ($2::int8[])[array_position($1::text[], user_name)]
        WHERE user_name = ANY($1)";
    const HEADS: &str = "UPDATE laelaps.account SET (head_turn, head_task, head_max) = (
            SELECT turn, task, max_running FROM laelaps.ready WHERE ready.user_name = account.user_name ORDER BY turn, task LIMIT 1)
        WHERE user_name = ANY($1)";
    let after = session.shared.mended_up_to();
    let looked = look(session, &after, USERS_MAX).await?;
    let next = looked.next.unwrap_or_default();
    let differ: HashSet<String> = looked.heads.into_iter().chain(looked.counts.into_iter().map(|(user, _)| user)).collect();
    if !differ.is_empty() {
        session.begin().await?;
        accounts::lock(session, differ.iter().cloned().collect()).await?;
        let looked = look(session, &after, USERS_MAX + i64::try_from(differ.len()).unwrap_or(0)).await?;
        let counts: Vec<(String, i64)> = looked.counts.into_iter().filter(|(user, _)| differ.contains(user)).collect();
        for (user, more) in &counts {
            tracing::error!(
                user,
                more,
                "a user's account did not count what runs, and was mended; somebody wrote into the tables"
            );
        }
        let (users, more): (Vec<String>, Vec<i64>) = counts.into_iter().unzip();
        sqlx::query(MORE).bind(users).bind(more).execute(session.db()?).await?;
        let heads: Vec<String> = looked.heads.into_iter().filter(|user| differ.contains(user)).collect();
        sqlx::query(HEADS).bind(heads).execute(session.db()?).await?;
        let users: Vec<String> = differ.into_iter().collect();
        sqlx::query(accounts::LEAVE).bind(users).execute(session.db()?).await?;
        session.commit().await?;
        session.afterwards(super::session::Shared::wake);
    }
    session.shared.mend_from(next);
    Ok(())
}
