//! The composition root: load, build, serve, drain, and again with the next configuration.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use laelaps_queue::{Backend, Database, Queue, SchemaStatus};

use crate::audit;
use crate::config::{self, Config};
use crate::intake::Intake;
use crate::log::Log;
use crate::plugin;
use crate::pulse::Pulse;
use crate::service::{self, Next};
use crate::signals::Signals;
use crate::start;

/// How `laelaps run` was called.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which section of which file.
    pub source: config::Source,
    /// Instead of the configuration's `log`.
    pub log: Option<PathBuf>,
    /// Holds the process number while the host runs.
    pub pid_file: Option<PathBuf>,
}

/// Serve until a signal ends it.
///
/// # Errors
/// What keeps the host from starting, or makes it end by itself. A configuration that fails on a restart does neither.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let mut signals = Signals::install().context("cannot take over the process's signals")?;
    let config = Config::load(&options.source)?;
    let log_path = options.log_path(&config);
    let log = Log::start(log_path, &config.log_filter)
        .with_context(|| format!("cannot open the log {}", log_path.unwrap_or(Path::new("-")).display()))?;
    audit::start(&config);
    audit::configuration(&config, "start");
    let served = serve(&options, config, &log, &mut signals).await;
    if let Err(error) = &served
        && log.path().is_some()
    {
        // Whoever looks for the reason looks there first.
        tracing::error!(error = format!("{error:#}"), "this host ends");
    }
    served
}

async fn serve(options: &Options, config: Config, log: &Log, signals: &mut Signals) -> anyhow::Result<()> {
    let _pid_file = options.pid_file.as_deref().map(PidFile::create).transpose()?;
    let Some((mut config, mut parts)) = start::begin(options, config, log, signals).await? else {
        tracing::info!("ended before it began");
        return Ok(());
    };
    let mut is_first = true;
    loop {
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        match service::serve(&config, &parts, options, log, signals, std::mem::take(&mut is_first)).await? {
            Next::End => break,
            Next::Again => {}
            Next::Restart(next) => {
                let (next_config, next_parts) = *next;
                take_over(options, &config, &next_config, log);
                parts.close_unless_kept_by(Some(&next_parts)).await;
                (config, parts) = (next_config, next_parts);
            }
        }
    }
    parts.close_unless_kept_by(None).await;
    tracing::info!("ended");
    Ok(())
}

/// Let the log and the audit log be as another configuration says.
pub(crate) fn take_over(options: &Options, config: &Config, next: &Config, log: &Log) {
    if options.log_path(next) != options.log_path(config)
        && let Err(error) = log.reopen(options.log_path(next))
    {
        tracing::error!(%error, "cannot open the log of the new configuration; the old one stays");
    }
    audit::start(next);
    audit::configuration(next, "restart");
    if next.log_filter != config.log_filter
        && let Err(error) = log.filter(&next.log_filter)
    {
        tracing::error!(%error, "cannot use the log level of the new configuration; the old one stays");
    }
}

/// Read the configuration again. None if it cannot be used, which is told: the old one stays in force.
pub(crate) async fn load_again(source: &config::Source, old: &Config) -> Option<Config> {
    let source = source.clone();
    let loaded = tokio::task::spawn_blocking(move || Config::load(&source)).await;
    match loaded.map_err(anyhow::Error::from).and_then(|loaded| Ok(loaded?)) {
        Ok(next) => Some(next),
        Err(error) => {
            refuse(&error, old);
            None
        }
    }
}

/// Tell that a new configuration cannot be used.
pub(crate) fn refuse(error: &anyhow::Error, old: &Config) {
    audit::prepare(old);
    audit::configuration_refused(old);
    tracing::error!(error = format!("{error:#}"), "the new configuration cannot be used; the old one stays in force");
}

/// Open the log and the audit log anew, after a rotation.
pub(crate) fn reopen_logs(log: &Log) {
    audit::reopen();
    match log.reopen(log.path().as_deref()) {
        Ok(()) => tracing::info!("log reopened"),
        Err(error) => tracing::error!(%error, "cannot reopen the log; the old file stays"),
    }
}

impl Options {
    /// Where the log goes under a configuration.
    pub(crate) fn log_path<'a>(&'a self, config: &'a Config) -> Option<&'a Path> {
        self.log.as_deref().or(config.log.as_deref())
    }
}

/// What outlives a restart if the new configuration leaves it as it is.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) engine: Arc<plugin::Engine>,
    pub(crate) store: Arc<plugin::Store>,
    /// Whether this host is well, which its fleet and a WatchdogQueue ask before each sign of life; none if it is in neither.
    pub(crate) pulse: Option<Arc<Pulse>>,
    /// The queue of ZooKeeper's whose items are taken.
    pub(crate) intake: Option<Arc<Intake>>,
    queue: laelaps_queue::Config,
    plugins: plugin::Config,
}

impl Parts {
    /// Open the database and the plugin folder, or take over what another configuration has opened.
    pub(crate) async fn build(config: &Config, old: Option<&Self>) -> anyhow::Result<Self> {
        let backend = match old.filter(|old| old.queue == config.queue) {
            Some(old) => Arc::clone(&old.backend),
            None => Arc::clone(open_queue(config).await?.backend()),
        };
        Self::on(config, backend, old).await
    }

    /// The rest of them, on a database that is open.
    pub(crate) async fn on(config: &Config, backend: Arc<dyn Backend>, old: Option<&Self>) -> anyhow::Result<Self> {
        let (engine, store) = match old.filter(|old| old.plugins == config.plugins) {
            Some(old) => (Arc::clone(&old.engine), Arc::clone(&old.store)),
            None => {
                let engine = plugin::Engine::new(&config.plugins).context("cannot start the plugin engine")?;
                let store = plugin::Store::open(Arc::clone(&engine), config.plugins.clone()).await?;
                (engine, store)
            }
        };
        let pulse = pulse_limit(config).map(|limit| {
            let kept = old.filter(|old| Arc::ptr_eq(&old.backend, &backend) && Arc::ptr_eq(&old.engine, &engine));
            let kept = kept.and_then(|old| old.pulse.clone()).filter(|pulse| pulse.limit() == limit);
            kept.unwrap_or_else(|| Arc::new(Pulse::start(limit, Arc::clone(&backend), Arc::clone(&engine))))
        });
        let intake = config.watchdog_queue.as_ref().zip(pulse.as_ref()).map(|(intake, pulse)| {
            let same_pulse = old.filter(|old| old.pulse.as_ref().is_some_and(|old| Arc::ptr_eq(old, pulse)));
            let kept = same_pulse.and_then(|old| old.intake.clone()).filter(|old| old.config() == intake);
            kept.unwrap_or_else(|| Arc::new(Intake::start(intake.clone(), backend.clone(), Arc::clone(pulse))))
        });
        Ok(Self { backend, engine, store, pulse, intake, queue: config.queue.clone(), plugins: config.plugins.clone() })
    }

    async fn close_unless_kept_by(self, next: Option<&Self>) {
        let next_intake = next.and_then(|next| next.intake.as_ref());
        if let Some(intake) = &self.intake
            && !next_intake.is_some_and(|next| Arc::ptr_eq(next, intake))
        {
            intake.close().await;
        }
        if !next.is_some_and(|next| Arc::ptr_eq(&next.backend, &self.backend)) {
            self.backend.close().await;
        }
    }
}

/// How long a part of this host may be silent before its watchdogs hear of it: half of what they wait for themselves.
fn pulse_limit(config: &Config) -> Option<Duration> {
    let fleet = config.watchdog.as_ref().map(|fleet| fleet.timer);
    let intake = config.watchdog_queue.as_ref().map(|intake| intake.kick_interval * 5);
    fleet.into_iter().chain(config.host_timeout).chain(intake).min().map(|timer| timer / 2)
}

/// The queue of a configuration, which has to be there with a schema that admits this program: only `laelaps init` makes one.
pub(crate) async fn open_queue(config: &Config) -> anyhow::Result<Queue> {
    if let Database::Sqlite(path) = config.queue.database()?
        && !path.exists()
    {
        // Opening it would leave an empty file behind.
        return Err(laelaps_queue::Error::NotInitialised).with_context(|| format!("there is no database {}", path.display()));
    }
    let queue = Queue::open(&config.queue).await?;
    if let Err(unfit) = fit(config, &queue.schema_status().await?) {
        queue.close().await;
        return Err(unfit);
    }
    Ok(queue)
}

/// The version of a schema that this program can use.
pub(crate) fn fit(config: &Config, status: &SchemaStatus) -> anyhow::Result<i64> {
    status.fits().with_context(|| format!("cannot use the database {}", config.queue.place()))
}

/// The process number in a file, locked while the host runs, so that a second host refuses the same file and a stale one does not matter.
struct PidFile {
    path: PathBuf,
    _locked: File,
}

impl PidFile {
    fn create(path: &Path) -> anyhow::Result<Self> {
        let failed = || format!("cannot write the process number to {}", path.display());
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path).with_context(failed)?;
        if file.try_lock().is_err() {
            let holder = std::fs::read_to_string(path).unwrap_or_default();
            anyhow::bail!("{}: a running host (process {}) holds this file", path.display(), holder.trim());
        }
        file.set_len(0).with_context(failed)?;
        writeln!(file, "{}", std::process::id()).with_context(failed)?;
        Ok(Self { path: path.to_path_buf(), _locked: file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Gone already, or in a folder that has become read-only: the lock is what counts.
        let _ = std::fs::remove_file(&self.path);
    }
}
