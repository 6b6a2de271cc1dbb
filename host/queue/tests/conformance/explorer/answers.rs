//! Every operation, with the answer to each of its statements lost in turn: what the server has done although nobody heard of it is not done twice, and the
//! operation answers as if it had run once.

use laelaps_queue::{Claim, HostDescription, PluginVersion, Queue, Sign, State};
use laelaps_test_databases::eventually;
use laelaps_test_databases::gate::Gate;

use super::arena::Arena;
use super::operation::{Operation, Outcome, Place, Scene};
use super::schedule::Side;
use crate::fixture::{Database, Fixture, LONG, PATIENCE, task};

/// Each operation is tried in the first place that it meets, and in these.
const PLACES: [(Operation, Place); 11] = [
    (Operation::Claim, Place::Due),
    (Operation::ClaimAlone, Place::Suspect),
    (Operation::Heartbeat, Place::Overdue),
    (Operation::Cancel, Place::Running),
    (Operation::ForceFinish, Place::Running),
    (Operation::Retry, Place::Ended),
    (Operation::Reclaim, Place::Overdue),
    (Operation::HandOn, Place::Running),
    (Operation::CleanUp, Place::Ended),
    (Operation::CancelById, Place::Running),
    (Operation::Excuse, Place::Lost),
];
/// Statements of one operation, so that one that never ends is noticed.
const STATEMENTS_MAX: usize = 100;
/// Statements that it did not come to any more before that is its end: it has one more or less from time to time, such as a look that found nothing to do.
const BEYOND: usize = 3;

/// Operations that have nothing to do: an answer that is lost does not make them say that they did it.
const IN_VAIN: [(Operation, Place); 8] = [
    (Operation::DropHeld, Place::Nowhere),
    (Operation::ReleaseHeld, Place::Nowhere),
    (Operation::Cancel, Place::Ended),
    (Operation::CancelById, Place::Ended),
    (Operation::ForceFinish, Place::Ended),
    (Operation::Retry, Place::Running),
    (Operation::Excuse, Place::Running),
    (Operation::Finish, Place::Lost),
];

/// What is no operation on one task.
#[derive(Clone, Copy, Debug)]
enum Other {
    Register,
    ReleasePlugin,
    ReleasePluginInVain,
    /// A host that is dead, with what it had.
    HandOn,
    /// A host that gives no sign of life any more; on servers.
    MarkDead,
    /// A task that was set aside, by its number.
    CancelAside,
}

#[derive(Clone, Copy, Debug)]
enum Act {
    On(Operation, Place),
    Other(Other),
}

fn acts() -> Vec<Act> {
    let first = |operation: Operation| Some((operation, Place::ALL.into_iter().find(|place| operation.meets(*place))?));
    let on = Operation::ALL.into_iter().filter_map(first).chain(PLACES);
    let others =
        [Other::Register, Other::ReleasePlugin, Other::ReleasePluginInVain, Other::HandOn, Other::MarkDead, Other::CancelAside];
    on.chain(IN_VAIN).map(|(operation, place)| Act::On(operation, place)).chain(others.map(Act::Other)).collect()
}

async fn dead_host(fixture: &Fixture, identity: &str) {
    let host = fixture.host_as(identity).await;
    fixture.submit(&[task(&format!("of {identity}"))]).await;
    assert_eq!(fixture.claim(host, 1).await.len(), 1);
    let version = PluginVersion { name: "bad".to_owned(), digest: "bad".to_owned() };
    fixture.backend().note_running(host, &[version]).await.unwrap();
}

impl Other {
    /// Answers in words what it came to, and what followed.
    async fn run(self, fixture: &Fixture, number: usize, queue: &Queue, arm: impl FnOnce()) -> String {
        let identity = format!("other {number}");
        let policy = &fixture.config.policy;
        match self {
            Self::Register => {
                let described = HostDescription { name: "far".to_owned(), process_id: 1, identity: Some(identity.clone()) };
                arm();
                let host = queue.backend().register_host(&described).await.unwrap();
                let hosts = fixture.backend().hosts().await.unwrap();
                let ours: Vec<_> = hosts.into_iter().filter(|known| known.identity.as_ref() == Some(&identity)).collect();
                format!("{} registered, this one {}", ours.len(), ours.iter().any(|known| known.id == host))
            }
            Self::ReleasePlugin | Self::ReleasePluginInVain => {
                if matches!(self, Self::ReleasePlugin) {
                    dead_host(fixture, &identity).await;
                    fixture.backend().hand_on(&[identity], policy).await.unwrap();
                }
                arm();
                format!("{:?}", queue.backend().release_plugin("bad").await)
            }
            Self::HandOn => {
                dead_host(fixture, &identity).await;
                arm();
                let handed_on = queue.backend().hand_on(std::slice::from_ref(&identity), policy).await.unwrap();
                let lost = fixture.get(&format!("of {identity}")).await.lost;
                format!("{} tasks, {} hosts, lost {lost}", handed_on.tasks.len(), handed_on.dead_hosts.len())
            }
            Self::MarkDead => {
                dead_host(fixture, &identity).await;
                let host = fixture.backend().hosts().await.unwrap().pop().unwrap().id;
                fixture.backend().give_sign(host, LONG).await.unwrap();
                let silent: Vec<Sign> = fixture.backend().signs().await.unwrap();
                arm();
                let marked = queue.backend().mark_dead(&silent).await.unwrap();
                let (known, signs) = (fixture.backend().hosts().await.unwrap(), fixture.backend().signs().await.unwrap());
                let left = known.iter().filter(|known| known.alive == Some(false)).count();
                fixture.backend().hand_on(&[identity], policy).await.unwrap();
                format!("{} marked, itself {}, {left} left, {} signs", marked.len(), marked == [host], signs.len())
            }
            Self::CancelAside => {
                fixture.submit(&[task("no json")]).await;
                fixture.damage().await;
                let host = fixture.host().await;
                assert!(fixture.claim(host, 9).await.is_empty());
                let aside = fixture.get("no json").await;
                assert_eq!(aside.state, State::Failed);
                arm();
                let cancelled = queue.backend().cancel_by_id(aside.id, LONG).await;
                format!("{cancelled:?}, {}", fixture.queue.exists("no json").await.unwrap())
            }
        }
    }
}

/// Do it, with the answer to the statement of this number lost; 0: none. Answers in words what it came to, and what became of the task.
async fn seen(arena: &Arena, act: Act, number: usize, statement: usize) -> String {
    let (fixture, (gate, queue)) = (&arena.fixture, arena.process());
    let arm = || gate.swallow_nth(statement);
    match act {
        Act::Other(other) => other.run(fixture, number, queue, arm).await,
        Act::On(operation, place) => {
            let scene = Scene::set(fixture, arena.queues(), [operation; 2], number, (place, true)).await;
            arm();
            let act = async || match scene.act(operation, Side::Left, queue).await {
                Ok(Outcome::Claimed(leases)) => format!("{} claimed", leases.len()),
                outcome => format!("{outcome:?}"),
            };
            let outcome = match (operation, place) {
                // What the lost connection still has locked is passed over, until the server has noticed that nobody is there any more.
                (Operation::Reclaim, Place::Overdue) | (Operation::CleanUp, Place::Ended) => {
                    let found = async || {
                        let outcome = act().await;
                        if outcome.contains("\"0\"") { Err(outcome) } else { Ok(outcome) }
                    };
                    eventually(PATIENCE, "what has ended is found", found).await
                }
                _ => act().await,
            };
            let task = fixture.queue.get(&format!("task {number}")).await.unwrap();
            let task = task.map(|task| (task.state, task.attempts, task.lost, task.error_code, task.data));
            format!("{outcome}, {task:?}").replace(&format!("task {number}"), "the task")
        }
    }
}

/// A number in words that differs from scene to scene.
fn without_ids(words: &str) -> String {
    words
        .split("TaskId(")
        .enumerate()
        .map(|(place, part)| if place == 0 { part } else { part.trim_start_matches(|c: char| c.is_ascii_digit()) })
        .collect()
}

async fn lose_each_answer(database: Database) {
    let mut arena = Arena::open(Fixture::new(database).await, database).await;
    let (mut number, mut wrong) = (0, Vec::new());
    for act in acts() {
        let undisturbed = without_ids(&seen(&arena, act, number, 0).await);
        arena.forget().await;
        let mut beyond = 0;
        for statement in 1.. {
            number += 1;
            assert!(statement < STATEMENTS_MAX, "{act:?} has no end");
            let before = arena.process().0.swallowed();
            let disturbed = without_ids(&seen(&arena, act, number, statement).await);
            arena.process().0.swallow_nth(0);
            let findings = arena.fixture.backend().audit().await.unwrap();
            arena.forget().await;
            if disturbed != undisturbed || !findings.is_empty() {
                wrong.push(format!("{act:?}, without answer {statement}: {disturbed}, not {undisturbed}; {findings:?}"));
                break;
            }
            beyond = if arena.process().0.swallowed() == before { beyond + 1 } else { 0 };
            if beyond == BEYOND {
                println!("{act:?}: {} statements; {undisturbed}", statement - BEYOND);
                break;
            }
        }
        number += 1;
    }
    arena.close().await;
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Until the answer is lost.
async fn lost(gate: &Gate, before: usize) {
    eventually(
        PATIENCE,
        "an answer is lost",
        async || {
            if gate.swallowed() > before { Ok(()) } else { Err("not yet".to_owned()) }
        },
    )
    .await;
}

/// A task that was retried, with nobody told so, is claimed before it is retried once more.
async fn retry_and_claim(database: Database) {
    let mut arena = Arena::open(Fixture::new(database).await, database).await;
    let mut was_claimed = false;
    for (number, statement) in (1..STATEMENTS_MAX).enumerate() {
        let scene = Scene::set(&arena.fixture, arena.queues(), [Operation::Retry; 2], number, (Place::Ended, false)).await;
        let (gate, queue) = arena.process();
        let before = gate.swallowed();
        gate.swallow_nth_and_shut(statement);
        let (acting, queue) = (scene.clone(), queue.clone());
        let mut retrying = tokio::spawn(async move { acting.act(Operation::Retry, Side::Left, &queue).await.map(drop) });
        let ended = tokio::select! {
            ended = &mut retrying => Some(ended.unwrap()),
            () = lost(gate, before) => None,
        };
        if let Some(ended) = ended {
            ended.unwrap();
            gate.swallow_nth(0);
            assert!(was_claimed, "its commit's answer was lost once");
            return arena.close().await;
        }
        let host = arena.fixture.host().await;
        let claim = Claim::new(host, 1, LONG);
        let claimed = arena.fixture.backend().claim(&claim).await.unwrap().tasks;
        was_claimed |= !claimed.is_empty();
        gate.open();
        tokio::time::timeout(PATIENCE, retrying).await.expect("it ends").unwrap().unwrap();
        let found = arena.fixture.get(&format!("task {number}")).await;
        assert_eq!(found.state, if claimed.is_empty() { State::Waiting } else { State::Running }, "statement {statement}");
        assert_eq!(arena.fixture.backend().audit().await.unwrap(), [""; 0]);
        arena.forget().await;
    }
    panic!("there is no end to it");
}

mod on_postgres {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_lost_answer_changes_no_operations_answer() {
        lose_each_answer(Database::Postgres).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_retried_task_that_is_claimed_before_anybody_is_told_stays_claimed() {
        retry_and_claim(Database::Postgres).await;
    }
}

mod on_mariadb {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_lost_answer_changes_no_operations_answer() {
        lose_each_answer(Database::MariaDb).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_retried_task_that_is_claimed_before_anybody_is_told_stays_claimed() {
        retry_and_claim(Database::MariaDb).await;
    }
}
