//! The database under a test: SQLite, unless the test runs [`on`] a server.

use std::path::Path;

use laelaps_test_databases::{mariadb, postgres};

/// The databases that keep the promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Database {
    /// A file of the site.
    Sqlite,
    /// A database of the server that all tests of the process share.
    Postgres,
    /// Likewise.
    MariaDb,
    /// PerfectQueue's own table, with ours beside it, in a database of the same server.
    PerfectQueue,
}

/// The name of PerfectQueue's table in tests. Each test process has its own: the lock under which tasks are acquired is called after the table,
/// and is the whole server's.
pub(crate) fn perfectqueue_table() -> String {
    format!("tasks_{}", std::process::id())
}

tokio::task_local! {
    static DATABASE: Database;
}

/// Runs a test whose sites are on this database.
pub async fn on<T>(database: Database, test: impl Future<Output = T>) -> T {
    DATABASE.scope(database, test).await
}

/// The database of the running test.
pub(crate) fn database() -> Database {
    DATABASE.try_with(|database| *database).unwrap_or(Database::Sqlite)
}

/// The URL of an empty database for a site.
pub(crate) async fn url(site: &Path) -> String {
    match database() {
        Database::Sqlite => format!("sqlite:{}", site.join("queue.db").display()),
        Database::Postgres => postgres::shared().await.create_database().await,
        Database::MariaDb | Database::PerfectQueue => mariadb::shared().await.create_database().await,
    }
}

/// One test for each database out of each promise.
#[macro_export]
macro_rules! on_every_database {
    ($($(#[$attribute:meta])* async fn $name:ident() $body:block)+) => {
        $crate::on_every_native_database! { $($(#[$attribute])* async fn $name() $body)+ }

        mod on_perfectqueue {
            $(#[tokio::test]
            async fn $name() {
                $crate::on($crate::Database::PerfectQueue, Box::pin(super::$name())).await;
            })+
        }
    };
}

/// The same for promises that only our own tables keep.
#[macro_export]
macro_rules! on_every_native_database {
    ($($(#[$attribute:meta])* async fn $name:ident() $body:block)+) => {
        $($(#[$attribute])* async fn $name() $body)+

        mod on_sqlite {
            $(#[tokio::test]
            async fn $name() {
                $crate::on($crate::Database::Sqlite, Box::pin(super::$name())).await;
            })+
        }

        mod on_postgres {
            $(#[tokio::test]
            async fn $name() {
                $crate::on($crate::Database::Postgres, Box::pin(super::$name())).await;
            })+
        }

        mod on_mariadb {
            $(#[tokio::test]
            async fn $name() {
                $crate::on($crate::Database::MariaDb, Box::pin(super::$name())).await;
            })+
        }
    };
}
