//! `laelaps check` does what a host does, and names what the database does not let it do.

use laelaps_tests::{Database, Site, on};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection, PgConnection};

/// A site whose tables another user made, for a user of its own; and that user's URL.
struct Shared {
    site: Site,
    user: String,
}

impl Shared {
    async fn new() -> Self {
        let site = Site::new().await;
        site.plug_guest("zoo");
        site.queue().await.close().await;
        let (_, database) = site.url().rsplit_once('/').unwrap();
        let user = format!("u_{}", &database[database.len().saturating_sub(20)..]);
        let shared = Self { user, site };
        let login = match shared.site.database() {
            Database::Postgres => format!("CREATE USER {0}; GRANT USAGE ON SCHEMA laelaps TO {0}", shared.user),
            _ => format!("CREATE USER {}@'127.0.0.1'", shared.user),
        };
        shared.as_owner(&login).await;
        let old = if shared.site.database() == Database::Postgres { "postgres@" } else { "root@" };
        shared.site.configure(json!({ "url": shared.site.url().replace(old, &format!("{}@", shared.user)) }));
        shared
    }

    async fn as_owner(&self, sql: &str) {
        let sql = AssertSqlSafe(sql.replace("USER_NAME", &self.user));
        if self.site.database() == Database::Postgres {
            let mut connection = PgConnection::connect(self.site.url()).await.unwrap();
            sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
            connection.close().await.unwrap();
        } else {
            let mut connection = MySqlConnection::connect(self.site.url()).await.unwrap();
            sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
            connection.close().await.unwrap();
        }
    }

    /// What `check` complains of; empty if it is content.
    async fn complaints(&self) -> String {
        let told = self.site.laelaps(["-c", "laelaps.yml", "check"]).await;
        assert_eq!(told.code, Some(if told.stderr.is_empty() { 0 } else { 4 }), "{}", told.stderr);
        told.stderr
    }

    /// The check has left nothing behind: no task, and no count of one.
    async fn is_untouched(&self) {
        let queue = self.site.queue().await;
        let stats = queue.stats().await.unwrap();
        assert_eq!((stats.ready, stats.failed, stats.types.len()), (0, 0, 0), "{stats:?}");
        queue.close().await;
        self.as_owner(if self.site.database() == Database::Postgres {
            "DROP OWNED BY USER_NAME; DROP USER USER_NAME"
        } else {
            "DROP USER USER_NAME@'127.0.0.1'"
        })
        .await;
    }
}

async fn a_role_without_sequences_is_told_by_check() {
    let shared = Shared::new().await;
    shared.as_owner("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA laelaps TO USER_NAME").await;
    let told = shared.complaints().await;
    for sequence in ["lease_number", "pick_number", "task_number"] {
        assert!(told.contains(&format!("a host could not work: no SELECT, USAGE on sequence laelaps.{sequence}")), "{told}");
    }
    shared.as_owner("GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA laelaps TO USER_NAME").await;
    assert_eq!(shared.complaints().await, "");
    shared.as_owner("REVOKE UPDATE, DELETE ON laelaps.ready FROM USER_NAME").await;
    let told = shared.complaints().await;
    assert!(told.contains("no DELETE, UPDATE on table laelaps.ready"), "{told}");
    shared.as_owner("GRANT UPDATE, DELETE ON laelaps.ready TO USER_NAME").await;
    shared.as_owner("ALTER ROLE USER_NAME SET default_transaction_read_only = on").await;
    let told = shared.complaints().await;
    assert!(told.contains("read-only transaction"), "{told}");
    shared.is_untouched().await;
}

async fn a_user_without_a_privilege_is_told_by_check() {
    let shared = Shared::new().await;
    let (_, database) = shared.site.url().rsplit_once('/').unwrap();
    let grant = |what: &str| format!("GRANT {what} ON {database}.* TO USER_NAME@'127.0.0.1'");
    shared.as_owner(&grant("SELECT, INSERT, UPDATE")).await;
    let told = shared.complaints().await;
    assert!(told.contains("a host could not work: no DELETE on table laelaps_ready"), "{told}");
    shared.as_owner(&grant("DELETE")).await;
    assert_eq!(shared.complaints().await, "", "these are all that a host needs");
    shared
        .as_owner(
            "CREATE TRIGGER refuse BEFORE INSERT ON laelaps_tally FOR EACH ROW SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no'",
        )
        .await;
    let told = shared.complaints().await;
    assert!(told.contains("a task cannot be stored, claimed and settled: no"), "{told}");
    shared.as_owner("DROP TRIGGER refuse").await;
    shared.is_untouched().await;
}

mod on_postgres {
    use super::{Database, on};

    #[tokio::test]
    async fn a_role_without_sequences_is_told_by_check() {
        Box::pin(on(Database::Postgres, super::a_role_without_sequences_is_told_by_check())).await;
    }
}

mod on_mariadb {
    use super::{Database, on};

    #[tokio::test]
    async fn a_user_without_a_privilege_is_told_by_check() {
        Box::pin(on(Database::MariaDb, super::a_user_without_a_privilege_is_told_by_check())).await;
    }
}
