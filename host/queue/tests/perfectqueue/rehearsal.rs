//! What a host does, tried without leaving anything behind: what its user lacks, and what is in the way, is named.

use laelaps_queue::{Config, Queue};
use laelaps_test_databases::{mariadb, unique_name};
use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection};

use crate::fixture::{Site, table, task};

/// What each table's name ends with.
const TABLES: [&str; 4] = ["", "_laelaps", "_laelaps_hosts", "_laelaps_death"];

/// Somebody else's tables, and a user that may do with them only what it is granted.
struct Guest {
    site: Site,
    name: String,
    root: MySqlConnection,
}

impl Guest {
    async fn of(site: Site) -> Self {
        let mut root = MySqlConnection::connect(&mariadb::shared().await.url("mysql")).await.unwrap();
        let name = unique_name("u");
        sqlx::raw_sql(AssertSqlSafe(format!("CREATE USER {name}@'127.0.0.1'"))).execute(&mut root).await.unwrap();
        Self { site, name, root }
    }

    /// `GRANT ... TO`, or `REVOKE ... FROM`, on one of the tables.
    async fn change(&mut self, change: &str, privileges: &str, ours: &str) {
        let (_, database) = self.site.config.url.rsplit_once('/').unwrap();
        let whom = if change == "GRANT" { "TO" } else { "FROM" };
        let sql = format!("{change} {privileges} ON {database}.{}{ours} {whom} {}@'127.0.0.1'", self.site.table(), self.name);
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.root).await.unwrap();
    }

    async fn rehearses(&self) -> Vec<String> {
        let url = self.site.config.url.replace("root@", &format!("{}@", self.name));
        let queue = Queue::open(&Config { url, ..self.site.config.clone() }).await.unwrap();
        let missing = queue.backend().rehearse().await.unwrap();
        queue.close().await;
        missing
    }

    async fn leaves(mut self) {
        let sql = format!("DROP USER {}@'127.0.0.1'", self.name);
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.root).await.unwrap();
    }
}

#[tokio::test]
async fn each_privilege_that_is_missing_is_named() {
    for side_table in [true, false] {
        let mut guest = Guest::of(Site::with(table(side_table)).await).await;
        let tables = if side_table { &TABLES[..] } else { &TABLES[..1] };
        for ours in tables {
            guest.change("GRANT", "SELECT, INSERT, UPDATE, DELETE", ours).await;
        }
        assert_eq!(guest.rehearses().await, [""; 0], "these are all that a host needs");
        for ours in tables {
            for privilege in ["SELECT", "INSERT", "UPDATE", "DELETE"] {
                guest.change("REVOKE", privilege, ours).await;
                let table = guest.site.table();
                assert_eq!(guest.rehearses().await, [format!("no {privilege} on table `{table}{ours}`")]);
                guest.change("GRANT", privilege, ours).await;
            }
        }
        guest.change("REVOKE", "INSERT, DELETE", "").await;
        assert_eq!(guest.rehearses().await, [format!("no INSERT, DELETE on table `{}`", guest.site.table())]);
        guest.leaves().await;
    }
}

#[tokio::test]
async fn a_rehearsal_leaves_nothing_behind_and_keeps_no_lock() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.watched("h").await, site.ruby().await);
    site.submit(&[task("a"), task("b")]).await;
    assert_eq!(site.claim(host, 1).await.len(), 1);
    let all = "SELECT CAST(MD5(CONCAT_WS('|', (SELECT GROUP_CONCAT(id, timeout, owner, data ORDER BY id) FROM {t}), (SELECT COUNT(*) FROM {s}),
        (SELECT GROUP_CONCAT(id, until, seen_at) FROM {h}), (SELECT COUNT(*) FROM {d}))) AS CHAR)";
    let before = ruby.text(all).await;
    for _ in 0..3 {
        assert_eq!(site.backend().rehearse().await.unwrap(), [""; 0]);
    }
    assert_eq!(ruby.text(all).await, before);
    let free = format!("SELECT IS_FREE_LOCK('{}')", site.table());
    assert_eq!(ruby.number(&free).await, 1);
    let next = site.another().await.watched("next").await;
    assert_eq!(next.0, host.0 + 1, "no number of a host is used up");
}

/// An acquire of Ruby's under way is nothing wrong, and is not waited for.
#[tokio::test]
async fn the_lock_in_another_workers_hands_is_no_fault() {
    let site = Site::new().await;
    let (mut ruby, mut other) = (site.ruby().await, site.ruby().await);
    assert!(ruby.lock().await);
    let rehearsed = tokio::time::timeout(laelaps_test_databases::PATIENCE, site.backend().rehearse()).await;
    assert_eq!(rehearsed.expect("nobody is waited for").unwrap(), [""; 0]);
    let used = format!("SELECT CAST(IS_USED_LOCK('{}') AS SIGNED)", site.table());
    assert_eq!(other.number(&used).await, ruby.number("SELECT CAST(CONNECTION_ID() AS SIGNED)").await, "it stays where it was");
    ruby.unlock().await;
}

#[tokio::test]
async fn what_is_in_the_way_is_told() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    let refuse = "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not here'";
    for (when, ours) in [("INSERT", "{t}"), ("UPDATE", "{t}"), ("DELETE", "{t}"), ("INSERT", "{s}"), ("DELETE", "{s}")] {
        ruby.run_raw(&format!("CREATE TRIGGER refuse BEFORE {when} ON {ours} FOR EACH ROW {refuse}")).await;
        let told = site.backend().rehearse().await.unwrap();
        assert_eq!(told, ["a task cannot be stored, claimed and settled: not here"], "{when} on {ours}");
        ruby.run_raw("DROP TRIGGER refuse").await;
    }
    ruby.run("ALTER TABLE {t} ENGINE=MyISAM").await;
    let told = site.backend().rehearse().await.unwrap();
    assert_eq!(told.len(), 1);
    assert!(told[0].starts_with(&format!("table {} is MyISAM; a host needs InnoDB", site.table())), "{told:?}");
    assert_eq!(ruby.number("SELECT COUNT(*) FROM {t}").await, 0, "what cannot be taken back is not done");
}
