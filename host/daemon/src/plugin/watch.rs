//! What makes the store look at its folder: the system's notices, and a slow poll for what sends none (network file systems, symbolic links
//! whose target changes elsewhere).

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::Store;

/// Watch a folder for as long as the store lives.
pub(super) fn start(store: &Arc<Store>, folder: PathBuf, poll_interval: Duration) {
    let closing = store.closing().clone();
    // Before anything is looked at, so that no change falls in between.
    let noticed = Arc::new(Notify::new());
    let notices = Notices::of(&folder, &noticed);
    if notices.is_none() {
        tracing::warn!(
            folder = %folder.display(), every = ?poll_interval,
            "the system gives no notice of changes in the plugin folder (fs.inotify.max_user_watches?): it is only looked at regularly"
        );
    }
    tokio::spawn(watch(Arc::downgrade(store), folder, poll_interval, closing, noticed, notices));
}

async fn watch(
    store: Weak<Store>,
    folder: PathBuf,
    poll_interval: Duration,
    closing: CancellationToken,
    noticed: Arc<Notify>,
    mut notices: Option<Notices>,
) {
    let mut watched_folder = None;
    loop {
        tokio::select! {
            () = closing.cancelled() => return,
            () = noticed.notified() => {}
            () = tokio::time::sleep(poll_interval) => {}
        }
        let Some(store) = store.upgrade() else { return };
        let look = async {
            let rescan = store.rescan().await;
            if !rescan.unsettled.is_empty() {
                noticed.notify_one();
            }
            store.folder_identity().await
        };
        let folder_now = tokio::select! {
            () = closing.cancelled() => return,
            folder_now = look => folder_now,
        };
        // The system watches a folder, not its name: another folder of that name has to be watched anew.
        if watched_folder.is_some() && watched_folder != folder_now || notices.is_none() {
            notices = Notices::of(&folder, &noticed);
        }
        watched_folder = folder_now;
    }
}

/// The system's notices about a folder, until dropped.
struct Notices {
    _watcher: RecommendedWatcher,
}

impl Notices {
    /// Notices about the entries of a folder, not of those below. None if the system gives none: then there is the poll.
    fn of(folder: &Path, noticed: &Arc<Notify>) -> Option<Self> {
        let noticed = noticed.clone();
        let on_event = move |event: notify::Result<Event>| {
            if event.is_ok_and(|event| may_change_a_file(event.kind)) {
                noticed.notify_one();
            }
        };
        let watcher = RecommendedWatcher::new(on_event, notify::Config::default()).and_then(|mut watcher| {
            watcher.watch(folder, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => Some(Self { _watcher: watcher }),
            Err(error) => {
                tracing::debug!(folder = %folder.display(), %error, "the system does not watch the plugin folder: it is polled only");
                None
            }
        }
    }
}

/// Reading is an event, too, and we read.
fn may_change_a_file(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_reading_is_no_reason_to_look_again() {
        assert!(!may_change_a_file(EventKind::Access(AccessKind::Open(AccessMode::Any))));
        assert!(!may_change_a_file(EventKind::Access(AccessKind::Close(AccessMode::Read))));
        assert!(may_change_a_file(EventKind::Access(AccessKind::Close(AccessMode::Write))));
        assert!(may_change_a_file(EventKind::Create(notify::event::CreateKind::Any)));
    }
}
