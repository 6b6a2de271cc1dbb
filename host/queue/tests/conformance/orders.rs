//! Different ends of different tasks of one batch, in every order, with a crash after each step.

use std::time::Duration;

use laelaps_queue::{ClaimedTask, Event, LeaseAnswer, NewTask, Settlement, State};

use crate::fixture::{Database, Fixture, LONG, finish, settled, task, with_follow_ups};

/// What happens to one task of the batch. The step is the task's key.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Settle,
    Cancel,
    Update,
    Expire,
}

const STEPS: [Step; 4] = [Step::Settle, Step::Cancel, Step::Update, Step::Expire];

impl Step {
    fn key(self) -> String {
        format!("{self:?}")
    }

    async fn happen(self, fixture: &Fixture, batch: &[ClaimedTask]) {
        let task = batch.iter().find(|task| task.key == self.key()).expect("each step has its task");
        match self {
            Self::Settle => {
                let settlement = with_follow_ups(vec![crate::fixture::task("follow-up")], settled(task, finish()));
                assert_eq!(fixture.backend().settle(&[settlement]).await.unwrap(), [LeaseAnswer::Held]);
            }
            Self::Cancel => fixture.queue.cancel(&task.key).await.unwrap(),
            Self::Update => {
                let answer = fixture.backend().update_data(task.lease_ref, br#"{"updated":true}"#).await.unwrap();
                assert_eq!(answer, LeaseAnswer::Held);
            }
            Self::Expire => {
                fixture.passes(task.until).await;
                let late = fixture.backend().settle(&[settled(task, finish())]).await.unwrap();
                assert_eq!(late, [LeaseAnswer::Lost]);
            }
        }
    }

    /// What has to be seen of its task, whether it has happened or not.
    async fn is_seen(self, fixture: &Fixture, happened: bool) {
        let seen = fixture.get(&self.key()).await;
        let expected = match self {
            Self::Settle if happened => State::Finished,
            Self::Cancel if happened => State::Cancelled,
            _ => State::Running,
        };
        assert_eq!(seen.state, expected, "{self:?}, happened: {happened}");
        let updated = self == Self::Update && happened;
        let data: &[u8] = if updated { br#"{"n":1,"updated":true}"# } else { br#"{"n":1}"# };
        assert_eq!(seen.data.as_deref(), Some(data), "{self:?}, happened: {happened}");
        if self == Self::Settle {
            assert_eq!(fixture.queue.exists("follow-up").await.unwrap(), happened, "follow-ups come with their settlement");
        }
    }
}

fn permutations(steps: &[Step]) -> Vec<Vec<Step>> {
    if steps.is_empty() {
        return vec![Vec::new()];
    }
    let with_first = |&first: &Step| {
        let rest: Vec<Step> = steps.iter().copied().filter(|step| *step != first).collect();
        permutations(&rest).into_iter().map(move |mut order| {
            order.insert(0, first);
            order
        })
    };
    steps.iter().flat_map(with_first).collect()
}

/// Four tasks of one host, of which one has a lease that will have run out.
async fn batch(fixture: &Fixture) -> Vec<ClaimedTask> {
    let host = fixture.host().await;
    let tasks: Vec<NewTask> = STEPS.iter().map(|step| task(&step.key())).collect();
    fixture.submit(&tasks[..3]).await;
    let mut batch = fixture.claim_for(host, 3, LONG).await;
    fixture.submit(&tasks[3..]).await;
    batch.extend(fixture.claim_for(host, 1, Duration::from_millis(50)).await);
    assert_eq!(batch.len(), 4);
    batch
}

async fn in_this_order_with_crashes(database: Database, order: Vec<Step>) {
    let mut fixture = Fixture::new(database).await;
    let batch = batch(&fixture).await;
    for (done, step) in order.iter().enumerate() {
        step.happen(&fixture, &batch).await;
        fixture = fixture.crash().await;
        fixture.audit().await;
        for (place, step) in order.iter().enumerate() {
            step.is_seen(&fixture, place <= done).await;
        }
    }
    fixture.bury().await;
    // The next start takes back what the dead host still had, and everything comes to its end.
    let reclaimed = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
    let mut lost: Vec<&str> = reclaimed.tasks.iter().map(|lost| lost.key.as_str()).collect();
    lost.sort_unstable();
    assert_eq!(lost, ["Expire", "Update"]);
    let host = fixture.host().await;
    let again = fixture.claim(host, 9).await;
    assert_eq!(again.len(), 3, "the lost two and the follow-up");
    let ends: Vec<Settlement> = again.iter().map(|task| settled(task, finish())).collect();
    assert_eq!(fixture.backend().settle(&ends).await.unwrap(), [LeaseAnswer::Held; 3]);
    for task in &batch {
        let stale = fixture.backend().settle(&[settled(task, Event::Retry { delay: None })]).await.unwrap();
        assert_eq!(stale, [LeaseAnswer::Lost], "{}", task.key);
    }
    let stats = fixture.queue.stats().await.unwrap();
    assert_eq!((stats.finished, stats.cancelled, stats.ready, stats.running), (4, 1, 0, 0));
    fixture.audit().await;
}

async fn in_any_order_with_crashes(database: Database) {
    let mut running = tokio::task::JoinSet::new();
    for order in permutations(&STEPS) {
        running.spawn(in_this_order_with_crashes(database, order));
    }
    let mut orders = 0;
    while let Some(ended) = running.join_next().await {
        ended.expect("every order is right");
        orders += 1;
    }
    assert_eq!(orders, 24);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_of_a_batch_end_in_any_order_with_a_crash_after_each_on_sqlite() {
    in_any_order_with_crashes(Database::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_of_a_batch_end_in_any_order_with_a_crash_after_each_on_postgres() {
    in_any_order_with_crashes(Database::Postgres).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_of_a_batch_end_in_any_order_with_a_crash_after_each_on_mariadb() {
    in_any_order_with_crashes(Database::MariaDb).await;
}
