//! Claims: a constant number of statements, whatever the size of the batch and of the backlog.
//!
//! Where no user has work there is one statement ([`CLAIM`]), which is its own transaction. It looks first: if something has become due, has
//! to run alone or belongs to users, it takes nothing and says so, and that is seen to. Where several queues may have something it is another
//! statement ([`CLAIM_SEVERAL`]), and more of them if the queues are many.
//!
//! Whatever takes something holds the host's row with it, so that whoever marks a host as one that has left waits for claims under way, and
//! claims that come later find it. What a host may have is then seen by whoever takes it back.

use std::sync::Arc;
use std::time::Instant;

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::asked::{Asked, Taken};
use super::failure::{self, Failure};
use super::got::{Got, in_order, last_places, taken_columns};
use super::heads::{END, Ended, Met, Sort};
use super::mark::From;
use super::session::Session;
use super::several::{branch, branches, most, rounds_max};
use super::{accounts, around, between, due, mend, suspects, unserved};
use crate::{HostId, NewTask, Timestamp};

/// How often one claim looks again because all that it met were places of tasks that do not wait there.
const MENDED_MAX: usize = 20;
/// How often one claim of some queues enters changes of accounts: those of other queues may stand before its own.
const ENTERED_MAX: usize = 10;
/// Data of a claim beyond which it takes from no further queues.
const ENOUGH_BYTES: usize = 16 << 20;

/// A new lease: it grows with every claim, and does not repeat one that a promoted standby never heard of, but for one case in a million.
macro_rules! next_lease {
    () => {
        "nextval('laelaps.lease_number') * 1048576 + floor(random() * 1048576)::int8"
    };
}
pub(super) use next_lease;

/// A column that lets this transaction commit without waiting for the disk or for a standby. A server that breaks down within the next half second
/// may forget the claim or renewal: then the task waits again, or its lease ends earlier, and whoever had it finds its lease lost, since the
/// next one has another number: part of it is drawn, so also a sequence that begins again does not repeat it. What is settled or submitted waits for
/// the disk, and everything before it is flushed with it.
macro_rules! flush_later {
    () => {
        "set_config('synchronous_commit', 'off', true) AS flush"
    };
}
pub(super) use flush_later;

/// What has to be known before anything is taken, up to what depends on how many queues there are. Of account changes, a claim of some queues looks
/// at the first 100: if those are all of other queues, it enters what there is.
macro_rules! look {
    () => {
        "WITH look AS MATERIALIZED (
        SELECT clock.now, EXISTS (SELECT FROM laelaps.host WHERE id = $1 AND left_at IS NULL AND ended_at IS NULL) AS here,
            (SELECT run_at FROM laelaps.scheduled WHERE run_at >= $6 ORDER BY run_at, task LIMIT 1) AS next_due,
            CASE WHEN $15::text[] IS NULL THEN (SELECT count(*) FROM (SELECT FROM laelaps.suspect LIMIT 2) AS first)
                ELSE (SELECT count(*) FROM (SELECT FROM laelaps.suspect WHERE queue = ANY($15) LIMIT 2) AS first) END AS suspects,
            NOT $8 AND CASE WHEN $15 IS NULL OR '' = ANY($15)
                THEN coalesce((SELECT true FROM laelaps.account WHERE open AND queue = '' ORDER BY picked LIMIT 1), false) ELSE false END
            OR NOT $8 AND CASE
                WHEN coalesce((SELECT true FROM laelaps.account WHERE open AND octet_length(queue) > 0 ORDER BY picked LIMIT 1), false)
                THEN $15 IS NULL OR EXISTS (SELECT FROM unnest($15) AS asked (queue) CROSS JOIN LATERAL (SELECT FROM laelaps.account
                    WHERE open AND account.queue <> '' AND account.queue = asked.queue ORDER BY picked LIMIT 1) AS first)
                ELSE false END AS open,
            CASE WHEN $8 THEN false WHEN $15 IS NULL THEN EXISTS (SELECT FROM laelaps.account_change WHERE id >= $7)
                ELSE (SELECT count(*) >= 100 OR coalesce(bool_or(queue = ANY($15)), false)
                    FROM (SELECT queue FROM laelaps.account_change WHERE id >= $7 ORDER BY id LIMIT 100) AS first) END"
    };
}

/// The moment, for [`look`].
macro_rules! clock {
    () => {
        concat!(" FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now, ", flush_later!(), ") AS clock),")
    };
}

/// Whether nothing else is to be done before tasks without user are taken.
macro_rules! is_free {
    () => {
        "here AND NOT changed AND NOT open AND NOT others AND NOT ($11 AND coalesce(next_due <= now, false)) AND NOT ($12 AND suspects > 0)"
    };
}

/// Hold the host, and choose of what is locked.
macro_rules! choose {
    () => {
        "staying AS MATERIALIZED (
        SELECT id FROM laelaps.host WHERE id = $1 AND left_at IS NULL AND ended_at IS NULL
        LIMIT (SELECT CASE WHEN EXISTS (SELECT FROM locked) THEN 1 ELSE 0 END) FOR SHARE),
    seen AS (
        UPDATE laelaps.host SET seen_at = (SELECT now FROM look) WHERE id = ANY(ARRAY(
            SELECT id FROM laelaps.host WHERE id = $1 AND seen_at < (SELECT now FROM look) - 10000
            LIMIT (SELECT 1 + 0 * count(*) FROM staying) FOR NO KEY UPDATE SKIP LOCKED))),
    chosen AS MATERIALIZED (
        SELECT * FROM (SELECT *, sum(bytes) OVER (ORDER BY turn, task) AS sum FROM locked) AS summed
        WHERE (sum <= 67108864 OR sum = bytes) AND EXISTS (SELECT FROM staying)),"
    };
}

/// Take what is chosen.
macro_rules! lease {
    () => {
        concat!(
            "taken AS (
        UPDATE laelaps.task SET state = 'running', lease = ",
            next_lease!(),
            ", host = $1, until = (SELECT now FROM look) + $5
        WHERE id = ANY(ARRAY(SELECT task FROM chosen)) AND state = 'waiting' AND user_name = '' AND NOT alone AND queue = "
        )
    };
}

/// What was taken leaves its places, and is entered as claimed together.
macro_rules! leave {
    () => {
        concat!(
            " RETURNING ",
            taken_columns!(),
            "),
    all_taken AS MATERIALIZED (SELECT (SELECT count(*) FROM taken) = (SELECT count(*) FROM chosen) AS yes),
    gone AS (DELETE FROM laelaps.ready WHERE ctid = ANY(CASE WHEN (SELECT yes FROM all_taken) THEN ARRAY(SELECT place FROM chosen)
        ELSE ARRAY(SELECT place FROM chosen WHERE task IN (SELECT id FROM taken)) END)),
    together AS (
        INSERT INTO laelaps.claim (id, host, check_at, tasks)
        SELECT $13, $1, (SELECT now FROM look) + $5, array_agg(id) FROM taken HAVING count(*) > 0)
    SELECT look.now, look.here AND (EXISTS (SELECT FROM staying) OR NOT EXISTS (SELECT FROM locked)) AS here,
        look.next_due, look.suspects, look.changed, look.open, look.others,
        CASE WHEN NOT (SELECT yes FROM all_taken) THEN ARRAY(SELECT task FROM chosen WHERE task NOT IN (SELECT id FROM taken) ORDER BY place) END,
        CASE WHEN NOT (SELECT yes FROM all_taken)
            THEN ARRAY(SELECT place::text FROM chosen WHERE task NOT IN (SELECT id FROM taken) ORDER BY place) END,
        taken.*"
        )
    };
}

/// Look, and take the first tasks without user of one queue, $14, if nothing else is to be done before. $15 are the queues that are asked for, NULL for
/// all; $16: whether others than $14 have something is looked at too, and is to be seen to first. 67108864: the most data of one claim, unless one task
/// alone has more. The host is noted as seen after its row is held (hence the count), and not if another claim of it holds the row as well.
/// A place whose task does not wait there is left alone, and told as a stranger.
pub(super) const CLAIM: &str = concat!(
    look!(),
    " OR $8 AND coalesce((SELECT true FROM laelaps.ready WHERE queue = $14 AND user_name <> '' AND (turn, task) >= ($9, $10)
                ORDER BY turn, task LIMIT 1), false) AS changed,
            CASE WHEN $16 AND $15 IS NULL THEN CASE WHEN $14 <> '' THEN coalesce(
                    (SELECT queue FROM laelaps.ready ORDER BY queue, user_name, turn, task LIMIT 1) <> $14, false) ELSE false END
                OR (SELECT queue FROM laelaps.ready WHERE queue > $14 ORDER BY queue, user_name, turn, task LIMIT 1) IS NOT NULL
                ELSE false END AS others",
    clock!(),
    "locked AS MATERIALIZED (
        SELECT ctid AS place, turn, task, bytes FROM laelaps.ready
        WHERE queue = $14 AND user_name = '' AND (turn, task) >= ($3, $4) ORDER BY turn, task
        LIMIT (SELECT CASE WHEN ",
    is_free!(),
    " THEN $2 ELSE 0 END FROM look)
        FOR UPDATE SKIP LOCKED),",
    choose!(),
    lease!(),
    "$14",
    leave!(),
    " FROM look LEFT JOIN taken ON true"
);

/// As [`CLAIM`], of several queues, $14, from where each begins, $3 and $4 (of users $9 and $10), and from where on nothing is taken, $16 and $17. $18: how many to look at.
/// Also answers how many were locked, and what was looked at.
pub(super) const CLAIM_SEVERAL: &str = concat!(
    look!(),
    " OR $8 AND EXISTS (SELECT FROM unnest($14::text[], $9::int8[], $10::int8[]) AS asked (queue, turn, task)
                CROSS JOIN LATERAL (SELECT FROM laelaps.ready WHERE ready.queue = asked.queue AND ready.user_name <> ''
                    AND (ready.turn, ready.task) >= (asked.turn, asked.task) ORDER BY ready.turn, ready.task LIMIT 1) AS first) AS changed,
            false AS others",
    clock!(),
    "met AS MATERIALIZED (
        SELECT * FROM (",
    branches!("false", "=", ("$14", "$3", "$4", "$18")),
    ") AS each ORDER BY turn, task LIMIT (SELECT CASE WHEN ",
    is_free!(),
    " THEN $18 ELSE 0 END FROM look)),
    locked AS MATERIALIZED (
        SELECT ctid AS place, turn, task, bytes, queue FROM laelaps.ready
        WHERE ctid = ANY(ARRAY(SELECT place FROM met WHERE (turn, task) < ($16::int8, $17::int8)))
        ORDER BY turn, task LIMIT $2 FOR UPDATE SKIP LOCKED),",
    choose!(),
    "sorted AS MATERIALIZED (SELECT array_agg(task ORDER BY task) AS tasks, array_agg(queue ORDER BY task) AS queues FROM chosen),",
    lease!(),
    "((SELECT queues FROM sorted))[width_bucket(id, (SELECT tasks FROM sorted))]",
    leave!(),
    ", (SELECT count(*) FROM locked) AS locked, looked.heads, looked.turns, looked.tasks
    FROM look CROSS JOIN (SELECT array_agg(head ORDER BY turn, task) AS heads, array_agg(turn ORDER BY turn, task) AS turns,
        array_agg(task ORDER BY turn, task) AS tasks FROM met) AS looked LEFT JOIN taken ON true"
);

/// The columns of a claimed task.
const TAKEN_COLUMNS: usize = 21;
/// The columns of the look.
const LOOK_COLUMNS: usize = 9;

/// The state of what a claim may have to see to.
pub(super) struct Look {
    pub(super) now: i64,
    next_due: Option<i64>,
    suspects: i64,
    changed: bool,
    open: bool,
    /// Other queues have something too.
    others: bool,
    /// Some places were of tasks that do not wait there, and were mended.
    strangers: bool,
}

impl Look {
    /// Whether tasks without user could be taken: nothing else had to be done before.
    fn is_free(&self, rounds: Rounds) -> bool {
        let is_due = rounds.due && self.next_due.is_some_and(|due| due <= self.now);
        let is_suspect = rounds.suspects && self.suspects > 0;
        !(self.changed || self.open || self.others || is_due || is_suspect)
    }
}

/// What has been seen to, and need not be looked at again.
#[derive(Clone, Copy)]
struct Rounds {
    due: bool,
    suspects: bool,
}

/// Take waiting tasks under new leases.
pub(super) async fn claim(session: &mut Session, asked: &Asked) -> Result<Taken, Failure> {
    if session.again {
        let mut again = Got::default();
        for number in asked.earlier() {
            again.add(found_again(session, asked, number).await?);
        }
        if !again.is_empty() {
            let (tasks, broken) = again.into_tasks();
            return Ok(Taken { tasks, broken, alone_waiting: false, next_due_in: None });
        }
    }
    let shared = Arc::clone(&session.shared);
    let look_in = unserved::see_to(session, asked).await?;
    let asked = &asked.with_number();
    let mut from = shared.marks.begin(&asked.way, asked.limit);
    let started = Instant::now();
    let mut taken = claim_from(session, asked, &mut from).await?;
    shared.marks.looked(&from, started.elapsed());
    if taken.is_empty()
        && let Some(mut from) = shared.marks.begin_again(&from)
    {
        let started = Instant::now();
        taken = claim_from(session, asked, &mut from).await?;
        shared.marks.looked(&from, started.elapsed());
    }
    taken.next_due_in = [taken.next_due_in, look_in].into_iter().flatten().min();
    Ok(taken)
}

async fn claim_from(session: &mut Session, asked: &Asked, from: &mut From) -> Result<Taken, Failure> {
    let mut rounds = Rounds { due: true, suspects: asked.claim.alone };
    let (mut entered, mut waited, mut mended) = (0, false, 0);
    let entered_max = if asked.queues().is_some() && !asked.claim.ignore_users { ENTERED_MAX } else { 1 };
    let (mut searched, mut looks) = (0, 0);
    if from.has_to_look_around() {
        around::look(session, from).await?;
    }
    loop {
        let (look, got) = look_and_take(session, asked, from, rounds).await?;
        if !got.is_empty() {
            got.note(&session.shared, asked.number);
            let (look, got) = take_more(session, asked, from, rounds, (look, got)).await?;
            return answer(session, asked, &look, got).await;
        }
        if look.others {
            around::look(session, from).await?;
            continue;
        }
        if look.strangers && mended < MENDED_MAX {
            mended += 1;
            continue;
        }
        if look.is_free(rounds) && searched < rounds_max(asked.limit) && goes_on(session, from) {
            searched += 1;
            continue;
        }
        // All that was thought of so many queues is older than what others took of them.
        if look.is_free(rounds) && looks < around::LOOKS_MAX && goes_on(session, from) && from.heads.rest.is_some() {
            around::look(session, from).await?;
            (searched, looks) = (0, looks + 1);
            continue;
        }
        if rounds.due && look.next_due.is_some_and(|due| due <= look.now) {
            due::move_due(session, from).await?;
            rounds.due = false;
            continue;
        }
        if entered < entered_max && look.changed {
            let any = accounts::enter_changes(session, asked.limit, from, accounts::ENTER).await?;
            entered = if any { entered + 1 } else { entered_max };
            continue;
        }
        if rounds.suspects && look.suspects > 0 {
            let got = suspects::take(session, asked).await?;
            if !got.is_empty() {
                got.note(&session.shared, asked.number);
                return answer(session, asked, &look, got).await;
            }
            rounds.suspects = false;
            continue;
        }
        let got = if look.open || look.changed { between::claim(session, asked, from).await? } else { got };
        if got.is_empty() && look.changed && !waited {
            // Others may be about to enter what this claim is looking for.
            accounts::enter_changes(session, asked.limit, from, accounts::ENTER_WAITING).await?;
            waited = true;
            continue;
        }
        got.note(&session.shared, asked.number);
        return answer(session, asked, &look, got).await;
    }
}

/// Whether there are more queues that may have something.
fn goes_on(session: &Session, from: &mut From) -> bool {
    if from.only().is_some() {
        return false;
    }
    if !from.heads.has_more(from.way.sorts()) && from.heads.rest.is_some() {
        session.shared.marks.begin_anew(from);
    }
    from.heads.has_more(from.way.sorts())
}

/// Where a claim has many queues, each statement takes from a few of them.
async fn take_more(
    session: &mut Session,
    asked: &Asked,
    from: &mut From,
    rounds: Rounds,
    (mut look, mut all): (Look, Got),
) -> Result<(Look, Got), Failure> {
    for _ in 0..rounds_max(asked.limit) {
        if all.len() >= asked.limit || all.bytes() >= ENOUGH_BYTES || !goes_on(session, from) {
            break;
        }
        let rest = asked.for_rest(all.len());
        match look_and_take(session, &rest, from, rounds).await {
            Ok((looked, got)) => {
                look = looked;
                got.note(&session.shared, rest.number);
                // Something else is to be done first; the next claim does it.
                if got.is_empty() && !look.is_free(rounds) {
                    break;
                }
                all.add(got);
            }
            // What was taken is this claim's in any case.
            Err(failure) if !failure.is_lost() => {
                tracing::debug!(?failure, "more is taken by the next claim");
                break;
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok((look, all))
}

async fn answer(session: &mut Session, asked: &Asked, look: &Look, got: Got) -> Result<Taken, Failure> {
    let next_due_in = look.next_due.filter(|due| *due < NewTask::HELD_AT.0).map(|due| Timestamp(due).since(Timestamp(look.now)));
    let (tasks, broken) = got.into_tasks();
    let others = look.suspects > i64::from(tasks.iter().any(|task| task.alone));
    let taken = Taken { tasks, broken, alone_waiting: false, next_due_in };
    if !others {
        return Ok(taken);
    }
    match suspects::reserve(session, asked).await {
        Ok(alone_waiting) => Ok(Taken { alone_waiting, ..taken }),
        // What was taken is this claim's in any case.
        Err(failure) if !taken.is_empty() && !failure.is_lost() => {
            tracing::debug!(?failure, "whether a task has to run alone is looked at by the next claim");
            Ok(taken)
        }
        Err(failure) => Err(failure),
    }
}

async fn look_and_take(session: &mut Session, asked: &Asked, from: &mut From, rounds: Rounds) -> Result<(Look, Got), Failure> {
    let only = from.only().cloned();
    let group = from.heads.group(from.way.sorts());
    let query = sqlx::query(if only.is_some() { CLAIM } else { CLAIM_SEVERAL });
    let query = query.bind(asked.claim.host.0).bind(count(asked.limit));
    let query = if let Some(head) = &only {
        let query = query.bind(head.nobodys.at.0).bind(head.nobodys.at.1).bind(asked.alive_ms).bind(from.due).bind(from.change);
        let query = query.bind(asked.claim.ignore_users).bind(head.users.at.0).bind(head.users.at.1).bind(rounds.due);
        let query = query.bind(rounds.suspects).bind(asked.number).bind(&*head.queue);
        query.bind(asked.queues().as_deref()).bind(from.head && from.looked_around.is_none())
    } else {
        let (nobodys, users) = (from.heads.columns(group, Sort::Nobodys), from.heads.columns(group, Sort::Users));
        let query = query.bind(nobodys.turns).bind(nobodys.tasks).bind(asked.alive_ms).bind(from.due).bind(from.change);
        let query = query.bind(asked.claim.ignore_users).bind(users.turns).bind(users.tasks).bind(rounds.due);
        let query = query.bind(rounds.suspects).bind(asked.number).bind(nobodys.queues).bind(asked.queues().as_deref());
        let (turn, task) = group.bound.unwrap_or(END);
        query.bind(turn).bind(task).bind(count(most(asked.limit)))
    };
    let rows = query.fetch_all(session.db()?).await?;
    let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    if !first.try_get::<bool, _>(1)? {
        return Err(failure::unknown_host(asked.claim.host));
    }
    let strangers: Option<Vec<i64>> = first.try_get(7)?;
    let places: Option<Vec<String>> = first.try_get(8)?;
    let look = Look {
        now: first.try_get(0)?,
        next_due: first.try_get(2)?,
        suspects: first.try_get(3)?,
        changed: first.try_get(4)?,
        open: first.try_get(5)?,
        others: first.try_get(6)?,
        strangers: strangers.as_ref().is_some_and(|strangers| !strangers.is_empty()),
    };
    let is_none = first.try_get::<Option<i64>, _>(LOOK_COLUMNS)?.is_none();
    let got = if is_none { Got::default() } else { in_order(&rows, LOOK_COLUMNS, look.now)? };
    let last = got.placed.last().map(|(place, _)| *place);
    if let Some(head) = &only {
        if let Some(place) = last {
            session.shared.marks.took(from, &head.queue, Sort::Nobodys, place);
        }
    } else if look.is_free(rounds) {
        let met = met(first)?;
        let locked: i64 = first.try_get("locked")?;
        // Where less was taken than was locked, it was too much, or stood there wrongly.
        let is_whole = count(got.len()) == locked && locked < count(asked.limit);
        let upto = if is_whole { group.last_of(&met) } else { last };
        let is_full = met.len() == most(asked.limit);
        from.heads.learn(group, from.way.sorts(), &met, Ended { upto, is_full });
        session.shared.marks.learnt(from, &from.heads, &last_places(&got));
    }
    if look.strangers {
        // What was taken is this claim's, whatever becomes of the others.
        let mended = mend::strangers_in_ready(session, &strangers.unwrap_or_default(), &places.unwrap_or_default()).await;
        if let Err(failure) = mended {
            tracing::warn!(?failure, "places of tasks that do not wait there cannot be mended yet");
            session.roll_back().await?;
        }
    }
    Ok((look, got))
}

/// What [`CLAIM_SEVERAL`] looked at.
fn met(row: &PgRow) -> Result<Vec<Met>, sqlx::Error> {
    let heads: Option<Vec<i32>> = row.try_get("heads")?;
    let (turns, tasks): (Option<Vec<i64>>, Option<Vec<i64>>) = (row.try_get("turns")?, row.try_get("tasks")?);
    let places = turns.into_iter().flatten().zip(tasks.into_iter().flatten());
    let met = heads.into_iter().flatten().zip(places).map(|(number, place)| {
        let head = usize::try_from(number - 1).unwrap_or_default();
        Met { head, sort: Sort::Nobodys, place }
    });
    Ok(met.collect())
}

/// Hold the row of a host that is about to be given tasks.
///
/// # Errors
/// [`crate::Error::UnknownHost`] if it is not there, or has left.
pub(super) async fn hold_host(session: &mut Session, host: HostId) -> Result<(), Failure> {
    const HOLD: &str = "SELECT id FROM laelaps.host WHERE id = $1 AND left_at IS NULL AND ended_at IS NULL FOR SHARE";
    let held: Option<i64> = sqlx::query_scalar(HOLD).bind(host.0).fetch_optional(session.db()?).await?;
    held.map(drop).ok_or_else(|| failure::unknown_host(host))
}

/// What an earlier try of this claim took, if it took anything. If it has not come to its end yet, it never will: its number is taken.
async fn found_again(session: &mut Session, asked: &Asked, number: i64) -> Result<Got, Failure> {
    const FENCE: &str = "INSERT INTO laelaps.claim (id, host, check_at, tasks)
        VALUES ($1, $2, (extract(epoch FROM clock_timestamp()) * 1000)::int8, '{}') ON CONFLICT (id) DO NOTHING";
    const FOUND: &str = concat!(
        "SELECT ",
        taken_columns!(),
        ", (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now FROM laelaps.task
        WHERE id = ANY(ARRAY(SELECT unnest(tasks) FROM laelaps.claim WHERE claim.id = $1)) AND state = 'running' AND host = $2"
    );
    let fenced = sqlx::query(FENCE).bind(number).bind(asked.claim.host.0).execute(session.db()?).await?;
    if fenced.rows_affected() == 1 {
        return Ok(Got::default());
    }
    let rows = sqlx::query(FOUND).bind(number).bind(asked.claim.host.0).fetch_all(session.db()?).await?;
    let Some(first) = rows.first() else { return Ok(Got::default()) };
    let got = in_order(&rows, 0, first.try_get(TAKEN_COLUMNS)?)?;
    got.note(&session.shared, number);
    Ok(got)
}

/// A number of tasks as the database counts.
pub(super) fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
