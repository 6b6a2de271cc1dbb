//! Submitting.

use std::time::Duration;

use laelaps_queue::{Compression, Error, NewTask, State, Submitted, Timestamp};

use crate::fixture::{Fixture, finish, keys, settled, task};
use crate::promises;

promises! {
    async fn a_batch_is_answered_in_its_order(fixture: &Fixture) {
        fixture.submit(&[task("b"), task("d")]).await;
        let answers = fixture.queue.submit_many(&[task("a"), task("b"), task("c"), task("d"), task("a")]).await.unwrap();
        use Submitted::{AlreadyExists, Created};
        assert_eq!(answers, [Created, AlreadyExists, Created, AlreadyExists, AlreadyExists]);
        assert_eq!(fixture.queue.stats().await.unwrap().ready, 4);
    }

    async fn a_key_stays_taken_through_retention(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        let claimed = fixture.claim(host, 1).await;
        fixture.backend().settle(&[settled(&claimed[0], finish())]).await.unwrap();
        assert_eq!(fixture.queue.submit(task("a")).await.unwrap(), Submitted::AlreadyExists);
        assert_eq!(fixture.state("a").await, State::Finished);
    }

    async fn keys_are_compared_as_bytes(fixture: &Fixture) {
        let names = ["a", "A", "ä", "a\u{308}", "a ", "%", "_", "'", "\"", "\\", "日本"];
        let tasks: Vec<NewTask> = names.iter().map(|name| task(name)).collect();
        assert_eq!(fixture.queue.submit_many(&tasks).await.unwrap(), vec![Submitted::Created; names.len()]);
        for name in names {
            assert_eq!(fixture.get(name).await.key, name);
        }
    }

    async fn the_first_of_two_tasks_with_one_key_wins(fixture: &Fixture) {
        let second = NewTask { data: br#"{"n":2}"#.to_vec(), ..task("a") };
        fixture.submit(&[task("a"), second]).await;
        assert_eq!(fixture.get("a").await.data.as_deref(), Some(&br#"{"n":1}"#[..]));
    }

    async fn data_comes_back_byte_by_byte(fixture: &Fixture) {
        let host = fixture.host().await;
        let texts: [&[u8]; 4] = [
            br#"{ "z" : 1.50, "a":[1e400,null ], "z":2 }"#,
            "{\"text\":\"äöü 日本 \\u0000 \\\"\"}".as_bytes(),
            b"{}",
            b"",
        ];
        for (number, text) in texts.iter().enumerate() {
            for compression in [Compression::None, Compression::Gzip] {
                let key = format!("{number}{compression:?}");
                fixture.submit(&[NewTask { data: text.to_vec(), compression, ..task(&key) }]).await;
                let expected = if text.is_empty() { &b"{}"[..] } else { text };
                assert_eq!(fixture.get(&key).await.data.as_deref(), Some(expected));
                let claimed = fixture.claim(host, 1).await;
                assert_eq!(claimed[0].data, expected);
                assert_eq!(claimed[0].compression, compression);
            }
        }
    }

    async fn large_data_is_taken_up_to_the_bound(fixture: &Fixture) {
        let host = fixture.host().await;
        let of_size = |bytes: usize| format!(r#"{{"x":"{}"}}"#, "x".repeat(bytes - 8)).into_bytes();
        let largest = NewTask { data: of_size(NewTask::DATA_BYTES_MAX), ..task("largest") };
        let too_large = NewTask { data: of_size(NewTask::DATA_BYTES_MAX + 1), ..task("too large") };
        let many = (0..6).map(|number| NewTask { key: format!("large{number}"), ..largest.clone() });
        fixture.submit(&many.collect::<Vec<_>>()).await;
        let refused = fixture.queue.submit_many(&[task("good"), too_large]).await;
        assert!(matches!(refused, Err(Error::InvalidTask { key, .. }) if key == "too large"));
        assert!(!fixture.queue.exists("good").await.unwrap(), "of a batch with a bad task nothing is stored");
        let claimed = fixture.claim(host, 1_000).await;
        assert_eq!(claimed.len(), 4, "a claim hands out at most 64 MiB");
        assert!(claimed.iter().all(|task| task.data == largest.data));
    }

    async fn bad_tasks_are_refused_with_the_bound_they_break(fixture: &Fixture) {
        let long = "x".repeat(256);
        let cases: [(NewTask, &str); 14] = [
            (task(""), "the key is empty"),
            (task(&long), "the key has 256 bytes; at most 255 are allowed"),
            (task("a\nb"), "the key contains the control character '\\n'"),
            (task("a\0"), "the key contains the control character '\\0'"),
            (NewTask { task_type: String::new(), ..task("a") }, "the type is empty"),
            (NewTask { task_type: long.clone(), ..task("a") }, "the type has 256 bytes; at most 255 are allowed"),
            (NewTask { task_type: "a\u{7f}".to_owned(), ..task("a") }, "the type contains the control character '\\u{7f}'"),
            (NewTask { user: Some(long), ..task("a") }, "the user has 256 bytes; at most 255 are allowed"),
            (NewTask { max_attempts: Some(0), ..task("a") }, "max_attempts is 0; it has to be at least 1"),
            (NewTask { run_at: Some(Timestamp(i64::MAX)), ..task("a") }, "run_at is 9223372036854775807 ms, later than the year 9999"),
            (NewTask { data: b"[1]".to_vec(), ..task("a") }, "the data is not a JSON object: invalid type: sequence, expected a JSON object at line 1 column 0"),
            (NewTask { data: b"{\"a\":}".to_vec(), ..task("a") }, "the data is not a JSON object: expected value at line 1 column 6"),
            (NewTask { data: b"{\"a\":\"\xff\"}".to_vec(), ..task("a") }, "the data is not a JSON object: invalid utf-8 sequence of 1 bytes from index 6"),
            (NewTask { data: b"{} x".to_vec(), ..task("a") }, "the data is not a JSON object: trailing characters at line 1 column 4"),
        ];
        for (bad, expected) in cases {
            match fixture.queue.submit(bad).await {
                Err(Error::InvalidTask { problem, .. }) => assert_eq!(problem, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
        let too_many = vec![task("a"); NewTask::BATCH_MAX + 1];
        let refused = fixture.queue.submit_many(&too_many).await.unwrap_err();
        assert_eq!(refused.to_string(), "task \"a\": the batch has 10001 tasks; at most 10000 are taken at once");
        assert_eq!(fixture.queue.stats().await.unwrap().ready, 0);
    }

    async fn the_largest_batch_is_stored_whole(fixture: &Fixture) {
        let tasks: Vec<NewTask> = (0..NewTask::BATCH_MAX).map(|number| task(&number.to_string())).collect();
        let answers = fixture.queue.submit_many(&tasks).await.unwrap();
        assert!(answers.len() == tasks.len() && answers.iter().all(|answer| *answer == Submitted::Created));
        let stats = fixture.queue.stats().await.unwrap();
        assert_eq!((stats.ready, stats.types), (10_000, vec![("type".to_owned(), 10_000)]));
    }

    async fn an_empty_user_is_none(fixture: &Fixture) {
        fixture.submit(&[NewTask { user: Some(String::new()), max_running: Some(1), ..task("a") }, task("b")]).await;
        assert_eq!(fixture.get("a").await.user, None);
        let host = fixture.host().await;
        assert_eq!(fixture.claim(host, 9).await.len(), 2);
    }

    async fn a_task_runs_when_its_time_has_come(fixture: &Fixture) {
        let host = fixture.host().await;
        let now = fixture.backend().now().await.unwrap();
        let soon = now.plus(Duration::from_millis(100));
        let far = now.plus(Duration::from_secs(3600));
        let at = |key: &str, moment: Timestamp| NewTask { run_at: Some(moment), ..task(key) };
        fixture.submit(&[at("far", far), at("past", Timestamp(-5)), task("now")]).await;
        let stats = fixture.queue.stats().await.unwrap();
        assert_eq!((stats.ready, stats.scheduled), (2, 1));
        let claim = laelaps_queue::Claim::new(host, 9, crate::fixture::LONG);
        let claimed = fixture.backend().claim(&claim).await.unwrap();
        assert_eq!(keys(&claimed.tasks), ["past", "now"]);
        let wait = claimed.next_due_in.unwrap();
        assert!(wait > Duration::from_secs(3000) && wait <= Duration::from_secs(3600), "{wait:?}");
        fixture.submit(&[at("soon", soon)]).await;
        fixture.passes(soon).await;
        assert_eq!(keys(&fixture.claim(host, 9).await), ["soon"]);
        assert_eq!((fixture.state("far").await, fixture.get("far").await.run_at), (State::Waiting, far));
    }

    async fn thousands_that_become_due_at_once_all_run(fixture: &Fixture) {
        let host = fixture.host().await;
        let soon = fixture.backend().now().await.unwrap().plus(Duration::from_millis(300));
        let tasks: Vec<NewTask> = (0..2_500).map(|number| NewTask { run_at: Some(soon), ..task(&number.to_string()) }).collect();
        fixture.submit(&tasks).await;
        fixture.passes(soon).await;
        let mut claimed = 0;
        loop {
            let batch = fixture.claim(host, 1_000).await.len();
            claimed += batch;
            if batch == 0 {
                break;
            }
        }
        assert_eq!(claimed, 2_500);
    }

    async fn tasks_come_in_the_order_of_their_submission(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit_some("a", 5).await;
        fixture.submit_some("b", 5).await;
        let mut order = keys(&fixture.claim(host, 3).await).iter().map(ToString::to_string).collect::<Vec<_>>();
        order.extend(keys(&fixture.claim(host, 50).await).iter().map(ToString::to_string));
        assert_eq!(order, ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2", "b3", "b4"]);
    }

    async fn many_submitters_at_once_store_each_key_once(fixture: &Fixture) {
        let submits = (0..16).map(|offset| {
            let queue = fixture.queue.clone();
            tokio::spawn(async move {
                let tasks: Vec<NewTask> = (0..100).map(|number| task(&((number + offset * 50) % 400).to_string())).collect();
                let answers = queue.submit_many(&tasks).await.unwrap();
                answers.iter().filter(|answer| **answer == Submitted::Created).count()
            })
        });
        let mut created = 0;
        for submit in submits.collect::<Vec<_>>() {
            created += submit.await.unwrap();
        }
        assert_eq!(created, 400);
    }

    async fn a_submit_that_is_given_up_is_done_wholly_or_not_at_all(fixture: &Fixture) {
        for round in 0..20_u64 {
            let tasks: Vec<NewTask> = (0..50).map(|number| task(&format!("{round}-{number}"))).collect();
            let patience = Duration::from_micros(round * 300);
            // Whether it got done in time is open.
            let _ = tokio::time::timeout(patience, fixture.queue.submit_many(&tasks)).await;
        }
        // What is behind it in the queue of writes finds it decided.
        fixture.submit(&[task("last")]).await;
        for round in 0..20 {
            let filter = laelaps_queue::Filter { key_prefix: Some(format!("{round}-")), limit: 100, ..Default::default() };
            let stored = fixture.queue.list(&filter).await.unwrap().tasks.len();
            assert!(stored == 0 || stored == 50, "{stored} of 50 stored");
        }
    }

    async fn a_submit_wakes_who_waits_for_work(fixture: &Fixture) {
        let queue = fixture.queue.clone();
        let waiter = tokio::spawn(async move { queue.wakeup().await });
        fixture.submit(&[task("a")]).await;
        tokio::time::timeout(crate::fixture::PATIENCE, waiter).await.expect("woken in time").unwrap();
    }
}
