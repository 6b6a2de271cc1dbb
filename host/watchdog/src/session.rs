//! A ZooKeeper session: how it is made, and how it ends.
//!
//! The servers alone decide whether a session lives. A session is [`State::Connected`] until the connection breaks, then
//! [`State::Disconnected`] (the client notices within two fifths of the session timeout) while the client looks for another server, and
//! either connected again or, for good, [`State::Ended`]. The servers expire a session that they have not heard of for its timeout, rounded up
//! to their next tick, and delete its ephemeral nodes; the client learns that when it reaches a server, or assumes it by itself after seven
//! fifths of the timeout. What is asked while disconnected waits until the session is connected again or has ended.

use std::time::Duration;

use tokio::sync::watch;
use zookeeper_client::{Acl, AuthId, Client, Permission, SessionInfo, SessionState};

use crate::{Error, Result, root};

mod servers;

/// How to connect.
#[derive(Clone, Debug)]
pub struct Options {
    /// `host:port` of the servers, separated by commas, with a chroot behind the last one if wanted: `a:2181,b:2181,c:2181/tenant`. The port
    /// is 2181 where it is left out. The chroot has to exist.
    pub servers: String,
    /// How long the servers keep the session without a sign of life, 100 ms to 1 h. They fit it between 2 and 20 of their ticks;
    /// [`Session::timeout`] tells what came of it. Connecting is given up after about this time, too. Default: 10 s, as WatchdogQueue.
    pub session_timeout: Duration,
    /// Who we are, for access lists. Default: nobody.
    pub digest: Vec<Digest>,
    /// Who may use the nodes we make. Default: everybody, as WatchdogQueue.
    pub access: Access,
    /// The session to join again instead of making one. Default: none.
    pub rejoin: Option<Ticket>,
    /// Leave the session to its timeout when the last user of it is gone, so that it can be joined again, instead of closing it. Default: no.
    pub detached: bool,
}

impl Options {
    /// The defaults, for these servers.
    pub fn new(servers: impl Into<String>) -> Options {
        Options {
            servers: servers.into(),
            session_timeout: Duration::from_secs(10),
            digest: Vec::new(),
            access: Access::Everybody,
            rejoin: None,
            detached: false,
        }
    }

    /// Checks everything that can be checked without a server.
    ///
    /// # Errors
    /// [`Error::Config`] for a server list that is none, a session timeout out of bounds, or an access that needs credentials which are missing.
    pub fn check(&self) -> Result<()> {
        check(self).map(drop)
    }
}

/// A user name and its password, of ZooKeeper's scheme `digest`.
#[derive(Clone, PartialEq, Eq)]
pub struct Digest {
    user: String,
    password: String,
}

impl Digest {
    /// From `user:password`.
    ///
    /// # Errors
    /// [`Error::Config`] without a colon or a user. The message does not carry the password.
    pub fn parse(text: &str) -> Result<Digest> {
        match text.split_once(':') {
            Some((user, password)) if !user.is_empty() => Ok(Digest { user: user.to_owned(), password: password.to_owned() }),
            _ => Err(Error::config("digest", "***", "expected user:password")),
        }
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Digest({}:***)", self.user)
    }
}

/// Who may use the nodes we make.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Access {
    /// Everybody, everything.
    #[default]
    Everybody,
    /// Only who has the same credentials as we; needs [`Options::digest`].
    Ourselves,
    /// A list.
    List(Vec<Acl>),
}

impl Access {
    /// From `everybody`, `ourselves`, or a list as zkCli writes it: `scheme:id:permissions`, separated by commas, the permissions being letters
    /// of `cdrwa`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the entry that is wrong.
    pub fn parse(text: &str) -> Result<Access> {
        match text {
            "everybody" => Ok(Access::Everybody),
            "ourselves" => Ok(Access::Ourselves),
            list => list.split(',').map(parse_acl).collect::<Result<_>>().map(Access::List),
        }
    }

    /// The list that a node is made with.
    pub(crate) fn list(&self) -> Vec<Acl> {
        match self {
            Access::Everybody => vec![Acl::new(Permission::ALL, AuthId::anyone())],
            Access::Ourselves => vec![Acl::new(Permission::ALL, AuthId::authed())],
            Access::List(list) => list.clone(),
        }
    }
}

fn parse_acl(entry: &str) -> Result<Acl> {
    let wrong = |problem: String| Error::config("access", entry, problem);
    let scheme_and_rest = entry.split_once(':').zip(entry.rsplit_once(':'));
    let Some(((scheme, _), (scheme_and_id, letters))) =
        scheme_and_rest.filter(|((scheme, _), (front, _))| front.len() > scheme.len())
    else {
        return Err(wrong("expected scheme:id:permissions, such as world:anyone:r".to_owned()));
    };
    let mut permission = Permission::NONE;
    for letter in letters.chars() {
        permission = permission
            | match letter {
                'c' => Permission::CREATE,
                'd' => Permission::DELETE,
                'r' => Permission::READ,
                'w' => Permission::WRITE,
                'a' => Permission::ADMIN,
                other => return Err(wrong(format!("{other:?} is no permission, expected letters of cdrwa"))),
            };
    }
    if permission == Permission::NONE {
        return Err(wrong("no permission is given".to_owned()));
    }
    Ok(Acl::new(permission, AuthId::new(scheme, &scheme_and_id[scheme.len() + 1..])))
}

/// The number of a session, printed in hexadecimal as the servers' own tools do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub i64);

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// What it takes to join a session again: its number and the password that the servers gave it.
///
/// It serves within the process that made the session. Across processes the protocol would allow it, but the client (zookeeper-client 0.11)
/// neither shows the password nor takes one: a ticket cannot be written down. A number alone, as [`SessionId`] prints it, does not suffice: the
/// servers refuse a session without its password.
#[derive(Clone, Debug)]
pub struct Ticket(SessionInfo);

impl Ticket {
    /// The session's number.
    pub fn id(&self) -> SessionId {
        SessionId(self.0.id().0)
    }
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The servers did not hear of us for its timeout, or we not of them for longer.
    Expired,
    /// The servers refused our credentials.
    AuthFailed,
    /// We closed it.
    Closed,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            End::Expired => "has expired",
            End::AuthFailed => "was refused: the credentials are not accepted",
            End::Closed => "is closed",
        })
    }
}

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A server answers.
    Connected,
    /// No server answers; the session may live or not.
    Disconnected,
    /// It is over, for good.
    Ended(End),
}

impl From<SessionState> for State {
    fn from(state: SessionState) -> State {
        match state {
            SessionState::SyncConnected => State::Connected,
            // We never ask for a read-only session; were we given one, we could neither kick nor consume.
            SessionState::Disconnected | SessionState::ConnectedReadOnly => State::Disconnected,
            SessionState::Expired => State::Ended(End::Expired),
            SessionState::AuthFailed => State::Ended(End::AuthFailed),
            SessionState::Closed => State::Ended(End::Closed),
        }
    }
}

/// A session, shared by its clones and closed with the last of them.
#[derive(Clone, Debug)]
pub struct Session {
    client: Client,
    state: watch::Receiver<State>,
    access: std::sync::Arc<[Acl]>,
}

impl Session {
    /// Makes a session, or joins one again. Has to be called within a tokio runtime; the session lives on it.
    ///
    /// # Errors
    /// [`Error::Config`] for options that cannot be; [`Error::Unreachable`] if no server let us in within about the session timeout;
    /// [`Error::SessionEnded`] if the session to join is over or the credentials are refused.
    pub async fn connect(options: &Options) -> Result<Session> {
        const DOING: &str = "connecting to ZooKeeper";
        let servers = check(options)?;
        let mut connector = Client::connector().with_session_timeout(options.session_timeout);
        for Digest { user, password } in &options.digest {
            connector = connector.with_auth("digest", format!("{user}:{password}").as_bytes());
        }
        if options.detached {
            connector = connector.with_detached();
        }
        if let Some(Ticket(info)) = &options.rejoin {
            connector = connector.with_session(info.clone());
        }
        let begun = std::time::Instant::now();
        // The client's own limit is the session timeout; a server that accepts and then says nothing can make it a little longer.
        let limit = options.session_timeout * 2;
        let connected = tokio::time::timeout(limit, Box::pin(connector.connect(&options.servers))).await;
        let client = match connected.unwrap_or(Err(zookeeper_client::Error::Timeout)) {
            Ok(client) => client,
            Err(source) => {
                return Err(match Error::of(DOING, "", source) {
                    Error::ZooKeeper { source, .. } => {
                        Error::Unreachable { waited: begun.elapsed(), servers: servers::look_at(&servers).await, source }
                    }
                    ended => ended,
                });
            }
        };
        let state = follow(&client);
        tracing::debug!(session = %SessionId(client.session_id().0), timeout = ?client.session_timeout(), "connected to ZooKeeper");
        let session = Session { client, state, access: options.access.list().into() };
        if options.rejoin.is_some() {
            // The server at hand may be behind the one that we were connected to before.
            session.repeat(|| session.client.sync("/")).await.map_err(|source| Error::of(DOING, "/", source))?;
        }
        Ok(session)
    }

    /// The session's number.
    pub fn id(&self) -> SessionId {
        SessionId(self.client.session_id().0)
    }

    /// The timeout that the servers granted.
    pub fn timeout(&self) -> Duration {
        self.client.session_timeout()
    }

    /// What to join it with again. Only of use if [`Options::detached`] was set, or while this session lives on elsewhere.
    pub fn ticket(&self) -> Ticket {
        Ticket(self.client.session().clone())
    }

    /// Where it stands now.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// A receiver of every change of state. The last state it receives is [`State::Ended`].
    pub fn watch(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Waits until it has ended.
    pub async fn ended(&self) -> End {
        match self.watch().wait_for(|state| matches!(state, State::Ended(_))).await.as_deref() {
            Ok(State::Ended(end)) => *end,
            // The sender is gone only after a last state was sent, or with its runtime.
            _ => End::Closed,
        }
    }

    /// Closes it, so that its ephemeral nodes are gone when this returns, unless a clone of it is in use elsewhere. Waits at most the
    /// session timeout for the server's answer; then the nodes vanish with the timeout.
    pub async fn close(self) {
        let (patience, mut state) = (self.timeout(), self.watch());
        drop(self);
        let ended = state.wait_for(|state| matches!(state, State::Ended(_)));
        // Dropping the last clone has asked for it; there is nothing more to do about a server that does not answer.
        let _ = tokio::time::timeout(patience, ended).await;
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// The access list for a node that we make.
    pub(crate) fn access(&self) -> zookeeper_client::Acls<'_> {
        zookeeper_client::Acls::new(&self.access)
    }

    /// Repeats an operation that may be done more than once, while the connection breaks under it. What is asked while disconnected waits,
    /// so this neither spins nor outlives the session.
    pub(crate) async fn repeat<T, F>(&self, operation: impl Fn() -> F) -> std::result::Result<T, zookeeper_client::Error>
    where
        F: Future<Output = std::result::Result<T, zookeeper_client::Error>>,
    {
        loop {
            match plain(operation().await) {
                Err(zookeeper_client::Error::ConnectionLoss) => {}
                result => return result,
            }
        }
    }
}

/// A request whose connection broke is answered with whatever broke it: an error of the operating system, or a message about a server that
/// fell silent. To the caller it is all the same: the connection is lost, and the request may have been done or not.
pub(crate) fn plain<T>(
    result: std::result::Result<T, zookeeper_client::Error>,
) -> std::result::Result<T, zookeeper_client::Error> {
    result.map_err(|error| match error {
        zookeeper_client::Error::Custom(_) => zookeeper_client::Error::ConnectionLoss,
        error => error,
    })
}

/// Checks everything that can be checked without asking; the servers, each with its port.
pub(crate) fn check(options: &Options) -> Result<Vec<String>> {
    let servers = servers::parse(&options.servers)?;
    let allowed = Duration::from_millis(100)..=Duration::from_secs(3_600);
    if !allowed.contains(&options.session_timeout) {
        return Err(Error::config("session timeout", &format!("{:?}", options.session_timeout), "100 ms to 1 h are allowed"));
    }
    if matches!(options.access, Access::Ourselves) && options.digest.is_empty() {
        return Err(Error::config("access", "ourselves", "needs credentials, else nobody could use the nodes"));
    }
    Ok(servers)
}

/// The client's states as ours. The task ends with the session; it holds no client, so it does not keep the session alive.
fn follow(client: &Client) -> watch::Receiver<State> {
    let mut source = client.state_watcher();
    let (sender, receiver) = watch::channel(client.state().into());
    tokio::spawn(async move {
        while !matches!(*sender.borrow(), State::Ended(_)) {
            let state = State::from(source.changed().await);
            sender.send_replace(state);
        }
    });
    receiver
}

/// Whether a path from the command line or a caller can be asked for; the top itself is allowed.
pub(crate) fn check_path(path: &str) -> Result<()> {
    match root::wrong_with(path) {
        Some(problem) if path != "/" && !path.starts_with("/zookeeper") => Err(Error::config("path", path, problem)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_lists_are_read_as_zkcli_writes_them() {
        let Access::List(list) = Access::parse("world:anyone:r,digest:bob:3Yg=:cdrwa,ip:10.0.0.0/8:rw").unwrap() else {
            panic!("no list")
        };
        assert_eq!((list[0].scheme(), list[0].id(), list[0].permission()), ("world", "anyone", Permission::READ));
        assert_eq!((list[1].scheme(), list[1].id(), list[1].permission()), ("digest", "bob:3Yg=", Permission::ALL));
        assert_eq!((list[2].scheme(), list[2].id()), ("ip", "10.0.0.0/8"));
        for wrong in ["", "world", "world:anyone", "world:anyone:", "world:anyone:x", "world:anyone:r,,"] {
            assert!(Access::parse(wrong).is_err(), "{wrong:?} was taken");
        }
    }

    #[test]
    fn a_password_is_never_printed() {
        let digest = Digest::parse("bob:secret").unwrap();
        assert_eq!(format!("{digest:?}"), "Digest(bob:***)");
        assert!(!Digest::parse("secret").unwrap_err().to_string().contains("secret"));
    }
}
