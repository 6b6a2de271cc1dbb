//! A database server that dies, and connections that are cut, while hosts work.

use std::collections::HashSet;
use std::time::Duration;

use laelaps_queue::{Config, Queue};
use laelaps_test_databases::{Durability, mariadb, postgres};
use laelaps_tests::{Host, LONG, Site, all_tasks, eventually, scaled, submit, task};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection, PgConnection};

/// A server that only this test uses.
enum Server {
    Postgres(postgres::Server),
    MariaDb(mariadb::Server),
}

impl Server {
    async fn postgres() -> Self {
        Self::Postgres(postgres::Server::start(Durability::Process).await)
    }

    async fn mariadb() -> Self {
        Self::MariaDb(mariadb::Server::start(Durability::Process).await)
    }

    async fn create_database(&self) -> String {
        match self {
            Self::Postgres(server) => server.create_database().await,
            Self::MariaDb(server) => server.create_database().await,
        }
    }

    fn kill(&mut self) {
        match self {
            Self::Postgres(server) => server.kill(),
            Self::MariaDb(server) => server.kill(),
        }
    }

    async fn restart(&mut self) {
        match self {
            Self::Postgres(server) => server.restart().await,
            Self::MariaDb(server) => server.restart().await,
        }
    }

    /// Cuts every connection to the database; answers how many.
    async fn cut(&self, url: &str) -> usize {
        match self {
            Self::Postgres(_) => {
                const CUT: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE datname = current_database() AND pid <> pg_backend_pid()";
                let mut connection = PgConnection::connect(url).await.unwrap();
                sqlx::query(CUT).fetch_all(&mut connection).await.unwrap().len()
            }
            Self::MariaDb(_) => {
                const THERE: &str = "SELECT CAST(id AS SIGNED) FROM information_schema.processlist WHERE db = database() AND id <> connection_id()";
                let mut connection = MySqlConnection::connect(url).await.unwrap();
                let there: Vec<i64> = sqlx::query_scalar(THERE).fetch_all(&mut connection).await.unwrap();
                for id in &there {
                    // It may have ended meanwhile.
                    let _ = sqlx::query(AssertSqlSafe(format!("KILL {id}"))).execute(&mut connection).await;
                }
                there.len()
            }
        }
    }
}

/// Four hosts that work on many tasks.
struct Fleet {
    server: Server,
    url: String,
    site: Site,
    queue: Queue,
    hosts: Vec<Host>,
    count: usize,
}

impl Fleet {
    async fn start(server: Server) -> Self {
        let count = scaled(20_000);
        let site = Site::new().await;
        let url = server.create_database().await;
        site.plug_guest("zoo");
        // A claim whose answer was lost with its connection comes back when its leases end.
        site.configure(json!({ "url": url, "processors": 4, "task_prefetch": 16, "alive_time": 5 }));
        let queue = Queue::open(&Config::new(&url)).await.unwrap();
        queue.init().await.unwrap();
        let tasks: Vec<_> = (0..count)
            .map(|number| task(format!("task-{number}"), "compute", json!({ "ms": 1, "mark": "/marks/all" })))
            .collect();
        submit(&queue, &tasks).await;
        let mut hosts = Vec::new();
        for _ in 0..4 {
            hosts.push(site.start().await);
        }
        Self { server, url, site, queue, hosts, count }
    }

    /// Waits until so many tasks are finished, however often the server does not answer.
    async fn finished(&self, count: usize) {
        eventually(LONG, &format!("{count} tasks are finished"), async || {
            let stats = self.queue.stats().await.map_err(|error| format!("{error}"))?;
            if stats.finished >= count as u64 { Ok(()) } else { Err(format!("{stats:?}")) }
        })
        .await;
    }

    /// Everything is finished, every task ran, and no host gave up.
    async fn everything_finishes(mut self) {
        self.finished(self.count).await;
        let marked: HashSet<String> =
            self.site.marks("all").iter().filter_map(|mark| mark.split(' ').next().map(str::to_owned)).collect();
        assert_eq!(marked.len(), self.count, "every task ran");
        assert_eq!(all_tasks(&self.queue).await.len(), self.count, "none is lost");
        for host in &mut self.hosts {
            assert!(host.is_running(), "no host exits");
        }
        for host in self.hosts {
            host.stop().await;
        }
    }
}

async fn a_server_that_is_killed_and_started_again_loses_nothing(server: Server) {
    let mut fleet = Fleet::start(server).await;
    for quarter in 1..=3 {
        fleet.finished(fleet.count * quarter / 4).await;
        fleet.server.kill();
        fleet.server.restart().await;
    }
    fleet.everything_finishes().await;
}

async fn connections_that_are_cut_lose_nothing(server: Server) {
    let fleet = Fleet::start(server).await;
    let mut cuts = tokio::time::interval(Duration::from_millis(200));
    let mut cut = 0;
    while cut < 40 {
        cuts.tick().await;
        cut += fleet.server.cut(&fleet.url).await;
        if fleet.queue.stats().await.is_ok_and(|stats| stats.finished == fleet.count as u64) {
            break;
        }
    }
    assert!(cut > 4, "{cut} connections were cut while the hosts worked");
    fleet.everything_finishes().await;
}

mod on_postgres {
    use super::Server;

    #[tokio::test]
    async fn a_server_that_is_killed_and_started_again_loses_nothing() {
        Box::pin(super::a_server_that_is_killed_and_started_again_loses_nothing(Server::postgres().await)).await;
    }

    #[tokio::test]
    async fn connections_that_are_cut_lose_nothing() {
        Box::pin(super::connections_that_are_cut_lose_nothing(Server::postgres().await)).await;
    }
}

mod on_mariadb {
    use super::Server;

    #[tokio::test]
    async fn a_server_that_is_killed_and_started_again_loses_nothing() {
        Box::pin(super::a_server_that_is_killed_and_started_again_loses_nothing(Server::mariadb().await)).await;
    }

    #[tokio::test]
    async fn connections_that_are_cut_lose_nothing() {
        Box::pin(super::connections_that_are_cut_lose_nothing(Server::mariadb().await)).await;
    }
}
