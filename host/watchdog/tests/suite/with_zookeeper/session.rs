//! How a session is made, lives and ends.

use std::time::Duration;

use laelaps_test_zookeeper::{Ensemble, LONG, Server, eventually, shared};
use laelaps_watchdog::{Access, Digest, End, Error, Options, Session, State, WatchdogQueue};

use super::place::{LONG_SESSION, Place, SESSION, TIMER, items, options, soon};

#[tokio::test]
async fn servers_that_let_nobody_in_are_named_with_what_they_do() {
    // A name that needs no name server: one that is slow would be told of instead.
    let mut options = Options::new("127.0.0.1:1,localhost:2");
    options.session_timeout = Duration::from_millis(500);
    let error = Session::connect(&options).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("127.0.0.1:1 cannot be reached") && text.contains("localhost:2 cannot be reached"), "{text}");
    assert!(error.is_retryable() && error.hint().is_some());
}

#[tokio::test]
async fn options_that_cannot_be_are_refused_before_anything_is_asked() {
    for options in [
        Options::new(""),
        Options { session_timeout: Duration::from_millis(99), ..Options::new("127.0.0.1:1") },
        Options { access: Access::Ourselves, ..Options::new("127.0.0.1:1") },
    ] {
        assert!(matches!(Session::connect(&options).await.unwrap_err(), Error::Config { .. }));
    }
}

#[tokio::test]
async fn a_session_that_its_servers_forget_has_expired_and_says_so_to_every_call() {
    let mut server = Server::start().await;
    let place = Place::on(&server.address(), "forgotten").await;
    place.master(&items(1)).await;
    let child = WatchdogQueue::new(&Options { session_timeout: SESSION, ..place.options() }, "/q").await.unwrap();
    let timer = child.create_timer(b"child").await.unwrap();
    let mut states = child.session().watch();
    soon("it is connected", states.wait_for(|state| *state == State::Connected)).await.unwrap();
    server.kill();
    soon("the client notices", states.wait_for(|state| *state != State::Connected)).await.unwrap();
    assert_eq!(soon("the session ends", child.session().ended()).await, End::Expired);
    for error in
        [timer.kick_dog().await.unwrap_err(), child.consume().await.unwrap_err(), child.check_timers().await.unwrap_err()]
    {
        assert!(matches!(error, Error::SessionEnded { end: End::Expired, .. }), "{error}");
        assert!(error.is_retryable());
    }
    server.restart().await;
    let again = WatchdogQueue::new(&place.options(), "/q").await.unwrap();
    eventually(LONG, "the expired session's timer goes", async || match again.check_timers().await.unwrap().alive {
        0 => Ok(()),
        alive => Err(format!("{alive} timers")),
    })
    .await;
}

#[tokio::test]
async fn a_session_survives_a_server_that_comes_back_in_time() {
    let mut server = Server::start().await;
    let place = Place::on(&server.address(), "back").await;
    place.master(&items(1)).await;
    // A server takes its time to start, and the session must live until then. One that accepts while it starts may never answer; the client gives
    // such a connection up after two fifths of its session.
    let mut child = WatchdogQueue::new(&Options { session_timeout: 2 * LONG_SESSION, ..place.options() }, "/q").await.unwrap();
    child.attach_queue(TIMER).await.unwrap();
    let timer = child.create_timer(b"child").await.unwrap();
    let (id, mut states) = (child.session().id(), child.session().watch());
    server.kill();
    soon("the client notices", states.wait_for(|state| *state == State::Disconnected)).await.unwrap();
    let kick = tokio::spawn(async move { (timer.kick_dog().await, timer) });
    server.restart().await;
    let (kicked, timer) = soon("a call made while disconnected is answered", kick).await.unwrap();
    assert!(kicked.unwrap());
    soon("the client is back", states.wait_for(|state| *state == State::Connected)).await.unwrap();
    assert_eq!(child.session().id(), id);
    assert_eq!(child.fetch_node(timer.path()).await.unwrap().owner, Some(id));
}

#[tokio::test]
async fn a_session_is_joined_again_with_its_ticket_and_not_once_it_is_over() {
    let place = Place::new("rejoin").await;
    place.master(&items(0)).await;
    let first = Session::connect(&Options { detached: true, ..place.options() }).await.unwrap();
    let (ticket, id) = (first.ticket(), first.id());
    let child = WatchdogQueue::over(first, laelaps_watchdog::Root::new("/q").unwrap());
    let timer = child.create_timer(b"one").await.unwrap().name().to_owned();
    drop(child);

    let second = Session::connect(&Options { rejoin: Some(ticket.clone()), ..place.options() }).await.unwrap();
    assert_eq!((second.id(), ticket.id()), (id, id));
    let child = WatchdogQueue::over(second.clone(), laelaps_watchdog::Root::new("/q").unwrap());
    assert_eq!(child.fetch_node(&format!("/q/{timer}")).await.unwrap().owner, Some(id));
    assert!(child.open_timer(&timer).await.unwrap().kick_dog().await.unwrap());
    drop(child);
    second.close().await;

    let error = Session::connect(&Options { rejoin: Some(ticket), ..place.options() }).await.unwrap_err();
    assert!(matches!(error, Error::SessionEnded { end: End::Expired, .. }), "{error}");
}

#[tokio::test]
async fn nodes_made_for_ourselves_are_denied_to_others() {
    let place = Place::new("acl").await;
    let ours = Options { digest: vec![Digest::parse("bob:secret").unwrap()], access: Access::Ourselves, ..place.options() };
    let mut master = WatchdogQueue::new(&ours, "/q").await.unwrap();
    master.create_queue(&items(2), TIMER).await.unwrap();
    let mut stranger = place.client().await;
    let error = stranger.attach_queue(TIMER).await.unwrap_err();
    assert!(matches!(&error, Error::Denied { path, .. } if path == "/q"), "{error}");
    assert!(matches!(stranger.consume().await.unwrap_err(), Error::Denied { .. }));
    let friend = WatchdogQueue::new(&ours, "/q").await.unwrap();
    assert!(friend.consume().await.unwrap().is_some());
    assert_eq!(friend.check_timers().await.unwrap().alive, 0);
}

#[tokio::test]
async fn a_chroot_keeps_two_tenants_apart() {
    let (one, two) = (Place::new("tenant_one").await, Place::new("tenant_two").await);
    one.master(&items(1)).await;
    two.master(&items(2)).await;
    assert_eq!((one.client().await.queue_count().await.unwrap(), two.client().await.queue_count().await.unwrap()), (1, 2));
    let top = Session::connect(&options(&shared().await.address())).await.unwrap();
    assert!(top.check_exists(&one.absolute("/q/queue-0000000000")).await.unwrap());
}

#[tokio::test]
async fn an_ensemble_that_loses_its_leader_keeps_every_session_and_every_item() {
    let mut ensemble = Ensemble::start().await;
    let place = Place::on(&ensemble.addresses(), "leader").await;
    // An election takes its time, and the sessions must live until then.
    let long = Options { session_timeout: LONG, ..place.options() };
    let mut master = WatchdogQueue::new(&long, "/q").await.unwrap();
    master.create_queue(&items(100), TIMER).await.unwrap();
    let child = WatchdogQueue::new(&long, "/q").await.unwrap();
    let timer = child.create_timer(b"child").await.unwrap();
    let leader = ensemble.leader().await;
    ensemble.members[leader].kill();
    let mut taken = 0;
    while let Some(item) = soon("items can be taken again", child.consume()).await.transpose() {
        match item {
            Ok(_) => taken += 1,
            Err(Error::Uncertain { item: Some(_), .. }) => taken += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((taken, master.queue_count().await.unwrap()), (100, 0));
    assert!(timer.kick_dog().await.unwrap());
    assert_ne!(ensemble.leader().await, leader);
}

#[tokio::test]
async fn credentials_that_the_servers_do_not_take_are_told() {
    let server = Server::start_with("DigestAuthenticationProvider.enabled=false\n").await;
    let options = Options { digest: vec![Digest::parse("bob:secret").unwrap()], ..options(&server.address()) };
    let error = Session::connect(&options).await.unwrap_err();
    assert!(matches!(error, Error::SessionEnded { end: End::AuthFailed, .. }), "{error:?}");
    assert_eq!(error.hint(), Some("check the scheme and the credentials"));
}
