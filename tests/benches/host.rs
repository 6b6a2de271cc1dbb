//! How many empty tasks a second a whole host runs, each in a fresh sandbox, on every database; and graphile-worker (Node) on the same
//! PostgreSQL: `tests/bench host`, with `quick` a tenth of it, with `postgres graphile` only those, with `--json` for programs. `rdb_compat` is
//! the host on PerfectQueue's own table, as its workers are set for throughput: without users and without a table of ours.
//!
//! Rounds are interleaved, so that whatever else the machine does hits all alike; servers run with their default durability. What is counted
//! is the time from the tenth part of the tasks to the last, so that no start is measured.

#![expect(clippy::unwrap_used, reason = "a bench may stop where it stands")]

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use laelaps_queue::{Config, Kind, PerfectQueue, Queue};
use laelaps_test_databases::{Durability, mariadb, postgres};
use laelaps_tests::{Site, submit, task, workspace_file};
use serde_json::json;

const ROUNDS: usize = 3;
const TASKS: usize = 200_000;
/// How the host is set for throughput; docs/daemon.md tells of it.
const PROCESSORS: u32 = 32;
const PREFETCH: u32 = 1_000;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
enum System {
    Sqlite,
    Postgres,
    MariaDb,
    /// PerfectQueue's table on MariaDB.
    Compat,
    Graphile,
}

const SYSTEMS: [(System, &str); 5] = [
    (System::Sqlite, "sqlite"),
    (System::Postgres, "postgres"),
    (System::MariaDb, "mariadb"),
    (System::Compat, "rdb_compat"),
    (System::Graphile, "graphile"),
];

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let has = |word: &str| arguments.iter().any(|argument| argument == word);
    let known: Vec<&str> = SYSTEMS.iter().map(|(_, name)| *name).chain(["quick", "--json"]).collect();
    if let Some(word) = arguments.iter().find(|word| !known.contains(&word.as_str())) {
        eprintln!("\"{word}\" is not a word of this bench; it knows {}", known.join(", "));
        return ExitCode::from(2);
    }
    let asked: Vec<(System, &str)> = SYSTEMS.into_iter().filter(|(_, name)| has(name)).collect();
    let asked = if asked.is_empty() { SYSTEMS.to_vec() } else { asked };
    let tasks = if has("quick") { TASKS / 10 } else { TASKS };
    let mut rates: Vec<Vec<f64>> = vec![Vec::new(); asked.len()];
    for round in 1..=ROUNDS {
        for (place, (system, name)) in asked.iter().enumerate() {
            let rate = rate_of(*system, tasks).await;
            eprintln!("round {round}: {name} {rate:.0} tasks/s");
            rates[place].push(rate);
        }
    }
    let median = |rates: &[f64]| {
        let mut sorted = rates.to_vec();
        sorted.sort_by(f64::total_cmp);
        (sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1])
    };
    let peer = asked.iter().position(|(system, _)| *system == System::Graphile).map(|place| median(&rates[place]).0);
    let figures: Vec<_> = asked.iter().zip(&rates).map(|((_, name), rates)| (*name, median(rates))).collect();
    if has("--json") {
        let rows = figures.iter().map(|(name, (median, least, most))| {
            json!({ "system": name, "tasks_per_second": { "median": median, "min": least, "max": most },
                    "times_graphile_worker": peer.map(|peer| median / peer) })
        });
        println!("{}", json!({ "tasks": tasks, "rounds": ROUNDS, "host": rows.collect::<Vec<_>>() }));
        return ExitCode::SUCCESS;
    }
    println!("empty tasks a second, a fresh sandbox for each; {tasks} tasks, {ROUNDS} rounds, {PROCESSORS} processors");
    println!("{:>10} {:>10} {:>10} {:>10} {:>20}", "", "median", "min", "max", "x graphile-worker");
    for (name, (median, least, most)) in figures {
        let ratio = peer.map_or("-".to_owned(), |peer| format!("{:.2}", median / peer));
        println!("{name:>10} {median:>10.0} {least:>10.0} {most:>10.0} {ratio:>20}");
    }
    ExitCode::SUCCESS
}

/// Tasks a second, each time on a server of its own.
async fn rate_of(system: System, tasks: usize) -> f64 {
    match system {
        System::Sqlite => host(None, Kind::Native, tasks).await,
        System::Postgres => {
            let server = postgres::Server::start(Durability::Disk).await;
            host(Some(server.create_database().await), Kind::Native, tasks).await
        }
        System::MariaDb => {
            let server = mariadb::Server::start(Durability::Disk).await;
            host(Some(server.create_database().await), Kind::Native, tasks).await
        }
        System::Compat => {
            let server = mariadb::Server::start(Durability::Disk).await;
            let table = PerfectQueue { table: "tasks".to_owned(), cleanup_interval: 20, side_table: false };
            host(Some(server.create_database().await), Kind::PerfectQueue(table), tasks).await
        }
        System::Graphile => {
            let server = postgres::Server::start(Durability::Disk).await;
            graphile(&server.create_database().await, tasks)
        }
    }
}

/// Tasks a second of a host on an empty database, or on SQLite.
async fn host(url: Option<String>, kind: Kind, tasks: usize) -> f64 {
    let site = Site::new().await;
    site.plug_guest("noop");
    let url = url.unwrap_or_else(|| site.url().to_owned());
    let is_compat = matches!(kind, Kind::PerfectQueue(_));
    let mut section = json!({
        "url": url, "processors": PROCESSORS, "task_prefetch": PREFETCH, "poll_interval": 0.05, "log_level": "warn",
        "retention_time": 3_600, "routes": [{ "pattern": ".", "plugin": "noop" }],
    });
    if let Kind::PerfectQueue(table) = &kind {
        section["type"] = json!("rdb_compat");
        section["table"] = json!(table.table);
        section["disable_resource_limit"] = json!(true);
    }
    site.configure(section);
    let queue = Queue::open(&Config { kind, ..Config::new(url) }).await.unwrap();
    queue.init().await.unwrap();
    let payload = "x".repeat(86);
    let all: Vec<_> = (0..tasks).map(|number| task(format!("task-{number}"), "noop", json!({ "payload": payload }))).collect();
    submit(&queue, &all).await;
    drop(all);
    let host = site.start().await;
    // Ours keeps counts; PerfectQueue's table has to be counted, which must not be what is measured.
    let pause_ms = if is_compat { 250 } else { 20 };
    let mut looks = tokio::time::interval(Duration::from_millis(pause_ms));
    let mut first = None;
    let rate = loop {
        looks.tick().await;
        let finished = usize::try_from(queue.stats().await.unwrap().finished).unwrap();
        match first {
            None if finished >= tasks / 10 => first = Some((Instant::now(), finished)),
            Some((begun, already)) if finished == tasks => break (finished - already) as f64 / begun.elapsed().as_secs_f64(),
            _ => {}
        }
    };
    host.stop().await;
    queue.close().await;
    rate
}

/// Jobs a second of graphile-worker.
fn graphile(url: &str, jobs: usize) -> f64 {
    let folder = workspace_file("tests/benches/graphile");
    let place = workspace_file("target/graphile-worker");
    std::fs::create_dir_all(&place).unwrap();
    for file in ["package.json", "bench.mjs"] {
        std::fs::copy(folder.join(file), place.join(file)).unwrap();
    }
    if !place.join("node_modules/graphile-worker").exists() {
        let installed = Command::new("npm").args(["install", "--no-audit", "--no-fund", "--silent"]).current_dir(&place).status();
        assert!(installed.is_ok_and(|status| status.success()), "graphile-worker could not be installed with npm");
    }
    let output = Command::new("node").args(["bench.mjs", url, &jobs.to_string()]).current_dir(&place).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().unwrap_or_else(|_| panic!("graphile-worker: {text}{}", String::from_utf8_lossy(&output.stderr)))
}
