//! A claim of ten where the same backlog stands in few queues or in many, of as many types.

use std::sync::Arc;
use std::time::Instant;

use laelaps_queue::{Claim, Policy, Queue};

use crate::fill;
use crate::home::{Fresh, Home, settle_down};
use crate::report::{Bound, Report, Spread, median_ms};
use crate::words::Words;
use crate::work::claim_of;

const WAITING: usize = 5_000_000;
const WAITING_QUICK: usize = 100_000;
/// The queues in which they wait.
const QUEUES: [usize; 3] = [1, 10, 1_000];
/// Half of the tasks are nobody's, and the others are those of so many users of all queues together.
const USERS: usize = 1_000;
/// Claims of a round; ten tasks each.
const CLAIMS: usize = 50;
/// Claims before those that are measured: another database has just had the memory.
const WARM_UP: usize = 5;

/// From which queues a claim takes.
#[derive(Clone, Copy)]
struct Asked {
    name: &'static str,
    /// So many, others with each claim. None: all.
    queues: Option<usize>,
    ignore_users: bool,
    /// Promised to cost the same with any number of queues. The others look at each queue that they ask.
    is_flat: bool,
}

const ASKED: [Asked; 5] = [
    Asked { name: "all", queues: None, ignore_users: false, is_flat: true },
    Asked { name: "one", queues: Some(1), ignore_users: false, is_flat: true },
    Asked { name: "ten", queues: Some(10), ignore_users: false, is_flat: false },
    Asked { name: "plain, all", queues: None, ignore_users: true, is_flat: false },
    Asked { name: "plain, one", queues: Some(1), ignore_users: true, is_flat: true },
];

pub(crate) async fn measure(home: &Home, words: &Words, report: &mut Report) {
    let waiting = if words.quick { WAITING_QUICK } else { WAITING };
    // All at once: rounds go over them, so that whatever else the machine does hits all of them.
    let mut filled: Vec<(usize, Fresh, Vec<Claim>)> = Vec::new();
    for queues in QUEUES {
        let fresh = home.fresh().await;
        fill::waiting_in(&fresh.url, 0..waiting / 2, 0, queues).await;
        fill::waiting_in(&fresh.url, waiting / 2..waiting, USERS / queues, queues).await;
        settle_down(&fresh.url).await;
        fresh.queue.backend().reclaim(&Policy::default()).await.unwrap();
        let mut claims = Vec::new();
        for asked in ASKED {
            claims.push(claim_of(&fresh.queue, 10, asked.ignore_users).await);
        }
        filled.push((queues, fresh, claims));
    }
    let mut rounds: Vec<Vec<Vec<f64>>> = vec![vec![Vec::new(); ASKED.len()]; filled.len()];
    for number in 0..words.rounds() {
        for ((queues, fresh, claims), rounds) in filled.iter().zip(&mut rounds) {
            for ((claim, asked), medians) in claims.iter().zip(ASKED).zip(rounds) {
                medians.push(round(&fresh.queue, claim, asked, *queues, number).await);
            }
        }
    }
    report.say(format!(
        "claim of 10 of {waiting} waiting, with its commit, milliseconds: median of {} in {} rounds",
        CLAIMS * words.rounds(),
        words.rounds()
    ));
    let heads: Vec<String> = ASKED.iter().map(|asked| format!("{:>12}", asked.name)).collect();
    report.say(format!("  {:>9} {}", "queues", heads.join(" ")));
    let mut medians = vec![Vec::new(); ASKED.len()];
    for ((queues, fresh, _), rounds) in filled.into_iter().zip(&rounds) {
        let mut cells = Vec::new();
        for ((asked, medians), rounds) in ASKED.iter().zip(&mut medians).zip(rounds) {
            let what = format!("claim of 10 of {}, {queues} queues", asked.name);
            let median = report.figure_quietly(home.word(), &what, "ms", rounds).median;
            cells.push(format!("{median:>12.2}"));
            medians.push(median);
        }
        report.say(format!("  {queues:>9} {}", cells.join(" ")));
        fresh.drop().await;
    }
    for (asked, medians) in ASKED.iter().zip(&medians).filter(|(asked, _)| asked.is_flat) {
        let spread = Spread::of(medians);
        let what = format!("{}: claim of 10 of {}, worst / best", home.word(), asked.name);
        report.promise(what, spread.most / spread.least, Bound::AtMost(2.0), "x", "1, 10 and 1,000 queues");
    }
}

async fn round(queue: &Queue, claim: &Claim, asked: Asked, queues: usize, round: usize) -> f64 {
    let mut times = Vec::with_capacity(CLAIMS);
    for number in 0..WARM_UP + CLAIMS {
        let claim = Claim { queues: asked.queues.map(|count| names(count, queues, round * CLAIMS + number)), ..claim.clone() };
        let started = Instant::now();
        let claimed = queue.backend().claim(&claim).await.unwrap();
        if number >= WARM_UP {
            times.push(started.elapsed());
        }
        assert_eq!(claimed.tasks.len(), 10, "{} of {queues} in round {round}, claim {number}", asked.name);
    }
    median_ms(&times)
}

/// So many of the queues, from this one on.
fn names(count: usize, queues: usize, first: usize) -> Arc<[String]> {
    let name = |number| if queues == 1 { "default".to_owned() } else { format!("queue-{}", number % queues) };
    (first..first + count.min(queues)).map(name).collect()
}
