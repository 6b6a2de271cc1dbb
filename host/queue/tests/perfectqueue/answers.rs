//! Every operation, with the answer to each of its statements lost in turn: what the server has done although nobody heard of it is not done twice, and the
//! operation answers as if it had run once.

use std::time::Duration;

use laelaps_queue::{Config, Connections, Event, HostId, PluginVersion, Policy, Queue, Tls};
use laelaps_test_databases::gate::{Gate, Protocol};
use laelaps_test_databases::{PATIENCE, eventually};

use crate::fixture::{LONG, Site, asking, finish, task};

/// Statements of one operation, so that one that never ends is noticed.
const STATEMENTS_MAX: usize = 100;
/// Statements that it did not come to any more before that is its end: it has one more or less from time to time, such as a look that found nothing to do.
const BEYOND: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Submit,
    Claim,
    /// Its host knows of a task that must run alone.
    ClaimBesideSuspect,
    Finish,
    Retry,
    Release,
    Beat,
    Update,
    CancelWaiting,
    CancelRunning,
    CancelEnded,
    CancelById,
    ForceFinish,
    RetryCancelled,
    ReleaseHeld,
    ReleaseHeldInVain,
    DropHeld,
    DropHeldInVain,
    CleanUp,
    Register,
    HandOn,
    Excuse,
    ReleasePlugin,
    ReleasePluginInVain,
}

impl Act {
    const ALL: [Self; 24] = [
        Self::Submit,
        Self::Claim,
        Self::ClaimBesideSuspect,
        Self::Finish,
        Self::Retry,
        Self::Release,
        Self::Beat,
        Self::Update,
        Self::CancelWaiting,
        Self::CancelRunning,
        Self::CancelEnded,
        Self::CancelById,
        Self::ForceFinish,
        Self::RetryCancelled,
        Self::ReleaseHeld,
        Self::ReleaseHeldInVain,
        Self::DropHeld,
        Self::DropHeldInVain,
        Self::CleanUp,
        Self::Register,
        Self::HandOn,
        Self::Excuse,
        Self::ReleasePlugin,
        Self::ReleasePluginInVain,
    ];

    /// Whether it needs our tables.
    fn is_for_ours(self) -> bool {
        matches!(
            self,
            Self::ClaimBesideSuspect | Self::RetryCancelled | Self::Register | Self::HandOn | Self::Excuse | Self::ReleasePlugin
        )
    }
}

/// A site, and a way to it on which answers get lost.
struct Way {
    site: Site,
    far: Site,
    gate: Gate,
}

impl Way {
    async fn to(site: Site) -> Self {
        let (before, name) = site.config.url.rsplit_once('/').unwrap();
        let (before, port) = before.rsplit_once(':').unwrap();
        let gate = Gate::before(port.parse().unwrap(), Protocol::MySql).await;
        let connections = Connections { max: 4, tls: Some(Tls::Disabled), ..site.config.connections.clone() };
        let url = format!("{before}:{}/{name}", gate.port());
        let config = Config { url, connections, ..site.config.clone() };
        let queue = Queue::open(&config).await.unwrap();
        Self { far: Site { config, queue }, site, gate }
    }

    /// A host that runs task `a`, claimed on this way.
    async fn running(&self) -> (HostId, laelaps_queue::ClaimedTask) {
        let host = if self.site.has_ours() { self.far.watched("far").await } else { self.far.host().await };
        self.site.submit(&[task("a")]).await;
        (host, self.claimed(host).await.remove(0))
    }

    /// What a claim on this way takes. Rows that are made anew within a second may stand before where the walk of claims has come, and are met by its next
    /// round.
    async fn claimed(&self, host: HostId) -> Vec<laelaps_queue::ClaimedTask> {
        let mut tasks = Vec::new();
        eventually(PATIENCE, "the task is met", async || {
            tasks = self.far.claim(host, 1).await;
            if tasks.is_empty() { Err("not yet".to_owned()) } else { Ok(()) }
        })
        .await;
        tasks
    }

    /// Do it, with the answer to the statement of this number lost; 0: none. Answers in words what it came to, and what became of the task.
    async fn seen(&self, act: Act, statement: usize) -> String {
        let (near, far) = (self.site.backend(), self.far.backend());
        let arm = || self.gate.swallow_nth(statement);
        let bad = || vec![PluginVersion { name: "bad".to_owned(), digest: "bad".to_owned() }];
        let outcome = match act {
            Act::Submit => {
                arm();
                format!("{:?}", far.submit(&[task("a"), task("b")]).await)
            }
            Act::Claim => {
                let host = self.far.host().await;
                self.site.submit(&[task("a")]).await;
                arm();
                format!("{} claimed", self.claimed(host).await.len())
            }
            Act::ClaimBesideSuspect => {
                self.site.submit(&[task("suspect")]).await;
                for identity in ["one", "two"] {
                    let host = self.site.watched(identity).await;
                    assert_eq!(self.site.claim(host, 1).await.len(), 1);
                    self.site.hand_on(identity).await;
                }
                let host = self.far.host().await;
                eventually(PATIENCE, "the suspect is met", async || {
                    let claimed = far.claim(&asking(host, 1)).await.unwrap();
                    if claimed.alone_waiting { Ok(()) } else { Err("not yet".to_owned()) }
                })
                .await;
                self.site.submit(&[task("a")]).await;
                arm();
                format!("{} claimed", self.claimed(host).await.len())
            }
            Act::Finish | Act::Retry | Act::Release => {
                let (_, claimed) = self.running().await;
                arm();
                let event = match act {
                    Act::Finish => finish(),
                    Act::Retry => Event::Retry { delay: Some(LONG) },
                    _ => Event::Release { delay: None },
                };
                format!("{:?}", self.far.settle(&claimed, event).await)
            }
            Act::Beat => {
                let (_, claimed) = self.running().await;
                arm();
                format!("{:?}", self.far.beat(&claimed).await)
            }
            Act::Update => {
                let (_, claimed) = self.running().await;
                arm();
                format!("{:?}", far.update_data(claimed.lease_ref, br#"{"x":1}"#).await)
            }
            Act::CancelWaiting | Act::CancelById | Act::ForceFinish => {
                self.site.submit(&[task("a")]).await;
                let id = self.site.get("a").await.id;
                arm();
                match act {
                    Act::CancelWaiting => format!("{:?}", far.cancel("a", LONG).await),
                    Act::CancelById => format!("{:?}", far.cancel_by_id(id, LONG).await),
                    _ => format!("{:?}", far.force_finish("a", LONG).await),
                }
            }
            Act::CancelRunning => {
                self.running().await;
                arm();
                format!("{:?}", far.cancel("a", LONG).await)
            }
            Act::CancelEnded => {
                self.site.submit(&[task("a")]).await;
                near.cancel("a", LONG).await.unwrap();
                arm();
                format!("{:?}", far.cancel("a", LONG).await)
            }
            Act::RetryCancelled => {
                self.site.submit(&[task("a")]).await;
                near.cancel("a", LONG).await.unwrap();
                arm();
                format!("{:?}", far.retry("a").await)
            }
            Act::ReleaseHeld | Act::DropHeld => {
                self.site.submit(&[task("a").on_hold()]).await;
                arm();
                let done = if act == Act::DropHeld { far.drop_held("a").await } else { far.release_held("a").await };
                format!("{done:?}")
            }
            Act::ReleaseHeldInVain => {
                arm();
                format!("{:?}", far.release_held("a").await)
            }
            Act::DropHeldInVain => {
                arm();
                format!("{:?}", far.drop_held("a").await)
            }
            Act::CleanUp => {
                self.site.submit(&[task("a")]).await;
                near.cancel("a", Duration::ZERO).await.unwrap();
                arm();
                format!("{:?}", far.clean_up(10).await)
            }
            Act::Register => {
                arm();
                let host = self.far.watched("far").await;
                let hosts = near.hosts().await.unwrap();
                format!("{} registered, this one {}", hosts.len(), hosts.iter().any(|known| known.id == host))
            }
            Act::HandOn => {
                self.running().await;
                arm();
                let handed_on = far.hand_on(&["far".to_owned()], &Policy::default()).await.unwrap();
                format!("{} tasks, {} hosts", handed_on.tasks.len(), handed_on.dead_hosts.len())
            }
            Act::Excuse => {
                let (host, claimed) = self.running().await;
                self.site.hand_on("far").await;
                // Who claims it next counts the loss.
                let other = self.site.host().await;
                assert_eq!(self.site.claim(other, 1).await.len(), 1);
                arm();
                format!("{:?}", far.excuse(host, &[claimed.lease_ref]).await)
            }
            Act::ReleasePlugin | Act::ReleasePluginInVain => {
                if act == Act::ReleasePlugin {
                    let host = self.site.watched("near").await;
                    near.note_running(host, &bad()).await.unwrap();
                    self.site.hand_on("near").await;
                }
                arm();
                format!("{:?}", far.release_plugin("bad").await)
            }
        };
        let task = self.site.queue.get("a").await.unwrap().map(|task| (task.state, task.attempts, task.lost, task.data));
        format!("{outcome}, {task:?}")
    }

    async fn clear(&self) {
        let mut ruby = self.site.ruby().await;
        ruby.run("DELETE FROM {t}").await;
        if self.site.has_ours() {
            for sql in ["DELETE FROM {s}", "DELETE FROM {h}", "DELETE FROM {d}"] {
                ruby.run(sql).await;
            }
        }
    }
}

async fn lose_each_answer(site: Site) {
    let way = Way::to(site).await;
    let mut wrong = Vec::new();
    for act in Act::ALL.into_iter().filter(|act| way.site.has_ours() || !act.is_for_ours()) {
        let undisturbed = way.seen(act, 0).await;
        way.clear().await;
        let mut beyond = 0;
        for statement in 1.. {
            assert!(statement < STATEMENTS_MAX, "{act:?} has no end");
            let before = way.gate.swallowed();
            let disturbed = way.seen(act, statement).await;
            way.gate.swallow_nth(0);
            way.clear().await;
            if disturbed != undisturbed {
                wrong.push(format!("{act:?}, without answer {statement}: {disturbed}, not {undisturbed}"));
                break;
            }
            beyond = if way.gate.swallowed() == before { beyond + 1 } else { 0 };
            if beyond == BEYOND {
                println!("{act:?}: {} statements; {undisturbed}", statement - BEYOND);
                break;
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_changes_no_operations_answer() {
    lose_each_answer(Site::new().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_changes_no_operations_answer_without_our_tables() {
    lose_each_answer(Site::plain().await).await;
}
