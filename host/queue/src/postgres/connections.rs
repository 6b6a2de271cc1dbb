//! Connections: a few, kept open, each used by one operation at a time.
//!
//! Not the driver's pool, which asks the server for a sign of life whenever a connection comes back: for statements as short as ours that is
//! a good part of the work. An operation here runs to its end whether or not its caller waits, so that a connection comes back outside a
//! transaction, or not at all; one that has died in the meantime is noticed by its next operation, which begins again on another.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgConnection, PgSslMode};
use sqlx::{ConnectOptions, Connection, Row as _};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::failure::{self, Failure};
use super::pooled::Pooler;
use crate::patience::Patience;
use crate::{Config, Error, Result, Tls};

/// The oldest version that keeps all promises.
const VERSION_MIN: u32 = 140_000;
/// Longest pause between two tries to connect.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// How long the server lets a transaction of ours be idle, which it only is if this program was stopped or cut off in the middle of it. What it
/// holds is in the way of others.
pub(super) const IDLE_IN_TRANSACTION_MAX: Duration = Duration::from_secs(5);
/// How long a connection lives, drawn evenly from this to twice as long: after a failover by name, or behind a balancer, a new one may lead
/// elsewhere.
const LIFE: Duration = Duration::from_secs(150);

/// How every connection is set up. All statements are made to go through an index, whatever the planner believes about a table that was
/// empty a moment ago: it would remember a plan for few rows while the table grows.
const SETTINGS: [(&str, &str); 7] = [
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("jit", "off"),
    ("default_transaction_isolation", "read committed"),
    ("lock_timeout", "0"),
];

#[derive(Debug)]
pub(super) struct Connections {
    options: PgConnectOptions,
    /// What stands between this program and the server, if anything does.
    pooler: Option<Pooler>,
    place: String,
    connect_timeout: Duration,
    statement_timeout: Duration,
    permits: Semaphore,
    idle: Mutex<Idle>,
}

#[derive(Debug, Default)]
struct Idle {
    connections: Vec<Open>,
    /// Raised whenever all connections are given up; those in use go when they come back.
    age: u64,
}

/// A connection, and how long it may be used.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) connection: PgConnection,
    age: u64,
    ends_at: Instant,
}

/// Leave to use a connection.
pub(super) struct Turn<'c> {
    owner: &'c Connections,
    permit: SemaphorePermit<'c>,
}

impl<'c> Turn<'c> {
    /// A connection that nobody else uses: an idle one, or a new one.
    pub(super) async fn take(self) -> Result<Taken<'c>, Failure> {
        let Self { owner, permit } = self;
        let open = match owner.idle_one() {
            Some(open) => open,
            None => owner.open_one().await?,
        };
        Ok(Taken { connection: Some(open), owner, _permit: permit })
    }
}

/// A connection in use. Dropped without [`Taken::give_back`], it is closed.
pub(super) struct Taken<'c> {
    pub(super) connection: Option<Open>,
    owner: &'c Connections,
    _permit: SemaphorePermit<'c>,
}

impl Taken<'_> {
    /// For the next operation; it must be outside a transaction.
    pub(super) fn give_back(self) {
        let mut idle = self.owner.lock();
        let age = idle.age;
        idle.connections.extend(self.connection.filter(|open| open.age == age));
    }
}

impl Connections {
    /// Read the configuration and look at the server, with patience if it cannot be reached.
    pub(super) async fn open(config: &Config) -> Result<Self> {
        let settings = &config.connections;
        let mut connections = Self {
            options: options(config, &session_settings(settings.statement_timeout))?,
            pooler: None,
            place: config.place(),
            connect_timeout: settings.connect_timeout,
            statement_timeout: settings.statement_timeout,
            permits: Semaphore::new(usize::try_from(settings.max.clamp(1, 100)).unwrap_or(1)),
            idle: Mutex::default(),
        };
        let mut patience = Patience::new(config.patience);
        let mut pause = Duration::from_millis(50);
        let mut is_bare = false;
        let open = loop {
            match connections.connect_and_look().await {
                Ok((open, pooler)) => {
                    connections.pooler = pooler;
                    break open;
                }
                // A pooler that takes no settings, not even in order to drop them; what the URL itself asks for is not left out for that.
                Err(failure) if failure.is_about_settings() && !is_bare => {
                    is_bare = true;
                    connections.options = options(config, &[])?.extra_float_digits(None);
                }
                Err(failure) if failure.is_lost() && patience.lasts(pause) => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                Err(failure) => return Err(failure.into_error("connecting", &connections.place)),
            }
        };
        connections.lock().connections.push(open);
        for warning in connections.pooler.iter().flat_map(Pooler::warnings) {
            tracing::warn!(place = connections.place, "{warning}");
        }
        Ok(connections)
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An idle connection that has not come to its end. Those that have are closed, without a word to the server.
    fn idle_one(&self) -> Option<Open> {
        let mut ended = Vec::new();
        let mut idle = self.lock();
        let now = Instant::now();
        let open = std::iter::from_fn(|| idle.connections.pop()).find_map(|open| {
            let lives = open.ends_at > now;
            if lives {
                Some(open)
            } else {
                ended.push(open);
                None
            }
        });
        drop(idle);
        open
    }

    async fn open_one(&self) -> Result<Open, Failure> {
        let age = self.lock().age;
        let connection = self.connect().await?;
        Ok(Open { connection, age, ends_at: Instant::now() + LIFE.mul_f64(1.0 + fastrand::f64()) })
    }

    async fn connect_and_look(&self) -> Result<(Open, Option<Pooler>), Failure> {
        let mut open = self.open_one().await?;
        let looked = tokio::time::timeout(self.silence_max(), self.look(&mut open.connection)).await;
        let pooler = looked.map_err(|_| Failure::silence(self.silence_max()))??;
        Ok((open, pooler))
    }

    /// Whether the server can be used as it is, and what stands before it.
    async fn look(&self, connection: &mut PgConnection) -> Result<Option<Pooler>> {
        const LOOK: &str = "SELECT current_setting('server_version'), current_setting('server_version_num')::int4,
            current_setting('server_encoding')";
        // Not prepared: a pooler may execute it in another session.
        let looked = async {
            let row = sqlx::raw_sql(LOOK).fetch_one(&mut *connection).await?;
            Ok::<(String, i32, String), sqlx::Error>((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
        };
        let (version, number, encoding) = looked.await.map_err(|error| failure::unconnected(error, &self.place))?;
        if number.unsigned_abs() < VERSION_MIN {
            let problem = format!("PostgreSQL {version} is too old; 14 is the oldest that can be used");
            return Err(failure::unusable(&self.place, problem, "upgrade the server"));
        }
        if encoding != "UTF8" {
            let problem = format!("the database's encoding is {encoding}, not UTF8");
            return Err(failure::unusable(&self.place, problem, "make a database with ENCODING 'UTF8'"));
        }
        Pooler::find(connection, &session_settings(self.statement_timeout))
            .await
            .map_err(|error| failure::unconnected(error, &self.place))
    }

    /// What stands between this program and the server, if anything does.
    pub(super) fn pooler(&self) -> Option<&Pooler> {
        self.pooler.as_ref()
    }

    pub(super) fn options(&self) -> &PgConnectOptions {
        &self.options
    }

    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// How long an operation may take before its connection is given up: longer than the server lets one statement take, so that it is
    /// only ever a server that does not answer at all.
    pub(super) fn silence_max(&self) -> Duration {
        self.statement_timeout + self.connect_timeout
    }

    pub(super) fn connect_timeout(&self) -> Duration {
        self.connect_timeout
    }

    /// Wait while as many connections are in use as there may be, for as long as one operation may take.
    pub(super) async fn turn(&self) -> Result<Turn<'_>, Failure> {
        let permit = tokio::time::timeout(self.silence_max(), self.permits.acquire()).await;
        let permit = permit.map_err(|_| Failure::from(sqlx::Error::PoolTimedOut))?.map_err(|_| Failure::from(Error::Closed))?;
        Ok(Turn { owner: self, permit })
    }

    async fn connect(&self) -> Result<PgConnection, Failure> {
        let connected = tokio::time::timeout(self.connect_timeout, self.options.connect()).await;
        match connected {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(Failure::from(failure::unconnected(error, &self.place))),
            Err(_) => {
                let words = format!("no answer within {} ms", self.connect_timeout.as_millis());
                let error = sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, words));
                Err(Failure::from(failure::unconnected(error, &self.place)))
            }
        }
    }

    /// Give up all connections: after one has died, or its server is not the primary any more, the others are most likely of no more use.
    pub(super) fn drop_all(&self) {
        let mut idle = self.lock();
        idle.age += 1;
        let gone = std::mem::take(&mut idle.connections);
        drop(idle);
        drop(gone);
    }

    /// End all; nobody uses one any more.
    pub(super) async fn close(&self) {
        self.permits.close();
        let idle = std::mem::take(&mut self.lock().connections);
        let closing = idle.into_iter().map(|open| tokio::time::timeout(self.connect_timeout, open.connection.close()));
        for closed in closing {
            if !matches!(closed.await, Ok(Ok(()))) {
                tracing::debug!(place = self.place, "a connection was cut instead of closed");
            }
        }
    }
}

/// What every session is set to.
fn session_settings(statement_timeout: Duration) -> Vec<(&'static str, String)> {
    let idle = IDLE_IN_TRANSACTION_MAX.as_millis().to_string();
    let timeouts =
        [("statement_timeout", statement_timeout.as_millis().to_string()), ("idle_in_transaction_session_timeout", idle)];
    SETTINGS.into_iter().map(|(name, value)| (name, value.to_owned())).chain(timeouts).collect()
}

/// What the driver has to know. What the URL says itself stands.
fn options(config: &Config, settings: &[(&'static str, String)]) -> Result<PgConnectOptions> {
    let problem = |error: sqlx::Error| Error::Config { setting: "url", problem: format!("cannot be read: {error}") };
    let mut options: PgConnectOptions = config.url.parse().map_err(problem)?;
    if options.get_application_name().is_none() {
        options = options.application_name("laelaps");
    }
    let said = options.get_options().unwrap_or_default().to_owned();
    for (name, value) in settings.iter().filter(|(name, _)| !said.contains(name)) {
        options = options.options([(name, value)]);
    }
    if let Some(tls) = config.connections.encryption() {
        options = options.ssl_mode(match tls {
            Tls::Disabled => PgSslMode::Disable,
            Tls::Preferred => PgSslMode::Prefer,
            Tls::Required => PgSslMode::Require,
            Tls::VerifyAuthority => PgSslMode::VerifyCa,
            Tls::VerifyIdentity => PgSslMode::VerifyFull,
        });
    }
    if let Some(authority) = &config.connections.certificate_authority {
        options = options.ssl_root_cert(authority);
    }
    Ok(options.disable_statement_logging())
}
