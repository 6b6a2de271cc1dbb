//! Large data: written in pieces, read whole, removed a little at a time.

use std::sync::Arc;
use std::time::Duration;

use sqlx::ConnectOptions as _;
use tempfile::TempDir;

use super::super::*;
use super::{asking, host, opened};
use crate::{Attempt, Compression, Event};

/// Data of so many bytes, and an update that makes it so.
fn large(letter: &str, bytes: usize) -> (String, String) {
    let members = format!(r#"{{"x":"{}"}}"#, letter.repeat(bytes - 8));
    (members.clone(), members)
}

async fn pieces_of(sqlite: &Sqlite) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM task_data_piece").fetch_one(&sqlite.readers).await.unwrap()
}

#[tokio::test]
async fn large_data_is_written_in_pieces_and_read_as_a_whole() {
    const MIB: usize = 1 << 20;
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    let host = host(&sqlite).await;
    let plain = NewTask::new("plain", "type", "{}");
    let tasks = [plain.clone(), NewTask { key: "gzip".to_owned(), compression: Compression::Gzip, ..plain }];
    sqlite.submit(&tasks).await.unwrap();
    let claimed = sqlite.claim(&asking(host, 9)).await.unwrap().tasks;
    let lease = |key: &str| claimed.iter().find(|task| task.key == key).unwrap().lease_ref;
    let data = async |key: &str| String::from_utf8(sqlite.get(key).await.unwrap().unwrap().data.unwrap()).unwrap();

    // Pieces, then their taking the place of the old data, then the old ones a few at a time, until there are no more.
    for (bytes, had, has) in [(15 * MIB, 0, 60), (16 * MIB, 60, 64), (3 * MIB / 2, 64, 6), (MIB, 6, 0), (2 * MIB, 0, 8)] {
        let (members, expected) = large("y", bytes);
        let transactions = sqlite.seen.looks();
        assert_eq!(sqlite.update_data(lease("plain"), members.as_bytes()).await.unwrap(), LeaseAnswer::Held);
        let removals = if has + had > 0 { had / usize::try_from(pieces::REMOVED_MAX).unwrap() + 1 } else { 0 };
        assert_eq!(sqlite.seen.looks() - transactions, (has + 1 + removals) as u64, "{bytes}");
        assert_eq!(pieces_of(&sqlite).await, has as i64);
        assert!(data("plain").await == expected, "{bytes}");
    }

    // What cannot be compressed, in pieces although compressed.
    let noise: String = std::iter::repeat_with(|| fastrand::char('\u{4e00}'..='\u{9fff}')).take(3 * MIB).collect();
    let members = format!(r#"{{"x":"{noise}"}}"#);
    assert_eq!(sqlite.update_data(lease("gzip"), members.as_bytes()).await.unwrap(), LeaseAnswer::Held);
    let many = pieces_of(&sqlite).await;
    assert!(many > 8 + 4, "{many}");
    assert!(data("gzip").await == members);

    // Whoever else reads finds it whole: lists, the next attempt, a producer's view.
    let listed = sqlite.list(&Filter { with_data: true, limit: 9, ..Filter::default() }).await.unwrap().tasks;
    assert_eq!(listed.iter().map(|task| task.data.as_ref().unwrap().len()).collect::<Vec<_>>(), [2 * MIB, members.len()]);
    let released = claimed.iter().map(|task| {
        let event = Event::Release { delay: Some(Duration::ZERO) };
        Settlement::of(task.lease_ref, event, Attempt::of(task), &Policy::default(), 0.0, None, Vec::new())
    });
    sqlite.settle(&released.collect::<Vec<_>>()).await.unwrap();
    let viewed: i64 =
        sqlx::query_scalar("SELECT length(data) FROM submit WHERE key = 'plain'").fetch_one(&sqlite.readers).await.unwrap();
    assert_eq!(viewed, 2 * MIB as i64);
    let again = sqlite.claim(&asking(host, 9)).await.unwrap().tasks;
    assert_eq!(again.iter().map(|task| task.data.len()).collect::<Vec<_>>(), [2 * MIB, members.len()]);
    assert_eq!(sqlite.audit().await.unwrap(), [""; 0]);

    // An attempt that lost its lease leaves nothing behind.
    let (members, _) = large("z", 5 * MIB);
    assert_eq!(sqlite.update_data(lease("plain"), members.as_bytes()).await.unwrap(), LeaseAnswer::Lost);
    assert_eq!(pieces_of(&sqlite).await, many);

    // What is over is removed with its pieces.
    for task in &again {
        sqlite.cancel(&task.key, Duration::ZERO).await.unwrap();
    }
    while sqlite.clean_up(1_000).await.unwrap() > 0 {}
    assert_eq!(pieces_of(&sqlite).await, 0);
    sqlite.close().await;
}

#[tokio::test]
async fn a_large_update_that_is_given_up_leaves_the_old_data_and_the_next_one_removes_its_pieces() {
    let folder = TempDir::new().unwrap();
    let sqlite = Arc::new(opened(&folder, |options| options).await);
    let host = host(&sqlite).await;
    sqlite.submit(&[NewTask::new("task", "type", r#"{"x":"old"}"#)]).await.unwrap();
    let lease_ref = sqlite.claim(&asking(host, 9)).await.unwrap().tasks[0].lease_ref;
    let (members, expected) = large("y", 16 << 20);
    let updating = tokio::spawn({
        let (sqlite, members) = (Arc::clone(&sqlite), members.clone());
        async move { sqlite.update_data(lease_ref, members.as_bytes()).await }
    });
    while pieces_of(&sqlite).await == 0 && !updating.is_finished() {
        tokio::task::yield_now().await;
    }
    updating.abort();
    let is_done = updating.await.is_ok();
    let data = sqlite.get("task").await.unwrap().unwrap().data.unwrap();
    assert!(data == if is_done { expected.as_bytes() } else { br#"{"x":"old"}"# }, "is done: {is_done}");
    assert_eq!(sqlite.audit().await.unwrap(), [""; 0]);
    let (members, expected) = large("z", 2 << 20);
    assert_eq!(sqlite.update_data(lease_ref, members.as_bytes()).await.unwrap(), LeaseAnswer::Held);
    assert!(sqlite.get("task").await.unwrap().unwrap().data.unwrap() == expected.as_bytes());
    assert_eq!(pieces_of(&sqlite).await, 8);
    sqlite.close().await;
}

#[tokio::test]
async fn a_large_update_ends_with_its_lease_and_a_producer_that_takes_the_key_leaves_nothing_of_it() {
    let folder = TempDir::new().unwrap();
    let sqlite = Arc::new(opened(&folder, |options| options).await);
    let host = host(&sqlite).await;
    sqlite.submit(&[NewTask::new("task", "type", "{}")]).await.unwrap();
    let lease_ref = sqlite.claim(&asking(host, 9)).await.unwrap().tasks[0].lease_ref;
    let updating = tokio::spawn({
        let (sqlite, (members, _)) = (Arc::clone(&sqlite), large("y", 16 << 20));
        async move { sqlite.update_data(lease_ref, members.as_bytes()).await }
    });
    while pieces_of(&sqlite).await == 0 {
        tokio::task::yield_now().await;
    }
    sqlite.cancel("task", Duration::ZERO).await.unwrap();
    let transactions = sqlite.seen.looks();
    assert_eq!(updating.await.unwrap().unwrap(), LeaseAnswer::Lost);
    let after = sqlite.seen.looks() - transactions;
    assert!(after <= 1 + 64 / 4 + 1, "{after}: after the piece that was refused nothing is done but to remove the others");
    assert_eq!(pieces_of(&sqlite).await, 0);

    sqlite.submit(&[NewTask::new("whole", "type", "{}")]).await.unwrap();
    let lease_ref = sqlite.claim(&asking(host, 9)).await.unwrap().tasks[0].lease_ref;
    assert_eq!(sqlite.update_data(lease_ref, large("y", 2 << 20).0.as_bytes()).await.unwrap(), LeaseAnswer::Held);
    sqlite.cancel("whole", Duration::ZERO).await.unwrap();
    assert_eq!(pieces_of(&sqlite).await, 8);
    let mut producer = options(&folder.path().join("queue.db")).connect().await.unwrap();
    sqlx::query("INSERT INTO submit (key, type) VALUES ('whole', 'type')").execute(&mut producer).await.unwrap();
    assert_eq!(pieces_of(&sqlite).await, 0);
    assert_eq!(sqlite.audit().await.unwrap(), [""; 0]);
    sqlite.close().await;
}

#[tokio::test]
async fn what_is_large_is_removed_a_few_tasks_at_a_time() {
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    for number in 0..20 {
        let bytes = if number == 19 { 100 } else { 5 << 20 };
        sqlite.submit(&[NewTask::new(number.to_string(), "type", large("y", bytes).0)]).await.unwrap();
        sqlite.cancel(&number.to_string(), Duration::ZERO).await.unwrap();
    }
    let transactions = sqlite.seen.looks();
    assert_eq!(sqlite.clean_up(7).await.unwrap(), 7);
    assert_eq!(sqlite.seen.looks() - transactions, 3, "of three, three and one");
    assert_eq!(sqlite.clean_up(1_000).await.unwrap(), 13);
    assert_eq!(sqlite.seen.looks() - transactions, 3 + 4, "of three, four times, and the small one with the last");
    assert_eq!(sqlite.clean_up(1_000).await.unwrap(), 0);
    assert_eq!(sqlite.audit().await.unwrap(), [""; 0]);
    sqlite.close().await;
}
