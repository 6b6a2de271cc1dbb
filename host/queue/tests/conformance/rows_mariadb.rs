//! Rows that others have written on a MariaDB server and that cannot be read, or contradict each other: they stop nobody, and are found, shown and
//! removed by their numbers.

use std::time::{Duration, Instant};

use laelaps_queue::{
    Accepts, Beat, Claim, ClaimedTask, Error, Event, Filter, HostId, LeaseAnswer, NewTask, PluginVersion, Quarantine, State,
    TaskId,
};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection};

use crate::fixture::{Database, Fixture, LONG, PATIENCE, finish, keys, settled, task, task_of};

async fn beside(fixture: &Fixture) -> MySqlConnection {
    MySqlConnection::connect(&fixture.config.url).await.unwrap()
}

async fn run(fixture: &Fixture, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut beside(fixture).await).await.unwrap();
}

async fn number(fixture: &Fixture, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(&mut beside(fixture).await).await.unwrap()
}

/// Claim until nothing is left, by users, by age and alone; answers the keys. What was moved by hand is found by a look from the head, which on a busy
/// machine comes a second after the last one: so as many as are expected are waited for.
async fn drain(fixture: &Fixture, host: HostId, expected: usize) -> Vec<String> {
    let (mut keys, began) = (Vec::new(), Instant::now());
    for round in 0.. {
        if round >= 20 && (keys.len() >= expected || began.elapsed() > PATIENCE) {
            break;
        }
        // Made anew, so that each looks for what was put apart by hand.
        let accepts = Some(Accepts::new(|_| true));
        let claim = Claim { alone: round % 3 == 2, ignore_users: round % 3 == 1, accepts, ..Claim::new(host, 7, LONG) };
        let claimed = tokio::time::timeout(PATIENCE, fixture.backend().claim(&claim)).await.expect("a claim ends").unwrap().tasks;
        let ends: Vec<_> = claimed.iter().map(|task| settled(task, finish())).collect();
        fixture.backend().settle(&ends).await.unwrap();
        keys.extend(claimed.into_iter().map(|task| task.key));
    }
    keys.sort();
    keys
}

/// Nothing that looks at many tasks is stopped by one.
async fn all_can_be_read(fixture: &Fixture) {
    let filter = Filter { limit: 1_000, with_data: true, ..Filter::default() };
    fixture.queue.list(&filter).await.unwrap();
    let states = vec![State::Waiting, State::Running, State::Failed];
    fixture.queue.list(&Filter { states, ..filter }).await.unwrap();
    fixture.queue.stats().await.unwrap();
    fixture.backend().hosts().await.unwrap();
    fixture.backend().audit().await.unwrap();
    fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
    fixture.backend().clean_up(100).await.unwrap();
}

/// As somebody could have written them into the tables.
const UNREADABLE: &str =
    "UPDATE laelaps_task SET `key` = x'6d2dfc' WHERE `key` = 'key'; UPDATE laelaps_task SET type = x'74ff' WHERE `key` = 'type';
    UPDATE laelaps_task SET user = x'75ff' WHERE `key` = 'user'; UPDATE laelaps_ready_of_user SET user = x'75ff' WHERE user = 'u';
    UPDATE laelaps_account_change SET user = x'75ff' WHERE user = 'u';
    UPDATE laelaps_tally SET name = x'74ff', tasks = 1 WHERE id = (SELECT * FROM (SELECT MIN(id) FROM laelaps_tally) AS first);
    INSERT INTO laelaps_tally (what, name, tasks) VALUES ('type', 'type', 4)";

#[tokio::test]
async fn a_task_whose_names_cannot_be_read_is_set_aside_with_its_number_and_stops_nobody() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture
        .submit(&[task("key"), task("type"), task_of("u", "user", Some(1)), task("good"), task_of("w", "other", Some(1))])
        .await;
    let id = |key: &'static str| {
        let fixture = &fixture;
        async move { fixture.get(key).await.id }
    };
    let ids = [id("key").await, id("type").await, id("user").await];
    run(&fixture, UNREADABLE).await;
    all_can_be_read(&fixture).await;
    let findings = fixture.backend().audit().await.unwrap();
    for id in ids {
        assert!(findings.iter().any(|finding| finding == &format!("names are text in UTF-8: task {}", id.0)), "{findings:?}");
    }
    assert_eq!(drain(&fixture, host, 2).await, ["good", "other"]);
    for id in ids {
        let aside = fixture.backend().get_by_id(id).await.unwrap().unwrap();
        assert_eq!((aside.state, aside.error_code.as_deref()), (State::Failed, Some("unreadable")), "{aside:?}");
        assert!(aside.unreadable.is_some_and(|problem| problem.contains("is not text in UTF-8 from byte")));
        assert!(aside.error_message.is_some_and(|words| words.contains(&format!("laelaps cancel --id {}", id.0))));
    }
    all_can_be_read(&fixture).await;
    assert_eq!(fixture.backend().audit().await.unwrap(), [] as [&str; 0]);
    let removed_at_once = ids[0];
    fixture.backend().cancel_by_id(removed_at_once, LONG).await.unwrap();
    assert!(fixture.backend().get_by_id(removed_at_once).await.unwrap().is_none());
    // Put right by hand, it may run again.
    run(&fixture, "UPDATE laelaps_task SET type = 'type' WHERE `key` = 'type'").await;
    fixture.backend().retry_by_id(ids[1]).await.unwrap();
    fixture.backend().cancel_by_id(ids[2], LONG).await.unwrap();
    assert_eq!(drain(&fixture, host, 1).await, ["type"]);
    assert_eq!(fixture.backend().audit().await.unwrap(), [] as [&str; 0]);
    let nowhere = TaskId(999);
    assert!(matches!(fixture.backend().cancel_by_id(nowhere, LONG).await, Err(Error::NoSuchId(id)) if id == nowhere));
    assert!(matches!(fixture.backend().retry_by_id(nowhere).await, Err(Error::NoSuchId(id)) if id == nowhere));
    assert!(fixture.backend().get_by_id(nowhere).await.unwrap().is_none());
}

#[tokio::test]
async fn tasks_are_named_by_their_numbers_as_by_their_keys() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture.submit_some("a", 2).await;
    let (first, second) = (fixture.get("a0").await.id, fixture.get("a1").await.id);
    assert_eq!(fixture.backend().get_by_id(first).await.unwrap().unwrap().key, "a0");
    fixture.backend().cancel_by_id(first, LONG).await.unwrap();
    assert!(matches!(fixture.backend().cancel_by_id(first, LONG).await, Err(Error::AlreadyEnded { .. })));
    fixture.backend().retry_by_id(first).await.unwrap();
    let claimed = fixture.claim(host, 2).await;
    assert_eq!(claimed.len(), 2);
    fixture.backend().cancel_by_id(second, LONG).await.unwrap();
    assert_eq!(fixture.state("a1").await, State::Cancelled);
    fixture.audit().await;
}

/// Rows of places that their tasks do not know, each of its kind. What is named good can run in spite of them.
const CONTRADICTIONS: [&str; 20] = [
    // Of no task, of one that has ended, and twice.
    "INSERT INTO laelaps_ready (turn, task, max_running) VALUES (1, 987654, NULL), (2, 987655, 3); INSERT INTO laelaps_scheduled VALUES (1, 987654); INSERT INTO laelaps_suspect (turn, task) VALUES (1, 987656)",
    "INSERT INTO laelaps_ready SELECT queue, 1, id, NULL FROM laelaps_task WHERE `key` = 'ended'",
    "INSERT INTO laelaps_ready_of_user SELECT queue, 'u', 1, id, 1 FROM laelaps_task WHERE `key` = 'ended'; INSERT INTO laelaps_account_change (user, running) VALUES ('u', 0)",
    "INSERT INTO laelaps_ready_of_user SELECT queue, 'u', 1, id, 1 FROM laelaps_task WHERE `key` = 'good'; INSERT INTO laelaps_account_change (user, running) VALUES ('u', 0)",
    "INSERT INTO laelaps_scheduled SELECT run_at, id FROM laelaps_task WHERE `key` = 'good'",
    "INSERT INTO laelaps_scheduled SELECT 5, id FROM laelaps_task WHERE `key` IN ('good', 'ended')",
    // Elsewhere than its row says.
    "UPDATE laelaps_ready SET turn = 7 WHERE task = (SELECT id FROM laelaps_task WHERE `key` = 'good')",
    "UPDATE laelaps_ready_of_user SET turn = 7 WHERE user = 'u'; INSERT INTO laelaps_account_change (user, running) VALUES ('u', 0)",
    "INSERT INTO laelaps_ready SELECT queue, 1, id, NULL FROM laelaps_task WHERE `key` = 'held'",
    // In another queue than its own, or in one that there cannot be.
    "UPDATE laelaps_ready SET queue = 'mail' WHERE task = (SELECT id FROM laelaps_task WHERE `key` = 'good')",
    "UPDATE laelaps_ready_of_user SET queue = 'mail'; INSERT INTO laelaps_account_change (queue, user, running) VALUES ('mail', 'u', 0)",
    "UPDATE laelaps_ready SET queue = 'two words' WHERE task = (SELECT id FROM laelaps_task WHERE `key` = 'good')",
    "INSERT INTO laelaps_ready SELECT x'ff', turn, id, NULL FROM laelaps_task WHERE `key` IN ('good', 'mine')",
    "UPDATE laelaps_ready_of_user SET queue = x'ff'; INSERT INTO laelaps_account_change (queue, user, running) VALUES (x'ff', 'u', 0)",
    // Apart from others: of no task, of one that has ended, twice, and elsewhere than its row says.
    "INSERT INTO laelaps_unserved VALUES ('', '', '', 1, 987654), ('', 'type', '', 1, 987655), ('', 'type', 'u', 1, 987656), (x'ff', x'ff', x'ff', 5, 987657)",
    "INSERT INTO laelaps_unserved SELECT queue, type, user, turn, id FROM laelaps_task WHERE `key` IN ('ended', 'held')",
    "INSERT INTO laelaps_unserved SELECT queue, type, user, turn, id FROM laelaps_task WHERE `key` IN ('good', 'mine')",
    "INSERT INTO laelaps_unserved SELECT 'mail', 'other', 'v', 1, id FROM laelaps_task",
    "INSERT INTO laelaps_unserved SELECT queue, 'other', 'v', 7, task FROM laelaps_ready; DELETE FROM laelaps_ready",
    "INSERT INTO laelaps_unserved SELECT x'ff', x'ff', x'ff', 7, task FROM laelaps_ready_of_user; DELETE FROM laelaps_ready_of_user;
        INSERT INTO laelaps_account_change (queue, user, running) VALUES ('', 'u', 0)",
];

#[tokio::test]
async fn places_that_contradict_their_tasks_are_put_right_and_stop_nobody() {
    for contradiction in CONTRADICTIONS {
        let fixture = Fixture::new(Database::MariaDb).await;
        let host = fixture.host().await;
        fixture.submit(&[task("ended"), task("held").on_hold()]).await;
        let claimed = fixture.claim(host, 1).await;
        fixture.backend().settle(&[settled(&claimed[0], finish())]).await.unwrap();
        fixture.submit(&[task("good"), task_of("u", "mine", Some(1)), task_of("u", "next", Some(1))]).await;
        run(&fixture, contradiction).await;
        assert_ne!(fixture.backend().audit().await.unwrap(), [] as [&str; 0], "{contradiction}");
        all_can_be_read(&fixture).await;
        assert_eq!(drain(&fixture, host, 3).await, ["good", "mine", "next"], "{contradiction}");
        let held = fixture.get("held").await;
        assert!(held.is_held(), "{contradiction}");
        fixture.audit().await;
    }
}

/// What stands apart as if it were of another type than its own is found by hosts that serve its own; what stands elsewhere as well, in one place.
#[tokio::test]
async fn a_task_that_waits_apart_for_hosts_of_another_type_is_found_by_those_of_its_own() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    let strange = NewTask { task_type: "strange".to_owned(), ..task("strange") };
    fixture.submit(&[task("good"), task_of("u", "mine", Some(1)), strange]).await;
    run(
        &fixture,
        "INSERT INTO laelaps_unserved SELECT queue, IF(type = 'strange', type, 'other'), user, turn, id FROM laelaps_task;
        DELETE FROM laelaps_ready; DELETE FROM laelaps_ready_of_user;
        INSERT INTO laelaps_suspect (turn, task) SELECT 7, id FROM laelaps_task WHERE type = 'strange'",
    )
    .await;
    let own = fixture.get("good").await.task_type;
    let accepts = Some(laelaps_queue::Accepts::new(move |name| name == own));
    let claim = Claim { accepts, ..Claim::new(host, 9, LONG) };
    assert!(fixture.backend().claim(&claim).await.unwrap().tasks.is_empty());
    fixture.backend().clean_up(100).await.unwrap();
    assert_eq!(fixture.backend().audit().await.unwrap(), [] as [&str; 0]);
    let mut found = Vec::new();
    for _ in 0..3 {
        found.extend(fixture.backend().claim(&claim).await.unwrap().tasks.into_iter().map(|task| task.key));
    }
    found.sort();
    assert_eq!(found, ["good", "mine"]);
    fixture.audit().await;
}

/// Places in a queue of tasks of another one. A claim of that queue does not hand them out, and puts them right.
#[tokio::test]
async fn a_claim_of_a_queue_never_gets_a_task_of_another_one_that_stands_there() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    let of = |queue: &str, task: NewTask| NewTask { queue: Some(queue.to_owned()), ..task };
    fixture
        .submit(&[
            task("a"),
            of("video", task("b")),
            task_of("u", "c", Some(1)),
            of("mail", task("own")),
            of("mail", task_of("v", "own of v", Some(1))),
        ])
        .await;
    run(
        &fixture,
        "UPDATE laelaps_ready SET queue = 'mail'; UPDATE laelaps_ready_of_user SET queue = 'mail';
        INSERT INTO laelaps_account_change (queue, user, running) VALUES ('mail', 'u', 0)",
    )
    .await;
    let claim_of = |queue: &str| Claim { queues: Some([queue.to_owned()].into()), ..Claim::new(host, 9, LONG) };
    let mut found = Vec::new();
    for queue in ["mail", "mail", "mail", "default", "video"] {
        let claimed = fixture.backend().claim(&claim_of(queue)).await.unwrap().tasks;
        assert!(claimed.iter().all(|task| task.queue == queue), "{claimed:?}");
        found.extend(claimed.into_iter().map(|task| task.key));
    }
    found.sort();
    assert_eq!(found, ["a", "b", "c", "own", "own of v"]);
    fixture.audit().await;
}

/// Names of queues that nobody can submit: in the task's row, in its place, or in both.
#[tokio::test]
async fn a_task_in_a_queue_that_there_cannot_be_is_set_aside_with_its_number_and_stops_nobody() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture.submit(&[task("row"), task("both"), task("bytes"), task("said"), task_of("u", "of u", Some(1)), task("good")]).await;
    let bad = ["row", "both", "bytes", "of u"];
    let mut ids = Vec::new();
    for key in bad {
        ids.push(fixture.get(key).await.id);
    }
    run(
        &fixture,
        "UPDATE laelaps_task SET queue = 'two words' WHERE `key` IN ('row', 'both');
        UPDATE laelaps_task SET queue = x'ff' WHERE `key` = 'bytes'; UPDATE laelaps_task SET queue = 'a,b' WHERE `key` = 'of u';
        UPDATE laelaps_task SET queue = 'default' WHERE `key` = 'said';
        UPDATE laelaps_ready AS r JOIN laelaps_task AS t ON t.id = r.task SET r.queue = t.queue WHERE t.`key` IN ('both', 'bytes');
        UPDATE laelaps_ready_of_user SET queue = 'a,b'; UPDATE laelaps_account_change SET queue = 'a,b'",
    )
    .await;
    all_can_be_read(&fixture).await;
    let findings = fixture.backend().audit().await.unwrap();
    for id in &ids {
        let expected = format!("a queue's name is one that can be submitted: task {}", id.0);
        assert!(findings.contains(&expected), "{findings:?}");
    }
    assert_eq!(drain(&fixture, host, 2).await, ["good", "said"]);
    for id in &ids {
        let aside = fixture.backend().get_by_id(*id).await.unwrap().unwrap();
        assert_eq!((aside.state, aside.error_code.as_deref()), (State::Failed, Some("unreadable")), "{aside:?}");
        assert!(aside.unreadable.is_some_and(|problem| problem.contains("queue")));
    }
    all_can_be_read(&fixture).await;
    assert_eq!(fixture.backend().audit().await.unwrap(), [] as [&str; 0]);
    // Put right by hand, it may run again.
    run(&fixture, "UPDATE laelaps_task SET queue = 'mail' WHERE `key` = 'row'").await;
    fixture.backend().retry_by_id(ids[0]).await.unwrap();
    for id in &ids[1..] {
        fixture.backend().cancel_by_id(*id, LONG).await.unwrap();
    }
    assert_eq!(drain(&fixture, host, 1).await, ["row"]);
    fixture.audit().await;
}

/// A user of whom an orphan was left: its tasks go on to run, one after the other.
#[tokio::test]
async fn an_orphan_does_not_use_up_its_users_limit() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture.submit(&[task_of("u", "gone", Some(1))]).await;
    fixture.queue.cancel("gone").await.unwrap();
    fixture.submit(&[task_of("u", "a", Some(1)), task_of("u", "b", Some(1))]).await;
    // As a move of what was due left it, against a cancellation.
    run(&fixture, "INSERT INTO laelaps_ready_of_user SELECT queue, user, turn, id, 1 FROM laelaps_task WHERE `key` = 'gone'")
        .await;
    for key in ["a", "b"] {
        let mut claimed = fixture.claim(host, 9).await;
        if claimed.is_empty() {
            claimed = fixture.claim(host, 9).await;
        }
        assert_eq!(keys(&claimed), [key]);
        assert!(fixture.claim(host, 9).await.is_empty());
        fixture.backend().settle(&[settled(&claimed[0], finish())]).await.unwrap();
    }
    fixture.audit().await;
}

#[tokio::test]
async fn lists_of_tasks_that_are_damaged_are_made_anew() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture.submit_some("a", 3).await;
    let claimed = fixture.claim_for(host, 3, Duration::from_millis(20)).await;
    fixture.passes(claimed[0].until).await;
    run(&fixture, "UPDATE laelaps_claim SET tasks = '[oops', look_at = 1").await;
    fixture.backend().hosts().await.unwrap();
    assert_eq!(fixture.backend().reclaim(&fixture.config.policy).await.unwrap().tasks.len(), 3);
    let claimed = fixture.claim(host, 3).await;
    let at_once = Event::Finish { output: None, retention: Some(Duration::ZERO) };
    fixture.backend().settle(&claimed.iter().map(|task| settled(task, at_once.clone())).collect::<Vec<_>>()).await.unwrap();
    run(&fixture, "UPDATE laelaps_retention SET tasks = 'null'").await;
    assert_eq!(fixture.backend().clean_up(100).await.unwrap(), 3);
    fixture.audit().await;
}

/// With the server's own checks switched off.
#[tokio::test]
async fn a_row_that_breaks_the_tables_checks_stops_nobody() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture.submit_some("a", 3).await;
    run(&fixture, "SET check_constraint_checks = 0; UPDATE laelaps_task SET finished_at = 5, until = 7 WHERE `key` = 'a1'").await;
    all_can_be_read(&fixture).await;
    assert_eq!(drain(&fixture, host, 3).await, ["a0", "a1", "a2"]);
    fixture.audit().await;
}

/// A priority as no statement of ours writes it, with the server's own checks switched off. It counts as the nearest that is allowed.
#[tokio::test]
async fn a_priority_out_of_its_range_stops_nobody() {
    const WITHOUT_CHECKS: &str = "SET check_constraint_checks = 0; UPDATE laelaps_task SET priority";
    const OUT: &str = "a priority is from -100 to 100: task ";
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    let names = ["a", "least", "most", "cancelled", "retried", "held"];
    fixture.submit(&names.map(|key| if key == "held" { task(key).on_hold() } else { task(key) })).await;
    fixture.submit(&[task_of("u", "b", Some(3)), task_of("u", "least of u", Some(3)), task_of("u", "most of u", Some(3))]).await;
    let refused = sqlx::raw_sql("UPDATE laelaps_task SET priority = 101").execute(&mut beside(&fixture).await).await.unwrap_err();
    assert!(refused.to_string().contains("laelaps_task_priority"), "{refused}");
    fixture.queue.cancel("retried").await.unwrap();
    run(
        &fixture,
        &format!(
            "{WITHOUT_CHECKS} = 127 WHERE `key` LIKE 'most%'; UPDATE laelaps_task SET priority = -128 WHERE `key` LIKE 'least%'"
        ),
    )
    .await;
    run(&fixture, &format!("{WITHOUT_CHECKS} = -127 WHERE `key` IN ('cancelled', 'retried', 'held')")).await;
    all_can_be_read(&fixture).await;
    let findings = fixture.backend().audit().await.unwrap();
    assert_eq!(findings.iter().filter(|finding| finding.starts_with(OUT)).count(), 7, "{findings:?}");
    let shown = fixture.get("most").await;
    assert_eq!((shown.priority, shown.unreadable.as_deref()), (100, Some("the priority is 127; -100 to 100 can be")));
    // By hand.
    fixture.queue.cancel("cancelled").await.unwrap();
    fixture.queue.retry("retried").await.unwrap();
    assert!(fixture.queue.release_held("held").await.unwrap());
    // In the order that they count for, once they stand where their rows say.
    let mut claimed = Vec::new();
    while claimed.len() < 8 {
        claimed.extend(fixture.claim(host, 1).await);
    }
    assert!(fixture.claim(host, 9).await.is_empty());
    assert_eq!(fixture.get("most").await.priority, 100);
    // While they run: renewed, settled together with others, and set right by that.
    run(
        &fixture,
        &format!(
            "{WITHOUT_CHECKS} = 127 WHERE `key` LIKE 'most%'; UPDATE laelaps_task SET priority = -128 WHERE `key` LIKE 'least%'"
        ),
    )
    .await;
    let beat = |task: &ClaimedTask| Beat { lease_ref: task.lease_ref, alive_time: LONG * 2, progress: None };
    let answers = fixture.backend().heartbeat(&claimed.iter().map(beat).collect::<Vec<_>>()).await.unwrap();
    assert_eq!(answers, [LeaseAnswer::Held; 8]);
    run(
        &fixture,
        &format!(
            "{WITHOUT_CHECKS} = 127 WHERE `key` LIKE 'most%'; UPDATE laelaps_task SET priority = -128 WHERE `key` LIKE 'least%'"
        ),
    )
    .await;
    let is_good = |task: &ClaimedTask| !task.key.starts_with("most") && !task.key.starts_with("least");
    let end = |task: &ClaimedTask| if is_good(task) { finish() } else { Event::Retry { delay: Some(Duration::ZERO) } };
    fixture.backend().settle(&claimed.iter().map(|task| settled(task, end(task))).collect::<Vec<_>>()).await.unwrap();
    assert_eq!(fixture.backend().audit().await.unwrap(), [] as [&str; 0]);
    fixture.submit(&[task("usual"), task_of("u", "usual of u", Some(3))]).await;
    let claimed = fixture.claim(host, 9).await;
    let (of_u, others): (Vec<&str>, Vec<&str>) = keys(&claimed).into_iter().partition(|key| key.ends_with("of u"));
    assert_eq!((others, of_u), (vec!["least", "usual", "most"], vec!["least of u", "usual of u", "most of u"]));
    fixture.audit().await;
}

/// Places whose turns no task can have.
#[tokio::test]
async fn turns_at_the_end_of_their_range_stop_nobody() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture.submit(&[task("a"), task("b"), task_of("u", "c", Some(2)), task_of("u", "d", Some(2))]).await;
    run(
        &fixture,
        "UPDATE laelaps_ready SET turn = -9223372036854775808 WHERE task = (SELECT id FROM laelaps_task WHERE `key` = 'a');
        UPDATE laelaps_ready_of_user SET turn = 9223372036854775807 WHERE task = (SELECT id FROM laelaps_task WHERE `key` = 'c');
        UPDATE laelaps_ready_of_user SET turn = -9223372036854775808 WHERE task = (SELECT id FROM laelaps_task WHERE `key` = 'd');
        INSERT INTO laelaps_suspect (turn, task) VALUES (9223372036854775807, 987654), (-9223372036854775808, 987655);
        INSERT INTO laelaps_unserved VALUES ('', 'type', '', 9223372036854775807, 987654), ('', 'type', 'u', -9223372036854775808, 987655);
        INSERT INTO laelaps_unserved SELECT queue, type, user, 9223372036854775807, id FROM laelaps_task WHERE `key` IN ('b', 'd');
        INSERT INTO laelaps_account_change (user, running) VALUES ('u', 0)",
    )
    .await;
    all_can_be_read(&fixture).await;
    assert_eq!(drain(&fixture, host, 4).await, ["a", "b", "c", "d"]);
    fixture.audit().await;
}

#[tokio::test]
async fn numbers_at_the_end_of_their_range_stop_nobody() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture.submit(&[task("a"), task("b")]).await;
    run(&fixture, "UPDATE laelaps_task SET attempts = 4294967295, releases = 4294967295, lost = 4294967295, lost_alone = 4294967295, lost_at = 1").await;
    let claimed = fixture.claim(host, 2).await;
    assert_eq!(claimed.len(), 2);
    let group = [settled(&claimed[0], finish()), settled(&claimed[1], Event::Retry { delay: None })];
    fixture.backend().settle(&group).await.unwrap();
    all_can_be_read(&fixture).await;
    assert_eq!(drain(&fixture, host, 1).await, ["b"]);
    fixture.audit().await;
}

/// Accounts that count wrongly are put right from the tasks and leases.
#[tokio::test]
async fn an_account_that_counts_wrongly_is_put_right() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture.submit(&[task_of("u", "a", Some(1)), task_of("u", "b", Some(1)), task_of("v", "c", Some(2))]).await;
    let running = fixture.claim(host, 1).await;
    run(&fixture, "INSERT INTO laelaps_account_change (user, running) VALUES ('u', 3), ('v', -1), ('x', 2)").await;
    fixture.backend().clean_up(100).await.unwrap();
    fixture.backend().settle(&[settled(&running[0], finish())]).await.unwrap();
    assert_eq!(drain(&fixture, host, 2).await.len(), 2);
    fixture.audit().await;
}

#[tokio::test]
async fn a_host_that_returns_is_excused_for_what_it_lost() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture.submit(&[task("a"), task_of("u", "b", Some(1))]).await;
    let mut leases = Vec::new();
    for _ in 0..2 {
        let claimed = fixture.claim_for(host, 2, Duration::from_millis(20)).await;
        assert_eq!(claimed.len(), 2);
        leases.extend(claimed.iter().map(|task| task.lease_ref));
        fixture.passes(claimed[1].until).await;
        assert_eq!(fixture.backend().reclaim(&fixture.config.policy).await.unwrap().tasks.len(), 2);
    }
    assert!(fixture.claim(host, 9).await.is_empty(), "each has to run alone");
    assert_ne!(number(&fixture, "SELECT MIN(lost_at) FROM laelaps_task").await, 0);
    let stranger = fixture.host().await;
    assert_eq!(fixture.backend().excuse(stranger, &leases).await.unwrap(), 0, "they were not its");
    assert_eq!(fixture.backend().excuse(host, &leases[2..]).await.unwrap(), 2);
    assert_eq!(fixture.backend().excuse(host, &leases[2..]).await.unwrap(), 0, "once");
    fixture.audit().await;
    let together = fixture.claim(host, 9).await;
    assert_eq!((together.len(), together[0].lost, together[0].alone), (2, 1, false));
    fixture.backend().settle(&together.iter().map(|task| settled(task, Event::Stopped)).collect::<Vec<_>>()).await.unwrap();
    assert_eq!(fixture.backend().excuse(host, &leases).await.unwrap(), 2);
    assert_eq!((fixture.get("a").await.lost, number(&fixture, "SELECT MAX(lost_at) FROM laelaps_task").await), (0, 0));
    let events: Vec<String> = fixture.queue.attempts("a").await.unwrap().into_iter().map(|record| record.event).collect();
    assert_eq!(events, ["excused", "excused", "stop"]);
    fixture.audit().await;
}

#[tokio::test]
async fn three_hosts_that_die_with_one_plugin_version_alone_put_it_under_quarantine() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let version = |name: &str| PluginVersion { name: name.to_owned(), digest: format!("digest of {name}") };
    let (bad, good) = (version("bad"), version("good"));
    fixture.submit_some("a", 20).await;
    let die = async |number: usize, runs: &[PluginVersion]| {
        let identity = format!("s{number}");
        let host = fixture.host_as(&identity).await;
        fixture.backend().note_running(host, std::slice::from_ref(&good)).await.unwrap();
        fixture.backend().note_running(host, runs).await.unwrap();
        assert_eq!(fixture.claim(host, 1).await.len(), 1);
        fixture.backend().hand_on(&[identity], &fixture.config.policy).await.unwrap();
        host
    };
    for number in 0..2 {
        die(number, std::slice::from_ref(&bad)).await;
    }
    // In company, without any, and one that leaves in good order count for nothing.
    die(2, &[bad.clone(), good.clone()]).await;
    die(3, &[]).await;
    let leaves = fixture.host().await;
    fixture.backend().note_running(leaves, std::slice::from_ref(&bad)).await.unwrap();
    fixture.claim(leaves, 1).await;
    fixture.backend().unregister_host(leaves).await.unwrap();
    fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
    assert_eq!(fixture.backend().quarantined().await.unwrap(), []);
    let last = die(4, std::slice::from_ref(&bad)).await;
    let guilty = fixture.backend().quarantined().await.unwrap();
    assert_eq!(guilty.iter().map(|one| (&one.version, one.deaths)).collect::<Vec<_>>(), [(&bad, Quarantine::DEATHS)]);
    // It was there all the time.
    fixture.backend().excuse(last, &[]).await.unwrap();
    assert_eq!(fixture.backend().quarantined().await.unwrap(), []);
    die(5, std::slice::from_ref(&bad)).await;
    assert!(fixture.backend().release_plugin(&bad.digest).await.unwrap());
    assert!(!fixture.backend().release_plugin(&bad.digest).await.unwrap());
    assert_eq!(fixture.backend().quarantined().await.unwrap(), []);
    let unknown = HostId(999);
    let refused = fixture.backend().note_running(unknown, &[]).await;
    assert!(matches!(refused, Err(Error::UnknownHost(host)) if host == unknown));
}

/// Documents, and whether they are JSON objects.
const DOCUMENTS: [(&str, bool); 41] = [
    ("{}", true),
    (" \t\n\r{ } ", true),
    (r#"{"a":1}"#, true),
    (r#"{"a":1.}"#, false),
    (r#"{"a":.5}"#, false),
    (r#"{"a":01}"#, false),
    (r#"{"a":-0}"#, true),
    (r#"{"a":-}"#, false),
    (r#"{"a":+1}"#, false),
    (r#"{"a":1e5,"b":1E+5,"c":1.25e-300,"d":123456789012345678901234567890}"#, true),
    (r#"{"a":1e}"#, false),
    (r#"{"a":1e400}"#, true),
    (r#"{"a":0x10}"#, false),
    (r#"{"a":NaN}"#, false),
    (r#"{"a":true,"b":false,"c":null}"#, true),
    (r#"{"a":TRUE}"#, false),
    (r#"{"a":nul}"#, false),
    (r#"{"a":truefalse}"#, false),
    (r#"{"a":1 2}"#, false),
    (r#"{"a":"b" "c"}"#, false),
    (r#"{"a" 1}"#, false),
    (r#"{"a":1,}"#, false),
    (r#"{,"a":1}"#, false),
    (r#"{"a":[1,]}"#, false),
    (r#"{"a":[,1]}"#, false),
    (r#"{"a":[1,[2,{"b":[]}],"c"]}"#, true),
    (r#"{"a":[1}"#, false),
    (r#"{"a":1]"#, false),
    (r#"{"a":1,"a":2}"#, true),
    (r#"{1:2}"#, false),
    (r#"{a:2}"#, false),
    (r#"{'a':2}"#, false),
    (r#"{"\u0061\n\"\\\/\b\f\r\t":"ä€😀"}"#, true),
    (r#"{"a":"\u12"}"#, false),
    (r#"{"a":"\x"}"#, false),
    ("{\"a\":\"tab\there\"}", false),
    ("{}{}", false),
    ("[]", false),
    ("1", false),
    ("", false),
    ("\u{feff}{}", false),
];

#[tokio::test]
async fn json_means_the_same_by_sql_as_by_the_crate() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let mut producer = beside(&fixture).await;
    let deep = |depth: usize| format!(r#"{{"a":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
    let more = [(deep(100), true), (deep(900), true), (format!("{}x", deep(100)), false)];
    let documents = DOCUMENTS.map(|(document, good)| (document.to_owned(), good));
    for (number, (document, good)) in documents.into_iter().chain(more).enumerate() {
        let call = sqlx::query("CALL laelaps_submit(?, 'type', ?, NULL)").bind(format!("sql{number}")).bind(&document);
        assert_eq!(call.execute(&mut producer).await.is_ok(), good, "by SQL: {document}");
        if document.is_empty() {
            continue;
        }
        let submitted = fixture.queue.submit(NewTask::new(format!("crate{number}"), "type", document.clone())).await;
        assert_eq!(submitted.is_ok(), good, "by the crate: {document}");
    }
    let pairs = [
        (r#"{"a":"\ud83d\uDE00\uDBFF\udfff\\ud800"}"#, true),
        (r#"{"a":"\ud83d\ud83d\ude00"}"#, false),
        (r#"{"\uDFFF":1}"#, false),
    ];
    for (number, (document, good)) in pairs.into_iter().enumerate() {
        let call = sqlx::query("CALL laelaps_submit(?, 'type', ?, NULL)").bind(format!("half{number}")).bind(document);
        assert_eq!(call.execute(&mut producer).await.is_ok(), good, "by SQL: {document}");
    }
    fixture.audit().await;
}
