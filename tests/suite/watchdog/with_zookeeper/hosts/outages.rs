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
        hosts.push(place.host(5, TIMER.as_secs(), json!({ "url": url })).await);
    }
    submit_held(&queue, 0..20).await;
    have_begun(&place.site, 20).await;
    let before = place.has_hosts(4).await;
    database.kill();
    eventually(PATIENCE, "nobody has kicked for three timers", async || {
        let ages: Vec<f64> = place.fleet().await.iter().filter_map(|host| host["age_seconds"].as_f64()).collect();
        let all_silent = ages.len() == 4 && ages.iter().all(|age| *age > 3.0 * TIMER.as_secs_f64());
        if all_silent { Ok(()) } else { Err(format!("{ages:?}")) }
    })
    .await;
    database.restart().await;
    eventually(PATIENCE, "everybody kicks again, as who it was", async || {
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
    let place = Place::on(&shared().await.address(), "cut_off").await;
    let cable = Proxy::to(shared().await.port()).await;
    let servers = format!("127.0.0.1:{}/cut_off", cable.port());
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    let mut watchdog = place.watchdog_at(&servers, LONG_TIMER);
    // The client takes its session for over after seven fifths of it. The servers, and so the others, have to be well before that.
    watchdog["session_timeout"] = 6.into();
    let cut_off = place.host(5, LONG_TIMER, json!({ "watchdog": watchdog })).await;
    submit_held(&queue, 0..5).await;
    have_begun(&place.site, 5).await;
    let other = place.host(5, LONG_TIMER, json!({})).await;
    let before = place.has_hosts(2).await;
    cable.cut();
    cut_off.logged("no ZooKeeper server answers: nothing is claimed", PATIENCE).await;
    have_begun(&place.site, 10).await;
    cut_off.logged("ZooKeeper session is over: stopping what it runs", PATIENCE).await;
    cut_off.logged_times("the lease had ended before the outcome was stored", 5, PATIENCE).await;
    place.has_hosts(1).await;
    cable.mend();
    let after = place.has_hosts(2).await;
    assert_eq!(before.intersection(&after).count(), 1, "it is another one now: {before:?}, {after:?}");
    place.site.open_gate("gate");
    all_finish(&queue, 5, |_| 1).await;
    other.stop().await;
    submit(&queue, &[task("after", "silent", json!({}))]).await;
    wait_for_finished(&queue, 6, PATIENCE).await;
    cut_off.stop().await;
}

#[tokio::test]
async fn a_host_that_loses_zookeeper_and_its_database_together_waits_for_both() {
    let place = Place::on(&shared().await.address(), "both").await;
    let cable = Proxy::to(shared().await.port()).await;
    let mut database = postgres::Server::start(Durability::Process).await;
    let url = database.create_database().await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue_at(&url).await;
    let mut watchdog = place.watchdog_at(&format!("127.0.0.1:{}/both", cable.port()), LONG_TIMER);
    watchdog["session_timeout"] = 2.into();
    let mut host = place.host(2, LONG_TIMER, json!({ "url": url, "watchdog": watchdog, "pq_connect_timeout": 1 })).await;
    cable.cut();
    database.kill();
    host.logged("ZooKeeper session is over: stopping what it runs", PATIENCE).await;
    cable.mend();
    host.logged("cannot register this host with the database; trying again", PATIENCE).await;
    assert!(host.is_running());
    database.restart().await;
    host.logged_times("ready", 2, PATIENCE).await;
    submit(&queue, &[task("after", "silent", json!({}))]).await;
    wait_for_finished(&queue, 1, PATIENCE).await;
    host.stop().await;
}

#[tokio::test]
async fn an_ensemble_that_loses_its_leader_a_follower_or_its_majority_costs_no_task_and_no_host() {
    let mut ensemble = Ensemble::start().await;
    let place = Place::on(&ensemble.addresses(), "ensemble").await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    let mut watchdog = place.watchdog_at(&place.servers, LONG_TIMER);
    watchdog["session_timeout"] = LONGEST_SESSION.as_secs().into();
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
        wait_for_finished(&queue, done, PATIENCE).await;
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
    let outage = if laelaps_tests::scaled(10) == 10 { Duration::from_secs(20) } else { Duration::from_secs(5) };
    const ALONE: &str = "no ZooKeeper server answers: nothing is claimed";
    let leader = ensemble.leader().await;
    let said: Vec<usize> = hosts.iter().map(|host| host.lines_with(ALONE).len()).collect();
    let lost = Instant::now();
    for other in [leader, (leader + 1) % 3] {
        ensemble.members[other].kill();
    }
    for (host, said) in hosts.iter().zip(said) {
        host.logged_times(ALONE, said + 1, PATIENCE).await;
    }
    let waiting: Vec<_> = (0..20).map(|number| task(format!("waits-{number}"), "silent", json!({}))).collect();
    submit(&queue, &waiting).await;
    eventually(LONG, "the outage lasts long enough", async || {
        let stats = queue.stats().await.unwrap();
        assert_eq!((stats.finished, stats.ready + stats.running), (40, 24), "nothing is claimed, nothing is lost");
        // Who is alone for longer than a session lasts has to take it for over, and gives back what it runs.
        assert!(stats.running == 4 || lost.elapsed() > LONGEST_SESSION, "what runs, runs on: {stats:?}");
        if lost.elapsed() > outage { Ok(()) } else { Err(format!("{:?}", lost.elapsed())) }
    })
    .await;
    for other in [leader, (leader + 1) % 3] {
        ensemble.members[other].launch();
    }
    wait_for_finished(&queue, 60, LONG).await;
    place.site.open_gate("gate");
    wait_for_finished(&queue, 64, PATIENCE).await;
    if outage < LONGEST_SESSION {
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

#[tokio::test]
async fn a_host_waits_for_a_zookeeper_that_is_down_at_its_start_and_ends_when_told() {
    let mut server = Server::start().await;
    let place = Place::on(&server.address(), "down").await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    submit(&queue, &[task("waits", "silent", json!({}))]).await;
    server.kill();
    place.configure(2, LONG_TIMER, json!({}));
    let mut waiting = place.site.spawn_with(&[], &[]);
    waiting.notified("STATUS=waiting for ZooKeeper", PATIENCE).await;
    waiting.logged("this host is not in its fleet and claims nothing", PATIENCE).await;
    let mut told_to_end = place.site.spawn_with(&[], &[]);
    told_to_end.notified("STATUS=waiting for ZooKeeper", PATIENCE).await;
    told_to_end.signal(Signal::TERM);
    assert!(told_to_end.exited(PATIENCE).await.success());
    let stats = queue.stats().await.unwrap();
    assert_eq!((stats.ready, stats.finished), (1, 0), "nothing is claimed without ZooKeeper");
    server.restart().await;
    waiting.notified("READY=1", PATIENCE).await;
    wait_for_finished(&queue, 1, PATIENCE).await;
    waiting.stop().await;
}
