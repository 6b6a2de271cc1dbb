//! Rows that others write into an SQLite file: none of them stops anybody, and each is named, shown and removable by its number.

use std::time::Duration;

use laelaps_queue::{Accepts, Claim, ClaimedTask, Error, Filter, HostId, NewTask, State, Submitted, Task, TaskId};
use sqlx::Connection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};

use crate::fixture::{Database, Fixture, LONG, finish, keys, settled, task, task_of};

async fn raw(fixture: &Fixture) -> SqliteConnection {
    SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(fixture.path())).await.unwrap()
}

/// A row of the table `task` as it is, waiting and ready, with what belongs to it; what `columns` names has the value that `values` has.
async fn hostile(fixture: &Fixture, key: &str, columns: &str, values: &str) -> TaskId {
    let mut connection = raw(fixture).await;
    let columns = if columns.is_empty() { String::new() } else { format!(", {columns}") };
    let values = if values.is_empty() { String::new() } else { format!(", {values}") };
    let sql =
        format!("INSERT INTO task (key, type, created_at, run_at{columns}) VALUES ({key}, 'type', 1, 1{values}) RETURNING id");
    let id: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&mut connection).await.unwrap();
    let sql = format!(
        "INSERT INTO task_data (task, bytes, data) VALUES ({id}, 2, '{{}}');
        INSERT INTO ready (queue, user, turn, task, max_running) SELECT queue, user, turn, id, max_running FROM task WHERE id = {id};
        INSERT INTO account (queue, user) SELECT queue, user FROM task WHERE id = {id} ON CONFLICT DO NOTHING;
        UPDATE account SET ready = ready + 1, (head_turn, head_task, head_max) = (SELECT turn, task, max_running FROM ready
            WHERE ready.queue = account.queue AND ready.user = account.user ORDER BY turn, task LIMIT 1)
            WHERE (queue, user) = (SELECT queue, user FROM task WHERE id = {id});
        INSERT INTO tally SELECT 'type', queue, type, 1 FROM task WHERE id = {id} ON CONFLICT DO UPDATE SET tasks = tasks + 1;"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    TaskId(id)
}

async fn by_id(fixture: &Fixture, id: TaskId) -> Task {
    fixture.backend().get_by_id(id).await.unwrap().expect("the task is there")
}

/// Everything that is done all day long goes on, and nothing stands in its way.
async fn everything_works(fixture: &Fixture) {
    let host = fixture.host().await;
    fixture.submit(&[task("good"), task_of("u", "good of u", Some(1))]).await;
    for ignore_users in [false, true] {
        let claim = Claim { alone: true, ignore_users, ..Claim::new(host, 50, LONG) };
        let claimed: Vec<ClaimedTask> = fixture.backend().claim(&claim).await.unwrap().tasks;
        let group: Vec<_> = claimed.iter().map(|task| settled(task, finish())).collect();
        fixture.backend().settle(&group).await.unwrap();
    }
    assert_eq!((fixture.state("good").await, fixture.state("good of u").await), (State::Finished, State::Finished));
    fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
    fixture.backend().clean_up(100).await.unwrap();
    fixture.queue.stats().await.unwrap();
    fixture.backend().hosts().await.unwrap();
    for with_data in [false, true] {
        for states in [vec![], State::ALL.to_vec(), vec![State::Waiting, State::Failed]] {
            fixture.queue.list(&Filter { limit: 100, with_data, states, ..Filter::default() }).await.unwrap();
        }
    }
    fixture.backend().held("").await.unwrap();
    fixture.backend().has_unsettled("").await.unwrap();
}

/// A task of this row is set aside with these words, and gone when it is cancelled by its number.
async fn set_aside(key: &str, columns: &str, values: &str, words: &str) {
    let fixture = Fixture::new(Database::Sqlite).await;
    fixture.submit(&[task("before")]).await;
    let id = hostile(&fixture, key, columns, values).await;
    everything_works(&fixture).await;
    let aside = by_id(&fixture, id).await;
    assert_eq!((aside.state, aside.error_code.as_deref()), (State::Failed, Some("unreadable")), "{words}");
    let said = aside.unreadable.unwrap_or_default();
    assert!(said.contains(words), "{words}: {said}");
    let message = aside.error_message.unwrap_or_default();
    assert!(message.contains(words) && message.contains(&format!("laelaps cancel --id {}", id.0)), "{words}: {message}");
    let found = fixture.backend().audit().await.unwrap();
    assert!(found.iter().all(|found| found.contains(&format!("task {}", id.0))) && !found.is_empty(), "{words}: {found:?}");
    let refused = fixture.backend().retry_by_id(id).await.unwrap_err();
    assert!(matches!(refused, Error::WrongState { .. }), "{refused}");
    fixture.backend().cancel_by_id(id, Duration::ZERO).await.unwrap();
    assert!(fixture.backend().get_by_id(id).await.unwrap().is_none());
    fixture.audit().await;
}

#[tokio::test]
async fn names_that_are_no_text_are_set_aside() {
    set_aside("CAST(x'6d2dfc' AS TEXT)", "", "", "the key is not UTF-8").await;
    set_aside("'type'", "user", "CAST(x'75ff' AS TEXT)", "the user is not UTF-8").await;
    set_aside(
        "CAST(x'c080' AS TEXT)",
        "user, max_running",
        "CAST(x'eda080' AS TEXT), 1",
        "the key is not UTF-8; the user is not UTF-8",
    )
    .await;
}

#[tokio::test]
async fn a_type_that_is_no_text_is_set_aside() {
    let fixture = Fixture::new(Database::Sqlite).await;
    fixture.submit(&[task("a"), task("b")]).await;
    fixture
        .meddle(
            "UPDATE tally SET tasks = 1; INSERT INTO tally VALUES ('type', '', CAST(x'74ff' AS TEXT), 1);
        UPDATE task SET type = CAST(x'74ff' AS TEXT) WHERE key = 'a'",
        )
        .await;
    everything_works(&fixture).await;
    let aside = fixture.get("a").await;
    assert_eq!(
        (aside.state, aside.task_type.as_str(), aside.error_code.as_deref()),
        (State::Failed, "t\u{fffd}", Some("unreadable"))
    );
    assert_eq!(fixture.state("b").await, State::Finished);
    fixture.queue.cancel("a").await.unwrap();
    fixture.audit().await;
}

#[tokio::test]
async fn counts_beyond_their_range_are_set_aside() {
    for column in ["attempts", "max_attempts", "releases", "lost_alone", "max_running", "depth"] {
        set_aside("'key'", column, "-1", "is -1; 0 to 4294967295 can be").await;
        set_aside("'key'", column, "4294967296", "is 4294967296; 0 to 4294967295 can be").await;
    }
    set_aside("'key'", "user, max_running", "'u', -9223372036854775808", "the max_running is -9223372036854775808").await;
    set_aside("'key'", "lost, lost_at", "9223372036854775807, 1", "the lost is 9223372036854775807").await;
}

#[tokio::test]
async fn a_hostile_row_that_is_due_later_or_alone_is_set_aside_when_its_time_has_come() {
    let fixture = Fixture::new(Database::Sqlite).await;
    let later = hostile(&fixture, "'later'", "user", "CAST(x'75ff' AS TEXT)").await;
    let alone = hostile(&fixture, "CAST(x'616cff' AS TEXT)", "lost, lost_at, alone", "2, 1, 1").await;
    fixture
        .meddle(
            "DELETE FROM ready; DELETE FROM account; INSERT INTO scheduled SELECT run_at, id FROM task WHERE NOT alone;
            INSERT INTO suspect (turn, task) SELECT turn, id FROM task WHERE alone",
        )
        .await;
    everything_works(&fixture).await;
    let host = fixture.host().await;
    let claim = Claim { alone: true, ..Claim::new(host, 5, LONG) };
    assert!(!fixture.backend().claim(&claim).await.unwrap().alone_waiting);
    for id in [later, alone] {
        assert_eq!(by_id(&fixture, id).await.state, State::Failed, "{id:?}");
        fixture.backend().cancel_by_id(id, Duration::ZERO).await.unwrap();
    }
    fixture.audit().await;
}

#[tokio::test]
async fn data_of_any_sort_stops_nobody() {
    let fixture = Fixture::new(Database::Sqlite).await;
    fixture
        .submit(&["integer", "real", "huge", "sizes", "sizes2", "orphan", "no pieces", "torn", "huge pieces", "whole"].map(task))
        .await;
    fixture
        .meddle(
            "UPDATE task_data SET data = 7 WHERE task = (SELECT id FROM task WHERE key = 'integer');
            UPDATE task_data SET data = 1.5 WHERE task = (SELECT id FROM task WHERE key = 'real');
            UPDATE task_data SET data = zeroblob(18000000) WHERE task = (SELECT id FROM task WHERE key = 'huge');
            UPDATE task_data SET bytes = 9223372036854775807 WHERE task IN (SELECT id FROM task WHERE key LIKE 'sizes%');
            INSERT INTO task_data (task, bytes, data) VALUES ((SELECT max(id) + 1 FROM task), -3, 'not its own');
            UPDATE task_data SET data = NULL, pieces = task WHERE task IN
                (SELECT id FROM task WHERE key IN ('no pieces', 'torn', 'huge pieces', 'whole'));
            INSERT INTO task_data_piece SELECT 99, id, 1, CAST('\"}' AS BLOB) FROM task WHERE key = 'torn';
            INSERT INTO task_data_piece SELECT task.id, task.id, json_each.value, zeroblob(4500000) FROM task, json_each('[1, 2, 3, 4]') WHERE task.key = 'huge pieces';
            INSERT INTO task_data_piece SELECT id, id, 9, CAST('}' AS BLOB) FROM task WHERE key = 'whole';
            INSERT INTO task_data_piece SELECT id, id, 8, CAST('{' AS BLOB) FROM task WHERE key = 'whole';",
        )
        .await;
    everything_works(&fixture).await;
    for key in ["integer", "real", "huge", "no pieces", "huge pieces"] {
        let aside = fixture.get(key).await;
        assert_eq!((aside.state, aside.error_code.as_deref()), (State::Failed, Some("damaged-data")), "{key}");
        assert!(aside.unreadable.is_some(), "{key}");
        fixture.backend().cancel_by_id(aside.id, Duration::ZERO).await.unwrap();
        assert!(!fixture.queue.exists(key).await.unwrap());
    }
    assert_eq!(fixture.get("torn").await.error_code.as_deref(), Some("damaged-data"));
    for key in ["sizes", "sizes2", "orphan", "good", "whole"] {
        assert_eq!(fixture.state(key).await, State::Finished, "{key}");
    }
}

#[tokio::test]
async fn places_that_contradict_their_tasks_are_removed_and_nothing_runs_twice() {
    let fixture = Fixture::new(Database::Sqlite).await;
    let host = fixture.host().await;
    fixture.submit(&[task_of("u", "running", Some(1))]).await;
    let running = fixture.claim(host, 1).await;
    fixture.submit(&["done", "twice", "moved", "nowhere", "strange", "astray"].map(|key| task_of("u", key, Some(1)))).await;
    fixture.queue.cancel("done").await.unwrap();
    // Of no task; of one that runs; of one that has ended; two places of one; another moment; another user; another queue; due and ready at once; apart and of no task, running, or ready as well.
    fixture
        .meddle(
            "INSERT INTO ready VALUES ('', 'u', 0, 99, NULL), ('', '', 0, 98, NULL);
            INSERT INTO ready SELECT '', 'u', 0, id, NULL FROM task WHERE key IN ('running', 'done');
            INSERT INTO scheduled SELECT 0, id FROM task WHERE key IN ('running', 'twice');
            INSERT INTO suspect (turn, task) SELECT 0, id FROM task WHERE key IN ('done', 'twice');
            UPDATE ready SET turn = 3 WHERE task = (SELECT id FROM task WHERE key = 'moved');
            INSERT INTO unserved VALUES ('', 'type', '', 0, 97), ('', 'type', 'u', 0, 97), ('no', CAST(x'ff' AS TEXT), 'u', 0, 97), ('', 'no', CAST(x'fe' AS TEXT), 0, 97);
            INSERT INTO unserved SELECT '', 'type', 'u', turn, id FROM task WHERE key IN ('running', 'done', 'twice');
            INSERT INTO unserved SELECT '', 'other', 'v', 0, id FROM task WHERE key IN ('twice', 'strange');
            INSERT INTO ready SELECT '', 'other', 1, id, NULL FROM task WHERE key = 'strange';
            INSERT INTO account (queue, user, ready, head_turn, head_task) SELECT '', 'other', 1, 1, id FROM task WHERE key = 'strange';
            UPDATE ready SET queue = 'mail' WHERE task = (SELECT id FROM task WHERE key = 'astray');
            INSERT INTO account (queue, user, ready, head_turn, head_task) SELECT 'mail', 'u', 1, turn, id FROM task WHERE key = 'astray';
            UPDATE account SET ready = 20, (head_turn, head_task, head_max) = (0, 99, NULL) WHERE user = 'u';",
        )
        .await;
    for _ in 0..4 {
        // Made anew, so that each looks for what was put apart by hand.
        let accepts = Some(Accepts::new(|_| true));
        let claim = Claim { alone: true, accepts, ..Claim::new(host, 50, LONG) };
        let claimed = fixture.backend().claim(&claim).await.unwrap().tasks;
        assert!(claimed.iter().all(|task| task.key != "running"), "{claimed:?}");
        fixture.backend().settle(&claimed.iter().map(|task| settled(task, finish())).collect::<Vec<_>>()).await.unwrap();
    }
    // What ran all the time kept its user's limit, and is still its worker's.
    let answers = fixture.backend().settle(&[settled(&running[0], finish())]).await.unwrap();
    assert_eq!(answers, [laelaps_queue::LeaseAnswer::Held]);
    for _ in 0..8 {
        everything_left(&fixture, host).await;
    }
    for key in ["running", "twice", "moved", "nowhere", "strange", "astray"] {
        assert_eq!(fixture.state(key).await, State::Finished, "{key}");
    }
    assert_eq!(fixture.state("done").await, State::Cancelled);
    // A place of a user without account is not even met, until clean-up has found it.
    fixture.backend().clean_up(100).await.unwrap();
    everything_left(&fixture, host).await;
    fixture.audit().await;
}

async fn everything_left(fixture: &Fixture, host: HostId) {
    let claim = Claim { alone: true, ..Claim::new(host, 50, LONG) };
    let claimed = fixture.backend().claim(&claim).await.unwrap().tasks;
    fixture.backend().settle(&claimed.iter().map(|task| settled(task, finish())).collect::<Vec<_>>()).await.unwrap();
}

#[tokio::test]
async fn queues_that_no_queue_can_be_are_set_aside() {
    set_aside("'a'", "queue", "'two words'", "the queue's name contains ' '").await;
    set_aside("'a'", "queue, user", "'default', 'u'", "in the tables the default queue is ''").await;
    set_aside("'a'", "queue", "CAST(x'6dff' AS TEXT)", "the queue is not UTF-8").await;
    set_aside("'a'", "queue, user", "printf('%.*c', 65, 'x'), 'u'", "the queue's name has 65 bytes").await;
}

#[tokio::test]
async fn clean_up_repairs_accounts_from_what_is_ready_and_what_runs() {
    let fixture = Fixture::new(Database::Sqlite).await;
    let host = fixture.host().await;
    fixture
        .submit(&[task_of("u", "a", Some(1)), task_of("v", "b", Some(1)), task_of("w", "c", Some(1)), task_of("x", "d", Some(2))])
        .await;
    assert_eq!(fixture.claim(host, 9).await.len(), 4);
    fixture.submit(&[task_of("u", "e", Some(1)), task_of("v", "f", Some(1)), task_of("x", "g", Some(2))]).await;
    fixture.queue.cancel("a").await.unwrap();
    fixture
        .meddle(
            "UPDATE account SET running = 1 WHERE user = 'u'; UPDATE account SET running = 0, ready = 7 WHERE user = 'v';
            DELETE FROM account WHERE user IN ('w', 'x'); INSERT INTO account (queue, user, ready) VALUES ('', 'nobody', 3);",
        )
        .await;
    assert!(keys(&fixture.claim(host, 9).await).iter().all(|key| *key == "f"), "the user v runs one too many by now");
    fixture.backend().clean_up(100).await.unwrap();
    fixture.audit().await;
    let mut claimed = fixture.claim(host, 9).await;
    claimed.sort_by(|one, other| one.key.cmp(&other.key));
    assert_eq!(keys(&claimed), ["e", "g"]);
}

#[tokio::test]
async fn what_is_written_beside_tasks_stops_nobody() {
    let fixture = Fixture::new(Database::Sqlite).await;
    fixture.submit(&[task("a"), task("b")]).await;
    fixture
        .meddle(
            "INSERT INTO retention (until, tasks) VALUES (1, 'oops'), (1, CAST(x'ff' AS TEXT)), (1, '[1, \"x\"]');
            INSERT INTO host (name, process_id, started_at, identity) VALUES (CAST(x'ff' AS TEXT), -5, 1, CAST(x'fe' AS TEXT));
            INSERT INTO tally VALUES ('type', '', CAST(x'ff' AS TEXT), 9223372036854775807);
            INSERT INTO account (queue, user, ready, running) VALUES
                ('', CAST(x'fe' AS TEXT), 9223372036854775807, 9223372036854775807), ('', 'z', 9223372036854775807, 5);
            INSERT INTO attempt (task, lease, attempt, ended_at, event) VALUES (1, 1, -5, 0, CAST(x'ff' AS TEXT));
            INSERT INTO failure VALUES (1, CAST(x'ff' AS TEXT), CAST(x'ff' AS TEXT));
            INSERT INTO task (key, type, state, until, host, created_at, run_at) VALUES ('ghost', 'type', 'running', 1, NULL, 1, 1),
                ('spook', 'type', 'running', 1, 77, 1, 1), (CAST(x'ff' AS TEXT), 'type', 'running', 1, 77, 1, 1);",
        )
        .await;
    everything_works(&fixture).await;
    fixture.queue.attempts("a").await.unwrap();
    assert_eq!(
        (fixture.state("ghost").await, fixture.state("spook").await),
        (State::Waiting, State::Waiting),
        "their leases had run out"
    );
    assert_eq!((fixture.state("a").await, fixture.state("b").await), (State::Finished, State::Finished));
}

#[tokio::test]
async fn a_counter_that_is_gone_is_made_anew_above_every_lease() {
    let fixture = Fixture::new(Database::Sqlite).await;
    let host = fixture.host().await;
    fixture.submit_some("a", 5).await;
    let before = fixture.claim(host, 4).await;
    fixture.backend().settle(&[settled(&before[3], laelaps_queue::Event::Retry { delay: Some(LONG) })]).await.unwrap();
    fixture.meddle("DELETE FROM counter").await;
    assert_eq!(fixture.backend().audit().await.unwrap(), ["no lease can be given out: counter is empty"]);
    fixture.submit(&[task_of("new", "b", Some(1))]).await;
    fixture.meddle("INSERT INTO submit (key, type, options) VALUES ('c', 'type', '{\"user\":\"newer\"}')").await;
    let after = fixture.claim(host, 9).await;
    assert_eq!(after.len(), 3);
    let last = before.iter().map(|task| task.lease_ref.lease).max();
    assert!(after.iter().all(|task| Some(task.lease_ref.lease) > last), "{after:?}");
    everything_works(&fixture).await;
    fixture.audit().await;
}

#[tokio::test]
async fn no_row_uses_the_numbers_up() {
    let fixture = Fixture::new(Database::Sqlite).await;
    let mut connection = raw(&fixture).await;
    let last = "INSERT INTO task (id, key, type, created_at, run_at) VALUES (9223372036854775807, 'last', 'type', 1, 1)";
    let refused = sqlx::raw_sql(last).execute(&mut connection).await.unwrap_err();
    assert!(refused.to_string().contains("CHECK constraint failed"), "{refused}");
    everything_works(&fixture).await;
    fixture.audit().await;
}

#[tokio::test]
async fn a_task_has_a_number() {
    let fixture = Fixture::new(Database::Sqlite).await;
    fixture.submit(&[task("a")]).await;
    let id = fixture.get("a").await.id;
    assert_eq!(by_id(&fixture, id).await.key, "a");
    assert_eq!(by_id(&fixture, id).await.data, fixture.get("a").await.data);
    fixture.backend().cancel_by_id(id, LONG).await.unwrap();
    assert_eq!(fixture.state("a").await, State::Cancelled);
    assert!(matches!(fixture.backend().cancel_by_id(id, LONG).await, Err(Error::AlreadyEnded { .. })));
    fixture.backend().retry_by_id(id).await.unwrap();
    assert_eq!(fixture.state("a").await, State::Waiting);
    let nobody = TaskId(99);
    assert!(fixture.backend().get_by_id(nobody).await.unwrap().is_none());
    for refused in [fixture.backend().cancel_by_id(nobody, LONG).await, fixture.backend().retry_by_id(nobody).await] {
        assert!(matches!(refused, Err(Error::NoSuchId(id)) if id == nobody));
    }
    fixture.audit().await;
}

#[tokio::test]
async fn the_audit_names_what_contradicts() {
    let cases: [(&'static str, &str); 20] = [
        (
            "DELETE FROM ready WHERE task = 1",
            "a waiting task must wait in exactly one place, any other in none: task 1 is waiting and stands in 0",
        ),
        ("UPDATE ready SET max_running = 5 WHERE task = 1", "ready does not fit its task: task 1"),
        ("INSERT INTO scheduled VALUES (5, 77)", "scheduled does not fit its task: task 77"),
        ("INSERT INTO suspect (turn, task) VALUES (5, 77)", "suspect does not fit its task: task 77"),
        ("INSERT INTO unserved VALUES ('', 'type', '', 5, 77)", "unserved does not fit its task: task 77"),
        (
            "UPDATE account SET running = 7 WHERE user = 'u'",
            "the account does not count what is ready and what runs: user u: 1 ready and 7 running, 1 and 0 found",
        ),
        ("UPDATE account SET head_turn = 7 WHERE user = 'u'", "the account does not know its first ready task: user u"),
        ("INSERT INTO account (queue, user) VALUES ('', 'idle')", "an idle user has an account: user idle"),
        ("UPDATE tally SET tasks = 9 WHERE what = 'type'", "types are counted wrongly: type type"),
        ("UPDATE tally SET tasks = 9 WHERE what = 'ended'", "ended tasks are counted wrongly: cancelled"),
        ("DELETE FROM retention", "nothing will remove the ended task: task 2"),
        ("INSERT INTO retention (until, tasks) VALUES (5, '[')", "a row of retention cannot be read: row 2"),
        ("INSERT INTO failure VALUES (77, '', '')", "something stands beside a task that is gone: failure of task 77"),
        ("DELETE FROM task_data WHERE task = 1", "a task has no data: task 1"),
        ("UPDATE task_data SET data = 5 WHERE task = 1", "the data is not as it is stored: task 1"),
        ("UPDATE task_data SET data = NULL, pieces = 5 WHERE task = 1", "the data is not as it is stored: task 1"),
        (
            "INSERT INTO task_data_piece VALUES (77, 1, 1, x'')",
            "something stands beside a task that is gone: task_data_piece of task 77",
        ),
        (
            "UPDATE task SET lease = 5 WHERE id = 1",
            "a lease is newer than the last one given out, or was given out twice: task 1",
        ),
        ("UPDATE task SET root = 1 WHERE id = 1", "a follow-up counts for its root until it ends, and nothing else does: task 1"),
        (
            "INSERT INTO host_running VALUES (5, 9)",
            "something names a plugin version that is not known: host_running names version 9",
        ),
    ];
    for (sql, expected) in cases {
        let fixture = Fixture::new(Database::Sqlite).await;
        fixture.submit(&[task_of("u", "a", None), task("b")]).await;
        fixture.queue.cancel("b").await.unwrap();
        fixture.audit().await;
        fixture.meddle(sql).await;
        let found = fixture.backend().audit().await.unwrap();
        assert!(found.iter().any(|found| found == expected), "{sql}: {found:#?}");
    }
}

#[tokio::test]
async fn a_key_is_free_when_its_retention_has_ended() {
    let fixture = Fixture::new(Database::Sqlite).await;
    let host = fixture.host().await;
    fixture.submit(&[task("a"), task("b"), task("c")]).await;
    let over = laelaps_queue::Event::Finish { output: Some(b"old".to_vec()), retention: Some(Duration::ZERO) };
    let group: Vec<_> = fixture.claim(host, 3).await.iter().map(|task| settled(task, over.clone())).collect();
    fixture.backend().settle(&group).await.unwrap();
    let old = fixture.get("a").await;
    fixture.passes(old.retained_until.unwrap()).await;
    // Nobody has claimed or cleaned up since.
    assert_eq!(
        fixture.queue.submit_many(&[task("a"), task("x"), task("a")]).await.unwrap(),
        [Submitted::Created, Submitted::Created, Submitted::AlreadyExists]
    );
    fixture.meddle("INSERT INTO submit (key, type, data) VALUES ('b', 'new', '{\"new\":1}'), ('b', 'newer', NULL)").await;
    let (a, b) = (fixture.get("a").await, fixture.get("b").await);
    assert_eq!((a.state, a.output, b.state, b.output), (State::Waiting, None, State::Waiting, None));
    assert_eq!((b.task_type.as_str(), b.data.as_deref()), ("new", Some(&b"{\"new\":1}"[..])));
    assert!(a.id > old.id && b.id > old.id, "a number is never given twice");
    fixture.audit().await;
    assert_eq!(fixture.backend().clean_up(10).await.unwrap(), 1, "the third");
    fixture.audit().await;
    assert_eq!(fixture.claim(host, 9).await.len(), 3);
    assert_eq!(fixture.queue.submit(NewTask { run_at: None, ..task("a") }).await.unwrap(), Submitted::AlreadyExists);
}
