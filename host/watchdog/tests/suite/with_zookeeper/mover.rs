//! The move of items into a database, interrupted everywhere.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use laelaps_test_zookeeper::Server;
use laelaps_watchdog::mover::{MoveError, Mover, Store, StoreError};
use laelaps_watchdog::{Error, Root, WatchdogQueue};
use tokio::sync::Notify;

use super::place::{Place, TIMER, items, soon};

/// What a task is in the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Held,
    Waiting,
}

/// A database that keeps count of what was ever released, retention or not, and that fails where it is told to.
#[derive(Clone, Debug, Default)]
struct Database(Arc<Mutex<Contents>>);

#[derive(Debug, Default)]
struct Contents {
    tasks: BTreeMap<String, (State, Vec<u8>)>,
    /// Every release that made a task claimable, with its item.
    released: Vec<(String, Vec<u8>)>,
    fails: Option<(&'static str, When)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Before,
    After,
}

impl Database {
    fn fail(&self, call: &'static str, when: When) {
        self.0.lock().expect("no holder panics").fails = Some((call, when));
    }

    /// Does `act`, unless the call is to fail before; fails afterwards, if it is to fail after. Each once.
    fn call<T>(&self, call: &'static str, act: impl FnOnce(&mut Contents) -> T) -> Result<T, StoreError> {
        let mut contents = self.0.lock().expect("no holder panics");
        let fails = contents.fails.filter(|(fails, _)| *fails == call);
        if fails.is_some() {
            contents.fails = None;
        }
        match fails {
            Some((_, When::Before)) => Err("the test killed it before".into()),
            Some((_, When::After)) => {
                act(&mut contents);
                Err("the test killed it after".into())
            }
            None => Ok(act(&mut contents)),
        }
    }

    /// Finished tasks are forgotten.
    fn retention(&self) {
        self.0.lock().expect("no holder panics").tasks.retain(|_, (state, _)| *state == State::Held);
    }

    /// The items that became tasks, sorted.
    fn released(&self) -> Vec<String> {
        let contents = self.0.lock().expect("no holder panics");
        let mut items: Vec<_> = contents.released.iter().map(|(_, item)| String::from_utf8_lossy(item).into_owned()).collect();
        items.sort_unstable_by_key(|item| item.parse::<usize>().unwrap_or(usize::MAX));
        items
    }

    fn held_count(&self) -> usize {
        self.0.lock().expect("no holder panics").tasks.values().filter(|(state, _)| *state == State::Held).count()
    }
}

impl Store for Database {
    async fn hold(&self, key: &str, item: &[u8]) -> Result<(), StoreError> {
        self.call("hold", |contents| {
            contents.tasks.entry(key.to_owned()).or_insert((State::Held, item.to_vec()));
        })
    }

    async fn release(&self, key: &str) -> Result<(), StoreError> {
        self.call("release", |contents| {
            if let Some((state @ State::Held, item)) = contents.tasks.get_mut(key) {
                *state = State::Waiting;
                let item = item.clone();
                contents.released.push((key.to_owned(), item));
            }
        })
    }

    async fn drop_held(&self, key: &str) -> Result<(), StoreError> {
        self.call("drop", |contents| {
            if contents.tasks.get(key).is_some_and(|(state, _)| *state == State::Held) {
                contents.tasks.remove(key);
            }
        })
    }

    async fn held(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.call("held", |contents| {
            let held = contents.tasks.iter().filter(|(key, (state, _))| *state == State::Held && key.starts_with(prefix));
            held.map(|(key, _)| key.clone()).collect()
        })
    }
}

async fn mover(place: &Place, database: &Database) -> Mover<Database> {
    let markers = Root::new("/ours/moved").expect("a root");
    Mover::open(place.child().await, markers, database.clone()).await.expect("a mover")
}

async fn move_all(mover: &mut Mover<Database>) {
    while mover.move_one().await.expect("a move").is_some() {}
}

/// No markers and nothing held is left.
async fn all_is_settled(place: &Place, database: &Database) {
    let client = place.client().await;
    let markers = client.fetch_node("/ours/moved").await.expect("the markers' root");
    assert_eq!((database.held_count(), markers.children), (0, 0));
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|n| n.to_string()).collect()
}

#[tokio::test]
async fn items_become_tasks_under_keys_that_a_root_made_anew_does_not_repeat() {
    let place = Place::new("keys").await;
    let database = Database::default();
    let mut master = place.master(&items(2)).await;
    let mut mover = mover(&place, &database).await;
    move_all(&mut mover).await;
    assert_eq!(database.released(), numbers(2));
    master.clear_timers().await.unwrap();
    assert!(matches!(mover.move_one().await.unwrap_err(), MoveError::ZooKeeper(Error::NoRoot(_))));
    master.create_queue(&items(2), TIMER).await.unwrap();
    soon("the items of the new root are moved", move_all(&mut mover)).await;
    assert_eq!(database.released(), ["0", "0", "1", "1"]);
    let keys: Vec<_> = database.0.lock().unwrap().tasks.keys().cloned().collect();
    assert_eq!(keys.len(), 4, "two roots, one key: {keys:?}");
    all_is_settled(&place, &database).await;
}

#[tokio::test]
async fn a_mover_killed_at_any_step_loses_no_item_and_doubles_none() {
    for (number, (call, when)) in
        [("hold", When::Before), ("hold", When::After), ("release", When::Before), ("release", When::After)]
            .into_iter()
            .enumerate()
    {
        for forgotten in [false, true] {
            let place = Place::new(&format!("step_{number}_{forgotten}")).await;
            let database = Database::default();
            place.master(&items(3)).await;
            let mut first = mover(&place, &database).await;
            first.move_one().await.unwrap();
            database.fail(call, when);
            assert!(matches!(first.move_one().await.unwrap_err(), MoveError::Store { .. }), "{call} {when:?}");
            drop(first);
            if forgotten {
                // What was released is finished and forgotten before anybody cleans up.
                database.retention();
            }
            move_all(&mut mover(&place, &database).await).await;
            assert_eq!(database.released(), numbers(3), "killed {when:?} {call}, forgotten: {forgotten}");
            all_is_settled(&place, &database).await;
        }
    }
}

#[tokio::test]
async fn an_item_that_a_peer_takes_while_we_hold_its_task_is_the_peers() {
    let place = Place::new("peer").await;
    let database = Database::default();
    let master = place.master(&items(1)).await;
    let mut ours = mover(&place, &database).await;
    database.fail("hold", When::After);
    ours.move_one().await.unwrap_err();
    assert_eq!(database.held_count(), 1);
    assert!(master.consume().await.unwrap().is_some());
    assert_eq!(ours.move_one().await.unwrap(), None);
    assert_eq!(ours.recover().await.unwrap(), 1);
    assert!(database.released().is_empty());
    all_is_settled(&place, &database).await;
}

#[tokio::test]
async fn what_a_dead_mover_held_goes_with_a_root_that_is_cleared_and_made_anew() {
    let place = Place::new("held_anew").await;
    let database = Database::default();
    let mut master = place.master(&items(1)).await;
    let mut first = mover(&place, &database).await;
    database.fail("hold", When::After);
    first.move_one().await.unwrap_err();
    drop(first);
    master.clear_timers().await.unwrap();
    // The same sequence number, another item.
    master.create_queue(&items(1), TIMER).await.unwrap();
    move_all(&mut mover(&place, &database).await).await;
    assert_eq!(database.released(), ["0"]);
    all_is_settled(&place, &database).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn movers_and_a_peer_race_and_every_item_is_somebodys_once() {
    let place = Place::new("race").await;
    let database = Database::default();
    place.master(&items(300)).await;
    let mut movers = Vec::new();
    for _ in 0..4 {
        movers.push(mover(&place, &database).await);
    }
    let peer = place.child().await;
    // Not before there is something to race with: a busy machine could let it take everything first.
    let has_moved = Arc::new(Notify::new());
    let begins = has_moved.clone();
    let peer = tokio::spawn(async move {
        begins.notified().await;
        consume_all(&peer).await
    });
    let movers: Vec<_> = movers
        .into_iter()
        .map(|mut mover| {
            let has_moved = has_moved.clone();
            tokio::spawn(async move {
                let mut moved = 0;
                while mover.move_one().await.unwrap().is_some() {
                    moved += 1;
                    has_moved.notify_one();
                    if moved % 10 == 0 {
                        mover.recover().await.unwrap();
                    }
                }
                moved
            })
        })
        .collect();
    let mut moved = 0;
    for mover in movers {
        moved += mover.await.unwrap();
    }
    let theirs = peer.await.unwrap();
    let mut all = database.released();
    println!("{} items were moved by four movers, {} taken by a peer", all.len(), theirs.len());
    // Another mover's recovery may have released what one of them took.
    assert!(moved > 0 && !all.is_empty());
    all.extend(theirs);
    all.sort_unstable_by_key(|item| item.parse::<usize>().unwrap());
    assert_eq!(all, numbers(300));
    let last = mover(&place, &database).await;
    last.recover().await.unwrap();
    all_is_settled(&place, &database).await;
}

async fn consume_all(peer: &WatchdogQueue) -> Vec<String> {
    let mut taken = Vec::new();
    while let Some(item) = peer.consume().await.expect("an item or none") {
        taken.push(String::from_utf8(item.data).expect("a number"));
    }
    taken
}

#[tokio::test]
async fn a_mover_waits_for_items_without_asking_again_and_again() {
    let server = Server::start().await;
    let place = Place::on(&server.address(), "waits").await;
    let master = place.master(&items(1)).await;
    let child = place.child().await;
    assert!(child.wait_for_items().await.unwrap());
    assert!(child.consume().await.unwrap().is_some());
    let before = server.monitor("zk_packets_received").await;
    let mut waiting = tokio::spawn(async move { child.wait_for_items().await });
    assert!(tokio::time::timeout(Duration::from_secs(3), &mut waiting).await.is_err(), "nothing is left to be taken");
    let requests = server.monitor("zk_packets_received").await - before;
    assert!(requests < 10, "{requests} requests within three seconds");
    master.clear_timers().await.unwrap();
    assert!(!soon("the child hears that the root is cleared", waiting).await.unwrap().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_clears_at_the_moment_when_the_root_of_the_markers_is_made_does_not_take_it_for_a_queue() {
    let place = Place::new("markers_made").await;
    for round in 0..100 {
        let markers = Root::new(format!("/markers-{round}")).unwrap();
        let master = WatchdogQueue::new(&place.options(), markers.path()).await.unwrap();
        let clearing = tokio::spawn(async move {
            loop {
                match master.clear_timers().await {
                    Err(Error::NoRoot(_)) => tokio::task::yield_now().await,
                    ended => return ended,
                }
            }
        });
        Mover::open(place.client().await, markers, Database::default()).await.unwrap();
        let cleared = clearing.await.unwrap();
        assert!(matches!(cleared, Err(Error::MarkersRoot(_))), "round {round}: {cleared:?}");
    }
}
