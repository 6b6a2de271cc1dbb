//! A host that starts while its database is away: it waits and says so, signals work meanwhile, and what no waiting mends ends it at once.

use std::net::Ipv4Addr;

use laelaps_queue::State;
use laelaps_test_databases::{Durability, mariadb};
use laelaps_tests::{Database, Host, LONG, PATIENCE, Server, Signal, Site, on, submit, task, wait_for_state, waiting_for};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, MySqlConnection, PgConnection, SqliteConnection};
use tokio::net::TcpListener;

const WAITS: &str = "the database cannot be used yet; this host waits for it";

/// Nobody listens there.
const NOWHERE: [&str; 2] = ["postgres://nobody@127.0.0.1:1/queue", "mysql://nobody@127.0.0.1:1/queue"];

/// A host that waits, and has said why. Its patience for a server is over long before this returns.
async fn waits(site: &Site, url: &str) -> Host {
    site.configure(json!({ "url": url, "pq_connect_timeout": 0.1 }));
    let host = site.spawn_with(&[], &[]);
    let line = host.logged(WAITS, PATIENCE).await;
    assert!(line.contains("hint="), "{line}");
    host
}

#[tokio::test]
async fn signals_end_a_host_that_waits_for_its_database() {
    let site = Site::new().await;
    for url in NOWHERE {
        for signal in [Signal::TERM, Signal::INT, Signal::QUIT] {
            let mut host = waits(&site, url).await;
            host.signal(signal);
            assert!(host.exited(PATIENCE).await.success());
            assert!(host.was_notified("STOPPING=1") && !host.was_notified("READY=1"), "it never was ready");
        }
    }
}

#[tokio::test]
async fn a_host_that_waits_for_its_database_reads_its_configuration_again_when_told() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let queue = site.queue().await;
    for (url, signal) in NOWHERE.into_iter().zip([Signal::HUP, Signal::USR1]) {
        let mut host = waits(&site, url).await;
        site.configure(json!({ "processors": "many" }));
        host.signal(signal);
        host.logged("the new configuration cannot be used; the old one stays in force", PATIENCE).await;
        assert!(host.is_running() && !host.was_notified("READY=1"));
        site.configure(json!({}));
        host.signal(signal);
        host.notified("READY=1", PATIENCE).await;
        let key = signal.as_raw().to_string();
        submit(&queue, &[task(key.clone(), "silent", json!({}))]).await;
        wait_for_state(&queue, &key, State::Finished, PATIENCE).await;
        host.stop().await;
    }
}

#[tokio::test]
async fn a_service_manager_hears_that_a_start_waits() {
    let site = Site::new().await;
    let mut host = waits(&site, NOWHERE[0]).await;
    host.notified("EXTEND_TIMEOUT_USEC=60000000", PATIENCE).await;
    host.notified("STATUS=waiting for the database, or compiling plugins", PATIENCE).await;
    host.stop().await;
}

#[tokio::test]
async fn a_proxy_without_its_server_is_waited_for() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    // It takes every connection and closes it.
    let closing = tokio::spawn(async move { while listener.accept().await.is_ok() {} });
    let site = Site::new().await;
    for scheme in ["postgres", "mysql"] {
        waits(&site, &format!("{scheme}://nobody@{address}/queue")).await.stop().await;
    }
    closing.abort();
}

#[tokio::test]
async fn a_file_that_another_program_keeps_locked_is_waited_for() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let queue = site.queue().await;
    queue.close().await;
    let mut holder = SqliteConnection::connect(site.url()).await.unwrap();
    holder.execute("BEGIN IMMEDIATE").await.unwrap();
    site.configure(json!({ "pq_connect_timeout": 0.1 }));
    let mut host = site.spawn_with(&[], &[]);
    host.logged("cannot register this host with the database; trying again", PATIENCE).await;
    assert!(!host.was_notified("READY=1"));
    holder.execute("ROLLBACK").await.unwrap();
    host.notified("READY=1", PATIENCE).await;
    host.stop().await;
}

/// What `laelaps run` answers if it ends by itself.
async fn ended(site: &Site, changes: Value) -> String {
    site.configure(changes);
    let answer = waiting_for("the host's end", site.laelaps(["-c", "laelaps.yml", "run"])).await;
    assert_eq!(answer.code, Some(4), "{}", answer.stderr);
    assert!(!answer.stderr.contains("waits for it"), "{}", answer.stderr);
    answer.stderr
}

#[tokio::test]
async fn a_certificate_that_is_not_there_ends_a_start_at_once() {
    let site = Site::new().await;
    site.configure(json!({ "url": NOWHERE[0], "sslca": "none.pem", "pq_connect_timeout": 3_600 }));
    let answer = site.laelaps(["-c", "laelaps.yml", "run"]).await;
    assert_eq!(answer.code, Some(3), "{}", answer.stderr);
    assert!(answer.stderr.contains("sslca: there is no file none.pem"), "{}", answer.stderr);
}

#[tokio::test]
async fn a_command_gives_up_after_its_time_out_and_says_why() {
    let site = Site::new().await;
    for url in NOWHERE {
        site.configure(json!({ "url": url, "pq_connect_timeout": 1 }));
        for command in ["stats", "check"] {
            let answer = site.laelaps(["-c", "laelaps.yml", command]).await;
            assert_eq!(answer.code, Some(4), "{}", answer.stderr);
            assert!(answer.stderr.contains("cannot connect to") && answer.stderr.contains("hint: "), "{}", answer.stderr);
        }
    }
}

async fn a_host_starts_once_its_database_is_there(database: Database) {
    let mut server = Box::pin(Server::start(database)).await;
    let url = server.create_database().await;
    let site = Site::new().await;
    site.plug_guest("zoo");
    server.kill();
    site.configure(json!({ "url": url, "pq_connect_timeout": 0.1 }));
    let init = site.laelaps(["-c", "laelaps.yml", "init", "--wait"]);
    let (initialised, ()) = tokio::join!(init, server.restart());
    assert!(initialised.success().stdout.contains("the queue is ready"), "as the unit for systemd does it");
    server.kill();
    let mut host = waits(&site, &url).await;
    assert!(!host.was_notified("READY=1"));
    server.restart().await;
    host.notified("READY=1", LONG).await;
    host.logged("the database can be used; this host starts", PATIENCE).await;
    let queue = site.queue_at(&url).await;
    submit(&queue, &[task("late", "silent", json!({}))]).await;
    wait_for_state(&queue, "late", State::Finished, PATIENCE).await;
    host.stop().await;
}

/// As after a failover, until its new primary is one.
async fn a_server_that_takes_no_writes_yet_is_waited_for() {
    let server = mariadb::Server::start(Durability::Process).await;
    let url = server.create_database().await;
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.queue_at(&url).await.close().await;
    let (_, database) = url.rsplit_once('/').unwrap();
    let mut root = MySqlConnection::connect(&server.url("mysql")).await.unwrap();
    // An administrator is not held to it.
    let user = format!("CREATE USER mere@'127.0.0.1'; GRANT ALL ON {database}.* TO mere@'127.0.0.1'; SET GLOBAL read_only = 1");
    sqlx::raw_sql(AssertSqlSafe(user)).execute(&mut root).await.unwrap();
    site.configure(json!({ "url": url.replace("root@", "mere@"), "pq_connect_timeout": 0.1 }));
    let mut host = site.spawn_with(&[], &[]);
    let line = host.logged("cannot register this host with the database; trying again", PATIENCE).await;
    assert!(line.contains("the server takes no writes"), "{line}");
    assert!(!host.was_notified("READY=1"));
    sqlx::raw_sql("SET GLOBAL read_only = 0").execute(&mut root).await.unwrap();
    host.notified("READY=1", PATIENCE).await;
    host.stop().await;
}

/// Another database, another user and other tables than there are.
async fn what_no_waiting_mends_ends_a_start_at_once() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let url = site.url().to_owned();
    let told = ended(&site, json!({ "url": url })).await;
    assert!(told.contains("no Laelaps schema yet"), "{told}");
    let told = ended(&site, json!({ "url": format!("{url}_other") })).await;
    assert!(told.contains("_other"), "{told}");
    let (scheme, server) = url.split_once("://").unwrap();
    let (_, server) = server.split_once('@').unwrap();
    let told = ended(&site, json!({ "url": format!("{scheme}://stranger:wrong@{server}") })).await;
    assert!(told.contains("hint: "), "{told}");
    let queue = site.queue_at(&url).await;
    queue.close().await;
    let newer =
        "INSERT INTO laelaps@schema@ (version, oldest_program, applied_at, program, fingerprint) VALUES (999, 999, 0, '', '')";
    if site.database() == Database::Postgres {
        let newer = newer.replace("@schema@", ".schema_version");
        let mut connection = PgConnection::connect(&url).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(newer)).execute(&mut connection).await.unwrap();
    } else {
        let newer = newer.replace("@schema@", "_schema");
        let mut connection = MySqlConnection::connect(&url).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(newer)).execute(&mut connection).await.unwrap();
    }
    let told = ended(&site, json!({ "url": url })).await;
    assert!(told.contains("999"), "{told}");
}

mod on_postgres {
    use super::{Database, on};

    #[tokio::test]
    async fn a_host_starts_once_its_database_is_there() {
        Box::pin(super::a_host_starts_once_its_database_is_there(Database::Postgres)).await;
    }

    #[tokio::test]
    async fn what_no_waiting_mends_ends_a_start_at_once() {
        Box::pin(on(Database::Postgres, super::what_no_waiting_mends_ends_a_start_at_once())).await;
    }
}

mod on_mariadb {
    use super::{Database, on};

    #[tokio::test]
    async fn a_host_starts_once_its_database_is_there() {
        Box::pin(super::a_host_starts_once_its_database_is_there(Database::MariaDb)).await;
    }

    #[tokio::test]
    async fn what_no_waiting_mends_ends_a_start_at_once() {
        Box::pin(on(Database::MariaDb, super::what_no_waiting_mends_ends_a_start_at_once())).await;
    }

    #[tokio::test]
    async fn a_server_that_takes_no_writes_yet_is_waited_for() {
        Box::pin(super::a_server_that_takes_no_writes_yet_is_waited_for()).await;
    }
}
