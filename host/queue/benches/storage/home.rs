//! Where the tasks of a measurement are.

use laelaps_queue::{Config, Queue};
use laelaps_test_databases::{Durability, mariadb, postgres};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, MySqlConnection, PgConnection};
use tempfile::TempDir;

/// A database of one kind.
pub(crate) enum Home {
    Sqlite,
    Postgres(postgres::Server),
    MariaDb(mariadb::Server),
}

/// A queue without tasks.
pub(crate) struct Fresh {
    pub(crate) queue: Queue,
    pub(crate) url: String,
    _folder: Option<TempDir>,
}

/// Whether there is such a part for this database.
pub(crate) fn has_part(database: &str, part: &str) -> bool {
    match part {
        "pinned" => database == "postgres",
        "producers" => database != "sqlite",
        "perfectqueue" => database == "mariadb",
        _ => true,
    }
}

impl Home {
    pub(crate) async fn start(database: &str) -> Self {
        match database {
            "sqlite" => Self::Sqlite,
            "postgres" => Self::Postgres(postgres::Server::start(Durability::Disk).await),
            _ => Self::MariaDb(mariadb::Server::start(Durability::Disk).await),
        }
    }

    /// Its word.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Postgres(_) => "postgres",
            Self::MariaDb(_) => "mariadb",
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Sqlite => "SQLite in WAL, synchronous=FULL",
            Self::Postgres(_) => "PostgreSQL as installed",
            Self::MariaDb(_) => "MariaDB, innodb_flush_log_at_trx_commit=1",
        }
    }

    /// An empty place: the URL, and what keeps it.
    pub(crate) async fn place(&self) -> (String, Option<TempDir>) {
        match self {
            Self::Sqlite => {
                let folder = tempfile::tempdir().unwrap();
                (format!("sqlite:{}", folder.path().join("queue.db").display()), Some(folder))
            }
            Self::Postgres(server) => (server.create_database().await, None),
            Self::MariaDb(server) => (server.create_database().await, None),
        }
    }

    pub(crate) async fn fresh(&self) -> Fresh {
        let (url, folder) = self.place().await;
        let queue = Queue::open(&Config::new(url.as_str())).await.unwrap();
        queue.init().await.unwrap();
        Fresh { queue, url, _folder: folder }
    }
}

impl Fresh {
    /// End it; on a server the database goes as well, with what is written of it later.
    pub(crate) async fn drop(self) {
        self.queue.close().await;
        drop_database(&self.url).await;
    }
}

/// Remove a database of a server.
pub(crate) async fn drop_database(url: &str) {
    let Some((server, name)) = url.rsplit_once('/').filter(|_| !url.starts_with("sqlite:")) else { return };
    if url.starts_with("postgres:") {
        let mut connection = PgConnection::connect(&format!("{server}/postgres")).await.unwrap();
        connection.execute(sqlx::raw_sql(AssertSqlSafe(format!("DROP DATABASE {name} WITH (FORCE)")))).await.unwrap();
    } else {
        let mut connection = MySqlConnection::connect(&format!("{server}/mysql")).await.unwrap();
        connection.execute(sqlx::raw_sql(AssertSqlSafe(format!("DROP DATABASE {name}")))).await.unwrap();
    }
}

/// Have written down what is about to be: it would be somebody else's burden.
pub(crate) async fn settle_down(url: &str) {
    if url.starts_with("postgres:") {
        PgConnection::connect(url).await.unwrap().execute("CHECKPOINT").await.unwrap();
    } else if url.starts_with("sqlite:") {
        sqlite(url).await.execute("PRAGMA wal_checkpoint(TRUNCATE)").await.unwrap();
    }
    // InnoDB writes its pages down at its own pace.
}

/// A connection as the crate's writer has it.
pub(crate) async fn sqlite(url: &str) -> SqliteConnection {
    SqliteConnectOptions::new()
        .filename(url.strip_prefix("sqlite:").unwrap())
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("wal_autocheckpoint", "4000")
        .pragma("cache_size", "-65536")
        .pragma("temp_store", "MEMORY")
        .disable_statement_logging()
        .connect()
        .await
        .unwrap()
}
