//! Two builds on one database: this one, and one whose schema goes on with steps that the tests give it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use laelaps_queue::{Claim, Config, LeaseAnswer, Migration, PollOptions, Queue, SchemaStatus, SchemaStep, State};
use laelaps_test_databases::{LONG, eventually, later_step};
use tokio::time::timeout;

use crate::fixture::{Database, Fixture, PATIENCE, postgres, task};
use crate::promises;

/// The configuration of a program that knows one step more, after which the database admits programs from `oldest_program` on.
fn later(fixture: &Fixture, oldest_program: i64) -> Config {
    let sql = later_step(&fixture.config.url, 2);
    Config { later_steps: vec![SchemaStep { version: 2, oldest_program, sql: sql.into() }], ..fixture.config.clone() }
}

async fn open(config: &Config) -> Queue {
    Queue::open(config).await.unwrap()
}

/// Work until the queue has finished so many tasks.
async fn work(queue: &Queue, done: &AtomicUsize, total: usize) {
    while done.load(Ordering::SeqCst) < total {
        for mut task in queue.poll_many(&PollOptions { limit: 4, ..PollOptions::default() }).await.unwrap() {
            assert_eq!(task.finish(None, None).await.unwrap(), LeaseAnswer::Held);
            done.fetch_add(1, Ordering::SeqCst);
        }
        tokio::task::yield_now().await;
    }
}

/// Everything that would touch the tables is refused, with these words and this hint.
async fn refused(queue: &Queue, message: &str, hint: &str) {
    let program = env!("CARGO_PKG_VERSION");
    let refusals = [
        queue.init().await.map(drop).unwrap_err(),
        queue.backend().plan().await.map(drop).unwrap_err(),
        queue.poll(&PollOptions::default()).await.map(drop).unwrap_err(),
        queue.schema_status().await.unwrap().fits().map(drop).unwrap_err(),
    ];
    for refused in refusals {
        assert_eq!(refused.to_string().replace(program, "THIS"), message);
        assert_eq!(refused.hint(), Some(hint));
        assert!(!refused.is_retryable() && !refused.passes(), "waiting does not help");
    }
}

promises! {
    async fn a_later_schema_that_admits_this_program_is_shared_with_its_maker(fixture: &Fixture) {
        fixture.submit(&[task("before"), task("meanwhile")]).await;
        let mut held = fixture.queue.poll(&PollOptions::default()).await.unwrap().unwrap();
        let next = open(&later(fixture, 1)).await;
        assert_eq!(next.init().await.unwrap(), Migration { from: 1, applied: vec![2], version: 2 });
        assert_eq!(next.schema_status().await.unwrap(), SchemaStatus::Current(2));

        let program = Some(env!("CARGO_PKG_VERSION").to_owned());
        for queue in [fixture.queue.clone(), fixture.another().await] {
            assert_eq!(
                queue.schema_status().await.unwrap(),
                SchemaStatus::Newer { found: 2, known: 1, program: program.clone() }
            );
            assert_eq!(queue.init().await.unwrap(), Migration { from: 2, applied: vec![], version: 2 });
            assert_eq!(queue.backend().plan().await.unwrap(), []);
        }
        assert_eq!(held.finish(None, None).await.unwrap(), LeaseAnswer::Held);
        next.submit(task("of-next")).await.unwrap();
        fixture.another().await.submit(task("of-this")).await.unwrap();
        let done = AtomicUsize::new(0);
        timeout(LONG, async { tokio::join!(work(&next, &done, 3), work(&fixture.queue, &done, 3)) }).await.unwrap();
        for key in ["before", "meanwhile", "of-next", "of-this"] {
            assert_eq!(fixture.state(key).await, State::Finished, "{key}");
        }
        next.close().await;
    }

    async fn a_later_schema_that_shuts_this_program_out_is_refused_and_left_alone(fixture: &Fixture) {
        fixture.submit(&[task("a")]).await;
        open(&later(fixture, 2)).await.init().await.unwrap();
        let queue = fixture.another().await;
        refused(
            &queue,
            "the database has schema 2, made by Laelaps THIS, for programs that know schema 2 or a later one; this one, Laelaps THIS, \
            knows schema 1",
            "upgrade this program to the version that made the schema, or to a later one; nothing was changed",
        )
        .await;
        let next = open(&later(fixture, 2)).await;
        assert_eq!(next.schema_status().await.unwrap(), SchemaStatus::Current(2));
        assert_eq!(next.poll(&PollOptions::default()).await.unwrap().unwrap().key(), "a");
        next.close().await;
    }

    async fn an_older_schema_is_not_worked_on_before_it_is_moved_on(fixture: &Fixture) {
        let next = open(&later(fixture, 1)).await;
        assert_eq!(next.schema_status().await.unwrap(), SchemaStatus::Old { found: 1, needed: 2 });
        let refused = next.poll(&PollOptions::default()).await.map(drop).unwrap_err();
        assert_eq!(refused.to_string(), "the database has schema 1, this program needs 2");
        assert_eq!(refused.hint(), Some("bring the tables up to date with `laelaps init`, or with Queue::init"));
        let plan = next.backend().plan().await.unwrap();
        assert_eq!((plan.len(), plan[0].version, plan[0].oldest_program), (1, 2, 1));
        assert!(plan[0].sql.contains("later_2"), "{}", plan[0].sql);
        assert_eq!(next.schema_status().await.unwrap(), SchemaStatus::Old { found: 1, needed: 2 }, "a plan changes nothing");
        next.init().await.unwrap();
        assert!(next.poll(&PollOptions::default()).await.unwrap().is_none());
        next.close().await;
    }

    async fn tables_of_a_development_build_are_named_as_such(fixture: &Fixture) {
        const MESSAGE: &str = "the database's schema 1 is not the schema 1 of this program, Laelaps THIS: a development build made it";
        const HINT: &str = "use the build that made the database, or a new database, made by `laelaps init`; nothing was changed";
        fixture.meddle(match fixture.database() {
            Database::Postgres => "UPDATE schema_version SET fingerprint = '00000000'",
            Database::Sqlite | Database::MariaDb => "UPDATE laelaps_schema SET fingerprint = '00000000'",
        })
        .await;
        refused(&fixture.queue, MESSAGE, HINT).await;
        // As it was made before there was anything to tell them apart.
        fixture.meddle(match fixture.database() {
            Database::Postgres => "ALTER TABLE schema_version DROP oldest_program, DROP program, DROP fingerprint",
            Database::Sqlite => {
                "ALTER TABLE laelaps_schema DROP oldest_program; ALTER TABLE laelaps_schema DROP program;
                ALTER TABLE laelaps_schema DROP fingerprint"
            }
            Database::MariaDb => "ALTER TABLE laelaps_schema DROP oldest_program, DROP program, DROP fingerprint",
        })
        .await;
        refused(&fixture.queue, MESSAGE, HINT).await;
        refused(&fixture.another().await, MESSAGE, HINT).await;
    }

    async fn many_programs_take_a_step_once_while_others_work(fixture: &Fixture) {
        const TASKS: usize = 200;
        fixture.submit_some("a", TASKS / 2).await;
        let (done, half) = (Arc::new(AtomicUsize::new(0)), TASKS / 2);
        let workers: Vec<_> = [fixture.another().await, fixture.another().await].into_iter().map(|queue| {
            let done = Arc::clone(&done);
            tokio::spawn(async move {
                work(&queue, &done, TASKS).await;
                queue.close().await;
            })
        }).collect();
        eventually(LONG, "work has begun", async || {
            let done = done.load(Ordering::SeqCst);
            if done > half / 10 { Ok(()) } else { Err(format!("{done} done")) }
        })
        .await;
        let inits: Vec<_> = (0..4).map(|_| {
            let config = later(fixture, 1);
            tokio::spawn(async move {
                let queue = open(&config).await;
                let migration = queue.init().await.unwrap();
                queue.close().await;
                migration.applied.len()
            })
        }).collect();
        let mut applied = 0;
        for init in inits {
            applied += init.await.unwrap();
        }
        assert_eq!(applied, 1);
        fixture.submit_some("b", TASKS / 2).await;
        for worker in workers {
            timeout(LONG, worker).await.expect("every task is done").unwrap();
        }
        assert_eq!(fixture.queue.stats().await.unwrap().finished, TASKS as u64);
    }

    async fn a_step_that_broke_off_is_taken_again(fixture: &Fixture) {
        let mut broken = later(fixture, 1);
        let whole = later_step(&fixture.config.url, 2);
        broken.later_steps[0].sql = format!("{whole}\nINSERT INTO nowhere VALUES (1);\n").into();
        let breaks = open(&broken).await;
        breaks.init().await.unwrap_err();
        breaks.close().await;
        assert_eq!(fixture.queue.schema_status().await.unwrap(), SchemaStatus::Current(1));
        fixture.submit(&[task("meanwhile")]).await;
        let next = open(&later(fixture, 1)).await;
        assert_eq!(next.init().await.unwrap().applied, [2]);
        assert_eq!(next.poll(&PollOptions::default()).await.unwrap().unwrap().key(), "meanwhile");
        next.close().await;
    }
}

mod beside_a_long_transaction {
    use super::*;

    /// A producer of the application's keeps a transaction open over the table that a step wants: whoever comes after the step does not wait behind it.
    async fn a_step_gives_way(fixture: &Fixture, is_waiting: impl AsyncFnOnce(), let_go: impl AsyncFnOnce()) {
        let next = open(&later(fixture, 1)).await;
        let making = tokio::spawn(async move {
            let migration = next.init().await;
            next.close().await;
            migration.unwrap()
        });
        is_waiting().await;
        let work = async {
            fixture.submit(&[task("a")]).await;
            let mut task = fixture.queue.poll(&PollOptions::default()).await.unwrap().unwrap();
            task.finish(None, Some(Duration::from_secs(60))).await.unwrap()
        };
        assert_eq!(timeout(PATIENCE, work).await.expect("work goes on meanwhile"), LeaseAnswer::Held);
        assert_eq!(fixture.queue.schema_status().await.unwrap(), SchemaStatus::Current(1));
        let_go().await;
        assert_eq!(timeout(LONG, making).await.unwrap().unwrap().applied, [2]);
    }

    /// Waits until a session waits for the table.
    async fn until_one_waits(waiting: impl AsyncFn() -> i64) {
        let promise = "the step waits for the table";
        eventually(LONG, promise, async || if waiting().await > 0 { Ok(()) } else { Err("not yet".to_owned()) }).await;
    }

    mod on_postgres {
        use sqlx::{Connection, Executor};

        use super::*;

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn a_step_gives_way_to_a_long_transaction() {
            const WAITING: &str = "SELECT count(*) FROM pg_stat_activity
                WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE 'ALTER TABLE laelaps.task ADD COLUMN later%'";
            let fixture = Fixture::new(Database::Postgres).await;
            let mut producer = postgres::raw(&fixture.config).await;
            producer.execute("BEGIN; SELECT * FROM submit('long', 'type', '{}')").await.unwrap();
            let config = fixture.config.clone();
            let waits = async || {
                until_one_waits(async || {
                    let mut watcher = postgres::raw(&config).await;
                    let waiting = sqlx::query_scalar(WAITING).fetch_one(&mut watcher).await.unwrap();
                    watcher.close().await.unwrap();
                    waiting
                })
                .await;
            };
            a_step_gives_way(&fixture, waits, async || {
                producer.execute("COMMIT").await.unwrap();
            })
            .await;
            assert_eq!(fixture.state("long").await, State::Waiting);
        }
    }

    mod on_mariadb {
        use sqlx::{Connection, Executor, MySqlConnection};

        use super::*;

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn a_step_gives_way_to_a_long_transaction() {
            const WAITING: &str = "SELECT CAST(COUNT(*) AS SIGNED) FROM information_schema.processlist
                WHERE db = DATABASE() AND state LIKE 'Waiting for table metadata lock%' AND info LIKE 'ALTER TABLE%'";
            let fixture = Fixture::new(Database::MariaDb).await;
            let mut producer = MySqlConnection::connect(&fixture.config.url).await.unwrap();
            producer.execute("BEGIN; SELECT COUNT(*) FROM laelaps_task").await.unwrap();
            let url = fixture.config.url.clone();
            let waits = async || {
                until_one_waits(async || {
                    let mut watcher = MySqlConnection::connect(&url).await.unwrap();
                    let waiting = sqlx::query_scalar(WAITING).fetch_one(&mut watcher).await.unwrap();
                    watcher.close().await.unwrap();
                    waiting
                })
                .await;
            };
            a_step_gives_way(&fixture, waits, async || {
                producer.execute("COMMIT").await.unwrap();
            })
            .await;
        }
    }
}

/// A program that meets tables which somebody changed by hand says where to look.
mod changed_by_hand {
    use super::*;

    async fn an_error_of_a_changed_table_points_to_check(database: Database) {
        let fixture = Fixture::new(database).await;
        fixture.submit(&[task("a")]).await;
        let host = fixture.host().await;
        fixture
            .meddle(match database {
                Database::MariaDb => "ALTER TABLE laelaps_task CHANGE COLUMN until until_when BIGINT NOT NULL DEFAULT 0",
                Database::Sqlite | Database::Postgres => "ALTER TABLE task RENAME COLUMN until TO until_when",
            })
            .await;
        let claim = Claim::new(host, 1, Duration::from_secs(60));
        let refused = fixture.backend().claim(&claim).await.unwrap_err();
        assert_eq!(
            refused.hint(),
            Some("`laelaps check` tells how the tables differ from those that `laelaps init` makes"),
            "{refused}"
        );
    }

    mod on_sqlite {
        #[tokio::test]
        async fn an_error_of_a_changed_table_points_to_check() {
            super::an_error_of_a_changed_table_points_to_check(super::Database::Sqlite).await;
        }
    }

    mod on_postgres {
        #[tokio::test]
        async fn an_error_of_a_changed_table_points_to_check() {
            super::an_error_of_a_changed_table_points_to_check(super::Database::Postgres).await;
        }
    }

    mod on_mariadb {
        #[tokio::test]
        async fn an_error_of_a_changed_table_points_to_check() {
            super::an_error_of_a_changed_table_points_to_check(super::Database::MariaDb).await;
        }
    }
}
