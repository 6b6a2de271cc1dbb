//! A host's life in its fleet: one session after the other, each with a timer and an identity of its own.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use zookeeper_client::{CreateMode, Error as Zk};

use super::kicker::kick;
use super::member::{look_at_root, timer_data};
use super::watcher::Watcher;
use super::{Host, Identity, Options, Standing};
use crate::root::FLEET_ROOT;
use crate::{Error, Result, Root, Session, State, Timer};

/// The shortest and the longest pause before the next try, which is chosen between half of it and the whole.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// How a session's part of the life ended.
enum Parted {
    /// We were told to leave, and have.
    Left,
    /// The session ended, or the root cannot be used.
    Failed(Error),
}

/// Lives until told to leave.
pub(super) async fn live<H: Host>(
    options: Options,
    host: Arc<H>,
    standing: watch::Sender<Standing>,
    mut leaving: watch::Receiver<bool>,
) {
    let mut told = String::new();
    let mut pause = PAUSE.0;
    while !*leaving.borrow_and_update() {
        let error = match one_session(&options, &host, &standing, leaving.clone()).await {
            Parted::Left => break,
            Parted::Failed(error) => error,
        };
        // Whoever was present before may come back at once; whoever did not get that far waits longer each time.
        pause = if standing.borrow().identity().is_some() { PAUSE.0 } else { (pause * 2).min(PAUSE.1) };
        let reason = error.to_string();
        standing.send_replace(Standing::Away { reason: reason.clone() });
        if error.gist() != told {
            told = error.gist();
            tracing::warn!(root = %options.root, hint = error.hint(), "this host is not in its fleet and claims nothing: {reason}; trying again");
        }
        let pause = pause.mul_f64(0.5 + fastrand::f64() / 2.0);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = leaving.changed() => {}
        }
    }
    standing.send_replace(Standing::Away { reason: "left the fleet".to_owned() });
}

async fn one_session<H: Host>(
    options: &Options,
    host: &Arc<H>,
    standing: &watch::Sender<Standing>,
    mut leaving: watch::Receiver<bool>,
) -> Parted {
    let joined = tokio::select! {
        joined = join(options) => joined,
        () = told_to_leave(&mut leaving) => return Parted::Left,
    };
    let (session, timer) = match joined {
        Ok(joined) => joined,
        Err(error) => return Parted::Failed(error),
    };
    let identity = Identity { session: session.id(), czxid: timer.czxid() };
    tracing::info!(%identity, root = %options.root, session_timeout = ?session.timeout(), "this host is in its fleet");
    let (timers, current_timer) = watch::channel(Arc::new(timer));
    let (beat, beats) = watch::channel(None);
    let (acting, acts) = watch::channel(false);
    let mut watcher = Watcher::new(&session, options, &**host, identity, beats, timers, acting);
    let error = tokio::select! {
        // The standing first: a claim must not be allowed by a state that is known to be over.
        biased;
        error = publish(&session, identity, acts, standing) => error,
        () = told_to_leave(&mut leaving) => {
            let timer = current_timer.borrow().clone();
            // They hold the session as well, and it closes when nobody does.
            drop((watcher, current_timer));
            leave(session, timer).await;
            return Parted::Left;
        }
        Err(error) = kick(host.clone(), options.timer, current_timer.clone(), beat) => error,
        Err(error) = watcher.watch() => error,
        else => Error::SessionEnded { doing: "watching the fleet", end: crate::End::Closed },
    };
    Parted::Failed(error)
}

async fn told_to_leave(leaving: &mut watch::Receiver<bool>) {
    // An error means that nobody is left who could tell us; then the whole life is aborted.
    let _ = leaving.wait_for(|leave| *leave).await;
}

/// A session with a timer below the fleet's root.
async fn join(options: &Options) -> Result<(Session, Timer)> {
    let session = Session::connect(&options.session).await?;
    make_root(&session, &options.root).await?;
    let timer = Timer::create(&session, &options.root, &timer_data(options, None)).await?;
    Ok((session, timer))
}

/// The timer goes before the session, which may be in use elsewhere. If the servers do not answer, both go with the session's timeout.
async fn leave(session: Session, timer: Arc<Timer>) {
    if let Ok(Err(error)) = tokio::time::timeout(session.timeout(), timer.delete()).await {
        tracing::debug!(%error, "the timer could not be ended, and ends with its session");
    }
    drop(timer);
    session.close().await;
}

/// Says where we stand, whenever that changes, until the session ends.
async fn publish(
    session: &Session,
    identity: Identity,
    mut acts: watch::Receiver<bool>,
    standing: &watch::Sender<Standing>,
) -> Error {
    let mut states = session.watch();
    loop {
        let now = match *states.borrow_and_update() {
            State::Connected => Standing::Present { identity, acting: *acts.borrow_and_update() },
            State::Disconnected => Standing::Alone { identity },
            State::Ended(end) => return Error::SessionEnded { doing: "watching the fleet", end },
        };
        let was = standing.send_replace(now.clone());
        match (&was, &now) {
            (Standing::Present { .. }, Standing::Alone { .. }) => {
                tracing::warn!(%identity, "no ZooKeeper server answers: nothing is claimed until one does")
            }
            (Standing::Alone { .. }, Standing::Present { .. }) => tracing::info!(%identity, "a ZooKeeper server answers again"),
            _ => {}
        }
        tokio::select! {
            changed = states.changed() => if changed.is_err() {
                return Error::SessionEnded { doing: "watching the fleet", end: crate::End::Closed };
            },
            // The watcher outlives this; it ends with us.
            Ok(()) = acts.changed() => {}
        }
    }
}

/// Makes the fleet's root if it is not there, with what is above it.
pub(super) async fn make_root(session: &Session, root: &Root) -> Result<()> {
    let options = CreateMode::Persistent.with_acls(session.access());
    loop {
        match session.repeat(|| session.client().create(root.path(), FLEET_ROOT, &options)).await {
            Ok(_) => return Ok(()),
            Err(Zk::NodeExists) => match look_at_root(session, root).await {
                // Cleared between our two looks.
                Err(Error::NoRoot(_)) => {}
                looked => return looked.map(drop),
            },
            Err(Zk::NoNode) if root.parent() != "/" => {
                let made = session.repeat(|| session.client().mkdir(root.parent(), &options)).await;
                made.map_err(|source| Error::of("creating", root.parent(), source))?;
            }
            Err(Zk::NoNode) => return Err(Error::NoParent { root: root.path().to_owned(), parent: "the chroot".to_owned() }),
            Err(source) => return Err(Error::of("creating", root.path(), source)),
        }
    }
}
