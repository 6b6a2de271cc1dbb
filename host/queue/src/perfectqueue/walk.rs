//! Where claims look. The table has one index, on the times; what may be acquired is a part of it, from the event horizon to now.
//!
//! In the order of age ([`Ages`]) a claim reads from a mark on, which moves past what was claimed and past what is left for others. In the fair
//! order ([`Users`]) the part is walked in slices, one or a few a claim, and what was met is kept in [`Waiting`]. New rows enter at the part's end,
//! since their time is the moment they were written, and the end is read by every claim that needs it. A row that enters elsewhere (a `run_at` in the past, a
//! transaction that commits late) is met when the part is read again from its beginning: [`AGAIN`] after the last time, but not before that is
//! ten times as long as the reading took, so that it costs no more than a tenth.

use std::collections::{BTreeSet, HashSet};
use std::hash::{BuildHasher as _, RandomState};
use std::time::{Duration, Instant};

use sqlx::Row as _;
use sqlx::mysql::{MySqlConnection, MySqlRow};

use super::order::{Place, Waiting};
use super::table::Names;
use crate::Accepts;
use crate::claim::AcceptsMark;
use crate::mysql::connect::text;

/// Between two walks from the beginning.
const AGAIN: Duration = Duration::from_secs(5);
/// Rows of a slice for a claim that knows of too few.
const SLICE: usize = 5_000;
/// Rows that the walk goes on by each second where claims know of enough, so that the order learns of all users soon whether claims come often or
/// seldom, and the most and the least of them for one claim.
const ROWS_A_SECOND: f64 = 50_000.0;
const ROWS_MAX: usize = 20_000;
const ROWS_MIN: usize = 500;
/// Slices that a claim reads which knows of too few rows.
const SLICES_MAX: usize = 4;
/// Seconds at the end that are read again, since rows of these may still come in, in any order.
const UNSETTLED: i64 = 2;
/// Between two looks at the end by claims that know of enough rows.
const END_AGAIN: Duration = Duration::from_millis(100);

/// Times of rows with unreadable keys that are remembered until a claim sets them aside.
const UNREADABLE_MAX: usize = 20;
/// Rows left for others that are remembered, and for how long.
const LEFT_MAX: usize = 1_000_000;
const LEFT_FOR: Duration = Duration::from_secs(600);

/// When it is time to begin again.
#[derive(Debug)]
struct Round {
    began: Instant,
    /// How long it took to the end; None: not there yet.
    took: Option<Duration>,
}

impl Round {
    fn begin() -> Self {
        Self { began: Instant::now(), took: None }
    }

    fn reach_end(&mut self) {
        self.took.get_or_insert_with(|| self.began.elapsed());
    }

    fn is_over(&self) -> bool {
        self.took.is_some_and(|took| self.began.elapsed() >= AGAIN.max(took * 10))
    }
}

/// The mark of claims in the order of age.
#[derive(Debug, Default)]
pub(super) struct Ages {
    mark: Option<Place>,
    round: Option<Round>,
    /// The types that were not left for others.
    accepts: Option<AcceptsMark>,
    /// Rows that this round left for others.
    pub(super) passed: usize,
}

impl Ages {
    /// A claim begins that accepts these types. Answers the place behind which it reads.
    pub(super) fn start(&mut self, accepts: Option<&Accepts>) -> Place {
        if !same(self.accepts.as_ref(), accepts) || self.round.as_ref().is_none_or(Round::is_over) {
            *self = Self { round: Some(Round::begin()), accepts: accepts.map(Accepts::mark), ..Self::default() };
        }
        self.mark.clone().unwrap_or_default()
    }

    /// Everything up to this place was claimed, or is left for others.
    pub(super) fn pass(&mut self, place: Place, now: i64) {
        // In the last seconds rows may still come in before it.
        let settled = now - UNSETTLED;
        self.mark = Some(if place.0 < settled { place } else { (settled, String::new()) });
    }

    /// A claim broke: what it passed may still be there.
    pub(super) fn look_again(&mut self) {
        self.round = None;
    }

    /// There was nothing more.
    pub(super) fn reach_end(&mut self) {
        if let Some(round) = &mut self.round {
            round.reach_end();
        }
    }
}

/// The walk of claims in the fair order.
#[derive(Debug, Default)]
pub(super) struct Users {
    pub(super) waiting: Waiting,
    /// The place behind which the next slice begins.
    from: Place,
    round: Option<Round>,
    /// When the end was read last.
    at_end: Option<Instant>,
    /// When a slice was read last.
    read_at: Option<Instant>,
    left: Left,
    /// Times at which rows stand whose keys cannot be read: such a key leads nowhere.
    pub(super) unreadable: BTreeSet<i64>,
}

/// Rows of types that the claimer has no route for, remembered so that they are read once and not by every walk.
#[derive(Debug, Default)]
struct Left {
    rows: HashSet<u64>,
    accepts: Option<AcceptsMark>,
    hasher: RandomState,
    since: Option<Instant>,
}

impl Left {
    fn contains(&self, place: &Place) -> bool {
        !self.rows.is_empty() && self.rows.contains(&self.hasher.hash_one(place))
    }
}

impl Users {
    /// A claim begins that accepts these types.
    pub(super) fn accept(&mut self, accepts: Option<&Accepts>) {
        let same = same(self.left.accepts.as_ref(), accepts);
        // Two rows may have one hash: what is hidden by that comes forth again after a while.
        let old = self.left.since.is_some_and(|since| since.elapsed() > LEFT_FOR) || self.left.rows.len() > LEFT_MAX;
        if !same || old {
            self.left = Left { accepts: accepts.map(Accepts::mark), since: Some(Instant::now()), ..Left::default() };
            self.round = None;
        }
    }

    /// A row is left for others, who can run its type.
    pub(super) fn leave(&mut self, place: &Place) {
        let hash = self.left.hasher.hash_one(place);
        self.left.rows.insert(hash);
    }

    /// How many rows are left for others.
    pub(super) fn left(&self) -> usize {
        self.left.rows.len()
    }

    /// Read what a claim of so many needs to know.
    pub(super) async fn look(
        &mut self,
        wanted: usize,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<(), sqlx::Error> {
        if self.round.as_ref().is_none_or(Round::is_over) {
            self.begin();
        }
        for _ in 0..SLICES_MAX {
            let knows_enough = self.waiting.len() >= wanted;
            if knows_enough && self.at_end.is_some_and(|at| at.elapsed() < END_AGAIN) {
                break;
            }
            if let Some(left_out) = self.left_out(wanted) {
                self.from = left_out;
            }
            let ended = self.slice(if knows_enough { self.rows_due() } else { SLICE }, names, connection).await?;
            if ended || knows_enough {
                break;
            }
        }
        Ok(())
    }

    /// Walk from the beginning again.
    fn begin(&mut self) {
        self.waiting.begin_walk();
        self.round = Some(Round::begin());
        self.from = Place::default();
        self.at_end = None;
    }

    /// A claim broke: what it took off the known rows may still be there.
    pub(super) fn look_again(&mut self) {
        self.round = None;
    }

    /// Where rows were left out that are needed now, once the walk has been through.
    fn left_out(&mut self, wanted: usize) -> Option<Place> {
        let (time, _) = self.at_end.and_then(|_| self.waiting.left_out(wanted))?;
        self.at_end = None;
        // From this very row on; a few before it are met again.
        Some((time - 1, String::new()))
    }

    /// How many rows the walk goes on by.
    fn rows_due(&self) -> usize {
        let seconds = self.read_at.map_or(1.0, |at| at.elapsed().as_secs_f64()).min(1.0);
        let mut rows = ROWS_MIN;
        while rows < ROWS_MAX && f64::from(u32::try_from(rows).unwrap_or(u32::MAX)) < seconds * ROWS_A_SECOND {
            rows *= 2;
        }
        rows.min(ROWS_MAX)
    }

    /// Read one slice of so many rows. Answers whether it was the last.
    async fn slice(&mut self, rows_max: usize, names: &Names, connection: &mut MySqlConnection) -> Result<bool, sqlx::Error> {
        const SLICE_OF: &str = "SELECT t.id, CAST(t.timeout AS SIGNED), WEIGHT_STRING(RTRIM(t.resource)), CAST(t.max_running AS SIGNED), UNIX_TIMESTAMP()
            FROM {t} AS t {index}
            WHERE t.timeout > 1300000000 AND t.timeout >= ? AND (t.timeout > ? OR t.id > ?) AND t.timeout <= UNIX_TIMESTAMP()
                AND t.created_at IS NOT NULL
            ORDER BY t.timeout, t.id LIMIT ?";
        let (time, key) = &self.from;
        let limit = i64::try_from(rows_max).unwrap_or(i64::MAX);
        self.read_at = Some(Instant::now());
        let query = sqlx::query(names.sql(SLICE_OF)).bind(*time).bind(*time).bind(key).bind(limit);
        let rows = query.fetch_all(connection).await?;
        for row in &rows {
            let place = place(row)?;
            if std::str::from_utf8(row.try_get(0)?).is_err() {
                if self.unreadable.len() < UNREADABLE_MAX {
                    self.unreadable.insert(place.0);
                }
                continue;
            }
            if !self.left.contains(&place) {
                self.waiting.meet(place, row.try_get(2)?, row.try_get(3)?);
            }
        }
        let ended = rows.len() < rows_max;
        let Some(last) = rows.last() else {
            // Nothing there: also not what is known of the end. Later rows are later than what was read.
            self.reach_end();
            return Ok(true);
        };
        self.from = place(last)?;
        if ended {
            let settled = last.try_get::<i64, _>(4)? - UNSETTLED;
            if self.from.0 >= settled {
                self.from = (settled, String::new());
            }
            self.reach_end();
        }
        Ok(ended)
    }

    fn reach_end(&mut self) {
        self.at_end = Some(Instant::now());
        let Some(round) = &mut self.round else { return };
        if round.took.is_none() {
            round.reach_end();
            self.waiting.end_walk();
        }
    }
}

/// Whether what was left under one is left under the other.
fn same(known: Option<&AcceptsMark>, accepts: Option<&Accepts>) -> bool {
    match (known, accepts) {
        (Some(known), Some(accepts)) => known.is(accepts),
        (None, None) => true,
        _ => false,
    }
}

fn place(row: &MySqlRow) -> Result<Place, sqlx::Error> {
    Ok((row.try_get(1)?, text(row, 0)?))
}
