//! A database server that dies or takes no writes, and connections that are cut, while hosts work.

use std::collections::HashSet;

use laelaps_queue::{Queue, State};
use laelaps_tests::{Database, Host, LONG, PATIENCE, Server, Site, all_tasks, eventually, scaled, submit, task, wait_for_state};
use serde_json::{Value, json};
use sqlx::{Connection as _, MySqlConnection, PgConnection};

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
        // A claim whose answer was lost with its connection comes back when its leases end.
        Self::start_with(server, json!({ "alive_time": 30 }), 0).await
    }

    /// The first `gated` tasks wait for the gate.
    async fn start_with(server: Server, changes: Value, gated: usize) -> Self {
        let count = scaled(20_000);
        let site = Site::new().await;
        let url = server.create_database().await;
        let url = server.as_mere_user(&url).await;
        site.plug_guest("zoo");
        // What is finished is counted at the end.
        let mut section = json!({ "url": url, "processors": 4, "task_prefetch": 16 });
        section.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        site.configure(section);
        let queue = site.queue_at(&url).await;
        let task = |number| {
            let (kind, gate) = if number < gated { ("silent", json!("/marks/gate")) } else { ("compute", Value::Null) };
            task(format!("task-{number}"), kind, json!({ "ms": 1, "mark": "/marks/all", "gate": gate }))
        };
        let tasks: Vec<_> = (0..count).map(task).collect();
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
    for tenth in 1..10 {
        fleet.finished(fleet.count * tenth / 10).await;
        // Some may just be connecting again after the cut before.
        eventually(PATIENCE, "every host is connected, and its connection is cut", async || {
            let there = fleet.server.connections(&fleet.url).await;
            if there <= fleet.hosts.len() {
                return Err(format!("{there} connections"));
            }
            let cut = fleet.server.cut(&fleet.url).await;
            if cut >= fleet.hosts.len() { Ok(()) } else { Err(format!("{cut} connections were left to be cut")) }
        })
        .await;
    }
    fleet.everything_finishes().await;
}

async fn a_server_that_takes_no_writes_for_a_while_loses_no_outcome(server: Server) {
    // As many as a host has processors: the one that claims first runs them.
    let fleet = Fleet::start_with(server, json!({ "alive_time": 86_400 }), 4).await;
    fleet.finished(fleet.count / 4).await;
    fleet.server.takes_writes(false).await;
    fleet.site.open_gate("gate");
    // Attempts that have finished cannot be settled, not even when it is tried again.
    eventually(PATIENCE, "a host has outcomes that it cannot store, and tries on", async || {
        let tries: Vec<usize> = fleet.hosts.iter().map(|host| host.lines_with("cannot settle; trying again").len()).collect();
        if tries.iter().any(|tries| *tries >= 5) { Ok(()) } else { Err(format!("{tries:?}")) }
    })
    .await;
    assert!(fleet.queue.stats().await.unwrap().finished < fleet.count as u64, "it happened in the middle");
    fleet.server.takes_writes(true).await;
    fleet.finished(fleet.count).await;
    let tasks = all_tasks(&fleet.queue).await;
    let spoilt = tasks.iter().find(|task| task.attempts != 1 || task.lost != 0 || task.error_code.is_some());
    assert!(spoilt.is_none(), "each task was finished by its first attempt: {spoilt:?}");
    assert_eq!(fleet.site.marks("all").len(), fleet.count, "and ran once");
    for host in &fleet.hosts {
        assert_eq!(host.lines_with("malformed"), [] as [&str; 0]);
    }
    fleet.everything_finishes().await;
}

/// Keeps every statement about waiting tasks from coming to its end, until dropped.
enum Hang {
    Postgres(PgConnection),
    MariaDb(MySqlConnection),
}

impl Hang {
    async fn begin(site: &Site) -> Self {
        if site.database() == Database::Postgres {
            let mut connection = PgConnection::connect(site.url()).await.unwrap();
            let lock = "BEGIN; LOCK TABLE laelaps.ready IN ACCESS EXCLUSIVE MODE";
            sqlx::raw_sql(lock).execute(&mut connection).await.unwrap();
            Self::Postgres(connection)
        } else {
            let mut connection = MySqlConnection::connect(site.url()).await.unwrap();
            sqlx::raw_sql("LOCK TABLES laelaps_ready WRITE").execute(&mut connection).await.unwrap();
            Self::MariaDb(connection)
        }
    }

    async fn end(self) {
        match self {
            Self::Postgres(connection) => connection.close().await.unwrap(),
            Self::MariaDb(connection) => connection.close().await.unwrap(),
        }
    }
}

async fn a_statement_that_hangs_is_given_up_and_the_host_goes_on() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    // As long as no statement takes that does not hang.
    site.configure(json!({ "statement_timeout": 5, "listen": false }));
    let queue = site.queue().await;
    let mut host = site.start().await;
    let hang = Hang::begin(&site).await;
    let line = host.logged("cannot claim tasks; trying on", PATIENCE).await;
    assert!(line.contains("statement timeout") || line.contains("max_statement_time"), "{line}");
    hang.end().await;
    host.logged("tasks can be claimed again", PATIENCE).await;
    submit(&queue, &[task("after", "silent", json!({}))]).await;
    wait_for_state(&queue, "after", State::Finished, PATIENCE).await;
    assert!(host.is_running());
    host.stop().await;
}

mod on_postgres {
    use laelaps_tests::{Database, Server, on};

    #[tokio::test]
    async fn a_statement_that_hangs_is_given_up_and_the_host_goes_on() {
        Box::pin(on(Database::Postgres, super::a_statement_that_hangs_is_given_up_and_the_host_goes_on())).await;
    }

    #[tokio::test]
    async fn a_server_that_is_killed_and_started_again_loses_nothing() {
        Box::pin(super::a_server_that_is_killed_and_started_again_loses_nothing(Server::start(Database::Postgres).await)).await;
    }

    #[tokio::test]
    async fn connections_that_are_cut_lose_nothing() {
        Box::pin(super::connections_that_are_cut_lose_nothing(Server::start(Database::Postgres).await)).await;
    }

    #[tokio::test]
    async fn a_server_that_takes_no_writes_for_a_while_loses_no_outcome() {
        Box::pin(super::a_server_that_takes_no_writes_for_a_while_loses_no_outcome(Server::start(Database::Postgres).await))
            .await;
    }
}

mod on_mariadb {
    use laelaps_tests::{Database, Server, on};

    #[tokio::test]
    async fn a_statement_that_hangs_is_given_up_and_the_host_goes_on() {
        Box::pin(on(Database::MariaDb, super::a_statement_that_hangs_is_given_up_and_the_host_goes_on())).await;
    }

    #[tokio::test]
    async fn a_server_that_is_killed_and_started_again_loses_nothing() {
        Box::pin(super::a_server_that_is_killed_and_started_again_loses_nothing(Server::start(Database::MariaDb).await)).await;
    }

    #[tokio::test]
    async fn connections_that_are_cut_lose_nothing() {
        Box::pin(super::connections_that_are_cut_lose_nothing(Server::start(Database::MariaDb).await)).await;
    }

    #[tokio::test]
    async fn a_server_that_takes_no_writes_for_a_while_loses_no_outcome() {
        Box::pin(super::a_server_that_takes_no_writes_for_a_while_loses_no_outcome(Server::start(Database::MariaDb).await)).await;
    }
}

mod on_perfectqueue {
    use laelaps_tests::{Database, Server, on};

    #[tokio::test]
    async fn a_server_that_is_killed_and_started_again_loses_nothing() {
        let test = super::a_server_that_is_killed_and_started_again_loses_nothing(Server::start(Database::MariaDb).await);
        Box::pin(on(Database::PerfectQueue, test)).await;
    }

    #[tokio::test]
    async fn connections_that_are_cut_lose_nothing() {
        Box::pin(on(
            Database::PerfectQueue,
            super::connections_that_are_cut_lose_nothing(Server::start(Database::MariaDb).await),
        ))
        .await;
    }

    #[tokio::test]
    async fn a_server_that_takes_no_writes_for_a_while_loses_no_outcome() {
        let test = super::a_server_that_takes_no_writes_for_a_while_loses_no_outcome(Server::start(Database::MariaDb).await);
        Box::pin(on(Database::PerfectQueue, test)).await;
    }
}
