//! The way to a MySQL or MariaDB server: its URL, encryption, what every session is set to, and the pool. Both kinds of tables use it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlPool, MySqlPoolOptions, MySqlSslMode};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Row as _};

use super::failure::{Place, number};
use super::rows::PACKET_BYTES_MIN;
use crate::patience::Patience;
use crate::{Config, Connections, Error, Result, Tls};

/// How long a session waits for a row that another one keeps locked, in seconds.
pub(crate) const LOCK_WAIT_SECONDS: u32 = 10;
/// How long the server waits for the next statement of a transaction, in seconds. Then it ends the session: its host is frozen or cut off, and
/// others wait for what it holds.
pub(crate) const IDLE_TRANSACTION_SECONDS: u32 = 5;
/// Prepared statements that a connection keeps.
const STATEMENTS_KEPT: usize = 200;
/// The first pause before another try to connect, and the longest.
const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// A connection that nobody needs is closed after this.
const IDLE: Duration = Duration::from_secs(300);
/// No connection lives longer, so that a change of the server behind a name is noticed.
const LIFETIME: Duration = Duration::from_secs(300);

/// What a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    /// MariaDB, or MySQL.
    pub(crate) mariadb: bool,
    /// Its version as it says it.
    pub(crate) version: String,
    major: u32,
    minor: u32,
    /// The most bytes of a statement (max_allowed_packet).
    pub(crate) packet_bytes: usize,
    /// Its binary log has statements, which each session has to change for itself.
    logs_statements: bool,
}

impl Server {
    /// Read what `SELECT VERSION()` says.
    fn of(version: &str) -> Self {
        let mariadb = version.to_ascii_lowercase().contains("mariadb");
        // For the sake of old clients some MariaDB servers put 5.5.5- before their version.
        let plain = if mariadb { version.strip_prefix("5.5.5-").unwrap_or(version) } else { version };
        let mut numbers = plain.split(|character: char| !character.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
        let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        Self { mariadb, version: version.to_owned(), major, minor, packet_bytes: usize::MAX, logs_statements: false }
    }

    /// SKIP LOCKED and JSON_TABLE are in MySQL from 8.0 on, in MariaDB from 10.6 on.
    fn is_new_enough(&self) -> bool {
        (self.major, self.minor) >= if self.mariadb { (10, 6) } else { (8, 0) }
    }
}

/// The way to a server.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    pub(crate) options: MySqlConnectOptions,
    pub(crate) place: Place,
    connections: Connections,
    /// Connections that are older than this are not used again.
    forgotten: Arc<Mutex<Option<Instant>>>,
}

impl Access {
    /// Read the configuration without connecting.
    ///
    /// # Errors
    /// [`Error::Config`] for a URL that cannot be used.
    pub(crate) fn new(config: &Config) -> Result<Self> {
        let place = Place::of(config.place());
        let options = options(&config.url, &config.connections)?;
        Ok(Self { options, place, connections: config.connections.clone(), forgotten: Arc::default() })
    }

    /// One connection, set up as all are, and what server it leads to.
    ///
    /// # Errors
    /// [`Error::Connect`] if the server cannot be reached, does not let us in, or is too old.
    pub(crate) async fn connect(&self) -> Result<(MySqlConnection, Server)> {
        let connecting = async {
            let mut connection = self.options.connect().await?;
            const ABOUT: &str = "SELECT VERSION(), CAST(@@max_allowed_packet AS UNSIGNED)";
            let (version, packet_bytes): (String, u64) = sqlx::query_as(ABOUT).fetch_one(&mut connection).await?;
            let mut server = Server::of(&version);
            server.packet_bytes = usize::try_from(packet_bytes).unwrap_or(usize::MAX);
            if server.is_new_enough() {
                server.logs_statements = logs_statements(&mut connection).await;
                self.set_up(&mut connection, &server).await?;
            }
            Ok::<_, sqlx::Error>((connection, server))
        };
        let connected = match tokio::time::timeout(self.connections.connect_timeout, connecting).await {
            Ok(connected) => connected.map_err(|source| self.refused(source))?,
            Err(_) => return Err(self.place.silent(self.connections.connect_timeout)),
        };
        let problem = match &connected.1 {
            server if !server.is_new_enough() => self.place.too_old(&server.version),
            server if server.packet_bytes < PACKET_BYTES_MIN => self.place.small_packets(server.packet_bytes, PACKET_BYTES_MIN),
            _ => return Ok(connected),
        };
        // The answer is given already; a goodbye that fails changes nothing.
        let _ = tokio::time::timeout(self.connections.connect_timeout, connected.0.close()).await;
        Err(problem)
    }

    /// The error of a session that did not come about. Only one of its settings needs a privilege.
    fn refused(&self, source: sqlx::Error) -> Error {
        match number(&source) {
            Some(1227) => self.place.statement_log(source),
            _ => self.place.connecting(source),
        }
    }

    /// Use no connection again that there is now: the server behind them is not the primary any more.
    pub(crate) fn forget_connections(&self) {
        *self.forgotten.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// As [`Access::connect`], tried again for as long as `patience` says if the server cannot be reached.
    ///
    /// # Errors
    /// As [`Access::connect`].
    pub(crate) async fn connect_with_patience(&self, patience: Duration) -> Result<(MySqlConnection, Server)> {
        let mut patience = Patience::new(patience);
        let mut pause = PAUSE_FIRST;
        loop {
            match self.connect().await {
                Err(error) if error.is_retryable() && patience.lasts(pause) => {}
                connected => return connected,
            }
            tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// A pool of such connections, made when they are needed.
    pub(crate) fn pool(&self, server: &Server) -> MySqlPool {
        let (setup, forgotten) = (self.setup(server), Arc::clone(&self.forgotten));
        MySqlPoolOptions::new()
            .max_connections(self.connections.max)
            .acquire_timeout(self.acquire_timeout())
            .idle_timeout(IDLE)
            .max_lifetime(LIFETIME)
            .before_acquire(move |_, connection| {
                let forgotten = *forgotten.lock().unwrap_or_else(PoisonError::into_inner);
                let is_of_use = forgotten.is_none_or(|forgotten| forgotten.elapsed() >= connection.age);
                Box::pin(async move { Ok(is_of_use) })
            })
            // A connection that has died is found out by its first statement, after which the operation is tried on another.
            .test_before_acquire(false)
            .after_connect(move |connection, _| {
                let setup = setup.clone();
                Box::pin(async move { sqlx::raw_sql(AssertSqlSafe(setup)).execute(connection).await.map(drop) })
            })
            .connect_lazy_with(self.options.clone())
    }

    /// How long to wait for a connection: the pool's own retries of a refused connection included.
    fn acquire_timeout(&self) -> Duration {
        self.connections.connect_timeout.max(Duration::from_secs(1))
    }

    async fn set_up(&self, connection: &mut MySqlConnection, server: &Server) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(self.setup(server))).execute(connection).await.map(drop)
    }

    /// What every session is set to, in one go.
    fn setup(&self, server: &Server) -> String {
        let timeout = self.connections.statement_timeout;
        // MySQL only stops statements that read; what writes there is held to the time by its caller.
        let limit = if server.mariadb {
            format!("max_statement_time = {}", timeout.as_secs_f64())
        } else {
            format!("max_execution_time = {}", timeout.as_millis().min(u128::from(u32::MAX)))
        };
        // On MySQL there is no such limit; a transaction sets wait_timeout for itself. A walk over users' tasks has a step for each task.
        let of_kind = if server.mariadb {
            format!("idle_transaction_timeout = {IDLE_TRANSACTION_SECONDS}, max_recursive_iterations = {STEPS_MAX}")
        } else {
            format!("cte_max_recursion_depth = {STEPS_MAX}")
        };
        let log = if server.logs_statements { "; SET SESSION binlog_format = 'ROW'" } else { "" };
        format!(
            "SET NAMES utf8mb4; SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE; \
            SET SESSION time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', autocommit = 1, \
            completion_type = 'NO_CHAIN', sql_safe_updates = 0, sql_select_limit = 18446744073709551615, sql_big_selects = 1, \
            sql_auto_is_null = 0, innodb_lock_wait_timeout = {LOCK_WAIT_SECONDS}, {of_kind}, {limit}{log}"
        )
    }
}

/// Steps of one recursive query, more than a claim ever takes.
const STEPS_MAX: u32 = 10_000;

/// Whether the binary log has statements, as far as the server tells. InnoDB refuses to write READ COMMITTED transactions into such a one (1665).
async fn logs_statements(connection: &mut MySqlConnection) -> bool {
    const LOG: &str = "SELECT @@log_bin = 1 AND @@binlog_format = 'STATEMENT'";
    // A server that does not know the setting has only rows.
    sqlx::query_scalar::<_, bool>(LOG).fetch_one(connection).await.unwrap_or(false)
}

/// The driver's options.
fn options(url: &str, connections: &Connections) -> Result<MySqlConnectOptions> {
    let problem = |problem: String| Error::Config { setting: "url", problem };
    let (scheme, rest) =
        url.split_once("://").ok_or_else(|| problem("write mysql://USER:PASSWORD@HOST:PORT/DATABASE".to_owned()))?;
    // The driver's own words may tell the password. Ruby's programs write ssl_mode.
    let plain = format!("mysql://{}", rest.replace("ssl_mode=", "ssl-mode=").replace("ssl_ca=", "ssl-ca="));
    let parsed: Result<MySqlConnectOptions, sqlx::Error> = plain.parse();
    let mut options = parsed.map_err(|_| {
        problem(format!(
            "the part behind {scheme}:// cannot be read; write USER:PASSWORD@HOST:PORT/DATABASE, special characters as %40"
        ))
    })?;
    if options.get_database().is_none_or(str::is_empty) {
        return Err(problem(format!("names no database; write {scheme}://USER:PASSWORD@HOST:PORT/DATABASE")));
    }
    if let Some(tls) = connections.encryption() {
        options = options.ssl_mode(match tls {
            Tls::Disabled => MySqlSslMode::Disabled,
            Tls::Preferred => MySqlSslMode::Preferred,
            Tls::Required => MySqlSslMode::Required,
            Tls::VerifyAuthority => MySqlSslMode::VerifyCa,
            Tls::VerifyIdentity => MySqlSslMode::VerifyIdentity,
        });
    }
    if let Some(authority) = &connections.certificate_authority {
        options = options.ssl_ca(authority);
    }
    // The session is set up in one statement of ours instead.
    Ok(options
        .statement_cache_capacity(STATEMENTS_KEPT)
        .pipes_as_concat(false)
        .no_engine_substitution(false)
        .timezone(None::<String>)
        .set_names(false)
        .disable_statement_logging())
}

/// A column of bytes that are text in UTF-8; what somebody else wrote there otherwise is shown as far as it can be.
pub(crate) fn text(row: &sqlx::mysql::MySqlRow, place: usize) -> Result<String, sqlx::Error> {
    let bytes: Vec<u8> = row.try_get(place)?;
    Ok(String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: &str) -> Config {
        Config::new(url)
    }

    #[test]
    fn versions_are_told_apart() {
        let old = ["5.7.44-log", "10.5.23-MariaDB", "5.5.5-10.3.39-MariaDB"];
        let new = ["8.0.36", "8.4.0", "9.1.0", "10.6.0-MariaDB", "5.5.5-10.11.6-MariaDB-0+deb12u1", "11.4.2-MariaDB"];
        for version in old {
            assert!(!Server::of(version).is_new_enough(), "{version}");
        }
        for version in new {
            assert!(Server::of(version).is_new_enough(), "{version}");
        }
        assert!(Server::of(new[4]).mariadb && !Server::of(new[0]).mariadb);
    }

    #[test]
    fn the_three_schemes_and_rubys_options_are_read() {
        for url in [
            "mysql://u:p%40ss@db:3307/q",
            "mysql2://u:p%40ss@db:3307/q?encoding=utf8mb4",
            "mariadb://u:p%40ss@db:3307/q?ssl_mode=required",
        ] {
            let access = Access::new(&config(url)).unwrap();
            assert_eq!((access.options.get_host(), access.options.get_port()), ("db", 3307));
            assert_eq!((access.options.get_username(), access.options.get_database()), ("u", Some("q")));
        }
        let required = Access::new(&config("mysql2://u@db/q?ssl_mode=required")).unwrap();
        assert!(matches!(required.options.get_ssl_mode(), MySqlSslMode::Required));
    }

    #[test]
    fn a_url_that_cannot_be_used_is_refused_without_its_password() {
        let cases = [
            ("mysql:q", "url: write mysql://USER:PASSWORD@HOST:PORT/DATABASE"),
            ("mysql://u:secret@db", "url: names no database; write mysql://USER:PASSWORD@HOST:PORT/DATABASE"),
            ("mysql2://u:secret@db:x/q", "url: the part behind mysql2:// cannot be read"),
        ];
        for (url, expected) in cases {
            let told = Access::new(&config(url)).unwrap_err().to_string();
            assert!(told.starts_with(expected) && !told.contains("secret"), "{told}");
        }
    }
}
