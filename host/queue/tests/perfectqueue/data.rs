//! Data, as either side leaves it to the other.

use laelaps_queue::{Compression, Event, LeaseAnswer, NewTask, Submitted};

use crate::fixture::{Site, settled, task, with_follow_ups};

#[tokio::test]
async fn data_comes_back_byte_by_byte() {
    let site = Site::new().await;
    let host = site.host().await;
    let texts: [&[u8]; 4] =
        [br#"{ "z" : 1.50, "a":[1e400,null ], "z":2 }"#, "{\"text\":\"äöü 日本 \\u0000 \\\"\"}".as_bytes(), b"{}", b""];
    for (number, text) in texts.iter().enumerate() {
        for compression in [Compression::None, Compression::Gzip] {
            let key = format!("{number}{compression:?}");
            site.submit(&[NewTask { data: text.to_vec(), compression, ..task(&key) }]).await;
            let expected = if text.is_empty() { &b"{}"[..] } else { text };
            assert_eq!(site.get(&key).await.data.as_deref(), Some(expected));
            let claimed = site.claim(host, 1).await.remove(0);
            assert_eq!((claimed.data.as_slice(), claimed.compression), (expected, compression));
        }
    }
}

#[tokio::test]
async fn an_update_keeps_type_and_compression_and_renews() {
    for compression in [Compression::None, Compression::Gzip] {
        let site = Site::new().await;
        let (host, mut ruby) = (site.host().await, site.ruby().await);
        site.submit(&[NewTask { compression, ..NewTask::new("report.7", "special", r#"{"a":1}"#) }]).await;
        let claimed = site.claim(host, 1).await.remove(0);
        let update = br#"{"b":[2],"type":"another"}"#;
        assert_eq!(site.backend().update_data(claimed.lease_ref, update).await.unwrap(), LeaseAnswer::Held);
        let (_, stored, ..) = ruby.row("report.7").await;
        match compression {
            Compression::None => assert_eq!(stored, br#"{"type":"special","a":1,"b":[2]}"#),
            Compression::Gzip => assert!(stored.starts_with(b"\x1f\x8b")),
        }
        assert_eq!(site.settle(&claimed, Event::Retry { delay: None }).await, LeaseAnswer::Held);
        let again = site.claim(host, 1).await.remove(0);
        assert_eq!((again.task_type.as_str(), again.data.as_slice()), ("special", &br#"{"a":1,"b":[2]}"#[..]));
        assert_eq!((again.compression, again.attempt), (compression, 2));
    }
}

#[tokio::test]
async fn an_update_by_ruby_loses_the_type_and_the_key_has_it() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    ruby.submit("report.7", br#"{"type":"special","a":1}"#).await;
    assert_eq!(ruby.acquire_fair(300, 1).await, ["report.7"]);
    assert!(ruby.update_data("report.7", br#"{"a":2}"#, 0).await);
    let claimed = site.claim(host, 1).await.remove(0);
    assert_eq!((claimed.task_type.as_str(), claimed.data.as_slice()), ("report", &br#"{"a":2}"#[..]));
    // Ours writes it back, so that the next attempt has the same.
    site.backend().update_data(claimed.lease_ref, br#"{"b":3}"#).await.unwrap();
    assert_eq!(ruby.row("report.7").await.1, br#"{"type":"report","a":2,"b":3}"#);
    assert_eq!(site.settle(&claimed, Event::Stopped).await, LeaseAnswer::Held);
    assert_eq!(ruby.acquire_fair(300, 1).await, ["report.7"]);
}

#[tokio::test]
async fn an_update_by_ruby_of_what_we_run_ends_our_lease() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task("a")]).await;
    let ours = site.claim(host, 1).await.remove(0);
    assert!(ruby.update_data("a", br#"{"n":9}"#, 200).await);
    site.changes_nothing(&ours).await;
}

#[tokio::test]
async fn an_update_that_is_no_object_is_refused_and_leaves_the_lease() {
    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&[task("a")]).await;
    let ours = site.claim(host, 1).await.remove(0);
    let refused = site.backend().update_data(ours.lease_ref, b"[]").await.unwrap_err();
    assert!(refused.to_string().starts_with("task \"a\": the update is not a JSON object"), "{refused}");
    assert_eq!(site.backend().update_data(ours.lease_ref, br#"{"m":1}"#).await.unwrap(), LeaseAnswer::Held);
}

#[tokio::test]
async fn a_key_is_one_to_the_table_whatever_its_case() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    use Submitted::{AlreadyExists, Created};
    ruby.submit("b", b"{}").await;
    let names = ["a", "B", "c", "A", "b", "c", "d"];
    let answers = site.queue.submit_many(&names.map(task)).await.unwrap();
    assert_eq!(answers, [Created, AlreadyExists, Created, AlreadyExists, AlreadyExists, AlreadyExists, Created]);
    assert_eq!(site.queue.submit(task("D")).await.unwrap(), AlreadyExists);
    assert_eq!(site.get("D").await.key, "d");
    for claimed in site.claim(host, 9).await {
        assert_eq!(site.settle(&claimed, crate::fixture::finish()).await, LeaseAnswer::Held);
    }
    assert_eq!(site.queue.submit(task("A")).await.unwrap(), AlreadyExists, "a finished task keeps its key");
}

#[tokio::test]
async fn the_largest_batch_is_stored_whole_and_once() {
    let site = Site::new().await;
    let tasks: Vec<NewTask> = (0..NewTask::BATCH_MAX).map(|number| task(&number.to_string())).collect();
    assert!(site.queue.submit_many(&tasks).await.unwrap().iter().all(|answer| *answer == Submitted::Created));
    let again = site.queue.submit_many(&tasks).await.unwrap();
    assert!(again.iter().all(|answer| *answer == Submitted::AlreadyExists));
    let stats = site.queue.stats().await.unwrap();
    assert_eq!((stats.ready, stats.types), (10_000, vec![("type".to_owned(), 10_000)]));
}

#[tokio::test]
async fn follow_ups_come_with_their_settlement() {
    for side_table in [true, false] {
        let site = Site::with(crate::fixture::table(side_table)).await;
        let host = site.host().await;
        // The table's times are whole seconds, and equal ones are ordered by key.
        let now = site.backend().now().await.unwrap();
        let due = |key: &str, ago_ms: i64| NewTask { run_at: Some(laelaps_queue::Timestamp(now.0 - ago_ms)), ..task(key) };
        site.submit(&[due("a", 20_000), due("there", 10_000)]).await;
        let claimed = site.claim(host, 1).await.remove(0);
        let far = now.plus(std::time::Duration::from_secs(3600));
        let follow_ups = vec![task("next"), task("there"), NewTask { run_at: Some(far), ..task("later") }];
        let settlement = with_follow_ups(follow_ups, settled(&claimed, crate::fixture::finish()));
        assert_eq!(site.backend().settle(&[settlement]).await.unwrap(), [LeaseAnswer::Held]);
        let claimed = site.claim(host, 9).await;
        assert_eq!(crate::fixture::keys(&claimed), ["there", "next"]);
        assert!(site.queue.exists("later").await.unwrap());
    }
}

#[tokio::test]
async fn a_producers_own_transaction_has_its_tasks_or_none() {
    use sqlx::Connection as _;
    let site = Site::new().await;
    let host = site.host().await;
    let mut producer = sqlx::MySqlConnection::connect(&site.config.url).await.unwrap();
    for commits in [false, true] {
        let mut transaction = producer.begin().await.unwrap();
        let far = site.backend().now().await.unwrap().plus(std::time::Duration::from_secs(3600));
        let tasks = [task("a"), task("a"), NewTask { run_at: Some(far), ..task("b") }];
        let answers = site.queue.submit_in(&mut *transaction, &tasks).await.unwrap();
        assert_eq!(answers, [Submitted::Created, Submitted::AlreadyExists, Submitted::Created]);
        assert!(site.claim(host, 9).await.is_empty());
        if commits { transaction.commit().await.unwrap() } else { transaction.rollback().await.unwrap() }
    }
    let stats = site.queue.stats().await.unwrap();
    assert_eq!((stats.ready, stats.scheduled), (1, 1));
}

/// Ruby's clean-up knows nothing of what is noted beside a task.
#[tokio::test]
async fn a_later_task_of_a_key_has_nothing_of_an_earlier_one() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    for later_max_attempts in [Some(7), None] {
        site.submit(&[NewTask { max_attempts: Some(3), user: Some("u".to_owned()), ..task("a") }]).await;
        let first = site.claim(host, 1).await.remove(0);
        let trouble = Event::Trap { message: "first".to_owned() };
        assert_eq!(site.settle(&first, trouble).await, LeaseAnswer::Held);
        let second = site.claim(host, 1).await.remove(0);
        let output = Event::Finish { output: Some(b"of the first".to_vec()), retention: None };
        assert_eq!(site.settle(&second, output).await, LeaseAnswer::Held);
        assert_eq!(site.get("a").await.output.as_deref(), Some(&b"of the first"[..]));
        ruby.run("UPDATE {t} SET timeout = UNIX_TIMESTAMP() - 1000000001").await;
        assert_eq!(ruby.clean_up().await, 1);
        ruby.run("UPDATE {s} SET created_at = created_at - 1").await;
        if later_max_attempts.is_some() {
            site.submit(&[NewTask { max_attempts: later_max_attempts, ..task("a") }]).await;
        } else {
            ruby.submit("a", br#"{"type":"t"}"#).await;
        }
        let later = site.get("a").await;
        assert_eq!((later.attempts, &later.error_code, &later.error_message), (0, &None, &None));
        assert_eq!((later.finished_at, &later.user, later.max_attempts), (None, &None, later_max_attempts));
        assert_eq!(site.backend().audit().await.unwrap(), [""; 0]);
        assert!(ruby.finish("a", 400).await);
        assert_eq!(site.get("a").await.output, None);
        let filter = laelaps_queue::Filter { with_data: true, ..laelaps_queue::Filter::default() };
        assert_eq!(site.queue.list(&filter).await.unwrap().tasks[0].output, None);
        ruby.run_raw("DELETE FROM {t}; DELETE FROM {s}").await;
    }
}
