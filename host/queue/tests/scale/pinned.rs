//! Claims while an old transaction keeps every dead row.

mod on_postgres {
    use std::time::{Duration, Instant};

    use sqlx::{Connection as _, Executor as _, PgConnection};

    use crate::fill;
    use crate::site::{Database, Turn, median};

    const CLAIMED: usize = 100_000;
    const BATCH: u32 = 500;
    /// Five times what was promised: that the last tenth takes twice as long at most.
    const TIMES_MAX: u32 = 10;
    /// What enters behind the mark is found by a claim that begins a second later, or so many times as long as the last look from the head took.
    const SHARE: u32 = 20;
    /// A median below it says nothing.
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
        // No look from the head took longer.
        let mut longest = Duration::ZERO;
        let (mut claimed, mut committed, mut found) = (0, None, false);
        while claimed <= CLAIMED {
            let begun = Instant::now();
            let tasks = site.claim(&claim).await;
            let took = begun.elapsed();
            if !tasks.is_empty() {
                times.push(took);
            } else if found || committed.is_none() {
                break;
            }
            claimed += tasks.len();
            found |= tasks.iter().any(|task| task.key == "late");
            if let Some(committed) = committed.filter(|_| !found) {
                let (waited, bound) = (begun - committed, Duration::from_secs(1).max(longest * SHARE));
                assert!(
                    waited < bound,
                    "a claim that began {waited:?} after the commit, beyond {bound:?}, did not find what entered"
                );
            }
            longest = longest.max(took);
            site.finish(&tasks).await;
            if committed.is_none() && claimed >= CLAIMED / 2 {
                assert!(!found);
                producer.execute("COMMIT").await.unwrap();
                committed = Some(Instant::now());
            }
        }
        reader.execute("ROLLBACK").await.unwrap();
        assert_eq!((claimed, found), (CLAIMED + 1, true));
        let tenth = times.len() / 10;
        let last = times.len() - tenth;
        let (first, last) = (median(&mut times[..tenth].to_vec()), median(&mut times[last..].to_vec()));
        assert!(last <= first.max(SHORT) * TIMES_MAX, "a claim took {first:?} in the first tenth, {last:?} in the last");
    }
}
