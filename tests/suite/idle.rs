//! Idle is quiet.

use std::fs;
use std::time::{Duration, Instant};

use laelaps_queue::State;
use laelaps_tests::{Host, PATIENCE, Signal, Site, promised, submit, task, wait_for_state};
use serde_json::json;

/// Processor time that a process and its threads have used, in clock ticks (a hundredth of a second).
fn ticks(host: &Host) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/stat", host.process_id())).unwrap();
    // The name may hold anything but ends with the last parenthesis; user and system time are fields 14 and 15.
    let fields: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[tokio::test]
async fn an_idle_host_writes_no_log_and_uses_almost_no_processor() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    // The defaults of poll_interval and everything else.
    site.configure(json!({ "poll_interval": null }));
    let queue = site.queue().await;
    let host = site.start().await;
    submit(&queue, &[task("first", "silent", json!({}))]).await;
    wait_for_state(&queue, "first", State::Finished, PATIENCE).await;
    // The last thing that it has a reason to say, so that no line from before is still on its way when they are counted.
    host.signal(Signal::USR2);
    host.logged("log reopened", PATIENCE).await;

    let (lines, before, begun) = (host.line_count(), ticks(&host), Instant::now());
    let mut interval = tokio::time::interval(Duration::from_secs(5));
    interval.tick().await;
    interval.tick().await;
    let used = Duration::from_millis((ticks(&host) - before) * 10);
    let share = used.as_secs_f64() / begun.elapsed().as_secs_f64() * 100.0;
    promised("per cent of a core that an idle host uses", share, 5.0);
    // What others do on the machine changes nothing about the time that this host uses, and a machine ten times as slow makes it ten times a few
    // thousandths. A busy loop would use a whole core, or what others leave of it.
    assert!(share < 10.0, "an idle host used {share:.1} per cent of a core");
    assert_eq!(host.line_count(), lines, "an idle host has nothing to say");
    host.stop().await;
}
