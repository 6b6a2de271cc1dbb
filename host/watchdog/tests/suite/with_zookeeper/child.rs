//! What a child does.

use std::collections::BTreeSet;
use std::sync::Arc;

use laelaps_watchdog::{Error, Item, SessionId};
use tokio::sync::Barrier;

use super::place::{Place, items};

#[tokio::test]
async fn a_timer_lives_with_its_session_and_ends_when_told() {
    let place = Place::new("lives").await;
    let master = place.master(&items(0)).await;
    let child = place.child().await;
    let timer = child.create_timer(b"host:42").await.unwrap();
    let node = master.fetch_node(timer.path()).await.unwrap();
    assert_eq!((node.data.as_slice(), node.owner, node.czxid), (&b"host:42"[..], Some(child.session().id()), timer.czxid()));
    let before = node.version;
    assert!(timer.kick_dog().await.unwrap());
    let kicked = master.fetch_node(timer.path()).await.unwrap();
    assert!(kicked.modified_ms >= node.modified_ms && kicked.version == before + 1 && kicked.data == b"host:42");

    timer.end().await.unwrap();
    assert_eq!(master.check_timers().await.unwrap().alive, 0);
    let timer = child.create_timer(b"again").await.unwrap();
    assert!(timer.path().ends_with("timer-0000000001"), "{}", timer.path());
    drop(timer);
    assert_eq!(master.check_timers().await.unwrap().alive, 1, "a timer does not end with its handle");
    let session = child.session().clone();
    drop(child);
    session.close().await;
    assert_eq!(master.check_timers().await.unwrap().alive, 0, "a timer ends with its session");
}

#[tokio::test]
async fn another_process_can_kick_a_timer_by_its_name() {
    let place = Place::new("by_name").await;
    place.master(&items(0)).await;
    let child = place.child().await;
    let timer = child.create_timer(b"owner").await.unwrap();
    let other = place.child().await;
    let opened = other.open_timer(timer.name()).await.unwrap();
    assert!(opened.kick_dog().await.unwrap());
    assert!(timer.kick_dog().await.unwrap(), "a kick from elsewhere must not disturb the owner's");
    assert!(opened.kick_dog().await.unwrap());
    assert!(matches!(other.open_timer("timer-0000000007").await.unwrap_err(), Error::NoNode(_)));
    assert!(matches!(other.open_timer("sync").await.unwrap_err(), Error::Config { .. }));
    assert_eq!(other.fetch_node(timer.path()).await.unwrap().data, b"owner");
}

#[tokio::test]
async fn a_missing_node_is_a_typed_error() {
    let place = Place::new("missing").await;
    let client = place.client().await;
    assert!(!client.check_exists("/nothing").await.unwrap());
    assert!(client.check_exists("/").await.unwrap());
    assert!(matches!(client.fetch_node("/nothing").await.unwrap_err(), Error::NoNode(path) if path == "/nothing"));
    assert!(matches!(client.fetch_node("nothing").await.unwrap_err(), Error::Config { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_racing_children_get_each_of_a_thousand_items_once() {
    let place = Place::new("racing").await;
    let master = place.master(&items(1_000)).await;
    let mut children = Vec::new();
    for _ in 0..20 {
        children.push(place.child().await);
    }
    let sessions: BTreeSet<SessionId> = children.iter().map(|child| child.session().id()).collect();
    assert_eq!(sessions.len(), 20);
    let begun = std::time::Instant::now();
    let number = |item: Item| String::from_utf8(item.data).unwrap().parse::<usize>().unwrap();
    // Nobody takes a second item before everybody has a first one, so that all of them race.
    let raced = Arc::new(Barrier::new(children.len()));
    let children: Vec<_> = children
        .into_iter()
        .map(|child| {
            let raced = raced.clone();
            tokio::spawn(async move {
                let mut taken = vec![number(child.consume().await.unwrap().expect("an item for each"))];
                raced.wait().await;
                while let Some(item) = child.consume().await.unwrap() {
                    taken.push(number(item));
                }
                taken
            })
        })
        .collect();
    let mut all = Vec::new();
    for child in children {
        all.extend(child.await.unwrap());
    }
    println!("20 children took 1,000 items in {:?}", begun.elapsed());
    all.sort_unstable();
    assert_eq!(all, (0..1_000).collect::<Vec<_>>());
    assert_eq!(master.queue_count().await.unwrap(), 0);
}
