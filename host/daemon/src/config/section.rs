//! The keys of a section, with their defaults and bounds.
//!
//! PerfectQueue's keys keep their names, units and defaults (those of its README). Where its processes have no counterpart here, the key
//! means what comes closest, and docs/configuration.md says so; a key without any effect is accepted and warned about.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use laelaps_queue::{Backoff, Kind, Policy};
use serde_yaml::{Mapping, Value};

use super::database::{self, Place};
use super::document::Report;
use super::grants::{self, Own};
use super::keys::{Keys, Unknown, describe};
use super::quantity::{YEARS_10, tell_size};
use super::{Config, Error, Lookup, Route, machine, queues, route, watchdog};
use crate::{fault, plugin};

const DAY: Duration = Duration::from_secs(24 * 3600);
const HOUR: Duration = Duration::from_secs(3600);

/// The key of how long a task has to be suspected before it is given up. In no route: who finds a task lost knows none.
pub(super) const SUSPICION: &str = "suspicion_time";

/// Times that a task waits or is kept.
pub(super) const RETENTION: RangeInclusive<Duration> = Duration::ZERO..=YEARS_10;
pub(super) const WAIT: RangeInclusive<Duration> = Duration::ZERO..=YEARS_10;
const MEMORY_TOTAL: RangeInclusive<u64> = 1 << 20..=1 << 46;
pub(super) const ATTEMPTS: RangeInclusive<u32> = 1..=1_000_000;

/// Instances beyond the processors: for the self-test of a new version, and for threads whose stopped attempt has not left them yet.
const INSTANCES_SPARE: u32 = 16;

/// PerfectQueue's keys that have nothing to act on here.
const WITHOUT_EFFECT: [(&str, &str); 6] = [
    ("child_kill_interval", "a stop takes effect within 100 ms and is not repeated"),
    ("processor_type", "tasks run as components, neither in processes nor in Ruby threads"),
    ("detach_wait", "nothing restarts, so nothing is detached"),
    ("child_fork_frequency_limit", "there are no child processes"),
    ("child_heartbeat_kill_delay", "there are no child processes"),
    ("debug", "there is no Ruby console"),
];

/// Turn the keys into a configuration.
pub(super) fn validate(
    path: PathBuf,
    environment: String,
    mapping: Mapping,
    mut report: Report,
    lookup: &Lookup<'_>,
) -> Result<Config, Error> {
    let mut keys = Keys::new(mapping, Vec::new(), &mut report);
    let cleanup_interval = keys.whole("cleanup_interval", 0..=1_000_000).unwrap_or(20);
    let Place { url, kind, connections, unknown } = database::place(&mut keys, cleanup_interval, lookup);
    let policy = policy(&mut keys, &Policy::default());
    let suspicion = keys.duration(SUSPICION, WAIT).unwrap_or(policy.suspicion);
    let policy = Policy { suspicion, ..policy };
    let children = children(&mut keys);
    let (task_heartbeat_interval, alive_time) = lease(&mut keys);
    let log = keys.text("log", "the path of a file").map(PathBuf::from);
    let audit_log = keys.text("audit_log", "the path of a file").map(PathBuf::from);
    let log_filter = log_filter(&mut keys, lookup);
    let host_name = keys.text("host_name", "a name for this host").unwrap_or_else(machine_name);
    let is_usual = !keys.has("processors");
    let processors = keys.whole("processors", 1..=1024).or(is_usual.then_some(1));
    let queues = queues::read(&mut keys, &kind, processors);
    let processors = processors.unwrap_or(1);
    let poll_interval = keys.duration("poll_interval", Duration::from_millis(10)..=HOUR).unwrap_or(Duration::from_secs(1));
    let task_prefetch = keys.whole("task_prefetch", 0..=1000).unwrap_or(0);
    let memory_total = keys.size_or("memory_total", MEMORY_TOTAL, "unlimited");
    let disable_resource_limit = keys.yes_or_no("disable_resource_limit").unwrap_or(false);
    let patience = keys.duration("pq_connect_timeout", Duration::ZERO..=HOUR).unwrap_or(Duration::from_secs(20));
    for (key, reason) in WITHOUT_EFFECT {
        if keys.take(key).is_some() {
            keys.warn(key, &format!("has no effect: {reason}"));
        }
    }
    let has_watchdog = keys.has("watchdog");
    let fleet = watchdog::fleet(&mut keys, lookup);
    let host_timeout = watchdog::host_timeout(&mut keys, has_watchdog, &url, &kind);
    let watchdog_queue = watchdog::intake(&mut keys, fleet.as_ref(), &host_name, lookup);
    let plugins = plugins(&mut keys, processors);
    let routes = route::read_all(&mut keys, &policy, &kind, lookup);
    let is_counted = policy.max_attempts.is_some() || routes.iter().any(|route| route.policy.max_attempts.is_some());
    if matches!(&kind, Kind::PerfectQueue(table) if !table.side_table) && is_counted {
        let problem = "PerfectQueue's table has no place for a count of attempts".to_owned();
        keys.problem(
            "max_attempts",
            problem,
            Some("add `side_table: true`, or take max_attempts out of the section and its routes"),
        );
    }
    let memory_bytes_max = routes.iter().map(|route: &Route| route.limits.memory_bytes);
    let memory_bytes_max = memory_bytes_max.fold(plugin::Limits::default().memory_bytes, u64::max);
    if let Some(Some(total)) = memory_total
        && let Some(largest) = routes.iter().map(|route| route.limits.memory_bytes).max().filter(|largest| *largest > total)
    {
        let (total, largest) = (tell_size(total), tell_size(largest));
        let message = format!("{total} is less than one attempt may have ({largest}): such tasks run one at a time");
        keys.warn("memory_total", &message);
    }
    keys.finish(unknown);
    grants::refuse_nested(&routes, &own(&path, &url, &plugins, [log.as_deref(), audit_log.as_deref()]), &mut report);

    if report.has_problems() {
        return Err(report.into_error());
    }
    Ok(Config {
        path,
        digest: String::new(),
        environment,
        queue: laelaps_queue::Config { url, kind, policy, patience, connections, later_steps: fault::later_steps() },
        log,
        audit_log,
        log_filter,
        host_name,
        memory_total: memory_total.unwrap_or_else(machine::memory_share),
        processors,
        queues,
        poll_interval,
        task_heartbeat_interval,
        alive_time,
        task_prefetch,
        child_graceful_kill_limit: children.graceful_kill_limit,
        child_heartbeat_interval: children.heartbeat_interval,
        child_heartbeat_limit: children.heartbeat_limit,
        max_request_per_child: children.max_request,
        disable_resource_limit,
        cleanup_interval,
        plugins: plugin::Config { memory_bytes_max, ..plugins },
        host_timeout,
        watchdog: fleet,
        watchdog_queue,
        routes,
        warnings: report.into_warnings(),
    })
}

/// Where the host's own files are.
fn own(configuration: &Path, url: &str, plugins: &plugin::Config, [log, audit_log]: [Option<&Path>; 2]) -> Vec<Own> {
    let queue = url.strip_prefix("sqlite:").map(|file| file.trim_start_matches("//").split('?').next().unwrap_or_default());
    let all = [
        (None, "the configuration file", Some(configuration.to_path_buf())),
        (Some("plugins"), "the plugin folder", Some(plugins.folder.join("NAME.wasm"))),
        (Some("plugin_cache"), "the folder for compiled code", plugins.cache_folder.as_ref().map(|folder| folder.join("NAME"))),
        (Some("url"), "the queue's file", queue.map(PathBuf::from)),
        (Some("log"), "the log file", log.map(Path::to_path_buf)),
        (Some("audit_log"), "the audit log", audit_log.map(Path::to_path_buf)),
    ];
    all.into_iter().filter_map(|(key, what, path)| Some(Own { key, what, path: path? })).collect()
}

fn log_filter(keys: &mut Keys<'_>, lookup: &Lookup<'_>) -> String {
    const EXPECTED: &str = "a level (error, warn, info, debug, trace), or levels by module such as \"warn,laelaps=debug\"";
    let understood = |filter: &str| tracing_subscriber::EnvFilter::builder().parse(filter).is_ok();
    let own = keys.text("log_level", EXPECTED).unwrap_or_else(|| "info".to_owned());
    if !understood(&own) {
        keys.problem("log_level", format!("found {own:?}, expected {EXPECTED}"), None);
    }
    match lookup("LAELAPS_LOG") {
        Some(filter) if understood(&filter) => filter,
        Some(filter) => {
            let message = format!("the environment variable LAELAPS_LOG holds {filter:?}, expected {EXPECTED}");
            keys.problem("log_level", message, Some("unset LAELAPS_LOG, or set it to a level"));
            own
        }
        None => own,
    }
}

fn machine_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn lease(keys: &mut Keys<'_>) -> (Duration, Duration) {
    let interval = keys.duration("task_heartbeat_interval", Duration::from_millis(30)..=HOUR);
    let alive_time = keys.duration("alive_time", Duration::from_millis(100)..=7 * DAY).unwrap_or(Duration::from_secs(300));
    // PerfectQueue's default, unless a short lease needs more.
    let interval = interval.unwrap_or(Duration::from_secs(2).min(alive_time / 3));
    if interval >= alive_time {
        let problem = "is not shorter than alive_time, so that every lease would end before its renewal".to_owned();
        keys.problem("task_heartbeat_interval", problem, Some("make it a third of alive_time or less, or leave it out"));
    }
    (interval, alive_time)
}

struct Children {
    graceful_kill_limit: Option<Duration>,
    heartbeat_interval: Duration,
    heartbeat_limit: Duration,
    max_request: Option<u32>,
}

fn children(keys: &mut Keys<'_>) -> Children {
    let interval = Duration::from_millis(100)..=HOUR;
    let graceful_kill_limit = keys.duration_or("child_graceful_kill_limit", Duration::ZERO..=30 * DAY, "never").flatten();
    let heartbeat_interval = keys.duration("child_heartbeat_interval", interval.clone());
    let keepalive_interval = keys.duration("child_keepalive_interval", interval);
    if heartbeat_interval.is_some() && keepalive_interval.is_some() {
        keys.warn("child_heartbeat_interval", "has no effect: child_keepalive_interval, its other name, wins over it");
    }
    let own_interval = keepalive_interval.or(heartbeat_interval);
    let own_limit = keys.duration("child_heartbeat_limit", Duration::from_secs(1)..=DAY);
    // PerfectQueue's defaults, unless the one that is given leaves no room for the other.
    let heartbeat_interval =
        own_interval.unwrap_or_else(|| Duration::from_secs(2).min(own_limit.map_or(Duration::MAX, |limit| limit / 3)));
    let heartbeat_limit = own_limit.unwrap_or(Duration::from_secs(10).max(heartbeat_interval * 3));
    if heartbeat_limit <= heartbeat_interval {
        let problem = "is not longer than child_heartbeat_interval, so that every guest would count as stuck".to_owned();
        let hint = "make it three times child_heartbeat_interval or more, or leave it out";
        keys.problem("child_heartbeat_limit", problem, Some(hint));
    }
    // PerfectQueue's default, no limit, would use an instance for ever here, where a fresh one costs next to nothing: no number, no reuse.
    let max_request = keys.whole("max_request_per_child", 1..=1_000_000);
    Children { graceful_kill_limit, heartbeat_interval, heartbeat_limit, max_request }
}

fn plugins(keys: &mut Keys<'_>, processors: u32) -> plugin::Config {
    let folder = keys.text("plugins", "the path of a folder").map_or_else(|| PathBuf::from("plugins"), PathBuf::from);
    let cache_folder = keys.text("plugin_cache", "the path of a folder").map(PathBuf::from);
    let poll_interval = keys.duration("plugin_poll_interval", Duration::from_millis(100)..=DAY).unwrap_or(Duration::from_secs(5));
    plugin::Config {
        folder,
        cache_folder,
        poll_interval,
        instances_max: processors + INSTANCES_SPARE,
        ..plugin::Config::default()
    }
}

/// What follows outcomes: the keys that stand in the section, and again in a route, where the section's are the defaults.
pub(super) fn policy(keys: &mut Keys<'_>, defaults: &Policy) -> Policy {
    let own_wait = keys.duration("retry_wait", WAIT);
    let retry_wait = own_wait.unwrap_or(defaults.retry_wait);
    let backoff = backoff(keys, retry_wait).unwrap_or_else(|| match (&defaults.backoff, own_wait) {
        (Backoff::Fixed(_), Some(wait)) => Backoff::Fixed(wait),
        (backoff, _) => backoff.clone(),
    });
    Policy {
        backoff,
        retry_wait,
        retention: keys.duration("retention_time", RETENTION).unwrap_or(defaults.retention),
        failed_retention: keys.duration("failed_retention_time", RETENTION).unwrap_or(defaults.failed_retention),
        max_attempts: keys.whole_or("max_attempts", ATTEMPTS, "unlimited").unwrap_or(defaults.max_attempts),
        suspicion: defaults.suspicion,
    }
}

fn backoff(keys: &mut Keys<'_>, retry_wait: Duration) -> Option<Backoff> {
    const EXPECTED: &str = "`fixed`, `exponential`, or a mapping of first, factor, max and jitter";
    match keys.take("backoff")? {
        Value::String(word) if word == "fixed" => Some(Backoff::Fixed(retry_wait)),
        Value::String(word) if word == "exponential" => {
            Some(exponential(&mut Keys::new(Mapping::new(), keys.place("backoff"), keys.report)))
        }
        Value::Mapping(mapping) => {
            let mut keys = Keys::new(mapping, keys.place("backoff"), keys.report);
            let backoff = exponential(&mut keys);
            keys.finish(Unknown::Refuse);
            Some(backoff)
        }
        other => {
            keys.problem("backoff", format!("found {}, expected {EXPECTED}", describe(&other)), None);
            None
        }
    }
}

fn exponential(keys: &mut Keys<'_>) -> Backoff {
    let first = keys.duration("first", Duration::from_millis(1)..=YEARS_10).unwrap_or(Duration::from_secs(1));
    let max = keys.duration("max", Duration::from_millis(1)..=YEARS_10).unwrap_or(HOUR.max(first));
    let factor = keys.number("factor", 1.0..=10.0).unwrap_or(2.0);
    let jitter = keys.number("jitter", 0.0..=1.0).unwrap_or(0.2);
    if max < first {
        keys.problem("max", "is shorter than first".to_owned(), Some("make it as long as first, or longer"));
    }
    Backoff::Exponential { first, factor, max, jitter }
}
