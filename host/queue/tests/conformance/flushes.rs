//! What waits for the disk on PostgreSQL, and what a server that breaks down may forget. (SQLite: host/queue/src/sqlite/tests.rs.)

use std::time::Duration;

use laelaps_queue::{Beat, ClaimedTask, Config, HostDescription, LeaseAnswer, NewTask, Queue};
use laelaps_test_databases::Durability;
use laelaps_test_databases::postgres::Server;
use sqlx::{Connection, PgConnection};

use crate::fixture::{LONG, finish, patient, settled, task, task_of};

/// A server on which nothing flushes the log of what did not ask for it, for as long as a test runs.
async fn server() -> Server {
    let server = Server::start(Durability::Disk).await;
    let mut connection = PgConnection::connect(&server.url("postgres")).await.unwrap();
    for sql in ["ALTER SYSTEM SET wal_writer_delay = '10s'", "ALTER SYSTEM SET autovacuum = off", "SELECT pg_reload_conf()"] {
        sqlx::query(sql).execute(&mut connection).await.unwrap();
    }
    server
}

async fn queue(server: &Server) -> Queue {
    let queue = Queue::open(&Config { connections: patient(), ..Config::new(server.create_database().await) }).await.unwrap();
    queue.init().await.unwrap();
    queue
}

async fn claim(queue: &Queue) -> Vec<ClaimedTask> {
    let host =
        queue.backend().register_host(&HostDescription { name: "host".to_owned(), process_id: 1, identity: None }).await.unwrap();
    let claim = laelaps_queue::Claim::new(host, 9, LONG);
    queue.backend().claim(&claim).await.unwrap().tasks
}

fn beat(task: &ClaimedTask) -> Beat {
    Beat { lease_ref: task.lease_ref, alive_time: LONG, progress: None }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_claims_and_renewals_do_not_wait_for_the_disk() {
    const ROUNDS: usize = 20;
    let server = server().await;
    let queue = queue(&server).await;
    let mut looking = PgConnection::connect(&server.url("postgres")).await.unwrap();
    let mut unflushed = [0; 5];
    for round in 0..ROUNDS {
        let mut look = async |what: usize| {
            // After a submit the notice to other hosts may be on its way to the disk, in a transaction of its own: 40 bytes. A renewal has 120.
            const LOOK: &str = "SELECT pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn() > 80";
            unflushed[what] += usize::from(sqlx::query_scalar::<_, bool>(LOOK).fetch_one(&mut looking).await.unwrap());
        };
        queue.submit(task(&round.to_string())).await.unwrap();
        look(0).await;
        let mut claimed = claim(&queue).await;
        look(1).await;
        queue.submit(task_of("u", &format!("{round} of u"), Some(9))).await.unwrap();
        claimed.extend(claim(&queue).await);
        look(2).await;
        let settlements: Vec<_> = claimed.iter().take(1).map(|task| settled(task, finish())).collect();
        queue.backend().settle(&settlements).await.unwrap();
        look(3).await;
        assert_eq!(queue.backend().heartbeat(&[beat(&claimed[1])]).await.unwrap(), [LeaseAnswer::Held]);
        look(4).await;
        queue.backend().settle(&[settled(&claimed[1], finish())]).await.unwrap();
    }
    let [submitted, claimed, claimed_of_user, settled, renewed] = unflushed;
    // Now and then the server writes something itself, or flushes.
    assert!(submitted < ROUNDS / 2 && settled < ROUNDS / 2, "{unflushed:?}");
    assert!(claimed > ROUNDS / 2 && claimed_of_user > ROUNDS / 2 && renewed > ROUNDS / 2, "{unflushed:?}");
    queue.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_breaks_down_takes_back_claims_and_nothing_that_was_answered_as_stored() {
    let mut server = server().await;
    let queue = queue(&server).await;
    let mut forgotten = 0;
    for round in 0..5 {
        let tasks: Vec<NewTask> = (0..3).map(|number| task_of("u", &format!("{round}-{number}"), Some(2))).collect();
        queue.submit_many(&tasks).await.unwrap();
        let finished = claim(&queue).await;
        assert_eq!(finished.len(), 2, "as many as the user may have");
        queue.backend().settle(&finished.iter().map(|task| settled(task, finish())).collect::<Vec<_>>()).await.unwrap();
        let before = claim(&queue).await;
        let [held] = before.as_slice() else { panic!("{before:?}") };
        assert_eq!(queue.backend().heartbeat(&[beat(held)]).await.unwrap(), [LeaseAnswer::Held]);
        server.kill();
        Box::pin(server.restart()).await;
        let stats = queue.stats().await.unwrap();
        assert_eq!((stats.finished, stats.ready + stats.running), (round * 3 + 2, 1), "what was answered as stored is there");
        assert_eq!(queue.backend().audit().await.unwrap(), [""; 0]);
        if stats.ready == 1 {
            forgotten += 1;
            let again = claim(&queue).await;
            assert_eq!((again[0].key.as_str(), again[0].lost, again[0].attempt), (held.key.as_str(), 0, 1));
            assert_ne!(again[0].lease_ref, held.lease_ref, "a lease has a number of its own");
            assert_eq!(queue.backend().heartbeat(&[beat(held)]).await.unwrap(), [LeaseAnswer::Lost]);
            let answers = queue.backend().settle(&[settled(held, finish()), settled(&again[0], finish())]).await.unwrap();
            assert_eq!(answers, [LeaseAnswer::Lost, LeaseAnswer::Held]);
        } else {
            assert_eq!(queue.backend().settle(&[settled(held, finish())]).await.unwrap(), [LeaseAnswer::Held]);
        }
    }
    assert!(forgotten > 0, "the log was flushed each time: the test shows nothing");
    assert!(queue.backend().audit().await.unwrap().is_empty());
    tokio::time::timeout(Duration::from_secs(60), queue.close()).await.unwrap();
}
