//! How a host starts while something that it needs is away: it waits for what comes back by itself, and ends for what somebody has to mend.
//!
//! Authority: [`passes`] says which is which. A server that cannot be reached, starts, is full, or takes no writes because another is the
//! primary at the moment comes back; a wrong password, a database that does not exist, tables that are missing or too new, and a
//! folder that is not there do not. A host that ended for the former would be given up by its service manager during an outage of a
//! minute, and stay down after it. A host that waited for the latter would hide a mistake.
//!
//! Signals work meanwhile: one that shuts down ends the process, one that restarts begins again with the configuration as it is now.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use laelaps_queue::Queue;
use sd_notify::NotifyState;

use crate::config::Config;
use crate::host::{self, Options, Parts};
use crate::log::{Log, chain};
use crate::plugin;
use crate::signals::{Signals, Verb};

/// Between two messages to the service manager that a start goes on, and how long each counts, in microseconds.
pub(crate) const START_INTERVAL: Duration = Duration::from_secs(5);
const START_EXTENSION_US: u32 = 60_000_000;
/// How long one look at a database may try on before its failure is told: `pq_connect_timeout` may be an hour.
const LOOK: Duration = Duration::from_secs(1);
/// The first pause between two looks, and the longest.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// After this time the reason is told a second time; then after twice as long each time, at most every ten minutes.
const TELL_FIRST: Duration = Duration::from_secs(10);
const TELL_MAX: Duration = Duration::from_secs(600);

/// Whether a fault ends without anybody changing what this host was told, so that a start waits for it.
pub(crate) fn passes(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        if let Some(error) = cause.downcast_ref::<laelaps_queue::Error>() {
            return error.passes();
        }
        match cause.downcast_ref::<plugin::Error>() {
            Some(plugin::Error::Folder { source, .. } | plugin::Error::Cache { source: Some(source), .. }) => file_passes(source),
            _ => false,
        }
    })
}

/// A disk that is full, or a network file system that does not answer, comes back. A folder that is missing, forbidden or something else is a
/// mistake.
fn file_passes(error: &io::Error) -> bool {
    use io::ErrorKind::{
        AlreadyExists, InvalidFilename, InvalidInput, IsADirectory, NotADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem,
    };
    !matches!(
        error.kind(),
        AlreadyExists
            | InvalidFilename
            | InvalidInput
            | IsADirectory
            | NotADirectory
            | NotFound
            | PermissionDenied
            | ReadOnlyFilesystem
    )
}

/// Waiting for something that comes back by itself: how often to look, and when to tell.
pub(crate) struct Waiting {
    /// When the first look failed.
    since: Option<Instant>,
    pause: Duration,
    tell_at: Option<Instant>,
    tell_again_after: Duration,
}

impl Waiting {
    pub(crate) fn new() -> Self {
        Self { since: None, pause: PAUSE_FIRST, tell_at: None, tell_again_after: TELL_FIRST }
    }

    /// A look failed at `now`: whether to tell it.
    pub(crate) fn failed(&mut self, now: Instant) -> bool {
        self.since.get_or_insert(now);
        if self.tell_at.is_some_and(|at| now < at) {
            return false;
        }
        self.tell_at = Some(now + self.tell_again_after);
        self.tell_again_after = (self.tell_again_after * 2).min(TELL_MAX);
        true
    }

    /// Wait until the next look is due.
    pub(crate) async fn pause(&mut self) {
        // Hosts that lost their database together do not come back together.
        tokio::time::sleep(self.pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    /// How long it took; None if nothing failed.
    pub(crate) fn took(&self) -> Option<Duration> {
        self.since.map(|since| since.elapsed())
    }
}

/// The advice that an error carries.
pub(crate) fn hint(error: &anyhow::Error) -> &'static str {
    let hint = error.chain().find_map(|cause| {
        let of_queue = cause.downcast_ref::<laelaps_queue::Error>().and_then(laelaps_queue::Error::hint);
        of_queue.or_else(|| cause.downcast_ref::<plugin::Error>().and_then(plugin::Error::hint))
    });
    hint.unwrap_or_default()
}

/// What is told of a wait.
pub(crate) enum News<'e> {
    /// It goes on, for this reason, after so long.
    Reason(&'e anyhow::Error, Duration),
    /// It is over, after so long.
    Over(Duration),
}

/// Do something until it succeeds, or fails for good.
///
/// # Errors
/// The failure for good.
pub(crate) async fn until_there<T>(
    mut look: impl AsyncFnMut() -> anyhow::Result<T>,
    tell: impl Fn(News<'_>),
) -> anyhow::Result<T> {
    let mut waiting = Waiting::new();
    loop {
        let error = match look().await {
            Ok(there) => {
                waiting.took().into_iter().for_each(|took| tell(News::Over(took)));
                return Ok(there);
            }
            Err(error) => error,
        };
        if !passes(&error) {
            return Err(error);
        }
        if waiting.failed(Instant::now()) {
            tell(News::Reason(&error, waiting.took().unwrap_or_default()));
        }
        waiting.pause().await;
    }
}

/// Tell the log of a wait for `what`.
fn told_in_log(what: &'static str) -> impl Fn(News<'_>) {
    move |news| match news {
        News::Reason(error, waited) => {
            let (error, hint, waited_s) = (chain(error.as_ref()), hint(error), waited.as_secs());
            tracing::error!(error, hint, waited_s, "{what} cannot be used yet; this host waits for it");
        }
        News::Over(waited) => tracing::info!(waited_s = waited.as_secs(), "{what} can be used; this host starts"),
    }
}

/// The same configuration, whose failures are known soon.
pub(crate) fn impatient(config: &laelaps_queue::Config) -> laelaps_queue::Config {
    laelaps_queue::Config { patience: config.patience.min(LOOK), ..config.clone() }
}

/// The queue of a configuration, once it can be used.
async fn queue(config: &Config) -> anyhow::Result<Queue> {
    let short = Config { queue: impatient(&config.queue), ..config.clone() };
    let look = async || {
        if short.queue != config.queue {
            host::open_queue(&short).await?.backend().close().await;
        }
        host::open_queue(config).await
    };
    until_there(look, told_in_log("the database")).await
}

/// Build the parts of a host that starts, waiting for what comes back by itself.
async fn parts(config: &Config) -> anyhow::Result<Parts> {
    let queue = queue(config).await?;
    let backend = queue.backend();
    until_there(
        async || Parts::on(config, Arc::clone(backend), None).await,
        told_in_log("the folder for plugins, or for compiled ones,"),
    )
    .await
}

/// What a start ended in.
enum Heard {
    Built(Box<Parts>),
    Again(Box<Config>),
    End,
}

/// Start: the parts of a host, and the configuration that they were built from. None if a signal ended it before.
///
/// # Errors
/// What somebody has to mend.
pub(crate) async fn begin(
    options: &Options,
    mut config: Config,
    log: &Log,
    signals: &mut Signals,
) -> anyhow::Result<Option<(Config, Parts)>> {
    loop {
        match Box::pin(built_or_told(&config, options, log, signals)).await? {
            Heard::Built(parts) => return Ok(Some((config, *parts))),
            Heard::End => return Ok(None),
            Heard::Again(next) => {
                host::take_over(options, &config, &next, log);
                config = *next;
            }
        }
    }
}

async fn built_or_told(config: &Config, options: &Options, log: &Log, signals: &mut Signals) -> anyhow::Result<Heard> {
    let building = Box::pin(parts(config));
    tokio::pin!(building);
    let mut ticks = tokio::time::interval(START_INTERVAL);
    loop {
        tokio::select! {
            built = &mut building => return built.map(|parts| Heard::Built(Box::new(parts))),
            _ = ticks.tick() => still_starting("waiting for the database, or compiling plugins"),
            verb = signals.next() => match verb {
                Verb::Shutdown(_) => {
                    let _ = sd_notify::notify(&[NotifyState::Stopping]);
                    return Ok(Heard::End);
                }
                Verb::Restart(_) => {
                    tracing::info!("reading the configuration again; the start begins anew with it");
                    if let Some(next) = host::load_again(&options.source, config).await {
                        return Ok(Heard::Again(Box::new(next)));
                    }
                }
                Verb::ReopenLogs => host::reopen_logs(log),
                // They are about to be read for the first time.
                Verb::Replace(_) => {}
            },
        }
    }
}

/// Tell the service manager that the start goes on, and what it waits for.
pub(crate) fn still_starting(status: &str) {
    // Without a service manager there is nobody to tell.
    let _ = sd_notify::notify(&[NotifyState::ExtendTimeoutUsec(START_EXTENSION_US), NotifyState::Status(status)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_told_at_once_and_then_at_growing_intervals() {
        let mut waiting = Waiting::new();
        let begun = Instant::now();
        let told: Vec<u64> = (0..7_200).filter(|second| waiting.failed(begun + Duration::from_secs(*second))).collect();
        assert_eq!(told[..8], [0, 10, 30, 70, 150, 310, 630, 1_230]);
        assert!(told.windows(2).all(|pair| pair[1] - pair[0] <= TELL_MAX.as_secs()), "{told:?}");
    }

    #[test]
    fn a_folder_that_does_not_answer_is_waited_for_and_one_that_is_missing_is_not() {
        let fault = |kind| {
            let source = io::Error::from(kind);
            passes(&anyhow::Error::from(plugin::Error::Folder { folder: "plugins".into(), source }).context("while starting"))
        };
        assert!(fault(io::ErrorKind::StaleNetworkFileHandle) && fault(io::ErrorKind::TimedOut));
        assert!(!fault(io::ErrorKind::NotFound) && !fault(io::ErrorKind::PermissionDenied));
        let cache = |source| {
            let problem = "cannot be made".to_owned();
            passes(&anyhow::Error::from(plugin::Error::Cache { folder: "cache".into(), problem, source }))
        };
        assert!(cache(Some(io::ErrorKind::StorageFull.into())), "somebody makes room, or clean-up does");
        assert!(!cache(Some(io::ErrorKind::NotADirectory.into())) && !cache(None));
        assert!(!passes(&anyhow::anyhow!("anything else")));
    }
}
