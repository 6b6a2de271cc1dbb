//! What is claimed, what is left, and what is set aside.

use std::time::Duration;

use laelaps_queue::{Accepts, Claim, Compression, Error, NewTask, State};
use laelaps_test_databases::{Durability, PATIENCE, eventually, mariadb};

use crate::fixture::{LONG, Site, asking, finish, keys, table, task, task_of};

#[tokio::test]
async fn types_without_a_route_are_left_and_stall_nobody() {
    for ignore_users in [false, true] {
        let site = Site::new().await;
        let (host, mut ruby) = (site.host().await, site.ruby().await);
        // More of them stand first than one claim looks at.
        let foreign: Vec<NewTask> = (0..5_000).map(|n| NewTask::new(format!("foreign{n:04}"), "theirs", "{}")).collect();
        site.submit(&foreign).await;
        ruby.run("UPDATE {t} SET timeout = timeout - 100").await;
        let ours: Vec<NewTask> = (0..10).map(|n| NewTask::new(format!("ours{n}"), "ours", "{}")).collect();
        site.submit(&ours).await;
        let accepts = Accepts::new(|task_type| task_type == "ours");
        let mut claimed = Vec::new();
        for _ in 0..5 {
            let answer = site.claim_types(host, 4, ignore_users, &accepts).await;
            let more = answer.next_due_in == Some(Duration::ZERO);
            assert!(more || !answer.tasks.is_empty(), "a claim that has looked at many says that there is more");
            claimed.extend(answer.tasks);
        }
        assert_eq!(claimed.len(), 10, "ignore_users: {ignore_users}");
        let untouched = ruby.number("SELECT COUNT(*) FROM {t} WHERE owner = 0 AND timeout <= UNIX_TIMESTAMP()").await;
        assert_eq!(untouched, 5_000);
        assert_eq!(ruby.acquire_fair(300, 2).await, ["foreign0000", "foreign0001"], "Ruby has a route for them");
        // Another claimer's routes are asked anew.
        let all = site.claim_types(host, 3, ignore_users, &Accepts::new(|_| true)).await;
        assert_eq!(keys(&all.tasks), ["foreign0002", "foreign0003", "foreign0004"]);
    }
}

#[tokio::test]
async fn what_a_host_claims_is_told_from_what_it_leaves_by_the_key_if_the_data_has_no_type() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    for (key, data) in [("ours.1", &b"{}"[..]), ("theirs.1", b""), ("ours.2", b"no json"), ("x", br#"{"type":"ours","a":1}"#)] {
        ruby.submit(key, data).await;
    }
    let accepts = Accepts::new(|task_type| task_type == "ours");
    let claimed = site.claim_types(host, 9, false, &accepts).await.tasks;
    assert_eq!(keys(&claimed), ["ours.1", "ours.2", "x"]);
    let data: Vec<&[u8]> = claimed.iter().map(|task| task.data.as_slice()).collect();
    assert_eq!(data, [&b"{}"[..], b"{}", br#"{"a":1}"#]);
}

#[tokio::test]
async fn damaged_data_is_set_aside_and_stops_nobody() {
    for side_table in [true, false] {
        let site = Site::with(table(side_table)).await;
        let (host, mut ruby) = (site.host().await, site.ruby().await);
        let now = ruby.now().await;
        // Its user may have one running: it must not be in the way of the next.
        ruby.submit_at("torn", b"\x1f\x8bthis is no gzip", now - 9, Some("u"), Some(1)).await;
        ruby.submit_at("next", br#"{"type":"t"}"#, now - 8, Some("u"), Some(1)).await;
        let first = site.claim(host, 9).await;
        let second = site.claim(host, 9).await;
        assert_eq!(keys(&[first, second].concat()), ["next"]);
        assert!(ruby.acquire_fair(300, 9).await.is_empty(), "Ruby does not meet it");
        assert_eq!(ruby.row("torn").await.1, b"\x1f\x8bthis is no gzip", "its data is as it was");
        let torn = site.get("torn").await;
        assert_eq!((torn.state, torn.error_code.as_deref()), (State::Failed, Some("damaged-data")));
        assert_eq!(torn.user.as_deref(), side_table.then_some("u"));
        assert_eq!(site.queue.stats().await.unwrap().failed, 1);
        // Once it is repaired it has its turn.
        ruby.run(r#"UPDATE {t} SET data = '{"type":"t","n":2}' WHERE id = 'torn'"#).await;
        site.queue.cancel("next").await.unwrap();
        site.queue.retry("torn").await.unwrap();
        let claimed = site.claim(host, 9).await;
        assert_eq!((keys(&claimed), claimed[0].data.as_slice()), (vec!["torn"], &br#"{"n":2}"#[..]));
        assert_eq!(claimed[0].user.as_deref(), side_table.then_some("u"));
        site.settle(&claimed[0], finish()).await;
        assert_eq!(site.state("torn").await, State::Finished);
    }
}

#[tokio::test]
async fn a_claim_keeps_the_bound_of_its_data() {
    // A server of its own, since the packets are the whole server's.
    let server = mariadb::Server::start(Durability::Process).await;
    let site = Site::on(server.create_database().await, table(true)).await;
    site.queue.init().await.unwrap();
    site.ruby().await.run("SET GLOBAL max_allowed_packet = 67108864").await;
    let site = site.another().await;
    let host = site.host().await;
    let data = format!(r#"{{"x":"{}"}}"#, "x".repeat(15 << 20)).into_bytes();
    let tasks: Vec<NewTask> = (0..6).map(|n| NewTask { data: data.clone(), ..task(&format!("large{n}")) }).collect();
    for task in tasks {
        site.submit(&[task]).await;
    }
    for ignore_users in [true, false] {
        let claim = Claim { ignore_users, ..asking(host, 100) };
        let claimed = site.backend().claim(&claim).await.unwrap().tasks;
        assert_eq!(claimed.len(), if ignore_users { 4 } else { 2 });
        assert!(claimed.iter().all(|task| task.data == data));
    }
}

#[tokio::test]
async fn a_task_runs_when_its_time_has_come() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    let now = site.backend().now().await.unwrap();
    let at = |key: &str, ms: i64| NewTask { run_at: Some(laelaps_queue::Timestamp(ms)), ..task(key) };
    site.submit(&[at("zero", 0), at("before 1970", -5), at("long past", 1_200_000_000_000)]).await;
    for key in ["zero", "before 1970", "long past"] {
        let (time, ..) = ruby.row(key).await;
        assert!(time >= now.0 / 1_000, "Ruby would lose {key}; its time is {time}");
    }
    site.submit(&[at("yesterday", now.0 - 86_400_000), at("soon", now.0 + 100_000), at("far", now.0 + 3_600_000)]).await;
    assert_eq!(ruby.row("yesterday").await.0, (now.0 - 86_400_000 + 999) / 1_000);
    let stats = site.queue.stats().await.unwrap();
    assert_eq!((stats.ready, stats.scheduled, stats.running), (4, 2, 0));
    assert_eq!(
        (site.state("far").await, site.get("far").await.run_at.0),
        (State::Waiting, (now.0 + 3_600_000 + 999) / 1_000 * 1_000)
    );
    let claimed = site.claim(host, 9).await;
    assert_eq!(claimed.len(), 4);
    assert_eq!(claimed[0].key, "yesterday", "as Ruby orders them");
    let empty = site.backend().claim(&asking(host, 9)).await.unwrap();
    assert!(empty.tasks.is_empty());
    let due_in = empty.next_due_in.unwrap();
    // Sooner than the leases of what runs end.
    assert!(due_in > Duration::ZERO && due_in <= Duration::from_secs(101), "{due_in:?}");
    // Its time comes, sooner than a test could wait for it.
    ruby.run("UPDATE {t} SET timeout = UNIX_TIMESTAMP() + 1 WHERE id = 'soon'").await;
    site.passes(site.get("soon").await.run_at).await;
    eventually(PATIENCE, "the task runs", async || {
        let claimed = site.claim(host, 9).await;
        if keys(&claimed) == ["soon"] { Ok(()) } else { Err(format!("{:?}", keys(&claimed))) }
    })
    .await;
    let beyond = site.queue.submit(at("beyond", 2_147_483_647_000)).await.unwrap_err();
    assert!(beyond.to_string().contains("later than January 2038"), "{beyond}");
}

#[tokio::test]
async fn a_row_that_enters_in_the_past_is_met_by_the_next_round() {
    for ignore_users in [true, false] {
        let site = Site::new().await;
        let (host, mut ruby) = (site.host().await, site.ruby().await);
        site.submit(&(0..20).map(|n| task(&format!("a{n:02}"))).collect::<Vec<_>>()).await;
        let claim = Claim { ignore_users, ..asking(host, 5) };
        site.backend().claim(&claim).await.unwrap();
        let now = ruby.now().await;
        ruby.submit_at("past", br#"{"type":"t"}"#, now - 1_000, None, None).await;
        eventually(PATIENCE, "the row is met", async || {
            let claimed = site.backend().claim(&claim).await.unwrap().tasks;
            if keys(&claimed).contains(&"past") { Ok(()) } else { Err(format!("{:?}", keys(&claimed))) }
        })
        .await;
    }
}

#[tokio::test]
async fn a_claim_that_is_given_up_leaves_no_task_running() {
    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&(0..30).map(|n| task(&format!("a{n:02}"))).collect::<Vec<_>>()).await;
    let mut received = 0;
    for patience in 0..60 {
        let claim = asking(host, 1);
        let claiming = site.backend().claim(&claim);
        // Whether it answers in time is open.
        if let Ok(claimed) = tokio::time::timeout(Duration::from_micros(patience * 100), claiming).await {
            received += i64::try_from(claimed.unwrap().tasks.len()).unwrap();
        }
    }
    let mut ruby = site.ruby().await;
    eventually(PATIENCE, "what nobody heard of is handed back", async || {
        let running = ruby.number("SELECT COUNT(*) FROM {t} WHERE timeout > UNIX_TIMESTAMP()").await;
        if running == received { Ok(()) } else { Err(format!("{running} running, {received} received")) }
    })
    .await;
}

#[tokio::test]
async fn most_attempts_need_a_place_to_be_counted() {
    let counted = NewTask { max_attempts: Some(2), ..task("a") };
    let site = Site::plain().await;
    assert!(matches!(site.queue.submit(counted.clone()).await, Err(Error::NotSupported { what: "max_attempts", .. })));
    let mut config = site.config.clone();
    config.policy.max_attempts = Some(3);
    assert!(matches!(laelaps_queue::Queue::open(&config).await, Err(Error::Config { setting: "max_attempts", .. })));

    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&[counted]).await;
    for attempt in 1..=2 {
        let claimed = site.claim(host, 1).await.remove(0);
        assert_eq!((claimed.attempt, claimed.max_attempts), (attempt, Some(2)));
        site.settle(&claimed, laelaps_queue::Event::Trap { message: "boom".to_owned() }).await;
    }
    let failed = site.get("a").await;
    assert_eq!((failed.state, failed.attempts, failed.error_message.as_deref()), (State::Failed, 2, Some("boom")));
    assert!(site.claim(host, 1).await.is_empty());
}

#[tokio::test]
async fn ruby_and_laelaps_take_each_others_tasks() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task_of("u", "ours", Some(2)), NewTask { compression: Compression::Gzip, ..task("gzip") }]).await;
    let (time, data, created_at, user, owner) = ruby.row("ours").await;
    assert_eq!((data.as_slice(), user.as_deref(), owner), (&br#"{"type":"type","n":1}"#[..], Some("u"), 0));
    assert_eq!(created_at, Some(time));
    assert!(ruby.row("gzip").await.1.starts_with(b"\x1f\x8b"));
    ruby.submit("theirs", br#"{"n":2,"type":"mail"}"#).await;
    assert_eq!(ruby.acquire_fair(300, 1).await, ["ours"], "its weight is two");
    let claimed = site.claim_for(host, 9, LONG).await;
    assert_eq!(keys(&claimed), ["gzip", "theirs"]);
    assert_eq!((claimed[1].task_type.as_str(), claimed[1].data.as_slice()), ("mail", &br#"{"n":2}"#[..]));
    assert!(ruby.acquire_fair(300, 9).await.is_empty() && ruby.acquire_unfair(300, 9).await.is_empty());
}

#[tokio::test]
async fn a_queue_does_not_hold_on_to_what_its_claimer_does() {
    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&[task("a"), task("b")]).await;
    let held = std::sync::Arc::new(());
    for ignore_users in [true, false] {
        let of_claim = std::sync::Arc::clone(&held);
        let accepts = Accepts::new(move |_| std::sync::Arc::strong_count(&of_claim) > 0);
        assert_eq!(site.claim_types(host, 1, ignore_users, &accepts).await.tasks.len(), 1);
        drop(accepts);
        // The claim's own task may be about to end.
        eventually(PATIENCE, "a host that ends waits for its last settlement", async || {
            let count = std::sync::Arc::strong_count(&held);
            if count == 1 { Ok(()) } else { Err(format!("{count} have it")) }
        })
        .await;
    }
}
