//! A claim of ten at growing backlogs.

use std::time::Instant;

use laelaps_queue::{Claim, Policy, Queue};

use crate::fill;
use crate::home::{Fresh, Home, settle_down};
use crate::report::{Bound, Report, Spread, median_ms};
use crate::words::Words;
use crate::work::claim_of;

const SIZES: [usize; 5] = [10_000, 100_000, 500_000, 1_000_000, 5_000_000];
const SIZES_QUICK: [usize; 4] = [10_000, 20_000, 50_000, 100_000];
/// At which fair order is promised to take so many milliseconds at most.
const PROMISED_AT: usize = 500_000;
const PROMISED_MS: f64 = 5.0;
/// Claims of a round at each size; ten tasks each.
const CLAIMS: usize = 50;
/// Claims before those that are measured: another database has just had the memory.
const WARM_UP: usize = 5;
/// A user for each task makes as many accounts: up to here.
const EACH_MAX: usize = 1_000_000;

/// Whose tasks wait, and in which orders they are claimed.
struct Backlog {
    users: usize,
    orders: &'static [Order],
}

#[derive(Clone, Copy)]
struct Order {
    name: &'static str,
    ignore_users: bool,
    is_promised: bool,
}

const BACKLOGS: [Backlog; 3] = [
    Backlog {
        users: 0,
        orders: &[
            Order { name: "plain", ignore_users: true, is_promised: true },
            Order { name: "fair, no users", ignore_users: false, is_promised: true },
        ],
    },
    Backlog {
        users: 1_000,
        orders: &[
            Order { name: "plain, 1,000 users", ignore_users: true, is_promised: true },
            Order { name: "fair, 1,000 users", ignore_users: false, is_promised: true },
        ],
    },
    Backlog { users: usize::MAX, orders: &[Order { name: "fair, a user each", ignore_users: false, is_promised: false }] },
];

/// Of an order: the median at each size.
type Row = (Order, Vec<(usize, f64)>);

pub(crate) async fn measure(home: &Home, words: &Words, report: &mut Report) {
    let sizes: &[usize] = if words.quick { &SIZES_QUICK } else { &SIZES };
    let mut rows: Vec<Row> = Vec::new();
    for backlog in &BACKLOGS {
        rows.extend(compare(home, backlog, sizes, words, report).await);
    }
    report.say(format!(
        "claim of 10, with its commit, milliseconds: median of {} in {} rounds",
        CLAIMS * words.rounds(),
        words.rounds()
    ));
    let heads: Vec<String> = rows.iter().map(|(order, _)| format!("{:>20}", order.name)).collect();
    report.say(format!("  {:>9} {}", "waiting", heads.join(" ")));
    for size in sizes {
        let at = |(_, medians): &Row| medians.iter().find(|(at, _)| at == size).map(|(_, median)| *median);
        let cells: Vec<String> =
            rows.iter().map(|row| at(row).map_or(format!("{:>20}", "-"), |median| format!("{median:>20.2}"))).collect();
        report.say(format!("  {size:>9} {}", cells.join(" ")));
    }
    promise(home, sizes, &rows, report);
}

fn promise(home: &Home, sizes: &[usize], rows: &[Row], report: &mut Report) {
    let word = home.word();
    let promised_at = if sizes.contains(&PROMISED_AT) { PROMISED_AT } else { sizes[sizes.len() - 1] };
    for (order, medians) in rows {
        let spread = Spread::of(&medians.iter().map(|(_, median)| *median).collect::<Vec<f64>>());
        let flat = spread.most / spread.least;
        report.figure(word, &format!("claim of 10, {}: worst / best", order.name), "x", &[flat]);
        if order.is_promised {
            let range = format!("{} to {} waiting", sizes[0], sizes[sizes.len() - 1]);
            report.promise(format!("{word}: claim of 10, {}, worst / best", order.name), flat, Bound::AtMost(2.0), "x", range);
        }
        if order.is_promised && !order.ignore_users {
            let median = medians.iter().find(|(size, _)| *size == promised_at).map_or(f64::NAN, |(_, median)| *median);
            report.say(format!("  {} at {promised_at}: {median:.2} ms median", order.name));
            let what = format!("{word}: claim of 10, {}, at {promised_at}", order.name);
            report.promise(what, median, Bound::AtMost(PROMISED_MS), "ms", "");
        }
    }
}

/// A database of each size, all at once: rounds go over the sizes, so that whatever else the machine does hits all of them.
async fn compare(home: &Home, backlog: &Backlog, sizes: &[usize], words: &Words, report: &mut Report) -> Vec<Row> {
    let mut queues: Vec<(usize, Fresh, Vec<Claim>)> = Vec::new();
    for &size in sizes.iter().filter(|size| backlog.users != usize::MAX || **size <= EACH_MAX) {
        let fresh = home.fresh().await;
        fill::waiting(&fresh.url, 0..size, backlog.users).await;
        settle_down(&fresh.url).await;
        fresh.queue.backend().reclaim(&Policy::default()).await.unwrap();
        let mut claims = Vec::new();
        for order in backlog.orders {
            claims.push(claim_of(&fresh.queue, 10, order.ignore_users).await);
        }
        queues.push((size, fresh, claims));
    }
    let mut rounds: Vec<Vec<Vec<f64>>> = vec![vec![Vec::new(); backlog.orders.len()]; queues.len()];
    for _ in 0..words.rounds() {
        for ((_, fresh, claims), rounds) in queues.iter().zip(&mut rounds) {
            for (claim, medians) in claims.iter().zip(rounds) {
                medians.push(round(&fresh.queue, claim).await);
            }
        }
    }
    let mut rows: Vec<Row> = backlog.orders.iter().map(|order| (*order, Vec::new())).collect();
    for ((size, fresh, _), rounds) in queues.into_iter().zip(&rounds) {
        for ((order, medians), rounds) in rows.iter_mut().zip(rounds) {
            let what = format!("claim of 10, {}, at {size}", order.name);
            medians.push((size, report.figure_quietly(home.word(), &what, "ms", rounds).median));
        }
        fresh.drop().await;
    }
    rows
}

async fn round(queue: &Queue, claim: &Claim) -> f64 {
    let mut times = Vec::with_capacity(CLAIMS);
    for number in 0..WARM_UP + CLAIMS {
        let started = Instant::now();
        let claimed = queue.backend().claim(claim).await.unwrap();
        if number >= WARM_UP {
            times.push(started.elapsed());
        }
        assert_eq!(claimed.tasks.len(), 10);
    }
    median_ms(&times)
}
