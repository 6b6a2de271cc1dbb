//! The servers that all tests share: one of a kind, with a database or a root for each test.

use clap::ValueEnum;
use laelaps_test_databases::{Durability, mariadb, postgres};

/// A kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Server {
    Postgres,
    Mariadb,
    Zookeeper,
}

/// Servers that run until this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Servers {
    postgres: Option<postgres::Server>,
    mariadb: Option<mariadb::Server>,
    zookeeper: Option<laelaps_test_zookeeper::Server>,
}

impl Servers {
    /// Starts servers of these kinds, all at once.
    ///
    /// # Panics
    /// If one does not start.
    pub(crate) async fn start(kinds: &[Server]) -> Self {
        let postgres = async {
            if kinds.contains(&Server::Postgres) { Some(postgres::Server::start(Durability::Process).await) } else { None }
        };
        let mariadb = async {
            if kinds.contains(&Server::Mariadb) { Some(mariadb::Server::start(Durability::Process).await) } else { None }
        };
        let zookeeper =
            async { if kinds.contains(&Server::Zookeeper) { Some(laelaps_test_zookeeper::Server::start().await) } else { None } };
        let (postgres, mariadb, zookeeper) = tokio::join!(postgres, mariadb, zookeeper);
        Self { postgres, mariadb, zookeeper }
    }

    /// What tells the tests where they are.
    pub(crate) fn environment(&self) -> Vec<(&'static str, String)> {
        let ports = [
            (postgres::SHARED_PORT, self.postgres.as_ref().map(postgres::Server::port)),
            (mariadb::SHARED_PORT, self.mariadb.as_ref().map(mariadb::Server::port)),
            (laelaps_test_zookeeper::SHARED_PORT, self.zookeeper.as_ref().map(laelaps_test_zookeeper::Server::port)),
        ];
        ports.into_iter().filter_map(|(name, port)| Some((name, port?.to_string()))).collect()
    }
}
