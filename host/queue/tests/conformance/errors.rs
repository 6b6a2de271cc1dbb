//! Whose fault an error is: the request's own, or that of something which ends when somebody ends it.

use std::time::Duration;

use laelaps_queue::{Config, Error, Queue, State};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{Connection, Executor, MySqlConnection, PgConnection, SqliteConnection};

use crate::fixture::{Database, Fixture, finish, settled, task};
use crate::promises;

/// What a driver says, as an operation would hand it on.
fn of(source: sqlx::Error) -> Error {
    Error::Database { doing: "testing", source }
}

/// Runs statements that fail, each with whether it is for its values.
async fn told_apart<C>(connection: &mut C, statements: &[(&'static str, bool)])
where
    for<'a> &'a mut C: Executor<'a>,
{
    for (sql, about_the_request) in statements {
        let error = of(sqlx::raw_sql(*sql).execute(&mut *connection).await.err().expect(sql));
        assert_eq!(error.is_about_the_request(), *about_the_request, "{sql}: {error:?}");
        assert!(!(error.is_about_the_request() && error.is_retryable()), "{sql}: {error:?}");
    }
}

promises! {
    async fn a_request_that_breaks_a_bound_is_at_fault_itself(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a"), task("b")]).await;
        let mut group: Vec<_> = fixture.claim(host, 2).await.iter().map(|task| settled(task, finish())).collect();
        group[0].follow_ups.push(task(""));
        let errors = [
            fixture.queue.submit(task("")).await.unwrap_err(),
            fixture.queue.cancel("nowhere").await.unwrap_err(),
            fixture.queue.retry("a").await.unwrap_err(),
            fixture.backend().settle(&group).await.unwrap_err(),
        ];
        for error in errors {
            assert!(error.is_about_the_request() && !error.is_retryable(), "{error:?}");
        }
        assert_eq!(fixture.state("b").await, State::Running, "a group is stored as a whole, or not");
    }
}

#[tokio::test]
async fn what_befalls_all_requests_alike_is_nobodys_fault() {
    let missing = Fixture::empty(Database::Sqlite).await.queue.submit(task("a")).await.unwrap_err();
    let closed = {
        let fixture = Fixture::new(Database::Sqlite).await;
        fixture.queue.close().await;
        fixture.queue.submit(task("a")).await.unwrap_err()
    };
    let nowhere = Config { patience: Duration::ZERO, ..Config::new("postgres://x@127.0.0.1:1/q") };
    let unreachable = Queue::open(&nowhere).await.unwrap_err();
    let tls = sqlx::Error::Tls("unknown issuer".into());
    let out_of_step = of(sqlx::Error::Protocol("unexpected answer".to_owned()));
    assert!(out_of_step.is_retryable());
    let errors = [missing, closed, unreachable, of(tls), out_of_step, of(sqlx::Error::PoolTimedOut)];
    for error in errors {
        assert!(!error.is_about_the_request(), "{error:?}");
    }
}

#[tokio::test]
async fn sqlite_refuses_values() {
    let fixture = Fixture::new(Database::Sqlite).await;
    let mut connection = SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(fixture.path())).await.unwrap();
    let statements = [
        ("CREATE TEMP TABLE t (n INTEGER NOT NULL CHECK (n < 9)); INSERT INTO t VALUES (10)", true),
        ("INSERT INTO t VALUES (NULL)", true),
        ("INSERT INTO counter (lease) VALUES ('x', 1)", false),
        ("SELECT nothing", false),
        ("PRAGMA query_only = on; INSERT INTO t VALUES (1)", false),
    ];
    told_apart(&mut connection, &statements).await;
}

mod of_servers {
    mod on_postgres {
        use crate::errors::*;

        #[tokio::test]
        async fn a_server_that_refuses_values_is_told_from_one_that_refuses_all() {
            let fixture = Fixture::new(Database::Postgres).await;
            let mut connection = PgConnection::connect(&fixture.direct_url().await).await.unwrap();
            let statements = [
                ("CREATE TEMP TABLE t (n int NOT NULL CHECK (n < 9), s varchar(2)); INSERT INTO t VALUES (10)", true),
                ("CREATE TEMP TABLE t (n int NOT NULL CHECK (n < 9), s varchar(2)); INSERT INTO t VALUES (NULL)", true),
                ("SELECT 'a'::varchar(1)::int", true),
                ("SELECT (SELECT n FROM generate_series(1, 2) AS n)", true),
                ("DO $$ BEGIN RAISE 'no'; END $$", true),
                ("SELECT nothing", false),
                ("SELECT * FROM nowhere", false),
                ("BEGIN; SET TRANSACTION READ ONLY; CREATE TABLE t (n int)", false),
                ("ROLLBACK; SET ROLE pg_monitor; SELECT * FROM laelaps.task", false),
                ("SET statement_timeout = 10; SELECT pg_sleep(5)", false),
                ("SELECT pg_terminate_backend(pg_backend_pid())", false),
            ];
            told_apart(&mut connection, &statements).await;
        }
    }

    mod on_mariadb {
        use crate::errors::*;

        #[tokio::test]
        async fn a_server_that_refuses_values_is_told_from_one_that_refuses_all() {
            let fixture = Fixture::new(Database::MariaDb).await;
            let mut connection = MySqlConnection::connect(&fixture.config.url).await.unwrap();
            let statements = [
                ("CREATE TABLE t (n INT NOT NULL CHECK (n < 9), s VARCHAR(2) UNIQUE); INSERT INTO t VALUES (10, '')", true),
                ("INSERT INTO t VALUES (NULL, '')", true),
                ("INSERT INTO t VALUES ('x', '')", true),
                ("INSERT INTO t VALUES (99999999999, '')", true),
                ("INSERT INTO t VALUES (1, 'xxx')", true),
                ("INSERT INTO t VALUES (1, 'a'), (1, 'a')", true),
                ("SIGNAL SQLSTATE '45000'", true),
                ("SELECT nothing", false),
                ("SELECT * FROM nowhere", false),
                ("SET TRANSACTION READ ONLY; START TRANSACTION; INSERT INTO t VALUES (1, 'b')", false),
                ("KILL CONNECTION_ID()", false),
            ];
            told_apart(&mut connection, &statements).await;
        }
    }
}
