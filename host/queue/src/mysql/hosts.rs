//! Hosts, and what is taken back from them.
//!
//! Authority: leases. A server cannot see whether a host lives, so a host is dead when its leases have run out. One that has left says so,
//! and what it still held comes back at once. One that was not seen for long and holds nothing is struck off; it has to register again.
//!
//! Running tasks are found through the claims that took them, a row for each claim, looked at when the first of its leases can have ended.

use std::collections::HashMap;
use std::iter::Peekable;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;

use super::accounts::{Changes, FOLDED_MAX, fold, fold_tally, tally_is_long};
use super::before::done_before;
use super::claim::LEASES_OF_CLAIM;
use super::connect::text;
use super::deaths::note_deaths;
use super::failure::Failure;
use super::mend::{mend, numbers, tasks_of_claim};
use super::rows::{ids, json, lockable, names};
use super::session::{Session, moment, now};
use super::settle::Group;
use super::{MySql, locked, signs};
use crate::earlier::Earlier;
use crate::outcome::ms;
use crate::{
    Attempt, Event, HostDescription, HostId, HostRecord, Lease, LeaseAnswer, LeaseRef, Lost, Policy, Reclaimed, Result, Serves,
    Settlement, TaskId, Timestamp, Verdict,
};

/// Tasks taken back in one transaction.
const RECLAIMED_MAX: usize = 1_000;
/// Claims looked at in one transaction.
const CLAIMS_MAX: i64 = 100;
/// Hosts that are gone and still kept, for tracing lost attempts.
const GONE_HOSTS_KEPT: i64 = 1_000;
/// A host that was not seen for so long, and has nothing, is struck off.
const UNSEEN: Duration = Duration::from_secs(3_600);
/// Between two notes that a host is here.
const SEEN_EVERY: Duration = Duration::from_secs(30);
/// Rounds of folding users' changes, and of folding counts, in one call.
const FOLDS_MAX: usize = 20;
/// Transactions in one call that look for lost tasks and find none.
const LOOKS_MAX: usize = 50;
/// A running task that somebody holds is looked at again after this.
const HELD_AGAIN: Duration = Duration::from_secs(1);

impl MySql {
    pub(super) async fn enter_host(&self, description: &HostDescription) -> Result<HostId> {
        description.check()?;
        let asked = Arc::new((description.clone(), Earlier::default()));
        let host = self
            .run("registering a host", move |session| {
                let asked = Arc::clone(&asked);
                Box::pin(async move { enter(session, &asked.0, &asked.1).await })
            })
            .await?;
        locked(&self.hosts).insert(host, Instant::now());
        Ok(host)
    }

    /// A host that still has tasks keeps its row until they are taken back.
    pub(super) async fn leave(&self, hosts: Vec<HostId>) -> Result<()> {
        if hosts.is_empty() {
            return Ok(());
        }
        for host in &hosts {
            locked(&self.hosts).remove(host);
        }
        self.run("striking off a host", move |session| {
            let numbers: Vec<i64> = hosts.iter().map(|host| host.0).collect();
            Box::pin(async move {
                let (hosts, now) = (json(&numbers), session.now);
                sqlx::query(LEAVE).bind(hosts.clone()).bind(now).execute(session.db()).await?;
                signs::forget(session, &numbers).await?;
                // Whatever becomes of what it still holds, it is no death.
                sqlx::query(RUNS_NOTHING).bind(hosts.clone()).execute(session.db()).await?;
                let found: Vec<(i64, i64, String)> = sqlx::query_as(CLAIMS_OF).bind(hosts).fetch_all(session.db()).await?;
                let claims = found.into_iter().map(|(id, host, tasks)| ClaimRow { id, host, tasks, left: false });
                // Lets go of claims whose tasks have all ended; what runs is left to who takes it back.
                look_at(session, &mut claims.peekable(), false).await?;
                strike_off(session, None).await.map(drop)
            })
        })
        .await
    }

    pub(super) async fn known_hosts(&self) -> Result<Vec<HostRecord>> {
        self.runner.read_together("reading hosts", |session| Box::pin(async move { Ok(hosts(session).await?) })).await
    }

    /// Take back what ended leases and hosts that have left hold, at most a batch, and strike hosts off that hold nothing any more.
    pub(super) async fn take_back(&self, policy: &Policy) -> Result<Reclaimed> {
        const LOOK: &str = concat!(
            "SELECT EXISTS (SELECT 1 FROM laelaps_claim WHERE look_at <= ",
            now!(),
            "), EXISTS (SELECT 1 FROM laelaps_host WHERE ended_at = 0 AND (left_at <> 0 OR seen_at < ",
            now!(),
            " - ?)), EXISTS (SELECT 1 FROM laelaps_account_change WHERE id > ?)"
        );
        self.say_that_hosts_are_here().await?;
        let doing = "looking for lost tasks";
        let changes = locked(&self.marks).changes_start();
        let look = self.read(doing, || sqlx::query(LOOK).bind(ms(UNSEEN)).bind(changes)).await?;
        let seen = |place: usize| look.try_get::<bool, _>(place).map_err(|error| self.runner.place.worded(error, doing));
        let (claims_due, hosts_gone, changed) = (seen(0)?, seen(1)?, seen(2)?);
        if changed {
            self.fold_changes().await?;
        }
        self.fold_counts().await?;
        self.let_go_of_claims().await?;
        if !claims_due && !hosts_gone {
            return Ok(Reclaimed::default());
        }
        let policy = Arc::new(policy.clone());
        let mut reclaimed = Reclaimed::default();
        // Where hosts claim quicker than they are looked at, most claims are over; they must not keep back one that is lost.
        for _ in 0..LOOKS_MAX {
            let asked = Arc::new((Arc::clone(&policy), Earlier::<(Reclaimed, bool)>::default()));
            let (taken, more) = self
                .run("taking back lost tasks", move |session| {
                    let asked = Arc::clone(&asked);
                    Box::pin(async move {
                        if let Some((earlier, more)) = asked.1.get()
                            && let Some(done) = done_before(session, earlier).await?
                        {
                            return Ok((done, more));
                        }
                        let taken = take_back(session, &asked.0).await?;
                        asked.1.note(taken.clone());
                        Ok(taken)
                    })
                })
                .await?;
            reclaimed.tasks.extend(taken.tasks);
            reclaimed.dead_hosts.extend(taken.dead_hosts);
            if !more || !reclaimed.tasks.is_empty() {
                break;
            }
        }
        Ok(reclaimed)
    }

    /// Remove the rows of claims whose tasks this process has settled.
    async fn let_go_of_claims(&self) -> Result<()> {
        let over = locked(&self.claims).take_over();
        if over.is_empty() {
            return Ok(());
        }
        self.run("letting go of claims", move |session| {
            let over = session.chunks(&over);
            Box::pin(async move {
                for claims in over {
                    sqlx::query(OUT).bind(claims).execute(session.db()).await?;
                }
                Ok(())
            })
        })
        .await
    }

    /// Take back what the hosts with these identities hold, at most a batch, and strike them off once they hold nothing any more.
    ///
    /// That they have left is a transaction of its own: it waits for their claims under way, and those that come later are refused. So what
    /// they hold is all there when it is looked for.
    pub(super) async fn hand_hosts_on(&self, identities: &[String], policy: &Policy) -> Result<Reclaimed> {
        const NAMED: &str = concat!(
            "SELECT DISTINCT h.id FROM ",
            names!(),
            " STRAIGHT_JOIN laelaps_host AS h ON h.identity = s.name WHERE h.ended_at = 0 ORDER BY h.id"
        );
        // What is longer is nobody's.
        let names = json(identities.iter().filter(|identity| identity.len() <= HostDescription::IDENTITY_BYTES_MAX));
        let hosts: Vec<i64> = self
            .run("marking hosts as gone", move |session| {
                let names = names.clone();
                Box::pin(async move {
                    let hosts: Vec<i64> = sqlx::query_scalar(NAMED).bind(names).fetch_all(session.db()).await?;
                    if !hosts.is_empty() {
                        let now = session.now;
                        sqlx::query(LEAVE).bind(json(&hosts)).bind(now).execute(session.db()).await?;
                        signs::forget(session, &hosts).await?;
                        note_deaths(session, &hosts).await?;
                    }
                    Ok(hosts)
                })
            })
            .await?;
        if hosts.is_empty() {
            return Ok(Reclaimed::default());
        }
        for host in &hosts {
            locked(&self.hosts).remove(&HostId(*host));
        }
        let asked = Arc::new((hosts, policy.clone(), Earlier::default()));
        self.run("handing tasks on", move |session| {
            let asked = Arc::clone(&asked);
            Box::pin(async move {
                if let Some(earlier) = asked.2.get()
                    && let Some(done) = done_before(session, earlier).await?
                {
                    return Ok(done);
                }
                let handed_on = hand_on(session, &asked.0, &asked.1).await?;
                asked.2.note(handed_on.clone());
                Ok(handed_on)
            })
        })
        .await
    }

    /// Note that the hosts of this process are here, now and then.
    async fn say_that_hosts_are_here(&self) -> Result<()> {
        const SEEN: &str =
            concat!("UPDATE ", ids!(), " STRAIGHT_JOIN laelaps_host AS h FORCE INDEX (PRIMARY) ON h.id = s.id SET h.seen_at = ?");
        let due: Vec<HostId> = {
            let hosts = locked(&self.hosts);
            hosts.iter().filter(|(_, seen)| seen.elapsed() >= SEEN_EVERY).map(|(host, _)| *host).collect()
        };
        if due.is_empty() {
            return Ok(());
        }
        let ids = json(due.iter().map(|host| host.0));
        self.run("noting that a host is here", move |session| {
            let ids = ids.clone();
            Box::pin(async move {
                let now = session.now;
                sqlx::query(SEEN).bind(ids).bind(now).execute(session.db()).await?;
                Ok(())
            })
        })
        .await?;
        let mut hosts = locked(&self.hosts);
        for host in due {
            hosts.entry(host).and_modify(|seen| *seen = Instant::now());
        }
        Ok(())
    }

    /// Fold users' changes in, for when nobody chooses between users.
    pub(super) async fn fold_changes(&self) -> Result<()> {
        self.fold_some_changes(FOLDS_MAX).await
    }

    /// The same, at most so many batches of them.
    pub(super) async fn fold_some_changes(&self, batches: usize) -> Result<()> {
        const HOLD: &str = "SELECT pick FROM laelaps_counter WHERE id = 1 FOR UPDATE";
        for _ in 0..batches {
            let start = locked(&self.marks).changes_start();
            let (took, last) = self
                .run("folding users' changes", move |session| {
                    Box::pin(async move {
                        let pick: i64 = sqlx::query_scalar(HOLD).fetch_one(session.db()).await?;
                        let started = Instant::now();
                        let folded = fold(session, pick, start, FOLDED_MAX).await?;
                        let mut changes = Changes::default();
                        mend(session, &folded.broken, &mut changes).await?;
                        changes.write(session).await?;
                        Ok((started.elapsed(), folded.last))
                    })
                })
                .await?;
            locked(&self.marks).changes_looked(start, took, last);
            if last.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Fold counts, until few are left or folding makes them no fewer.
    async fn fold_counts(&self) -> Result<()> {
        let doing = "folding counts";
        for _ in 0..FOLDS_MAX {
            let start = locked(&self.tally).start();
            let long = self.read(doing, || tally_is_long(start)).await?;
            if !long.try_get::<bool, _>(0).map_err(|error| self.runner.place.worded(error, doing))? {
                break;
            }
            let started = Instant::now();
            let last = self.run(doing, move |session| Box::pin(async move { fold_tally(session, start).await })).await?;
            locked(&self.tally).looked(start, started.elapsed(), Some(last));
            if last == start {
                break;
            }
        }
        Ok(())
    }
}

/// Enter a host. `earlier` is its number by an earlier try, and when that was: if it was committed after all, it is that one.
async fn enter(
    session: &mut Session<'_>,
    description: &HostDescription,
    earlier: &Earlier<(i64, i64)>,
) -> Result<HostId, Failure> {
    const ENTER: &str = "INSERT INTO laelaps_host (name, process_id, started_at, seen_at, identity) VALUES (?, ?, ?, ?, ?)";
    const ENTERED: &str = "SELECT id FROM laelaps_host WHERE id = ? AND started_at = ?";
    let HostDescription { name, process_id, identity } = description;
    let identity = identity.as_ref().map(|identity| identity.as_bytes().to_vec());
    if let Some((host, tried_at)) = earlier.get() {
        let query = sqlx::query_scalar(ENTERED).bind(host).bind(tried_at);
        let entered: Option<i64> = query.fetch_optional(session.db()).await?;
        if let Some(entered) = entered {
            return Ok(HostId(entered));
        }
    }
    let now = session.now;
    let query = sqlx::query(ENTER).bind(name).bind(process_id).bind(now).bind(now).bind(identity);
    let entered = query.execute(session.db()).await?.last_insert_id();
    let host = i64::try_from(entered).unwrap_or(i64::MAX);
    earlier.note((host, now));
    Ok(HostId(host))
}

async fn hosts(session: &mut Session<'_>) -> Result<Vec<HostRecord>, sqlx::Error> {
    const HOSTS: &str = "SELECT h.id, h.name, h.process_id, h.started_at,
            (SELECT COUNT(*) FROM laelaps_claim AS c
                STRAIGHT_JOIN JSON_TABLE(IF(JSON_VALID(c.tasks), c.tasks, '[]'), '$[*]' COLUMNS (id BIGINT PATH '$')) AS s
                STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id
                WHERE c.host = h.id AND t.state = 'running' AND t.lease DIV 1048576 = c.id), h.left_at <> 0, h.identity, h.serves
        FROM laelaps_host AS h WHERE h.ended_at = 0 ORDER BY h.id";
    let record = |row: &MySqlRow| {
        Ok(HostRecord {
            id: HostId(row.try_get(0)?),
            name: row.try_get(1)?,
            process_id: row.try_get(2)?,
            started_at: Timestamp(row.try_get(3)?),
            running: row.try_get::<i64, _>(4)?.unsigned_abs(),
            alive: row.try_get::<bool, _>(5)?.then_some(false),
            identity: identity(row, 6)?,
            serves: Serves::of_text(identity(row, 7)?.as_deref()),
        })
    };
    sqlx::query(HOSTS).fetch_all(session.db()).await?.iter().map(record).collect()
}

pub(super) fn identity(row: &MySqlRow, place: usize) -> Result<Option<String>, sqlx::Error> {
    let bytes: Option<Vec<u8>> = row.try_get(place)?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

/// A claim that is looked at.
struct ClaimRow {
    id: i64,
    host: i64,
    tasks: String,
    /// Its host has left.
    left: bool,
}

/// A task that its host has lost.
struct Stray {
    lease_ref: LeaseRef,
    key: String,
    host: HostId,
    attempt: Attempt,
}

/// From now on these hosts claim nothing.
pub(super) const LEAVE: &str = concat!(
    "UPDATE ",
    ids!(),
    " STRAIGHT_JOIN laelaps_host AS h FORCE INDEX (PRIMARY) ON h.id = s.id SET h.left_at = ? WHERE h.left_at = 0 AND h.ended_at = 0"
);

/// The claims of some hosts.
const CLAIMS_OF: &str = concat!(
    "SELECT c.id, c.host, c.tasks FROM ",
    lockable!(ids!()),
    " STRAIGHT_JOIN laelaps_claim AS c FORCE INDEX (by_host) ON c.host = s.id FOR UPDATE SKIP LOCKED"
);

/// From now on these hosts run nothing, as far as a death of theirs goes.
pub(super) const RUNS_NOTHING: &str =
    concat!("DELETE r FROM ", ids!(), " STRAIGHT_JOIN laelaps_host_running AS r FORCE INDEX (PRIMARY) ON r.host = s.id");

pub(super) const OUT: &str =
    concat!("DELETE r FROM ", ids!(), " STRAIGHT_JOIN laelaps_claim AS r FORCE INDEX (PRIMARY) ON r.id = s.id");

pub(super) const NEXT: &str = "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$[0]', look_at BIGINT PATH '$[1]',
        tasks VARCHAR(30000) CHARACTER SET ascii PATH '$[2]')) AS s
    STRAIGHT_JOIN laelaps_claim AS c FORCE INDEX (PRIMARY) ON c.id = s.id SET c.look_at = s.look_at, c.tasks = s.tasks";

/// Answers also whether more claims may be due.
async fn take_back(session: &mut Session<'_>, policy: &Policy) -> Result<(Reclaimed, bool), Failure> {
    const DUE: &str =
        "SELECT id, host, tasks FROM laelaps_claim WHERE look_at <= ? ORDER BY look_at LIMIT ? FOR UPDATE SKIP LOCKED";
    const LEFT: &str = "SELECT id FROM laelaps_host WHERE ended_at = 0 AND left_at <> 0";
    let now = session.now;
    let left: Vec<i64> = sqlx::query_scalar(LEFT).fetch_all(session.db()).await?;
    let mut claims: Vec<ClaimRow> = Vec::new();
    if !left.is_empty() {
        let found: Vec<(i64, i64, String)> = sqlx::query_as(CLAIMS_OF).bind(json(&left)).fetch_all(session.db()).await?;
        claims.extend(found.into_iter().map(|(id, host, tasks)| ClaimRow { id, host, tasks, left: true }));
    }
    let due: Vec<(i64, i64, String)> = sqlx::query_as(DUE).bind(now).bind(CLAIMS_MAX).fetch_all(session.db()).await?;
    let more = due.len() as i64 == CLAIMS_MAX;
    let due = due.into_iter().filter(|(_, host, _)| !left.contains(host));
    claims.extend(due.map(|(id, host, tasks)| ClaimRow { id, host, tasks, left: false }));
    let mut claims = claims.into_iter().peekable();
    let strays = look_at(session, &mut claims, true).await?;
    let more = more || claims.peek().is_some();
    let mut hosts: Vec<i64> = strays.iter().map(|stray| stray.host.0).collect();
    hosts.sort_unstable();
    hosts.dedup();
    note_deaths(session, &hosts).await?;
    let tasks = lose(session, strays, policy).await?;
    let dead_hosts = strike_off(session, None).await?;
    Ok((Reclaimed { tasks, dead_hosts }, more))
}

/// Take back what hosts that have left hold, at most a batch.
async fn hand_on(session: &mut Session<'_>, hosts: &[i64], policy: &Policy) -> Result<Reclaimed, Failure> {
    let found: Vec<(i64, i64, String)> = sqlx::query_as(CLAIMS_OF).bind(json(hosts)).fetch_all(session.db()).await?;
    let claims = found.into_iter().map(|(id, host, tasks)| ClaimRow { id, host, tasks, left: true });
    let mut claims = claims.peekable();
    let mut strays = Vec::new();
    // Of many claims everything may be settled already, and only nothing at all may be answered as the end.
    while strays.is_empty() && claims.peek().is_some() {
        strays = look_at(session, &mut claims, true).await?;
    }
    let tasks = lose(session, strays, policy).await?;
    let dead_hosts = strike_off(session, Some(hosts)).await?;
    Ok(Reclaimed { tasks, dead_hosts })
}

/// Settle what is lost; answers what was.
async fn lose(session: &mut Session<'_>, strays: Vec<Stray>, policy: &Policy) -> Result<Vec<Lost>, Failure> {
    // Nothing waits after a loss, so no random number is needed.
    let settled = |stray: &Stray| Settlement::of(stray.lease_ref, Event::Lost, stray.attempt, policy, 0.0, None, Vec::new());
    let settlements: Vec<Settlement> = strays.iter().map(settled).collect();
    let failed: Vec<bool> = settlements.iter().map(|settlement| matches!(settlement.verdict(), Verdict::Fail { .. })).collect();
    let answers = if settlements.is_empty() {
        Vec::new()
    } else {
        Group::new(&settlements, HashMap::new(), true)?.write(session, &Default::default()).await?
    };
    let lost = strays.into_iter().zip(failed).zip(answers).filter(|(_, answer)| *answer == LeaseAnswer::Held);
    Ok(lost.map(|((stray, failed), _)| Lost { lease_ref: stray.lease_ref, key: stray.key, host: stray.host, failed }).collect())
}

/// Find what is lost among the tasks of claims, and hold it; let go of claims of which nothing runs, and set the next look at the others.
/// At most [`RECLAIMED_MAX`] tasks; the claims after that are left as they are, and to the caller. If `taking` is false, nothing counts as
/// lost.
async fn look_at(
    session: &mut Session<'_>,
    claims: &mut Peekable<impl Iterator<Item = ClaimRow>>,
    taking: bool,
) -> Result<Vec<Stray>, Failure> {
    const SEEN: &str = concat!(
        "SELECT t.id, t.lease, t.until FROM ",
        ids!(),
        " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id WHERE t.state = 'running'"
    );
    let mut tasks: Vec<i64> = Vec::new();
    let mut looked: HashMap<i64, bool> = HashMap::new();
    while let Some(claim) = claims.peek() {
        let of_claim = match numbers(&claim.tasks) {
            Some(tasks) => tasks,
            None => tasks_of_claim(session, claim.id).await?,
        };
        if !looked.is_empty() && tasks.len() + of_claim.len() > RECLAIMED_MAX {
            break;
        }
        tasks.extend(of_claim);
        tracing::trace!(claim = claim.id, host = claim.host, "looking at a claim");
        looked.insert(claim.id, claim.left);
        claims.next();
    }
    if looked.is_empty() {
        return Ok(Vec::new());
    }
    tasks.sort_unstable();
    tasks.dedup();
    let mut strays = Vec::new();
    let mut alive: HashMap<i64, (i64, Vec<i64>)> = HashMap::new();
    let tasks = json(tasks);
    let seen: Vec<(i64, i64, i64)> = sqlx::query_as(SEEN).bind(tasks.clone()).fetch_all(session.db()).await?;
    let mut held: HashMap<i64, (i64, i64)> = seen.into_iter().map(|(task, lease, until)| (task, (lease, until))).collect();
    for row in sqlx::query(RUNNING).bind(tasks).fetch_all(session.db()).await? {
        held.remove(&row.try_get::<i64, _>(0)?);
        let lease: i64 = row.try_get(1)?;
        // A task may run again, under a later claim.
        let claim = lease / LEASES_OF_CLAIM;
        let Some(left) = looked.get(&claim) else { continue };
        let (until, now): (i64, i64) = (row.try_get(10)?, row.try_get(11)?);
        if taking && (*left || until <= now) {
            strays.push(stray(&row)?);
        } else {
            let (next, tasks) = alive.entry(claim).or_insert((until, Vec::new()));
            *next = until.min(*next);
            tasks.push(row.try_get(0)?);
        }
    }
    // Somebody holds those: a settlement under way, or one that hangs. Nobody waits for it.
    for (task, (lease, until)) in held {
        let claim = lease / LEASES_OF_CLAIM;
        let Some(left) = looked.get(&claim) else { continue };
        let again = session.now + ms(HELD_AGAIN);
        let (next, tasks) = alive.entry(claim).or_insert((i64::MAX, Vec::new()));
        *next = if taking && *left { again } else { until.max(again) }.min(*next);
        tasks.push(task);
    }
    let over = json(looked.keys().filter(|claim| !alive.contains_key(claim)));
    sqlx::query(OUT).bind(over).execute(session.db()).await?;
    if !alive.is_empty() {
        let next = json(alive.into_iter().map(|(claim, (look_at, tasks))| (claim, look_at, json(tasks))));
        sqlx::query(NEXT).bind(next).execute(session.db()).await?;
    }
    Ok(strays)
}

pub(super) const RUNNING: &str = concat!(
    "SELECT t.id, t.lease, t.`key`, t.host, t.attempts, t.max_attempts, t.releases, t.lost, t.lost_alone, t.alone, t.until, ",
    moment!(),
    ", t.lost_at FROM ",
    lockable!(ids!()),
    " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id WHERE t.state = 'running' FOR UPDATE SKIP LOCKED"
);

fn stray(row: &MySqlRow) -> Result<Stray, sqlx::Error> {
    let (now, lost_at): (i64, i64) = (row.try_get(11)?, row.try_get(12)?);
    Ok(Stray {
        lease_ref: LeaseRef { task: TaskId(row.try_get(0)?), lease: Lease(row.try_get(1)?) },
        key: text(row, 2)?,
        host: HostId(row.try_get(3)?),
        attempt: Attempt {
            attempt: row.try_get::<u32, _>(4)?.saturating_add(1),
            max_attempts: row.try_get(5)?,
            releases: row.try_get(6)?,
            lost: row.try_get(7)?,
            lost_alone: row.try_get(8)?,
            alone: row.try_get(9)?,
            lost_for: if lost_at == 0 { Duration::ZERO } else { Timestamp(now).since(Timestamp(lost_at)) },
        },
    })
}

/// Strike off those that have left or were not seen for long, if they hold no task; if `only` is given, only of these. One whose claim is
/// under way is not gone. Hosts gone long ago are forgotten.
async fn strike_off(session: &mut Session<'_>, only: Option<&[i64]>) -> Result<Vec<HostRecord>, Failure> {
    const GONE: &str = "SELECT h.id, h.name, h.process_id, h.started_at, h.identity FROM laelaps_host AS h
        WHERE h.ended_at = 0 AND (h.left_at <> 0 OR h.seen_at < ?) AND NOT EXISTS (SELECT 1 FROM laelaps_claim AS c WHERE c.host = h.id)
        FOR UPDATE SKIP LOCKED";
    const OFF: &str =
        concat!("UPDATE ", ids!(), " STRAIGHT_JOIN laelaps_host AS h FORCE INDEX (PRIMARY) ON h.id = s.id SET h.ended_at = ?");
    const FORGET: &str = "DELETE FROM laelaps_host WHERE ended_at <> 0 AND id <= ?";
    const FORGET_PLUGINS: [&str; 2] = [
        "DELETE FROM laelaps_host_plugin WHERE host <= ? AND host NOT IN (SELECT id FROM laelaps_host)",
        "DELETE FROM laelaps_host_running WHERE host <= ? AND host NOT IN (SELECT id FROM laelaps_host)",
    ];
    let now = session.now;
    let gone = sqlx::query(GONE).bind(now - ms(UNSEEN)).fetch_all(session.db()).await?;
    let record = |row: &MySqlRow| {
        Ok(HostRecord {
            id: HostId(row.try_get(0)?),
            name: row.try_get(1)?,
            process_id: row.try_get(2)?,
            started_at: Timestamp(row.try_get(3)?),
            running: 0,
            alive: Some(false),
            identity: identity(row, 4)?,
            serves: None,
        })
    };
    let mut gone: Vec<HostRecord> = gone.iter().map(record).collect::<Result<_, sqlx::Error>>()?;
    gone.retain(|host| only.is_none_or(|only| only.contains(&host.id.0)));
    let Some(last) = gone.iter().map(|host| host.id.0).max() else { return Ok(gone) };
    let numbers: Vec<i64> = gone.iter().map(|host| host.id.0).collect();
    let ids = json(&numbers);
    sqlx::query(OFF).bind(ids.clone()).bind(now).execute(session.db()).await?;
    signs::forget(session, &numbers).await?;
    sqlx::query(RUNS_NOTHING).bind(ids).execute(session.db()).await?;
    let forgotten = last - GONE_HOSTS_KEPT;
    if sqlx::query(FORGET).bind(forgotten).execute(session.db()).await?.rows_affected() > 0 {
        for sql in FORGET_PLUGINS {
            sqlx::query(sql).bind(forgotten).execute(session.db()).await?;
        }
    }
    Ok(gone)
}
