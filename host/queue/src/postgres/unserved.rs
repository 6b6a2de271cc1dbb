//! Tasks that wait apart for a host that serves their type: put there after a claim that met them, and taken back by claims. See [`crate::unserved`].

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use super::asked::Asked;
use super::claim::count;
use super::due::{Moved, entered, move_out};
use super::failure::Failure;
use super::session::{Session, Shared};
use super::settle::Group;
use crate::unserved::{self, KINDS_MAX, Kind, LOOKS_MAX, Look, Place};
use crate::{Error, Settlement};

/// The kinds from one on, $1 and $2, at most $3: one probe of the index for each, however many tasks there are of it.
pub(super) const KINDS: &str = "WITH RECURSIVE kind AS (
        (SELECT queue, type, 1 AS number FROM laelaps.unserved WHERE (queue, type) >= ($1, $2) ORDER BY queue, type LIMIT 1)
        UNION ALL
        SELECT next.*, number + 1 FROM kind CROSS JOIN LATERAL (SELECT unserved.queue, unserved.type FROM laelaps.unserved
            WHERE (unserved.queue, unserved.type) > (kind.queue, kind.type) ORDER BY unserved.queue, unserved.type LIMIT 1) AS next
        WHERE number < $3::int8)
    SELECT queue, type FROM kind ORDER BY number";

/// Of each kind, $1 queues and $2 types, the first $3 tasks without user, and the first $3 of users behind $4.
pub(super) const PLACES: &str = "SELECT kind.number - 1, place.user_name, place.turn, place.task
    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS kind (queue, type, number) CROSS JOIN LATERAL (
        (SELECT user_name, turn, task FROM laelaps.unserved WHERE unserved.queue = kind.queue AND unserved.type = kind.type
            AND user_name = '' ORDER BY turn, task LIMIT $3)
        UNION ALL
        (SELECT user_name, turn, task FROM laelaps.unserved WHERE unserved.queue = kind.queue AND unserved.type = kind.type
            AND user_name > $4 ORDER BY user_name, turn, task LIMIT $3)) AS place";

/// Move tasks back to where they can be claimed: $1 queues, $2 types, $3 users, $4 turns, $5 tasks. What another claim takes back at this moment
/// is left to it. None of these counts as scheduled, unless it is.
pub(super) const MOVE_BACK: &str = move_out!(
    "unserved WHERE ctid = ANY(ARRAY(
            SELECT one.place FROM unnest($1::text[], $2::text[], $3::text[], $4::int8[], $5::int8[]) AS asked (queue, type, user_name, turn, task)
            CROSS JOIN LATERAL (SELECT ctid AS place FROM laelaps.unserved WHERE unserved.queue = asked.queue AND unserved.type = asked.type
                AND unserved.user_name = asked.user_name AND unserved.turn = asked.turn AND unserved.task = asked.task
                FOR UPDATE SKIP LOCKED) AS one))",
    "count(*) FROM found WHERE id IN (SELECT task FROM back)"
);

/// Take back what this claim may be given. Answers after how long to look again, if that may be worth it.
pub(super) async fn see_to(session: &mut Session, asked: &Asked) -> Result<Option<Duration>, Failure> {
    match take_back(session, asked).await {
        // Whatever there is can be claimed all the same.
        Err(failure) if !failure.is_lost() => {
            tracing::warn!(?failure, "tasks that waited for a host that serves their types are taken back by the next claim");
            session.roll_back().await?;
            Ok(None)
        }
        answer => answer,
    }
}

async fn take_back(session: &mut Session, asked: &Asked) -> Result<Option<Duration>, Failure> {
    let shared = Arc::clone(&session.shared);
    let mut wait = None;
    for _ in 0..LOOKS_MAX {
        let from = match shared.unserved.look(&asked.claim) {
            Look::Now(from) => from,
            Look::After(wait) => return Ok(asked.claim.accepts.is_some().then_some(wait)),
        };
        let (wanted, kind, again) = unserved::wanted(kinds(session, &from.kind).await?, &from, &asked.claim);
        let (moved, user) = move_first(session, &wanted, &from.user, asked.limit).await?;
        wait = shared.unserved.looked(&asked.claim, &from, again, (kind, user));
        if moved || !again {
            break;
        }
    }
    Ok(wait)
}

/// The kinds behind one; from the first on behind none.
async fn kinds(session: &mut Session, after: &Kind) -> Result<Vec<Kind>, Failure> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    // The least text behind another in the order of the table.
    let next = if *after == Kind::default() { "" } else { "\u{1}" };
    let query = sqlx::query_as(KINDS).bind(text(&after.queue)).bind(text(&after.task_type) + next).bind(count(KINDS_MAX));
    let kinds: Vec<(String, String)> = query.fetch_all(session.db()?).await?;
    let kind = |(queue, task_type): (String, String)| Kind { queue: queue.into_bytes(), task_type: task_type.into_bytes() };
    Ok(kinds.into_iter().map(kind).collect())
}

/// Move the first tasks of these kinds. Answers whether there were any, and the user behind whom the next look begins.
async fn move_first(session: &mut Session, kinds: &[Kind], after: &[u8], limit: usize) -> Result<(bool, Vec<u8>), Failure> {
    if kinds.is_empty() {
        return Ok((false, Vec::new()));
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let names: Vec<(String, String)> = kinds.iter().map(|kind| (text(&kind.queue), text(&kind.task_type))).collect();
    let (queues, types): (Vec<&str>, Vec<&str>) =
        names.iter().map(|(queue, task_type)| (queue.as_str(), task_type.as_str())).unzip();
    let query = sqlx::query_as(PLACES).bind(&queues).bind(&types).bind(count(limit)).bind(text(after));
    let rows: Vec<(i64, String, i64, i64)> = query.fetch_all(session.db()?).await?;
    let place = |(number, user, turn, task): (i64, String, i64, i64)| Place {
        kind: usize::try_from(number).unwrap_or_default(),
        user: user.into_bytes(),
        turn,
        task,
    };
    let (places, last) = unserved::first(rows.into_iter().map(place).collect(), limit);
    if places.is_empty() {
        return Ok((false, last));
    }
    let moved: Moved = sqlx::query_as(MOVE_BACK)
        .bind(places.iter().map(|place| queues[place.kind]).collect::<Vec<&str>>())
        .bind(places.iter().map(|place| types[place.kind]).collect::<Vec<&str>>())
        .bind(places.iter().map(|place| text(&place.user)).collect::<Vec<String>>())
        .bind(places.iter().map(|place| place.turn).collect::<Vec<i64>>())
        .bind(places.iter().map(|place| place.task).collect::<Vec<i64>>())
        .fetch_one(session.db()?)
        .await?;
    Ok((entered(session, moved), last))
}

/// Put apart what a claim was given and its host does not serve, whether or not anybody waits for that.
pub(super) fn put_apart(shared: &Arc<Shared>, others: Vec<Settlement>) -> JoinHandle<()> {
    let (shared, pass) = (Arc::clone(shared), shared.pass_at_once());
    tokio::spawn(async move {
        let written = match (Group::new(&others), &pass) {
            (Ok(group), Some(_)) => group.write_within(&shared, "putting tasks apart").await.map(drop),
            (Ok(_), None) => Err(Error::Closed),
            (Err(error), _) => Err(error),
        };
        shared.unserved.settled(&others);
        if let Err(error) = written {
            tracing::warn!(%error, "tasks of types that this host does not serve come back when their leases end");
        }
        drop(pass);
    })
}

#[cfg(test)]
mod tests {
    use laelaps_test_databases::postgres;
    use sqlx::{Connection as _, PgConnection};

    use super::*;
    use crate::Config;
    use crate::postgres::Connections;

    /// So many tasks of 60 kinds, one half of them of users.
    const FILL: &str = "INSERT INTO laelaps.unserved (turn, task, queue, type, user_name)
        SELECT n, n, 'q' || n % 3, 'type ' || n % 20, CASE WHEN n / 60 % 2 = 0 THEN '' ELSE 'user ' || n / 600 END
        FROM generate_series(1, 40000) AS n";
    const KINDS_THERE: i64 = 60;
    const LIMIT: i64 = 10;

    /// Rows and entries of indexes that this session has read, but for those that were added up already.
    async fn rows_read(session: &mut Session) -> i64 {
        const READ: &str = "SELECT sum(pg_stat_get_xact_tuples_returned(oid))::int8 FROM pg_class
            WHERE relnamespace = 'laelaps'::regnamespace AND relkind IN ('r', 'i')";
        sqlx::query_scalar(READ).fetch_one(session.db().unwrap()).await.unwrap()
    }

    /// What each statement of a look reads: of the kinds, of their first places, and of what is moved.
    async fn read_by_a_look(session: &mut Session) -> Result<[i64; 3], Failure> {
        session.begin().await?;
        let before = rows_read(session).await;
        let kinds = kinds(session, &Kind::default()).await?;
        assert_eq!(count(kinds.len()), KINDS_THERE);
        let of_kinds = rows_read(session).await;
        let (queues, types): (Vec<String>, Vec<String>) = kinds
            .iter()
            .map(|kind| (String::from_utf8(kind.queue.clone()).unwrap(), String::from_utf8(kind.task_type.clone()).unwrap()))
            .unzip();
        let query = sqlx::query_as(PLACES).bind(queues).bind(types).bind(LIMIT).bind("user 3");
        let places: Vec<(i64, String, i64, i64)> = query.fetch_all(session.db()?).await?;
        assert_eq!(count(places.len()), KINDS_THERE * LIMIT * 2);
        assert!(places.iter().all(|(_, user, ..)| user.is_empty() || user.as_str() > "user 3"));
        let of_places = rows_read(session).await;
        move_first(session, &kinds, &[], 10).await?;
        let of_all = rows_read(session).await;
        session.roll_back().await?;
        Ok([of_kinds - before, of_places - of_kinds, of_all - of_places])
    }

    #[tokio::test]
    async fn a_look_costs_what_its_kinds_cost_however_many_tasks_there_are_and_whatever_is_thought_of_them() {
        for (before, after) in [("", ""), ("ANALYZE laelaps.unserved", ""), ("", "ANALYZE laelaps.unserved")] {
            let runtime = tokio::runtime::Handle::current();
            let url = move || runtime.block_on(async { postgres::shared().await.create_database().await });
            let url = tokio::task::spawn_blocking(url).await.unwrap();
            let queue = crate::Queue::open(&Config::new(url.clone())).await.unwrap();
            queue.init().await.unwrap();
            queue.close().await;
            let mut connection = PgConnection::connect(&url).await.unwrap();
            for sql in [before, FILL, after] {
                sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
            }
            let config = Config::new(url);
            let connections = Connections::open(&config).await.unwrap();
            let shared = Shared::new(connections, crate::schema::Steps::new(&[], &config), Duration::ZERO, false);
            // After some times the server keeps a plan for all.
            for _ in 0..8 {
                let read = shared.repeat("looking", |session| Box::pin(read_by_a_look(session))).await.unwrap();
                let [of_kinds, of_places, of_all] = read;
                assert!(of_kinds <= KINDS_THERE * 3 && of_places <= KINDS_THERE * LIMIT * 5, "{read:?} ({before}, {after})");
                assert!(of_all <= of_places + 1_000, "{read:?} ({before}, {after})");
            }
            shared.connections.close().await;
        }
    }
}
