//! The plugins that serve, each with its current version.
//!
//! Authority: what serves is decided here, one look at the folder at a time. A version is swapped in only after it was compiled, linked and
//! tried; whatever goes wrong before leaves the serving version alone. A file that is deleted unloads its plugin: its tasks wait, and
//! attempts that have begun finish. A folder that cannot be read for a while (a network file system, a mount) changes nothing.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::compile::Failure;
use super::journal::{Journal, Note};
use super::scan::{self, Content, Listing, Signature};
use super::{Config, Digest, Engine, Error, Version, reason, usage, watch as watcher};

/// How long a file has to lie still before it is read.
const SETTLE: Duration = Duration::from_millis(100);
/// How long one look waits for files that are still being written.
const PATIENCE: Duration = Duration::from_secs(10);
/// Versions that served before, remembered for each plugin.
const PREVIOUS_MAX: usize = 3;
/// The first wait before a module is tried again that was refused for a passing reason; doubled each time.
const RETRY_FIRST: Duration = Duration::from_secs(5);
/// How long a module waits that a host died with while it admitted it: the others serve first, and the host is at work.
const SUSPECT_WAIT: Duration = Duration::from_secs(5);
/// The longest such wait.
const RETRY_MAX: Duration = Duration::from_secs(300);

/// The plugins of a folder, each with the version that serves.
pub struct Store {
    engine: Arc<Engine>,
    folder: PathBuf,
    serving: ArcSwap<HashMap<String, Arc<Version>>>,
    /// What operators see. Never locked while something is waited for.
    view: Mutex<BTreeMap<String, PluginStatus>>,
    journal: Journal,
    /// Who is told of admissions.
    admissions: Mutex<Option<Box<dyn Admissions>>>,
    /// Held by the one look that goes on.
    scanner: tokio::sync::Mutex<Scanner>,
    changes: watch::Sender<u64>,
    closing: CancellationToken,
    /// Ends the watcher when the store is dropped.
    _close_on_drop: DropGuard,
}

/// Who is told of admissions: a module may end the host that tries it.
pub trait Admissions: Send + Sync {
    /// A version is about to be admitted. The admission begins when the future is ready, and is over when its answer is dropped.
    fn begin(&self, plugin: &str, digest: Digest) -> Pin<Box<dyn Future<Output = Box<dyn Send>> + Send>>;
}

/// What one look at the folder changed.
#[derive(Clone, Debug, Default)]
pub struct Rescan {
    /// Versions that serve from now on.
    pub admitted: Vec<Admitted>,
    /// Files that were looked at and not admitted.
    pub refused: Vec<Refused>,
    /// Plugins whose file is gone.
    pub removed: Vec<String>,
    /// Files that were still being written when patience ended; they are looked at again by themselves.
    pub unsettled: Vec<String>,
    /// The folder could not be read, and nothing was changed: why.
    pub unreadable: Option<String>,
}

/// A version that serves from now on.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// The plugin.
    pub plugin: String,
    /// The version.
    pub digest: Digest,
    /// The version that served before.
    pub previous: Option<Digest>,
}

/// A file that was not admitted.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Refused {
    /// The plugin it would have been.
    pub plugin: String,
    /// Its digest, if it could be read.
    pub digest: Option<Digest>,
    /// Why.
    pub reason: String,
}

/// A plugin as an operator sees it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct PluginStatus {
    /// Its name.
    pub name: String,
    /// The digest of the version that serves. None: its file was refused, and nothing served before.
    pub digest: Option<Digest>,
    /// The size of that version's file.
    pub size_bytes: Option<u64>,
    /// Versions that served before, newest first, at most three.
    pub previous: Vec<Digest>,
    /// The file that lies there now was not admitted.
    pub refused: Option<Refused>,
}

/// What is remembered from look to look.
#[derive(Default)]
struct Scanner {
    files: HashMap<String, Known>,
    /// The folder's own identity when it was listed last.
    folder: Option<(u64, u64)>,
    /// Names that were complained about.
    misnamed: Vec<String>,
    /// Whether it was said that the folder cannot be read.
    said_unreadable: bool,
    /// What hosts were admitting from this folder when they died, until its turn comes.
    suspects: Vec<Note>,
}

/// A file that was dealt with.
struct Known {
    signature: Signature,
    /// The digest that was refused.
    refused: Option<Option<Digest>>,
    /// It was refused for a passing reason: when to try again, and how long to wait after that.
    retry: Option<(Instant, Duration)>,
}

impl Store {
    /// Read the folder once, and watch it from then on until the store is dropped.
    ///
    /// # Errors
    /// [`Error::Folder`] if the folder cannot be read. A module that is refused is no error.
    pub async fn open(engine: Arc<Engine>, config: Config) -> Result<Arc<Self>, Error> {
        let closing = CancellationToken::new();
        let journal = Journal::open(config.cache_folder.as_deref(), &config.folder);
        let scanner = Scanner { suspects: journal.take(), ..Scanner::default() };
        let store = Arc::new(Self {
            engine,
            journal,
            admissions: Mutex::default(),
            folder: config.folder.clone(),
            serving: ArcSwap::default(),
            view: Mutex::default(),
            scanner: tokio::sync::Mutex::new(scanner),
            changes: watch::Sender::new(0),
            _close_on_drop: closing.clone().drop_guard(),
            closing,
        });
        store.list_folder().await.map_err(|source| Error::Folder { folder: config.folder.clone(), source })?;
        // The watcher first, so that no change falls between the first look and the watching.
        watcher::start(&store, config.folder, config.poll_interval);
        store.rescan().await;
        Ok(store)
    }

    /// The version of a plugin that serves. Takes no lock.
    #[must_use]
    pub fn current(&self, plugin: &str) -> Option<Arc<Version>> {
        self.serving.load().get(plugin).cloned()
    }

    /// Look at the folder now. Looks are taken one at a time; a file that is still being written is waited for, at most 10 s. Dropping the
    /// future ends the look; what it has changed by then stays.
    pub async fn rescan(&self) -> Rescan {
        let mut scanner = self.scanner.lock().await;
        let patience = Instant::now() + PATIENCE;
        let mut rescan = Rescan::default();
        loop {
            let (seen, settled) = match self.list_twice(&scanner).await {
                Ok(Some(listings)) => listings,
                Ok(None) => break,
                Err(error) => {
                    self.note_unreadable(&mut scanner, &error, &mut rescan);
                    return rescan;
                }
            };
            scanner.folder = settled.folder;
            scanner.said_unreadable = false;
            note_misnamed(&mut scanner, &settled);
            self.remove_missing(&mut scanner, &seen, &settled, &mut rescan);
            rescan.unsettled = self.take_changed(&mut scanner, &seen, &settled, &mut rescan).await;
            if rescan.unsettled.is_empty() || Instant::now() >= patience {
                break;
            }
        }
        rescan
    }

    /// All plugins, by name.
    #[must_use]
    pub fn list(&self) -> Vec<PluginStatus> {
        self.view().values().cloned().collect()
    }

    /// A number that grows with each change of what serves.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Tell of each admission from now on, or of none.
    pub fn note_admissions(&self, admissions: Option<Box<dyn Admissions>>) {
        *self.lock_admissions() = admissions;
    }

    fn lock_admissions(&self) -> MutexGuard<'_, Option<Box<dyn Admissions>>> {
        self.admissions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    /// The identity of the folder when it was listed last: it changes when the folder is replaced by another of its name.
    pub(super) async fn folder_identity(&self) -> Option<(u64, u64)> {
        self.scanner.lock().await.folder
    }

    async fn list_folder(&self) -> std::io::Result<Listing> {
        let folder = self.folder.clone();
        tokio::task::spawn_blocking(move || scan::list(&folder)).await.map_err(std::io::Error::other)?
    }

    /// The folder at two moments, [`SETTLE`] apart: None if nothing is to be done.
    async fn list_twice(&self, scanner: &Scanner) -> std::io::Result<Option<(Listing, Listing)>> {
        let seen = self.list_folder().await?;
        let is_known = |(plugin, signature): (&String, &Signature)| !scanner.has_to_be_read(plugin, *signature);
        let is_there = |plugin: &String| seen.files.contains_key(plugin);
        if seen.misnamed == scanner.misnamed
            && seen.folder == scanner.folder
            && seen.files.iter().all(is_known)
            && scanner.files.keys().all(is_there)
        {
            return Ok(None);
        }
        tokio::time::sleep(SETTLE).await;
        Ok(Some((seen, self.list_folder().await?)))
    }

    fn note_unreadable(&self, scanner: &mut Scanner, error: &std::io::Error, rescan: &mut Rescan) {
        rescan.unreadable = Some(format!("plugin folder {}: {error}", self.folder.display()));
        if !std::mem::replace(&mut scanner.said_unreadable, true) {
            tracing::error!(
                folder = %self.folder.display(), %error,
                "the plugin folder cannot be read: the plugins go on serving as they are, and the folder is tried again"
            );
        }
    }

    /// Unload what is missing from both looks. A file that is replaced by deleting and copying may be gone for a moment.
    fn remove_missing(&self, scanner: &mut Scanner, seen: &Listing, settled: &Listing, rescan: &mut Rescan) {
        let is_gone = |plugin: &String| !seen.files.contains_key(plugin) && !settled.files.contains_key(plugin);
        let gone: Vec<String> = scanner.files.keys().filter(|plugin| is_gone(plugin)).cloned().collect();
        for plugin in gone {
            scanner.files.remove(&plugin);
            self.view().remove(&plugin);
            let Some(version) = self.current(&plugin) else { continue };
            self.serving.rcu(|serving| {
                let mut serving = HashMap::clone(serving);
                serving.remove(&plugin);
                serving
            });
            self.retire(&version);
            crate::audit::removed(&self.folder, &version);
            tracing::warn!(%plugin, version = %version.digest().short(), "the plugin's file was deleted: its tasks wait until there is one again");
            rescan.removed.push(plugin);
        }
    }

    /// Read what is new and lies still. Answers what does not lie still.
    async fn take_changed(&self, scanner: &mut Scanner, seen: &Listing, settled: &Listing, rescan: &mut Rescan) -> Vec<String> {
        let mut unsettled: Vec<String> = seen
            .files
            .keys()
            .filter(|plugin| !settled.files.contains_key(*plugin) && scanner.files.contains_key(*plugin))
            .cloned()
            .collect();
        for (plugin, signature) in &settled.files {
            if !scanner.has_to_be_read(plugin, *signature) {
                continue;
            }
            if seen.files.get(plugin) != Some(signature) {
                unsettled.push(plugin.clone());
                continue;
            }
            match self.read(plugin, *signature).await {
                Content::Unsettled => unsettled.push(plugin.clone()),
                Content::Unreadable(reason) => {
                    let refused = Refused { plugin: plugin.clone(), digest: None, reason };
                    self.refuse(scanner, refused, *signature, None, rescan);
                }
                Content::Whole(bytes) => self.consider(scanner, plugin, *signature, &bytes, rescan).await,
            }
        }
        unsettled
    }

    async fn read(&self, plugin: &str, signature: Signature) -> Content {
        let path = scan::path(&self.folder, plugin);
        let read = tokio::task::spawn_blocking(move || scan::read(&path, signature));
        read.await.unwrap_or_else(|error| Content::Unreadable(error.to_string()))
    }

    /// Decide about the content of a file.
    async fn consider(&self, scanner: &mut Scanner, plugin: &str, signature: Signature, bytes: &[u8], rescan: &mut Rescan) {
        let digest = Digest::of(bytes);
        let serving = self.current(plugin);
        if serving.as_ref().is_some_and(|version| version.digest() == digest) {
            scanner.files.insert(plugin.to_owned(), Known { signature, refused: None, retry: None });
            self.note_served_again(plugin);
            return;
        }
        let known = scanner.files.get_mut(plugin);
        let retry = known.as_ref().and_then(|known| known.retry);
        if let Some(known) = known
            && known.refused == Some(Some(digest))
            && retry.is_none()
        {
            // Touched, but still what was refused.
            known.signature = signature;
            return;
        }
        if let Some(died) = scanner.take_suspect(plugin, digest) {
            let retry = Some((Instant::now() + SUSPECT_WAIT, RETRY_FIRST));
            let refused = Refused { plugin: plugin.to_owned(), digest: Some(digest), reason: suspicion(&died) };
            return self.refuse(scanner, refused, signature, retry, rescan);
        }
        let beginning = self.lock_admissions().as_ref().map(|admissions| admissions.begin(plugin, digest));
        let begun = match beginning {
            Some(beginning) => Some(beginning.await),
            None => None,
        };
        let noted = self.journal.note(plugin, digest);
        crate::fault::reach("admitting");
        let admitted = self.engine.admit(plugin, digest, bytes).await;
        drop((noted, begun));
        match admitted {
            Ok(version) => {
                scanner.files.insert(plugin.to_owned(), Known { signature, refused: None, retry: None });
                rescan.admitted.push(self.swap(version, serving.as_deref()));
            }
            Err(failure) => {
                let wait = retry.map_or(RETRY_FIRST, |(_, wait)| (wait * 2).min(RETRY_MAX));
                let (reason, retry) = match failure {
                    Failure::Refused(reason) => (reason, None),
                    Failure::Unable(reason) => (reason, Some((Instant::now() + wait, wait))),
                };
                let refused = Refused { plugin: plugin.to_owned(), digest: Some(digest), reason };
                self.refuse(scanner, refused, signature, retry, rescan);
            }
        }
    }

    /// Let a version serve.
    fn swap(&self, version: Version, before: Option<&Version>) -> Admitted {
        let (plugin, digest) = (version.plugin().to_owned(), version.digest());
        let previous = before.map(Version::digest);
        let size_bytes = version.size_bytes();
        let version = Arc::new(version);
        self.serving.rcu(|serving| {
            let mut serving = HashMap::clone(serving);
            serving.insert(plugin.clone(), version.clone());
            serving
        });
        {
            let mut view = self.view();
            let status = view.entry(plugin.clone()).or_insert_with(|| PluginStatus::unknown(&plugin));
            if let Some(previous) = previous {
                status.previous.retain(|known| *known != digest && *known != previous);
                status.previous.insert(0, previous);
                status.previous.truncate(PREVIOUS_MAX);
            }
            (status.digest, status.size_bytes, status.refused) = (Some(digest), Some(size_bytes), None);
        }
        match before {
            Some(before) => {
                self.retire(before);
                tracing::info!(%plugin, version = %digest.short(), replaces = %before.digest().short(), "a new version of the plugin serves");
            }
            None => {
                self.changes.send_modify(|changes| *changes += 1);
                tracing::info!(%plugin, version = %digest.short(), "the plugin serves");
            }
        }
        crate::audit::admitted(&self.folder, &version, previous);
        Admitted { plugin, digest, previous }
    }

    /// A version does not serve any more.
    fn retire(&self, version: &Version) {
        version.retired.store(true, Ordering::SeqCst);
        self.engine.forget(version.order());
        self.changes.send_modify(|changes| *changes += 1);
    }

    fn refuse(
        &self,
        scanner: &mut Scanner,
        refused: Refused,
        signature: Signature,
        retry: Option<(Instant, Duration)>,
        rescan: &mut Rescan,
    ) {
        let plugin = refused.plugin.clone();
        let known = Known { signature, refused: Some(refused.digest), retry };
        let before = scanner.files.insert(plugin.clone(), known);
        let is_new = {
            let mut view = self.view();
            let status = view.entry(plugin.clone()).or_insert_with(|| PluginStatus::unknown(&plugin));
            status.refused.replace(refused.clone()).as_ref() != Some(&refused)
        };
        if is_new || before.is_none() {
            let version = refused.digest.map_or_else(|| "unread".into(), |digest| digest.short());
            match self.current(&plugin) {
                Some(serving) => tracing::warn!(
                    %plugin, %version, reason = %refused.reason, serving = %serving.digest().short(),
                    "the plugin's new file is refused: the serving version goes on serving"
                ),
                None => {
                    tracing::warn!(%plugin, %version, reason = %refused.reason, "the plugin's file is refused: its tasks wait")
                }
            }
        }
        crate::audit::refused(&self.folder, &refused);
        rescan.refused.push(refused);
    }

    /// The file is once more what serves, after something else that was refused.
    fn note_served_again(&self, plugin: &str) {
        if let Some(status) = self.view().get_mut(plugin) {
            status.refused = None;
        }
    }

    /// A panic while the lock was held leaves each entry whole.
    fn view(&self) -> MutexGuard<'_, BTreeMap<String, PluginStatus>> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// Compile, link and try a module, as the store does before it serves one.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason.
    pub async fn load(self: &Arc<Self>, plugin: &str, bytes: &[u8]) -> Result<Arc<Version>, Error> {
        match self.admit(plugin, Digest::of(bytes), bytes).await {
            Ok(version) => Ok(Arc::new(version)),
            Err(Failure::Refused(reason) | Failure::Unable(reason)) => Err(Error::Refused(reason)),
        }
    }

    async fn admit(self: &Arc<Self>, plugin: &str, digest: Digest, bytes: &[u8]) -> Result<Version, Failure> {
        let compiled = self.compiler.component(&self.wasmtime, bytes, digest).await?;
        let component = compiled.component.map_err(|problems| Failure::Refused(reason::tidy(&problems.join("; "))))?;
        let pre = self.try_out(&component).await?;
        Ok(Version {
            plugin: plugin.into(),
            digest,
            digest_text: digest.to_string().into(),
            order: self.next_order(),
            size_bytes: bytes.len() as u64,
            retired: AtomicBool::new(false),
            _code: usage::of_code(&component),
            pre,
        })
    }
}

impl PluginStatus {
    fn unknown(plugin: &str) -> Self {
        Self { name: plugin.to_owned(), digest: None, size_bytes: None, previous: Vec::new(), refused: None }
    }
}

/// Why a module has to wait that a host died with.
fn suspicion(died: &Note) -> String {
    format!(
        "a host (process {}) died while it admitted this file; it is taken last, {} s from now. If this host dies of it, too, remove the \
         file and report it",
        died.process,
        SUSPECT_WAIT.as_secs()
    )
}

impl Scanner {
    /// The death of a host with this version, if there was one that has not been answered by a wait.
    fn take_suspect(&mut self, plugin: &str, digest: Digest) -> Option<Note> {
        let digest = digest.to_string();
        let place = self.suspects.iter().position(|died| died.plugin == plugin && died.digest == digest)?;
        Some(self.suspects.remove(place))
    }

    fn has_to_be_read(&self, plugin: &str, signature: Signature) -> bool {
        self.files
            .get(plugin)
            .is_none_or(|known| known.signature != signature || known.retry.is_some_and(|(moment, _)| Instant::now() >= moment))
    }
}

/// Say once of each file that its name cannot be a plugin's.
fn note_misnamed(scanner: &mut Scanner, listing: &Listing) {
    for file in listing.misnamed.iter().filter(|file| !scanner.misnamed.contains(file)) {
        tracing::warn!(?file, "this file is no plugin: {}", scan::misnamed());
    }
    scanner.misnamed.clone_from(&listing.misnamed);
}
