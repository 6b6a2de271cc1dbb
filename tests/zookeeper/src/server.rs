//! One server process, and three that elect a leader.

use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;

use crate::guarded::Guarded;
use crate::{LONG, PATIENCE, eventually};

/// The servers' tick: sessions expire when one of these ends.
pub const TICK: Duration = Duration::from_millis(500);

/// Ports are taken and given back before the server takes them; another process may be quicker.
const PORT_TRIES: usize = 5;

/// How long a server that serves may take to answer a four-letter word.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// The server that all tests of this process share; each works below a chroot of its own.
pub async fn shared() -> &'static Server {
    static SERVER: OnceCell<Server> = OnceCell::const_new();
    SERVER.get_or_init(Server::start).await
}

/// One server.
#[derive(Debug)]
pub struct Server {
    folder: TempDir,
    port: u16,
    process: Option<Guarded>,
}

impl Server {
    /// Starts a server that stands alone, and waits until it serves.
    ///
    /// # Panics
    /// If it does not serve within the patience; ZooKeeper or Java may be missing.
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
            let mut server = Server { folder, port, process: None };
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
    pub async fn restart(&mut self) {
        self.launch();
        self.mode(LONG).await;
    }

    /// Starts it again on its data; in an ensemble it may have to wait for others.
    pub fn launch(&mut self) {
        let folder = self.folder.path().display();
        let classes =
            format!("{folder}:/usr/share/java/zookeeper.jar:/usr/share/java/slf4j-log4j12.jar:/usr/share/java/log4j-1.2.jar");
        let configuration = format!("{folder}/zoo.cfg");
        let mut command = vec!["java", "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", &classes];
        command.extend(["org.apache.zookeeper.server.quorum.QuorumPeerMain", &configuration]);
        self.process = Some(Guarded::start(self.folder.path(), &command, None));
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

    /// What it answers to one of its four-letter words, such as `mntr`.
    ///
    /// # Errors
    /// As the operating system says.
    pub async fn ask(&self, word: &str) -> std::io::Result<String> {
        ask(self.port, word).await
    }

    /// A number of `mntr`, such as `zk_packets_received`.
    pub async fn monitor(&self, name: &str) -> u64 {
        let answer = self.ask("mntr").await.expect("mntr is answered");
        let line = answer.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        line.unwrap_or_else(|| panic!("{name} is not in {answer}"))
    }

    /// `standalone`, `leader` or `follower`, as soon as it serves.
    async fn mode(&self, patience: Duration) -> String {
        eventually(patience, "ZooKeeper serves", async || self.mode_now().await).await
    }

    async fn mode_now(&self) -> Result<String, String> {
        mode_at(self.port).await
    }

    /// False if it ended instead, which it does when its port is taken.
    async fn comes_up(&mut self) -> bool {
        let port = self.port;
        let process = self.process.as_mut().expect("launched");
        eventually(PATIENCE, "ZooKeeper serves, or ends", async || {
            if process.has_ended() { Ok(false) } else { mode_at(port).await.map(|_| true) }
        })
        .await
    }
}

/// What a server answers to one of its four-letter words. One that is asked while it starts may accept and never answer.
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

async fn mode_at(port: u16) -> Result<String, String> {
    let answer = ask(port, "srvr").await.map_err(|error| error.to_string())?;
    answer.lines().find_map(|line| line.strip_prefix("Mode: ")).map(str::to_owned).ok_or(answer)
}

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
                write_configuration(&folder, *port, &format!("initLimit=10\nsyncLimit=5\n{peers}"));
                std::fs::write(folder.path().join("data/myid"), (n + 1).to_string()).expect("myid");
                let mut server = Server { folder, port: *port, process: None };
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
                if member.process.is_some() && member.mode_now().await.is_ok_and(|mode| mode == "leader") {
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
    let configuration = format!(
        "tickTime={}\ndataDir={}\nclientPortAddress=127.0.0.1\nclientPort={port}\nmaxClientCnxns=0\n4lw.commands.whitelist=*\nadmin.enableServer=false\n{more}",
        TICK.as_millis(),
        data.display()
    );
    std::fs::write(folder.path().join("zoo.cfg"), configuration).expect("zoo.cfg");
}

/// Ports that nobody used a moment ago, all different.
fn free_ports(count: usize) -> Vec<u16> {
    let listeners: Vec<_> = (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port")).collect();
    listeners.iter().map(|listener| listener.local_addr().expect("bound").port()).collect()
}
