//! One server process, and three that elect a leader.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;

use crate::guarded::Guarded;
use crate::ports::{PORT_TRIES, free_ports};
use crate::{LONG, eventually};

/// The servers' tick: sessions expire when one of these ends.
pub const TICK: Duration = Duration::from_millis(500);

/// The longest session that the servers grant. Their own choice, twenty ticks, would end the sessions of a process that a busy machine keeps
/// waiting; a session must be able to outlast every pause that its test does not order.
const SESSION_MAX: Duration = Duration::from_secs(3_600);

/// When a four-letter word is asked again. A server that is asked while it starts may accept and never answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// The port of a server that all test processes share.
pub const SHARED_PORT: &str = "LAELAPS_TEST_ZOOKEEPER_PORT";

/// The server that all tests share, each below a root of its own: the one that `tests/run` has started, else one for this process.
pub async fn shared() -> &'static Server {
    static SERVER: OnceCell<Server> = OnceCell::const_new();
    let server = async || match shared_port() {
        Some(port) => Server { folder: None, port, process: None },
        None => Server::start().await,
    };
    SERVER.get_or_init(server).await
}

#[expect(clippy::disallowed_methods, reason = "tests read what tests/run sets")]
fn shared_port() -> Option<u16> {
    let port = std::env::var_os(SHARED_PORT)?;
    Some(port.to_str().and_then(|port| port.parse().ok()).unwrap_or_else(|| panic!("{SHARED_PORT} is {port:?}, and no port")))
}

/// One server.
#[derive(Debug)]
pub struct Server {
    /// None if another process started the server.
    folder: Option<TempDir>,
    port: u16,
    process: Option<Guarded>,
}

impl Server {
    /// Starts a server that stands alone, and waits until it serves.
    ///
    /// # Panics
    /// If it does not serve; ZooKeeper or Java may be missing.
    pub async fn start() -> Server {
        Server::start_with("").await
    }

    /// The same with more lines of configuration.
    ///
    /// # Panics
    /// As [`Server::start`].
    pub async fn start_with(lines: &str) -> Server {
        for _ in 0..PORT_TRIES {
            let folder = tempfile::tempdir().expect("a folder for ZooKeeper");
            let port = free_ports(1)[0];
            write_configuration(&folder, port, lines);
            let mut server = Server { folder: Some(folder), port, process: None };
            server.launch();
            if server.comes_up().await {
                return server;
            }
        }
        panic!("ZooKeeper did not start; are /usr/share/java/zookeeper.jar and java there? tests/run --prepare installs them");
    }

    /// Where clients connect.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The port of [`Server::address`].
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Kills it (`kill -9`).
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it again on its data, and waits until it serves.
    ///
    /// # Panics
    /// If it does not serve; another process may hold its port.
    pub async fn restart(&mut self) {
        for _ in 0..PORT_TRIES {
            self.launch();
            if self.comes_up().await {
                return;
            }
        }
        panic!("ZooKeeper did not start again on port {}", self.port);
    }

    /// Starts it again on its data; in an ensemble it may have to wait for others.
    pub fn launch(&mut self) {
        let path = self.folder();
        let folder = path.display();
        let classes =
            format!("{folder}:/usr/share/java/zookeeper.jar:/usr/share/java/slf4j-log4j12.jar:/usr/share/java/log4j-1.2.jar");
        let configuration = format!("{folder}/zoo.cfg");
        // Servers are killed here, and machines are not: what the operating system has outlives a server, and a busy disk stalls none.
        let mut command = vec!["java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dzookeeper.forceSync=no"];
        command.extend(["-cp", &classes]);
        command.extend(["org.apache.zookeeper.server.quorum.QuorumPeerMain", &configuration]);
        self.process = Some(Guarded::start(path, &command, None));
    }

    /// Stops it in its tracks (SIGSTOP), as a machine that swaps or a disk that hangs does.
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

    /// What it answers to one of its four-letter words, such as `mntr`; it is asked until it answers.
    pub async fn ask(&self, word: &str) -> String {
        eventually(LONG, word, async || ask(self.port, word).await.map_err(|error| error.to_string())).await
    }

    /// A number of `mntr`, such as `zk_packets_received`.
    pub async fn monitor(&self, name: &str) -> u64 {
        let answer = self.ask("mntr").await;
        let line = answer.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        line.unwrap_or_else(|| panic!("{name} is not in {answer}"))
    }

    /// `standalone`, `leader` or `follower`, if it serves.
    async fn mode(&self) -> Result<String, String> {
        mode(self.port, self.folder()).await
    }

    /// False if it ended instead, which it does when its port is taken.
    async fn comes_up(&mut self) -> bool {
        let (port, folder) = (self.port, self.folder().to_owned());
        let process = self.process.as_mut().expect("launched");
        eventually(LONG, "ZooKeeper serves, or ends", async || {
            if process.has_ended() { Ok(false) } else { mode(port, &folder).await.map(|_| true) }
        })
        .await
    }

    fn folder(&self) -> &Path {
        self.folder.as_ref().expect("a server of this process").path()
    }
}

/// What a server answers to one of its four-letter words.
async fn ask(port: u16, word: &str) -> std::io::Result<String> {
    tokio::time::timeout(ANSWER_PATIENCE, ask_patiently(port, word)).await?
}

async fn ask_patiently(port: u16, word: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    stream.write_all(word.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// The mode of the server that has this folder. Another test's may have been quicker to take the port.
async fn mode(port: u16, folder: &Path) -> Result<String, String> {
    let configuration = ask(port, "conf").await.map_err(|error| error.to_string())?;
    if !configuration.contains(&folder.display().to_string()) {
        return Err(configuration);
    }
    let answer = ask(port, "srvr").await.map_err(|error| error.to_string())?;
    answer.lines().find_map(|line| line.strip_prefix("Mode: ")).map(str::to_owned).ok_or(answer)
}

/// How many ticks a follower may be silent. The death of a server is told by its closed connections, not by this.
const FOLLOWER_TICKS: u32 = 120;

/// Three servers that elect a leader.
#[derive(Debug)]
pub struct Ensemble {
    /// The servers; any of them may be killed, frozen and launched again.
    pub members: Vec<Server>,
}

impl Ensemble {
    /// Starts three servers, and waits until all serve.
    pub async fn start() -> Ensemble {
        for _ in 0..PORT_TRIES {
            let ports = free_ports(9);
            let peers: String =
                (0..3).map(|n| format!("server.{}=127.0.0.1:{}:{}\n", n + 1, ports[3 + n], ports[6 + n])).collect();
            let mut members = Vec::new();
            for (n, port) in ports[..3].iter().enumerate() {
                let folder = tempfile::tempdir().expect("a folder for ZooKeeper");
                write_configuration(&folder, *port, &format!("initLimit={FOLLOWER_TICKS}\nsyncLimit={FOLLOWER_TICKS}\n{peers}"));
                std::fs::write(folder.path().join("data/myid"), (n + 1).to_string()).expect("myid");
                let mut server = Server { folder: Some(folder), port: *port, process: None };
                server.launch();
                members.push(server);
            }
            let mut up = true;
            for member in &mut members {
                up &= member.comes_up().await;
            }
            if up {
                return Ensemble { members };
            }
        }
        panic!("a ZooKeeper ensemble did not start; tests/run --prepare installs what it needs");
    }

    /// Where clients connect: all members.
    pub fn addresses(&self) -> String {
        self.members.iter().map(Server::address).collect::<Vec<_>>().join(",")
    }

    /// The number of the leader, as soon as there is one.
    pub async fn leader(&self) -> usize {
        eventually(LONG, "the ensemble has a leader", async || {
            for (number, member) in self.members.iter().enumerate() {
                if member.process.is_some() && member.mode().await.is_ok_and(|mode| mode == "leader") {
                    return Ok(number);
                }
            }
            Err("no leader".to_owned())
        })
        .await
    }
}

fn write_configuration(folder: &TempDir, port: u16, more: &str) {
    let data = folder.path().join("data");
    std::fs::create_dir_all(&data).expect("a data folder");
    let mut lines = vec![format!("tickTime={}", TICK.as_millis()), format!("maxSessionTimeout={}", SESSION_MAX.as_millis())];
    lines.extend([format!("dataDir={}", data.display()), format!("clientPort={port}")]);
    lines.extend(["clientPortAddress=127.0.0.1", "maxClientCnxns=0", "4lw.commands.whitelist=*"].map(str::to_owned));
    lines.extend(["admin.enableServer=false".to_owned(), more.to_owned()]);
    let configuration = lines.join("\n");
    std::fs::write(folder.path().join("zoo.cfg"), configuration).expect("zoo.cfg");
}
