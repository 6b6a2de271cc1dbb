//! What the audit of PerfectQueue's table finds, and that it finds nothing in what Ruby's programs and ours leave behind.

use std::time::Duration;

use laelaps_queue::{Attempt, Event, FailureKind, LeaseAnswer, NewTask, Policy, Settlement};

use crate::fixture::{LONG, Site, asking, finish, settled, table, task, task_of};

/// A contradiction in PerfectQueue's own table: how it is made, and the rule that tells of it.
const WRONG: [(&str, &str); 8] = [
    ("UPDATE {t} SET created_at = NULL", "the time of a task that has ended is not after the event horizon"),
    ("UPDATE {t} SET timeout = 1200000000", "a task that has not ended can be acquired some day, or is held"),
    ("UPDATE {t} SET created_at = NULL, timeout = 1200000000, resource = 'u'", "a task that has ended takes up no user's room"),
    ("UPDATE {t} SET created_at = UNIX_TIMESTAMP() + 90000", "a task was made before now"),
    ("UPDATE {t} SET owner = 1 << 63", "an owner is a connection, or a claim of ours"),
    ("UPDATE {t} SET owner = (1 << 62) + 1", "a settlement's mark stands on a task that has ended"),
    ("UPDATE {t} SET owner = 7809634745002783488", "what is set aside has the last of all times, and no user"),
    ("UPDATE {t} SET data = CONCAT(x'1f8b', 'oops')", "compressed data can be read"),
];

/// Between it and ours, of a task with one attempt at most that waits for its time.
const WRONG_BESIDE: [(&str, &str); 9] = [
    ("UPDATE {s} SET state = 'failed', ended_ms = 1", "a task that has not ended is not noted as ended"),
    (
        "UPDATE {t} SET created_at = NULL, timeout = 1200000000; UPDATE {s} SET timeout = 1200000000",
        "a task that has ended as we left it is noted as ended",
    ),
    ("UPDATE {t} SET owner = 5", "a task that waits for its time has no owner"),
    ("UPDATE {s} SET attempts = 1", "a task that has not ended has attempts left"),
    ("UPDATE {s} SET state = 'oops'", "a noted state is one of ours, with the time when it was written"),
    ("UPDATE {s} SET timeout = NULL", "a noted state is one of ours, with the time when it was written"),
    ("UPDATE {s} SET ended_ms = 1", "an end is noted with its moment, and nothing else is"),
    ("UPDATE {s} SET lost_alone = 1", "losses are noted with the lease that was lost, and since when"),
    ("UPDATE {s} SET records = '{'", "records and progress are JSON"),
];

async fn finds(site: &Site, rule: &str) {
    let number = site.get("a").await.id.0;
    let found = site.backend().audit().await.unwrap();
    assert_eq!(found.len(), 1, "{rule}: {found:?}");
    assert!(found[0].starts_with(&format!("{rule}: task {number}")), "{rule}: {found:?}");
}

#[tokio::test]
async fn each_contradiction_is_named_with_its_row() {
    for side_table in [false, true] {
        let site = Site::with(table(side_table)).await;
        let mut ruby = site.ruby().await;
        for (wrong, rule) in WRONG {
            site.submit(&[task("a")]).await;
            assert_eq!(site.backend().audit().await.unwrap(), [""; 0]);
            ruby.run_raw(wrong).await;
            finds(&site, rule).await;
            ruby.run("DELETE FROM {t}").await;
        }
        site.submit(&[task_of("u", "a", None)]).await;
        ruby.run_raw("ALTER TABLE {t} MODIFY resource VARBINARY(255); UPDATE {t} SET resource = x'6d2dfc'").await;
        finds(&site, "keys and users are text in UTF-8").await;
    }
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    for (wrong, rule) in WRONG_BESIDE {
        let run_at = Some(site.backend().now().await.unwrap().plus(LONG));
        site.submit(&[NewTask { run_at, max_attempts: Some(1), ..task("a") }]).await;
        assert_eq!(site.backend().audit().await.unwrap(), [""; 0]);
        ruby.run_raw(wrong).await;
        finds(&site, rule).await;
        ruby.run_raw("DELETE FROM {t}; DELETE FROM {s}").await;
    }
}

/// More rows with compressed data than are read at once, some of them with more than is read with others; the damaged one stands last.
#[tokio::test]
async fn compressed_data_is_read_to_the_last_row() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    let large = format!(r#"{{"noise":"{}"}}"#, (0..100_000).map(|_| fastrand::alphanumeric()).collect::<String>());
    let tasks: Vec<NewTask> = (0..450)
        .map(|number| {
            let data = if number % 100 == 0 { large.clone() } else { r#"{"n":1}"#.to_owned() };
            let key = if number == 449 { "a".to_owned() } else { format!("A{number:03}") };
            NewTask { compression: laelaps_queue::Compression::Gzip, ..NewTask::new(key, "type", data) }
        })
        .collect();
    site.submit(&tasks).await;
    assert_eq!(site.backend().audit().await.unwrap(), [""; 0]);
    ruby.run("UPDATE {t} SET data = LEFT(data, LENGTH(data) - 9), timeout = timeout + 9 WHERE id = 'a'").await;
    finds(&site, "compressed data can be read").await;
}

#[tokio::test]
async fn what_rubys_programs_and_ours_leave_behind_is_no_contradiction() {
    for side_table in [true, false] {
        let site = Site::with(table(side_table)).await;
        let (host, mut ruby) = (site.host().await, site.ruby().await);
        let later = Some(site.backend().now().await.unwrap().plus(LONG));
        let tasks = ["finished", "failed", "again", "released", "cancelled", "forced", "late", "rubys", "rubys too", "lost"];
        site.submit(&tasks.map(|key| task_of("u", key, Some(20)))).await;
        for claimed in site.claim(host, 9).await {
            let event = match claimed.key.as_str() {
                "finished" => finish(),
                "failed" => Event::Failure { kind: FailureKind::Reject, code: "no".to_owned(), message: "never".to_owned() },
                "again" => Event::Retry { delay: Some(LONG) },
                "released" => Event::Release { delay: None },
                _ => continue,
            };
            let settlement =
                Settlement::of(claimed.lease_ref, event, Attempt::of(&claimed), &Policy::default(), 0.5, None, Vec::new());
            assert_eq!(site.backend().settle(&[settlement]).await.unwrap(), [LeaseAnswer::Held]);
        }
        let short =
            site.backend().claim(&laelaps_queue::Claim { alive_time: Duration::from_millis(100), ..asking(host, 1) }).await;
        let short = short.unwrap().tasks.remove(0);
        site.passes(short.until).await;
        site.submit(&[NewTask { run_at: later, ..task("scheduled") }, task("held").on_hold(), task("damaged")]).await;
        ruby.run("UPDATE {t} SET data = CONCAT(x'1f8b', 'oops') WHERE id = 'damaged'").await;
        site.claim_for(host, 1, LONG).await;
        site.queue.cancel("cancelled").await.unwrap();
        site.queue.force_finish("forced", None).await.unwrap();
        // What Ruby does to tasks of ours, and to its own.
        for key in ["late", "rubys", "rubys too"] {
            ruby.heartbeat(key, if key == "late" { 300 } else { 0 }).await;
        }
        ruby.submit("of ruby", br#"{"type":"t"}"#).await;
        let acquired = ruby.acquire_fair(300, 9).await;
        assert!(acquired.contains(&"of ruby".to_owned()), "{acquired:?}");
        ruby.update_data(&acquired[0], b"{}", 300).await;
        for key in acquired.iter().skip(1) {
            ruby.finish(key, 0).await;
        }
        ruby.heartbeat(&acquired[0], 0).await;
        assert!(ruby.acquire_unfair(300, 9).await.contains(&acquired[0]));
        ruby.clean_up().await;
        assert_eq!(site.backend().audit().await.unwrap(), [""; 0], "side table: {side_table}");
        let settlement = settled(&short, finish());
        assert_eq!(site.backend().settle(&[settlement]).await.unwrap(), [LeaseAnswer::Lost]);
        assert_eq!(site.backend().audit().await.unwrap(), [""; 0], "side table: {side_table}");
    }
}
