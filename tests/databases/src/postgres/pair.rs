//! Two servers of PostgreSQL, one of which follows the other by streaming replication and can take its place.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::chown;
use std::process::Command;

use rustix::process::Signal;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{Server, program};
use crate::guarded::Guarded;
use crate::server::{self, Durability, Extras, Going, Replication};
use crate::{Clock, LONG, eventually};

/// A standby comes back at once, and finds what it has missed.
const SETTINGS: [&str; 2] = ["wal_retrieve_retry_interval=100ms", "wal_keep_size=256MB"];

/// A primary and its standby.
#[derive(Debug)]
pub struct Pair {
    primary: Server,
    /// After a promotion the one that was the primary, until it [follows](Self::rejoin).
    standby: Server,
    replication: Replication,
    /// How the former primary went, if it does not follow yet.
    gone: Option<Going>,
}

impl Pair {
    /// Starts both, and waits until one follows the other.
    ///
    /// # Panics
    /// If it does not; PostgreSQL may be missing.
    pub async fn start(replication: Replication, clock: Option<&Clock>) -> Self {
        let primary = Server::start_with(Durability::Process, Extras::of_pair(&SETTINGS, clock)).await;
        let folder = server::folder();
        copy(&primary, folder.path());
        follow(folder.path(), primary.port);
        let standby = Server::start_in(folder, Durability::Process, Extras::of_pair(&SETTINGS, clock)).await;
        let pair = Self { primary, standby, replication, gone: None };
        pair.replicate().await;
        pair
    }

    /// The server that takes writes.
    pub fn primary(&self) -> &Server {
        &self.primary
    }

    /// Kills the primary (`kill -9`) and starts it again.
    pub async fn restart(&mut self) {
        self.primary.restart().await;
    }

    /// The standby hears nothing any more. Not for a pair whose commits wait for it.
    pub async fn fall_behind(&self) {
        set(&self.standby, "primary_conninfo = ''").await;
        eventually(LONG, "the standby hears nothing", async || {
            let hears: i64 = ask(&self.standby, "SELECT count(*) FROM pg_stat_wal_receiver").await;
            if hears == 0 { Ok(()) } else { Err(self.standby.log()) }
        })
        .await;
    }

    /// Lets the standby take the primary's place: afterwards it is [`Self::primary`], at another port, and has no standby. A standby that has not
    /// [fallen behind](Self::fall_behind) has all that was answered.
    ///
    /// # Panics
    /// If the standby does not become one.
    pub async fn promote(&mut self, going: Going) {
        if self.replication == Replication::Synchronous {
            self.standby_has_everything().await;
        }
        match going {
            Going::Dies => self.primary.kill(),
            Going::Lingers => {}
            Going::Leaves => self.primary.end().await,
        }
        reset(&self.standby, "synchronous_standby_names").await;
        let promoted: bool = ask(&self.standby, "SELECT pg_promote(true, 600)").await;
        assert!(promoted, "the standby does not become a primary: {}", self.standby.log());
        std::mem::swap(&mut self.primary, &mut self.standby);
        self.gone = Some(going);
    }

    /// Makes the former primary a standby of the new one, and waits until it is one. If it still runs, it is killed.
    pub async fn rejoin(&mut self) {
        let going = self.gone.take().expect("a primary that was replaced");
        self.standby.kill();
        let folder = self.standby.folder().to_path_buf();
        // One that left has nothing that the other lacks.
        if going != Going::Leaves {
            std::fs::remove_dir_all(folder.join("data")).expect("its files can be removed");
            copy(&self.primary, &folder);
        }
        follow(&folder, self.primary.port);
        self.standby.restart().await;
        self.replicate().await;
    }

    /// From now on commits wait for the standby, if they are to.
    async fn replicate(&self) {
        if self.replication == Replication::Synchronous {
            set(&self.primary, "synchronous_standby_names = '*'").await;
            self.standby_has_everything().await;
        }
    }

    /// Waits until the standby has all that anybody can have seen, and commits wait for it.
    async fn standby_has_everything(&self) {
        let now: String = ask(&self.primary, "SELECT pg_current_wal_flush_lsn()::text").await;
        let has = format!(
            "SELECT count(*) FROM pg_stat_replication
             WHERE state = 'streaming' AND sync_state = 'sync' AND flush_lsn >= '{now}'::pg_lsn"
        );
        eventually(LONG, "the standby has everything", async || {
            let standbys: i64 = ask(&self.primary, &has).await;
            if standbys == 1 { Ok(()) } else { Err(self.standby.log()) }
        })
        .await;
    }
}

impl Server {
    /// Ends it as its operator does: what it has is with its standby then.
    async fn end(&mut self) {
        self.signal(Signal::INT);
        let process = self.process.as_mut().expect("a running server");
        eventually(
            LONG,
            "PostgreSQL ends",
            async || if Guarded::has_ended(process) { Ok(()) } else { Err("it runs".to_owned()) },
        )
        .await;
        self.process = None;
    }
}

/// Times that a copy is begun. One that begins while its server has just been promoted may be broken off.
const COPIES_MAX: usize = 10;

/// Copies a running server into a folder.
fn copy(primary: &Server, folder: &std::path::Path) {
    for copies in 1.. {
        let mut backup = Command::new(program("pg_basebackup"));
        backup.arg("-D").arg(folder.join("data")).args(["-h", "127.0.0.1", "-U", "postgres", "-c", "fast", "--no-sync", "-p"]);
        backup.arg(primary.port.to_string()).current_dir(folder);
        // A copy that is broken off leaves nothing behind.
        match server::try_to_prepare(backup) {
            Ok(()) => return,
            Err(problem) => assert!(copies < COPIES_MAX, "{problem}"),
        }
    }
}

/// What is started on this folder is a standby.
fn follow(folder: &std::path::Path, primary: u16) {
    let settings = folder.join("data/postgresql.auto.conf");
    let mut file = OpenOptions::new().append(true).open(settings).expect("a server has settings");
    writeln!(file, "primary_conninfo = 'host=127.0.0.1 user=postgres port={primary}'").expect("settings can be written");
    let signal = folder.join("data/standby.signal");
    std::fs::write(&signal, "").expect("a server's folder can be written");
    if let Some(user) = server::user() {
        chown(&signal, Some(user), Some(user)).expect("root may give a file away");
    }
}

async fn ask<T>(server: &Server, question: &str) -> T
where
    T: Send + Unpin + for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    let mut connection = PgConnection::connect(&server.url("postgres")).await.expect("the server serves");
    let answer = sqlx::query_scalar(AssertSqlSafe(question)).fetch_one(&mut connection).await.expect("a superuser may ask");
    connection.close().await.expect("the connection ends");
    answer
}

async fn set(server: &Server, setting: &str) {
    alter(server, format!("SET {setting}")).await;
}

async fn reset(server: &Server, setting: &str) {
    alter(server, format!("RESET {setting}")).await;
}

/// Changes the server's own settings. They are in force soon after.
async fn alter(server: &Server, change: String) {
    let mut connection = PgConnection::connect(&server.url("postgres")).await.expect("the server serves");
    for statement in [format!("ALTER SYSTEM {change}"), "SELECT pg_reload_conf()".to_owned()] {
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await.expect("a superuser may change settings");
    }
    connection.close().await.expect("the connection ends");
}
