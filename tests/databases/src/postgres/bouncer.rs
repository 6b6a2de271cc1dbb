//! PgBouncer in transaction mode: each transaction of a client may have another session of the server.

use std::fs;
use std::process::Command;

use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::guarded::Guarded;
use crate::ports::{PORT_TRIES, free_ports};
use crate::{LONG, eventually, server};

/// The program that connections lead through, for example `pgbouncer`.
const THROUGH: &str = "LAELAPS_POSTGRES_THROUGH";

/// A running bouncer. Whoever connects is the superuser `postgres`.
#[derive(Debug)]
pub struct Bouncer {
    folder: TempDir,
    port: u16,
    process: Option<Guarded>,
}

/// The program that the tests' connections are to lead through, if any.
#[expect(clippy::disallowed_methods, reason = "tests read what tests/run sets")]
pub(super) fn wanted() -> Option<String> {
    std::env::var(THROUGH).ok().filter(|program| !program.is_empty())
}

impl Bouncer {
    /// Starts `program` before the server on this port of 127.0.0.1, and waits until it takes connections.
    ///
    /// # Panics
    /// If it does not; PgBouncer may be missing.
    pub async fn before(port: u16, program: &str) -> Self {
        let program = &located(program);
        let mut bouncer = Self { folder: server::folder(), port: 0, process: None };
        for _ in 0..PORT_TRIES {
            bouncer.port = free_ports(1)[0];
            bouncer.launch(port, program);
            if bouncer.comes_up().await {
                return bouncer;
            }
        }
        let log = fs::read_to_string(bouncer.folder.path().join("server.log")).unwrap_or_default();
        panic!("PgBouncer did not start: {log}; tests/run --prepare installs it");
    }

    /// The port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    fn launch(&mut self, server: u16, program: &str) {
        // Few sessions for many clients, so that transactions change theirs; a server that turned somebody away is asked again at once.
        let mut settings = format!(
            "[databases]\n* = host=127.0.0.1 port={server} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {}\n\
            unix_socket_dir =\nauth_type = any\npool_mode = transaction\nmax_client_conn = 1000\ndefault_pool_size = 20\n\
            server_login_retry = 0.1\nserver_round_robin = 1\n",
            self.port
        );
        if keeps_statements(program) {
            settings.push_str("max_prepared_statements = 200\n");
        }
        let file = self.folder.path().join("pgbouncer.ini");
        fs::write(&file, settings).expect("a folder of ours");
        self.process = Some(Guarded::start(self.folder.path(), &[program, &file.display().to_string()], server::user()));
    }

    /// False if it ended instead, which it does when its port is taken.
    async fn comes_up(&mut self) -> bool {
        let (port, process) = (self.port, &mut self.process);
        eventually(LONG, "PgBouncer takes connections, or ends", async || {
            if process.as_mut().is_none_or(Guarded::has_ended) {
                return Ok(false);
            }
            TcpStream::connect(("127.0.0.1", port)).await.map(|_| true).map_err(|error| error.to_string())
        })
        .await
    }
}

/// Debian keeps PgBouncer where only root's path leads.
fn located(program: &str) -> String {
    let there = format!("/usr/sbin/{program}");
    if !program.contains('/') && fs::exists(&there).unwrap_or(false) { there } else { program.to_owned() }
}

/// From 1.21 on it knows of prepared statements.
fn keeps_statements(program: &str) -> bool {
    let output = Command::new(program).arg("--version").output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; tests/run --prepare installs it"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut numbers = said.trim_start_matches("PgBouncer ").split(['.', '\n']).map_while(|number| number.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    assert_ne!(version, (0, 0), "{program} tells no version: {said}");
    version >= (1, 21)
}
