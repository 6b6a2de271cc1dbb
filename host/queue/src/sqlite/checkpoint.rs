//! Moving what was committed out of the write-ahead log into the database, on a connection of its own, so that no commit waits for it.
//!
//! Authority: the log's index, which all processes on the file share. The writer looks at it before each transaction (`NOOP`, which does no work) and
//! calls this connection when enough pages have gathered. A `PASSIVE` checkpoint never makes a writer or reader wait. What is committed while it
//! works stays in the log, which SQLite begins anew only when all of it was moved. Under steady writes that never comes about by itself: so the
//! writer moves the last few pages of a long log itself, and more of one that grows faster than it is moved. If this connection fails, SQLite's own checkpoint within the writer's commit is left,
//! at a log ten times as long.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;

use super::writer::Original;
use crate::Error;

/// Pages in the log that were not moved yet, after which they are moved beside the writer: 16 MiB.
const BESIDE_PAGES: i64 = 4_000;
/// A log of so many pages, 48 MiB, is begun anew as soon as only a few of them were not moved.
const LONG_PAGES: i64 = 12_000;
/// What the writer moves itself at most: 4 MiB, a few milliseconds' work each time that the log is begun anew.
const FEW_PAGES: i64 = 1_000;
/// In a log of so many pages, 80 MiB, the writer moves whatever is left.
const LONGEST_PAGES: i64 = 20_000;
/// Pages in the log after which SQLite itself moves them within a commit.
pub(super) const WITHIN_COMMIT_PAGES: &str = "40000";
/// After a checkpoint that failed.
const PAUSE: Duration = Duration::from_secs(1);

/// See how long the log is.
const LOOK: &str = "PRAGMA wal_checkpoint(NOOP)";
/// Move what can be moved without waiting for anybody.
const MOVE: &str = "PRAGMA wal_checkpoint(PASSIVE)";

/// The log: whether somebody else is moving it, its pages, and how many of them are in the database.
pub(super) type Log = (bool, i64, i64);

/// Who moves what is in the log now.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mover {
    Nobody,
    Beside,
    /// The writer, unless it is being moved.
    Writer,
    /// The writer, after whatever is being moved.
    WriterNow,
}

impl Mover {
    fn of((_, pages, moved): Log) -> Self {
        let left = pages - moved;
        if pages >= LONGEST_PAGES {
            Self::WriterNow
        } else if left >= BESIDE_PAGES {
            Self::Beside
        } else if pages >= LONG_PAGES && left <= FEW_PAGES {
            Self::Writer
        } else {
            Self::Nobody
        }
    }
}

/// Checkpoints beside a writer, which has this and ends it.
#[derive(Debug)]
pub(super) struct Checkpoints {
    state: Arc<State>,
    /// When the log was seen last.
    mover: Mover,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct State {
    called: Notify,
    /// Held while the log is being moved.
    moving: Mutex<()>,
    is_over: AtomicBool,
}

impl Checkpoints {
    /// The connection is made when it is needed first.
    pub(super) fn start(options: &SqliteConnectOptions, file: Arc<Original>) -> Self {
        let state = Arc::new(State::default());
        // The file is there, or it is not ours any more.
        let options = options.clone().create_if_missing(false).pragma("cache_size", "-256");
        let beside = Beside { state: Arc::clone(&state), options, file, connection: None, has_failed: false };
        Self { state, mover: Mover::Nobody, task: tokio::spawn(beside.run()) }
    }

    /// The writer has seen the log.
    pub(super) fn seen(&mut self, log: Log) {
        self.mover = Mover::of(log);
        if self.mover == Mover::Beside {
            self.state.called.notify_one();
        }
    }

    /// The writer has committed, and has no transaction now.
    pub(super) async fn committed(&mut self, writer: &mut SqliteConnection) {
        let _moving = match std::mem::replace(&mut self.mover, Mover::Nobody) {
            Mover::Nobody | Mover::Beside => return,
            // Before they are done beside, the last pages come with a flush of all the others.
            Mover::Writer => match self.state.moving.try_lock() {
                Ok(moving) => moving,
                Err(_) => return,
            },
            Mover::WriterNow => self.state.moving.lock().await,
        };
        let moved = async {
            // What was just committed may have been much, or the log was begun anew.
            let log: Log = sqlx::query_as(LOOK).fetch_one(&mut *writer).await?;
            if matches!(Mover::of(log), Mover::Writer | Mover::WriterNow) {
                sqlx::query(MOVE).execute(writer).await?;
            }
            Ok::<_, sqlx::Error>(())
        };
        if let Err(error) = moved.await {
            tracing::debug!(%error, "the last pages of the write-ahead log stay there for now");
        }
    }

    /// Finish what is being moved, and close the connection.
    pub(super) async fn close(self) {
        self.state.is_over.store(true, Ordering::SeqCst);
        self.state.called.notify_one();
        if let Err(error) = self.task.await {
            tracing::error!(%error, "moving the write-ahead log into the database broke down");
        }
    }
}

struct Beside {
    state: Arc<State>,
    options: SqliteConnectOptions,
    file: Arc<Original>,
    connection: Option<SqliteConnection>,
    /// The last checkpoint failed, and it was said.
    has_failed: bool,
}

impl Beside {
    async fn run(mut self) {
        loop {
            self.state.called.notified().await;
            if self.state.is_over.load(Ordering::SeqCst) {
                break;
            }
            let state = Arc::clone(&self.state);
            let moving = state.moving.lock().await;
            let moved = self.move_all().await;
            drop(moving);
            match moved {
                Ok(()) => self.has_failed = false,
                Err(error) => {
                    self.connection = None;
                    if !std::mem::replace(&mut self.has_failed, true) {
                        let path = self.options.get_filename().display();
                        tracing::warn!(%path, %error, "the write-ahead log cannot be moved into the database; this is tried again with each commit");
                    }
                    // A call meanwhile is kept, the writer's end too: it may wait so long.
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        if let Some(connection) = self.connection.take()
            && let Err(error) = connection.close().await
        {
            tracing::debug!(%error, "closing the database");
        }
    }

    /// Move twice: the first time takes long, and flushes the database only if nothing was committed meanwhile; what the second one moves and
    /// flushes is all there is, as a rule.
    async fn move_all(&mut self) -> Result<(), Error> {
        self.file.check()?;
        let failed = |error| super::failure::worded(error, "moving the write-ahead log", self.options.get_filename());
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(self.options.connect().await.map_err(failed)?),
        };
        for _ in 0..2 {
            sqlx::query(MOVE).execute(&mut *connection).await.map_err(failed)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tempfile::TempDir;

    use super::super::writer::{Access, Writer};
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);
    /// Of each commit, a little over it.
    const PAGES: i64 = 500;

    /// A writer on a new file with one table, whose later connections are made with these options.
    async fn writer(path: &Path, later: SqliteConnectOptions) -> Writer {
        let mut connection = super::super::options(path).connect().await.expect("a new file");
        sqlx::query("CREATE TABLE large (bytes BLOB)").execute(&mut connection).await.expect("a table");
        let access = Access {
            options: later,
            path: Arc::new(path.to_owned()),
            patience: PATIENCE,
            wakeup: Arc::default(),
            file: Arc::new(Original::at(path)),
            seen: Arc::default(),
        };
        Writer::start(connection, access)
    }

    async fn commit(writer: &Writer) {
        let insert = writer.run("testing", |session| {
            Box::pin(async {
                let bytes = sqlx::query("INSERT INTO large VALUES (zeroblob(?1))").bind(PAGES * 4_096);
                bytes.execute(session.db()).await?;
                Ok(())
            })
        });
        insert.await.expect("committed");
    }

    async fn log(path: &Path) -> Log {
        let mut connection = super::super::options(path).connect().await.expect("the file");
        let log = sqlx::query_as(LOOK).fetch_one(&mut connection).await.expect("the log");
        connection.close().await.expect("closed");
        log
    }

    #[tokio::test]
    async fn a_commit_never_moves_the_log_and_does_not_need_the_connection_that_does() {
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("queue.db");
        let writer = writer(&path, super::super::options(&folder.path().join("nowhere").join("queue.db"))).await;
        for _ in 0..=BESIDE_PAGES / PAGES + 1 {
            commit(&writer).await;
        }
        let (_, pages, moved) = log(&path).await;
        assert!(pages > BESIDE_PAGES + PAGES && moved == 0, "{moved} of {pages} pages were moved");
        writer.close().await;
        assert!(!path.with_extension("db-wal").exists(), "the last connection moves all there is");
    }

    #[tokio::test]
    async fn the_log_is_moved_beside_the_writer_and_begun_anew_before_it_is_long() {
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("queue.db");
        let writer = writer(&path, super::super::options(&path)).await;
        let mut longest = 0;
        for _ in 0..3 * LONG_PAGES / PAGES {
            commit(&writer).await;
            let (_, pages, _) = log(&path).await;
            longest = pages.max(longest);
        }
        assert!(longest > BESIDE_PAGES && longest < LONGEST_PAGES + BESIDE_PAGES, "{longest} pages in the log");
        // What is left is moved when the next transaction begins, whatever it does.
        let moved = async {
            while let (_, pages, moved) = log(&path).await
                && pages - moved >= BESIDE_PAGES
            {
                commit(&writer).await;
            }
        };
        tokio::time::timeout(PATIENCE, moved).await.expect("the log is moved");
        writer.close().await;
        assert!(!path.with_extension("db-wal").exists(), "the last connection moves all there is");
    }

    #[test]
    fn who_moves_the_log_depends_on_how_much_of_it_is_left() {
        let mover = |pages, left| Mover::of((false, pages, pages - left));
        assert_eq!(mover(BESIDE_PAGES - 1, BESIDE_PAGES - 1), Mover::Nobody);
        assert_eq!(mover(BESIDE_PAGES, BESIDE_PAGES), Mover::Beside);
        assert_eq!(mover(LONG_PAGES, BESIDE_PAGES), Mover::Beside);
        assert_eq!(mover(LONG_PAGES, FEW_PAGES + 1), Mover::Nobody);
        assert_eq!(mover(LONG_PAGES, FEW_PAGES), Mover::Writer);
        assert_eq!(mover(LONG_PAGES - 1, 0), Mover::Nobody);
        assert_eq!(mover(LONGEST_PAGES - 1, BESIDE_PAGES), Mover::Beside);
        assert_eq!(mover(LONGEST_PAGES, BESIDE_PAGES), Mover::WriterNow);
    }
}
