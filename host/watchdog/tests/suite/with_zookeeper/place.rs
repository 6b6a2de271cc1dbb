//! A part of the shared server for each test.

use std::time::Duration;

use laelaps_test_zookeeper::{LONG, shared, unique_name, waiting_for};
use laelaps_watchdog::{NewQueue, Options, Root, Session, WatchdogQueue};

/// How long a queue's child may go without a kick, where a test does not care.
pub(super) const TIMER: Duration = Duration::from_secs(3_600);
/// A session that outlives every pause which a busy machine makes, where a test does not wait for its end.
pub(super) const LONG_SESSION: Duration = Duration::from_secs(60);
/// A session that a busy machine does not end either, for tests that wait for its end.
pub(super) const SESSION: Duration = Duration::from_secs(10);

/// A chroot on the shared server, and who connects to it.
pub(super) struct Place {
    servers: String,
    chroot: String,
}

impl Place {
    /// `name` is the test's.
    pub(super) async fn new(name: &str) -> Place {
        Place::on(&shared().await.address(), name).await
    }

    /// On servers of the test's own.
    pub(super) async fn on(servers: &str, name: &str) -> Place {
        // Other processes have tests of this name on the same servers.
        let chroot = unique_name(&format!("/{name}"));
        let top = Session::connect(&options(servers)).await.expect("the servers let us in");
        let marker = Root::new(format!("{chroot}/marker")).expect("a root");
        let mut queue = WatchdogQueue::over(top, marker);
        let made = queue.create_queue(&NewQueue { parents: true, ..NewQueue::default() }, TIMER).await;
        made.expect("a chroot for the test");
        queue.clear_timers().await.expect("only the chroot stays");
        Place { servers: servers.to_owned(), chroot }
    }

    /// Where a foreign client connects, without the chroot.
    pub(super) fn servers(&self) -> &str {
        &self.servers
    }

    /// The path of a root as a client without chroot sees it.
    pub(super) fn absolute(&self, root: &str) -> String {
        format!("{}{root}", self.chroot)
    }

    pub(super) fn options(&self) -> Options {
        options(&format!("{}{}", self.servers, self.chroot))
    }

    /// A client with a session of its own, at the root `/q`.
    pub(super) async fn client(&self) -> WatchdogQueue {
        WatchdogQueue::new(&self.options(), "/q").await.expect("the server lets us in")
    }

    /// A master that has made `/q`.
    pub(super) async fn master(&self, queue: &NewQueue) -> WatchdogQueue {
        let mut master = self.client().await;
        master.create_queue(queue, TIMER).await.expect("a queue");
        master
    }

    /// A child that has attached to `/q`.
    pub(super) async fn child(&self) -> WatchdogQueue {
        let mut child = self.client().await;
        child.attach_queue(TIMER).await.expect("a queue");
        child
    }
}

/// How to connect, with a [`LONG_SESSION`].
pub(super) fn options(servers: &str) -> Options {
    Options { session_timeout: LONG_SESSION, ..Options::new(servers) }
}

/// Items `0`, `1` and so on.
pub(super) fn items(count: usize) -> NewQueue {
    NewQueue { items: (0..count).map(|n| n.to_string().into_bytes()).collect(), ..NewQueue::default() }
}

/// Waits for what an event announces.
pub(super) async fn soon<T>(promise: &str, event: impl Future<Output = T>) -> T {
    let Ok(value) = waiting_for(promise, tokio::time::timeout(LONG, event)).await else {
        panic!("{promise}: not within {LONG:?}")
    };
    value
}
