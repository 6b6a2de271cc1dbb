//! The configuration: one YAML file, and the environment. This module is the only reader of both.
//!
//! Authority: the file, whole and validated, or the configuration that is in force already; nothing in between. A file of PerfectQueue
//! works unchanged. Only the chosen section counts. Every mistake of a file is reported at once, each with its line.
//!
//! One rule for relative paths: they are relative to the working directory, as in PerfectQueue, as `sqlite:` URLs are everywhere, and as the
//! default `config/laelaps.yml` is itself. docs/configuration.md lists the keys.

mod database;
mod document;
mod error;
mod follow_ups;
mod grants;
mod keys;
mod machine;
mod quantity;
mod queues;
mod route;
mod routes;
mod section;
mod watchdog;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use error::{Error, Problem};
pub use queues::{Queues, ServedQueue};
pub use routes::Routes;

use crate::{fleet, intake, plugin};

/// Where a configuration is read from. Kept by a host, so that it can read its configuration again.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// The file. None: the first of [`Source::DEFAULT_PATHS`] that exists.
    pub path: Option<PathBuf>,
    /// The section. None: `LAELAPS_ENV`, else `RAILS_ENV`, else `development`.
    pub environment: Option<String>,
}

impl Source {
    /// Where the file is looked for, in order, if none is named.
    pub const DEFAULT_PATHS: [&str; 2] = ["config/laelaps.yml", "config/perfectqueue.yml"];
}

/// A validated configuration: the chosen section of one file.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file it came from.
    pub path: PathBuf,
    /// The sha256 of that file as it was read, in hexadecimal.
    pub digest: String,
    /// The name of the chosen section.
    pub environment: String,
    /// Where the tasks are.
    pub queue: laelaps_queue::Config,
    /// Where the log goes. None: standard error.
    pub log: Option<PathBuf>,
    /// Where it is noted who changed what the host runs. None: nowhere.
    pub audit_log: Option<PathBuf>,
    /// What goes into the log, in tracing's syntax: `info`, or `warn,laelaps=debug`. `LAELAPS_LOG` wins over the file.
    pub log_filter: String,
    /// How this host is called in the database and the log: `host_name`, else the machine's name.
    pub host_name: String,
    /// How much memory guests, their code, output and data may have before the host claims no more, in bytes. None: no bound.
    pub memory_total: Option<u64>,
    /// Tasks that run at once: 1 to 1,024.
    pub processors: u32,
    /// Which queues it serves.
    pub queues: Queues,
    /// Time between two looks for work while there is none.
    pub poll_interval: Duration,
    /// Time between two renewals of the leases.
    pub task_heartbeat_interval: Duration,
    /// How long a lease lasts unless renewed.
    pub alive_time: Duration,
    /// Tasks claimed beyond the free processors, so that the next is at hand: 0 to 1,000.
    pub task_prefetch: u32,
    /// How long a graceful stop waits before it becomes an immediate one. None: for ever.
    pub child_graceful_kill_limit: Option<Duration>,
    /// Time between two looks at the guests' threads.
    pub child_heartbeat_interval: Duration,
    /// How long a guest's thread may show no sign of life before it is given up.
    pub child_heartbeat_limit: Duration,
    /// Tasks that one instance of a component may serve, one after the other. None or 1: a fresh instance for every task.
    pub max_request_per_child: Option<u32>,
    /// Claim without looking at users.
    pub disable_resource_limit: bool,
    /// Claims that found something between two removals of tasks whose retention has ended, the first after a random part of it; 0: at
    /// every such claim.
    pub cleanup_interval: u32,
    /// Where the plugins are.
    pub plugins: plugin::Config,
    /// How long this host may go without a sign of life in the database before others hand on what it had: 1 s to 1 h. None: they do not go by
    /// such signs.
    pub host_timeout: Option<Duration>,
    /// The fleet in ZooKeeper that this host is in.
    pub watchdog: Option<fleet::Config>,
    /// The queue of ZooKeeper's whose items become tasks.
    pub watchdog_queue: Option<intake::Config>,
    /// The routes, in order.
    pub routes: Vec<Route>,
    /// What is odd, but no reason to refuse the file: each one line, with its place.
    pub warnings: Vec<String>,
}

/// Which tasks go to which plugin, and under what limits.
#[derive(Clone, Debug)]
pub struct Route {
    /// Its place among the routes, from 0.
    pub index: usize,
    /// Which types it takes.
    pub matcher: Matcher,
    /// The plugin: the name of its file, without `.wasm`.
    pub plugin: String,
    /// What an attempt may use.
    pub limits: plugin::Limits,
    /// What an attempt may reach.
    pub grants: plugin::Grants,
    /// What `context.setting` answers, sorted by name.
    pub settings: Arc<[(String, String)]>,
    /// What follows outcomes here.
    pub policy: laelaps_queue::Policy,
    /// The line of the file where it stands, from 1; 0 if that is not known.
    pub line: usize,
}

/// Which types a route takes.
#[derive(Clone, Debug)]
pub enum Matcher {
    /// Exactly this one.
    Exact(String),
    /// Every one in which this finds a match (unanchored).
    Pattern(regex::Regex),
}

impl Config {
    /// Read and validate the chosen section of the file.
    ///
    /// # Errors
    /// No file, a file that cannot be read, or all mistakes of the chosen section together. A file that is not YAML hides its other mistakes.
    pub fn load(source: &Source) -> Result<Self, Error> {
        Self::load_with(source, &process_environment)
    }

    /// As [`Config::load`], with another environment than the process's.
    fn load_with(source: &Source, environment: &Lookup<'_>) -> Result<Self, Error> {
        let path = match &source.path {
            Some(path) => path.clone(),
            None => default_path()?,
        };
        let name = source
            .environment
            .clone()
            .or_else(|| environment("LAELAPS_ENV"))
            .or_else(|| environment("RAILS_ENV"))
            .unwrap_or_else(|| "development".to_owned());
        let text = document::read(&path)?;
        let (mapping, report) = document::section(&path, &text, &name)?;
        let digest = plugin::Digest::of(text.as_bytes()).to_string();
        section::validate(path, name, mapping, report, environment).map(|config| Self { digest, ..config })
    }

    /// What is odd about the files and folders that the configuration names, as they are now: each one line. None of it keeps a host from
    /// starting, since all of it can be put right while the host runs.
    #[must_use]
    pub fn missing_files(&self) -> Vec<String> {
        let mut found = Vec::new();
        let place = |route: &Route| format!("{}:{}: route {}", self.path.display(), route.line, route.index + 1);
        for route in &self.routes {
            let file = self.plugins.folder.join(format!("{}.wasm", route.plugin));
            if !file.is_file() {
                found.push(format!("{}: there is no {} yet; its tasks wait until there is", place(route), file.display()));
            }
            for folder in &*route.grants.folders {
                if !folder.host.is_dir() {
                    found.push(format!("{}: the granted folder {} does not exist", place(route), folder.host.display()));
                }
            }
        }
        found
    }
}

impl Matcher {
    /// Whether a task type belongs here.
    #[must_use]
    pub fn matches(&self, task_type: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == task_type,
            Self::Pattern(pattern) => pattern.is_match(task_type),
        }
    }
}

/// How a variable of the environment is looked up: None if it is not set or empty.
type Lookup<'a> = dyn Fn(&str) -> Option<String> + 'a;

#[allow(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
fn process_environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The value of a variable of the environment; None if it is not set, or empty.
pub(crate) fn environment_variable(name: &str) -> Option<String> {
    process_environment(name)
}

/// A length of time as the configuration takes it, for a command's argument: a number of seconds, or text such as `5m`.
pub(crate) fn duration_argument(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(quantity::duration_from_seconds);
    let duration = seconds.or_else(|| quantity::duration_from_text(text)).filter(|duration| !duration.is_zero());
    duration.ok_or_else(|| "expected a number of seconds, or text such as 250ms or 5m".to_owned())
}

/// A size as the configuration takes it, for a command's argument: a number of bytes, or text such as `64MiB`; at most 4 GiB.
pub(crate) fn size_argument(text: &str) -> Result<u64, String> {
    let size = quantity::size_from_text(text).filter(|size| (64 << 10..=4 << 30).contains(size));
    size.ok_or_else(|| "expected a number of bytes, or text such as 64MiB; from 64 KiB to 4 GiB".to_owned())
}

fn default_path() -> Result<PathBuf, Error> {
    let found = Source::DEFAULT_PATHS.iter().map(Path::new).find(|path| path.exists());
    found.map(Path::to_path_buf).ok_or_else(|| Error::NoFile { tried: Source::DEFAULT_PATHS.iter().map(PathBuf::from).collect() })
}

#[cfg(test)]
mod tests;
