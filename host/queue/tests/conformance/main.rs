//! What every database has to keep, told as promises. A further database adds itself to `fixture::Database` and to `promises!`.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod fixture;

mod behind;
mod benches;
mod bounded;
mod chaos;
mod contention;
mod descent;
mod documented;
mod documents;
mod encryption;
mod ends;
mod errors;
mod explorer;
mod fair;
mod files;
mod flushes;
mod handed_on;
mod held;
mod hosts;
mod leases;
mod limited;
mod lists;
mod losses;
mod lost;
mod mariadb;
mod numbers;
mod open_mariadb;
mod options;
mod orders;
mod pooled;
mod postgres;
mod postgres_store;
mod priority;
mod program;
mod queues;
mod rows_mariadb;
mod rows_postgres;
mod rows_sqlite;
mod schema;
mod shares;
mod signs;
mod storm;
mod submits;
mod suspicion;
mod suspicion_postgres;
mod unserved;
mod upgrades;

/// One test for each database out of each promise.
macro_rules! promises {
    ($($(#[$attribute:meta])* async fn $name:ident($fixture:ident: &$type:ty) $body:block)+) => {
        $(
            $(#[$attribute])*
            async fn $name($fixture: &$type) $body
        )+

        mod on_sqlite {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    let fixture = $crate::fixture::Fixture::new($crate::fixture::Database::Sqlite).await;
                    super::$name(&fixture).await;
                    fixture.audit().await;
                }
            )+
        }

        mod on_postgres {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    let fixture = $crate::fixture::Fixture::new($crate::fixture::Database::Postgres).await;
                    super::$name(&fixture).await;
                    fixture.audit().await;
                }
            )+
        }

        mod on_mariadb {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    let fixture = $crate::fixture::Fixture::new($crate::fixture::Database::MariaDb).await;
                    super::$name(&fixture).await;
                    fixture.audit().await;
                }
            )+
        }
    };
}
use promises;
