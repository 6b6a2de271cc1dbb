//! MariaDB.

mod pair;

use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use sqlx::{AssertSqlSafe, Connection, MySqlConnection};
use tempfile::TempDir;
use tokio::sync::OnceCell;

use crate::guarded::Guarded;
use crate::ports::{PORT_TRIES, free_ports};
use crate::server::{self, Durability, Extras};
use crate::{Certificates, LONG, eventually, unique_name};

pub use self::pair::Pair;

/// The port of a server that all test processes share.
pub const SHARED_PORT: &str = "LAELAPS_TEST_MARIADB_PORT";

/// The server that all tests share, each in a database of its own: the one that `tests/run` has started, else one for this process.
pub async fn shared() -> &'static Server {
    static SERVER: OnceCell<Server> = OnceCell::const_new();
    let server = async || match server::shared_port(SHARED_PORT) {
        Some(port) => Server::at(port),
        None => Server::start(Durability::Process).await,
    };
    SERVER.get_or_init(server).await
}

/// One server. Its superuser is `root`, without password.
#[derive(Debug)]
pub struct Server {
    /// None if another process started the server.
    folder: Option<TempDir>,
    port: u16,
    durability: Durability,
    extras: Extras,
    process: Option<Guarded>,
}

impl Server {
    /// Starts a server, and waits until it serves.
    ///
    /// # Panics
    /// If it does not; MariaDB may be missing.
    pub async fn start(durability: Durability) -> Self {
        Self::start_with(durability, Extras::default()).await
    }

    /// Starts a server that also speaks encrypted, and waits until it serves.
    ///
    /// # Panics
    /// If it does not; MariaDB or `openssl` may be missing.
    pub async fn start_encrypted() -> Self {
        let extras = Extras { certificates: Some(Certificates::make()), ..Extras::default() };
        Self::start_with(Durability::Process, extras).await
    }

    /// One that another process started.
    fn at(port: u16) -> Self {
        Self { folder: None, port, durability: Durability::Process, extras: Extras::default(), process: None }
    }

    async fn start_with(durability: Durability, extras: Extras) -> Self {
        let folder = server::folder();
        let mut install = Command::new("mariadb-install-db");
        install.arg("--no-defaults").arg(format!("--datadir={}", folder.path().join("data").display()));
        install.arg(format!("--tmpdir={}", folder.path().display()));
        install.args(["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]);
        install.current_dir(folder.path());
        server::prepare(install);
        let mut server = Self { folder: Some(folder), port: 0, durability, extras, process: None };
        for _ in 0..PORT_TRIES {
            server.port = free_ports(1)[0];
            server.launch();
            if server.comes_up().await {
                return server;
            }
        }
        panic!("MariaDB did not start: {}", server.log());
    }

    /// Where programs connect: a database of this server.
    pub fn url(&self, database: &str) -> String {
        format!("mysql://root@127.0.0.1:{}/{database}", self.port)
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What clients need to know of a server that speaks encrypted.
    ///
    /// # Panics
    /// If this one does not.
    pub fn certificates(&self) -> &Certificates {
        self.extras.certificates.as_ref().expect("an encrypted server")
    }

    /// Makes an empty database; answers its URL.
    ///
    /// # Panics
    /// If the server does not serve.
    pub async fn create_database(&self) -> String {
        let name = unique_name("test");
        let mut connection = MySqlConnection::connect(&self.url("mysql")).await.expect("the server serves");
        let create = format!("CREATE DATABASE {name}");
        sqlx::query(AssertSqlSafe(create)).execute(&mut connection).await.expect("a superuser may make databases");
        connection.close().await.expect("the connection ends");
        self.url(&name)
    }

    /// Kills it (`kill -9`).
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it again on its data, and waits until it serves.
    pub async fn restart(&mut self) {
        self.process = None;
        let up = eventually(LONG, "MariaDB serves again", async || {
            if self.process.is_none() {
                self.launch();
            }
            if self.comes_up().await { Ok(()) } else { Err(self.log()) }
        });
        Box::pin(up).await;
    }

    /// Stops it in its tracks (SIGSTOP).
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        self.process.as_ref().expect("a running server").signal(signal);
    }

    fn launch(&mut self) {
        let folder = self.folder().display();
        let (data, socket, pid) =
            (format!("--datadir={folder}/data"), format!("--socket={folder}/socket"), format!("--pid-file={folder}/pid"));
        let port = format!("--port={}", self.port);
        // A server that starts removes what looks like a temporary table from its folder for such; in a shared one, another server's as well.
        let temporary = format!("--tmpdir={folder}");
        let mut command = self.extras.command("mariadbd");
        command.extend(["--no-defaults", &data, &socket, &pid, &temporary, &port, "--bind-address=127.0.0.1"]);
        command.extend(["--skip-name-resolve", "--max-connections=600", "--performance-schema=OFF"]);
        match self.durability {
            Durability::Process => command.extend(["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=2"]),
            Durability::Disk => command.push("--innodb-buffer-pool-size=1G"),
        }
        command.extend(self.extras.settings.iter().map(String::as_str));
        let encryption = self.extras.certificates.as_ref().map(|certificates| {
            let (certificate, key) = (certificates.certificate(), certificates.key());
            [format!("--ssl-cert={}", certificate.display()), format!("--ssl-key={}", key.display())]
        });
        command.extend(encryption.iter().flatten().map(String::as_str));
        self.process = Some(Guarded::start(self.folder(), &command, server::user()));
    }

    /// False if it ended instead, which it does when its port is taken.
    async fn comes_up(&mut self) -> bool {
        let url = self.url("mysql");
        let process = &mut self.process;
        let up = eventually(LONG, "MariaDB serves, or ends", async || {
            if process.as_mut().is_none_or(Guarded::has_ended) {
                return Ok(false);
            }
            let connection = MySqlConnection::connect(&url).await.map_err(|error| error.to_string())?;
            connection.close().await.map_err(|error| error.to_string()).map(|()| true)
        })
        .await;
        if !up {
            self.process = None;
        }
        up
    }

    /// Where its files are; only asked of a server that this process started.
    fn folder(&self) -> &Path {
        self.folder.as_ref().expect("a server of this process").path()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder().join("server.log")).unwrap_or_default()
    }
}
