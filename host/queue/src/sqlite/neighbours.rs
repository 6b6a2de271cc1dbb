//! What other processes write into the same file: a host learns of it without polling.
//!
//! Authority: SQLite itself says whether another connection has committed (`PRAGMA data_version`, asked on the writer's connection, whose own
//! commits do not count). The operating system says when it is worth asking: inotify tells of the next write to the write-ahead log, once.
//! A commit can be seen only some time after its bytes were written, so the question is repeated for half a second. Nothing is asked while
//! nobody writes, and nothing more than before while this process writes itself: its writer asks as it begins each transaction.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use sqlx::sqlite::SqlitePool;
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::writer::Looker;

/// The pauses before each look after a write was noticed: together half a second, longer than a disk takes to flush as a rule.
const PAUSES_MS: [u64; 7] = [4, 8, 16, 32, 64, 128, 256];
/// The shortest time between two wake-ups, so that a busy neighbour does not keep this host busy.
const WAKE_PAUSE: Duration = Duration::from_millis(10);

/// What the writer has seen of other connections.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// How often it looked.
    looks: AtomicU64,
    /// How often it found that somebody else had committed.
    changes: AtomicU64,
    /// Told of each such change.
    changed: Notify,
}

impl Seen {
    /// The writer has looked.
    pub(super) fn looked(&self, has_changed: bool) {
        self.looks.fetch_add(1, Ordering::SeqCst);
        if has_changed {
            self.changes.fetch_add(1, Ordering::SeqCst);
            self.changed.notify_one();
        }
    }

    pub(super) fn looks(&self) -> u64 {
        self.looks.load(Ordering::SeqCst)
    }

    #[cfg(test)]
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }
}

/// The watcher of a host, until it is dropped.
#[derive(Debug)]
pub(super) struct Watch(Option<AbortHandle>);

impl Watch {
    /// Watch the log of a database, and wake `wakeup` when there may be something to claim. Without inotify there is polling alone.
    pub(super) fn start(database: &Path, seen: Arc<Seen>, looker: Looker, readers: SqlitePool, wakeup: Arc<Notify>) -> Self {
        match Log::of(database) {
            Ok(log) => {
                let watcher = Watcher { log, seen, looker, readers, wakeup, next_due: None };
                Self(Some(tokio::spawn(watcher.run()).abort_handle()))
            }
            Err(error) => {
                tracing::warn!(path = %database.display(), %error, "the database cannot be watched; what others submit is found by polling alone");
                Self(None)
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(watcher) = &self.0 {
            watcher.abort();
        }
    }
}

struct Watcher {
    log: Log,
    seen: Arc<Seen>,
    looker: Looker,
    readers: SqlitePool,
    wakeup: Arc<Notify>,
    /// When the next scheduled task is due, as it was seen last.
    next_due: Option<i64>,
}

impl Watcher {
    async fn run(mut self) {
        // What came before the first watch.
        let mut is_written = true;
        loop {
            if !is_written {
                tokio::select! {
                    () = self.log.written() => {}
                    () = self.seen.changed.notified() => {
                        self.wake().await;
                        continue;
                    }
                }
            }
            is_written = false;
            self.look_for_a_while().await;
        }
    }

    /// Look until somebody's commit is seen, or can be expected no more.
    async fn look_for_a_while(&mut self) {
        let mut pauses = PAUSES_MS.iter();
        while let Some(pause) = pauses.next() {
            let looks = self.seen.looks();
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(*pause)) => {}
                () = self.seen.changed.notified() => {
                    self.wake().await;
                    pauses = PAUSES_MS.iter();
                    continue;
                }
            }
            // Written again meanwhile: that commit may take as long.
            if self.log.was_written() {
                pauses = PAUSES_MS.iter();
            }
            if self.seen.looks() == looks && self.looker.look().await.is_err() {
                return;
            }
        }
    }

    /// Wake who claims, if there is something to claim or to wait for.
    async fn wake(&mut self) {
        const LOOK: &str = "SELECT EXISTS (SELECT 1 FROM account INDEXED BY account_by_age WHERE open)
                OR EXISTS (SELECT 1 FROM account INDEXED BY account_without_user WHERE user = '' AND head_task IS NOT NULL)
                OR EXISTS (SELECT 1 FROM suspect) OR EXISTS (SELECT 1 FROM unserved),
            (SELECT min(run_at) FROM scheduled)";
        let found: Result<(bool, Option<i64>), _> = sqlx::query_as(LOOK).fetch_one(&self.readers).await;
        let (is_open, next_due) = found.unwrap_or((true, None));
        if is_open || next_due != self.next_due {
            self.next_due = next_due;
            self.wakeup.notify_waiters();
            self.wakeup.notify_one();
        }
        tokio::time::sleep(WAKE_PAUSE).await;
    }
}

/// The write-ahead log, as the operating system tells of it. It is watched for one write at a time, by its path, so that one that was made anew
/// is found as well.
struct Log {
    /// Read like a pipe: what its events say does not matter, only that there are some.
    inotify: pipe::Receiver,
    path: PathBuf,
    is_watched: bool,
}

impl Log {
    fn of(database: &Path) -> io::Result<Self> {
        let mut path = database.as_os_str().to_owned();
        path.push("-wal");
        let inotify = pipe::Receiver::from_owned_fd_unchecked(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?)?;
        let mut log = Self { inotify, path: PathBuf::from(path), is_watched: false };
        log.watch();
        Ok(log)
    }

    fn watch(&mut self) {
        if self.is_watched {
            return;
        }
        let written = WatchFlags::MODIFY | WatchFlags::ATTRIB | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        self.is_watched = inotify::add_watch(&self.inotify, &self.path, written | WatchFlags::ONESHOT).is_ok();
        // Without a log there is one soon.
        if !self.is_watched
            && let Some(folder) = self.path.parent()
        {
            let made = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONESHOT;
            self.is_watched = inotify::add_watch(&self.inotify, folder, made).is_ok();
        }
    }

    /// Wait for the next write. Cancel safe: what was not told is told the next time.
    async fn written(&mut self) {
        self.watch();
        loop {
            // It is open as long as this lives: waiting for it cannot fail.
            if self.inotify.readable().await.is_err() {
                return std::future::pending().await;
            }
            if self.was_written() {
                return;
            }
        }
    }

    /// Whether it was written to since it was asked last.
    fn was_written(&mut self) -> bool {
        let mut events = [0; 4_096];
        let mut was_written = false;
        while self.inotify.try_read(&mut events).is_ok_and(|bytes| bytes > 0) {
            was_written = true;
        }
        self.is_watched &= !was_written;
        self.watch();
        was_written
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn each_write_is_told_once_and_a_log_that_was_made_anew_is_followed() {
        let folder = TempDir::new().expect("a folder");
        let database = folder.path().join("queue.db");
        let path = folder.path().join("queue.db-wal");
        let write = || std::fs::write(&path, "x").expect("it can be written");
        // Not there yet.
        let mut log = Log::of(&database).expect("inotify works");
        assert!(!log.was_written());
        write();
        tokio::time::timeout(PATIENCE, log.written()).await.expect("its birth is told");
        while log.was_written() {}
        write();
        tokio::time::timeout(PATIENCE, log.written()).await.expect("a write is told");
        while log.was_written() {}
        std::fs::remove_file(&path).expect("it can be removed");
        write();
        while log.was_written() {}
        write();
        tokio::time::timeout(PATIENCE, log.written()).await.expect("a write to the new one is told");
    }
}
