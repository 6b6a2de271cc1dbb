//! A fleet that notices its dead.

use std::sync::Arc;
use std::time::{Duration, Instant};

use laelaps_test_zookeeper::{PATIENCE, Server, TICK, eventually};
use laelaps_watchdog::fleet::{Death, Identity, Standing, members};
use laelaps_watchdog::{Error, Root, Session, SessionId, WatchdogQueue};

use super::crew::{Database, LONG_TIMER, SESSION, Sailor, TIMER, one_acts};
use super::place::{Place, items, soon};

/// A crew whose members came aboard one after the other, so that the first has the lowest timer.
async fn crew(place: &Place, database: &Arc<Database>, timer: Duration, count: usize) -> Vec<Sailor> {
    let mut crew = Vec::new();
    for number in 0..count {
        let mut sailor = Sailor::board(place.options(), "/fleet", &number.to_string(), timer, database);
        sailor.is_present().await;
        crew.push(sailor);
    }
    crew
}

/// The promise is one session timeout, one tick and a second; the machine of the tests may take five times the second and the tick.
const NOTICED: Duration = Duration::from_millis(2_000 + 5 * 1_500);

#[tokio::test]
async fn what_a_killed_host_had_is_handed_on_after_its_session_timeout() {
    let place = Place::new("killed").await;
    let database = Database::new();
    let mut crew = crew(&place, &database, LONG_TIMER, 4).await;
    assert_eq!(one_acts(&crew).await, 0);
    let mut victim = crew.remove(2);
    let identity = victim.is_present().await;
    let killed = Instant::now();
    drop(victim);
    let (dead, when) = database.hands_on(identity).await;
    let took = when - killed;
    println!("a killed host was noticed after {took:?} (session timeout {SESSION:?}, tick {TICK:?})");
    assert_eq!(dead.death, Death::Vanished);
    assert!(took < NOTICED, "{took:?}");
    assert_eq!(database.handed_on().len(), 1, "a living host was robbed: {:?}", database.handed_on());
}

#[tokio::test]
async fn a_host_killed_together_with_the_acting_one_is_noticed_as_soon() {
    let place = Place::new("killed_both").await;
    let database = Database::new();
    let mut crew = crew(&place, &database, LONG_TIMER, 4).await;
    one_acts(&crew).await;
    let (mut first, mut third) = (crew.remove(0), crew.remove(1));
    let (acting, other) = (first.is_present().await, third.is_present().await);
    let killed = Instant::now();
    drop((first, third));
    for identity in [acting, other] {
        let took = database.hands_on(identity).await.1 - killed;
        println!("killed together with the acting host: noticed after {took:?}");
        assert!(took < NOTICED, "{took:?}");
    }
    assert_eq!(one_acts(&crew).await, 0);
    assert_eq!(database.handed_on().len(), 2);
}

#[tokio::test]
async fn a_stuck_host_whose_session_lives_is_found_by_its_missing_kicks_and_the_next_one_acts() {
    let place = Place::new("stuck").await;
    let database = Database::new();
    let mut crew = crew(&place, &database, TIMER, 3).await;
    assert_eq!(one_acts(&crew).await, 0);
    let stuck = crew[0].is_present().await;
    crew[0].set_well(false);
    let (dead, _) = database.hands_on(stuck).await;
    assert!(matches!(dead.death, Death::Unkicked(late) if late > TIMER && late < PATIENCE), "{dead:?}");
    assert_eq!(one_acts(&crew).await, 1);

    // Well again, it has the lowest timer, under the same identity.
    crew[0].set_well(true);
    crew[0].comes_to("the lowest acts again", Standing::is_acting).await;
    assert_eq!(one_acts(&crew).await, 0);
    assert_eq!(crew[0].is_present().await, stuck);
    assert_eq!(database.handed_on().len(), 1);
}

#[tokio::test]
async fn a_database_outage_of_three_timers_does_not_make_the_fleet_rob_itself() {
    let place = Place::new("outage").await;
    let database = Database::new();
    let crew = crew(&place, &database, TIMER, 4).await;
    one_acts(&crew).await;
    let observer = Session::connect(&place.options()).await.unwrap();
    let root = Root::new("/fleet").unwrap();
    database.stop();
    eventually(PATIENCE, "nobody has kicked for three timers", async || {
        let youngest = members(&observer, &root).await.unwrap().into_iter().map(|member| member.age).min().unwrap();
        if youngest > 3 * TIMER { Ok(()) } else { Err(format!("{youngest:?}")) }
    })
    .await;
    database.start();
    one_acts(&crew).await;
    eventually(PATIENCE, "everybody kicks again", async || {
        let oldest = members(&observer, &root).await.unwrap().into_iter().map(|member| member.age).max().unwrap();
        if oldest < TIMER / 2 { Ok(()) } else { Err(format!("{oldest:?}")) }
    })
    .await;
    // One death after it shows that the fleet has compared since.
    let mut crew = crew;
    let mut victim = crew.remove(3);
    let identity = victim.is_present().await;
    drop(victim);
    database.hands_on(identity).await;
    assert_eq!(database.handed_on().len(), 1, "a living host was robbed: {:?}", database.handed_on());
}

#[tokio::test]
async fn a_cleared_root_is_not_the_death_of_all() {
    let place = Place::new("cleared_fleet").await;
    let database = Database::new();
    let mut crew = crew(&place, &database, TIMER, 4).await;
    one_acts(&crew).await;
    let mut before = Vec::new();
    for sailor in &mut crew {
        before.push(sailor.is_present().await);
    }
    // As a foreign tool does it, one node after the other; our own clear_timers refuses.
    let tool = zookeeper_client::Client::connect(place.servers()).await.unwrap();
    let root = place.absolute("/fleet");
    loop {
        for child in tool.list_children(&root).await.unwrap_or_default() {
            let _ = tool.delete(&format!("{root}/{child}"), None).await;
        }
        if !matches!(tool.delete(&root, None).await, Err(zookeeper_client::Error::NotEmpty)) {
            break;
        }
    }
    let observer = Session::connect(&place.options()).await.unwrap();
    let again = eventually(PATIENCE, "every host makes its timer again", async || {
        match members(&observer, &Root::new("/fleet").unwrap()).await {
            Ok(members) if members.len() == 4 => Ok(members),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let mut identities: Vec<_> = again.into_iter().map(|member| member.identity).collect();
    identities.sort_unstable();
    before.sort_unstable();
    assert_eq!(identities, before, "a living session keeps its identity");
    let acting = one_acts(&crew).await;
    let mut victim = crew.remove((acting + 1) % 4);
    let identity = victim.is_present().await;
    drop(victim);
    database.hands_on(identity).await;
    assert_eq!(database.handed_on().len(), 1, "a living host was robbed: {:?}", database.handed_on());
}

#[tokio::test]
async fn a_root_that_was_just_made_says_nothing_of_those_who_were_there_before() {
    let place = Place::new("new_root").await;
    let database = Database::new();
    // One was there under a root that somebody has cleared: he may live, and be about to make his timer again. The other came after that, and is gone.
    let (earlier, later) = (Identity { session: SessionId(1), czxid: 1 }, Identity { session: SessionId(1), czxid: i64::MAX });
    database.own(earlier);
    database.own(later);
    let _crew = crew(&place, &database, LONG_TIMER, 1).await;
    database.hands_on(later).await;
    database.hands_on(earlier).await;
    let order: Vec<_> = database.handed_on().into_iter().map(|(dead, _)| dead.identity).collect();
    assert_eq!(order, [later, earlier], "who could come back is waited for");
}

#[tokio::test]
async fn a_timer_deleted_by_hand_comes_back_before_its_host_counts_as_dead() {
    let place = Place::new("by_hand").await;
    let database = Database::new();
    let mut crew = crew(&place, &database, LONG_TIMER, 3).await;
    one_acts(&crew).await;
    let (victim, last) = (crew[1].is_present().await, crew[2].is_present().await);
    let observer = Session::connect(&place.options()).await.unwrap();
    let root = Root::new("/fleet").unwrap();
    let name = members(&observer, &root).await.unwrap().into_iter().find(|member| member.identity == victim).unwrap().name;
    let tool = zookeeper_client::Client::connect(place.servers()).await.unwrap();
    tool.delete(&place.absolute(&format!("/fleet/{name}")), None).await.unwrap();
    drop(crew.remove(2));
    database.hands_on(last).await;
    assert_eq!(database.handed_on().len(), 1, "{:?}", database.handed_on());
    assert!(members(&observer, &root).await.unwrap().iter().any(|member| member.identity == victim));
}

#[tokio::test]
async fn a_host_claims_nothing_while_it_is_alone_and_comes_back_as_a_new_one_when_its_session_is_over() {
    let mut server = Server::start().await;
    let place = Place::on(&server.address(), "alone").await;
    let database = Database::new();
    let mut host = Sailor::board(place.options(), "/fleet", "host", TIMER, &database);
    let first = host.is_present().await;
    server.kill();
    let alone = host.comes_to("it notices that it is alone", |standing| standing.may_claim().is_none()).await;
    assert_eq!(alone, Standing::Alone { identity: first });
    let away = host.comes_to("its session is over", |standing| standing.identity().is_none()).await;
    assert!(matches!(&away, Standing::Away { reason } if reason.contains("expired")), "{away:?}");
    server.restart().await;
    let second = host.is_present().await;
    assert_ne!(first, second);
    // The old identity's session is over on the server, too, in its time; what it had is handed on by the new one, and only that.
    database.hands_on(first).await;
    assert_eq!((database.handed_on().len(), host.is_present().await), (1, second));
}

#[tokio::test]
async fn a_short_silence_of_the_servers_changes_nothing_but_that_nothing_is_claimed() {
    let server = Server::start().await;
    let place = Place::on(&server.address(), "silence").await;
    let database = Database::new();
    let mut host = Sailor::board(place.options(), "/fleet", "host", TIMER, &database);
    let identity = host.is_present().await;
    server.freeze();
    host.comes_to("it notices that it is alone", |standing| *standing == Standing::Alone { identity }).await;
    server.thaw();
    host.comes_to("it is back under the same identity", |standing| standing.may_claim() == Some(identity)).await;
}

#[tokio::test]
async fn a_host_waits_for_a_zookeeper_that_is_down_at_its_start() {
    let mut server = Server::start().await;
    let place = Place::on(&server.address(), "down").await;
    server.kill();
    let mut host = Sailor::board(place.options(), "/fleet", "host", TIMER, &Database::new());
    let why = host
        .comes_to(
            "it says what it waits for",
            |standing| matches!(standing, Standing::Away { reason } if reason.contains("reached")),
        )
        .await;
    assert_eq!(why.may_claim(), None);
    server.restart().await;
    host.is_present().await;
}

#[tokio::test]
async fn a_host_that_leaves_is_gone_at_once() {
    let place = Place::new("leaves").await;
    let database = Database::new();
    let mut crew = crew(&place, &database, LONG_TIMER, 2).await;
    let observer = Session::connect(&place.options()).await.unwrap();
    soon("it leaves", crew.remove(0).leave()).await;
    let left = members(&observer, &Root::new("/fleet").unwrap()).await.unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].description["host"], "1");
    one_acts(&crew).await;
}

#[tokio::test]
async fn a_fleet_and_a_queue_never_share_a_root() {
    let place = Place::new("apart").await;
    place.master(&items(1)).await;
    let mut lost = Sailor::board(place.options(), "/q", "host", TIMER, &Database::new());
    lost.comes_to(
        "it says that the root is a queue's",
        |standing| matches!(standing, Standing::Away { reason } if reason.contains("holds \"watchdog\"")),
    )
    .await;

    let mut host = Sailor::board(place.options(), "/fleet", "host", TIMER, &Database::new());
    host.is_present().await;
    let mut master = WatchdogQueue::new(&place.options(), "/fleet").await.unwrap();
    assert!(matches!(master.attach_queue(TIMER).await.unwrap_err(), Error::FleetRoot(_)));
    assert!(matches!(master.clear_timers().await.unwrap_err(), Error::FleetRoot(_)));
    assert!(matches!(master.create_timer(b"x").await.unwrap_err(), Error::FleetRoot(_)));
    assert!(matches!(master.create_queue(&items(1), TIMER).await.unwrap_err(), Error::RootExists { .. }));
    assert!(host.standing.borrow().may_claim().is_some());
}

/// Between two looks of a host at its place lies a fifth of the timer: here that would be twelve minutes.
#[tokio::test]
async fn the_first_host_acts_with_its_first_kick_and_not_at_its_next_look() {
    let place = Place::new("first_kick").await;
    // Which of the two is answered first, the kick or the look, is a matter of luck.
    for number in 0..8 {
        let root = format!("/fleet{number}");
        let first = Sailor::board(place.options(), &root, "first", Duration::from_secs(3_600), &Database::new());
        one_acts(&[first]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_hosts_have_one_that_acts_however_often_it_dies_and_ask_no_more_each_than_ten() {
    let server = Server::start().await;
    let place = Place::on(&server.address(), "fifty").await;
    let database = Database::new();
    let mut crew = crew(&place, &database, TIMER, 10).await;
    one_acts(&crew).await;
    let of_ten = requests_per_host(&server, 10).await;
    for number in 10..50 {
        let mut sailor = Sailor::board(place.options(), "/fleet", &number.to_string(), TIMER, &database);
        sailor.is_present().await;
        crew.push(sailor);
    }
    one_acts(&crew).await;
    let of_fifty = requests_per_host(&server, 50).await;
    println!("requests per host and timer: {of_ten:.1} with 10 hosts, {of_fifty:.1} with 50");
    assert!(of_fifty < 2.0 * of_ten, "{of_ten} with 10 hosts, {of_fifty} with 50");

    for _ in 0..3 {
        let acting = one_acts(&crew).await;
        assert_eq!(acting, 0, "the lowest acts");
        let mut victim = crew.remove(0);
        let identity = victim.is_present().await;
        drop(victim);
        database.hands_on(identity).await;
    }
    one_acts(&crew).await;
    assert_eq!(database.handed_on().len(), 3, "a living host was robbed: {:?}", database.handed_on());
    assert_eq!(database.actors(), ["0", "1", "2", "3"], "each acted until it died, and nobody besides");
}

/// Requests that the server got within about a timer, for each host.
async fn requests_per_host(server: &Server, hosts: u64) -> f64 {
    let (begun, before) = (Instant::now(), server.monitor("zk_packets_received").await);
    eventually(PATIENCE, "a timer passes", async || if begun.elapsed() >= TIMER { Ok(()) } else { Err(String::new()) }).await;
    let requests = server.monitor("zk_packets_received").await - before;
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    let per_host = requests as f64 / hosts as f64;
    per_host * TIMER.as_secs_f64() / begun.elapsed().as_secs_f64()
}
