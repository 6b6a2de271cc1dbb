//! Two servers of MariaDB, one of which follows the other and can take its place. Where commits wait for the replica, they do so before anybody sees
//! them (semi-synchronous replication, AFTER_SYNC), for as long as it takes.

use sqlx::mysql::MySqlRow;
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, Row as _};

use super::Server;
use crate::server::{Durability, Extras, Going, Replication};
use crate::{Clock, LONG, eventually};

const SETTINGS: [&str; 7] = [
    "--log-bin=binlog",
    "--binlog-format=ROW",
    "--log-slave-updates",
    "--gtid-strict-mode=ON",
    "--rpl-semi-sync-slave-enabled=ON",
    "--rpl-semi-sync-master-wait-point=AFTER_SYNC",
    // Milliseconds: for ever.
    "--rpl-semi-sync-master-timeout=4000000000",
];
/// What the programs of tests that move from one server to the other connect as. The superuser may write on a replica.
const USER: &str = "mover";

/// A primary and its replica.
#[derive(Debug)]
pub struct Pair {
    primary: Server,
    /// After a promotion the one that was the primary, until it [follows](Self::rejoin).
    replica: Server,
    replication: Replication,
    /// How the former primary went, if it does not follow yet.
    gone: Option<Going>,
}

impl Pair {
    /// Starts both, and waits until one follows the other.
    ///
    /// # Panics
    /// If it does not; MariaDB may be missing.
    pub async fn start(replication: Replication, clock: Option<&Clock>) -> Self {
        let extras = |number: &str| {
            let mut extras = Extras::of_pair(&SETTINGS, clock);
            extras.settings.push(number.to_owned());
            extras
        };
        let primary = Box::pin(Server::start_with(Durability::Process, extras("--server-id=1"))).await;
        let replica = Box::pin(Server::start_with(Durability::Process, extras("--server-id=2"))).await;
        let mut pair = Self { primary, replica, replication, gone: None };
        for server in [&pair.primary, &pair.replica] {
            // Where the servers begin they are the same. Where a replica has got to is safe against its own death only in this engine.
            for statement in ["SET sql_log_bin = 0; ALTER TABLE mysql.gtid_slave_pos ENGINE = InnoDB", "RESET MASTER"] {
                execute(server, statement).await;
            }
        }
        pair.follow().await;
        execute(&pair.primary, &format!("CREATE USER {USER}@'127.0.0.1'")).await;
        pair
    }

    /// The server that takes writes.
    pub fn primary(&self) -> &Server {
        &self.primary
    }

    /// Makes an empty database; answers its URL, for a user who may do anything there, but cannot write on a replica.
    pub async fn create_database(&self) -> String {
        let url = self.primary.create_database().await;
        let (_, name) = url.rsplit_once('/').expect("a URL names a database");
        execute(&self.primary, &format!("GRANT ALL ON {name}.* TO {USER}@'127.0.0.1'")).await;
        url.replace("root@", &format!("{USER}@"))
    }

    /// Kills the primary (`kill -9`) and starts it again.
    pub async fn restart(&mut self) {
        Box::pin(self.primary.restart()).await;
    }

    /// The replica hears nothing any more. Not for a pair whose commits wait for it.
    pub async fn fall_behind(&self) {
        execute(&self.replica, "STOP SLAVE IO_THREAD").await;
    }

    /// Lets the replica take the primary's place: afterwards it is [`Self::primary`], at another port, and has no replica. A replica that has not
    /// [fallen behind](Self::fall_behind) has all that was answered.
    pub async fn promote(&mut self, going: Going) {
        if self.replication == Replication::Synchronous {
            self.replica_has_everything().await;
        }
        match going {
            Going::Dies => self.primary.kill(),
            Going::Lingers => {}
            Going::Leaves => {
                execute(&self.primary, "SET GLOBAL read_only = ON").await;
                self.replica_has_everything().await;
            }
        }
        execute(&self.replica, "STOP SLAVE IO_THREAD").await;
        let status = row(&self.replica, "SHOW SLAVE STATUS").await;
        let heard: String = status.get_unchecked("Gtid_IO_Pos");
        applied(&self.replica, &heard).await;
        execute(&self.replica, "STOP SLAVE; RESET SLAVE ALL; SET GLOBAL read_only = OFF").await;
        std::mem::swap(&mut self.primary, &mut self.replica);
        self.gone = Some(going);
    }

    /// Makes the former primary a replica of the new one, and waits until it is one. Unless it has left, it is killed if it still runs.
    pub async fn rejoin(&mut self) {
        let going = self.gone.take().expect("a primary that was replaced");
        if going == Going::Leaves {
            execute(&self.replica, "SET GLOBAL rpl_semi_sync_master_enabled = OFF").await;
        } else {
            // As it comes up, it takes back what its replica did not hear.
            self.replica.kill();
            self.replica.takes_part_as(REPLICA);
            Box::pin(self.replica.restart()).await;
        }
        execute(&self.replica, "SET GLOBAL gtid_slave_pos = @@global.gtid_binlog_pos").await;
        self.follow().await;
    }

    /// The replica follows the primary, and from now on commits wait for it, if they are to.
    async fn follow(&mut self) {
        self.primary.takes_part_as(if self.replication == Replication::Synchronous { PRIMARY } else { ALONE });
        self.replica.takes_part_as(REPLICA);
        let port = self.primary.port;
        let follow = format!(
            "CHANGE MASTER TO MASTER_HOST = '127.0.0.1', MASTER_PORT = {port}, MASTER_USER = 'root', MASTER_CONNECT_RETRY = 1,
                MASTER_USE_GTID = slave_pos; START SLAVE; SET GLOBAL read_only = ON"
        );
        execute(&self.replica, &follow).await;
        if self.replication == Replication::Synchronous {
            execute(&self.primary, "SET GLOBAL rpl_semi_sync_master_enabled = ON").await;
            self.replica_has_everything().await;
        }
    }

    /// Waits until the replica has all that anybody can have seen, and commits wait for it.
    async fn replica_has_everything(&self) {
        const WAITED_FOR: &str = "SELECT COUNT(*) FROM information_schema.GLOBAL_STATUS WHERE
            (VARIABLE_NAME = 'RPL_SEMI_SYNC_MASTER_STATUS' AND VARIABLE_VALUE = 'ON') OR
            (VARIABLE_NAME = 'RPL_SEMI_SYNC_MASTER_CLIENTS' AND VARIABLE_VALUE = '1')";
        if self.replication == Replication::Synchronous {
            eventually(LONG, "commits wait for the replica", async || {
                let both: i64 = row(&self.primary, WAITED_FOR).await.get(0);
                if both == 2 { Ok(()) } else { Err(self.replica.log()) }
            })
            .await;
        }
        let now: String = row(&self.primary, "SELECT @@global.gtid_binlog_pos").await.get(0);
        applied(&self.replica, &now).await;
    }
}

/// What a server is when it is started the next time, and how it then sees what its binary log has and no other server may have heard of.
const PRIMARY: &[&str] = &["--rpl-semi-sync-master-enabled=ON", "--init-rpl-role=MASTER"];
const ALONE: &[&str] = &["--init-rpl-role=MASTER"];
const REPLICA: &[&str] = &["--read-only=ON", "--init-rpl-role=SLAVE"];

impl Server {
    fn takes_part_as(&mut self, role: &[&str]) {
        self.extras.settings.retain(|setting| ![PRIMARY, ALONE, REPLICA].concat().contains(&setting.as_str()));
        self.extras.settings.extend(role.iter().map(|setting| (*setting).to_owned()));
    }
}

/// Waits until a replica has done all up to a position.
async fn applied(replica: &Server, position: &str) {
    let wait = format!("SELECT MASTER_GTID_WAIT('{position}', {})", LONG.as_secs());
    let waited: i64 = row(replica, &wait).await.get(0);
    assert_eq!(waited, 0, "the replica does not get to {position}: {}", replica.log());
}

async fn row(server: &Server, question: &str) -> MySqlRow {
    let mut connection = MySqlConnection::connect(&server.url("mysql")).await.expect("the server serves");
    let row = sqlx::raw_sql(AssertSqlSafe(question)).fetch_one(&mut connection).await.expect("a superuser may ask");
    connection.close().await.expect("the connection ends");
    row
}

async fn execute(server: &Server, statements: &str) {
    let mut connection = MySqlConnection::connect(&server.url("mysql")).await.expect("the server serves");
    let done = sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut connection).await;
    done.unwrap_or_else(|error| panic!("{statements}: {error}; {}", server.log()));
    connection.close().await.expect("the connection ends");
}
