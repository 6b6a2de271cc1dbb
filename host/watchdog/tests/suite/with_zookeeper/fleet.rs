//! A fleet that notices its dead.

use std::sync::Arc;
use std::time::{Duration, Instant};

use laelaps_test_zookeeper::{LONG, Server, TICK, eventually};
use laelaps_watchdog::fleet::{Death, Identity, Standing};
use laelaps_watchdog::{Error, Options, SessionId, WatchdogQueue};

use super::crew::{Database, FLEET, LONG_TIMER, Outsider, SHORT_SESSION, Sailor, TIMER, one_acts};
use super::place::{LONG_SESSION, Place, SESSION, items, soon};

/// How long the fleet lets a timer that vanished come back.
const CONFIRMATION: Duration = Duration::from_millis(300);

/// One host, with a session of this timeout.
fn host(place: &Place, name: &str, session_timeout: Duration, timer: Duration, database: &Arc<Database>) -> Sailor {
    Sailor::board(Options { session_timeout, ..place.options() }, FLEET, name, timer, database)
}

/// A crew whose members came aboard one after the other, so that the first has the lowest timer: one for each session timeout.
async fn crew_of(place: &Place, database: &Arc<Database>, timer: Duration, sessions: &[Duration]) -> Vec<Sailor> {
    let mut crew = Vec::new();
    for (number, session) in sessions.iter().enumerate() {
        let mut sailor = host(place, &number.to_string(), *session, timer, database);
        sailor.is_present().await;
        crew.push(sailor);
    }
    crew
}

/// The same, of hosts that nothing but the test ends.
async fn crew(place: &Place, database: &Arc<Database>, timer: Duration, count: usize) -> Vec<Sailor> {
    crew_of(place, database, timer, &vec![LONG_SESSION; count]).await
}

#[tokio::test]
async fn what_a_killed_host_had_is_handed_on_after_its_session_timeout() {
    let place = Place::new("killed").await;
    let database = Database::new();
    let sessions = [LONG_SESSION, LONG_SESSION, SHORT_SESSION, LONG_SESSION];
    let mut crew = crew_of(&place, &database, LONG_TIMER, &sessions).await;
    assert_eq!(one_acts(&crew).await, 0);
    let mut victim = crew.remove(2);
    let identity = victim.is_present().await;
    let killed = Instant::now();
    drop(victim);
    let (dead, when) = database.hands_on(identity).await;
    // No missing kick could have told of it, nor a look, for minutes.
    assert_eq!(dead.death, Death::Vanished);
    println!("a killed host was noticed after {:?} (session timeout {SHORT_SESSION:?}, tick {TICK:?})", when - killed);
    assert_eq!(database.robbed(&crew), [], "a living host was robbed");
}

#[tokio::test]
async fn a_host_killed_together_with_the_acting_one_is_noticed_as_soon() {
    let place = Place::new("killed_both").await;
    let database = Database::new();
    let sessions = [SHORT_SESSION, LONG_SESSION, SHORT_SESSION, LONG_SESSION];
    let mut crew = crew_of(&place, &database, LONG_TIMER, &sessions).await;
    one_acts(&crew).await;
    let (mut first, mut third) = (crew.remove(0), crew.remove(1));
    let (acting, other) = (first.is_present().await, third.is_present().await);
    let killed = Instant::now();
    drop((first, third));
    for identity in [acting, other] {
        let (dead, when) = database.hands_on(identity).await;
        assert_eq!(dead.death, Death::Vanished);
        println!("killed together with the acting host: noticed after {:?}", when - killed);
    }
    assert_eq!(one_acts(&crew).await, 0);
    assert_eq!(database.robbed(&crew), [], "a living host was robbed");
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
    assert!(matches!(dead.death, Death::Unkicked(late) if late > TIMER), "{dead:?}");
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
    let mut crew = crew(&place, &database, TIMER, 4).await;
    one_acts(&crew).await;
    let outsider = Outsider::at(&place).await;
    database.stop();
    eventually(LONG, "nobody has kicked for three timers", async || {
        let youngest = outsider.members().await.unwrap().into_iter().map(|member| member.age).min().unwrap();
        if youngest > 3 * TIMER { Ok(()) } else { Err(format!("{youngest:?}")) }
    })
    .await;
    database.start();
    one_acts(&crew).await;
    eventually(LONG, "everybody kicks again", async || {
        let oldest = outsider.members().await.unwrap().into_iter().map(|member| member.age).max().unwrap();
        if oldest < TIMER / 2 { Ok(()) } else { Err(format!("{oldest:?}")) }
    })
    .await;
    // One death after it shows that the fleet has compared since.
    let mut victim = crew.remove(3);
    let identity = victim.is_present().await;
    victim.die().await;
    outsider.delete_timer(identity).await;
    database.hands_on(identity).await;
    assert_eq!(database.robbed(&crew), [], "a living host was robbed");
}

#[tokio::test]
async fn a_cleared_root_is_not_the_death_of_all() {
    const NAMES: [&str; 4] = ["0", "1", "2", "3"];
    let place = Place::new("cleared_fleet").await;
    let database = Database::new();
    // The fleet waits for a session timeout until it takes anybody for dead.
    let mut crew = crew_of(&place, &database, TIMER, &[2 * SESSION; 4]).await;
    assert_eq!(one_acts(&crew).await, 0);
    let mut before = Vec::new();
    for sailor in &mut crew {
        before.push(sailor.is_present().await);
    }
    let outsider = Outsider::at(&place).await;
    // Nobody compares while it is cleared: which timers are there in the middle of it, and for how long, is not ours to say.
    outsider.hold_comparison(&database, "0").await;
    database.hold(&NAMES);
    outsider.clear().await;
    database.answer(&NAMES);
    let again = outsider.members_are(4).await;
    let mut identities: Vec<_> = again.into_iter().map(|member| member.identity).collect();
    identities.sort_unstable();
    before.sort_unstable();
    assert_eq!(identities, before, "a living session keeps its identity");
    let acting = one_acts(&crew).await;
    let mut victim = crew.remove((acting + 1) % 4);
    let identity = victim.is_present().await;
    victim.die().await;
    outsider.delete_timer(identity).await;
    database.hands_on(identity).await;
    assert_eq!(database.robbed(&crew), [], "a living host was robbed");
}

#[tokio::test]
async fn a_root_that_was_just_made_says_nothing_of_those_who_were_there_before() {
    // One was there under a root that somebody has cleared: he may live, and be about to make his timer again. The other came after that, and is gone.
    let (earlier, later) = (Identity { session: SessionId(1), czxid: 1 }, Identity { session: SessionId(1), czxid: i64::MAX });
    let place = Place::new("new_root").await;
    let database = Database::new();
    for identity in [earlier, later] {
        database.own(identity);
    }
    // Who could come back is waited for: here for more than twelve minutes.
    let _sailor = host(&place, "patient", LONG_SESSION, LONG_TIMER, &database);
    database.hands_on(later).await;
    assert_eq!(database.handed_on().len(), 1, "who could come back is waited for");

    // In another fleet for a session timeout.
    let place = Place::new("new_root_of_others").await;
    let database = Database::new();
    database.own(earlier);
    let begun = Instant::now();
    let _sailor = host(&place, "impatient", SHORT_SESSION, TIMER, &database);
    let (_, when) = database.hands_on(earlier).await;
    assert!(when - begun >= SHORT_SESSION, "{:?}", when - begun);
}

#[tokio::test]
async fn a_timer_deleted_by_hand_comes_back_before_its_host_counts_as_dead() {
    let place = Place::new("by_hand").await;
    let database = Database::new();
    let mut crew = crew(&place, &database, LONG_TIMER, 3).await;
    assert_eq!(one_acts(&crew).await, 0);
    let (acting, second) = (crew[0].is_present().await, crew[1].is_present().await);
    let outsider = Outsider::at(&place).await;

    // Of another host: the acting one, which is comparing just now, finds the timer that has come back. The deletion makes it compare once more,
    // and it lets the time pass before that.
    outsider.hold_comparison(&database, "0").await;
    outsider.delete_timer(second).await;
    outsider.members_are(3).await;
    let (before, answered) = (database.asked_by("0"), Instant::now());
    database.answer(&["0"]);
    assert!(database.is_asked_by("0", before).await - answered >= CONFIRMATION);

    // Of the acting one: the next in line takes its place, and lets the same time pass.
    outsider.hold_comparison(&database, "0").await;
    database.hold(&["1", "2"]);
    let deleted = Instant::now();
    outsider.delete_timer(acting).await;
    // The second has the highest timer by now.
    assert!(database.is_asked_by("2", 0).await - deleted >= CONFIRMATION);
    database.answer(&["0"]);
    outsider.members_are(3).await;
    database.answer(&["1", "2"]);
    crew[2].comes_to("the next in line acts", Standing::is_acting).await;

    let mut last = crew.remove(1);
    let identity = last.is_present().await;
    last.die().await;
    outsider.delete_timer(identity).await;
    database.hands_on(identity).await;
    assert_eq!(database.robbed(&crew), [], "a living host was robbed");
    let identities: Vec<_> = outsider.members().await.unwrap().into_iter().map(|member| member.identity).collect();
    assert!(identities.contains(&acting), "{identities:?}");
}

#[tokio::test]
async fn a_host_claims_nothing_while_it_is_alone_and_comes_back_as_a_new_one_when_its_session_is_over() {
    let mut server = Server::start().await;
    let place = Place::on(&server.address(), "alone").await;
    let database = Database::new();
    let mut sailor = host(&place, "host", SESSION, TIMER, &database);
    let first = sailor.is_present().await;
    server.kill();
    let alone = sailor.comes_to("it notices that it is alone", |standing| standing.may_claim().is_none()).await;
    assert_eq!(alone, Standing::Alone { identity: first });
    let away = sailor.comes_to("its session is over", |standing| standing.identity().is_none()).await;
    assert!(matches!(&away, Standing::Away { reason } if reason.contains("expired")), "{away:?}");
    server.restart().await;
    let second = sailor.is_present().await;
    assert_ne!(first, second);
    // The old identity's session is over on the server, too, in its time; what it had is handed on by the new one, and only that.
    database.hands_on(first).await;
    assert_eq!(database.robbed(&[sailor]), []);
}

#[tokio::test]
async fn a_short_silence_of_the_servers_changes_nothing_but_that_nothing_is_claimed() {
    let server = Server::start().await;
    let place = Place::on(&server.address(), "silence").await;
    let database = Database::new();
    // It is alone after two fifths of it; the rest is for a machine that takes its time.
    let mut sailor = host(&place, "host", 2 * SESSION, TIMER, &database);
    let identity = sailor.is_present().await;
    server.freeze();
    sailor.comes_to("it notices that it is alone", |standing| *standing == Standing::Alone { identity }).await;
    server.thaw();
    sailor.comes_to("it is back under the same identity", |standing| standing.may_claim() == Some(identity)).await;
}

#[tokio::test]
async fn a_host_waits_for_a_zookeeper_that_is_down_at_its_start() {
    let mut server = Server::start().await;
    let place = Place::on(&server.address(), "down").await;
    server.kill();
    // It says so when a session timeout has passed.
    let mut sailor = host(&place, "host", SHORT_SESSION, TIMER, &Database::new());
    let why = sailor
        .comes_to(
            "it says what it waits for",
            |standing| matches!(standing, Standing::Away { reason } if reason.contains("reached")),
        )
        .await;
    assert_eq!(why.may_claim(), None);
    server.restart().await;
    sailor.is_present().await;
}

#[tokio::test]
async fn a_host_that_leaves_is_gone_at_once() {
    let place = Place::new("leaves").await;
    let database = Database::new();
    // Nobody here would see a session of this length end by itself.
    let mut crew = crew_of(&place, &database, LONG_TIMER, &[Duration::from_secs(3_600); 2]).await;
    let outsider = Outsider::at(&place).await;
    soon("it leaves", crew.remove(0).leave()).await;
    let left = outsider.members().await.unwrap();
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

    let mut sailor = host(&place, "host", LONG_SESSION, TIMER, &Database::new());
    let identity = sailor.is_present().await;
    let mut master = WatchdogQueue::new(&place.options(), "/fleet").await.unwrap();
    assert!(matches!(master.attach_queue(TIMER).await.unwrap_err(), Error::FleetRoot(_)));
    assert!(matches!(master.clear_timers().await.unwrap_err(), Error::FleetRoot(_)));
    assert!(matches!(master.create_timer(b"x").await.unwrap_err(), Error::FleetRoot(_)));
    assert!(matches!(master.create_queue(&items(1), TIMER).await.unwrap_err(), Error::RootExists { .. }));
    assert_eq!(sailor.is_present().await, identity);
}

/// Between two looks of a host at its place lies a fifth of the timer: here that would be twelve minutes.
#[tokio::test]
async fn the_first_host_acts_with_its_first_kick_and_not_at_its_next_look() {
    let place = Place::new("first_kick").await;
    // Which of the two is answered first, the kick or the look, is a matter of luck.
    for number in 0..8 {
        let root = format!("/fleet{number}");
        let first = Sailor::board(place.options(), &root, "first", LONG_TIMER, &Database::new());
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
    let of_ten = requests_per_kick(&server, &database, 10).await;
    for number in 10..50 {
        let mut sailor = host(&place, &number.to_string(), LONG_SESSION, TIMER, &database);
        sailor.is_present().await;
        crew.push(sailor);
    }
    one_acts(&crew).await;
    let of_fifty = requests_per_kick(&server, &database, 50).await;
    println!("requests for each kick: {of_ten:.1} with 10 hosts, {of_fifty:.1} with 50");
    assert!(of_fifty < 2.0 * of_ten, "{of_ten} with 10 hosts, {of_fifty} with 50");

    let outsider = Outsider::at(&place).await;
    for _ in 0..3 {
        assert_eq!(one_acts(&crew).await, 0, "the lowest acts");
        let mut victim = crew.remove(0);
        let identity = victim.is_present().await;
        victim.die().await;
        outsider.delete_timer(identity).await;
        database.hands_on(identity).await;
    }
    one_acts(&crew).await;
    assert_eq!(database.robbed(&crew), [], "a living host was robbed");
    assert_eq!(database.actors(), ["0", "1", "2", "3"], "each acted until it died, and nobody besides");
}

/// Requests that the server gets for each kick, while every host kicks about three times. Hosts kick as often as they look at others, so that
/// it does not depend on how quick the machine is.
async fn requests_per_kick(server: &Server, database: &Database, hosts: usize) -> f64 {
    let (requests, kicks) = (server.monitor("zk_packets_received").await, database.kick_count());
    eventually(LONG, "every host kicks three times", async || {
        let kicks = database.kick_count() - kicks;
        if kicks >= 3 * hosts { Ok(()) } else { Err(format!("{kicks} kicks")) }
    })
    .await;
    let (requests, kicks) = (server.monitor("zk_packets_received").await - requests, database.kick_count() - kicks);
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    let per_kick = requests as f64 / kicks as f64;
    per_kick
}
