//! A database server that only one test uses, because it is killed, cut off, or takes no writes.

use laelaps_test_databases::{Durability, mariadb, postgres};
use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection, PgConnection};

use crate::Database;

/// A server of either kind.
pub enum Server {
    /// PostgreSQL.
    Postgres(postgres::Server),
    /// MariaDB.
    MariaDb(mariadb::Server),
}

impl Server {
    /// Starts one for this kind of database.
    ///
    /// # Panics
    /// If it does not start, or the database is none of a server.
    pub async fn start(database: Database) -> Self {
        match database {
            Database::Postgres => Self::Postgres(postgres::Server::start(Durability::Process).await),
            Database::MariaDb | Database::PerfectQueue => Self::MariaDb(mariadb::Server::start(Durability::Process).await),
            Database::Sqlite => panic!("SQLite has no server"),
        }
    }

    /// Makes an empty database; answers its URL.
    pub async fn create_database(&self) -> String {
        match self {
            Self::Postgres(server) => server.create_database().await,
            Self::MariaDb(server) => server.create_database().await,
        }
    }

    /// The same database for a user who may do everything in it, and nothing to the server: an administrator is not held to `read_only`.
    ///
    /// # Panics
    /// If the server does not answer.
    pub async fn as_mere_user(&self, url: &str) -> String {
        match self {
            Self::Postgres(_) => url.to_owned(),
            Self::MariaDb(server) => {
                let (_, database) = url.rsplit_once('/').expect("a URL names its database");
                let mut root = MySqlConnection::connect(&server.url("mysql")).await.expect("the server answers");
                let user = format!("CREATE USER mere@'127.0.0.1'; GRANT ALL ON {database}.* TO mere@'127.0.0.1'");
                sqlx::raw_sql(AssertSqlSafe(user)).execute(&mut root).await.expect("the server answers");
                url.replace("root@", "mere@")
            }
        }
    }

    /// Takes no writes any more, as after a failover; or takes them again.
    ///
    /// # Panics
    /// If the server does not answer.
    pub async fn takes_writes(&self, writes: bool) {
        match self {
            Self::Postgres(server) => {
                let word = if writes { "off" } else { "on" };
                let mut admin = PgConnection::connect(&server.url("postgres")).await.expect("the server answers");
                for sql in [
                    "SET default_transaction_read_only = off".to_owned(),
                    format!("ALTER SYSTEM SET default_transaction_read_only = {word}"),
                    "SELECT pg_reload_conf()".to_owned(),
                ] {
                    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut admin).await.expect("the server answers");
                }
            }
            Self::MariaDb(server) => {
                let mut root = MySqlConnection::connect(&server.url("mysql")).await.expect("the server answers");
                let sql = format!("SET GLOBAL read_only = {}", i32::from(!writes));
                sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut root).await.expect("the server answers");
            }
        }
    }

    /// Kills it (`kill -9`), with all its processes.
    pub fn kill(&mut self) {
        match self {
            Self::Postgres(server) => server.kill(),
            Self::MariaDb(server) => server.kill(),
        }
    }

    /// Starts it again on its data, and waits until it serves.
    pub async fn restart(&mut self) {
        match self {
            Self::Postgres(server) => server.restart().await,
            Self::MariaDb(server) => server.restart().await,
        }
    }

    /// How many connections to the database there are, without the one that asks.
    ///
    /// # Panics
    /// If the server does not answer.
    pub async fn connections(&self, url: &str) -> usize {
        let count: i64 = match self {
            Self::Postgres(_) => {
                const COUNT: &str =
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()";
                let mut connection = PgConnection::connect(url).await.expect("the server answers");
                sqlx::query_scalar(COUNT).fetch_one(&mut connection).await.expect("the server answers")
            }
            Self::MariaDb(_) => {
                const COUNT: &str =
                    "SELECT count(*) FROM information_schema.processlist WHERE db = database() AND id <> connection_id()";
                let mut connection = MySqlConnection::connect(url).await.expect("the server answers");
                sqlx::query_scalar(COUNT).fetch_one(&mut connection).await.expect("the server answers")
            }
        };
        usize::try_from(count).expect("the server answers")
    }

    /// Cuts every connection to the database; answers how many.
    ///
    /// # Panics
    /// If the server does not answer.
    pub async fn cut(&self, url: &str) -> usize {
        match self {
            Self::Postgres(_) => {
                const CUT: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE datname = current_database() AND pid <> pg_backend_pid()";
                let mut connection = PgConnection::connect(url).await.expect("the server answers");
                sqlx::query(CUT).fetch_all(&mut connection).await.expect("the server answers").len()
            }
            Self::MariaDb(_) => {
                const THERE: &str = "SELECT CAST(id AS SIGNED) FROM information_schema.processlist WHERE db = database() AND id <> connection_id()";
                let mut connection = MySqlConnection::connect(url).await.expect("the server answers");
                let there: Vec<i64> = sqlx::query_scalar(THERE).fetch_all(&mut connection).await.expect("the server answers");
                for id in &there {
                    // It may have ended meanwhile.
                    let _ = sqlx::query(AssertSqlSafe(format!("KILL {id}"))).execute(&mut connection).await;
                }
                there.len()
            }
        }
    }
}
