//! What waits for the disk, and what a power loss may take back.

use std::time::Duration;

use tempfile::TempDir;

use super::super::*;
use super::{asking, finished, host, of_user, opened};
use crate::{Beat, LeaseAnswer, NewTask};

#[tokio::test]
async fn a_power_loss_takes_back_claims_and_renewals_and_nothing_that_was_answered_as_stored() {
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    let host = host(&sqlite).await;
    let tasks: Vec<NewTask> = (0..5).map(|number| of_user(&number.to_string(), Some(3))).collect();
    sqlite.submit(&tasks).await.unwrap();
    let finished_task = sqlite.claim(&asking(host, 1)).await.unwrap().tasks;
    sqlite.settle(&[finished(&finished_task[0])]).await.unwrap();
    // Nothing is waiting for the disk now: this is what it has at the least, whatever comes.
    let disk: Vec<(&str, Vec<u8>)> =
        ["queue.db", "queue.db-wal"].map(|name| (name, std::fs::read(folder.path().join(name)).unwrap())).into();
    let claimed = sqlite.claim(&asking(host, 9)).await.unwrap().tasks;
    assert_eq!(claimed.len(), 3);
    let beats: Vec<Beat> = claimed
        .iter()
        .map(|task| Beat { lease_ref: task.lease_ref, alive_time: Duration::from_secs(9), progress: None })
        .collect();
    assert_eq!(sqlite.heartbeat(&beats).await.unwrap(), [LeaseAnswer::Held; 3]);
    // The power goes.
    sqlite.close().await;
    let after = TempDir::new().unwrap();
    for (name, bytes) in &disk {
        std::fs::write(after.path().join(name), bytes).unwrap();
    }
    let sqlite = opened(&after, |options| options).await;
    assert_eq!(sqlite.audit().await.unwrap(), [""; 0]);
    let stats = sqlite.stats().await.unwrap();
    assert_eq!((stats.finished, stats.ready, stats.running), (1, 4, 0));
    let host = self::host(&sqlite).await;
    let again = sqlite.claim(&asking(host, 9)).await.unwrap().tasks;
    assert_eq!(again.len(), 3, "the user's limit holds");
    assert!(again.iter().all(|task| task.lost == 0 && task.attempt == 1));
    sqlite.settle(&again.iter().map(finished).collect::<Vec<_>>()).await.unwrap();
    sqlite.close().await;
}

#[tokio::test]
async fn a_group_waits_for_the_disk_if_anything_in_it_has_to() {
    fn level(session: &mut writer::Session) -> writer::Work<'_, i64> {
        Box::pin(async move { Ok(sqlx::query_scalar("PRAGMA synchronous").fetch_one(session.db()).await?) })
    }
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    // 1 does not wait, 2 does.
    assert_eq!(sqlite.writer.run_with(Flush::Later, "looking", level).await.unwrap(), 1);
    assert_eq!(sqlite.writer.run("looking", level).await.unwrap(), 2);
    assert_eq!(sqlite.writer.run_with(Flush::Later, "looking", level).await.unwrap(), 1);
    // While the first one holds the writer up, the others become a group.
    let (began, begun) = tokio::sync::oneshot::channel::<()>();
    let (go, gone) = tokio::sync::oneshot::channel::<()>();
    let held = sqlite.writer.run("waiting", move |_| {
        Box::pin(async move {
            let _ = began.send(());
            let _ = gone.await;
            Ok(())
        })
    });
    let others = async {
        begun.await.unwrap();
        let mut light = std::pin::pin!(sqlite.writer.run_with(Flush::Later, "looking", level));
        let mut heavy = std::pin::pin!(sqlite.writer.run("looking", level));
        assert!(futures::poll!(&mut light).is_pending() && futures::poll!(&mut heavy).is_pending());
        go.send(()).unwrap();
        (light.await.unwrap(), heavy.await.unwrap())
    };
    let (held, levels) = tokio::join!(held, others);
    held.unwrap();
    assert_eq!(levels, (2, 2));
    sqlite.close().await;
}
