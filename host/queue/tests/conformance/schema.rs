//! The tables: made once, never over somebody else's.

use laelaps_queue::{Error, Migration, SchemaStatus};

use crate::fixture::{Database, Fixture, task};

async fn at_once(database: Database) {
    let fixture = Fixture::empty(database).await;
    assert_eq!(fixture.queue.schema_status().await.unwrap(), SchemaStatus::Missing);
    let inits = (0..8).map(|_| {
        let config = fixture.config.clone();
        tokio::spawn(async move {
            let queue = laelaps_queue::Queue::open(&config).await.unwrap();
            let migration = queue.init().await.unwrap();
            queue.close().await;
            migration
        })
    });
    let mut applied = 0;
    for init in inits.collect::<Vec<_>>() {
        let migration = init.await.unwrap();
        assert_eq!(migration.version, 1);
        applied += migration.applied.len();
    }
    assert_eq!(applied, 1);
    assert_eq!(fixture.queue.schema_status().await.unwrap(), SchemaStatus::Current(1));
    assert_eq!(fixture.queue.init().await.unwrap(), Migration { from: 1, applied: Vec::new(), version: 1 });
    fixture.submit(&[task("a")]).await;
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_that_initialise_an_empty_database_at_once_make_one_schema() {
    at_once(Database::Sqlite).await;
    at_once(Database::Postgres).await;
}

#[tokio::test]
async fn an_empty_database_says_that_it_has_no_tables() {
    without_tables(Database::Sqlite).await;
    without_tables(Database::Postgres).await;
}

async fn without_tables(database: Database) {
    let fixture = Fixture::empty(database).await;
    for refused in [fixture.queue.submit(task("a")).await.unwrap_err(), fixture.queue.get("a").await.unwrap_err()] {
        assert!(matches!(refused, Error::NotInitialised), "{refused}");
        assert_eq!(refused.to_string(), "the database has no Laelaps schema yet");
    }
}

#[tokio::test]
async fn a_database_of_another_program_is_left_alone() {
    let fixture = Fixture::empty(Database::Sqlite).await;
    fixture.meddle("CREATE TABLE task (id INTEGER); CREATE TABLE other (id INTEGER)").await;
    for refused in [fixture.queue.init().await.unwrap_err(), fixture.queue.schema_status().await.unwrap_err()] {
        assert!(
            refused.to_string().ends_with("queue.db: a database of another program (2 tables, none of them ours)"),
            "{refused}"
        );
    }
}

#[tokio::test]
async fn the_plan_can_be_run_instead_of_init() {
    let fixture = Fixture::empty(Database::Sqlite).await;
    let plan = fixture.backend().plan().await.unwrap();
    assert_eq!(plan.iter().map(|step| step.version).collect::<Vec<_>>(), [1]);
    assert!(plan[0].sql.contains("CREATE TABLE task"), "{}", plan[0].sql);
    assert_eq!(fixture.queue.schema_status().await.unwrap(), SchemaStatus::Missing, "a plan changes nothing");
    fixture.meddle(String::leak(plan[0].sql.clone())).await;
    assert_eq!(fixture.backend().plan().await.unwrap(), []);
    assert_eq!(fixture.queue.schema_status().await.unwrap(), SchemaStatus::Current(1), "as run by hand from the plan");
    assert_eq!(fixture.backend().drift().await.unwrap(), [] as [&str; 0]);
    fixture.submit(&[task("a")]).await;
}

#[tokio::test]
async fn drift_names_what_somebody_changed_by_hand() {
    let fixture = Fixture::new(Database::Sqlite).await;
    assert_eq!(fixture.backend().drift().await.unwrap(), [] as [&str; 0]);
    fixture.meddle("DROP INDEX task_failed; ALTER TABLE host ADD COLUMN rack TEXT; CREATE TABLE notes (text TEXT)").await;
    let mut drift = fixture.backend().drift().await.unwrap();
    drift.sort();
    assert_eq!(drift, ["index task_failed is missing", "table host is not as init makes it", "table notes is not ours"]);
}

#[tokio::test]
async fn a_schema_of_another_program_is_left_alone() {
    let fixture = Fixture::empty(Database::Postgres).await;
    fixture.meddle("CREATE TABLE public.task (id int)").await;
    assert_eq!(fixture.queue.schema_status().await.unwrap(), SchemaStatus::Missing, "what is elsewhere is in nobody's way");
    fixture.meddle("CREATE SCHEMA laelaps; CREATE TABLE laelaps.task (id int); CREATE TABLE laelaps.other (id int)").await;
    for refused in [fixture.queue.init().await.unwrap_err(), fixture.queue.schema_status().await.unwrap_err()] {
        assert!(
            refused.to_string().ends_with(": the schema laelaps is of something else (2 tables, none of them ours)"),
            "{refused}"
        );
    }
}

#[tokio::test]
async fn the_plan_for_a_server_is_what_init_then_does() {
    let fixture = Fixture::empty(Database::Postgres).await;
    let plan = fixture.backend().plan().await.unwrap();
    assert_eq!(plan.iter().map(|step| step.version).collect::<Vec<_>>(), [1]);
    assert_eq!(fixture.queue.schema_status().await.unwrap(), SchemaStatus::Missing, "a plan changes nothing");
    let mut operator = crate::fixture::postgres::raw(&fixture.config).await;
    sqlx::raw_sql(sqlx::AssertSqlSafe(plan[0].sql.clone())).execute(&mut operator).await.unwrap();
    assert_eq!(fixture.backend().plan().await.unwrap(), []);
    assert_eq!(fixture.backend().drift().await.unwrap(), [] as [&str; 0], "as run by hand from the plan");
    fixture.submit(&[task("a")]).await;
}

#[tokio::test]
async fn drift_of_a_server_names_what_somebody_changed_by_hand() {
    let fixture = Fixture::new(Database::Postgres).await;
    assert_eq!(fixture.backend().drift().await.unwrap(), [] as [&str; 0]);
    let changes = "DROP INDEX claim_check_at; ALTER TABLE host ADD COLUMN rack text; CREATE TABLE notes (words text);
        ALTER TABLE task DROP CONSTRAINT task_check";
    fixture.meddle(changes).await;
    let mut drift = fixture.backend().drift().await.unwrap();
    drift.sort();
    let expected = [
        "constraint task_check is missing",
        "index claim_check_at is missing",
        "table host is not as init makes it",
        "table notes is not ours",
    ];
    assert_eq!(drift, expected);
}
