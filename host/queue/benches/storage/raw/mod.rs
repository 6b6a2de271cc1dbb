//! What the database can do at most: the statements that the crate runs for a batch, fences and counts included, on plain connections and
//! without anything around them; and one table whose claim and finish move an index, as queues mostly do.

mod mariadb;
mod one_table;
mod postgres;
mod sqlite;

use std::time::Instant;

use tokio::runtime::Builder;
use tokio::task::JoinSet;

use crate::fill;
use crate::home::{Home, drop_database, settle_down};
use crate::work::{host, rate};

/// How long a lease lasts, and how long a finished task is kept, as in the crate's part of the run.
const ALIVE_MS: i64 = 3_600_000;
const RETENTION_MS: i64 = 300_000;

/// Tasks a second, claimed and finished in batches by the crate's statements on so many connections.
pub(crate) async fn of_the_layout(home: &Home, count: usize, batch: usize, connections: usize) -> f64 {
    let fresh = home.fresh().await;
    fill::waiting(&fresh.url, 0..count, 0).await;
    let host = host(&fresh.queue).await.0;
    settle_down(&fresh.url).await;
    let limit = i64::try_from(batch).unwrap();
    let url = fresh.url.clone();
    let rate = match home {
        Home::Sqlite => at_once(connections, count, move || sqlite::work(url.clone(), host, limit)).await,
        Home::Postgres(_) => at_once(connections, count, move || postgres::work(url.clone(), host, limit)).await,
        Home::MariaDb(_) => at_once(connections, count, move || mariadb::work(url.clone(), host, limit)).await,
    };
    fresh.drop().await;
    rate
}

/// The same through one table.
pub(crate) async fn of_one_table(home: &Home, count: usize, batch: usize, connections: usize) -> f64 {
    let (url, folder) = home.place().await;
    let limit = i64::try_from(batch).unwrap();
    one_table::fill(home, &url, i64::try_from(count).unwrap()).await;
    settle_down(&url).await;
    let place = url.clone();
    let rate = match home {
        Home::Sqlite => at_once(connections, count, move || one_table::on_sqlite(place.clone(), limit)).await,
        Home::Postgres(_) => at_once(connections, count, move || one_table::on_postgres(place.clone(), limit)).await,
        Home::MariaDb(_) => at_once(connections, count, move || one_table::on_mariadb(place.clone(), limit)).await,
    };
    drop_database(&url).await;
    drop(folder);
    rate
}

/// Runs as many workers at once, each on a thread of its own as if it were one program; answers how many tasks a second they finish.
async fn at_once<F, W>(connections: usize, count: usize, work: W) -> f64
where
    F: Future<Output = usize>,
    W: Fn() -> F + Clone + Send + 'static,
{
    let started = Instant::now();
    let mut working = JoinSet::new();
    for _ in 0..connections {
        let work = work.clone();
        working.spawn_blocking(move || Builder::new_current_thread().enable_all().build().unwrap().block_on(work()));
    }
    let finished: usize = working.join_all().await.into_iter().sum();
    let rate = rate(count, started.elapsed());
    assert_eq!(finished, count);
    rate
}
