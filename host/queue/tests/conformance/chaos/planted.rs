//! The checker finds what it is there for: histories as a queue with a fault would leave them, and of a queue whose tables were made to forget.

use std::time::Duration;

use laelaps_queue::{Claim, ClaimedTask, HostId, LeaseAnswer, State};
use tempfile::TempDir;

use super::checker::check;
use super::history::{Answer, Asked, End, Held, Left, Moment, Operation, Recorder, Taken, history_of, read};
use super::place::number_by_moment;
use super::worker::{Ending, claim_as, settle, submit};
use crate::fixture::{Database, Fixture, LONG, task, task_of};

/// A history that is written by hand: everything takes a millisecond, and leases last for a second.
#[derive(Default)]
struct Book {
    at: Moment,
    /// How far ahead the queue's clock is.
    ahead_ms: i64,
    history: Vec<Operation>,
    left: Vec<Left>,
}

const ALIVE_MS: i64 = 1_000;

impl Book {
    fn ask(&mut self, asked: Asked, answer: Answer) {
        let begun = self.at;
        self.at += 1_000;
        let ended = (answer != Answer::Unknown).then_some(self.at);
        self.history.push(Operation { begun, ended, asked, answer });
        self.at += 1_000;
    }

    fn now_ms(&self) -> i64 {
        i64::try_from(self.at / 1_000).expect("a small number") + self.ahead_ms
    }

    fn submit(&mut self, task: i64) {
        self.ask(Asked::Submit(vec![key(task)]), Answer::Submitted(vec![true]));
        self.left.push(Left { task, key: key(task), state: State::Finished });
    }

    fn claim_of(&mut self, task: i64, lease: i64, user: Option<&str>) -> Held {
        let held = Held { task, lease };
        let claimed_at = self.now_ms();
        let taken = Taken {
            held,
            key: key(task),
            user: user.map(str::to_owned),
            max_running: user.map(|_| 1),
            claimed_at,
            until: claimed_at + ALIVE_MS,
        };
        self.ask(Asked::Claim(1), Answer::Claimed(vec![taken]));
        held
    }

    fn claim(&mut self, task: i64, lease: i64) -> Held {
        self.claim_of(task, lease, None)
    }

    fn settle(&mut self, held: Held, end: End, answer: Option<bool>) {
        let answer = answer.map_or(Answer::Unknown, |held| Answer::Held(vec![held]));
        self.ask(Asked::Settle(vec![(held, end, Vec::new())]), answer);
    }

    fn lease_ends(&mut self) {
        self.at += 2_000_000;
    }

    #[track_caller]
    fn holds(&self) {
        assert_eq!(check(&self.history, &self.left), Vec::<String>::new());
    }

    /// The checker finds this, and nothing else.
    #[track_caller]
    fn shows(&self, words: &str) {
        let found = check(&self.history, &self.left);
        assert!(found.len() == 1 && found[0].contains(words), "expected {words:?}: {found:#?}");
    }
}

fn key(task: i64) -> String {
    format!("k{task}")
}

#[test]
fn a_lost_lease_a_lost_answer_and_a_dead_host_are_no_faults() {
    let mut book = Book::default();
    for task in 1..=3 {
        book.submit(task);
    }
    let lost = book.claim(1, 10);
    book.lease_ends();
    let again = book.claim(1, 20);
    book.settle(lost, End::Finish, Some(false));
    book.settle(again, End::Finish, Some(true));
    let unheard = book.claim(2, 30);
    book.settle(unheard, End::Again, None);
    let again = book.claim(2, 40);
    book.settle(again, End::Finish, None);
    book.claim(3, 50);
    book.ask(Asked::Die(Some(1)), Answer::Done);
    let again = book.claim(3, 60);
    book.settle(again, End::Finish, Some(true));
    book.holds();
}

#[test]
fn a_removed_fence_is_found() {
    let mut book = Book::default();
    book.submit(1);
    let lost = book.claim(1, 10);
    book.lease_ends();
    let again = book.claim(1, 20);
    book.settle(lost, End::Again, Some(true));
    book.settle(again, End::Finish, Some(true));
    book.shows("a write under lease 10 of task 1 was accepted after the claim");
}

#[test]
fn a_stale_renewal_and_a_stale_update_are_found() {
    let writes: [fn(Held) -> Asked; 2] = [|held| Asked::Renew(vec![held], 0), Asked::Update];
    for write in writes {
        let mut book = Book::default();
        book.submit(1);
        let held = book.claim(1, 10);
        book.settle(held, End::Finish, Some(true));
        book.ask(write(held), Answer::Held(vec![true]));
        book.shows("a write under lease 10 of task 1 was accepted after it was settled");
    }
}

#[test]
fn a_lease_that_is_settled_twice_is_found() {
    let mut book = Book::default();
    book.submit(1);
    let held = book.claim(1, 10);
    book.settle(held, End::Finish, Some(true));
    book.settle(held, End::Finish, Some(true));
    book.shows("lease 10 of task 1 was settled twice");
}

#[test]
fn an_attempt_that_goes_on_after_its_task_was_cancelled_is_found() {
    let mut book = Book::default();
    book.submit(1);
    let held = book.claim(1, 10);
    book.ask(Asked::Cancel(key(1)), Answer::Done);
    book.settle(held, End::Finish, Some(true));
    book.shows("a write under lease 10 of task 1 was accepted after Cancel");
}

#[test]
fn a_repeated_lease_is_found() {
    let mut book = Book::default();
    for task in 1..=2 {
        book.submit(task);
        let held = book.claim(task, 10);
        book.settle(held, End::Finish, Some(true));
    }
    book.shows("lease 10 was given out twice");
}

#[test]
fn leases_that_go_back_are_found() {
    let mut book = Book::default();
    for (task, lease) in [(1, 20), (2, 10)] {
        book.submit(task);
        let held = book.claim(task, lease);
        book.settle(held, End::Finish, Some(true));
    }
    book.shows("lease 10 was given out after lease Some(20)");
}

#[test]
fn a_step_of_the_clock_ends_a_lease_before_its_time() {
    let run_again = |steps: &[i64]| {
        let mut book = Book::default();
        book.submit(1);
        let lost = book.claim(1, 10);
        for ahead_ms in steps {
            book.ask(Asked::Clock(*ahead_ms), Answer::Done);
        }
        let again = book.claim(1, 20);
        book.settle(lost, End::Finish, Some(false));
        book.settle(again, End::Finish, Some(true));
        book
    };
    run_again(&[3_600_000]).holds();
    run_again(&[3_600_000, 0]).holds();
    run_again(&[]).shows("was handed out as");
    run_again(&[500]).shows("was handed out as");
    run_again(&[-3_600_000]).shows("was handed out as");
}

#[test]
fn a_lease_that_was_given_out_by_a_clock_that_went_back_lasts() {
    let mut book = Book::default();
    book.ask(Asked::Clock(3_600_000), Answer::Done);
    book.submit(1);
    book.ahead_ms = 3_600_000;
    let lost = book.claim(1, 10);
    book.at += 10_000_000;
    book.ask(Asked::Clock(0), Answer::Done);
    book.lease_ends();
    book.ahead_ms = 0;
    let again = book.claim(1, 20);
    book.settle(lost, End::Finish, Some(false));
    book.settle(again, End::Finish, Some(true));
    book.holds();
    // Had the clock gone back at once, nothing would have ended the lease.
    let step = book.history.iter().position(|operation| operation.asked == Asked::Clock(0)).unwrap();
    (book.history[step].begun, book.history[step].ended) = (5_500, Some(5_600));
    book.shows("was handed out as");
}

#[test]
fn a_renewal_lasts_by_the_clock_of_its_moment() {
    let mut book = Book::default();
    book.submit(1);
    let held = book.claim(1, 10);
    book.ask(Asked::Renew(vec![held], 10 * ALIVE_MS), Answer::Held(vec![true]));
    book.lease_ends();
    let again = book.claim(1, 20);
    book.settle(again, End::Finish, Some(true));
    book.shows("was handed out as");
}

/// A server that breaks down forgets claims that it did not have to write down yet.
#[test]
fn a_task_is_handed_out_again_where_its_claim_may_be_forgotten() {
    let run_again = |waits: Moment, forgets: bool, again: i64| {
        let mut book = Book::default();
        book.submit(1);
        book.submit(2);
        let lost = book.claim(1, 10);
        let other = book.claim(2, 11);
        book.at += waits;
        if forgets {
            book.ask(Asked::Forget, Answer::Done);
        }
        // Leases last longer than that took.
        book.history
            .iter_mut()
            .filter_map(|operation| match &mut operation.answer {
                Answer::Claimed(tasks) => Some(tasks),
                _ => None,
            })
            .flatten()
            .for_each(|taken| taken.until += 3_600_000);
        let again = book.claim(1, again);
        book.settle(lost, End::Finish, Some(false));
        book.settle(again, End::Finish, Some(true));
        book.settle(other, End::Finish, Some(true));
        book
    };
    run_again(0, true, 20).holds();
    run_again(20_000_000, true, 9).holds();
    run_again(20_000_000, false, 20).shows("was handed out as");
    run_again(40_000_000, true, 20).shows("was handed out as");
    // What was settled is not forgotten.
    let mut book = Book::default();
    book.submit(1);
    let held = book.claim(1, 10);
    book.settle(held, End::Finish, Some(true));
    book.ask(Asked::Forget, Answer::Done);
    let again = book.claim(1, 20);
    book.settle(again, End::Finish, Some(false));
    book.shows("and then handed out as");
}

/// A promotion undoes what was answered last.
#[test]
fn what_was_lost_with_a_primary_is_no_fault_where_that_may_be() {
    let mut book = Book::default();
    for task in 1..=3 {
        book.submit(task);
    }
    let held = [10, 20, 30].map(|lease| book.claim(lease / 10, lease));
    book.settle(held[0], End::Finish, Some(true));
    book.settle(held[1], End::Again, Some(true));
    let again = book.claim(2, 40);
    // The keys and ends of these were lost, and the numbers of leases go back.
    book.settle(held[0], End::Finish, Some(true));
    book.settle(held[1], End::Finish, Some(true));
    book.settle(again, End::Finish, Some(false));
    let third = book.claim(3, 25);
    book.settle(third, End::Finish, Some(true));
    book.left.pop();
    book.left.push(Left { task: 3, key: key(3), state: State::Failed });
    let found = check(&book.history, &book.left);
    assert!(found.len() > 3, "{found:#?}");
    // Between what was answered and what contradicts it.
    let place = book.history.len() - 5;
    let at = book.history[place].begun;
    book.history.insert(place, Operation { begun: at - 1, ended: Some(at - 1), asked: Asked::Lose, answer: Answer::Done });
    book.holds();
}

#[test]
fn a_removed_fence_and_a_repeated_lease_are_found_after_a_loss_as_well() {
    let mut book = Book::default();
    book.submit(1);
    let lost = book.claim(1, 10);
    book.ask(Asked::Lose, Answer::Done);
    let again = book.claim(1, 5);
    book.settle(lost, End::Again, Some(true));
    book.settle(again, End::Finish, Some(true));
    book.shows("a write under lease 10 of task 1 was accepted after the claim");

    let mut book = Book::default();
    for task in 1..=2 {
        book.submit(task);
        let held = book.claim(task, 10);
        book.settle(held, End::Finish, Some(true));
        book.ask(Asked::Lose, Answer::Done);
    }
    book.shows("lease 10 was given out twice");
}

#[test]
fn an_ignored_user_limit_is_found() {
    let mut book = Book::default();
    let held: Vec<Held> = (1..=2)
        .map(|task| {
            book.submit(task);
            book.claim_of(task, task * 10, Some("u"))
        })
        .collect();
    // The first may have ended when nobody heard of it.
    let unsure = Book { at: book.at, history: book.history.clone(), ..Book::default() };
    for (mut book, answer, findings) in [(book, Some(true), 1), (unsure, None, 0)] {
        book.left = (1..=2).map(|task| Left { task, key: key(task), state: State::Finished }).collect();
        for held in &held {
            book.settle(*held, End::Finish, answer);
        }
        let found = check(&book.history, &book.left);
        assert_eq!(found.len(), findings, "{found:#?}");
        assert!(found.iter().all(|found| found.contains("2 tasks of user \"u\" ran")), "{found:#?}");
    }
}

#[test]
fn an_unexplained_run_is_found() {
    let mut book = Book::default();
    book.submit(1);
    book.claim(1, 10);
    let held = book.claim(1, 20);
    book.settle(held, End::Finish, Some(true));
    book.shows("was handed out as");
}

#[test]
fn a_renewed_lease_is_no_explanation() {
    let mut book = Book::default();
    book.submit(1);
    let held = book.claim(1, 10);
    book.ask(Asked::Renew(vec![held], 10 * ALIVE_MS), Answer::Held(vec![true]));
    book.lease_ends();
    let held = book.claim(1, 20);
    book.settle(held, End::Finish, Some(true));
    book.shows("was handed out as");
}

#[test]
fn a_run_after_the_end_is_found() {
    let mut book = Book::default();
    book.submit(1);
    let held = book.claim(1, 10);
    book.settle(held, End::Finish, Some(true));
    book.lease_ends();
    let held = book.claim(1, 20);
    book.settle(held, End::Finish, None);
    book.shows("was finished under");
}

#[test]
fn a_lost_task_and_one_that_nobody_submitted_are_found() {
    let mut book = Book::default();
    book.submit(1);
    let held = book.claim(1, 10);
    book.settle(held, End::Finish, Some(true));
    let left = book.left.pop();
    book.shows("task \"k1\" was stored and is gone");
    book.left.extend(left);
    book.holds();
    book.left.push(Left { task: 9, key: key(9), state: State::Waiting });
    let found = check(&book.history, &book.left);
    assert!(found.len() == 2 && found[0].contains("comes to no end") && found[1].contains("nobody submitted"), "{found:#?}");
}

#[test]
fn an_end_that_nobody_made_is_found() {
    let mut book = Book::default();
    book.submit(1);
    book.shows("nobody made task \"k1\" finished");
    let held = book.claim(1, 10);
    book.settle(held, End::Finish, Some(true));
    book.left[0].state = State::Failed;
    book.shows("task \"k1\" was finished, and is failed");
}

/// A real queue whose operations are written down.
struct Desk {
    fixture: Fixture,
    folder: TempDir,
    recorder: Recorder,
    host: HostId,
}

impl Desk {
    async fn new() -> Self {
        let fixture = Fixture::new(Database::Sqlite).await;
        let folder = TempDir::new().expect("a folder for a history");
        let (recorder, host) = (Recorder::new(&history_of(folder.path(), "desk")), fixture.host().await);
        Self { fixture, folder, recorder, host }
    }

    async fn claim(&self, alive_time: Duration) -> ClaimedTask {
        let claim = Claim { alone: true, ..Claim::new(self.host, 1, alive_time) };
        claim_as(&self.recorder, self.fixture.backend().as_ref(), &claim).await.unwrap().pop().expect("a task waits")
    }

    async fn finish(&self, task: ClaimedTask) {
        let answers = settle(&self.recorder, self.fixture.backend().as_ref(), &[Ending::finished(task)]).await.unwrap();
        assert_eq!(answers, [LeaseAnswer::Held]);
    }

    fn found(&self) -> Vec<String> {
        let history = read(self.folder.path());
        let found = check(&history, &[]);
        found.into_iter().filter(|finding| !finding.contains("was stored and is gone")).collect()
    }
}

#[tokio::test]
async fn a_fence_that_was_removed_from_the_tables_is_found() {
    let desk = Desk::new().await;
    submit(&desk.recorder, desk.fixture.backend().as_ref(), &[task("a")]).await.unwrap();
    let lost = desk.claim(Duration::from_millis(1)).await;
    desk.fixture.passes(lost.until).await;
    assert_eq!(desk.fixture.backend().reclaim(&desk.fixture.config.policy).await.unwrap().tasks.len(), 1);
    let again = desk.claim(LONG).await;
    assert!(again.lease_ref.lease > lost.lease_ref.lease && desk.found().is_empty());
    // The row takes the first lease for the one that holds.
    desk.fixture.meddle("CREATE TABLE fence (lease); INSERT INTO fence SELECT lease FROM attempt; UPDATE task SET lease = (SELECT lease FROM fence)").await;
    desk.finish(lost).await;
    let found = desk.found();
    assert!(found.iter().any(|finding| finding.contains("was accepted after the claim")), "{found:#?}");
}

#[tokio::test]
async fn a_lease_that_the_tables_give_out_again_is_found() {
    let desk = Desk::new().await;
    submit(&desk.recorder, desk.fixture.backend().as_ref(), &[task("a"), task("b")]).await.unwrap();
    desk.fixture.meddle("CREATE TABLE before AS SELECT lease FROM counter").await;
    let first = desk.claim(LONG).await;
    desk.finish(first).await;
    desk.fixture.meddle("UPDATE counter SET lease = (SELECT lease FROM before)").await;
    let second = desk.claim(LONG).await;
    desk.finish(second).await;
    let found = desk.found();
    assert!(found.len() == 1 && found[0].contains("given out"), "{found:#?}");
}

#[tokio::test]
async fn a_user_limit_that_the_tables_forget_is_found() {
    let desk = Desk::new().await;
    let tasks = ["a", "b"].map(|key| task_of("u", key, Some(1)));
    submit(&desk.recorder, desk.fixture.backend().as_ref(), &tasks).await.unwrap();
    let first = desk.claim(LONG).await;
    desk.fixture.meddle("UPDATE account SET running = 0").await;
    let second = desk.claim(LONG).await;
    desk.fixture.meddle("UPDATE account SET running = 2").await;
    desk.finish(first).await;
    desk.finish(second).await;
    let found = desk.found();
    assert!(found.len() == 1 && found[0].contains("2 tasks of user \"u\" ran"), "{found:#?}");
}

/// Leases of PerfectQueue's table: tokens that are drawn, one for all tasks of a claim. Whose is the later claim is told by its moment.
#[test]
fn drawn_leases_are_told_by_their_moments() {
    let claimed = |accepted: bool| {
        let mut book = Book::default();
        book.submit(1);
        book.submit(2);
        let (lost, with_it) = (book.claim(1, 77), book.claim(2, 77));
        book.lease_ends();
        let again = book.claim(1, 33);
        book.settle(with_it, End::Finish, Some(true));
        book.settle(lost, End::Again, Some(accepted));
        book.settle(again, End::Finish, Some(true));
        number_by_moment(&mut book.history);
        book
    };
    claimed(false).holds();
    claimed(true).shows("a write under lease 1 of task 1 was accepted after the claim");
    let mut book = Book::default();
    book.submit(1);
    book.claim(1, 77);
    book.lease_ends();
    let twice = book.claim(1, 77);
    book.settle(twice, End::Again, Some(true));
    let again = book.claim(1, 99);
    book.settle(again, End::Finish, Some(true));
    number_by_moment(&mut book.history);
    book.shows("lease 1 was given out twice");
}
