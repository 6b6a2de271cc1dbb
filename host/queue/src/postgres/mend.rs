//! Rows that contradict each other, although no operation of ours leaves such: somebody wrote into the tables. A task's own row is right; its
//! places and its user's account follow from it. Each is told with its number.

use std::collections::HashSet;

use super::accounts::{self, Owner, these};
use super::failure::Failure;
use super::session::Session;

/// Users looked at in one go.
const USERS_MAX: i64 = 1_000;

const FROM_READY: &str = "DELETE FROM laelaps.ready WHERE ctid = ANY($2::text[]::tid[]) AND task = ANY($1)";
const FROM_SUSPECT: &str = "DELETE FROM laelaps.suspect WHERE ctid = ANY($2::text[]::tid[]) AND task = ANY($1)";

/// Tasks whose place was taken away although they do not wait there go where their rows say.
const PUT: &str = "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    waiting AS MATERIALIZED (
        SELECT id, run_at, turn, bytes, max_running, user_name, queue, type, alone, run_at <= (SELECT now FROM clock) AS is_due
        FROM laelaps.task WHERE id = ANY($1) AND state = 'waiting' ORDER BY id FOR UPDATE),
    missing AS MATERIALIZED (
        SELECT * FROM waiting WHERE NOT EXISTS (SELECT FROM laelaps.scheduled WHERE scheduled.run_at = waiting.run_at AND scheduled.task = id)
            AND NOT EXISTS (SELECT FROM laelaps.unserved WHERE unserved.queue = waiting.queue AND unserved.type = waiting.type
                AND unserved.user_name = waiting.user_name AND unserved.turn = waiting.turn AND unserved.task = id)),
    ready AS (
        INSERT INTO laelaps.ready (turn, task, bytes, max_running, user_name, queue)
        SELECT turn, id, bytes, max_running, user_name, queue FROM missing WHERE is_due AND NOT alone ON CONFLICT DO NOTHING),
    suspect AS (
        INSERT INTO laelaps.suspect (turn, task, queue) SELECT turn, id, queue FROM missing WHERE is_due AND alone ON CONFLICT DO NOTHING),
    later AS (INSERT INTO laelaps.scheduled (run_at, task) SELECT run_at, id FROM missing WHERE NOT is_due ON CONFLICT DO NOTHING),
    changed AS (
        INSERT INTO laelaps.account_change (user_name, queue, turn, task, max_running)
        SELECT user_name, queue, turn, id, max_running FROM missing WHERE is_due AND NOT alone AND user_name <> '')
    SELECT DISTINCT ON (queue) queue, turn, id FROM missing ORDER BY queue, turn, id";

/// Tell of places that were not as their tasks' rows say.
pub(super) fn told(tasks: &[i64]) {
    for task in tasks {
        tracing::error!(task, "a place of a task contradicts its row, and was cleared away; somebody wrote into the tables");
    }
}

/// Tasks whose places in ready or suspect, already taken away in this transaction, were wrong.
pub(super) async fn strangers(session: &mut Session, tasks: &[i64]) -> Result<(), Failure> {
    told(tasks);
    let places: Vec<(String, i64, i64)> = sqlx::query_as(PUT).bind(tasks).fetch_all(session.db()?).await?;
    for (queue, turn, task) in places {
        session.afterwards(move |shared| shared.marks.lower(&queue, (turn, task)));
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

/// Users behind one, $1 and $2 its queue and name, at most $3: those with an account and those with something ready, in order; with what their accounts
/// say and what follows from the tasks. One statement sees one moment, in which accounts and their changes agree with the tasks.
pub(super) const USERS: &str = "WITH RECURSIVE with_ready AS (
        (SELECT queue, user_name, 1 AS number FROM laelaps.ready WHERE (queue, user_name) > ($1, $2) ORDER BY queue, user_name LIMIT 1)
        UNION ALL
        SELECT next.*, number + 1 FROM with_ready CROSS JOIN LATERAL (SELECT ready.queue, ready.user_name FROM laelaps.ready
            WHERE (ready.queue, ready.user_name) > (with_ready.queue, with_ready.user_name) ORDER BY ready.queue, ready.user_name LIMIT 1) AS next
        WHERE number < $3),
    either AS MATERIALIZED (
        (SELECT queue, user_name FROM laelaps.account WHERE (queue, user_name) > ($1, $2) ORDER BY queue, user_name LIMIT $3)
        UNION SELECT queue, user_name FROM with_ready),
    asked AS MATERIALIZED (SELECT queue, user_name FROM either ORDER BY queue, user_name LIMIT $3),
    last AS MATERIALIZED (SELECT queue, user_name, (SELECT count(*) FROM asked) >= $3 AS has_next FROM asked ORDER BY queue DESC, user_name DESC LIMIT 1),
    running AS MATERIALIZED (
        SELECT queue, user_name, count(*) AS tasks FROM laelaps.task WHERE state = 'running' AND user_name <> ''
            AND id = ANY(ARRAY(SELECT unnest(tasks) FROM laelaps.claim)) GROUP BY queue, user_name),
    changes AS MATERIALIZED (
        SELECT queue, user_name, sum(stopped) AS stopped, bool_or(task IS NOT NULL) AS became_ready FROM laelaps.account_change
        GROUP BY queue, user_name),
    users AS MATERIALIZED (
        SELECT queue, user_name FROM asked WHERE user_name <> '' UNION SELECT queue, user_name FROM running
        WHERE (queue, user_name) > ($1, $2) AND NOT EXISTS (
            SELECT FROM last WHERE has_next AND (running.queue, running.user_name) > (last.queue, last.user_name)))
    SELECT users.queue, users.user_name,
        coalesce(running.tasks, 0)::float8 - coalesce(account.running, 0)::float8 + coalesce(changes.stopped, 0)::float8 AS more,
        NOT coalesce(changes.became_ready, false) AND account.head_task IS DISTINCT FROM first.task AS other_head
    FROM users LEFT JOIN running USING (queue, user_name) LEFT JOIN changes USING (queue, user_name)
        LEFT JOIN LATERAL (SELECT running, head_task FROM laelaps.account WHERE account.queue = users.queue
            AND account.user_name = users.user_name OFFSET 0) AS account ON true
        LEFT JOIN LATERAL (SELECT turn, task, max_running FROM laelaps.ready WHERE ready.queue = users.queue
            AND ready.user_name = users.user_name ORDER BY turn, task LIMIT 1) AS first ON true
    UNION ALL SELECT queue, user_name, NULL, NULL FROM last WHERE has_next";

/// What one look at users found.
struct Looked {
    /// Users whose account counts what does not run, or not what runs, and by how many it has to be more.
    counts: Vec<(Owner, i64)>,
    /// Users whose account does not know their first ready task.
    heads: Vec<Owner>,
    /// Where the next look begins.
    next: Option<Owner>,
}

async fn look(session: &mut Session, after: &Owner, most: i64) -> Result<Looked, Failure> {
    type Row = (String, String, Option<f64>, Option<bool>);
    let query = sqlx::query_as(USERS).bind(&after.queue).bind(&after.user).bind(most);
    let rows: Vec<Row> = query.fetch_all(session.db()?).await?;
    let mut looked = Looked { counts: Vec::new(), heads: Vec::new(), next: None };
    for (queue, user, more, other_head) in rows {
        let owner = Owner { queue, user };
        let (Some(more), Some(other_head)) = (more, other_head) else {
            looked.next = Some(owner);
            continue;
        };
        #[allow(clippy::cast_possible_truncation, reason = "a difference of counts; beyond the range it saturates")]
        let more = more as i64;
        if other_head {
            looked.heads.push(owner.clone());
        }
        if more != 0 {
            looked.counts.push((owner, more));
        }
    }
    Ok(looked)
}

/// Compare some users' accounts with the leases and with what is ready, and mend those that differ: what two programs find at once is mended
/// once, since it is compared again under the accounts' locks. Goes on where the last call of this process came to.
pub(super) async fn accounts(session: &mut Session) -> Result<(), Failure> {
    const MORE: &str = "UPDATE laelaps.account SET running = running + asked.more
        FROM unnest($1::text[], $2::text[], $3::int8[]) AS asked (queue, user_name, more)
        WHERE account.queue = asked.queue AND account.user_name = asked.user_name";
    const HEADS: &str = concat!(
        "UPDATE laelaps.account SET (head_turn, head_task, head_max) = (
            SELECT turn, task, max_running FROM laelaps.ready WHERE ready.queue = account.queue AND ready.user_name = account.user_name
            ORDER BY turn, task LIMIT 1) WHERE ",
        these!()
    );
    let after = session.shared.mended_up_to();
    let looked = look(session, &after, USERS_MAX).await?;
    let next = looked.next.unwrap_or_default();
    let differ: HashSet<Owner> = looked.heads.into_iter().chain(looked.counts.into_iter().map(|(owner, _)| owner)).collect();
    if !differ.is_empty() {
        session.begin().await?;
        accounts::lock(session, differ.iter().cloned().collect()).await?;
        let looked = look(session, &after, USERS_MAX + i64::try_from(differ.len()).unwrap_or(0)).await?;
        let counts: Vec<(Owner, i64)> = looked.counts.into_iter().filter(|(owner, _)| differ.contains(owner)).collect();
        for (Owner { queue, user }, more) in &counts {
            tracing::error!(
                user,
                queue,
                more,
                "a user's account did not count what runs, and was mended; somebody wrote into the tables"
            );
        }
        let (owners, more): (Vec<Owner>, Vec<i64>) = counts.into_iter().unzip();
        let (queues, users) = accounts::columns(&owners);
        sqlx::query(MORE).bind(queues).bind(users).bind(more).execute(session.db()?).await?;
        let heads: Vec<Owner> = looked.heads.into_iter().filter(|owner| differ.contains(owner)).collect();
        let (queues, users) = accounts::columns(&heads);
        sqlx::query(HEADS).bind(queues).bind(users).execute(session.db()?).await?;
        let owners: Vec<Owner> = differ.into_iter().collect();
        let (queues, users) = accounts::columns(&owners);
        sqlx::query(accounts::LEAVE).bind(queues).bind(users).execute(session.db()?).await?;
        session.commit().await?;
        session.afterwards(super::session::Shared::wake);
    }
    session.shared.mend_from(next);
    Ok(())
}
