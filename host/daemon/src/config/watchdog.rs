//! The keys of ZooKeeper's two uses: `watchdog`, the fleet that this host is in, and `watchdog_queue`, the queue whose items it takes.

use std::ops::RangeInclusive;
use std::time::Duration;

use laelaps_queue::{Kind, NewTask};
use laelaps_watchdog::{Access, Digest, Root};

use super::Lookup;
use super::keys::{Keys, Unknown, describe};
use crate::fleet::{self, ZooKeeper};
use crate::intake;

const SESSION_TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3_600);
const TIMER: RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(3_600);
const HOST_TIMEOUT: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3_600);
const KICK: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3_600);

/// Bytes of a root's path at most where its items become tasks, so that their keys stay short.
const ROOT_BYTES_MAX: usize = 200;

/// The fleet, if the section has one.
pub(super) fn fleet(keys: &mut Keys<'_>, lookup: &Lookup<'_>) -> Option<fleet::Config> {
    let mut keys = keys.mapping("watchdog", "a mapping of servers, root, timer and so on")?;
    let zookeeper = zookeeper(&mut keys, None, lookup);
    let root = root(&mut keys, "root", "the path of the fleet's own root, one for each database", "/laelaps/fleet");
    let timer = keys.duration("timer", TIMER).unwrap_or(Duration::from_secs(15));
    keys.finish(Unknown::Refuse);
    Some(fleet::Config { zookeeper: zookeeper?, root: root?, timer })
}

/// How long a host may go without a sign of life in the database; none if the fleet does not go by such signs. `has_watchdog`: it has ZooKeeper.
/// Where nothing is said, a fleet on a server has them unless it has ZooKeeper.
pub(super) fn host_timeout(keys: &mut Keys<'_>, has_watchdog: bool, url: &str, kind: &Kind) -> Option<Duration> {
    const EXPECTED: &str = "`database` or `none`";
    let timeout = keys.duration("host_timeout", HOST_TIMEOUT);
    let wanted = keys.take("fleet");
    let wants = match wanted.as_ref().map(|value| (value, value.as_str())) {
        None => None,
        Some((_, Some("database"))) => Some(true),
        Some((_, Some("none"))) => Some(false),
        Some((other, _)) => {
            let problem = format!("found {}, expected {EXPECTED}", describe(other));
            keys.problem("fleet", problem, Some("for a fleet in ZooKeeper leave the key out, and add `watchdog`"));
            return None;
        }
    };
    if wants.is_some() && has_watchdog {
        let problem = "`watchdog` stands beside it, by which ZooKeeper tells who is alive".to_owned();
        keys.problem("fleet", problem, Some("remove one of them"));
        return None;
    }
    let is_embedded = url.starts_with("sqlite:");
    let (is_kept, instead) = match kind {
        _ if has_watchdog => (false, "with `watchdog`, its `timer` and `session_timeout` say how long a host may be silent"),
        _ if wants == Some(false) => (false, "with `fleet: none` a dead host's tasks are left to their leases"),
        Kind::PerfectQueue(_) => (false, "PerfectQueue's table has no place for signs of life"),
        Kind::Native if is_embedded => (false, "on SQLite the lock of a file beside the database tells dead hosts at once"),
        Kind::Native => (true, ""),
    };
    if wants == Some(true) && matches!(kind, Kind::PerfectQueue(_)) {
        keys.problem("fleet", instead.to_owned(), Some("remove the key; with `watchdog` and `side_table` ZooKeeper does it"));
    } else if wants == Some(true) && !is_kept {
        keys.warn("fleet", &format!("has no effect: {instead}"));
    }
    if timeout.is_some() && !is_kept {
        keys.warn("host_timeout", &format!("has no effect: {instead}"));
    }
    is_kept.then(|| timeout.unwrap_or(Duration::from_secs(10)))
}

/// The queue whose items become tasks, if the section has one. Where it says nothing about ZooKeeper, the fleet's counts.
pub(super) fn intake(
    keys: &mut Keys<'_>,
    fleet: Option<&fleet::Config>,
    host_name: &str,
    lookup: &Lookup<'_>,
) -> Option<intake::Config> {
    let mut keys = keys.mapping("watchdog_queue", "a mapping of servers, root, markers, type and so on")?;
    let zookeeper = zookeeper(&mut keys, fleet.map(|fleet| &fleet.zookeeper), lookup);
    let root = root(&mut keys, "root", "the path of the queue's root", "/night").filter(|root| {
        let fits = root.path().len() <= ROOT_BYTES_MAX;
        if !fits {
            let found = root.path().len();
            keys.problem(
                "root",
                format!("has {found} bytes, at most {ROOT_BYTES_MAX} are allowed where items become tasks"),
                None,
            );
        }
        fits
    });
    let markers = self::root(&mut keys, "markers", "the path of a root of our own, one for each database", "/laelaps/markers");
    if let (Some(root), Some(markers)) = (&root, &markers)
        && (root == markers || fleet.is_some_and(|fleet| fleet.root == *markers || fleet.root == *root))
    {
        keys.problem_here(
            "two of its roots, or one of them and the fleet's, are the same".to_owned(),
            Some("give each a path of its own"),
        );
    }
    let kick_interval = keys.duration("kick_interval", KICK).unwrap_or(Duration::from_secs(10));
    let process = keys.text("process", "what the master sees of this host");
    let process = process.unwrap_or_else(|| format!("{host_name}:{}", std::process::id()));
    let task_type = task_type(&mut keys);
    let user = keys.text("user", "the user of the tasks").filter(|user| name_fits(&mut keys, "user", user));
    let json = keys.yes_or_no("json").unwrap_or(false);
    keys.finish(Unknown::Refuse);
    Some(intake::Config {
        zookeeper: zookeeper?,
        root: root?,
        markers: markers?,
        kick_interval,
        process,
        task_type: task_type?,
        user,
        json,
    })
}

fn task_type(keys: &mut Keys<'_>) -> Option<String> {
    if !keys.has("type") {
        keys.take("type");
        let problem = "the key is missing, expected the type of the tasks that items become".to_owned();
        keys.problem("type", problem, Some("add `type: TYPE`, and a route that takes it"));
        return None;
    }
    let task_type = keys.text("type", "the type of the tasks that items become")?;
    name_fits(keys, "type", &task_type).then_some(task_type)
}

fn name_fits(keys: &mut Keys<'_>, key: &str, name: &str) -> bool {
    let fits = name.len() <= NewTask::NAME_BYTES_MAX;
    if !fits {
        keys.problem(key, format!("has {} bytes, at most {} are allowed", name.len(), NewTask::NAME_BYTES_MAX), None);
    }
    fits
}

fn zookeeper(keys: &mut Keys<'_>, default: Option<&ZooKeeper>, lookup: &Lookup<'_>) -> Option<ZooKeeper> {
    const SERVERS: &str = "ZooKeeper's servers, HOST:PORT separated by commas, with a chroot behind the last one if wanted";
    let own = keys.text("servers", SERVERS);
    if own.is_none() && default.is_none() {
        let problem = format!("the key is missing, expected {SERVERS}");
        keys.problem("servers", problem, Some("add `servers: \"zoo1:2181,zoo2:2181,zoo3:2181\"`"));
    }
    let session_timeout = keys.duration("session_timeout", SESSION_TIMEOUT);
    let digest = keys.secret("digest", "USER:PASSWORD of ZooKeeper's scheme digest", lookup).and_then(|text| {
        // The error is ours to word: the secret must not be told.
        let digest = Digest::parse(&text);
        if digest.is_err() {
            keys.problem("digest", "expected USER:PASSWORD".to_owned(), None);
        }
        digest.ok()
    });
    let access = keys
        .text("access", "everybody, ourselves or SCHEME:ID:PERMISSIONS,...")
        .and_then(|text| Access::parse(&text).map_err(|error| keys.problem("access", error.to_string(), None)).ok());
    let zookeeper = ZooKeeper {
        servers: own.or_else(|| default.map(|default| default.servers.clone()))?,
        session_timeout: session_timeout.or(default.map(|default| default.session_timeout)).unwrap_or(Duration::from_secs(6)),
        digest: digest.or_else(|| default.and_then(|default| default.digest.clone())),
        access: access.or_else(|| default.map(|default| default.access.clone())).unwrap_or_default(),
    };
    match zookeeper.options().check() {
        Ok(()) => Some(zookeeper),
        Err(error) => {
            keys.problem_here(error.to_string(), None);
            None
        }
    }
}

fn root(keys: &mut Keys<'_>, key: &'static str, what: &str, example: &str) -> Option<Root> {
    if !keys.has(key) {
        keys.take(key);
        let hint = format!("add `{key}: {example}`");
        keys.problem(key, format!("the key is missing, expected {what}"), Some(&hint));
        return None;
    }
    let path = keys.text(key, what)?;
    Root::new(path).map_err(|error| keys.problem(key, error.to_string(), None)).ok()
}
