//! The lock of the table's name, MySQL's GET_LOCK, which every worker holds while it acquires.
//!
//! Whoever waits for it keeps its place among those that wait, which Ruby's workers do for ten seconds. A host that is told to stop must not wait that long, so a
//! wait is a task of its own ([`Wait`]): a claim looks at it for [`ANSWER_AFTER`] and then answers that there is nothing yet; the next one looks again.
//! A lock that nobody fetches is given back at once, by closing the connection.
//!
//! The server bounds how long a host that is frozen or cut off can hold it: a session that holds the lock and sends nothing for [`HELD_SECONDS`]
//! is ended.

use std::time::Duration;

use sqlx::mysql::MySqlConnection;
use sqlx::{AssertSqlSafe, Row as _};
use tokio::sync::{mpsc, oneshot};

/// How long the lock is waited for, in seconds. PerfectQueue's number.
pub(super) const WAIT_SECONDS: u32 = 10;
/// How long a claim waits before it answers that it has no lock yet.
pub(super) const ANSWER_AFTER: Duration = Duration::from_millis(100);
/// The same of a claim that wants a task to run alone: its host has come to rest for it, and takes others instead after an empty answer.
pub(super) const ANSWER_ALONE_AFTER: Duration = Duration::from_secs(1);
/// How long a lock that was had waits for a claim to fetch it.
const FETCHED_WITHIN: Duration = Duration::from_millis(250);
/// How long the server may take beyond the wait until it counts as silent.
const SILENCE: Duration = Duration::from_secs(10);
/// How long a session that holds the lock may send nothing before the server ends it, in seconds.
const HELD_SECONDS: u32 = 5;

/// The name as a statement has it, whatever characters it consists of.
fn literal(name: &str) -> String {
    let digits: String = name.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("CONVERT(x'{digits}' USING utf8mb4)")
}

/// Get the lock if it is free.
pub(super) async fn try_lock(name: &str, connection: &mut MySqlConnection) -> Result<bool, sqlx::Error> {
    let sql = format!("SET SESSION wait_timeout = {HELD_SECONDS}; SELECT GET_LOCK({}, 0)", literal(name));
    answer(sql, connection).await
}

/// Give it back.
pub(super) async fn unlock(name: &str, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    let sql = format!("DO RELEASE_LOCK({}); SET SESSION wait_timeout = DEFAULT", literal(name));
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
}

/// Have the lock and give it back, in one statement. Answers what is wrong, in words; that somebody else has it is not.
pub(super) async fn rehearse(name: &str, connection: &mut MySqlConnection) -> Result<Option<String>, sqlx::Error> {
    let name = literal(name);
    let sql = format!("SELECT GET_LOCK({name}, 0), RELEASE_LOCK({name})");
    let told = |server: &str| Some(format!("the table's lock, under which tasks are acquired, is not to be had: {server}"));
    match sqlx::raw_sql(AssertSqlSafe(sql)).fetch_one(connection).await {
        Ok(row) => Ok(row.try_get::<Option<i64>, _>(0)?.map_or_else(|| told("GET_LOCK answers NULL"), |_| None)),
        Err(error) => match error.as_database_error() {
            Some(server) => Ok(told(server.message())),
            None => Err(error),
        },
    }
}

async fn answer(sql: String, connection: &mut MySqlConnection) -> Result<bool, sqlx::Error> {
    let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await?;
    let answer: Option<i64> = rows.last().ok_or(sqlx::Error::RowNotFound)?.try_get(0)?;
    Ok(answer == Some(1))
}

/// How a wait ended.
pub(super) enum Waited {
    /// The session of this connection has the lock.
    Had(MySqlConnection),
    /// Somebody else kept it all the time.
    Kept(MySqlConnection),
    Failed(sqlx::Error),
}

/// A wait for the lock. Dropped, it closes its connection.
#[derive(Debug)]
pub(super) struct Wait {
    fetches: mpsc::Sender<oneshot::Sender<Waited>>,
    /// Never sent: dropped with the wait.
    _alive: oneshot::Sender<()>,
}

impl Wait {
    /// Wait on this connection, whose session has tried in vain.
    pub(super) fn begin(name: &str, connection: MySqlConnection) -> Self {
        let (fetches, asked) = mpsc::channel(4);
        let (alive, gone) = oneshot::channel();
        let sql = format!("SELECT GET_LOCK({}, {WAIT_SECONDS})", literal(name));
        tokio::spawn(async move { wait(sql, connection, asked, gone).await });
        Self { fetches, _alive: alive }
    }

    /// Ask for its end. The answer comes when it has ended; one that is not listened to leaves the lock to the next who asks.
    pub(super) async fn fetch(&self) -> oneshot::Receiver<Waited> {
        let (fetch, waited) = oneshot::channel();
        // A wait that is over already has closed its connection: the receiver is told so.
        let _ = self.fetches.send(fetch).await;
        waited
    }
}

async fn wait(
    sql: String,
    mut connection: MySqlConnection,
    mut asked: mpsc::Receiver<oneshot::Sender<Waited>>,
    mut gone: oneshot::Receiver<()>,
) {
    let longest = Duration::from_secs(WAIT_SECONDS.into()) + SILENCE;
    let locked = tokio::select! {
        locked = tokio::time::timeout(longest, answer(sql, &mut connection)) => locked,
        _ = &mut gone => return,
    };
    let mut waited = match locked {
        Ok(Ok(true)) => Waited::Had(connection),
        Ok(Ok(false)) => Waited::Kept(connection),
        Ok(Err(error)) => Waited::Failed(error),
        Err(_) => {
            let words = "the server gave no answer about the lock";
            Waited::Failed(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, words)))
        }
    };
    while let Ok(Some(fetch)) = tokio::time::timeout(FETCHED_WITHIN, asked.recv()).await {
        match fetch.send(waited) {
            Ok(()) => return,
            // That claim has answered by now.
            Err(not_fetched) => waited = not_fetched,
        }
    }
}
