//! How many empty tasks a second a whole host runs, each in a fresh sandbox, on every database; and graphile-worker (Node) on the same
//! PostgreSQL: `tests/bench host`, with `quick` a tenth of it, with `postgres graphile` only those, with `--json` for programs. `rdb_compat` is
//! the host on PerfectQueue's own table, as its workers are set for throughput: without users and without a table of ours. Then what a user's
//! limit and a report of progress leave of that rate (`limited`, `progress`; `empty` is the first part), held to what was promised.
//!
//! Rounds are interleaved, so that whatever else the machine does hits all alike; servers run with their default durability. What is counted
//! is the time from the tenth part of the tasks to the last, so that no start is measured.

#![expect(clippy::unwrap_used, reason = "a bench may stop where it stands")]

mod beside;

use std::process::{Command, ExitCode};
use std::time::Duration;

use laelaps_queue::{Config, Kind, NewTask, PerfectQueue, Queue};
use laelaps_test_databases::{Durability, mariadb, postgres};
use laelaps_tests::{Site, rate, task, workspace_file};
use serde_json::{Value, json};

const ROUNDS: usize = 3;
const TASKS: usize = 200_000;
/// How the host is set for throughput; docs/daemon.md tells of it.
const PROCESSORS: u32 = 32;
const PREFETCH: u32 = 1_000;
const PARTS: [&str; 3] = ["empty", "limited", "progress"];
const OPTIONS: [&str; 3] = ["quick", "--json", "--check"];

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
    let known: Vec<&str> = SYSTEMS.iter().map(|(_, name)| *name).chain(PARTS).chain(OPTIONS).collect();
    if let Some(word) = arguments.iter().find(|word| !known.contains(&word.as_str())) {
        eprintln!("\"{word}\" is not a word of this bench; it knows {}", known.join(", "));
        return ExitCode::from(2);
    }
    let asked: Vec<(System, &str)> = SYSTEMS.into_iter().filter(|(_, name)| has(name)).collect();
    let asked = if asked.is_empty() { SYSTEMS.to_vec() } else { asked };
    let all_parts = !PARTS.into_iter().any(has);
    let tasks = if has("quick") { TASKS / 10 } else { TASKS };
    let figures = if all_parts || has("empty") { empty(&asked, tasks).await } else { Vec::new() };
    let mut promises = Vec::new();
    for part in [beside::Part::Limited, beside::Part::Progress] {
        if all_parts || has(part.word()) {
            promises.extend(beside::measure(part, &asked, has("quick")).await);
        }
    }
    let peer = figures.iter().find(|(name, _)| *name == "graphile").map(|(_, (median, ..))| *median);
    if has("--json") {
        let rows = figures.iter().map(|(name, (median, least, most))| {
            json!({ "system": name, "tasks_per_second": { "median": median, "min": least, "max": most },
                    "times_graphile_worker": peer.map(|peer| median / peer) })
        });
        let promises: Vec<Value> = promises.iter().map(beside::Promise::to_json).collect();
        println!("{}", json!({ "tasks": tasks, "rounds": ROUNDS, "host": rows.collect::<Vec<_>>(), "promises": promises }));
    } else {
        if !figures.is_empty() {
            println!("empty tasks a second, a fresh sandbox for each; {tasks} tasks, {ROUNDS} rounds, {PROCESSORS} processors");
            println!("{:>10} {:>10} {:>10} {:>10} {:>20}", "", "median", "min", "max", "x graphile-worker");
        }
        for (name, (median, least, most)) in &figures {
            let ratio = peer.map_or("-".to_owned(), |peer| format!("{:.2}", median / peer));
            println!("{name:>10} {median:>10.0} {least:>10.0} {most:>10.0} {ratio:>20}");
        }
        beside::print(&promises);
    }
    let kept = promises.iter().all(beside::Promise::is_kept);
    if has("--check") && !kept { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Median, least and most.
type Figure = (f64, f64, f64);

fn figure(values: &[f64]) -> Figure {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1])
}

/// Empty tasks a second.
async fn empty(asked: &[(System, &'static str)], tasks: usize) -> Vec<(&'static str, Figure)> {
    let mut rates: Vec<Vec<f64>> = vec![Vec::new(); asked.len()];
    for round in 1..=ROUNDS {
        for (place, (system, name)) in asked.iter().enumerate() {
            let rate = rate_of(*system, tasks).await;
            eprintln!("round {round}: {name} {rate:.0} tasks/s");
            rates[place].push(rate);
        }
    }
    asked.iter().zip(&rates).map(|((_, name), rates)| (*name, figure(rates))).collect()
}

/// Tasks a second, each time on a server of its own.
async fn rate_of(system: System, tasks: usize) -> f64 {
    if system == System::Graphile {
        let server = postgres::Server::start(Durability::Disk).await;
        return graphile(&server.create_database().await, tasks);
    }
    let section = json!({
        "processors": PROCESSORS, "task_prefetch": PREFETCH, "poll_interval": 0.05,
        "disable_resource_limit": (system == System::Compat).then_some(true),
        "routes": [{ "pattern": ".", "plugin": "noop" }],
    });
    let stage = Stage::set(system, "noop", false, section).await;
    let payload = "x".repeat(86);
    let all: Vec<_> = (0..tasks).map(|number| task(format!("task-{number}"), "noop", json!({ "payload": payload }))).collect();
    stage.rate(&all).await
}

/// Keeps a database for as long as it is there.
enum Server {
    None,
    Postgres(#[expect(dead_code, reason = "it ends with this")] postgres::Server),
    MariaDb(#[expect(dead_code, reason = "it ends with this")] mariadb::Server),
}

/// Where a host runs, on an empty database of a server of its own.
struct Stage {
    site: Site,
    queue: Queue,
    system: System,
    _server: Server,
}

impl Stage {
    /// With these members in the host's section, and this guest. `side_table`: a table of ours stands beside PerfectQueue's.
    async fn set(system: System, guest: &str, side_table: bool, section: Value) -> Self {
        let (url, server) = match system {
            System::Postgres => {
                let server = postgres::Server::start(Durability::Disk).await;
                (Some(server.create_database().await), Server::Postgres(server))
            }
            System::MariaDb | System::Compat => {
                let server = mariadb::Server::start(Durability::Disk).await;
                (Some(server.create_database().await), Server::MariaDb(server))
            }
            System::Sqlite | System::Graphile => (None, Server::None),
        };
        let site = Site::new().await;
        site.plug_guest(guest);
        let url = url.unwrap_or_else(|| site.url().to_owned());
        let mut changes = json!({ "url": url, "log_level": "warn", "retention_time": 3_600 });
        let mut config = Config::new(url);
        let members = changes.as_object_mut().unwrap();
        members.extend(section.as_object().unwrap().clone());
        if system == System::Compat {
            config.kind = Kind::PerfectQueue(PerfectQueue { table: "tasks".to_owned(), cleanup_interval: 20, side_table });
            let table = [("type", json!("rdb_compat")), ("table", json!("tasks")), ("side_table", json!(side_table))];
            members.extend(table.map(|(name, value)| (name.to_owned(), value)));
        }
        site.configure(changes);
        let queue = Queue::open(&config).await.unwrap();
        queue.init().await.unwrap();
        Self { site, queue, system, _server: server }
    }

    /// Tasks a second of a host here.
    async fn rate(self, tasks: &[NewTask]) -> f64 {
        // Ours keeps counts; PerfectQueue's table has to be counted, which must not be what is measured.
        let pause_ms = if self.system == System::Compat { 250 } else { 20 };
        let rate = rate(&self.site, &self.queue, tasks, Duration::from_millis(pause_ms)).await;
        self.queue.close().await;
        rate
    }
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
