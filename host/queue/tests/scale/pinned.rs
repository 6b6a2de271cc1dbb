//! Claims while an old transaction keeps every dead row.

mod on_postgres {
    use std::time::{Duration, Instant};

    use sqlx::{Connection as _, Executor as _, PgConnection};

    use crate::fill;
    use crate::site::{Database, Turn};

    const CLAIMED: usize = 100_000;
    const BATCH: u32 = 500;
    /// Five times what was promised: that the last tenth takes twice as long at most, and that what enters behind the mark is found within a
    /// second of work (looks are quick at this size), when the claim that looks has come round.
    const TIMES_MAX: u32 = 10;
    const FOUND_MAX: Duration = Duration::from_secs(5);
    /// A mean below it says nothing.
    const SHORT: Duration = Duration::from_millis(10);

    #[tokio::test]
    async fn claims_under_an_old_transaction_stay_quick_and_find_what_a_slow_producer_commits() {
        let site = Turn::on(Database::Postgres).await.site().await;
        let mut producer = PgConnection::connect(&site.url).await.unwrap();
        producer.execute("BEGIN; SELECT laelaps.submit('late', 'bench', wake => false)").await.unwrap();
        fill::waiting(&site.url, 0..CLAIMED, 0).await;
        let mut reader = PgConnection::connect(&site.url).await.unwrap();
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM laelaps.host").await.unwrap();
        let claim = site.claim_of(BATCH, false).await;
        let mut times = Vec::new();
        let (mut claimed, mut committed, mut found) = (0, None, None);
        loop {
            let begun = Instant::now();
            let tasks = site.claim(&claim).await;
            if tasks.is_empty() {
                break;
            }
            times.push(begun.elapsed());
            claimed += tasks.len();
            if tasks.iter().any(|task| task.key == "late") {
                found = committed.map(|committed: Instant| committed.elapsed());
            }
            site.finish(&tasks).await;
            if committed.is_none() && claimed >= CLAIMED / 2 {
                producer.execute("COMMIT").await.unwrap();
                committed = Some(Instant::now());
            }
        }
        reader.execute("ROLLBACK").await.unwrap();
        assert_eq!(claimed, CLAIMED + 1);
        let found = found.expect("what entered behind the mark was claimed after its commit");
        assert!(found <= FOUND_MAX, "what entered behind the mark was claimed {found:?} after its commit");
        let tenth = times.len() / 10;
        let mean = |times: &[Duration]| times.iter().sum::<Duration>() / u32::try_from(times.len()).unwrap();
        let (first, last) = (mean(&times[..tenth]), mean(&times[times.len() - tenth..]));
        assert!(last <= first.max(SHORT) * TIMES_MAX, "a claim took {first:?} in the first tenth, {last:?} in the last");
    }
}
