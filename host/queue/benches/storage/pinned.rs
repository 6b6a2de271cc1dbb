//! Claims on PostgreSQL while a reader holds on to everything that was there when it began, and a task that enters behind the place that
//! claims have come to, since its producer took long to commit.

use std::time::{Duration, Instant};

use laelaps_queue::{Claim, Queue};
use sqlx::{Connection as _, Executor as _, PgConnection};

use crate::fill;
use crate::home::{Fresh, Home, settle_down};
use crate::report::{Bound, Report};
use crate::words::Words;
use crate::work::{claim_of, finish, rate};

const COUNT: usize = 1_000_000;
const BATCH: usize = 500;
/// "When tasks are found" in docs/databases.md: a look from the head comes after this, or after so many times as long as such a look takes.
const INTERVAL: Duration = Duration::from_secs(1);
const SHARE: u32 = 20;

const LATE: &str = "slow-producer";
/// A look from the head, without its locks.
const LOOK: &str = "SELECT ctid::text FROM laelaps.ready WHERE user_name = '' ORDER BY turn, task LIMIT 500";

/// What the claims met.
#[derive(Default)]
struct Met {
    /// How long each claim took, in order.
    claims: Vec<Duration>,
    /// The longest time from one claim to the next.
    turn_max: Duration,
    /// From the commit of the slow producer to the claim of its task.
    waited: Option<Duration>,
    /// How long a look from the head took then.
    look: Duration,
}

pub(crate) async fn measure(home: &Home, words: &Words, report: &mut Report) {
    let count = words.scaled(COUNT);
    let fresh = home.fresh().await;
    // Before everything else, so that its place is before all others.
    let mut producer = PgConnection::connect(&fresh.url).await.unwrap();
    producer.execute("BEGIN").await.unwrap();
    let submitted = sqlx::query("SELECT laelaps.submit($1, 'bench', wake => false)").bind(LATE);
    submitted.execute(&mut producer).await.unwrap();
    fill::waiting(&fresh.url, 0..count, 0).await;
    settle_down(&fresh.url).await;
    let mut reader = PgConnection::connect(&fresh.url).await.unwrap();
    reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM laelaps.host").await.unwrap();
    let started = Instant::now();
    let met = claim_all(&fresh, &mut producer, count).await;
    let rate = rate(count, started.elapsed());
    reader.execute("ROLLBACK").await.unwrap();
    tell(report, count, rate, &met);
    fresh.drop().await;
}

async fn claim_all(fresh: &Fresh, producer: &mut PgConnection, count: usize) -> Met {
    let queue: &Queue = &fresh.queue;
    let claim: Claim = claim_of(queue, BATCH, false).await;
    let mut looker = PgConnection::connect(&fresh.url).await.unwrap();
    looker.execute("SET enable_seqscan = off; SET enable_bitmapscan = off").await.unwrap();
    let mut met = Met::default();
    let mut committed: Option<Instant> = None;
    let mut turn = Instant::now();
    let mut claimed = 0;
    loop {
        let begun = Instant::now();
        met.turn_max = met.turn_max.max(begun.duration_since(turn));
        turn = begun;
        let tasks = queue.backend().claim(&claim).await.unwrap().tasks;
        if tasks.is_empty() {
            assert_eq!(claimed, count + 1, "the slow producer's task as well");
            return met;
        }
        met.claims.push(begun.elapsed());
        claimed += tasks.len();
        if let Some(committed) = committed.filter(|_| tasks.iter().any(|task| task.key == LATE)) {
            met.waited = Some(committed.elapsed());
            let begun = Instant::now();
            looker.execute(LOOK).await.unwrap();
            met.look = begun.elapsed();
            // That look is not the claims' doing.
            turn = Instant::now();
        }
        finish(queue, &tasks).await;
        if committed.is_none() && claimed >= count / 2 {
            producer.execute("COMMIT").await.unwrap();
            committed = Some(Instant::now());
        }
    }
}

fn tell(report: &mut Report, count: usize, rate: f64, met: &Met) {
    let tenth = met.claims.len() / 10;
    let mean_ms = |claims: &[Duration]| claims.iter().sum::<Duration>().as_secs_f64() * 1_000.0 / claims.len() as f64;
    let (first, last) = (mean_ms(&met.claims[..tenth]), mean_ms(&met.claims[met.claims.len() - tenth..]));
    report.say(format!("{count} claims in batches of {BATCH} under a reader that keeps every dead row"));
    report.figure("postgres", "pinned: claim and settle", "tasks/s", &[rate]);
    report.figure("postgres", "pinned: a claim, mean of the first tenth", "ms", &[first]);
    report.figure("postgres", "pinned: a claim, mean of the last tenth", "ms", &[last]);
    let what = format!("postgres: {count} claims under a reader, last tenth / first tenth");
    report.promise(what, last / first, Bound::AtMost(2.0), "x", "");
    let waited = met.waited.expect("it was claimed").as_secs_f64() * 1_000.0;
    // The claim that looks has to come round, and has to end.
    let bound = (INTERVAL.max(met.look * SHARE) + met.turn_max * 2).as_secs_f64() * 1_000.0;
    report.figure("postgres", "pinned: a look from the head", "ms", &[met.look.as_secs_f64() * 1_000.0]);
    report.figure("postgres", "pinned: from a slow producer's commit to the claim", "ms", &[waited]);
    let remark = format!("1 s or 20 looks, and two rounds of {:.0} ms at most", met.turn_max.as_secs_f64() * 1_000.0);
    report.promise(
        "postgres: a row that enters behind the mark is claimed".to_owned(),
        waited,
        Bound::AtMost(bound),
        "ms",
        remark,
    );
}
