//! Which tasks a claim takes. Those without user are simply the first ones that no other claim has its hands on (see [`super::fronts`]). Tasks of
//! users are chosen by [`crate::fair`], one claim after the other: the counter's row is held until the claim has committed, and with it all accounts.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::accounts::{FOLDED_BY_CLAIM, Owner, fold};
use super::between::between_users;
use super::failure::Failure;
use super::fronts::{self, Found, Looked, OF_USERS, READY, Start};
use super::mark::Asked;
use super::mend::Spot;
use super::rows::{ids, json};
use super::session::Session;
use super::suspects::suspect;

/// The most data of one claim, before compression, unless one task alone has more.
const CLAIMED_BYTES_MAX: i64 = 64 << 20;

/// A place in the order of ready tasks: turn and task; of scheduled ones: time and task.
pub(super) type Ready = (i64, i64);
/// Before every place.
pub(super) const HEAD: Ready = (i64::MIN, 0);

/// A task that was chosen, and where it waited.
pub(super) struct Chosen {
    pub(super) task: i64,
    pub(super) turn: i64,
    /// As its place says it.
    pub(super) queue: String,
    pub(super) user: String,
    /// The number of its pick between users, if it was picked between users.
    pub(super) pick: Option<i64>,
}

impl Chosen {
    pub(super) fn owner(&self) -> Owner {
        Owner::of_task(&self.queue, &self.user)
    }

    pub(super) fn spot(&self) -> Spot {
        Spot::new(&self.queue, self.turn, self.task)
    }
}

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Tasks without user, in their order.
    WithoutUser,
    /// All tasks, in their order.
    First,
    /// Between users.
    BetweenUsers,
    /// One that has to run alone; if there is none that may, as otherwise.
    Alone {
        /// Otherwise is by turn, not between users.
        ignore_users: bool,
    },
}

/// Which queues are asked for, and where looks begin.
#[derive(Clone, Debug)]
pub(super) struct Starts {
    pub(super) asked: Asked,
    pub(super) ready: Start,
    pub(super) of_users: Start,
    pub(super) changes: i64,
    /// Accounts of other queues than the default one are open.
    pub(super) others: bool,
    /// For claims of some queues: when a task without user was last picked.
    pub(super) picked: Option<i64>,
    /// How often something had entered by then, as far as this process knows.
    pub(super) entered: u64,
}

/// A look at a table: where it began, how long it took, where it came to.
pub(super) type Look<P> = Option<(P, Duration, Option<P>)>;

/// What was chosen.
#[derive(Default)]
pub(super) struct Choice {
    pub(super) chosen: Vec<Chosen>,
    /// It is one task that has to run alone.
    pub(super) alone: bool,
    /// The last pick between users before this claim, if it holds the accounts.
    pub(super) pick: Option<i64>,
    pub(super) ready: Option<Looked>,
    pub(super) of_users: Option<Looked>,
    pub(super) changes: Look<i64>,
    /// Accounts of other queues than the default one may be open.
    pub(super) others: bool,
    /// There may be changes of users' accounts that are not folded in.
    pub(super) unfolded: bool,
    /// When a task without user was picked last before this claim, as far as that was asked.
    pub(super) picked: Option<i64>,
    /// Places that contradict their tasks, to be mended.
    pub(super) broken: Vec<Spot>,
}

impl Choice {
    /// Take hold of the first tasks without user.
    pub(super) async fn first(
        &mut self,
        session: &mut Session<'_>,
        limit: usize,
        starts: &Starts,
    ) -> Result<Vec<Found>, Failure> {
        let (found, looked) = fronts::first(session, &READY, &starts.ready, limit, &mut self.broken).await?;
        self.ready = Some(looked);
        Ok(found)
    }

    /// Take hold of the first tasks of users.
    async fn first_of_users(&mut self, session: &mut Session<'_>, limit: usize, starts: &Starts) -> Result<Vec<Found>, Failure> {
        let (found, looked) = fronts::first(session, &OF_USERS, &starts.of_users, limit, &mut self.broken).await?;
        self.of_users = Some(looked);
        Ok(found)
    }
}

/// How many tasks to choose at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) tasks: usize,
    /// Of these, tasks of users that have a limit.
    pub(super) limited: usize,
}

/// Choose tasks.
pub(super) async fn choose(session: &mut Session<'_>, way: Way, limits: Limits, starts: &Starts) -> Result<Choice, Failure> {
    const HOLD: &str = "SELECT pick FROM laelaps_counter WHERE id = 1 FOR UPDATE";
    let mut choice = Choice { others: starts.others, ..Choice::default() };
    let limit = limits.tasks;
    match way {
        Way::WithoutUser => {
            let found = choice.first(session, limit, starts).await?;
            choice.chosen = found.into_iter().map(|found| found.chosen).collect();
        }
        Way::First => choice.chosen = first_of_all(session, limit, starts, &mut choice).await?,
        Way::BetweenUsers | Way::Alone { .. } => {
            let pick: i64 = sqlx::query_scalar(HOLD).fetch_one(session.db()).await?;
            choice.pick = Some(pick);
            let started = Instant::now();
            let folded = fold(session, pick, starts.changes, FOLDED_BY_CLAIM).await?;
            choice.changes = Some((starts.changes, started.elapsed(), folded.last));
            choice.broken.extend(folded.broken);
            choice.others |= folded.of_others;
            choice.unfolded = folded.full;
            let suspect = if way == Way::BetweenUsers { None } else { suspect(session, &starts.asked).await? };
            choice.alone = suspect.is_some();
            choice.chosen = match suspect {
                Some(chosen) => vec![chosen],
                None if way == (Way::Alone { ignore_users: true }) => first_of_all(session, limit, starts, &mut choice).await?,
                None => between_users(session, limits, pick, starts, &mut choice).await?,
            };
        }
    }
    // A task that stands in two places is taken once.
    let mut seen = HashSet::with_capacity(choice.chosen.len());
    choice.chosen.retain(|chosen| seen.insert(chosen.task));
    choice.chosen = fitting(session, choice.chosen).await?;
    let taken: HashSet<i64> = choice.chosen.iter().map(|chosen| chosen.task).collect();
    for looked in choice.ready.iter_mut().chain(&mut choice.of_users) {
        looked.leave_all_but(&taken);
    }
    Ok(choice)
}

/// The first tasks, whosever they are.
async fn first_of_all(
    session: &mut Session<'_>,
    limit: usize,
    starts: &Starts,
    choice: &mut Choice,
) -> Result<Vec<Chosen>, Failure> {
    let mut found = choice.first(session, limit, starts).await?;
    found.extend(choice.first_of_users(session, limit, starts).await?);
    found.sort_unstable_by_key(|found| (found.chosen.turn, found.chosen.task));
    found.truncate(limit);
    Ok(found.into_iter().map(|found| found.chosen).collect())
}

/// The first of the chosen whose data together keeps the bound.
async fn fitting(session: &mut Session<'_>, mut chosen: Vec<Chosen>) -> Result<Vec<Chosen>, Failure> {
    const SUM: &str = concat!(
        "SELECT CAST(COALESCE(SUM(d.bytes), 0) AS SIGNED) FROM ",
        ids!(),
        " STRAIGHT_JOIN laelaps_task_data AS d FORCE INDEX (PRIMARY) ON d.task = s.id AND d.part = 0"
    );
    const BYTES: &str = concat!(
        "SELECT s.id, CAST(d.bytes AS SIGNED) FROM ",
        ids!(),
        " STRAIGHT_JOIN laelaps_task_data AS d FORCE INDEX (PRIMARY) ON d.task = s.id AND d.part = 0"
    );
    if chosen.len() < 2 {
        return Ok(chosen);
    }
    let tasks = json(chosen.iter().map(|chosen| chosen.task));
    let sum: i64 = sqlx::query_scalar(SUM).bind(tasks.clone()).fetch_one(session.db()).await?;
    if sum > CLAIMED_BYTES_MAX {
        let bytes: Vec<(i64, i64)> = sqlx::query_as(BYTES).bind(tasks).fetch_all(session.db()).await?;
        let bytes: HashMap<i64, i64> = bytes.into_iter().collect();
        let mut sum = 0_i64;
        let fitting = chosen.iter().take_while(|chosen| {
            sum += bytes.get(&chosen.task).copied().unwrap_or(0);
            sum <= CLAIMED_BYTES_MAX
        });
        chosen.truncate(fitting.count().max(1));
    }
    Ok(chosen)
}
