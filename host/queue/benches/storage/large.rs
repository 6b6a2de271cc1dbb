//! What grows on PostgreSQL: dead rows that an old transaction keeps, and tasks that have ended.

use std::time::{Duration, Instant};

use laelaps_queue::{Filter, State};
use sqlx::{Connection, Executor, PgConnection};

use crate::{Fresh, Home, claim_of, fill, finish, rate};

/// Claims while a reader holds on to everything that was there when it began.
pub(crate) async fn pinned(home: &Home, count: usize) {
    const BATCH: usize = 500;
    let Fresh { queue, url, _folder, .. } = home.fresh().await;
    fill(&queue, count, |_| None).await;
    let mut reader = PgConnection::connect(&url).await.unwrap();
    reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM laelaps.host").await.unwrap();
    let claim = claim_of(&queue, BATCH, false).await;
    let mut claims: Vec<Duration> = Vec::with_capacity(count / BATCH);
    let started = Instant::now();
    loop {
        let begun = Instant::now();
        let tasks = queue.backend().claim(&claim).await.unwrap().tasks;
        if tasks.is_empty() {
            break;
        }
        claims.push(begun.elapsed());
        finish(&queue, &tasks).await;
    }
    let rate = rate(count, started.elapsed());
    reader.execute("ROLLBACK").await.unwrap();
    queue.close().await;
    let tenth = claims.len() / 10;
    let mean = |claims: &[Duration]| claims.iter().sum::<Duration>().as_secs_f64() * 1_000.0 / claims.len() as f64;
    let (first, last) = (mean(&claims[..tenth]), mean(&claims[claims.len() - tenth..]));
    println!("{count} claims in batches of {BATCH} under a reader that keeps every dead row: {rate:.0} tasks/s");
    println!("  a claim takes {first:.2} ms in the first tenth, {last:.2} ms in the last: {:.2} x\n", last / first);
}

/// Looks at, and removal from, a queue in which many tasks have ended.
pub(crate) async fn finished(home: &Home, count: usize) {
    const LOOKS: usize = 20;
    const TASKS: &str = "INSERT INTO laelaps.task (created_at, run_at, finished_at, retained_until, state, attempts, event, bytes, key, type, data)
        SELECT n, n, n, 1, 'finished', 1, 'finish', 2, 'ended-' || n, 'bench', '{}' FROM generate_series(1, $1::int8) AS n";
    const RETENTION: &str = "INSERT INTO laelaps.retention (until, tasks)
        SELECT 1, array_agg(id ORDER BY id) FROM laelaps.task GROUP BY id / 500 ORDER BY id / 500";
    let Fresh { queue, url, _folder, .. } = home.fresh().await;
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let number = i64::try_from(count).unwrap();
    sqlx::query(TASKS).bind(number).execute(&mut connection).await.unwrap();
    sqlx::query(RETENTION).execute(&mut connection).await.unwrap();
    let tally = "INSERT INTO laelaps.tally (type, finished) VALUES ('bench', $1)";
    sqlx::query(tally).bind(number).execute(&mut connection).await.unwrap();
    connection.execute("VACUUM ANALYZE").await.unwrap();
    connection.close().await.unwrap();
    fill(&queue, 1_000, |_| None).await;

    println!("with {count} finished tasks, milliseconds (median of {LOOKS})");
    let filter = |states: &[State], prefix: Option<&str>| Filter {
        states: states.to_vec(),
        key_prefix: prefix.map(str::to_owned),
        limit: 100,
        ..Filter::default()
    };
    let looks = [
        ("list, first page", filter(&[], None)),
        ("list finished", filter(&[State::Finished], None)),
        ("list waiting", filter(&[State::Waiting], None)),
        ("list failed", filter(&[State::Failed], None)),
        ("list by key", filter(&[], Some("ended-7777"))),
    ];
    for (name, filter) in &looks {
        let mut times = Vec::new();
        for _ in 0..LOOKS {
            let begun = Instant::now();
            queue.list(filter).await.unwrap();
            times.push(begun.elapsed());
        }
        tell(name, times);
    }
    let mut times = Vec::new();
    for _ in 0..LOOKS {
        let begun = Instant::now();
        assert!(queue.stats().await.unwrap().finished >= 1);
        times.push(begun.elapsed());
    }
    tell("stats", times);
    let mut times = Vec::new();
    for _ in 0..LOOKS {
        let begun = Instant::now();
        assert!(queue.backend().clean_up(1_000).await.unwrap() > 0);
        times.push(begun.elapsed());
    }
    tell("clean-up of 1,000", times);
    queue.close().await;
    println!();
}

fn tell(name: &str, mut times: Vec<Duration>) {
    times.sort();
    println!("  {name:20} {:9.2}", times[times.len() / 2].as_secs_f64() * 1_000.0);
}
