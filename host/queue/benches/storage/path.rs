//! Claim and settle all of a backlog: through the crate, by its statements without it, and through one table.

use sqlx::{Connection as _, MySqlConnection, PgConnection};

use crate::home::{Home, settle_down};
use crate::report::{Bound, Report, Spread, best_of_rounds, ratios};
use crate::words::Words;
use crate::work::{task, work_off};
use crate::{fill, raw};

/// The batches of the comparison, as in the measurements that chose the layout; and small ones.
const BATCH: usize = 500;
const BATCH_SMALL: usize = 100;

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Crate,
    Raw,
    OneTable,
}

/// A way, and how many workers go it at once.
type Candidate = (Way, usize);

pub(crate) async fn measure(home: &Home, words: &Words, report: &mut Report) {
    let count = words.scaled(200_000);
    compare(home, count, BATCH, words, report).await;
    compare(home, count / 2, BATCH_SMALL, words, report).await;
    bytes(home, count / 2, words, report).await;
}

fn candidates(home: &Home, batch: usize) -> Vec<Candidate> {
    let ways: &[Way] = if batch == BATCH { &[Way::Crate, Way::Raw, Way::OneTable] } else { &[Way::Crate, Way::Raw] };
    let mut candidates = Vec::new();
    for way in ways {
        // SQLite has one writer, whoever calls: more connections would only wait for each other.
        let most = if matches!(home, Home::Sqlite) && *way != Way::Crate { 1 } else { 4 };
        candidates.extend([1, 2, 4].into_iter().filter(|workers| *workers <= most).map(|workers| (*way, workers)));
    }
    candidates
}

async fn compare(home: &Home, count: usize, batch: usize, words: &Words, report: &mut Report) {
    report.say(format!(
        "claim and settle in batches of {batch}, {count} waiting; median, and least .. most of {} rounds",
        words.rounds()
    ));
    if matches!(home, Home::Sqlite) {
        report.say("  (SQL without the crate on one connection: SQLite lets only one write at a time)");
    }
    let candidates = candidates(home, batch);
    let mut rates: Vec<Vec<f64>> = vec![Vec::new(); candidates.len()];
    for _ in 0..words.rounds() {
        for ((way, workers), rates) in candidates.iter().zip(&mut rates) {
            rates.push(match way {
                Way::Crate => through_the_crate(home, count, batch, *workers).await,
                Way::Raw => raw::of_the_layout(home, count, batch, *workers).await,
                Way::OneTable => raw::of_one_table(home, count, batch, *workers).await,
            });
        }
    }
    for ((way, workers), rates) in candidates.iter().zip(&rates) {
        let name = match way {
            Way::Crate => format!("the crate, {workers} at once"),
            Way::Raw => format!("its statements alone, {workers} connections"),
            Way::OneTable => format!("one table, {workers} connections"),
        };
        report.figure(home.word(), &format!("batches of {batch}: {name}"), "tasks/s", rates);
    }
    let best = |way: Way| best_of_rounds(candidates.iter().zip(&rates).filter(|((of, _), _)| *of == way).map(|(_, rates)| rates));
    let limit = best(Way::Raw);
    let ratio = report.figure(
        home.word(),
        &format!("batches of {batch}: crate claim + settle / raw limit"),
        "x",
        &ratios(&best(Way::Crate), &limit),
    );
    if batch == BATCH {
        let over =
            report.figure(home.word(), "batches of 500: raw limit / one table", "x", &ratios(&limit, &best(Way::OneTable)));
        promise(home, report, ratio, over);
    }
}

fn promise(home: &Home, report: &mut Report, ratio: Spread, over: Spread) {
    let word = home.word();
    report.promise(format!("{word}: crate claim + settle / raw limit"), ratio.median, Bound::AtLeast(0.6), "x", "");
    report.promise(format!("{word}: raw limit / one table"), over.median, Bound::AtLeast(1.2), "x", "");
}

async fn through_the_crate(home: &Home, count: usize, batch: usize, callers: usize) -> f64 {
    let fresh = home.fresh().await;
    fill::waiting(&fresh.url, 0..count, 0).await;
    settle_down(&fresh.url).await;
    let rate = work_off(&fresh.queue, count, batch, callers, false).await;
    fresh.drop().await;
    rate
}

/// What is written for a task, from its submit in batches of a thousand to its settlement in batches of 500.
async fn bytes(home: &Home, count: usize, words: &Words, report: &mut Report) {
    let what = match home {
        Home::Sqlite => "bytes that the process writes, log and file",
        Home::Postgres(_) => "WAL bytes",
        Home::MariaDb(_) => "redo bytes",
    };
    let (mut submitting, mut working, mut all) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..words.rounds() {
        let fresh = home.fresh().await;
        // A page's first change after a checkpoint would be written whole.
        settle_down(&fresh.url).await;
        let before = written(&fresh.url).await;
        for first in (0..count).step_by(1_000) {
            let tasks: Vec<_> = (first..count.min(first + 1_000)).map(task).collect();
            fresh.queue.submit_many(&tasks).await.unwrap();
        }
        let between = written(&fresh.url).await;
        work_off(&fresh.queue, count, BATCH, 1, false).await;
        let after = written(&fresh.url).await;
        submitting.push((between - before) / count as f64);
        working.push((after - between) / count as f64);
        all.push((after - before) / count as f64);
        fresh.drop().await;
    }
    report.figure(home.word(), &format!("{what} a task, for the submit"), "bytes", &submitting);
    report.figure(home.word(), &format!("{what} a task, from claim to finish"), "bytes", &working);
    let all = report.figure(home.word(), &format!("{what} a task from submit to finish"), "bytes", &all);
    if matches!(home, Home::Postgres(_)) {
        report.promise(format!("postgres: {what} a task from submit to finish"), all.median, Bound::AtMost(1_024.0), "bytes", "");
    }
}

/// Bytes that were written to the database's log so far; on SQLite those that this process wrote to any file.
async fn written(url: &str) -> f64 {
    if url.starts_with("postgres:") {
        const PLACE: &str = "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8";
        let mut connection = PgConnection::connect(url).await.unwrap();
        return sqlx::query_scalar(PLACE).fetch_one(&mut connection).await.unwrap();
    }
    let bytes: String = if url.starts_with("mysql:") {
        const WRITTEN: &str = "SELECT CAST(variable_value AS CHAR) FROM information_schema.global_status
            WHERE variable_name = 'INNODB_OS_LOG_WRITTEN'";
        let mut connection = MySqlConnection::connect(url).await.unwrap();
        sqlx::query_scalar(WRITTEN).fetch_one(&mut connection).await.unwrap()
    } else {
        let counts = std::fs::read_to_string("/proc/self/io").unwrap();
        let line = counts.lines().find_map(|line| line.strip_prefix("wchar: "));
        line.unwrap().to_owned()
    };
    bytes.parse().unwrap()
}
