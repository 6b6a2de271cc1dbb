//! Which plugin versions run on this host, as the database knows it, and which must not run anywhere.
//!
//! A host that dies cannot say what it died of. So before the first attempt of a version begins, and before a module is admitted, the version is
//! entered into this host's running set, durably: a death counts against a version that stood alone in it. The set grows at once and shrinks
//! a little later, so that a version whose tasks come and go costs one write and not one for each task. A version that several hosts died
//! with is under quarantine: it runs nowhere, and its tasks wait, until an operator releases it.

use std::collections::{BTreeSet, HashMap};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use laelaps_queue::{HostId, PluginVersion, Quarantine, Worker};
use tokio::sync::Notify;

use crate::plugin::{Admissions, Control, Digest};

/// A version that ran no attempt for so long leaves the set, and the set shrinks at most once in this time.
const SHRINK_AFTER: Duration = Duration::from_secs(1);
/// Between two tries while the database does not take the set.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(2);

/// The versions of one registered host. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Versions(Arc<Shared>);

struct Shared {
    backend: Arc<dyn Worker>,
    host: HostId,
    set: Mutex<Set>,
    /// Held while the set is written, so that what is written last holds.
    writing: tokio::sync::Mutex<()>,
    /// A version has no attempt any more.
    emptied: Notify,
    quarantined: ArcSwap<HashMap<String, Quarantine>>,
}

#[derive(Default)]
struct Set {
    running: HashMap<(Digest, Arc<str>), Entry>,
    /// The database has another set, or may have.
    is_changed: bool,
}

#[derive(Default)]
struct Entry {
    /// Attempts and admissions under way.
    count: u32,
    /// Whether the database has it.
    is_noted: bool,
    /// Since when none is under way, if none is.
    empty_since: Option<Instant>,
}

/// An attempt on, or the admission of, a version. As long as it lives, the version is in the set.
pub(crate) struct Running {
    shared: Arc<Shared>,
    version: (Digest, Arc<str>),
}

impl Versions {
    /// The versions of this host, of which none runs yet.
    pub(crate) fn new(backend: Arc<dyn Worker>, host: HostId) -> Self {
        Self(Arc::new(Shared {
            backend,
            host,
            set: Mutex::default(),
            writing: tokio::sync::Mutex::default(),
            emptied: Notify::new(),
            quarantined: ArcSwap::default(),
        }))
    }

    /// An attempt on the version is about to begin. Returns when the database knows; None if the attempt was told to stop before.
    pub(crate) async fn begin(&self, plugin: Arc<str>, digest: Digest, control: &Control) -> Option<Running> {
        let (running, is_noted) = self.0.enter(Arc::clone(&plugin), digest);
        if is_noted {
            return Some(running);
        }
        let mut wait = RETRY_FIRST;
        while let Err(error) = self.0.write(false).await {
            tracing::warn!(
                plugin = &*plugin,
                error = crate::log::chain(&error),
                "cannot note that this plugin version runs here; trying again in {wait:?}"
            );
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY_MAX);
            // What has not begun when its host drains goes back, however gently it is to end.
            if control.state().is_some() {
                return None;
            }
        }
        Some(running)
    }

    /// The version is about to be admitted. One try: a database that does not answer must not keep new versions from serving.
    async fn begin_admission(&self, plugin: Arc<str>, digest: Digest) -> Running {
        let (running, is_noted) = self.0.enter(Arc::clone(&plugin), digest);
        if !is_noted && let Err(error) = self.0.write(false).await {
            tracing::debug!(
                plugin = &*plugin,
                error = crate::log::chain(&error),
                "cannot note that this plugin version is admitted here"
            );
        }
        running
    }

    /// Take versions out of the set that have not run for a while, for as long as the host serves.
    pub(crate) async fn shrink(self) {
        loop {
            self.0.emptied.notified().await;
            tokio::time::sleep(SHRINK_AFTER).await;
            if let Err(error) = self.0.write(true).await {
                tracing::debug!(error = crate::log::chain(&error), "cannot note which plugin versions run here; trying again");
            }
            let set = self.0.lock();
            if set.is_changed || set.running.values().any(|entry| entry.count == 0) {
                self.0.emptied.notify_one();
            }
        }
    }

    /// Learn which versions are under quarantine.
    pub(crate) async fn look_for_quarantine(&self) -> laelaps_queue::Result<()> {
        let found = self.0.backend.quarantined().await?;
        let before = self.0.quarantined.load();
        if found.is_empty() && before.is_empty() {
            return Ok(());
        }
        let after: HashMap<String, Quarantine> =
            found.into_iter().map(|quarantine| (quarantine.version.digest.clone(), quarantine)).collect();
        for (digest, quarantine) in before.iter().filter(|(digest, _)| !after.contains_key(*digest)) {
            tracing::info!(plugin = quarantine.version.name, version = digest, "a plugin version is no longer under quarantine");
        }
        self.0.quarantined.store(Arc::new(after));
        Ok(())
    }

    /// Why the version must not run, if it must not.
    pub(crate) fn quarantine(&self, digest: Digest) -> Option<Quarantine> {
        let quarantined = self.0.quarantined.load();
        if quarantined.is_empty() { None } else { quarantined.get(&digest.to_string()).cloned() }
    }
}

impl Admissions for Versions {
    fn begin(&self, plugin: &str, digest: Digest) -> Pin<Box<dyn Future<Output = Box<dyn Send>> + Send>> {
        let (versions, plugin) = (self.clone(), Arc::from(plugin));
        Box::pin(async move { Box::new(versions.begin_admission(plugin, digest).await) as Box<dyn Send> })
    }
}

impl Shared {
    fn enter(self: &Arc<Self>, plugin: Arc<str>, digest: Digest) -> (Running, bool) {
        let version = (digest, plugin);
        let mut set = self.lock();
        let entry = set.running.entry(version.clone()).or_default();
        entry.count += 1;
        entry.empty_since = None;
        let is_noted = entry.is_noted;
        set.is_changed |= !is_noted;
        drop(set);
        (Running { shared: Arc::clone(self), version }, is_noted)
    }

    /// Write the set if the database has another one; first without what has not run for a while, if it is to shrink.
    async fn write(&self, shrinks: bool) -> laelaps_queue::Result<()> {
        let _writing = self.writing.lock().await;
        let Some(versions) = self.lock().changed(shrinks) else { return Ok(()) };
        let described =
            |(digest, plugin): &(Digest, Arc<str>)| PluginVersion { name: plugin.to_string(), digest: digest.to_string() };
        let written: BTreeSet<PluginVersion> = versions.iter().map(described).collect();
        self.backend.note_running(self.host, &written.into_iter().collect::<Vec<_>>()).await?;
        let mut set = self.lock();
        for version in &versions {
            if let Some(entry) = set.running.get_mut(version) {
                entry.is_noted = true;
            }
        }
        set.is_changed = set.running.values().any(|entry| !entry.is_noted);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Set> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Set {
    /// The versions that the database is to have, if it has others.
    fn changed(&mut self, shrinks: bool) -> Option<Vec<(Digest, Arc<str>)>> {
        if shrinks {
            let before = self.running.len();
            let is_over =
                |entry: &Entry| entry.count == 0 && entry.empty_since.is_none_or(|since| since.elapsed() >= SHRINK_AFTER);
            // What leaves is noted no more, whether or not the write comes through: its next attempt enters it again.
            self.running.retain(|_, entry| !is_over(entry));
            self.is_changed |= self.running.len() < before;
        }
        self.is_changed.then(|| self.running.keys().cloned().collect())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut set = self.shared.lock();
        if let Some(entry) = set.running.get_mut(&self.version) {
            entry.count -= 1;
            if entry.count == 0 {
                entry.empty_since = Some(Instant::now());
                self.shared.emptied.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests;
