mod follow_ups;
mod properties;
mod queues;
mod refusals;

use std::time::Duration;

use laelaps_queue::{Backoff, Connections, Kind, PerfectQueue, Tls};

use super::*;

/// A file in a folder of its own.
fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("laelaps.yml");
    std::fs::write(&path, text).expect("a file");
    (folder, path)
}

fn load_in(text: &str, section: Option<&str>, environment: &[(&str, &str)]) -> Result<Config, Error> {
    let (_folder, path) = file(text);
    let source = Source { path: Some(path), environment: section.map(str::to_owned) };
    let lookup = |name: &str| environment.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
    Config::load_with(&source, &lookup)
}

fn load(text: &str) -> Result<Config, Error> {
    load_in(text, None, &[])
}

const MINIMAL: &str = "development:\n  type: rdb\n  url: sqlite:queue.db\n";

/// The minimal file and more keys in its section.
fn with(keys: &str) -> String {
    let indented: String = keys.lines().map(|line| format!("  {line}\n")).collect();
    format!("{MINIMAL}{indented}")
}

#[test]
fn a_minimal_file_has_perfectqueues_defaults() {
    let config = load(MINIMAL).expect("valid");
    assert_eq!(config.environment, "development");
    assert_eq!(config.queue.url, "sqlite:queue.db");
    assert_eq!(config.log, None);
    assert_eq!(config.processors, 1);
    assert_eq!(config.poll_interval, Duration::from_secs(1));
    assert_eq!(config.queue.policy.retention, Duration::from_secs(300));
    assert_eq!(config.task_heartbeat_interval, Duration::from_secs(2));
    assert_eq!(config.alive_time, Duration::from_secs(300));
    assert_eq!(config.queue.policy.retry_wait, Duration::from_secs(300));
    assert_eq!(config.queue.policy.backoff, Backoff::Fixed(Duration::from_secs(300)));
    assert_eq!(config.queue.policy.max_attempts, None);
    assert_eq!(config.queue.policy.suspicion, Duration::from_secs(3_600));
    assert_eq!(config.child_graceful_kill_limit, None);
    assert_eq!(config.child_heartbeat_interval, Duration::from_secs(2));
    assert_eq!(config.child_heartbeat_limit, Duration::from_secs(10));
    assert_eq!(config.max_request_per_child, None);
    assert_eq!(config.task_prefetch, 0);
    assert!(!config.disable_resource_limit);
    assert_eq!(config.cleanup_interval, 20);
    assert_eq!(config.queue.patience, Duration::from_secs(20));
}

#[test]
fn the_example_of_the_documentation_is_valid() {
    let page = include_str!("../../../../docs/configuration.md");
    let example = page.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
    for section in ["development", "production"] {
        let config = load_in(example, Some(section), &[("SMTP_HOST", "mail"), ("SMTP_PASSWORD", "secret")]).expect("valid");
        assert_eq!(config.routes.len(), 2);
        assert_eq!(config.warnings, [] as [String; 0]);
        let routes = Routes::new(config.routes);
        assert_eq!(routes.route("report.daily").map(|route| route.plugin.as_str()), Some("report"));
    }
}

#[test]
fn every_configuration_of_the_pages_is_valid() {
    let mut examples = 0;
    for page in [
        include_str!("../../../../README.md"),
        include_str!("../../../../docs/daemon.md"),
        include_str!("../../../../docs/perfectqueue.md"),
    ] {
        for example in page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
            let section = example.split(':').next().expect("a section");
            let config = load_in(example, Some(section), &[]).expect("valid");
            assert_eq!(config.warnings, [] as [String; 0], "{example}");
            assert!(!config.routes.is_empty(), "{example}");
            examples += 1;
        }
    }
    assert!(examples >= 3, "{examples}");
}

/// Where a key stands.
#[derive(Clone, Copy)]
enum Within {
    Section,
    Fleet,
    Intake,
    Route,
    FollowUps,
}

/// The rows of the tables of docs/configuration.md that tell of keys: each key with its default and what is allowed, and where it stands.
fn documented() -> Vec<(&'static str, &'static str, &'static str, Within)> {
    let part = |page: &'static str, heading: &str| page.split_once(heading).expect("the page has this part");
    let (section, rest) = part(include_str!("../../../../docs/configuration.md"), "\n`watchdog` is a mapping of");
    let (fleet, rest) = part(rest, "\n`watchdog_queue` is a mapping of");
    let (intake, rest) = part(rest, "\n## The plugins");
    let (plugins, rest) = part(rest, "\n## Routes");
    let (route, follow_ups) = part(rest, "\n### Follow-up tasks");
    let mut rows = Vec::new();
    let parts = [
        (section, Within::Section),
        (fleet, Within::Fleet),
        (intake, Within::Intake),
        (plugins, Within::Section),
        (route, Within::Route),
        (follow_ups, Within::FollowUps),
    ];
    for (page, within) in parts {
        for line in page.lines().filter(|line| line.starts_with("| `")) {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let [key, default, allowed, ..] = cells[..] else { panic!("four cells: {line}") };
            rows.push((key.trim_matches('`'), default, allowed, within));
        }
    }
    rows
}

/// A quantity as the page writes it: seconds, bytes or a bare number.
fn quantity(text: &str) -> Option<f64> {
    let (number, unit) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    let number: f64 = number.replace(',', "").parse().ok()?;
    let unit = match unit {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "h" => 3_600.0,
        "day" | "days" => 86_400.0,
        "years" => 365.0 * 86_400.0,
        "KiB" => 1_024.0,
        "MiB" => 1_048_576.0,
        "GiB" => 1_073_741_824.0,
        _ => return None,
    };
    Some(number * unit)
}

/// The configuration with this key (None: without it), without what differs from file to file.
fn with_key(key: &str, value: Option<&str>, within: Within) -> Result<String, Error> {
    // Keys that have an effect only there, and keys that bound one another and have to stand far enough apart.
    let (base, other) = match key {
        "connect_timeout" | "statement_timeout" | "max_connections" | "listen" | "host_timeout" => {
            ("{type: rdb, url: 'postgres://joe@db/q'", "")
        }
        "side_table" => ("{type: rdb_compat, url: 'mysql://joe@db/q', table: tasks", ""),
        "task_heartbeat_interval" => ("{type: rdb, url: 'sqlite:queue.db'", ", alive_time: 604800"),
        _ => ("{type: rdb, url: 'sqlite:queue.db'", ""),
    };
    let entry = value.map(|value| format!(", {key}: {value}")).unwrap_or_default();
    let entry = match within {
        Within::Section => entry,
        Within::Fleet => format!(", watchdog: {{servers: 'zoo:2181', root: /f{entry}}}"),
        Within::Intake => format!(", watchdog_queue: {{servers: 'zoo:2181', root: /q, markers: /m, type: t{entry}}}"),
        Within::Route => format!(", routes: [{{type: a, plugin: p{entry}}}]"),
        Within::FollowUps => {
            let entry = entry.trim_start_matches(", ");
            format!(", routes: [{{type: a, plugin: p, grants: {{follow_ups: {{{entry}}}}}}}]")
        }
    };
    let mut config = load(&format!("development: {base}{other}{entry}}}"))?;
    config.path = PathBuf::new();
    config.digest.clear();
    config.warnings.clear();
    Ok(format!("{config:?}"))
}

#[test]
fn the_documented_bounds_are_those_that_are_kept() {
    let mut compared = 0;
    for (key, _, allowed, within) in documented() {
        let Some((lowest, highest)) = allowed.split_once(" to ") else { continue };
        let (Some(lowest), Some(highest)) = (quantity(lowest), quantity(highest)) else { continue };
        for good in [lowest, highest] {
            assert!(with_key(key, Some(&good.to_string()), within).is_ok(), "{key}: {good} is allowed: {allowed}");
        }
        for bad in [highest * 1.1 + 1.0, if lowest > 1.0 { lowest - 1.0 } else { lowest / 2.0 - 0.001 }] {
            let bad = if lowest.fract() == 0.0 && highest.fract() == 0.0 { bad.floor() } else { bad };
            assert!(with_key(key, Some(&bad.to_string()), within).is_err(), "{key}: {bad} is not allowed: {allowed}");
        }
        compared += 1;
    }
    assert!(compared >= 24, "{compared} keys have bounds");
}

#[test]
fn the_documented_defaults_are_those_that_count() {
    let mut compared = 0;
    for (key, default, _, within) in documented() {
        let default = default.split(", ").flat_map(|part| part.split(';')).next().expect("a first").trim_matches('`');
        let value = match quantity(default) {
            Some(number) => number.to_string(),
            None if ["true", "false", "fixed", "never", "unlimited", "info", "plugins", "own"].contains(&default) => {
                default.to_owned()
            }
            // In words: there is nothing to be written in its place.
            None => continue,
        };
        let without = with_key(key, None, within).expect("valid");
        assert_eq!(with_key(key, Some(&value), within).expect("a default is allowed"), without, "{key}: {default}");
        compared += 1;
    }
    assert!(compared >= 24, "{compared} keys have defaults");
}

#[test]
fn every_key_of_a_section_is_documented() {
    let page = include_str!("../../../../docs/configuration.md");
    // The message for a key without likeness to another names all that are known there.
    let known = |text: &str| -> Vec<String> {
        let Err(Error::Invalid { problems, .. }) = load(text) else { panic!("refused") };
        let hint = problems.iter().find_map(|problem| problem.hint.clone()).expect("a hint");
        let names = hint.strip_prefix("known here: ").expect("the known keys").split(", ");
        names.map(str::to_owned).collect()
    };
    let section = known(&with("zzzzzz: 1"));
    let route = known(&with("routes:\n- {type: a, plugin: p, zzzzzz: 1}"));
    let fleet = known(&with("watchdog: {servers: 'zoo:2181', root: /f, zzzzzz: 1}"));
    let queue = known(&with("watchdog_queue: {servers: 'zoo:2181', root: /q, markers: /m, type: t, zzzzzz: 1}"));
    let follow_ups = known(&with("routes:\n- {type: a, plugin: p, grants: {follow_ups: {zzzzzz: 1}}}"));
    assert!(section.len() > 30 && route.len() > 15, "{section:?} {route:?}");
    for key in section.iter().chain(&route).chain(&fleet).chain(&queue).chain(&follow_ups) {
        assert!(page.contains(&format!("`{key}`")), "docs/configuration.md does not tell of {key}");
    }
}

#[test]
fn a_budget_of_memory_is_a_size_or_unlimited_and_too_small_a_one_is_told() {
    let total = |value: &str| load(&with(&format!("memory_total: {value}"))).expect("valid").memory_total;
    assert_eq!((total("512MiB"), total("unlimited")), (Some(512 << 20), None));
    assert!(load(MINIMAL).expect("valid").memory_total.is_some_and(|bytes| bytes > 0), "three quarters of what there is");
    let small = load(&with("memory_total: 100MiB\nroutes: [{type: a, plugin: p, memory: 256MiB}]")).expect("valid");
    let told = small.warnings.join("\n");
    assert!(told.contains("memory_total: 100 MiB is less than one attempt may have (256 MiB)"), "{told}");
    let Err(refused) = load(&with("memory_total: much")) else { panic!("refused") };
    assert!(refused.to_string().contains("or `unlimited`") || format!("{refused:?}").contains("or `unlimited`"), "{refused:?}");
}

#[test]
fn our_own_keys_have_the_documented_defaults() {
    let config = load(MINIMAL).expect("valid");
    assert_eq!(config.queue.policy.failed_retention, Duration::from_secs(14 * 24 * 3600));
    assert_eq!(config.plugins.folder, Path::new("plugins"));
    assert_eq!(config.plugins.cache_folder, None);
    assert_eq!(config.plugins.poll_interval, Duration::from_secs(5));
    assert_eq!(config.plugins.memory_bytes_max, 64 << 20);
    assert_eq!(config.log_filter, "info");
    assert!(!config.host_name.is_empty());
}

#[test]
fn a_fleet_and_a_queue_of_items() {
    let none = load(MINIMAL).expect("valid");
    assert_eq!((none.watchdog, none.watchdog_queue), (None, None));
    let text = with(
        "host_name: ann\nwatchdog: {servers: 'zoo1:2181,zoo2:2181/a', root: /fleet}\nwatchdog_queue: {root: /q, markers: /m, type: t}",
    );
    let config = load(&text).expect("valid");
    let (fleet, queue) = (config.watchdog.expect("a fleet"), config.watchdog_queue.expect("a queue"));
    assert_eq!((fleet.zookeeper.session_timeout, fleet.timer), (Duration::from_secs(6), Duration::from_secs(15)));
    assert_eq!((fleet.root.path(), fleet.zookeeper.servers.as_str()), ("/fleet", "zoo1:2181,zoo2:2181/a"));
    assert_eq!(queue.zookeeper, fleet.zookeeper, "what the queue does not say is the fleet's");
    assert_eq!((queue.kick_interval, queue.json, queue.user), (Duration::from_secs(10), false, None));
    assert_eq!(queue.process, format!("ann:{}", std::process::id()));
    // A queue alone, with its own way to the servers.
    let alone = "watchdog_queue: {servers: 'zoo:2181', session_timeout: 3, root: /q, markers: /m, type: t, user: u, json: yes, process: p, \
                 kick_interval: 2, digest: 'joe:secret', access: ourselves}";
    let queue = load(&with(alone)).expect("valid").watchdog_queue.expect("a queue");
    assert_eq!((queue.kick_interval, queue.json, queue.user.as_deref()), (Duration::from_secs(2), true, Some("u")));
    assert_eq!((queue.process.as_str(), queue.zookeeper.session_timeout), ("p", Duration::from_secs(3)));
    assert!(!format!("{queue:?}").contains("secret"));
}

#[test]
fn a_fleet_on_a_server_is_in_the_database_unless_it_is_in_zookeeper_or_switched_off() {
    let on = |url: &str, keys: &str| {
        let text = format!("development: {{type: rdb, url: '{url}'{keys}, routes: [{{type: a, plugin: p}}]}}");
        let config = load(&text).expect("valid");
        (config.host_timeout.map(|timeout| timeout.as_secs()), config.warnings)
    };
    let (nothing, zookeeper) = (Vec::<String>::new(), "watchdog: {servers: 'zoo:2181', root: /fleet}");
    for url in ["postgres://db/q", "mysql://db/q"] {
        assert_eq!(on(url, ""), (Some(10), nothing.clone()));
        assert_eq!(on(url, ", fleet: database, host_timeout: 1m"), (Some(60), nothing.clone()));
        assert_eq!(on(url, ", fleet: none"), (None, nothing.clone()));
        assert_eq!(on(url, &format!(", {zookeeper}")), (None, nothing.clone()));
    }
    assert_eq!(on("sqlite:queue.db", ""), (None, nothing.clone()));
    let warned = |url: &str, keys: &str, told: &[&str]| {
        let (timeout, warnings) = on(url, keys);
        assert_eq!((timeout, warnings.len()), (None, told.len()), "{warnings:?}");
        assert!(warnings.iter().zip(told).all(|(warning, told)| warning.contains(told)), "{warnings:?}");
    };
    let lock = "has no effect: on SQLite the lock of a file beside the database tells dead hosts at once";
    warned(
        "sqlite:queue.db",
        ", fleet: database, host_timeout: 5",
        &[&format!("fleet: {lock}"), &format!("host_timeout: {lock}")],
    );
    let switched_off = "host_timeout: has no effect: with `fleet: none` a dead host's tasks are left to their leases";
    warned("postgres://db/q", ", fleet: none, host_timeout: 5", &[switched_off]);
    let in_zookeeper = "host_timeout: has no effect: with `watchdog`, its `timer` and `session_timeout`";
    warned("postgres://db/q", &format!(", host_timeout: 5, {zookeeper}"), &[in_zookeeper]);
}

#[test]
fn how_a_server_is_spoken_to() {
    let text = "development: {type: rdb, url: 'postgres://joe@db/q', connect_timeout: 5, statement_timeout: 1m, max_connections: 20, \
                listen: false, sslca: ca.pem, ssl_mode: verify-full, routes: [{type: a, plugin: p}]}";
    let config = load(text).expect("valid");
    assert_eq!(config.warnings, [] as [String; 0]);
    assert_eq!(config.queue.kind, Kind::Native);
    let expected = Connections {
        max: 20,
        connect_timeout: Duration::from_secs(5),
        statement_timeout: Duration::from_secs(60),
        listen: false,
        tls: Some(Tls::VerifyIdentity),
        certificate_authority: Some("ca.pem".into()),
    };
    assert_eq!(config.queue.connections, expected);
    let defaults = load("development: {type: rdb, url: 'mysql://db/q'}").expect("valid").queue.connections;
    assert_eq!(defaults, Connections::default());
    let embedded = load(&with("listen: true\nsslca: ca.pem")).expect("valid");
    assert_eq!(
        embedded.warnings.iter().filter(|warning| warning.contains("an embedded database is not connected to")).count(),
        2
    );
}

#[test]
fn perfectqueues_own_table() {
    let text = "development: {type: rdb_compat, url: 'mysql2://joe:secret@db/q', table: tasks, cleanup_interval: 0, sslca: ca.pem, \
                ssl_mode: ':required', use_connection_pooling: true, connect_timeout: 3, pq_connect_timeout: 20, our_own_key: 1}";
    let config = load(text).expect("valid");
    let expected = PerfectQueue { table: "tasks".to_owned(), cleanup_interval: 0, side_table: false };
    assert_eq!(config.queue.kind, Kind::PerfectQueue(expected));
    assert_eq!(config.queue.connections.tls, Some(Tls::Required));
    assert_eq!(config.queue.place(), "mysql2://db/q");
}

#[test]
fn a_file_of_perfectqueue_works_unchanged() {
    // The shape of real files: defaults under an anchor, merged into each environment, every key of the README.
    let text = "\
default: &default
  type: rdb
  processors: 4
  poll_interval: 0.5
  retention_time: 86_400
  task_heartbeat_interval: 2
  alive_time: 300
  retry_wait: 60
  child_kill_interval: 2.0
  child_graceful_kill_limit:
  child_heartbeat_interval: 2
  child_heartbeat_limit: 10.0
  processor_type: process
  detach_wait: 10.0
  disable_resource_limit: yes
  debug: 127.0.0.1:24333

development:
  <<: *default
  url: sqlite:development.db

production: &production
  <<: *default
  url: sqlite:production.db
  log: log/perfectqueue.log
  processors: 16

staging:
  <<: *production
  url: sqlite:staging.db
";
    let config = load_in(text, Some("staging"), &[]).expect("valid");
    assert_eq!(config.queue.url, "sqlite:staging.db");
    assert_eq!(config.processors, 16);
    assert_eq!(config.poll_interval, Duration::from_millis(500));
    assert_eq!(config.queue.policy.retention, Duration::from_secs(86_400));
    assert_eq!(config.queue.policy.backoff, Backoff::Fixed(Duration::from_secs(60)));
    assert_eq!(config.log.as_deref(), Some(Path::new("log/perfectqueue.log")));
    assert!(config.disable_resource_limit);
    let told = config.warnings.join("\n");
    for key in ["child_kill_interval", "processor_type", "detach_wait", "debug"] {
        assert!(told.contains(&format!("staging.{key}: has no effect")), "{told}");
    }
}

#[test]
fn the_environment_is_chosen_by_argument_then_laelaps_env_then_rails_env_then_development() {
    let text = "a: &a {type: rdb, url: 'sqlite:a'}\nb: {<<: *a}\nc: {<<: *a}\ndevelopment: {<<: *a}\n";
    let chosen = |section, environment: &[(&str, &str)]| load_in(text, section, environment).expect("valid").environment;
    let both = [("LAELAPS_ENV", "b"), ("RAILS_ENV", "c")];
    assert_eq!(chosen(Some("a"), &both), "a");
    assert_eq!(chosen(None, &both), "b");
    assert_eq!(chosen(None, &both[1..]), "c");
    assert_eq!(chosen(None, &[]), "development");
}

#[test]
fn only_the_chosen_section_counts() {
    let text = format!("{MINIMAL}broken:\n  type: nonsense\n  what: ever\n  <<: 5\n");
    load(&text).expect("the other section is not looked at");
}

#[test]
fn merges_reach_through_several_steps_and_lists() {
    let text = "\
base: &base {type: rdb, processors: 2, poll_interval: 3}
more: &more {<<: *base, processors: 3}
other: &other {url: 'sqlite:other', alive_time: 77}
limits: &limits {memory: 1MiB, time_limit: 5}
development:
  <<: [*more, *other]
  alive_time: 88
  routes:
    - {<<: *limits, type: a, plugin: p, memory: 2MiB}
";
    let config = load(text).expect("valid");
    assert_eq!((config.processors, config.poll_interval), (3, Duration::from_secs(3)));
    assert_eq!((config.queue.url.as_str(), config.alive_time), ("sqlite:other", Duration::from_secs(88)));
    let limits = &config.routes[0].limits;
    assert_eq!((limits.memory_bytes, limits.time), (2 << 20, Some(Duration::from_secs(5))));
}

#[test]
fn lengths_of_time_and_sizes_are_numbers_or_texts() {
    let config = load(&with(
        "poll_interval: 250ms\nalive_time: 1h 30m\nretry_wait: 2.5\nfailed_retention_time: 30 days\nsuspicion_time: 2h\nroutes:\n- {type: a, plugin: p, memory: 64MB, log_limit: 4096}",
    ))
    .expect("valid");
    assert_eq!(config.poll_interval, Duration::from_millis(250));
    assert_eq!(config.alive_time, Duration::from_secs(5_400));
    assert_eq!(config.queue.policy.retry_wait, Duration::from_millis(2_500));
    assert_eq!(config.queue.policy.failed_retention, Duration::from_secs(30 * 86_400));
    assert_eq!(config.queue.policy.suspicion, Duration::from_secs(7_200));
    assert_eq!(config.routes[0].policy.suspicion, Duration::from_secs(7_200), "a route has the section's");
    assert_eq!((config.routes[0].limits.memory_bytes, config.routes[0].limits.log_bytes), (64_000_000, 4_096));
}

#[test]
fn a_default_gives_way_to_the_key_that_it_has_to_fit() {
    let config = load(&with("alive_time: 3\nchild_heartbeat_interval: 20")).expect("valid");
    assert_eq!(config.task_heartbeat_interval, Duration::from_secs(1));
    assert_eq!(config.child_heartbeat_limit, Duration::from_secs(60));
}

#[test]
fn child_keepalive_interval_wins_over_child_heartbeat_interval() {
    let config = load(&with("child_heartbeat_interval: 3\nchild_keepalive_interval: 4")).expect("valid");
    assert_eq!(config.child_heartbeat_interval, Duration::from_secs(4));
    let told = config.warnings.join("\n");
    assert!(told.contains("child_heartbeat_interval: has no effect"), "{told}");
}

#[test]
fn a_route_starts_from_the_sections_policy() {
    let text = with(
        "retry_wait: 10\nmax_attempts: 5\nbackoff: {first: 1, factor: 3, max: 1m, jitter: 0}\nroutes:\n- {type: a, plugin: p}\n- {type: b, plugin: p, retry_wait: 20, max_attempts: unlimited}\n- {type: c, plugin: p, backoff: fixed, retry_wait: 30}",
    );
    let config = load(&text).expect("valid");
    let exponential =
        Backoff::Exponential { first: Duration::from_secs(1), factor: 3.0, max: Duration::from_secs(60), jitter: 0.0 };
    let [a, b, c] = &config.routes[..] else { panic!("three routes") };
    assert_eq!((&a.policy.backoff, a.policy.max_attempts), (&exponential, Some(5)));
    assert_eq!((&b.policy.backoff, b.policy.retry_wait), (&exponential, Duration::from_secs(20)));
    assert_eq!(b.policy.max_attempts, None);
    assert_eq!(c.policy.backoff, Backoff::Fixed(Duration::from_secs(30)));
}

#[test]
fn a_fixed_backoff_follows_the_retry_wait_of_its_route() {
    let config = load(&with("retry_wait: 10\nroutes:\n- {type: a, plugin: p, retry_wait: 20}")).expect("valid");
    assert_eq!(config.queue.policy.backoff, Backoff::Fixed(Duration::from_secs(10)));
    assert_eq!(config.routes[0].policy.backoff, Backoff::Fixed(Duration::from_secs(20)));
}

#[test]
fn nothing_is_granted_unless_it_is_named() {
    let config = load(&with("routes:\n- {type: a, plugin: p}")).expect("valid");
    assert_eq!(config.routes[0].grants, plugin::Grants::default());
    assert!(config.routes[0].settings.is_empty());
}

#[test]
fn grants_and_settings_carry_values_and_warn_of_missing_ones() {
    let text = with(
        "routes:\n- type: a\n  plugin: p\n  grants:\n    folders: [{host: logs, guest: /logs, writable: true}]\n    environment: [HOME, ABSENT]\n  settings: {b: 2, a: x, secret: {env: TOKEN}}",
    );
    let config = load_in(&text, None, &[("HOME", "/h"), ("TOKEN", "t")]).expect("valid");
    let route = &config.routes[0];
    assert_eq!(route.grants.environment, [("HOME".to_owned(), "/h".to_owned())]);
    assert_eq!(*route.grants.folders, [plugin::FolderGrant::writable("logs", "/logs")]);
    let settings: Vec<(&str, &str)> = route.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(settings, [("a", "x"), ("b", "2"), ("secret", "t")]);
    assert!(config.warnings.iter().any(|warning| warning.contains("ABSENT is not set")), "{:?}", config.warnings);
}

#[test]
fn a_secret_comes_from_the_environment_or_a_file() {
    let text = "development: {type: rdb, url: {env: QUEUE_URL}}";
    assert_eq!(load_in(text, None, &[("QUEUE_URL", "sqlite:x")]).expect("valid").queue.url, "sqlite:x");
    let (_folder, path) = file("sqlite:y\n");
    let text = format!("development: {{type: rdb, url: {{file: {:?}}}}}", path.display().to_string());
    assert_eq!(load(&text).expect("valid").queue.url, "sqlite:y");
}

#[test]
fn the_first_route_that_fits_wins_and_shadowed_ones_are_told() {
    let text =
        with("routes:\n- {pattern: '^mail', plugin: first}\n- {type: mail.send, plugin: second}\n- {type: other, plugin: third}");
    let config = load(&text).expect("valid");
    let told = config.warnings.iter().filter(|warning| warning.contains("is never reached")).collect::<Vec<_>>();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("laelaps.yml:6: development.routes[2]: is never reached: route 1 at line 5"), "{told:?}");
    let routes = Routes::new(config.routes);
    assert_eq!(routes.route("mail.send").map(|route| route.plugin.as_str()), Some("first"));
    assert_eq!(routes.route("other").map(|route| route.line), Some(7));
    assert!(routes.route("none").is_none());
}

#[test]
fn laelaps_log_wins_over_log_level() {
    let text = with("log_level: warn");
    assert_eq!(load(&text).expect("valid").log_filter, "warn");
    assert_eq!(load_in(&text, None, &[("LAELAPS_LOG", "laelaps=debug")]).expect("valid").log_filter, "laelaps=debug");
}

#[test]
fn a_plugin_file_or_granted_folder_that_is_not_there_yet_is_told_but_refuses_nothing() {
    let text = with("plugins: nowhere\nroutes:\n- {type: a, plugin: p, grants: {folders: [{host: gone, guest: /g}]}}");
    let config = load(&text).expect("valid");
    let told = config.missing_files().join("\n");
    assert!(told.contains("route 1: there is no nowhere/p.wasm yet"), "{told}");
    assert!(told.contains("the granted folder gone does not exist"), "{told}");
}
