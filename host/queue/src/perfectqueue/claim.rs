//! Claims, under the lock that all workers of the table share.
//!
//! A worker that acquires holds MySQL's lock of the table's name; Ruby's workers read first and write then, so that nobody else may write between.
//! The lock belongs to a session (see [`super::lock`]). So the claims of this process have a connection of their own, and one that is given up half-way
//! is closed and never used again: the lock goes with it at once, and nobody waits.
//!
//! Nobody may keep others waiting by a row that it has locked: a claim waits for such a row for a second at most, and the next try leaves out what is
//! locked.
//!
//! A claim writes one token and one time into all its rows. Which rows it got is told by the number of rows written, or, if others were
//! quicker, by reading the token back.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Row as _;
use sqlx::mysql::MySqlConnection;
use tokio::sync::oneshot;

use super::candidates::{self, Choice, Ready};
use super::lock::{self, Wait, Waited};
use super::lost::LostLeases;
use super::order::Pick;
use super::run::{Patience, silence};
use super::side::{self, Side};
use super::table::Names;
use super::take::take;
use super::walk::{Ages, Users};
use super::{Shared, suspects};
use crate::mysql::failure::Failure;
use crate::{Attempt, Claim, Claimed, ClaimedTask, Error, Event, Policy, Result, Settlement, Timestamp};

/// The most tasks of one claim.
const CLAIMED_MAX: u32 = 1_000;
/// The pause after the lock was not to be had, doubled each time. PerfectQueue's numbers.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Rows that have to run alone and are remembered.
const SUSPECTS_MAX: usize = 100;
/// Between two words in the log about what is left for others.
const LEFT_AGAIN: Duration = Duration::from_secs(60);
/// The longest that the connection of claims is used, so that it does not stay with a server that another has taken the place of.
const CONNECTED_MAX: Duration = Duration::from_secs(300);
/// What its session is set to: seconds that it waits for a locked row, and that the server waits for a host that takes no answer.
const SESSION: &str = "SET SESSION innodb_lock_wait_timeout = 1, net_write_timeout = 10, net_read_timeout = 10";

/// What the claims of this process share.
#[derive(Debug, Default)]
pub(super) struct Claimer {
    connection: Option<MySqlConnection>,
    connected_at: Option<Instant>,
    /// The lock is being waited for.
    wait: Option<Wait>,
    /// Somebody kept a row locked: leave out what is.
    wary: bool,
    ages: Ages,
    users: Users,
    /// Rows that were met and have to run alone.
    suspects: Vec<Pick>,
    /// The last claim found nothing: look before asking for the lock.
    idle: bool,
    pause: Option<Pause>,
    left_told: Option<Instant>,
    /// Claims that find something until rows are removed.
    until_clean_up: Option<u32>,
    /// What the claim under way has taken. It is handed out, whatever fails afterwards.
    taken: Vec<ClaimedTask>,
}

/// The lock was not to be had.
#[derive(Debug)]
struct Pause {
    until: Instant,
    next: Duration,
}

/// Why a claim hands out nothing.
enum Nothing {
    Failed(Failure),
    /// Nobody waits for it any more.
    GivenUp,
}

impl From<sqlx::Error> for Nothing {
    fn from(error: sqlx::Error) -> Self {
        Self::Failed(Failure::from(error))
    }
}

impl From<Failure> for Nothing {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl Shared {
    /// Claim, in a task of its own: what it took is handed back if the caller has gone.
    pub(super) async fn claim(self: &Arc<Self>, claim: &Claim) -> Result<Claimed> {
        if !self.hosts.knows(claim.host) {
            return Err(Error::UnknownHost(claim.host));
        }
        let (answer, answered) = oneshot::channel();
        let (shared, claim) = (Arc::clone(self), claim.clone());
        tokio::spawn(async move { shared.claim_and_answer(claim, answer).await });
        answered.await.map_err(|_| Error::Closed)?
    }

    async fn claim_and_answer(self: Arc<Self>, claim: Claim, mut answer: oneshot::Sender<Result<Claimed>>) {
        let mut claimer = tokio::select! {
            claimer = self.claimer.lock() => claimer,
            () = answer.closed() => return,
        };
        let claimed = claimer.claim_with_patience(&claim, &self, &mut answer).await;
        let cleans_up = claimed.as_ref().is_ok_and(|claimed| claimed.as_ref().is_some_and(|claimed| !claimed.tasks.is_empty()))
            && claimer.counts_to_clean_up(self.config.cleanup_interval);
        drop(claimer);
        match claimed {
            Ok(None) => {}
            Ok(Some(claimed)) => {
                if let Err(Ok(unheard)) = answer.send(Ok(claimed)) {
                    self.hand_back(&unheard.tasks).await;
                }
            }
            Err(failure) => {
                let error = failure.into_error("claiming tasks", &self.access.place);
                // Whoever has gone does not want to know.
                let _ = answer.send(Err(error));
            }
        }
        if cleans_up && let Err(error) = self.clean_up_once().await {
            tracing::warn!(%error, "rows whose retention has ended cannot be removed yet");
        }
    }

    async fn hand_back(self: &Arc<Self>, tasks: &[ClaimedTask]) {
        let policy = Policy::default();
        let settled = |task: &ClaimedTask| {
            Settlement::of(task.lease_ref, Event::Stopped, Attempt::of(task), &policy, 0.0, None, Vec::new())
        };
        let settlements: Vec<Settlement> = tasks.iter().map(settled).collect();
        if let Err(error) = self.settle(&settlements).await {
            tracing::warn!(%error, tasks = tasks.len(), "claimed tasks cannot be handed back; they come back when their leases end");
        }
    }
}

impl Claimer {
    /// Whether it is time to remove rows, after a claim that found something. The first time comes after a random part of the interval, so
    /// that hosts that begin together do not all do it at once.
    fn counts_to_clean_up(&mut self, interval: u32) -> bool {
        let left = self.until_clean_up.get_or_insert_with(|| fastrand::u32(..interval.max(1)));
        if *left == 0 {
            *left = interval.saturating_sub(1);
            return true;
        }
        *left -= 1;
        false
    }

    /// None if nobody waits for it any more.
    async fn claim_with_patience(
        &mut self,
        claim: &Claim,
        shared: &Arc<Shared>,
        answer: &mut oneshot::Sender<Result<Claimed>>,
    ) -> Result<Option<Claimed>, Failure> {
        let mut patience = Patience::new(shared.patience);
        loop {
            // Whatever ends this before the connection is put back closes it, and with it the lock goes.
            let trying = tokio::time::timeout(shared.limit, self.try_to_claim(claim, shared, answer));
            let tried = trying.await.unwrap_or_else(|_| Err(Nothing::Failed(silence(shared.limit))));
            let taken = std::mem::take(&mut self.taken);
            let failure = match tried {
                Ok(claimed) => return Ok(Some(Claimed { tasks: taken, ..claimed })),
                Err(_) if !taken.is_empty() => {
                    self.look_again();
                    return Ok(Some(Claimed { tasks: taken, ..self.no_lock() }));
                }
                Err(Nothing::GivenUp) => return Ok(None),
                Err(Nothing::Failed(failure)) => failure,
            };
            self.look_again();
            self.wary = failure.is_conflict();
            let pause = patience.after(failure)?;
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = answer.closed() => return Ok(None),
                () = shared.closing() => return Err(Failure::from(Error::Closed)),
            }
        }
    }

    /// A claim broke: the next one begins its looks anew.
    fn look_again(&mut self) {
        self.ages.look_again();
        self.users.look_again();
    }

    /// Out of its place: the connection is put back by [`Claimer::keep`] when nothing is left open on it.
    async fn connection(&mut self, shared: &Shared) -> Result<MySqlConnection, Failure> {
        let is_young = self.connected_at.is_some_and(|at| at.elapsed() < CONNECTED_MAX);
        if let Some(connection) = self.connection.take().filter(|_| is_young) {
            return Ok(connection);
        }
        let (mut connection, _) = shared.access.connect().await?;
        sqlx::raw_sql(SESSION).execute(&mut connection).await?;
        self.connected_at = Some(Instant::now());
        Ok(connection)
    }

    fn keep(&mut self, connection: MySqlConnection) {
        self.connection = Some(connection);
    }

    async fn try_to_claim(
        &mut self,
        claim: &Claim,
        shared: &Arc<Shared>,
        answer: &mut oneshot::Sender<Result<Claimed>>,
    ) -> Result<Claimed, Nothing> {
        let (mut connection, mut has_lock) = match self.wait.take() {
            Some(wait) => match self.fetch_lock(wait, claim.alone, shared, answer).await? {
                Some(connection) => (connection, true),
                None => return Ok(self.no_lock()),
            },
            None => (self.connection(shared).await?, false),
        };
        let names = shared.names(&mut connection).await?;
        shared.hosts.check(claim.host, &names, &mut connection).await?;
        let limit = usize::try_from(claim.limit.clamp(1, CLAIMED_MAX)).unwrap_or(1);
        if !claim.ignore_users {
            self.users.accept(claim.accepts.as_ref());
            self.users.look(limit, &names, &mut connection).await?;
        }
        if !has_lock {
            if let Some(nothing) = self.nothing_to_do(claim, &names, &mut connection).await? {
                self.keep(connection);
                return Ok(nothing);
            }
            has_lock = lock::try_lock(names.lock(), &mut connection).await?;
        }
        if !has_lock {
            let wait = Wait::begin(names.lock(), connection);
            match self.fetch_lock(wait, claim.alone, shared, answer).await? {
                Some(locked) => connection = locked,
                None => return Ok(self.no_lock()),
            }
        }
        self.pause = None;
        let claimed = self.claim_locked(&mut connection, claim, limit, &names, shared).await?;
        // What is claimed is claimed, even if the connection breaks now.
        if lock::unlock(names.lock(), &mut connection).await.is_ok() {
            self.keep(connection);
        }
        self.wary = false;
        self.idle = self.taken.is_empty();
        self.tell_left();
        Ok(claimed)
    }

    /// What a claim answers that need not ask for the lock, or must not yet; None if it has to.
    async fn nothing_to_do(
        &mut self,
        claim: &Claim,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<Option<Claimed>, Nothing> {
        let users_known = !self.users.waiting.is_empty() || !self.users.unreadable.is_empty();
        let nothing_known = self.suspects.is_empty() && !claim.ignore_users && !users_known;
        if nothing_known || (self.idle && self.suspects.is_empty()) {
            let next_due_in = due_in(names, connection).await?;
            if nothing_known || next_due_in.is_none_or(|wait| wait > Duration::ZERO) {
                self.idle = true;
                return Ok(Some(Claimed { next_due_in, ..Claimed::default() }));
            }
        }
        let pauses = self.pause.as_ref().is_some_and(|pause| Instant::now() < pause.until);
        Ok(pauses.then(Claimed::default))
    }

    /// The connection that has the lock. None if it is not to be had yet, or somebody else keeps it.
    async fn fetch_lock(
        &mut self,
        wait: Wait,
        alone: bool,
        shared: &Shared,
        answer: &mut oneshot::Sender<Result<Claimed>>,
    ) -> Result<Option<MySqlConnection>, Nothing> {
        let answer_after = if alone { lock::ANSWER_ALONE_AFTER } else { lock::ANSWER_AFTER };
        let waited = wait.fetch().await;
        let waited = tokio::select! {
            waited = waited => waited,
            () = tokio::time::sleep(answer_after) => {
                self.wait = Some(wait);
                return Ok(None);
            }
            () = answer.closed() => return Err(Nothing::GivenUp),
            () = shared.closing() => return Err(Nothing::Failed(Failure::from(Error::Closed))),
        };
        match waited {
            Ok(Waited::Had(connection)) => Ok(Some(connection)),
            Ok(Waited::Kept(connection)) => {
                self.pause_for_lock(shared);
                self.keep(connection);
                Ok(None)
            }
            Ok(Waited::Failed(error)) => Err(Nothing::from(error)),
            // It was had and given back while no claim asked.
            Err(_) => Ok(None),
        }
    }

    /// Without the lock: come again at once while it is waited for.
    fn no_lock(&self) -> Claimed {
        let pauses = self.pause.as_ref().is_some_and(|pause| Instant::now() < pause.until);
        Claimed { next_due_in: (!pauses).then_some(Duration::ZERO), ..Claimed::default() }
    }

    /// Somebody else keeps the lock.
    fn pause_for_lock(&mut self, shared: &Shared) {
        let pause = self.pause.as_ref().map_or(PAUSE_FIRST, |pause| pause.next);
        tracing::warn!(
            lock = shared.config.table,
            waited_seconds = lock::WAIT_SECONDS,
            pause_ms = pause.as_millis(),
            "another worker keeps the table's lock; no task can be claimed. SELECT IS_USED_LOCK tells its connection"
        );
        self.pause = Some(Pause { until: Instant::now() + pause, next: (pause * 2).min(PAUSE_MAX) });
    }

    async fn claim_locked(
        &mut self,
        connection: &mut MySqlConnection,
        claim: &Claim,
        limit: usize,
        names: &Names,
        shared: &Arc<Shared>,
    ) -> Result<Claimed, Nothing> {
        let mut choice = Choice::new(limit, claim.limited, claim.accepts.as_ref());
        let alone = claim.alone && !self.suspects.is_empty();
        if alone {
            self.suspects = choice.one_of(&self.suspects, claim.ignore_users, names, connection).await?;
        }
        let alone = alone && !choice.chosen.is_empty();
        if !alone && claim.ignore_users {
            choice.by_age(&mut self.ages, names, connection).await?;
        } else if !alone {
            choice.unreadable(&mut self.users, names, connection).await?;
            choice.between_users(&mut self.users, names, connection).await?;
        }
        if self.wary {
            choice.leave_locked(names, connection).await?;
        }
        for broken in std::mem::take(&mut choice.broken) {
            super::broken::set_aside(&broken, names, connection).await?;
        }
        let (chosen, sides) = self.fit_to_run(std::mem::take(&mut choice.chosen), alone, names, connection, shared).await?;
        if alone && let Some(ready) = chosen.first() {
            suspects::release(ready.key(), names, connection).await?;
        }
        self.taken = take(chosen, sides, claim, choice.now_ms, names, connection, shared).await?;
        let next_due_in = if choice.cut_short {
            Some(Duration::ZERO)
        } else if self.taken.is_empty() {
            due_after_now(names, connection).await?
        } else {
            None
        };
        let alone_waiting = self.is_wanted_alone(claim, names, connection).await?;
        Ok(Claimed { tasks: Vec::new(), alone_waiting, next_due_in })
    }

    /// Whether this host should end what it has, so as to run a row that must run alone and may run now. Rows that are gone, or need not run alone any
    /// more, are forgotten.
    async fn is_wanted_alone(&mut self, claim: &Claim, names: &Names, connection: &mut MySqlConnection) -> Result<bool, Nothing> {
        if self.suspects.is_empty() {
            return Ok(false);
        }
        let standing = candidates::standing(&self.suspects, names, connection).await?;
        let keys: Vec<&str> = self.suspects.iter().map(|suspect| suspect.place.1.as_str()).collect();
        let sides = side::load(&keys, false, names, connection).await?;
        let mut standing = standing.into_iter();
        self.suspects
            .retain(|suspect| standing.next() == Some(true) && sides.get(&suspect.place.1).is_some_and(|side| side.alone));
        if self.suspects.is_empty() {
            return Ok(false);
        }
        let running = if claim.ignore_users { HashMap::new() } else { candidates::running(names, connection).await? };
        let open: Vec<&Pick> = self.suspects.iter().filter(|suspect| suspect.is_open(&running)).collect();
        Ok(suspects::reserve(&open, claim.host, names, connection).await?)
    }

    /// Leave out what must not run now: what was lost with its workers and has failed by that, and what has to run alone. Only our own table
    /// knows.
    async fn fit_to_run(
        &mut self,
        chosen: Vec<Ready>,
        alone: bool,
        names: &Names,
        connection: &mut MySqlConnection,
        shared: &Arc<Shared>,
    ) -> Result<(Vec<Ready>, HashMap<String, Side>), Nothing> {
        if !names.has_side() || chosen.is_empty() {
            return Ok((chosen, HashMap::new()));
        }
        let keys: Vec<&str> = chosen.iter().map(Ready::key).collect();
        let mut sides = side::load(&keys, false, names, connection).await?;
        for ready in &chosen {
            let key = ready.key();
            let side = sides.remove(key).filter(|side| side.created_at == ready.created_at);
            sides.insert(key.to_owned(), side.unwrap_or_else(|| Side::new(ready.created_at)));
        }
        let lost = LostLeases::among(&chosen, &sides);
        let failed = lost.note(&mut sides, &shared.policy, names, connection).await?;
        let mut fit = Vec::with_capacity(chosen.len());
        for ready in chosen {
            if failed.contains(ready.key()) {
                continue;
            }
            if !alone && sides.get(ready.key()).is_some_and(|side| side.alone) {
                let suspect = ready.into_pick();
                if self.suspects.len() < SUSPECTS_MAX && !self.suspects.contains(&suspect) {
                    self.suspects.push(suspect);
                }
            } else {
                fit.push(ready);
            }
        }
        Ok((fit, sides))
    }

    /// Say now and then that there are tasks which this host does not touch.
    fn tell_left(&mut self) {
        let left = self.ages.passed.max(self.users.left());
        if left > 0 && self.left_told.is_none_or(|told| told.elapsed() >= LEFT_AGAIN) {
            self.left_told = Some(Instant::now());
            tracing::info!(tasks = left, "tasks whose types have no route here are left for other workers");
        }
    }

    /// Close the connection.
    pub(super) fn close(&mut self) {
        self.connection = None;
        self.wait = None;
    }
}

/// How long until something may be acquired: a scheduled row, or one whose lease ends by then. Zero if there is something now.
async fn due_in(names: &Names, connection: &mut MySqlConnection) -> Result<Option<Duration>, sqlx::Error> {
    const NEXT: &str = "SELECT CAST(MIN(t.timeout) AS SIGNED), {now} FROM {t} AS t {index} WHERE t.timeout > 1300000000 AND t.timeout < 2147483647";
    due(NEXT, names, connection).await
}

/// The same without what may be acquired now, and was left.
async fn due_after_now(names: &Names, connection: &mut MySqlConnection) -> Result<Option<Duration>, sqlx::Error> {
    const NEXT: &str = "SELECT CAST(MIN(t.timeout) AS SIGNED), {now} FROM {t} AS t {index} WHERE t.timeout > UNIX_TIMESTAMP() AND t.timeout < 2147483647";
    due(NEXT, names, connection).await
}

async fn due(statement: &str, names: &Names, connection: &mut MySqlConnection) -> Result<Option<Duration>, sqlx::Error> {
    let row = sqlx::query(names.sql(statement)).fetch_one(connection).await?;
    let (first, now): (Option<i64>, i64) = (row.try_get(0)?, row.try_get(1)?);
    Ok(first.map(|first| Timestamp(first.saturating_mul(1_000)).since(Timestamp(now))))
}
