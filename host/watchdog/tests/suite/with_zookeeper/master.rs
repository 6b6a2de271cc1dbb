//! What a master does.

use std::time::{Duration, Instant};

use laelaps_test_zookeeper::{LONG, Server, eventually};
use laelaps_watchdog::{Error, ITEM_BYTES_MAX, NewQueue, TimerCount, WatchdogQueue};

use super::place::{Place, TIMER, items, soon};

#[tokio::test]
async fn a_queue_is_made_whole_and_looks_as_perl_makes_it() {
    let place = Place::new("made_whole").await;
    let queue = place.master(&NewQueue { sync_start: true, ..items(3) }).await;
    assert_eq!(queue.fetch_node("/q").await.unwrap().data, b"watchdog");
    assert_eq!(queue.fetch_node("/q/sync").await.unwrap().data, b"sync");
    for n in 0..3 {
        let item = queue.fetch_node(&format!("/q/queue-{n:010}")).await.unwrap();
        assert_eq!((item.data, item.owner, item.children), (n.to_string().into_bytes(), None, 0));
    }
    assert_eq!(queue.fetch_node("/q").await.unwrap().children, 4);
    assert_eq!(queue.queue_count().await.unwrap(), 3);
}

#[tokio::test]
async fn a_root_that_exists_or_has_no_parent_is_refused() {
    let place = Place::new("refused").await;
    place.master(&items(1)).await;
    let mut again = place.client().await;
    let error = again.create_queue(&items(2), TIMER).await.unwrap_err();
    assert!(matches!(&error, Error::RootExists { root, half_filled: false } if root == "/q"), "{error}");
    assert_eq!(again.queue_count().await.unwrap(), 1, "the refused queue left items behind");

    let mut orphan = WatchdogQueue::new(&place.options(), "/a/b/c").await.unwrap();
    let error = orphan.create_queue(&items(1), TIMER).await.unwrap_err();
    assert!(matches!(&error, Error::NoParent { parent, .. } if parent == "/a/b"), "{error}");
    orphan.create_queue(&NewQueue { parents: true, ..items(1) }, TIMER).await.unwrap();
    assert_eq!(orphan.queue_count().await.unwrap(), 1);
}

#[tokio::test]
async fn a_queue_that_is_still_being_filled_is_told_and_waited_for() {
    let place = Place::new("half_filled").await;
    place.master(&items(2)).await;
    // As it is between two steps of its master.
    let tool = zookeeper_client::Client::connect(place.servers()).await.unwrap();
    let root = place.absolute("/q");
    tool.set_data(&root, b"watchdog, being filled", None).await.unwrap();
    let mut child = place.client().await;
    let error = child.attach_queue(TIMER).await.unwrap_err();
    assert!(matches!(&error, Error::HalfFilled(root) if root == "/q"), "{error}");
    let error = place.client().await.create_queue(&items(1), TIMER).await.unwrap_err();
    assert!(matches!(&error, Error::RootExists { half_filled: true, .. }), "{error}");
    let waiting = tokio::spawn(async move { child.wait_attach(TIMER).await.map(|()| child) });
    tool.set_data(&root, b"watchdog", None).await.unwrap();
    let child = soon("the queue is whole", waiting).await.unwrap().unwrap();
    assert_eq!(child.queue_count().await.unwrap(), 2);
}

#[tokio::test]
async fn attaching_to_a_root_that_is_not_there_fails() {
    let place = Place::new("not_there").await;
    let mut queue = place.client().await;
    let error = queue.attach_queue(TIMER).await.unwrap_err();
    assert!(matches!(&error, Error::NoRoot(root) if root == "/q"), "{error}");
    assert!(matches!(queue.queue_count().await.unwrap_err(), Error::NoRoot(_)));
    assert!(matches!(queue.create_timer(b"x").await.unwrap_err(), Error::NoRoot(_)));
    assert!(matches!(queue.check_timers().await.unwrap_err(), Error::NoRoot(_)));
    assert!(matches!(queue.consume().await.unwrap_err(), Error::NoRoot(_)));
    assert!(matches!(queue.clear_timers().await.unwrap_err(), Error::NoRoot(_)));
}

#[tokio::test]
async fn a_queue_of_several_megabytes_is_made_without_losing_an_item() {
    let place = Place::new("large").await;
    let mut queue = NewQueue { sync_start: true, ..items(2_000) };
    queue.items.iter_mut().for_each(|item| item.resize(2_000, b'.'));
    queue.items.push(vec![b'x'; ITEM_BYTES_MAX]);
    let mut master = place.client().await;
    let cut = master.create_queue(&queue, TIMER).await.unwrap();
    assert_eq!((cut, master.queue_count().await.unwrap()), (2_001, 2_001));
    assert_eq!(master.fetch_node("/q").await.unwrap().data, b"watchdog");
    // The barrier of the first request took a number, too.
    assert_eq!(master.fetch_node("/q/queue-0000002001").await.unwrap().data.len(), ITEM_BYTES_MAX);
    place.child().await;
    assert_eq!(master.clear_timers().await.unwrap(), 2_003);
    assert!(!master.check_exists("/q").await.unwrap());
}

#[tokio::test]
async fn the_barrier_falls_when_the_first_child_comes_and_not_before() {
    let place = Place::new("barrier").await;
    let master = place.master(&NewQueue { sync_start: true, ..items(1) }).await;
    assert!(!master.wait_sync(Duration::from_millis(300)).await.unwrap(), "no child was there yet");
    let waiting = tokio::spawn(async move { master.wait_sync(LONG).await.map(|gone| (gone, Instant::now())) });
    let child = place.child().await;
    let before = Instant::now();
    child.create_timer(b"first").await.unwrap();
    let (gone, when) = soon("the master hears of its child", waiting).await.unwrap().unwrap();
    assert!(gone && when >= before);
    assert!(!child.check_exists("/q/sync").await.unwrap());
    assert!(child.wait_sync(LONG).await.unwrap());
}

#[tokio::test]
async fn who_waits_for_the_barrier_is_told_and_does_not_ask() {
    let server = Server::start().await;
    let place = Place::on(&server.address(), "told").await;
    let master = place.master(&NewQueue { sync_start: true, ..items(1) }).await;
    let before = server.monitor("zk_packets_received").await;
    assert!(!master.wait_sync(Duration::from_secs(3)).await.unwrap(), "no child was there yet");
    let requests = server.monitor("zk_packets_received").await - before;
    assert!(requests < 10, "{requests} requests within three seconds");
}

#[tokio::test]
async fn timers_are_counted_with_their_ages_on_the_servers_clock() {
    let place = Place::new("ages").await;
    place.master(&items(0)).await;
    let limit = Duration::from_millis(1_500);
    let (mut master, mut patient) = (place.client().await, place.client().await);
    master.attach_queue(limit).await.unwrap();
    patient.attach_queue(TIMER).await.unwrap();
    let (first, second) = (place.child().await, place.child().await);
    let made = Instant::now();
    let lazy = first.create_timer(b"lazy").await.unwrap();
    let keen = second.create_timer(b"keen").await.unwrap();
    // On a busy machine the keen one expires as well between its kick and the master's look; then the look is repeated.
    let expired = eventually(LONG, "a timer that is not kicked expires", async || {
        assert!(keen.kick_dog().await.unwrap());
        let expired = master.get_timers(true).await.unwrap();
        match expired.as_slice() {
            [one] if one.process_name() == "lazy" => Ok(one.clone()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!((expired.session, expired.czxid), (first.session().id(), lazy.czxid()));
    // The servers' clock tells milliseconds.
    assert!(expired.age > limit && expired.age <= made.elapsed() + Duration::from_millis(100), "{:?}", expired.age);
    eventually(LONG, "one timer of two is counted as expired", async || {
        assert!(keen.kick_dog().await.unwrap());
        let count = master.check_timers().await.unwrap();
        if count == (TimerCount { alive: 2, expired: 1 }) { Ok(()) } else { Err(format!("{count:?}")) }
    })
    .await;
    assert_eq!(patient.check_timers().await.unwrap(), TimerCount { alive: 2, expired: 0 });
    eventually(LONG, "timers that are kicked live", async || {
        assert!(lazy.kick_dog().await.unwrap() && keen.kick_dog().await.unwrap());
        let count = master.check_timers().await.unwrap();
        if count == (TimerCount { alive: 2, expired: 0 }) { Ok(()) } else { Err(format!("{count:?}")) }
    })
    .await;
    let names: Vec<_> = master.get_timers(false).await.unwrap().into_iter().map(|timer| timer.name).collect();
    assert_eq!(names, ["timer-0000000000", "timer-0000000001"]);
}

#[tokio::test]
async fn a_cleared_root_takes_everything_with_it_while_children_still_come() {
    let place = Place::new("cleared").await;
    let master = place.master(&NewQueue { sync_start: true, ..items(50) }).await;
    let child = place.child().await;
    let timer = child.create_timer(b"child").await.unwrap();
    let stubborn = place.child().await;
    let creating = tokio::spawn(async move {
        loop {
            if let Err(error) = stubborn.create_timer(b"stubborn").await {
                return error;
            }
        }
    });
    master.clear_timers().await.unwrap();
    assert!(!master.check_exists("/q").await.unwrap());
    assert!(!timer.kick_dog().await.unwrap(), "a cleared timer was kicked");
    assert!(matches!(creating.await.unwrap(), Error::NoRoot(_)));
}

#[tokio::test]
async fn a_childs_kick_never_reaches_a_strangers_timer_in_a_root_made_anew() {
    let place = Place::new("anew").await;
    let mut master = place.master(&items(0)).await;
    let child = place.child().await;
    let timer = child.create_timer(b"old").await.unwrap();
    assert!(timer.kick_dog().await.unwrap());
    master.clear_timers().await.unwrap();
    master.create_queue(&items(0), TIMER).await.unwrap();
    let stranger = place.child().await;
    let theirs = stranger.create_timer(b"new").await.unwrap();
    assert_eq!(theirs.path(), timer.path(), "the sequence starts again");
    assert!(!timer.kick_dog().await.unwrap());
    timer.end().await.unwrap();
    assert_eq!(stranger.fetch_node(theirs.path()).await.unwrap().data, b"new");
    assert!(theirs.kick_dog().await.unwrap());
}

#[tokio::test]
async fn a_node_with_strange_children_is_named_and_left() {
    let place = Place::new("strange").await;
    let master = place.master(&items(1)).await;
    let mut below = WatchdogQueue::new(&place.options(), "/q/queue-0000000000/strange").await.unwrap();
    below.create_queue(&items(0), TIMER).await.unwrap();
    let error = master.clear_timers().await.unwrap_err();
    assert!(matches!(&error, Error::NotEmpty(path) if path == "/q/queue-0000000000"), "{error}");
}
