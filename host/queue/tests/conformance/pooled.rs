//! PgBouncer in transaction mode, as Debian has it and with no settings for us. All promises through one: `tests/soak pgbouncer`.

use laelaps_queue::{Config, HostDescription, NewTask, Queue};
use laelaps_test_databases::postgres::{Bouncer, shared};
use tokio::task::JoinSet;

use crate::fixture::postgres::raw;
use crate::fixture::{Database, Fixture, finish, patient, settled, task};

/// A queue through a bouncer before the tests' server, and the same without one.
async fn pooled() -> (Bouncer, Queue, Fixture) {
    let direct = Fixture::new(Database::Postgres).await;
    let bouncer = tokio::task::spawn_blocking(|| {
        let starting = async { Bouncer::before(shared().await.port(), "pgbouncer").await };
        tokio::runtime::Handle::current().block_on(starting)
    });
    let bouncer = bouncer.await.unwrap();
    let (_, database) = direct.config.url.rsplit_once('/').unwrap();
    let url = format!("postgres://postgres@127.0.0.1:{}/{database}", bouncer.port());
    let queue = Queue::open(&Config { connections: patient(), ..Config::new(url) }).await.unwrap();
    (bouncer, queue, direct)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_work_through_a_pooler_that_knows_no_prepared_statements() {
    const TASKS: usize = 400;
    let (_bouncer, queue, direct) = pooled().await;
    let tasks: Vec<NewTask> = (0..TASKS).map(|number| task(&number.to_string())).collect();
    queue.submit_many(&tasks).await.unwrap();
    let mut workers = JoinSet::new();
    for _ in 0..4 {
        let queue = queue.clone();
        workers.spawn(async move {
            let description = HostDescription { name: "worker".to_owned(), process_id: 1, identity: None };
            let host = queue.backend().register_host(&description).await.unwrap();
            let mut finished = 0;
            loop {
                let claim = laelaps_queue::Claim::new(host, 10, crate::fixture::LONG);
                let claimed = queue.backend().claim(&claim).await.unwrap().tasks;
                let group: Vec<_> = claimed.iter().map(|task| settled(task, finish())).collect();
                finished += queue.backend().settle(&group).await.unwrap().len();
                if claimed.is_empty() {
                    return finished;
                }
            }
        });
    }
    assert_eq!(workers.join_all().await.into_iter().sum::<usize>(), TASKS);
    direct.audit().await;
    queue.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_pooler_keeps_from_a_host_is_named_and_nobody_listens() {
    let (_bouncer, queue, direct) = pooled().await;
    let warnings = queue.backend().warnings().await.unwrap().join("\n");
    for words in ["knows no prepared statements", "give them to the role", "does not LISTEN"] {
        assert!(warnings.contains(words), "{words}: {warnings}");
    }
    assert!(tokio::time::timeout(std::time::Duration::from_millis(300), queue.wakeup()).await.is_err());
    const LISTENERS: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query ILIKE 'LISTEN%'";
    let listeners: i64 = sqlx::query_scalar(LISTENERS).fetch_one(&mut raw(&direct.config).await).await.unwrap();
    assert_eq!(listeners, 0);
    assert_eq!(direct.backend().warnings().await.unwrap(), Vec::<String>::new(), "nothing is said of a direct connection");
    queue.close().await;
}
