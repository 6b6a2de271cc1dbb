//! A gate before a database server: statements of a client wait until a test lets them go, one by one, so that the test decides in which order
//! two clients do what they do. The client is real, and knows nothing of it.
//!
//! Also does to connections what networks do: they go silent, or end after the server has done a statement and before its answer has come. And it
//! takes clauses out of statements, to see what becomes of a program without them.

mod wire;

use std::collections::{HashMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

pub use self::wire::Protocol;
use self::wire::Splitter;

/// The most bytes read at once.
const READ_BYTES: usize = 64 << 10;

/// Forwards unencrypted connections to a server on this machine. Open at first.
#[derive(Debug)]
pub struct Gate {
    port: u16,
    shared: Arc<Shared>,
    listening: AbortHandle,
}

/// A statement that the server has not answered yet.
#[derive(Clone, Debug)]
pub struct InFlight {
    /// The server's client: a port on 127.0.0.1.
    pub port: u16,
    /// MySQL: the session's number.
    pub session: Option<u32>,
    /// The statement.
    pub statement: String,
}

#[derive(Debug)]
struct Shared {
    protocol: Protocol,
    state: Mutex<State>,
    /// Grows with every change of the state.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    /// The server's port on 127.0.0.1.
    server: u16,
    shut: bool,
    /// Nothing gets through, and nobody is told.
    cut: bool,
    /// Of the next statements that begin with these words, the answer does not arrive: the connection ends instead.
    swallowing: Option<&'static str>,
    /// So many statements from now on, the same happens to one.
    swallowing_in: Option<usize>,
    /// And the gate is shut.
    shuts_then: bool,
    swallowed: usize,
    /// Words of statements, and the clause that each of these goes without.
    taken_out: Vec<(&'static str, &'static str)>,
    connected: u64,
    connections: HashMap<u64, Connection>,
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    connection: u64,
    statement: String,
    go: oneshot::Sender<()>,
}

#[derive(Debug)]
struct Connection {
    port: u16,
    session: Option<u32>,
    in_flight: Option<String>,
    preparing: Option<String>,
    prepared: HashMap<u32, String>,
    /// The server's next bytes are the answer to a statement whose answer is swallowed.
    swallow: bool,
    /// It was there while the gate was cut: bytes are missing.
    cut: bool,
}

impl Gate {
    /// A gate before the server on this port of 127.0.0.1.
    ///
    /// # Panics
    /// If no port is free.
    pub async fn before(port: u16, protocol: Protocol) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let shared = Arc::new(Shared {
            protocol,
            state: Mutex::new(State { server: port, ..State::default() }),
            changes: watch::Sender::new(0),
        });
        let listening = tokio::spawn(listen(listener, Arc::clone(&shared))).abort_handle();
        Self { port: address.port(), shared, listening }
    }

    /// Where to connect instead, on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on new connections lead to this server, as an address does that was moved to another machine. Older ones stay where they are.
    pub fn lead_to(&self, port: u16) {
        self.shared.change(|state| state.server = port);
    }

    /// From now on each statement waits.
    pub fn shut(&self) {
        self.shared.change(|state| state.shut = true);
    }

    /// From now on nothing waits.
    pub fn open(&self) {
        self.shared.change(|state| {
            state.shut = false;
            for waiting in state.waiting.drain(..) {
                // Its client may have gone.
                let _ = waiting.go.send(());
            }
        });
    }

    /// Lets the statement go that has waited for longest; answers it. None if none waits.
    pub fn let_one_go(&self) -> Option<String> {
        self.shared.change(|state| {
            loop {
                let Waiting { connection, statement, go } = state.waiting.pop_front()?;
                // Its client may have gone.
                let Some(connection) = state.connections.get_mut(&connection) else { continue };
                connection.in_flight = Some(statement.clone());
                if go.send(()).is_ok() {
                    return Some(statement);
                }
            }
        })
    }

    /// Whether a statement waits here.
    #[must_use]
    pub fn is_waited_at(&self) -> bool {
        let state = self.shared.lock();
        state.waiting.iter().any(|waiting| state.connections.contains_key(&waiting.connection))
    }

    /// The statements that the server has and did not answer yet.
    #[must_use]
    pub fn in_flight(&self) -> Vec<InFlight> {
        let in_flight = |connection: &Connection| {
            let statement = connection.in_flight.clone()?;
            Some(InFlight { port: connection.port, session: connection.session, statement })
        };
        self.shared.lock().connections.values().filter_map(in_flight).collect()
    }

    /// Of the next statements that begin with these words the answer does not arrive, although the server does them: their connections end. None:
    /// all answers arrive again.
    pub fn swallow(&self, statement: Option<&'static str>) {
        self.shared.change(|state| state.swallowing = statement);
    }

    /// The same for one statement: 1 is the next one. 0: for none any more.
    pub fn swallow_nth(&self, number: usize) {
        self.shared.change(|state| {
            state.swallowing_in = Some(number).filter(|number| *number > 0);
            state.shuts_then = false;
        });
    }

    /// As [`Gate::swallow_nth`]; what its client does about it waits at the gate, which is shut from then on.
    pub fn swallow_nth_and_shut(&self, number: usize) {
        self.swallow_nth(number);
        self.shared.change(|state| state.shuts_then = true);
    }

    /// From now on nothing gets through, in either direction, and connections stay open.
    pub fn cut(&self) {
        self.shared.change(|state| {
            state.cut = true;
            state.connections.values_mut().for_each(|connection| connection.cut = true);
        });
    }

    /// From now on new connections get through. Older ones end, as both sides would find out by then.
    pub fn mend(&self) {
        self.shared.change(|state| state.cut = false);
    }

    /// How many answers were swallowed.
    #[must_use]
    pub fn swallowed(&self) -> usize {
        self.shared.lock().swallowed
    }

    /// From now on statements with these words reach the server without a clause: blanks stand in its place. A statement that is prepared
    /// already stays as it is.
    pub fn take_out(&self, statement: &'static str, clause: &'static str) {
        self.shared.change(|state| state.taken_out.push((statement, clause)));
    }

    /// Told whenever something comes or goes.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.listening.abort();
        self.open();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn server(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.lock().server))
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.lock());
        self.changes.send_modify(|changes| *changes += 1);
        changed
    }

    fn of_connection<T>(&self, number: u64, change: impl FnOnce(&mut Connection) -> T) -> Option<T> {
        self.change(|state| state.connections.get_mut(&number).map(change))
    }

    fn is_cut(&self, number: u64) -> bool {
        self.lock().connections.get(&number).is_none_or(|connection| connection.cut)
    }

    /// What a client has sent, without the clauses that are taken out.
    fn altered(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        let find = |bytes: &[u8], words: &str| bytes.windows(words.len()).position(|part| part == words.as_bytes());
        for (statement, clause) in &self.lock().taken_out {
            if find(&bytes, statement).is_some()
                && let Some(place) = find(&bytes, clause)
            {
                bytes[place..place + clause.len()].fill(b' ');
            }
        }
        bytes
    }

    /// The end of a connection does not get through a cut cable either.
    async fn stay_if_cut(&self, number: u64) {
        if self.is_cut(number) {
            std::future::pending().await
        }
    }

    /// Wait until a connection that was cut has to end.
    async fn mended(&self, number: u64) {
        let mut changes = self.changes.subscribe();
        loop {
            let over = {
                let state = self.lock();
                !state.cut && state.connections.get(&number).is_some_and(|connection| connection.cut)
            };
            if over {
                return;
            }
            // The sender lives as long as this.
            let _ = changes.changed().await;
        }
    }

    /// Wait for leave to hand a statement to the server.
    async fn pass(&self, number: u64, statement: String) {
        let going = self.change(|state| {
            let left = state.swallowing_in.map(|number| number - 1);
            state.swallowing_in = left.filter(|left| *left > 0);
            let swallow = left == Some(0) || state.swallowing.is_some_and(|words| statement.starts_with(words));
            let connection = state.connections.get_mut(&number)?;
            connection.swallow = swallow;
            if !state.shut {
                connection.in_flight = Some(statement);
                return None;
            }
            let (go, going) = oneshot::channel();
            state.waiting.push_back(Waiting { connection: number, statement, go });
            Some(going)
        });
        if let Some(going) = going {
            // A gate that is gone keeps nobody.
            let _ = going.await;
        }
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((client, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let Ok(server) = TcpStream::connect(shared.server()).await else { return };
            let Ok(address) = server.local_addr() else { return };
            // Statements are small, and each is waited for.
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            let connection = Connection {
                port: address.port(),
                session: None,
                in_flight: None,
                preparing: None,
                prepared: HashMap::new(),
                swallow: false,
                cut: false,
            };
            let number = shared.change(|state| {
                state.connected += 1;
                state.connections.insert(state.connected, Connection { cut: state.cut, ..connection });
                state.connected
            });
            let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
            tokio::select! {
                () = forward(from_client, to_server, &shared, number) => {}
                () = answer(from_server, to_client, &shared, number) => {}
                () = shared.mended(number) => {}
            }
            shared.change(|state| state.connections.remove(&number));
        });
    }
}

/// From the client to the server, statement by statement.
async fn forward(mut client: OwnedReadHalf, mut server: OwnedWriteHalf, shared: &Shared, number: u64) {
    let mut splitter = Splitter::new(shared.protocol);
    let mut bytes = vec![0; READ_BYTES];
    while let Ok(length) = client.read(&mut bytes).await
        && length > 0
    {
        splitter.add(&bytes[..length]);
        let known = |id: u32| shared.lock().connections.get(&number)?.prepared.get(&id).cloned();
        while let Some(unit) = splitter.next(known) {
            if let Some(statement) = unit.statement {
                shared.pass(number, statement).await;
            }
            if unit.prepares.is_some() {
                shared.of_connection(number, |connection| connection.preparing = unit.prepares);
            }
            if !shared.is_cut(number) && server.write_all(&shared.altered(unit.bytes)).await.is_err() {
                return;
            }
        }
    }
    shared.stay_if_cut(number).await;
}

/// From the server to the client.
async fn answer(mut server: OwnedReadHalf, mut client: OwnedWriteHalf, shared: &Shared, number: u64) {
    let mut bytes = vec![0; READ_BYTES];
    let mut greeted = false;
    while let Ok(length) = server.read(&mut bytes).await
        && length > 0
    {
        let answer = &bytes[..length];
        let swallow = shared.of_connection(number, |connection| {
            if !greeted && shared.protocol == Protocol::MySql {
                connection.session = wire::session_number(answer);
            }
            if let Some(statement) = connection.preparing.take()
                && let Some(id) = wire::prepared_number(answer)
            {
                connection.prepared.insert(id, statement);
            }
            connection.in_flight = None;
            connection.swallow
        });
        greeted = true;
        if swallow == Some(true) {
            shared.change(|state| {
                state.swallowed += 1;
                state.shut |= std::mem::take(&mut state.shuts_then);
            });
            return;
        }
        if !shared.is_cut(number) && client.write_all(answer).await.is_err() {
            return;
        }
    }
    shared.stay_if_cut(number).await;
}
