//! PerfectQueue's own table on MariaDB: claim and settle through the crate, beside the same in raw SQL, and a claim of ten in fair order
//! beside PerfectQueue's own query.

mod table;

use std::time::Instant;

use laelaps_queue::{Config, Kind, PerfectQueue, Queue};

use self::table::Table;
use crate::home::{Home, drop_database};
use crate::report::{Bound, Report, best_of_rounds, median_ms, ratios};
use crate::words::Words;
use crate::work::{claim_of, rate, work_off};

const COUNT: usize = 200_000;
const BATCH: usize = 500;
/// Tasks that are claimed one by one.
const COUNT_ALONE: usize = 5_000;
/// So many users, so much each: a batch of 500 finds room whatever else runs.
const USERS: i64 = 100;
const MAX_RUNNING: i64 = 50;
/// Ruby's figures on two cores (reference/perfectqueue.md), and how many times that was promised.
const RUBY_BEST: f64 = 2_660.0;
const RUBY_FAIR: f64 = 166.0;
/// A worker of one process, with the tasks of one user with limit 1.
const RUBY_LIMITED: f64 = 144.0;
const TIMES_BEST: f64 = 6.0;
const TIMES_FAIR: f64 = 50.0;

const SIZES: [usize; 3] = [10_000, 100_000, 500_000];
const SIZES_QUICK: [usize; 2] = [10_000, 50_000];
const CLAIMS: usize = 70;
/// Ruby's query takes seconds at the largest size.
const RUBY_CLAIMS: usize = 5;

/// How the crate is asked, and whether its own table stands beside.
#[derive(Clone, Copy)]
struct Mode {
    ignore_users: bool,
    side_table: bool,
}

const MODES: [Mode; 4] = [
    Mode { ignore_users: true, side_table: false },
    Mode { ignore_users: true, side_table: true },
    Mode { ignore_users: false, side_table: false },
    Mode { ignore_users: false, side_table: true },
];

impl Mode {
    fn name(self) -> String {
        let order = if self.ignore_users { "by age" } else { "fair" };
        let side = if self.side_table { "with a side table" } else { "without side table" };
        format!("{order}, {side}")
    }
}

pub(crate) async fn measure(home: &Home, words: &Words, report: &mut Report) {
    rates(home, words, report).await;
    one_at_a_time(home, words, report).await;
    backlog(home, words, report).await;
}

async fn open(home: &Home, side_table: bool) -> (Queue, Table) {
    let (url, _) = home.place().await;
    let kind = Kind::PerfectQueue(PerfectQueue { table: table::NAME.to_owned(), cleanup_interval: 20, side_table });
    let queue = Queue::open(&Config { kind, ..Config::new(url.as_str()) }).await.unwrap();
    queue.init().await.unwrap();
    (queue, Table::connect(url).await)
}

async fn close(queue: Queue, table: Table) {
    queue.close().await;
    drop_database(&table.url).await;
}

async fn rates(home: &Home, words: &Words, report: &mut Report) {
    let count = words.scaled(COUNT);
    report.say(format!("claim and settle in batches of {BATCH}, {count} waiting; tasks of {USERS} users"));
    let mut modes: Vec<Vec<f64>> = vec![Vec::new(); MODES.len()];
    let mut raw = Vec::new();
    for _ in 0..words.rounds() {
        for (mode, rates) in MODES.into_iter().zip(&mut modes) {
            let (queue, mut table) = open(home, mode.side_table).await;
            table.fill(0..count, USERS, MAX_RUNNING).await;
            rates.push(work_off(&queue, count, BATCH, 1, mode.ignore_users).await);
            close(queue, table).await;
        }
        let (queue, mut table) = open(home, false).await;
        table.fill(0..count, USERS, MAX_RUNNING).await;
        let started = Instant::now();
        assert_eq!(table.work_off(BATCH).await, count);
        raw.push(rate(count, started.elapsed()));
        close(queue, table).await;
    }
    for (mode, rates) in MODES.into_iter().zip(&modes) {
        report.figure("mariadb", &format!("PerfectQueue's table, {}", mode.name()), "tasks/s", rates);
    }
    let limit = report.figure("mariadb", "PerfectQueue's table, raw SQL by age, one connection", "tasks/s", &raw).median;
    for (order, ruby, times, modes) in
        [("by age", RUBY_BEST, TIMES_BEST, &modes[..2]), ("fair", RUBY_FAIR, TIMES_FAIR, &modes[2..])]
    {
        let best = best_of_rounds(modes.iter());
        report.figure("mariadb", &format!("PerfectQueue's table, {order}: best mode / raw"), "x", &ratios(&best, &raw));
        let of_ruby: Vec<f64> = best.iter().map(|rate| rate / ruby).collect();
        let figure =
            report.figure("mariadb", &format!("PerfectQueue's table, {order}: best mode / Ruby's {ruby}"), "x", &of_ruby);
        let remark = format!("raw SQL by age in this run: {:.1} x", limit / ruby);
        let what = format!("rdb_compat on mariadb, {order}: of Ruby's {ruby} tasks/s");
        report.promise(what, figure.median, Bound::AtLeast(times), "x", remark);
    }
}

/// One task at a time, of one user with limit 1 and of nobody: what a host with one processor and no prefetch does.
async fn one_at_a_time(home: &Home, words: &Words, report: &mut Report) {
    let count = words.scaled(COUNT_ALONE);
    report.say(format!("claim and settle one by one, {count} waiting; of one user with limit 1, and of nobody"));
    for mode in MODES {
        let (mut limited, mut free) = (Vec::new(), Vec::new());
        for _ in 0..words.rounds() {
            for (rates, of_user) in [(&mut limited, true), (&mut free, false)] {
                let (queue, mut table) = open(home, mode.side_table).await;
                table.fill(0..count, 1, 1).await;
                if !of_user {
                    table.leave_users().await;
                }
                rates.push(work_off(&queue, count, 1, 1, mode.ignore_users).await);
                close(queue, table).await;
            }
        }
        let name = mode.name();
        let figure = report.figure("mariadb", &format!("PerfectQueue's table, one by one, limited, {name}"), "tasks/s", &limited);
        let part = report.figure("mariadb", &format!("limited / free, {name}"), "x", &ratios(&limited, &free)).median;
        let remark = format!("{:.0} tasks/s", figure.median);
        report.promise(
            format!("rdb_compat on mariadb, {name}: one user with limit 1, of nobody's"),
            part,
            Bound::AtLeast(0.5),
            "x",
            remark,
        );
        let of_ruby = figure.median / RUBY_LIMITED;
        let what = format!("rdb_compat on mariadb, {name}: one user with limit 1, of Ruby's {RUBY_LIMITED} tasks/s");
        report.promise(what, of_ruby, Bound::AtLeast(1.0), "x", "");
    }
}

/// A claim of ten in fair order at growing backlogs.
async fn backlog(home: &Home, words: &Words, report: &mut Report) {
    let sizes: &[usize] = if words.quick { &SIZES_QUICK } else { &SIZES };
    report.say("claim of 10 in fair order, milliseconds (the first one walks the whole table once, in slices)");
    report.say(format!("  {:>9} {:>12} {:>12} {:>16} {:>10}", "waiting", "the crate", "its first", "Ruby's query", "Ruby's /"));
    for &size in sizes {
        let (queue, mut table) = open(home, true).await;
        table.fill(0..size, USERS, MAX_RUNNING).await;
        let claim = claim_of(&queue, 10, false).await;
        let (mut first, mut ours, mut theirs) = (None, Vec::new(), Vec::new());
        for _ in 0..words.rounds() {
            let mut times = Vec::with_capacity(CLAIMS);
            for _ in 0..CLAIMS {
                let started = Instant::now();
                let tasks = queue.backend().claim(&claim).await.unwrap().tasks;
                let took = started.elapsed();
                first.get_or_insert(took);
                times.push(took);
                assert_eq!(tasks.len(), 10);
            }
            ours.push(median_ms(&times));
            let mut times = Vec::with_capacity(RUBY_CLAIMS);
            for _ in 0..RUBY_CLAIMS {
                let started = Instant::now();
                assert_eq!(table.rubys_fair_choice(10).await, 10);
                times.push(started.elapsed());
            }
            theirs.push(median_ms(&times));
        }
        let ours = report.figure_quietly("mariadb", &format!("rdb_compat: claim of 10, fair, at {size}"), "ms", &ours).median;
        let theirs = report.figure_quietly("mariadb", &format!("Ruby's fair query for 10 at {size}"), "ms", &theirs).median;
        let first = first.map_or(0.0, |first| first.as_secs_f64() * 1_000.0);
        report.figure_quietly("mariadb", &format!("rdb_compat: first claim of 10, fair, at {size}"), "ms", &[first]);
        report.say(format!("  {size:>9} {ours:>12.2} {first:>12.1} {theirs:>16.1} {:>10.1}", theirs / ours));
        close(queue, table).await;
    }
}
