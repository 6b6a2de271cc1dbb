//! Handlers that do not behave: each is stopped, its task ends as its route says, and nobody else suffers.

use std::time::Duration;

use laelaps_queue::{NewTask, Queue, State, Task};
use laelaps_tests::{
    Host, LONG, PATIENCE, Signal, Site, all_tasks, digest, eventually, guest, measured, promised, scaled, submit, task,
    wait_for_state, with_edition,
};
use serde_json::{Value, json};

/// A light task may take this many times as long beside an offender.
const SLOWER_PROMISE: f64 = 3.0;
/// A slot serves others this soon after an immediate stop.
const FREE_PROMISE: Duration = Duration::from_millis(100);

/// One offender at a time (by its user), and two slots for the others.
const PROCESSORS: usize = 3;

/// A site with a route of its own for each kind of offenders: 64 MiB, two attempts, and for those that only time ends so many seconds. The others
/// have all the time that they need, on any machine, to offend in their own way.
async fn site(time_limit_s: u32) -> (Site, Queue, Host) {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let mut routes: Vec<Value> = OFFENDERS
        .iter()
        .map(|(kind, code)| {
            let time_limit_s = if *code == "time-out" { time_limit_s } else { 86_400 };
            site.route(json!({ "type": kind, "time_limit": time_limit_s, "retry_wait": 0.05, "max_attempts": 2 }))
        })
        .collect();
    routes.push(site.route(json!({ "pattern": "." })));
    site.configure(json!({ "processors": PROCESSORS, "poll_interval": 0.01, "retry_wait": 0.05, "routes": routes }));
    let queue = site.queue().await;
    let host = site.start().await;
    (site, queue, host)
}

/// Kinds of offence, and the failure they end as.
const OFFENDERS: [(&str, &str); 9] = [
    ("spin", "time-out"),
    ("sleep", "time-out"),
    ("fill", "time-out"),
    ("allocate", "memory"),
    ("panic", "trap"),
    ("overflow", "trap"),
    ("exit", "trap"),
    ("log-flood", "time-out"),
    ("stdout-flood", "time-out"),
];

fn offender(kind: &str, number: usize) -> NewTask {
    let mut offender = task(format!("{kind}-{number}"), kind, json!({}));
    offender.user = Some("offender".to_owned());
    offender.max_running = Some(1);
    offender
}

/// Times that a ratio is taken before it counts: a percentile of two short measurements says as much about the machine's other work in one of
/// them, and what an offender does to its neighbours it does every time.
const ROUNDS: usize = 3;
/// Offenders of a kind beside which light tasks are measured.
const OFFENDERS_EACH: usize = 200;

/// An offender that offends again as soon as it was stopped: the quick ones (a panic takes no time) would be used up otherwise.
fn persistent(kind: &str, number: usize) -> NewTask {
    NewTask { max_attempts: Some(1_000_000), ..offender(kind, number) }
}

#[tokio::test]
async fn an_offender_is_stopped_and_its_task_ends_as_its_route_says() {
    let (_site, queue, host) = site(1).await;
    submit(&queue, &OFFENDERS.map(|(kind, _)| offender(kind, 0))).await;
    for (kind, code) in OFFENDERS {
        let ended = wait_for_state(&queue, &format!("{kind}-0"), State::Failed, LONG).await;
        assert_eq!(ended.attempts, 2, "{kind}: tried as often as the route says");
        assert_eq!(ended.error_code.as_deref(), Some(code), "{kind}: {:?}", ended.error_message);
        let attempts = queue.backend().attempts(&ended.key).await.unwrap();
        assert_eq!(attempts.len(), 2, "{kind}");
        for attempt in attempts {
            assert_eq!(attempt.event, code, "{kind}");
            let message = attempt.error_message.unwrap_or_default();
            assert!(!message.is_empty() && message.len() <= 4096, "{kind}: {message}");
        }
    }
    host.stop().await;
}

#[tokio::test]
async fn a_light_task_is_hardly_slower_beside_an_offender() {
    let (site, queue, host) = site(1).await;
    light_tasks(&queue, "warm-up", 50).await;
    for (kind, _) in OFFENDERS {
        let mut ratio = f64::INFINITY;
        for round in 0..ROUNDS {
            ratio = ratio.min(slower_beside(kind, round, &site, &queue).await);
            if ratio <= SLOWER_PROMISE {
                break;
            }
        }
        promised(&format!("p99 of a light task beside {kind}, times that alone"), ratio, SLOWER_PROMISE);
    }
    host.stop().await;
}

/// How many times as long a light task takes beside offenders of a kind as it just took alone: the ratio of the 99th percentiles.
async fn slower_beside(kind: &str, round: usize, site: &Site, queue: &Queue) -> f64 {
    let count = scaled(1_000).max(100);
    slots_are_free(site, queue, &format!("{kind}-{round}")).await;
    let alone = percentile_99(&light_tasks(queue, &format!("before-{kind}-{round}"), count).await);
    // Enough of them that one runs at every moment of the measurement.
    let numbers = round * OFFENDERS_EACH..(round + 1) * OFFENDERS_EACH;
    let offenders: Vec<NewTask> = numbers.map(|number| persistent(kind, number)).collect();
    submit(queue, &offenders).await;
    eventually(PATIENCE, &format!("{kind} runs"), async || {
        let first = queue.backend().get(&offenders[0].key).await.unwrap().unwrap();
        if first.state == State::Waiting && first.attempts == 0 { Err(format!("{first:?}")) } else { Ok(()) }
    })
    .await;
    let beside = percentile_99(&light_tasks(queue, &format!("beside-{kind}-{round}"), count).await);
    measured(&format!("p99 of a light task alone, and beside {kind}"), format!("{alone:?}, {beside:?}"));
    let left = queue.backend().get(&offenders[OFFENDERS_EACH - 1].key).await.unwrap().unwrap();
    assert!(
        matches!(left.state, State::Waiting | State::Running),
        "{kind} was not there all the time: its last is {}",
        left.state.as_str()
    );
    // The last first, so that the host does not begin one after the other.
    for offender in offenders.iter().rev() {
        // Some have failed by now.
        let _ = queue.backend().cancel(&offender.key, Duration::ZERO).await;
    }
    beside.as_secs_f64() / alone.as_secs_f64()
}

/// Waits until as many tasks run at once as there are processors: what was called off occupies its slot until the host hears of it.
async fn slots_are_free(site: &Site, queue: &Queue, name: &str) {
    let data = json!({ "mark": format!("/marks/free-{name}"), "gate": format!("/marks/gate-{name}") });
    let tasks: Vec<NewTask> =
        (0..PROCESSORS).map(|number| task(format!("free-{name}-{number}"), "silent", data.clone())).collect();
    submit(queue, &tasks).await;
    eventually(PATIENCE, "every slot is free", async || {
        let begun = site.marks(&format!("free-{name}")).len();
        if begun == PROCESSORS { Ok(()) } else { Err(begun.to_string()) }
    })
    .await;
    site.open_gate(&format!("gate-{name}"));
    for task in tasks {
        wait_for_state(queue, &task.key, State::Finished, PATIENCE).await;
    }
}

/// Submits light tasks one after the other, every ten milliseconds, and returns how long each took from submit to finish, by the
/// database's clock.
async fn light_tasks(queue: &Queue, name: &str, count: usize) -> Vec<Duration> {
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for number in 0..count {
        ticks.tick().await;
        submit(queue, &[task(format!("light-{name}-{number}"), "silent", json!({}))]).await;
    }
    let prefix = format!("light-{name}-");
    eventually(LONG, &format!("the light tasks beside {name} are finished"), async || {
        let tasks: Vec<Task> = all_tasks(queue).await.into_iter().filter(|task| task.key.starts_with(&prefix)).collect();
        let finished = tasks.iter().filter(|task| task.state == State::Finished).count();
        if finished < count {
            return Err(format!("{finished} of {count}"));
        }
        Ok(tasks.iter().map(|task| task.finished_at.unwrap().since(task.created_at)).collect())
    })
    .await
}

fn percentile_99(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    // The clock counts milliseconds: what takes less than one took one.
    times[times.len() * 99 / 100].max(Duration::from_millis(1))
}

#[tokio::test]
async fn a_slot_is_free_within_100_ms_of_an_immediate_stop() {
    let rounds = scaled(30);
    for kind in ["spin", "sleep", "fill", "wait-cancelled"] {
        let mut worst = Duration::ZERO;
        let site = Site::new().await;
        site.plug_guest("zoo");
        site.configure(json!({ "processors": 1, "poll_interval": 0.01, "task_heartbeat_interval": 0.05 }));
        let queue = site.queue().await;
        let host = site.start().await;
        for round in 0..rounds {
            let heavy = format!("heavy-{round}");
            submit(&queue, &[task(&heavy, kind, json!({ "mark": format!("/marks/{heavy}"), "deaf": true }))]).await;
            let begun = async |times: usize| {
                eventually(PATIENCE, &format!("{kind} has begun {times} times in the only slot"), async || {
                    let marks = site.marks(&heavy);
                    if marks.len() == times { Ok(()) } else { Err(format!("{marks:?}")) }
                })
                .await;
            };
            begun(1).await;

            // A new version, admitted; then the order to stop what runs on the old one. Its task is the next in line, for the same slot.
            let next = with_edition(&guest("zoo"), u32::try_from(round).unwrap());
            site.plug("zoo", &next);
            host.logged(&digest(&next)[..12], PATIENCE).await;
            site.open_gate("signalled"); // the moment, by the clock that also dates the marks
            host.signal(Signal::WINCH);
            begun(2).await;
            let modified = |name: &str| std::fs::metadata(site.path("marks").join(name)).unwrap().modified().unwrap();
            worst = worst.max(modified(&heavy).duration_since(modified("signalled")).unwrap());
            let stopped = queue.backend().attempts(&heavy).await.unwrap();
            assert!(stopped.iter().any(|attempt| attempt.event == "stop"), "{kind}: {stopped:?}");
            queue.backend().cancel(&heavy, Duration::ZERO).await.unwrap();
        }
        promised(&format!("slot free after an immediate stop of {kind}, worst of {rounds}"), worst, FREE_PROMISE);
        host.signal(Signal::QUIT);
    }
}

#[tokio::test]
async fn endless_output_is_cut_at_the_route_s_limit_and_counted() {
    // A flood is over its limit after a few milliseconds, but it may have to wait for the first of them.
    let (_site, queue, host) = site(10).await;
    for kind in ["log-flood", "stdout-flood", "stderr-flood"] {
        let mut flood = task(kind, kind, json!({}));
        flood.max_attempts = Some(1);
        submit(&queue, &[flood]).await;
    }
    wait_for_state(&queue, "log-flood", State::Failed, LONG).await;
    wait_for_state(&queue, "stdout-flood", State::Failed, LONG).await;
    for kind in ["log-flood", "stdout-flood"] {
        host.logged(&format!("task=\"{kind}\""), PATIENCE).await;
    }
    host.logged_times("more than its log limit", 2, PATIENCE).await;
    let bytes: usize = host.lines_with("log flood").iter().map(String::len).sum();
    assert!(bytes < 4 * 64 * 1024, "64 KiB of text are kept and no more: {bytes} bytes in the log");
    queue.backend().cancel("stderr-flood", Duration::ZERO).await.unwrap();
    host.signal(Signal::QUIT);
}

#[tokio::test]
async fn blank_lines_over_the_limit_are_counted_too() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(json!({ "routes": [site.route(json!({ "pattern": ".", "log_limit": 4096 }))] }));
    let queue = site.queue().await;
    let host = site.start().await;
    submit(&queue, &[task("blank", "blank-lines", json!({ "count": 10_000 }))]).await;
    wait_for_state(&queue, "blank", State::Finished, PATIENCE).await;
    let told = host.logged("more than its log limit", PATIENCE).await;
    let (_, after) = told.split_once("lines=").unwrap_or_else(|| panic!("it says how many lines: {told}"));
    let dropped: usize = after.split_whitespace().next().unwrap().parse().unwrap();
    // A line costs 32 bytes besides its text.
    assert!((9_000..10_000).contains(&dropped) && told.contains("bytes=0"), "{told}");
    host.stop().await;
}
