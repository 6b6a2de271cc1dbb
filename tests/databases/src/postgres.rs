//! PostgreSQL.

mod bouncer;
mod pair;

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tempfile::TempDir;
use tokio::sync::OnceCell;

use crate::guarded::Guarded;
use crate::ports::{PORT_TRIES, free_ports};
use crate::server::{self, Durability, Extras};
use crate::{Certificates, LONG, eventually, unique_name};

pub use self::bouncer::Bouncer;
pub use self::pair::Pair;

/// The port of a server that all test processes share.
pub const SHARED_PORT: &str = "LAELAPS_TEST_POSTGRES_PORT";

/// The server that all tests share, each in a database of its own: the one that `tests/run` has started, else one for this process.
pub async fn shared() -> &'static Server {
    static SERVER: OnceCell<Server> = OnceCell::const_new();
    let server = async || {
        let mut server = match server::shared_port(SHARED_PORT) {
            Some(port) => Server::at(port),
            None => Server::start(Durability::Process).await,
        };
        if let Some(program) = bouncer::wanted() {
            server.bouncer = Some(Bouncer::before(server.port, &program).await);
        }
        server
    };
    SERVER.get_or_init(server).await
}

/// One server. Its superuser is `postgres`, without password.
#[derive(Debug)]
pub struct Server {
    /// None if another process started the server.
    folder: Option<TempDir>,
    port: u16,
    durability: Durability,
    extras: Extras,
    process: Option<Guarded>,
    /// What clients are led through.
    bouncer: Option<Bouncer>,
}

impl Server {
    /// Starts a server, and waits until it serves.
    ///
    /// # Panics
    /// If it does not; PostgreSQL may be missing.
    pub async fn start(durability: Durability) -> Self {
        Self::start_with(durability, Extras::default()).await
    }

    /// Starts a server that also speaks encrypted, and waits until it serves.
    ///
    /// # Panics
    /// If it does not; PostgreSQL or `openssl` may be missing.
    pub async fn start_encrypted() -> Self {
        let extras = Extras { certificates: Some(Certificates::make()), ..Extras::default() };
        Self::start_with(Durability::Process, extras).await
    }

    /// One that another process started.
    fn at(port: u16) -> Self {
        Self { folder: None, port, durability: Durability::Process, extras: Extras::default(), process: None, bouncer: None }
    }

    async fn start_with(durability: Durability, extras: Extras) -> Self {
        let folder = server::folder();
        let mut initdb = Command::new(program("initdb"));
        initdb.arg("-D").arg(folder.path().join("data")).args([
            "-A",
            "trust",
            "-U",
            "postgres",
            "-E",
            "UTF8",
            "--locale=C",
            "-N",
        ]);
        initdb.current_dir(folder.path());
        server::prepare(initdb);
        Self::start_in(folder, durability, extras).await
    }

    /// Starts a server on the data in its folder.
    async fn start_in(folder: TempDir, durability: Durability, extras: Extras) -> Self {
        let mut server = Self { folder: Some(folder), port: 0, durability, extras, process: None, bouncer: None };
        for _ in 0..PORT_TRIES {
            server.port = free_ports(1)[0];
            server.launch();
            if server.comes_up().await {
                return server;
            }
        }
        panic!("PostgreSQL did not start: {}", server.log());
    }

    /// Where an administrator connects: a database of this server.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Where programs connect: the same, or the bouncer before it (LAELAPS_POSTGRES_THROUGH).
    pub fn client_url(&self, database: &str) -> String {
        let port = self.bouncer.as_ref().map_or(self.port, Bouncer::port);
        format!("postgres://postgres@127.0.0.1:{port}/{database}")
    }

    /// From where programs connect to where an administrator does.
    pub fn directly(&self, url: &str) -> String {
        match &self.bouncer {
            Some(bouncer) => url.replace(&format!(":{}/", bouncer.port()), &format!(":{}/", self.port)),
            None => url.to_owned(),
        }
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
        let mut connection = PgConnection::connect(&self.url("postgres")).await.expect("the server serves");
        let create = format!("CREATE DATABASE {name}");
        sqlx::query(AssertSqlSafe(create)).execute(&mut connection).await.expect("a superuser may make databases");
        connection.close().await.expect("the connection ends");
        self.client_url(&name)
    }

    /// Kills it (`kill -9`), with all its processes.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it again on its data, and waits until it serves.
    pub async fn restart(&mut self) {
        self.process = None;
        // The memory of the killed one may be in use for a moment.
        let up = eventually(LONG, "PostgreSQL serves again", async || {
            if self.process.is_none() {
                self.launch();
            }
            if self.comes_up().await { Ok(()) } else { Err(self.log()) }
        });
        Box::pin(up).await;
    }

    /// Stops it in its tracks (SIGSTOP): it accepts no connection; sessions that are there go on.
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
        let (data, port) = (self.folder().join("data").display().to_string(), self.port.to_string());
        let sockets = format!("unix_socket_directories={}", self.folder().display());
        let postgres = program("postgres").display().to_string();
        let mut command = self.extras.command(&postgres);
        command.extend(["-D", &data, "-p", &port, "-c", &sockets]);
        command.extend(["-c", "listen_addresses=127.0.0.1", "-c", "max_connections=600", "-c", "shared_buffers=128MB"]);
        if self.durability == Durability::Process {
            command.extend(["-c", "fsync=off", "-c", "max_wal_size=256MB"]);
        }
        command.extend(self.extras.settings.iter().flat_map(|setting| ["-c", setting]));
        let encryption = self.extras.certificates.as_ref().map(|certificates| {
            let (certificate, key) = (certificates.certificate(), certificates.key());
            [format!("ssl_cert_file={}", certificate.display()), format!("ssl_key_file={}", key.display())]
        });
        for setting in encryption.iter().flatten() {
            command.extend(["-c", "ssl=on", "-c", setting]);
        }
        self.process = Some(Guarded::start(self.folder(), &command, server::user()));
    }

    /// False if it ended instead, which it does when its port is taken.
    async fn comes_up(&mut self) -> bool {
        let url = self.url("postgres");
        let process = &mut self.process;
        let up = eventually(LONG, "PostgreSQL serves, or ends", async || {
            if process.as_mut().is_none_or(Guarded::has_ended) {
                return Ok(false);
            }
            let connection = PgConnection::connect(&url).await.map_err(|error| error.to_string())?;
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

/// A program of the server: Debian keeps them off the path, one folder a version.
fn program(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> =
        versions.map(|version| version.path().join("bin").join(name)).filter(|path| path.exists()).collect();
    found.sort();
    found.pop().unwrap_or_else(|| Path::new(name).to_path_buf())
}
