//! The fleet in the database: each host leaves signs of life there and watches those of the others, where no ZooKeeper does.
//!
//! Authority: the database keeps the signs and says who was struck off. Who is dead is decided by a host that watched, with its own clock: a
//! sign has to have stood still for the whole of its host's `host_timeout` while the watcher was answered and its own signs were taken. So what
//! counts for nobody is
//!
//! ```text
//!   the server's clock                  a sign is a count, and its age is what the watcher has seen of it
//!   a look that is not answered         everybody starts anew, with a full host_timeout
//!   the time until a look is answered   left out
//!   looks half a host_timeout apart     the watcher was frozen, or the server: everybody starts anew
//!   a server that takes no writes       the watcher's own last sign is as old: everybody starts anew
//! ```
//!
//! A host gives its sign only while it is well ([`Pulse::health`]). The dead are marked first, if they have given no sign since the last look, then
//! handed on by the same path as ZooKeeper's; should the watcher die in between, any host takes back what they had. A host that wakes up finds
//! its leases lost and its next sign refused, and registers anew.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use laelaps_queue::{Error, HostId, Policy, Sign, Worker};
use laelaps_watchdog::fleet::Health;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Membership;
use crate::log::chain;
use crate::pulse::Pulse;

/// A host gives so many signs in the time for which it may go without one.
pub(crate) const SIGNS_PER_TIMEOUT: u32 = 4;
/// The first hosts look so often in that time, the others as often as they give signs.
const LOOKS_PER_TIMEOUT: u32 = 20;
/// So many hosts look often, those with the lowest numbers: what looking costs a server grows with the hosts, and hardly with their square.
const WATCHERS_MAX: usize = 4;

/// An identity that no host had before.
pub(crate) fn identity() -> String {
    format!("database-{:032x}", fastrand::u128(..))
}

/// Our signs, and our watch over others. Both end when this is dropped.
pub(crate) struct Signs {
    struck_off: watch::Receiver<bool>,
    given: watch::Receiver<Option<Instant>>,
    tasks: [JoinHandle<()>; 2],
}

impl Signs {
    /// Begin to give signs for a host that has just registered. `pulse` must notice within half of `timeout` that the host is not well.
    pub(crate) fn start(backend: Arc<dyn Worker>, policy: Policy, pulse: Arc<Pulse>, host: HostId, timeout: Duration) -> Self {
        let (struck_off_sender, struck_off) = watch::channel(false);
        let (given_sender, given) = watch::channel(None);
        let giver = Giver { backend: Arc::clone(&backend), pulse, host, timeout, given: given_sender };
        let watcher = Watcher { backend, policy, host, timeout, given: given.clone() };
        let tasks = [tokio::spawn(giver.give(struck_off_sender)), tokio::spawn(watcher.watch())];
        Self { struck_off, given, tasks }
    }

    /// The dispatcher's side of it.
    pub(crate) fn membership(&self) -> Membership {
        Membership::in_database(self.struck_off.clone(), self.given.clone())
    }
}

impl Drop for Signs {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Gives signs. Nothing that takes long happens here, so that handing on what others had does not make this host seem dead.
struct Giver {
    backend: Arc<dyn Worker>,
    pulse: Arc<Pulse>,
    host: HostId,
    timeout: Duration,
    /// When the last sign that was taken was sent.
    given: watch::Sender<Option<Instant>>,
}

impl Giver {
    /// Until the host is struck off.
    async fn give(self, struck_off: watch::Sender<bool>) {
        let (mut was_well, mut fails) = (true, false);
        loop {
            let begun = Instant::now();
            let (is_well, taken) = match self.pulse.health() {
                Health::Well => (true, self.backend.give_sign(self.host, self.timeout).await),
                Health::Unwell(reason) => {
                    if was_well {
                        let timeout = self.timeout;
                        tracing::warn!(%reason, "this host is not well: it gives no sign of life, and counts as dead after {timeout:?}");
                    }
                    (false, Ok(()))
                }
            };
            if is_well && !was_well {
                tracing::info!("this host is well again");
            }
            was_well = is_well;
            match taken {
                Ok(()) if is_well => {
                    fails = false;
                    self.given.send_replace(Some(begun));
                }
                Ok(()) => {}
                Err(Error::UnknownHost(_)) => {
                    struck_off.send_replace(true);
                    return;
                }
                Err(error) => {
                    if !std::mem::replace(&mut fails, true) {
                        tracing::warn!(error = chain(&error), "cannot give a sign of life in the database; trying again");
                    }
                }
            }
            let pause = self.timeout / if is_well && !fails { SIGNS_PER_TIMEOUT } else { LOOKS_PER_TIMEOUT };
            tokio::time::sleep(pause.saturating_sub(begun.elapsed())).await;
        }
    }
}

/// Watches over the others.
struct Watcher {
    backend: Arc<dyn Worker>,
    policy: Policy,
    host: HostId,
    timeout: Duration,
    given: watch::Receiver<Option<Instant>>,
}

impl Watcher {
    async fn watch(self) {
        let mut seen = Seen::default();
        let mut fails = false;
        let mut pause = self.timeout / LOOKS_PER_TIMEOUT;
        loop {
            tokio::time::sleep(pause).await;
            let asked = Instant::now();
            let mut signs = match self.backend.signs().await {
                Ok(signs) => signs,
                Err(error) => {
                    seen.forget();
                    if !std::mem::replace(&mut fails, true) {
                        tracing::warn!(error = chain(&error), "cannot read the signs of life of other hosts; trying again");
                    }
                    continue;
                }
            };
            fails = false;
            let is_among_the_first = signs.iter().take(WATCHERS_MAX).any(|sign| sign.host == self.host);
            pause = self.timeout / if is_among_the_first { LOOKS_PER_TIMEOUT } else { SIGNS_PER_TIMEOUT };
            signs.retain(|sign| sign.host != self.host);
            let dead = seen.look(asked, Instant::now(), *self.given.borrow(), signs);
            if !dead.is_empty()
                && let Err(error) = self.hand_on(&dead).await
            {
                tracing::warn!(error = chain(&error), "cannot hand on what dead hosts had; trying again");
            }
        }
    }

    async fn hand_on(&self, silent: &[Sign]) -> laelaps_queue::Result<()> {
        crate::fault::reach("mark-dead");
        let left = self.backend.mark_dead(silent).await?;
        let dead: Vec<&Sign> = silent.iter().filter(|sign| left.contains(&sign.host)).collect();
        let identities: Vec<String> = dead.iter().filter_map(|sign| sign.identity.clone()).collect();
        if identities.is_empty() {
            return Ok(());
        }
        let hosts: Vec<String> = dead.iter().map(|sign| format!("{} ({:?})", sign.host.0, sign.timeout)).collect();
        tracing::warn!(
            hosts = hosts.join(", "),
            "hosts gave no sign of life for so long: they are dead, and what they had is handed on"
        );
        super::hand_on(self.backend.as_ref(), &self.policy, &identities).await
    }
}

/// What was seen of the others' signs.
#[derive(Debug, Default)]
struct Seen {
    /// When the last look was answered.
    answered: Option<Instant>,
    silent: HashMap<HostId, Silence>,
}

/// How long a sign was watched standing still.
#[derive(Debug)]
struct Silence {
    count: i64,
    watched: Duration,
}

impl Seen {
    /// A look that was asked for and answered at these moments, after our own last sign was given at `given`. Returns the signs that stood still
    /// for as long as their hosts may go without another one.
    fn look(&mut self, asked: Instant, answered: Instant, given: Option<Instant>, signs: Vec<Sign>) -> Vec<Sign> {
        let before = self.answered.replace(answered);
        let since = |moment: Option<Instant>| moment.map_or(Duration::MAX, |moment| answered.saturating_duration_since(moment));
        let between = before.map_or(Duration::ZERO, |before| asked.saturating_duration_since(before));
        // What keeps our looks apart, or our own signs back, may keep back theirs.
        let blind = since(before).max(since(given));
        let mut silent = HashMap::with_capacity(signs.len());
        let mut dead = Vec::new();
        for sign in signs {
            let watched = match self.silent.get(&sign.host) {
                Some(before) if before.count == sign.count && blind <= sign.timeout / 2 => before.watched + between,
                _ => Duration::ZERO,
            };
            silent.insert(sign.host, Silence { count: sign.count, watched });
            if watched >= sign.timeout {
                dead.push(sign);
            }
        }
        self.silent = silent;
        dead
    }

    /// Everybody starts anew.
    fn forget(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);
    const LOOK: Duration = Duration::from_millis(500);
    const NOBODY: [i64; 0] = [];

    /// A watcher and the time by its clock.
    struct Watching {
        seen: Seen,
        now: Instant,
        looks: u32,
        /// Whether our own signs are not taken.
        unheard: bool,
    }

    impl Watching {
        fn new() -> Self {
            Self { seen: Seen::default(), now: Instant::now(), looks: 0, unheard: false }
        }

        /// A look after `pause` that is answered after `flight`; the hosts 1, 2, ... have given so many signs. Those found dead.
        fn look(&mut self, pause: Duration, flight: Duration, counts: &[i64]) -> Vec<i64> {
            let asked = self.now + pause;
            self.now = asked + flight;
            self.looks += 1;
            let sign = |(number, count): (usize, &i64)| Sign {
                host: HostId(i64::try_from(number).expect("few") + 1),
                identity: None,
                count: *count,
                timeout: TIMEOUT,
            };
            let given = (!self.unheard).then_some(asked);
            let dead = self.seen.look(asked, self.now, given, counts.iter().enumerate().map(sign).collect());
            dead.into_iter().map(|sign| sign.host.0).collect()
        }

        /// Regular looks until somebody is dead, the first host never giving another sign; the time since `from`.
        fn until_dead(&mut self, from: Instant, others: impl Fn(u32) -> i64) -> Duration {
            for _ in 0..200 {
                let other = others(self.looks);
                let dead = self.look(LOOK, Duration::ZERO, &[7, other]);
                if !dead.is_empty() {
                    assert_eq!(dead, [1], "the other one gives signs");
                    return self.now - from;
                }
            }
            panic!("nobody is dead after 100 s");
        }
    }

    /// A sign each fifth look.
    fn lively(look: u32) -> i64 {
        i64::from(look / 5)
    }

    #[test]
    fn only_a_sign_that_was_watched_standing_still_for_the_whole_time_is_of_a_dead_host() {
        let mut watching = Watching::new();
        let took = watching.until_dead(watching.now, lively);
        assert_eq!(took, TIMEOUT + LOOK, "the first look says only what the sign is");
    }

    #[test]
    fn a_count_that_goes_back_is_another_sign() {
        let mut watching = Watching::new();
        for count in (0..60).rev() {
            assert_eq!(watching.look(LOOK, Duration::ZERO, &[count / 10]), NOBODY);
        }
    }

    #[test]
    fn what_a_look_takes_is_not_time_in_which_a_sign_stood_still() {
        let mut watching = Watching::new();
        // 8 of 10 s are the server's.
        for _ in 0..20 {
            assert_eq!(watching.look(Duration::from_millis(100), Duration::from_millis(400), &[7]), NOBODY);
        }
    }

    #[test]
    fn after_an_outage_or_a_pause_of_the_watcher_everybody_has_the_whole_time_again() {
        let long = TIMEOUT * 3;
        let pauses: [fn(&mut Watching, Duration); 3] = [
            |watching, long| drop(watching.look(long, Duration::ZERO, &[7, 0])),
            |watching, long| drop(watching.look(LOOK, long, &[7, 0])),
            |watching, long| {
                watching.seen.forget();
                watching.now += long;
                drop(watching.look(LOOK, Duration::ZERO, &[7, 0]));
            },
        ];
        for pause in pauses {
            let mut watching = Watching::new();
            for _ in 0..19 {
                assert_eq!(watching.look(LOOK, Duration::ZERO, &[7, 0]), NOBODY);
            }
            pause(&mut watching, long);
            let took = watching.until_dead(watching.now, lively);
            assert_eq!(took, TIMEOUT);
        }
    }

    #[test]
    fn nobody_is_dead_for_time_in_which_our_own_signs_were_not_taken() {
        let mut watching = Watching::new();
        watching.unheard = true;
        for _ in 0..100 {
            assert_eq!(watching.look(LOOK, Duration::ZERO, &[7, 0]), NOBODY);
        }
        watching.unheard = false;
        assert_eq!(watching.until_dead(watching.now, lively), TIMEOUT);
    }

    #[test]
    fn a_host_that_was_gone_and_is_back_begins_anew() {
        let mut watching = Watching::new();
        for _ in 0..19 {
            assert_eq!(watching.look(LOOK, Duration::ZERO, &[7]), NOBODY);
        }
        assert_eq!(watching.look(LOOK, Duration::ZERO, &[]), NOBODY);
        assert_eq!(watching.until_dead(watching.now, lively), TIMEOUT + LOOK);
    }
}
