//! No host is taken for dead that lives, however busy its machine is.

use std::process::{Command, Stdio};

use laelaps_queue::NewTask;

use super::*;

/// How long, in `tests/soak calm`; a sixtieth otherwise.
const FULL: Duration = Duration::from_secs(3_600);
const HOSTS: usize = 4;
const PROCESSORS: usize = 4;
/// Tasks that wait whenever it is looked.
const WAITING: u64 = 400;

/// A process that computes until this is dropped, as others on the machine do.
struct BusyLoop(std::process::Child);

impl BusyLoop {
    fn start() -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]).stdin(Stdio::null());
        Self(command.spawn().expect("a shell"))
    }
}

impl Drop for BusyLoop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One in four computes for longer than a tick, the others only pass through; a few fail at first, so that not only claims and settlements go on.
fn work(number: usize) -> NewTask {
    match number % 20 {
        0 => task(format!("work-{number}"), "flaky", json!({ "until": 2 })),
        1 | 6 | 11 | 16 => task(format!("work-{number}"), "compute", json!({ "ms": 30 })),
        _ => task(format!("work-{number}"), "silent", json!({})),
    }
}

on_each_server! {
    async fn four_hosts_at_full_load_beside_two_busy_loops_never_count_as_dead() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        let queue = site.queue().await;
        let mut hosts = Vec::new();
        for _ in 0..HOSTS {
            let changes = json!({
                "task_prefetch": 20, "retry_wait": 0, "retention_time": 1, "host_timeout": PROMISED_TIMEOUT.as_secs(),
            });
            hosts.push(host(&site, PROCESSORS, changes).await);
        }
        let before = has_hosts(&queue, HOSTS).await;
        let _loops = [BusyLoop::start(), BusyLoop::start()];
        let lasts = if scaled(10) == 10 { FULL } else { FULL / 60 };
        let (begun, mut submitted) = (Instant::now(), 0);
        let begins = signs(&queue).await;
        eventually(2 * lasts + LONG, "the load has lasted long enough", async || {
            let stats = queue.stats().await.expect("the queue answers");
            if stats.ready < WAITING {
                let more: Vec<_> = (submitted..submitted + 500).map(work).collect();
                submitted += more.len();
                submit(&queue, &more).await;
            }
            let lasted = begun.elapsed();
            if lasted > lasts { Ok(()) } else { Err(format!("{lasted:?}")) }
        })
        .await;
        let ends = signs(&queue).await;
        let hosts_now: Vec<_> = ends.iter().map(|sign| sign.host).collect();
        assert_eq!(hosts_now, before, "nobody was struck off");
        let signs: Vec<i64> = begins.iter().zip(&ends).map(|(begins, ends)| ends.count - begins.count).collect();
        let what = format!("calm, {:?}: tasks submitted in {lasts:?}, signs of each host", site.database());
        measured(&what, format!("{submitted}, {signs:?}"));
        for mut host in hosts {
            assert!(host.is_running());
            for never in ["registering again", "handed on", "a task was lost"] {
                assert_eq!(host.lines_with(never), [""; 0]);
            }
            host.stop().await;
        }
    }
}
