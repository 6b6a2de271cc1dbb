//! Hosts that are killed: what they had runs elsewhere within the promise.

use super::*;

/// A host with a hundred running tasks is killed, alone or together with the acting one, and three others are there (two, then).
async fn a_killed_host_hands_on(with_the_acting_one: bool) {
    const HELD: usize = 100;
    let place = Place::new(&format!("killed_{with_the_acting_one}_{:?}", Site::database_of_the_test())).await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    // Whoever is there first acts.
    let mut acting = if with_the_acting_one {
        place.host_to_be_lost(1, LONG_TIMER, json!({})).await
    } else {
        place.host(1, LONG_TIMER, json!({})).await
    };
    let mut victim = place.host_to_be_lost(HELD, LONG_TIMER, json!({})).await;
    submit_held(&queue, 0..HELD + 1).await;
    have_begun(&place.site, HELD + 1).await;
    let others = [place.host(60, LONG_TIMER, json!({})).await, place.host(60, LONG_TIMER, json!({})).await];
    place.has_hosts(4).await;

    let killed = Instant::now();
    victim.signal(Signal::KILL);
    let mut lost = HELD;
    if with_the_acting_one {
        acting.signal(Signal::KILL);
        lost += 1;
    }
    have_begun(&place.site, HELD + 1 + lost).await;
    let took = killed.elapsed();
    let what = if with_the_acting_one { "killed together with the acting host" } else { "a killed host" };
    let what = format!("{what}, {:?}: the last of its 100 tasks runs elsewhere", place.site.database());
    measured(&what, format!("{took:?} (session {:?}, tick {TICK:?}, alive_time {ALIVE_TIME:?})", session_of_the_lost()));
    promised(&what, took, noticed());

    victim.exited(LONG).await;
    place.site.open_gate("gate");
    wait_for_finished(&queue, HELD + 1, LONG).await;
    let tasks = all_tasks(&queue).await;
    assert_eq!(tasks.iter().filter(|task| task.lost == 1 && task.attempts == 1).count(), lost, "lost once, run once more");
    if with_the_acting_one {
        acting.exited(LONG).await;
    } else {
        acting.stop().await;
    }
    for host in others {
        host.stop().await;
    }
}

async fn killed_alone() {
    a_killed_host_hands_on(false).await;
}

async fn killed_with_the_acting_one() {
    a_killed_host_hands_on(true).await;
}

/// On SQLite the lock beside the file tells of a killed host even sooner, so that only servers show what ZooKeeper does.
mod on_postgres {
    use super::{Database, on};

    #[tokio::test]
    async fn a_killed_hosts_tasks_run_elsewhere_after_its_session_timeout() {
        on(Database::Postgres, Box::pin(super::killed_alone())).await;
    }

    #[tokio::test]
    async fn a_host_killed_together_with_the_acting_one_is_noticed_as_soon() {
        on(Database::Postgres, Box::pin(super::killed_with_the_acting_one())).await;
    }
}

mod on_mariadb {
    use super::{Database, on};

    #[tokio::test]
    async fn a_killed_hosts_tasks_run_elsewhere_after_its_session_timeout() {
        on(Database::MariaDb, Box::pin(super::killed_alone())).await;
    }
}

mod on_perfectqueue {
    use super::{Database, on};

    #[tokio::test]
    async fn a_killed_hosts_tasks_run_elsewhere_after_its_session_timeout() {
        on(Database::PerfectQueue, Box::pin(super::killed_alone())).await;
    }
}
