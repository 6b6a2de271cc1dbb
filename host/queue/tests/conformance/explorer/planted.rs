//! The explorer finds what is planted: what the queue left behind before it was mended, put there by triggers, and mends that the gate takes out of
//! the statements on their way to the server.

use super::operation::{Operation, Place};
use super::{Case, Explorer, on_sqlite};
use crate::fixture::{Database, Fixture};

/// A place that stands again once its waiting task was cancelled, as a cancellation left it that had looked before the task was moved.
const ORPHANS: [(Database, &str); 3] = [
    (
        Database::Sqlite,
        "CREATE TRIGGER planted AFTER UPDATE ON task WHEN OLD.state = 'waiting' AND NEW.state = 'cancelled' BEGIN
            INSERT INTO ready (queue, user, turn, task, max_running) VALUES (OLD.queue, OLD.user, OLD.turn, OLD.id, OLD.max_running); END",
    ),
    (
        Database::Postgres,
        "CREATE FUNCTION plant() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO laelaps.ready (turn, task, bytes, max_running, user_name)
                VALUES (OLD.turn, OLD.id, OLD.bytes, OLD.max_running, OLD.user_name); RETURN NULL; END $$;
        CREATE TRIGGER planted AFTER UPDATE ON task FOR EACH ROW WHEN (OLD.state = 'waiting' AND NEW.state = 'cancelled') EXECUTE FUNCTION plant()",
    ),
    (
        Database::MariaDb,
        "CREATE TRIGGER planted AFTER UPDATE ON laelaps_task FOR EACH ROW INSERT INTO laelaps_ready_of_user (user, turn, task, max_running)
            SELECT OLD.user, OLD.turn, OLD.id, OLD.max_running FROM DUAL WHERE OLD.state = 'waiting' AND NEW.state = 'cancelled'",
    ),
];

/// A user's task that is counted twice as it begins to run.
const COUNTED_TWICE: [(Database, &str); 3] = [
    (
        Database::Sqlite,
        "CREATE TRIGGER planted AFTER UPDATE ON task WHEN OLD.state = 'waiting' AND NEW.state = 'running' BEGIN
            UPDATE account SET running = running + 1 WHERE user = NEW.user; END",
    ),
    (
        Database::Postgres,
        "CREATE FUNCTION plant() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO laelaps.account_change (user_name, stopped) VALUES (NEW.user_name, -1); RETURN NULL; END $$;
        CREATE TRIGGER planted AFTER UPDATE ON task FOR EACH ROW WHEN (OLD.state = 'waiting' AND NEW.state = 'running') EXECUTE FUNCTION plant()",
    ),
    (
        Database::MariaDb,
        "CREATE TRIGGER planted AFTER UPDATE ON laelaps_task FOR EACH ROW INSERT INTO laelaps_account_change (user, running)
            SELECT NEW.user, 1 FROM DUAL WHERE OLD.state = 'waiting' AND NEW.state = 'running'",
    ),
];

fn case(operations: [Operation; 2], place: Place) -> Case {
    Case { operations, place, with_user: true }
}

/// What goes wrong with one case, on one database, with and without something planted.
async fn wrong(database: Database, case: Case, plant: &'static str) -> [Vec<String>; 2] {
    if matches!(database, Database::Sqlite) {
        let healthy = on_sqlite::explore(std::iter::once(case), None).await.1;
        return [healthy, on_sqlite::explore(std::iter::once(case), Some(plant)).await.1];
    }
    let mut explorer = Explorer::begin(Fixture::new(database).await, database).await;
    explorer.case(case, usize::MAX).await;
    let healthy = std::mem::take(&mut explorer.wrong);
    explorer.arena.fixture.meddle(plant).await;
    explorer.case(case, usize::MAX).await;
    explorer.arena.close().await;
    [healthy, explorer.wrong]
}

/// What is planted is named by the audit, on every database, and without it nothing is.
async fn is_found(planted: [(Database, &'static str); 3], case: Case, words: [&str; 2]) {
    for (database, plant) in planted {
        let [healthy, wrong] = wrong(database, case, plant).await;
        assert!(healthy.is_empty(), "{database:?}: {healthy:#?}");
        assert!(!wrong.is_empty(), "{database:?}: nothing is found");
        assert!(wrong.iter().all(|wrong| words.iter().all(|word| wrong.contains(word))), "{database:?}: {wrong:#?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_without_its_task_is_found() {
    is_found(ORPHANS, case([Operation::Cancel, Operation::Submit], Place::Ready), ["exactly one place", "Cancel"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_account_that_counts_too_high_is_found() {
    is_found(COUNTED_TWICE, case([Operation::Claim, Operation::Submit], Place::Ready), ["account", "count"]).await;
}

/// Whoever moves what is due holds its row first, and a claim leases only what waits. Without both a cancellation between the looks leaves a task that
/// is cancelled and runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancellation_against_a_task_becoming_due_is_found_on_mariadb_without_its_mends() {
    const MENDS: [(&str, &str); 2] = [
        (
            "SELECT t.id, t.state = 'waiting', t.run_at, t.user, t.max_running, t.alone, t.priority, t.queue, t.type FROM",
            "FOR UPDATE SKIP LOCKED",
        ),
        ("SET t.state = 'running', t.lease = ? + s.place", "t.state = 'waiting' AND"),
    ];
    let mut explorer = Explorer::begin(Fixture::new(Database::MariaDb).await, Database::MariaDb).await;
    for gate in explorer.arena.gates() {
        for (statement, clause) in MENDS {
            gate.take_out(statement, clause);
        }
    }
    explorer.case(case([Operation::Cancel, Operation::Claim], Place::Due), usize::MAX).await;
    assert!(explorer.wrong.iter().any(|wrong| wrong.contains("ended otherwise than finished is noted")), "{:#?}", explorer.wrong);
    explorer.arena.close().await;
}

/// A place without its task, and a claim that does not ask whether what it takes waits: the row breaks a rule of the table, and nobody claims.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_an_orphan_stops_is_found_on_postgres_without_its_mend() {
    const MEND: (&str, &str) = ("WHERE id = ANY($4::int8[]) AND state = 'waiting' AND alone = $11", "state = 'waiting' AND");
    let mut explorer = Explorer::begin(Fixture::new(Database::Postgres).await, Database::Postgres).await;
    explorer.arena.gates().for_each(|gate| gate.take_out(MEND.0, MEND.1));
    explorer.arena.fixture.meddle(ORPHANS[1].1).await;
    explorer.case(case([Operation::Cancel, Operation::ClaimOldest], Place::Ready), usize::MAX).await;
    assert!(explorer.wrong.iter().any(|wrong| wrong.contains("task_check")), "{:#?}", explorer.wrong);
    explorer.arena.close().await;
}
