//! Networks, databases and servers of ZooKeeper that are gone for a while.

use super::*;

#[tokio::test]
async fn a_database_that_is_down_for_three_timers_makes_nobody_dead() {
    let place = Place::new("outage").await;
    let mut database = postgres::Server::start(Durability::Process).await;
    let url = database.create_database().await;
    place.site.plug_guest("zoo");
    let queue = Queue::open(&Config::new(&url)).await.unwrap();
    queue.init().await.unwrap();
    let mut hosts = Vec::new();
    for _ in 0..4 {
        hosts.push(place.host(5, TIMER, json!({ "url": url })).await);
    }
    submit_held(&queue, 0..20).await;
    have_begun(&place.site, 20).await;
    let before = place.has_hosts(4).await;
    database.kill();
    eventually(LONG, "nobody has kicked for three timers", async || {
        let ages: Vec<f64> = place.fleet().await.iter().filter_map(|host| host["age_seconds"].as_f64()).collect();
        let all_silent = ages.len() == 4 && ages.iter().all(|age| *age > 3.0 * TIMER.as_secs_f64());
        if all_silent { Ok(()) } else { Err(format!("{ages:?}")) }
    })
    .await;
    database.restart().await;
    eventually(LONG, "everybody kicks again, as who it was", async || {
        let hosts = place.fleet().await;
        let well = hosts.iter().all(|host| host["age_seconds"].as_f64().is_some_and(|age| age < TIMER.as_secs_f64()));
        if well && hosts.len() == 4 { Ok(()) } else { Err(format!("{hosts:?}")) }
    })
    .await;
    assert_eq!(place.has_hosts(4).await, before);
    place.site.open_gate("gate");
    all_finish(&queue, 20, |_| 0).await;
    assert_eq!(place.site.marks("held").len(), 20, "nothing began twice");
    for mut host in hosts {
        assert!(host.is_running());
        host.stop().await;
    }
}

#[tokio::test]
async fn a_host_that_is_cut_off_from_zookeeper_loses_its_tasks_and_comes_back_as_another() {
    let place = Place::new("cut_off").await;
    let cable = Proxy::to(shared().await.port()).await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    let watchdog = place.watchdog_at(&place.through(&cable), 2 * SESSION, LONG_TIMER);
    let cut_off = place.host(5, LONG_TIMER, json!({ "watchdog": watchdog })).await;
    submit_held(&queue, 0..5).await;
    have_begun(&place.site, 5).await;
    let other = place.host(5, LONG_TIMER, json!({})).await;
    let before = place.has_hosts(2).await;
    cable.cut();
    cut_off.logged("no ZooKeeper server answers: nothing is claimed", LONG).await;
    // The client takes its session for over after seven fifths of it, the servers and so the others after the whole of it. However long those
    // take on a busy machine, it is not quicker.
    crate::fleet::freeze(&cut_off, &queue).await;
    have_begun(&place.site, 10).await;
    cut_off.signal(Signal::CONT);
    cut_off.logged("ZooKeeper session is over: stopping what it runs", LONG).await;
    cut_off.logged_times("the lease had ended before the outcome was stored", 5, LONG).await;
    place.has_hosts(1).await;
    cable.mend();
    let after = place.has_hosts(2).await;
    assert_eq!(before.intersection(&after).count(), 1, "it is another one now: {before:?}, {after:?}");
    place.site.open_gate("gate");
    wait_for_finished(&queue, 5, LONG).await;
    all_are_excused(&queue, &held_tasks(&queue).await).await;
    other.stop().await;
    submit(&queue, &[task("after", "silent", json!({}))]).await;
    wait_for_finished(&queue, 6, LONG).await;
    cut_off.stop().await;
}

#[tokio::test]
async fn a_host_that_loses_zookeeper_and_its_database_together_waits_for_both() {
    let place = Place::new("both").await;
    let cable = Proxy::to(shared().await.port()).await;
    let mut database = postgres::Server::start(Durability::Process).await;
    let url = database.create_database().await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue_at(&url).await;
    let watchdog = place.watchdog_at(&place.through(&cable), SESSION, LONG_TIMER);
    let mut host = place.host(2, LONG_TIMER, json!({ "url": url, "watchdog": watchdog, "pq_connect_timeout": 1 })).await;
    cable.cut();
    database.kill();
    host.logged("ZooKeeper session is over: stopping what it runs", LONG).await;
    cable.mend();
    host.logged("cannot register this host with the database; trying again", LONG).await;
    assert!(host.is_running());
    database.restart().await;
    host.logged_times("ready", 2, LONG).await;
    submit(&queue, &[task("after", "silent", json!({}))]).await;
    wait_for_finished(&queue, 1, LONG).await;
    host.stop().await;
}

#[tokio::test]
async fn an_ensemble_that_loses_its_leader_a_follower_or_its_majority_costs_no_task_and_no_host() {
    let mut ensemble = Ensemble::start().await;
    let place = Place::on(&ensemble.addresses(), "ensemble").await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    // An outage that is longer than a session is for a machine that is left alone.
    let session = if is_soak() { SESSION } else { LONG };
    let watchdog = place.watchdog_at(&place.servers, session, LONG_TIMER);
    let section = json!({ "watchdog": watchdog });
    let mut hosts = [place.host(4, LONG_TIMER, section.clone()).await, place.host(4, LONG_TIMER, section).await];
    submit_held(&queue, 0..4).await;
    have_begun(&place.site, 4).await;
    let before = place.has_hosts(2).await;
    let mut done = 0;
    let mut work_goes_on = async |number: usize| {
        let more: Vec<_> = (0..20).map(|of| task(format!("more-{number}-{of}"), "silent", json!({}))).collect();
        submit(&queue, &more).await;
        done += 20;
        wait_for_finished(&queue, done, LONG).await;
    };

    // The leader, then a follower; each comes back.
    let leader = ensemble.leader().await;
    ensemble.members[leader].kill();
    ensemble.leader().await;
    work_goes_on(0).await;
    ensemble.members[leader].restart().await;
    let leader = ensemble.leader().await;
    let follower = (leader + 1) % 3;
    ensemble.members[follower].kill();
    work_goes_on(1).await;
    ensemble.members[follower].restart().await;

    // The majority: who is alone claims nothing, and runs on.
    let outage = if is_soak() { 2 * SESSION } else { SESSION / 2 };
    const ALONE: &str = "no ZooKeeper server answers: nothing is claimed";
    const BACK: &str = "a ZooKeeper server answers again";
    let leader = ensemble.leader().await;
    eventually(LONG, "every host is connected, and has said so", async || {
        let connected = connections(&ensemble).await;
        let sessions_are_there = before.iter().all(|host| connected.contains(host.split('-').next().expect("a session")));
        let said: Vec<_> = hosts.iter().map(|host| (host.lines_with(ALONE).len(), host.lines_with(BACK).len())).collect();
        let all_said = said.iter().all(|(alone, back)| alone == back);
        if sessions_are_there && all_said { Ok(()) } else { Err(format!("{before:?}, {said:?}: {connected}")) }
    })
    .await;
    let said: Vec<usize> = hosts.iter().map(|host| host.lines_with(ALONE).len()).collect();
    let lost = Instant::now();
    for other in [leader, (leader + 1) % 3] {
        ensemble.members[other].kill();
    }
    for (host, said) in hosts.iter().zip(said) {
        host.logged_times(ALONE, said + 1, LONG).await;
    }
    let waiting: Vec<_> = (0..20).map(|number| task(format!("waits-{number}"), "silent", json!({}))).collect();
    submit(&queue, &waiting).await;
    eventually(LONG, "the outage lasts long enough", async || {
        let stats = queue.stats().await.unwrap();
        assert_eq!((stats.finished, stats.ready + stats.running), (40, 24), "nothing is claimed, nothing is lost");
        // Who is alone for longer than a session lasts has to take it for over, and gives back what it runs.
        assert!(stats.running == 4 || lost.elapsed() > session, "what runs, runs on: {stats:?}");
        if lost.elapsed() > outage { Ok(()) } else { Err(format!("{:?}", lost.elapsed())) }
    })
    .await;
    for other in [leader, (leader + 1) % 3] {
        ensemble.members[other].launch();
    }
    wait_for_finished(&queue, 60, LONG).await;
    place.site.open_gate("gate");
    wait_for_finished(&queue, 64, LONG).await;
    if outage < session {
        assert_eq!(place.has_hosts(2).await, before, "every session lives");
    }
    for task in all_tasks(&queue).await {
        assert_eq!((task.attempts, task.lost), (1, 0), "{}", task.key);
    }
    for host in &mut hosts {
        assert!(host.is_running());
    }
    for host in hosts {
        host.stop().await;
    }
}

/// The connections to the members that answer, as these list them: with the sessions' numbers.
async fn connections(ensemble: &Ensemble) -> String {
    let mut connections = String::new();
    for member in &ensemble.members {
        connections.push_str(&member.ask("cons").await);
    }
    connections
}

#[tokio::test]
async fn a_host_waits_for_a_zookeeper_that_is_down_at_its_start_and_ends_when_told() {
    let mut server = Server::start().await;
    let place = Place::on(&server.address(), "down").await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    submit(&queue, &[task("waits", "silent", json!({}))]).await;
    server.kill();
    // It says so when a session timeout has passed.
    let watchdog = place.watchdog_at(&place.servers, Duration::from_secs(2), LONG_TIMER);
    place.configure(2, LONG_TIMER, json!({ "watchdog": watchdog }));
    let mut waiting = place.site.spawn_with(&[], &[]);
    waiting.notified("STATUS=waiting for ZooKeeper", LONG).await;
    waiting.logged("this host is not in its fleet and claims nothing", LONG).await;
    let mut told_to_end = place.site.spawn_with(&[], &[]);
    told_to_end.notified("STATUS=waiting for ZooKeeper", LONG).await;
    told_to_end.signal(Signal::TERM);
    assert!(told_to_end.exited(LONG).await.success());
    let stats = queue.stats().await.unwrap();
    assert_eq!((stats.ready, stats.finished), (1, 0), "nothing is claimed without ZooKeeper");
    server.restart().await;
    waiting.notified("READY=1", LONG).await;
    wait_for_finished(&queue, 1, LONG).await;
    waiting.stop().await;
}
