//! Large data that a running task writes, in pieces.
//!
//! SQLite lets one connection write at a time, and a commit of 16 MB would keep all others waiting for 20 ms or more. So each piece is written
//! in a transaction of its own, with a pause for those of others; then one small transaction puts the pieces in the place of what the task had. Until
//! then, and if it does not come to that, the task has its old data whole.
//!
//! Authority: the row of `task_data`. Pieces whose set it does not name belong to nobody: they are removed by the task's next large update, or
//! together with the task.

use std::time::{Duration, Instant};

use sqlx::Row as _;
use sqlx::sqlite::SqliteConnection;

use super::Sqlite;
use super::failure::Failure;
use super::keep::{self, Merged};
use super::writer::Session;
use crate::{LeaseAnswer, LeaseRef};

/// Data of more than this is written in pieces.
pub(super) const WHOLE_BYTES_MAX: usize = 1 << 20;
/// What one transaction writes of it: 0.8 ms in the middle of forty, where a mebibyte took 2.4 ms.
pub(super) const PIECE_BYTES: usize = 256 << 10;
/// Pieces that one transaction removes: to free them is less than to write them.
pub(super) const REMOVED_MAX: i64 = 4;
/// After each transaction come so many times its length for others: they have three quarters of the disk's time.
const PAUSE_TIMES: u32 = 3;
/// A longer pause would only tell of a database that is locked.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// The data of a row of `task_data`, wherever it stands.
macro_rules! whole_data {
    () => {
        "coalesce(task_data.data, (SELECT group_concat(part, '') FROM
            (SELECT data AS part FROM task_data_piece WHERE pieces = task_data.pieces ORDER BY number)))"
    };
}
pub(super) use whole_data;

/// The bytes of it, found without reading it.
macro_rules! data_bytes {
    () => {
        "coalesce(octet_length(task_data.data),
            (SELECT sum(octet_length(data)) FROM task_data_piece WHERE pieces = task_data.pieces))"
    };
}
pub(super) use data_bytes;

impl Sqlite {
    /// Put data in the place of what a task has, in pieces; None if somebody else has changed it since it was read.
    pub(super) async fn replace_in_pieces(&self, merged: Merged) -> crate::Result<Option<LeaseAnswer>> {
        let (lease_ref, stored) = (merged.lease_ref, merged.stored.into_bytes());
        // Of 2^62 numbers none comes twice among the few sets that there are.
        let pieces = fastrand::i64(1..1 << 62);
        for (number, part) in (0..).zip(stored.chunks(PIECE_BYTES)) {
            let piece = Piece { lease_ref, pieces, number, part: part.to_vec() };
            let begun = Instant::now();
            if !self.writer.run("updating a task's data", move |session| Box::pin(piece.write(session))).await? {
                self.remove_remains(lease_ref).await;
                return Ok(Some(LeaseAnswer::Lost));
            }
            pause(begun).await;
        }
        let (revision, bytes) = (merged.revision, merged.bytes);
        let answer = self
            .writer
            .run("updating a task's data", move |session| Box::pin(take_pieces(session, lease_ref, revision, bytes, pieces)))
            .await?;
        self.remove_remains(lease_ref).await;
        Ok(answer)
    }

    /// Remove what no row names any more, a few pieces at a time. What is left if that fails goes with the task's next large update.
    pub(super) async fn remove_remains(&self, lease_ref: LeaseRef) {
        loop {
            let begun = Instant::now();
            let removed =
                self.writer.run("removing what a task's data was", move |session| Box::pin(remove_some(session, lease_ref)));
            match removed.await {
                Ok(true) => pause(begun).await,
                Ok(false) => return,
                Err(error) => {
                    tracing::debug!(task = lease_ref.task.0, %error, "old data stays for a while");
                    return;
                }
            }
        }
    }
}

async fn pause(begun: Instant) {
    tokio::time::sleep((begun.elapsed() * PAUSE_TIMES).min(PAUSE_MAX)).await;
}

/// Data put together from its pieces, one at a time: who updates it needs it several times over in memory as it is.
pub(super) async fn read(reading: &mut SqliteConnection, pieces: i64) -> Result<Vec<u8>, sqlx::Error> {
    const BYTES: &str = "SELECT coalesce(sum(octet_length(data)), 0) FROM task_data_piece WHERE pieces = ?1";
    const NEXT: &str = "SELECT number, data FROM task_data_piece WHERE pieces = ?1 AND number > ?2 ORDER BY number LIMIT 1";
    let bytes: i64 = sqlx::query_scalar(BYTES).bind(pieces).fetch_one(&mut *reading).await?;
    let mut data = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0));
    let mut last = i64::MIN;
    while let Some(row) = sqlx::query(NEXT).bind(pieces).bind(last).fetch_optional(&mut *reading).await? {
        last = row.try_get(0)?;
        data.extend_from_slice(row.try_get_unchecked::<&[u8], _>(1)?);
    }
    Ok(data)
}

struct Piece {
    lease_ref: LeaseRef,
    pieces: i64,
    number: i64,
    part: Vec<u8>,
}

impl Piece {
    /// Answers whether the lease held: an attempt that lost it shall leave nothing behind for a task that may be gone.
    async fn write(self, session: &mut Session) -> Result<bool, Failure> {
        const WRITE: &str = "INSERT INTO task_data_piece (task, pieces, number, data) SELECT ?1, ?2, ?3, ?4
            WHERE EXISTS (SELECT 1 FROM task WHERE id = ?1 AND lease = ?5 AND state = 'running' AND until > ?6)";
        let Self { lease_ref, pieces, number, part } = self;
        let now = session.now;
        let query = sqlx::query(WRITE).bind(lease_ref.task.0).bind(pieces).bind(number).bind(part);
        Ok(query.bind(lease_ref.lease.0).bind(now).execute(session.db()).await?.rows_affected() == 1)
    }
}

async fn take_pieces(
    session: &mut Session,
    lease_ref: LeaseRef,
    revision: i64,
    bytes: i64,
    pieces: i64,
) -> Result<Option<LeaseAnswer>, Failure> {
    const TAKE: &str = "UPDATE task_data SET revision = revision + 1, bytes = ?3, data = NULL, pieces = ?4
        WHERE task = ?1 AND revision = ?2
            AND EXISTS (SELECT 1 FROM task WHERE id = ?1 AND lease = ?5 AND state = 'running' AND until > ?6)";
    let now = session.now;
    let query = sqlx::query(TAKE).bind(lease_ref.task.0).bind(revision).bind(bytes).bind(pieces);
    let taken = query.bind(lease_ref.lease.0).bind(now).execute(session.db()).await?;
    keep::replaced(session, lease_ref, taken.rows_affected()).await
}

/// Remove pieces that belong to nobody. Only who has the lease knows that no other is being written; answers whether there may be more.
async fn remove_some(session: &mut Session, lease_ref: LeaseRef) -> Result<bool, Failure> {
    const REMOVE: &str =
        "DELETE FROM task_data_piece WHERE (pieces, number) IN (SELECT piece.pieces, piece.number FROM task_data_piece AS piece
            WHERE piece.task = ?1 AND piece.pieces IS NOT (SELECT pieces FROM task_data WHERE task = ?1) LIMIT ?3)
        AND EXISTS (SELECT 1 FROM task WHERE id = ?1 AND lease = ?2)";
    let query = sqlx::query(REMOVE).bind(lease_ref.task.0).bind(lease_ref.lease.0).bind(REMOVED_MAX);
    Ok(query.execute(session.db()).await?.rows_affected() == REMOVED_MAX.unsigned_abs())
}
