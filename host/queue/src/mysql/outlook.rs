//! What a claim sees without locks before it begins: whether anything waits, and where.

use sqlx::Row as _;

use super::choose::{HEAD, Starts};
use super::fronts::{Learn, Start};
use super::mark::Asked;
use super::rows::{json, names};
use super::session::now;
use super::{MySql, failure, locked};
use crate::{Claim, Result};

/// The clock, the host, the next due task, suspects, changes, open accounts of the default queue and of others, the server; and of each table of
/// ready tasks the first and the last queue, and whether something is behind a place.
pub(super) const LOOK: &str = concat!(
    "SELECT ",
    now!(),
    ", (SELECT COUNT(*) FROM laelaps_host WHERE id = ? AND left_at = 0 AND ended_at = 0),
    (SELECT run_at FROM laelaps_scheduled WHERE run_at >= ? ORDER BY run_at, task LIMIT 1),
    (SELECT COUNT(*) FROM (SELECT 1 FROM laelaps_suspect LIMIT 2) AS few),
    EXISTS (SELECT 1 FROM laelaps_account_change WHERE id > ?),
    EXISTS (SELECT 1 FROM laelaps_account FORCE INDEX (by_age) WHERE queue = '' AND open = 1),
    EXISTS (SELECT 1 FROM laelaps_account FORCE INDEX (other_by_age) WHERE other_picked IS NOT NULL), @@read_only,
    (SELECT MIN(queue) FROM laelaps_ready WHERE queue >= ?), (SELECT MAX(queue) FROM laelaps_ready WHERE queue < ?),
    EXISTS (SELECT 1 FROM laelaps_ready WHERE queue = ? AND turn >= ?),
    (SELECT MIN(queue) FROM laelaps_ready_of_user WHERE queue >= ?), (SELECT MAX(queue) FROM laelaps_ready_of_user WHERE queue < ?),
    EXISTS (SELECT 1 FROM laelaps_ready_of_user FORCE INDEX (in_turn) WHERE queue = ? AND turn >= ?)"
);

/// Of some queues nobody asks for the last one that has something.
pub(super) const LOOK_AT_SOME: &str = concat!(
    "SELECT ",
    now!(),
    ", (SELECT COUNT(*) FROM laelaps_host WHERE id = ? AND left_at = 0 AND ended_at = 0),
    (SELECT run_at FROM laelaps_scheduled WHERE run_at >= ? ORDER BY run_at, task LIMIT 1),
    (SELECT COUNT(*) FROM (SELECT 1 FROM ",
    names!(),
    " STRAIGHT_JOIN laelaps_suspect AS r FORCE INDEX (in_queue) ON r.queue = s.name LIMIT 2) AS few),
    EXISTS (SELECT 1 FROM laelaps_account_change WHERE id > ?),
    EXISTS (SELECT 1 FROM ",
    names!(),
    " STRAIGHT_JOIN laelaps_account AS a FORCE INDEX (by_age) ON a.queue = s.name AND a.open = 1), 0, @@read_only,
    (SELECT r.queue FROM ",
    names!(),
    " STRAIGHT_JOIN laelaps_ready AS r FORCE INDEX (PRIMARY) ON r.queue = s.name LIMIT 1), NULL,
    EXISTS (SELECT 1 FROM laelaps_ready WHERE queue = ? AND turn >= ?),
    (SELECT r.queue FROM ",
    names!(),
    " STRAIGHT_JOIN laelaps_ready_of_user AS r FORCE INDEX (in_turn) ON r.queue = s.name LIMIT 1), NULL,
    EXISTS (SELECT 1 FROM laelaps_ready_of_user FORCE INDEX (in_turn) WHERE queue = ? AND turn >= ?)"
);

/// What is seen without locks.
pub(super) struct Outlook {
    pub(super) now: i64,
    pub(super) next_due: Option<i64>,
    pub(super) suspects: i64,
    pub(super) users_changed: bool,
    pub(super) users_open: bool,
    /// Also where the default queue does not.
    pub(super) others_open: bool,
    pub(super) ready: Seen,
    pub(super) of_users: Seen,
}

/// What is seen of a table of ready tasks.
pub(super) struct Seen {
    /// The first and the last queue that has something, if that was asked; of some queues that were asked for, one that has.
    first: Option<Vec<u8>>,
    last: Option<Vec<u8>>,
    /// Something stands in the one queue, and behind the place, that were asked for.
    here: bool,
}

/// Lower than the name of every queue, and higher.
const BELOW: &[u8] = b"";
const ABOVE: &[u8] = &[u8::MAX; 65];

/// Where a look without locks looks into a table: from one queue on and below another, so also nowhere; and in one queue behind a place.
struct Glance {
    from: &'static [u8],
    below: &'static [u8],
    queue: Vec<u8>,
    turn: i64,
}

impl Glance {
    const NOWHERE: Self = Self { from: ABOVE, below: BELOW, queue: Vec::new(), turn: i64::MAX };

    fn of(start: &Start) -> Self {
        match (&start.learn, start.fronts.as_slice()) {
            (Some(_), _) => Self { from: BELOW, below: ABOVE, ..Self::NOWHERE },
            (None, [(queue, (turn, _))]) => Self { queue: queue.clone(), turn: *turn, ..Self::NOWHERE },
            // Of several queues it is found out by looking into them.
            (None, _) => Self::NOWHERE,
        }
    }
}

impl Seen {
    /// Where to begin, now that something was seen; None if there is nothing.
    pub(super) fn begin(&self, start: Start) -> Option<Start> {
        let Some(learn) = &start.learn else {
            let several = start.fronts.len() > 1;
            return (self.here || several).then_some(start);
        };
        let (first, last) = (self.first.clone()?, self.last.clone().unwrap_or_default());
        match learn {
            Learn::Of(_) => Some(start),
            Learn::From(_) if first == last => Some(Start { fronts: vec![(first, HEAD)], learn: None, ..start }),
            Learn::From(from) if *from > first && *from < last => Some(start),
            Learn::From(_) => Some(Start { learn: Some(Learn::From(first)), ..start }),
        }
    }
}

impl MySql {
    /// Look where a claim could begin, and whether there is something.
    pub(super) async fn look_out(&self, claim: &Claim, asked: &Asked) -> Result<(Starts, Outlook)> {
        let (starts, scheduled) = {
            let mut marks = locked(&self.marks);
            (marks.starts(asked), marks.scheduled.start())
        };
        let host = claim.host;
        let row = self
            .read("looking for work", || {
                let ready = Glance::of(&starts.ready);
                // Only claims that ignore users take from there.
                let of_users = if claim.ignore_users { Glance::of(&starts.of_users) } else { Glance::NOWHERE };
                match asked {
                    None => {
                        let query = sqlx::query(LOOK).bind(host.0).bind(scheduled.0).bind(starts.changes);
                        [ready, of_users].into_iter().fold(query, |query, Glance { from, below, queue, turn }| {
                            query.bind(from).bind(below).bind(queue).bind(turn)
                        })
                    }
                    Some(queues) => {
                        let names = json(queues.iter());
                        let query = sqlx::query(LOOK_AT_SOME).bind(host.0).bind(scheduled.0).bind(names.clone());
                        let query = query.bind(starts.changes).bind(names.clone());
                        [ready, of_users].into_iter().fold(query, |query, Glance { from, queue, turn, .. }| {
                            let names = if from == BELOW { names.clone() } else { "[]".to_owned() };
                            query.bind(names).bind(queue).bind(turn)
                        })
                    }
                }
            })
            .await?;
        let read = |error: sqlx::Error| self.runner.place.worded(error, "looking for work");
        if row.try_get::<i64, _>(1).map_err(read)? == 0 {
            return Err(failure::unknown_host(host).into_error("claiming tasks", &self.runner.place));
        }
        if row.try_get::<i64, _>(7).map_err(read)? != 0 {
            // It may have been the primary. Where its name leads by now there may be another.
            self.look_for_a_primary();
        }
        let seen = |place: usize| {
            Ok::<_, sqlx::Error>(Seen {
                first: row.try_get(place)?,
                last: row.try_get(place + 1)?,
                here: row.try_get(place + 2)?,
            })
        };
        let outlook = || {
            Ok(Outlook {
                now: row.try_get(0)?,
                next_due: row.try_get(2)?,
                suspects: row.try_get(3)?,
                users_changed: row.try_get(4)?,
                users_open: row.try_get(5)?,
                others_open: row.try_get(6)?,
                ready: seen(8)?,
                of_users: seen(11)?,
            })
        };
        Ok((starts, outlook().map_err(read)?))
    }
}
