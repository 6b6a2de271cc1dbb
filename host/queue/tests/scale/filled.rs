//! Tasks that were written by SQL, as benches do, are like those that came in by submits.

use laelaps_queue::{Filter, NewTask, State};

use crate::fill;
use crate::site::{Site, Turn};

const COUNT: usize = 200;
const USERS: usize = 7;
const QUEUES: usize = 5;

pub(crate) async fn a_backlog_that_was_filled_is_one_that_was_submitted(turn: &Turn) {
    let filled = turn.site().await;
    fill::waiting(&filled.url, 0..COUNT, 0).await;
    fill::waiting(&filled.url, COUNT..2 * COUNT, USERS).await;
    fill::waiting_in(&filled.url, 2 * COUNT..3 * COUNT, 0, QUEUES).await;
    fill::waiting_in(&filled.url, 3 * COUNT..4 * COUNT, USERS, QUEUES).await;
    let submitted = turn.site().await;
    let task = |number: usize| NewTask::new(format!("task-{number}"), "bench", fill::DATA);
    let nobodys: Vec<NewTask> = (0..COUNT).map(task).collect();
    submitted.queue.submit_many(&nobodys).await.unwrap();
    let of_user = |number: usize| NewTask { user: Some(format!("user-{}", number % USERS)), ..task(number) };
    let users: Vec<NewTask> = (COUNT..2 * COUNT).map(of_user).collect();
    submitted.queue.submit_many(&users).await.unwrap();
    let queued = |number: usize| {
        let place = number % QUEUES;
        NewTask { task_type: format!("bench-{place}"), queue: Some(format!("queue-{place}")), ..task(number) }
    };
    let nobodys: Vec<NewTask> = (2 * COUNT..3 * COUNT).map(queued).collect();
    submitted.queue.submit_many(&nobodys).await.unwrap();
    let of_user = |number: usize| NewTask { user: Some(format!("user-{}", number / QUEUES % USERS)), ..queued(number) };
    let users: Vec<NewTask> = (3 * COUNT..4 * COUNT).map(of_user).collect();
    submitted.queue.submit_many(&users).await.unwrap();
    let (filled, submitted) = (work_off(&filled).await, work_off(&submitted).await);
    assert_eq!(filled, submitted);
    assert!(filled.len() > 4 * COUNT);
}

/// Everything that can be seen of a backlog, and in which order it is claimed: between users, by time, and between users again.
async fn work_off(site: &Site) -> Vec<String> {
    site.enter_changes().await;
    let mut seen = Vec::new();
    for task in list(site, State::Waiting).await {
        seen.push(format!(
            "{} {} {} {:?} {:?} {:?}",
            task.key, task.queue, task.task_type, task.user, task.max_running, task.data
        ));
    }
    let stats = site.queue.stats().await.unwrap();
    seen.push(format!(
        "{} ready, {} scheduled, {} running, {:?}, {:?}",
        stats.ready, stats.scheduled, stats.running, stats.types, stats.queues
    ));
    for (ignore_users, claims) in [(false, 5), (true, 10), (false, 4 * COUNT)] {
        let claim = site.claim_of(10, ignore_users).await;
        for _ in 0..claims {
            let claimed = site.claim(&claim).await;
            if claimed.is_empty() {
                break;
            }
            seen.push(claimed.iter().map(|task| task.key.as_str()).collect::<Vec<&str>>().join(" "));
            site.finish(&claimed).await;
        }
    }
    let stats = site.queue.stats().await.unwrap();
    seen.push(format!("{} ready, {} running, {} finished, {:?}", stats.ready, stats.running, stats.finished, stats.types));
    seen
}

async fn list(site: &Site, state: State) -> Vec<laelaps_queue::Task> {
    let filter = Filter { states: vec![state], limit: 10_000, with_data: true, ..Filter::default() };
    site.queue.list(&filter).await.unwrap().tasks
}

pub(crate) async fn ended_tasks_that_were_filled_are_listed_and_removed(turn: &Turn) {
    let site = turn.site().await;
    let count = 3 * COUNT;
    fill::finished(&site.url, count).await;
    let tasks = list(&site, State::Finished).await;
    assert_eq!(tasks.len(), count);
    assert_eq!(tasks[7].key, "ended-7");
    assert_eq!(tasks[7].data.as_deref(), Some(fill::DATA.as_bytes()));
    assert_eq!(site.queue.stats().await.unwrap().finished, count as u64);
    let mut removed = 0;
    while removed < count as u64 {
        let more = site.queue.backend().clean_up(1_000).await.unwrap();
        assert!(more > 0, "{removed} of {count} were removed");
        removed += more;
    }
    assert_eq!(site.queue.stats().await.unwrap().finished, 0);
    assert!(list(&site, State::Finished).await.is_empty());
}
