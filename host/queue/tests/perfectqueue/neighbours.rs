//! Slow, frozen and stubborn neighbours: none of them stops a host for longer than a few seconds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use laelaps_queue::{Beat, Claim, Config, Connections, Error, Event, LeaseAnswer, NewTask, Queue, Submitted};
use laelaps_test_databases::{PATIENCE, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fixture::{LONG, Site, asking, finish, keys, settled, table, task, task_of, with_follow_ups};

/// Well below the ten seconds that a session waits for a lock by default, and what a frozen host may keep.
const SOON: Duration = Duration::from_secs(9);

/// A producer's transaction that has inserted a row and stays open.
async fn open_insert(site: &Site, key: &str) -> crate::ruby::Ruby {
    let mut producer = site.ruby().await;
    producer.run_raw("START TRANSACTION").await;
    producer.submit(key, b"{}").await;
    producer
}

#[tokio::test]
async fn a_producers_open_transaction_stops_nothing_on_a_small_table() {
    for (side_table, ignore_users) in [(true, false), (true, true), (false, false), (false, true)] {
        let site = Site::with(table(side_table)).await;
        let host = site.watched("h").await;
        site.submit(&[task_of("u", "b", Some(3)), task("c"), task("d"), task("e")]).await;
        let producer = open_insert(&site, "a").await;
        let begun = Instant::now();
        let claim = Claim { ignore_users, ..asking(host, 9) };
        let tasks = site.backend().claim(&claim).await.unwrap().tasks;
        assert_eq!(tasks.len(), 4);
        let beats: Vec<Beat> =
            tasks.iter().map(|task| Beat { lease_ref: task.lease_ref, alive_time: LONG, progress: None }).collect();
        assert_eq!(site.backend().heartbeat(&beats).await.unwrap(), [LeaseAnswer::Held; 4]);
        for task in &tasks {
            assert_eq!(site.backend().update_data(task.lease_ref, b"{\"m\":1}").await.unwrap(), LeaseAnswer::Held);
        }
        assert_eq!(site.settle(&tasks[0], finish()).await, LeaseAnswer::Held);
        let more = settled(&tasks[1], Event::Retry { delay: None });
        assert_eq!(site.backend().settle(&[with_follow_ups(vec![task("f")], more)]).await.unwrap(), [LeaseAnswer::Held]);
        site.queue.cancel(&tasks[2].key).await.unwrap();
        site.backend().clean_up(100).await.unwrap();
        if side_table {
            assert_eq!(site.hand_on("h").await, [tasks[3].key.as_str()]);
        }
        assert!(begun.elapsed() < SOON, "something waited: {:?}", begun.elapsed());
        drop(producer);
    }
}

#[tokio::test]
async fn a_producer_that_holds_a_follow_ups_key_holds_up_that_settlement_alone() {
    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&[task("a"), task("b")]).await;
    let tasks = site.claim(host, 2).await;
    let mut producer = open_insert(&site, "next").await;
    let held_up = with_follow_ups(vec![task("next")], settled(&tasks[0], finish()));
    let busy = site.backend().settle(&[held_up.clone(), settled(&tasks[1], finish())]).await.unwrap_err();
    assert!(matches!(busy, Error::Busy { .. }) && busy.is_retryable(), "{busy}");
    assert_eq!(site.settle(&tasks[1], finish()).await, LeaseAnswer::Held);
    producer.run_raw("ROLLBACK").await;
    assert_eq!(site.backend().settle(&[held_up]).await.unwrap(), [LeaseAnswer::Held]);
    assert!(site.queue.exists("next").await.unwrap());
}

#[tokio::test]
async fn a_row_that_somebody_keeps_locked_is_left_out_of_a_claim() {
    for side_table in [true, false] {
        let site = Site::with(table(side_table)).await;
        let (host, mut stubborn) = (site.host().await, site.ruby().await);
        site.submit(&[task("a"), task("b")]).await;
        stubborn.run_raw("START TRANSACTION").await;
        stubborn.run("UPDATE {t} SET owner = owner WHERE id = 'a'").await;
        stubborn.run("SELECT * FROM {t} WHERE id = 'a' FOR UPDATE").await;
        assert_eq!(keys(&site.claim(host, 9).await), ["b"]);
        stubborn.run_raw("ROLLBACK").await;
        eventually(PATIENCE, "it is met again", async || {
            if keys(&site.claim(host, 9).await) == ["a"] { Ok(()) } else { Err("not yet".to_owned()) }
        })
        .await;
    }
}

#[tokio::test]
async fn a_dead_hosts_other_tasks_do_not_wait_for_a_locked_one() {
    let site = Site::new().await;
    let (host, mut stubborn) = (site.watched("h").await, site.ruby().await);
    site.submit(&[task("a"), task("b"), task("c")]).await;
    assert_eq!(site.claim(host, 9).await.len(), 3);
    stubborn.run_raw("START TRANSACTION").await;
    stubborn.run("SELECT * FROM {t} WHERE id = 'b' FOR UPDATE").await;
    let other = site.another().await;
    assert_eq!(other.hand_on("h").await, ["a", "c"]);
    let coming_back = tokio::spawn(async move { other.hand_on("h").await });
    // It comes back for the third as soon as that can be had.
    stubborn.run_raw("ROLLBACK").await;
    assert_eq!(coming_back.await.unwrap(), ["b"]);
}

#[tokio::test]
async fn closing_does_not_wait_for_the_lock() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task("a")]).await;
    assert!(ruby.lock().await);
    let begun = Instant::now();
    let claimed = site.backend().claim(&asking(host, 1)).await.unwrap();
    assert!(claimed.tasks.is_empty());
    assert_eq!(claimed.next_due_in, Some(Duration::ZERO), "it keeps its place among those who wait");
    site.queue.close().await;
    assert!(begun.elapsed() < SOON, "it waited for the lock: {:?}", begun.elapsed());
}

#[tokio::test]
async fn a_lock_that_no_claim_fetches_is_given_back() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task("a")]).await;
    assert!(ruby.lock().await);
    assert!(site.claim(host, 1).await.is_empty());
    ruby.unlock().await;
    // The host is stopped, and claims no more.
    eventually(PATIENCE, "others can acquire", async || {
        if ruby.number("SELECT IS_FREE_LOCK('{lock}')").await == 1 { Ok(()) } else { Err("it is held".to_owned()) }
    })
    .await;
    assert_eq!(ruby.acquire_fair(300, 1).await, ["a"]);
}

/// Stands between a host and the server, and passes nothing on any more once the client has sent what contains `at`: the host is frozen or cut off there, and
/// the server hears no end of its connection.
struct Freezer {
    url: String,
    armed: Arc<AtomicBool>,
}

impl Freezer {
    async fn before(url: &str, at: &'static [u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (before, database) = url.rsplit_once('/').unwrap();
        let (user, address) = before.rsplit_once('@').unwrap();
        let (address, armed) = (address.to_owned(), Arc::new(AtomicBool::new(false)));
        let port = listener.local_addr().unwrap().port();
        let freezing = Arc::clone(&armed);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&address).await.unwrap();
                tokio::spawn(pass_on(client, server, Arc::clone(&freezing), at));
            }
        });
        Self { url: format!("{user}@127.0.0.1:{port}/{database}"), armed }
    }
}

/// What contains `at` still reaches the server; nothing after it does, and no answer.
async fn pass_on(mut client: TcpStream, mut server: TcpStream, armed: Arc<AtomicBool>, at: &[u8]) {
    let (mut asked, mut answered) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        tokio::select! {
            read = client.read(&mut asked) => match read {
                Ok(bytes @ 1..) => {
                    server.write_all(&asked[..bytes]).await.unwrap();
                    if asked[..bytes].windows(at.len()).any(|part| part == at) && armed.swap(false, Ordering::AcqRel) {
                        return std::future::pending().await;
                    }
                }
                _ => return,
            },
            read = server.read(&mut answered) => match read {
                Ok(bytes @ 1..) => client.write_all(&answered[..bytes]).await.unwrap(),
                _ => return,
            },
        }
    }
}

/// A site whose host is frozen as soon as it has sent what contains this.
async fn frozen_at(site: &Site, at: &'static [u8]) -> (Site, Freezer) {
    let freezer = Freezer::before(&site.config.url, at).await;
    let config = Config { url: freezer.url.clone(), ..site.config.clone() };
    (Site { queue: Queue::open(&config).await.unwrap(), config }, freezer)
}

#[tokio::test]
async fn a_host_that_is_frozen_with_the_lock_loses_it_within_seconds() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    let (frozen, freezer) = frozen_at(&site, b"GET_LOCK").await;
    let host = frozen.host().await;
    site.submit(&[task("a")]).await;
    freezer.armed.store(true, Ordering::Release);
    let backend = Arc::clone(frozen.backend());
    let claiming = tokio::spawn(async move { backend.claim(&asking(host, 1)).await });
    eventually(PATIENCE, "it has the lock", async || {
        if ruby.number("SELECT IS_FREE_LOCK('{lock}')").await == 0 { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    eventually(PATIENCE, "the server takes it away", async || {
        if ruby.number("SELECT IS_FREE_LOCK('{lock}')").await == 1 { Ok(()) } else { Err("it has the lock".to_owned()) }
    })
    .await;
    claiming.abort();
}

#[tokio::test]
async fn a_host_that_is_frozen_in_a_transaction_holds_its_rows_for_seconds_only() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    // What the statement that locks the row of an update has bound.
    let (frozen, freezer) = frozen_at(&site, b"[[0,\"a\"").await;
    let host = frozen.watched("h").await;
    site.submit(&[task("a")]).await;
    let claimed = frozen.claim(host, 1).await.remove(0);
    freezer.armed.store(true, Ordering::Release);
    let backend = Arc::clone(frozen.backend());
    let updating = tokio::spawn(async move { backend.update_data(claimed.lease_ref, b"{\"m\":1}").await });
    let locked = "SELECT COUNT(*) FROM (SELECT id FROM {t} WHERE id = 'a' FOR UPDATE SKIP LOCKED) AS free";
    eventually(PATIENCE, "it has locked its row", async || {
        if ruby.number(locked).await == 0 { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    // The watchdog finds it dead, and its task is to be had as soon as the server has ended the transaction.
    assert_eq!(site.hand_on("h").await, ["a"]);
    updating.abort();
}

#[tokio::test]
async fn a_submit_whose_answer_was_lost_is_told_as_its_own_and_wakes() {
    for (side_table, tasks) in [(false, 1), (true, 1), (false, 3)] {
        let site = Site::with(table(side_table)).await;
        let (far, freezer) = frozen_at(&site, b"own row").await;
        let connections = Connections { statement_timeout: Duration::from_secs(2), ..far.config.connections.clone() };
        let config = Config { connections, ..far.config.clone() };
        let queue = Queue::open(&config).await.unwrap();
        queue.stats().await.unwrap();
        let marked = NewTask { data: b"{\"m\":\"own row\"}".to_vec(), ..task("a0") };
        let others = (1..tasks).map(|n| task(&format!("a{n}")));
        let tasks: Vec<NewTask> = std::iter::once(marked).chain(others).collect();
        freezer.armed.store(true, Ordering::Release);
        // Longer than two of its time-outs: the answer does not come, and it tries on another connection.
        let answers = queue.submit_many(&tasks).await.unwrap();
        assert!(!freezer.armed.load(Ordering::Acquire), "an answer was lost");
        assert_eq!(answers, vec![Submitted::Created; tasks.len()]);
        tokio::time::timeout(PATIENCE, queue.backend().wakeup()).await.expect("the claim is woken");
        assert_eq!(queue.submit_many(&tasks).await.unwrap(), vec![Submitted::AlreadyExists; tasks.len()]);
    }
}
