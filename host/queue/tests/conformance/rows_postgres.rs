//! Rows on PostgreSQL that no operation of ours leaves: none of them stops anybody but its own task.

use laelaps_queue::{Accepts, Claim, ClaimedTask, Event, Filter, HostId, LeaseAnswer, NewTask, State, Task, Timestamp};

use crate::fixture::{Database, Fixture, LONG, finish, keys, settled, task, task_of};

async fn fixture() -> Fixture {
    Fixture::new(Database::Postgres).await
}

fn asking(host: HostId, ignore_users: bool) -> Claim {
    Claim { ignore_users, ..Claim::new(host, 50, LONG) }
}

/// Claim all there is, and finish it; answers the keys.
async fn worked_off(fixture: &Fixture, host: HostId) -> Vec<String> {
    let mut done = Vec::new();
    loop {
        let tasks = fixture.backend().claim(&asking(host, false)).await.unwrap().tasks;
        if tasks.is_empty() {
            done.sort_unstable();
            return done;
        }
        let group: Vec<_> = tasks.iter().map(|task| settled(task, finish())).collect();
        let answers = fixture.backend().settle(&group).await.unwrap();
        assert!(answers.iter().all(|answer| *answer == LeaseAnswer::Held), "{answers:?}");
        done.extend(keys(&tasks).into_iter().map(str::to_owned));
    }
}

async fn by_key(fixture: &Fixture) -> Vec<Task> {
    let filter = Filter { limit: 100, with_data: true, ..Filter::default() };
    let mut tasks = fixture.queue.list(&filter).await.unwrap().tasks;
    tasks.sort_by(|one, other| one.key.cmp(&other.key));
    tasks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_cannot_be_read_is_set_aside_and_stops_nobody() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    const BROKEN: [&str; 8] = ["1 attempts", "2 running", "3 most", "4 bytes", "5 type", "6 user", "7 lost", "8 releases"];
    let users = |key: &&str| task_of("u", key, Some(9));
    let mut tasks: Vec<NewTask> = BROKEN.iter().map(users).collect();
    tasks.extend([task("good"), task_of("u", "good too", Some(9)), task("0 nobody's")]);
    fixture.submit(&tasks).await;
    fixture
        .meddle(
            "UPDATE task SET attempts = -1 WHERE key = '1 attempts'; UPDATE task SET max_running = -5 WHERE key = '2 running';
            UPDATE task SET max_attempts = 0 WHERE key = '3 most'; UPDATE task SET bytes = -7 WHERE key = '4 bytes';
            UPDATE task SET type = '' WHERE key = '5 type'; UPDATE task SET user_name = E'u\\u0007' WHERE key = '6 user';
            UPDATE task SET lost = -3 WHERE key = '7 lost'; UPDATE task SET releases = -1 WHERE key = '8 releases';
            UPDATE task SET max_attempts = 99999999999, key = E'0\\n' WHERE key = '0 nobody''s';
            UPDATE ready SET user_name = E'u\\u0007' WHERE task = (SELECT id FROM task WHERE key = '6 user')",
        )
        .await;
    // The account of a user that somebody renamed is mended by clean-up.
    fixture.backend().clean_up(100).await.unwrap();
    assert_eq!(worked_off(&fixture, host).await, ["good", "good too"]);
    let listed = by_key(&fixture).await;
    assert_eq!(listed.len(), 11);
    for task in listed.iter().filter(|task| !task.key.starts_with("good")) {
        assert_eq!((task.state, task.error_code.as_deref()), (State::Failed, Some("unreadable")), "{}", task.key);
        let id = task.id;
        let words = task.error_message.as_deref().unwrap();
        assert!(words.contains(&format!("laelaps show --id {}", id.0)) && words.contains("laelaps cancel --id"), "{words}");
        let shown = fixture.backend().get_by_id(id).await.unwrap().unwrap();
        assert!(shown.unreadable.is_some(), "{}", task.key);
        fixture.backend().cancel_by_id(id, LONG).await.unwrap();
        assert!(fixture.backend().get_by_id(id).await.unwrap().is_none(), "it is gone at once");
    }
    fixture.queue.stats().await.unwrap();
    fixture.backend().clean_up(100).await.unwrap();
    let accounts: Vec<String> = fixture.backend().audit().await.unwrap();
    // Of a type and of places that were altered by hand the counts cannot be right.
    let other: Vec<&String> = accounts.iter().filter(|finding| !finding.contains("counted by type")).collect();
    assert!(other.is_empty(), "{other:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_that_contradicts_its_task_is_mended_or_cleared_away() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    let names = ["ended", "running", "other user", "twice", "twice later", "wrong time", "nobody's", "orphan of u"];
    let mut tasks: Vec<NewTask> = names.iter().map(|key| task_of("u", key, Some(1))).collect();
    tasks.extend([task("plain ended"), task("plain"), task("plain twice")]);
    fixture.submit(&tasks).await;
    fixture.queue.cancel("ended").await.unwrap();
    fixture.queue.cancel("plain ended").await.unwrap();
    fixture
        .meddle(
            "INSERT INTO ready SELECT turn, id, bytes, max_running, user_name FROM task WHERE key IN ('ended', 'plain ended');
            INSERT INTO ready SELECT turn, 0, bytes, max_running, user_name FROM task WHERE key = 'ended';
            INSERT INTO ready SELECT turn - 5, -task.id, bytes, max_running, '' FROM task;
            UPDATE ready SET user_name = 'v' WHERE task = (SELECT id FROM task WHERE key = 'other user');
            UPDATE ready SET user_name = '' WHERE task = (SELECT id FROM task WHERE key = 'nobody''s');
            INSERT INTO ready SELECT turn - 9, id, bytes, max_running, user_name FROM task WHERE key IN ('twice', 'plain twice');
            INSERT INTO scheduled SELECT run_at, id FROM task WHERE key IN ('twice later', 'plain ended');
            INSERT INTO scheduled SELECT 5, 12345678;
            INSERT INTO suspect SELECT turn, id FROM task WHERE key IN ('plain', 'ended');
            UPDATE ready SET turn = turn - 77 WHERE task = (SELECT id FROM task WHERE key = 'wrong time');
            INSERT INTO account_change (user_name, turn, task) SELECT 'v', turn, id FROM task WHERE key = 'other user'",
        )
        .await;
    fixture.backend().clean_up(100).await.unwrap();
    let mut done = worked_off(&fixture, host).await;
    for _ in 0..3 {
        fixture.backend().clean_up(100).await.unwrap();
        done.extend(worked_off(&fixture, host).await);
    }
    done.sort_unstable();
    let expected =
        ["nobody's", "orphan of u", "other user", "plain", "plain twice", "running", "twice", "twice later", "wrong time"];
    assert_eq!(done, expected);
    assert!(!fixture.backend().claim(&asking(host, false)).await.unwrap().alone_waiting, "nothing waits to run alone");
    let findings = fixture.backend().audit().await.unwrap();
    let other: Vec<&String> = findings.iter().filter(|finding| !finding.contains("counted by type")).collect();
    assert!(other.is_empty(), "{other:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_ready_twice_of_nobody_holds_up_no_claim_that_does_not_look_at_users() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    fixture.submit(&[task_of("u", "a", Some(1)), task_of("u", "b", Some(1)), task("c")]).await;
    fixture.queue.cancel("a").await.unwrap();
    fixture.meddle("INSERT INTO ready SELECT turn, id, bytes, max_running, user_name FROM task WHERE key = 'a'").await;
    let claimed = fixture.backend().claim(&asking(host, true)).await.unwrap().tasks;
    assert_eq!(keys(&claimed), ["b", "c"]);
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_wrong_places_before_a_task_do_not_hide_it() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    fixture.submit(&[task("a")]).await;
    fixture.meddle("INSERT INTO ready SELECT turn - n, 1000000 + n, 7, NULL, '' FROM task, generate_series(1, 500) AS n").await;
    assert_eq!(keys(&fixture.claim(host, 50).await), ["a"]);
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_goes_back_where_a_wrong_place_stands_already_is_settled_all_the_same() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    fixture.submit(&[task("a"), task_of("u", "b", Some(1)), task("c")]).await;
    let claimed = fixture.claim(host, 9).await;
    fixture.meddle("INSERT INTO ready SELECT turn, id, bytes, max_running, user_name FROM task").await;
    let group: Vec<_> = claimed.iter().map(|task| settled(task, Event::Stopped)).collect();
    assert_eq!(fixture.backend().settle(&group).await.unwrap(), [LeaseAnswer::Held; 3]);
    assert_eq!(fixture.claim(host, 9).await.len(), 3);
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accounts_that_count_wrong_are_mended_from_the_leases() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    let users = ["few", "many", "right", "unknown", "stale", "idle"];
    let tasks: Vec<NewTask> =
        users.iter().flat_map(|user| (0..3).map(move |number| task_of(user, &format!("{user}{number}"), Some(2)))).collect();
    fixture.submit(&tasks).await;
    let claimed = fixture.claim(host, 50).await;
    assert_eq!(claimed.len(), 12);
    fixture
        .meddle(
            "UPDATE account SET running = 0 WHERE user_name = 'few'; UPDATE account SET running = 7 WHERE user_name = 'many';
            DELETE FROM account WHERE user_name = 'unknown';
            UPDATE account SET head_turn = 1, head_task = 999, head_max = NULL WHERE user_name = 'stale';
            UPDATE account SET head_turn = NULL, head_task = NULL WHERE user_name = 'idle'",
        )
        .await;
    fixture.backend().clean_up(100).await.unwrap();
    fixture.audit().await;
    let group: Vec<_> = claimed.iter().map(|task| settled(task, finish())).collect();
    fixture.backend().settle(&group).await.unwrap();
    assert_eq!(worked_off(&fixture, host).await, ["few2", "idle2", "many2", "right2", "stale2", "unknown2"]);
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counters_at_their_bound_stay_there() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    fixture.submit(&[task("a"), task("b"), task("c"), task("d")]).await;
    fixture.meddle("UPDATE task SET attempts = 2147483647, lost = NULL").await;
    let claimed = fixture.claim(host, 9).await;
    let ends = [finish(), Event::Retry { delay: None }, Event::Stopped];
    let group: Vec<_> = claimed.iter().zip(ends).map(|(task, event)| settled(task, event)).collect();
    // What has finished alone is written by a statement of its own.
    for settlement in group {
        assert_eq!(fixture.backend().settle(&[settlement]).await.unwrap(), [LeaseAnswer::Held]);
    }
    fixture.queue.cancel("d").await.unwrap();
    assert_eq!(fixture.get("a").await.attempts, i32::MAX as u32);
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_view_for_people_shows_every_row() {
    let fixture = fixture().await;
    fixture.submit(&[task("a"), task("b")]).await;
    fixture
        .meddle(
            "UPDATE task SET data = '\\xff00', created_at = 9000000000000000000, run_at = -9000000000000000000 WHERE key = 'a'",
        )
        .await;
    let mut operator = crate::fixture::postgres::raw(&fixture.config).await;
    let shown: Vec<(String, String)> =
        sqlx::query_as("SELECT key, data FROM tasks WHERE created_at IS NULL OR true ORDER BY key")
            .fetch_all(&mut operator)
            .await
            .unwrap();
    assert_eq!(shown, [("a".to_owned(), "(damaged)".to_owned()), ("b".to_owned(), "{\"n\":1}".to_owned())]);
}

fn of(queue: &str, task: NewTask) -> NewTask {
    NewTask { queue: Some(queue.to_owned()), ..task }
}

async fn claimed_of(fixture: &Fixture, host: HostId, queue: &str) -> Vec<String> {
    let claim = Claim { queues: Some([queue.to_owned()].into()), ..asking(host, false) };
    let mut found: Vec<String> = fixture.backend().claim(&claim).await.unwrap().tasks.into_iter().map(|task| task.key).collect();
    found.sort_unstable();
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_in_another_queue_than_its_tasks_is_mended_and_hands_nothing_out_there() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    fixture.submit(&[of("mail", task("a")), of("mail", task_of("u", "b", Some(1))), of("video", task("c")), task("d")]).await;
    fixture
        .meddle(
            "UPDATE ready SET queue = 'video' WHERE task IN (SELECT id FROM task WHERE queue = 'mail');
            UPDATE ready SET queue = 'mail' WHERE task = (SELECT id FROM task WHERE key = 'd');
            INSERT INTO account_change (user_name, queue, turn, task, max_running)
                SELECT user_name, 'video', turn, id, max_running FROM task WHERE key = 'b';
            INSERT INTO ready SELECT turn - 5, id, bytes, max_running, user_name, 'elsewhere' FROM task WHERE key = 'c'",
        )
        .await;
    fixture.backend().clean_up(100).await.unwrap();
    // Whatever a claim meets and does not hand out is where it belongs afterwards.
    let mut found = Vec::new();
    for queue in ["video", "mail", "elsewhere", "default", "mail", "video"] {
        for key in claimed_of(&fixture, host, queue).await {
            found.push((queue, key));
        }
    }
    found.sort_unstable();
    let expected = [("default", "d"), ("mail", "a"), ("mail", "b"), ("video", "c")];
    assert_eq!(found, expected.map(|(queue, key)| (queue, key.to_owned())));
    fixture.backend().clean_up(100).await.unwrap();
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_whose_queue_no_queue_can_be_is_set_aside() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    fixture.submit(&["1", "2", "3"].map(|key| of("mail", task(key)))).await;
    fixture.submit(&[of("mail", task_of("u", "4", Some(1))), of("mail", task("good")), task("good too")]).await;
    fixture
        .meddle(
            "UPDATE task SET queue = 'two words' WHERE key = '1'; UPDATE task SET queue = 'default' WHERE key = '2';
            UPDATE task SET queue = repeat('x', 65) WHERE key = '3'; UPDATE task SET queue = E'\\u00f6' WHERE key = '4';
            UPDATE ready SET queue = task.queue FROM task WHERE task.id = ready.task",
        )
        .await;
    fixture.backend().clean_up(100).await.unwrap();
    assert_eq!(worked_off(&fixture, host).await, ["good", "good too"]);
    let listed = by_key(&fixture).await;
    let words: Vec<&str> = listed.iter().filter_map(|task| task.unreadable.as_deref()).collect();
    assert_eq!(words.len(), 4, "{words:?}");
    assert!(words[0].starts_with("the queue's name contains ' '"), "{words:?}");
    assert!(words[1].starts_with("the queue is \"default\", which stands as '' in the tables"), "{words:?}");
    assert!(words[2].starts_with("the queue's name has 65 bytes"), "{words:?}");
    assert!(words[3].starts_with("the queue's name contains 'ö'"), "{words:?}");
    for task in listed.iter().filter(|task| task.unreadable.is_some()) {
        assert_eq!((task.state, task.error_code.as_deref()), (State::Failed, Some("unreadable")), "{}", task.key);
    }
    fixture.backend().clean_up(100).await.unwrap();
    let findings = fixture.backend().audit().await.unwrap();
    // Of queues that were altered by hand the counts cannot be right.
    let other: Vec<&String> = findings
        .iter()
        .filter(|finding| !finding.contains("counted by type") && !finding.contains("within their ranges"))
        .collect();
    assert!(other.is_empty(), "{other:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_suspect_in_a_wrong_queue_goes_where_its_row_says() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    fixture.submit(&[of("mail", task("a")), of("video", task("b"))]).await;
    fixture
        .meddle(
            "DELETE FROM ready; UPDATE task SET alone = true, lost = 2, lost_at = 1;
            INSERT INTO suspect (turn, task, queue) SELECT turn, id, 'video' FROM task",
        )
        .await;
    let alone = |queue: &str, alone: bool| Claim { alone, queues: Some([queue.to_owned()].into()), ..asking(host, false) };
    let claimed = fixture.backend().claim(&alone("video", true)).await.unwrap().tasks;
    assert_eq!(keys(&claimed), ["b"], "that of another queue is not handed out");
    fixture.backend().settle(&[settled(&claimed[0], finish())]).await.unwrap();
    assert!(!fixture.backend().claim(&alone("video", false)).await.unwrap().alone_waiting);
    assert!(fixture.backend().claim(&alone("mail", false)).await.unwrap().alone_waiting, "it was mended");
    assert!(!fixture.backend().claim(&alone("default", false)).await.unwrap().alone_waiting, "it is of another queue");
    let claimed = fixture.backend().claim(&alone("mail", true)).await.unwrap().tasks;
    assert_eq!(keys(&claimed), ["a"]);
    fixture.audit().await;
}

fn strange(task: NewTask) -> NewTask {
    NewTask { task_type: "strange".to_owned(), ..task }
}

/// What a host is given that does not serve strange tasks, nor what no type can be.
async fn claimed_without_strange(fixture: &Fixture, host: HostId) -> Vec<ClaimedTask> {
    let task_type = task("any").task_type;
    let accepts = Some(Accepts::new(move |name| name == task_type));
    fixture.backend().claim(&Claim { accepts, ..asking(host, false) }).await.unwrap().tasks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_apart_that_contradicts_its_task_stops_nobody_and_goes_with_who_serves_its_type() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    const APART: [&str; 9] =
        ["good", "good too", "other turn", "other user", "other type", "other queue", "twice", "put off", "cancelled"];
    let tasks = APART.iter().map(|key| strange(if *key == "good too" { task(key) } else { task_of("u", key, Some(9)) }));
    fixture.submit(&tasks.collect::<Vec<_>>()).await;
    assert!(claimed_without_strange(&fixture, host).await.is_empty());
    fixture.submit(&[task("running"), task("ended"), task("ready")]).await;
    fixture.queue.cancel("ended").await.unwrap();
    let held = claimed_without_strange(&fixture, host).await;
    assert_eq!(keys(&held), ["running", "ready"]);
    fixture.backend().settle(&[settled(&held[1], Event::Stopped)]).await.unwrap();
    let later =
        NewTask { run_at: Some(Timestamp(fixture.backend().now().await.unwrap().0 + 3_600_000)), ..strange(task("later")) };
    fixture.submit(&[later]).await;
    fixture
        .meddle(
            "UPDATE unserved SET turn = turn - 5 WHERE task IN (SELECT id FROM task WHERE key IN ('other turn', 'cancelled'));
            UPDATE unserved SET user_name = E'v\\u0007' WHERE task = (SELECT id FROM task WHERE key = 'other user');
            UPDATE unserved SET type = '' WHERE task = (SELECT id FROM task WHERE key = 'other type');
            UPDATE unserved SET queue = 'two words' WHERE task = (SELECT id FROM task WHERE key = 'other queue');
            UPDATE task SET run_at = 32503680000000 WHERE key = 'put off';
            INSERT INTO ready SELECT turn, id, bytes, max_running, user_name, 'elsewhere' FROM task WHERE key = 'good too';
            INSERT INTO unserved (turn, task, queue, type, user_name)
                SELECT turn, id, queue, 'strange', user_name FROM task WHERE key IN ('running', 'ended', 'ready', 'later');
            INSERT INTO unserved (turn, task, queue, type, user_name) SELECT turn - 1, id, queue, type, '' FROM task WHERE key = 'twice';
            INSERT INTO unserved (turn, task, queue, type, user_name)
                VALUES (5, 12345678, '', '', ''), (5, 12345678, '', 'strange', 'w'), (-5, -1, 'nowhere', repeat('x', 999), E'\\u0007')",
        )
        .await;
    // Nobody who does not serve them is stopped, and nothing is put where it stands already.
    fixture.submit(&[task("served")]).await;
    let claimed = claimed_without_strange(&fixture, host).await;
    assert_eq!(keys(&claimed), ["ready", "served"]);
    let group: Vec<_> = claimed.iter().map(|task| settled(task, finish())).collect();
    fixture.backend().settle(&group).await.unwrap();
    assert!(claimed_of(&fixture, host, "elsewhere").await.is_empty());
    let ready: i64 = sqlx::query_scalar("SELECT count(*) FROM ready")
        .fetch_one(&mut crate::fixture::postgres::raw(&fixture.config).await)
        .await
        .unwrap();
    assert_eq!(ready, 0);
    fixture.queue.cancel("cancelled").await.unwrap();
    let done = worked_off(&fixture, host).await;
    assert_eq!(done, ["good", "good too", "other queue", "other turn", "other type", "other user", "twice"]);
    assert_eq!(fixture.backend().settle(&[settled(&held[0], finish())]).await.unwrap(), [LeaseAnswer::Held]);
    for key in ["put off", "later"] {
        assert_eq!(fixture.state(key).await, State::Waiting, "{key}");
    }
    let stats = fixture.queue.stats().await.unwrap();
    assert_eq!((stats.scheduled, stats.ready), (2, 0));
    // A place that was right for who settled it may have been left beside a wrong one.
    worked_off(&fixture, host).await;
    fixture.audit().await;
}
