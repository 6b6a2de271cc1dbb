//! What only this database promises: how statements find their rows, and what a repeated operation finds of its first try.

use laelaps_test_databases::mariadb;
use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection};

use super::settle::Group;
use super::*;
use crate::{Attempt, ClaimedTask, Event};

async fn opened() -> MySql {
    let runtime = tokio::runtime::Handle::current();
    let making = tokio::task::spawn_blocking(move || runtime.block_on(async { mariadb::shared().await.create_database().await }));
    let mysql = MySql::open(&Config::new(making.await.unwrap())).await.unwrap();
    mysql.init().await.unwrap();
    mysql
}

async fn claimed(mysql: &MySql, host: HostId) -> ClaimedTask {
    let claim = Claim { host, limit: 1, alive_time: Duration::from_secs(300), alone: false, ignore_users: false, accepts: None };
    mysql.claim(&claim).await.unwrap().tasks.remove(0)
}

fn settled(task: &ClaimedTask, event: Event) -> Settlement {
    Settlement::of(task.lease_ref, event, Attempt::of(task), &Policy::default(), 0.5, None, Vec::new())
}

/// Settle as who has tried it before and did not hear the answer.
async fn settled_again(mysql: &MySql, settlement: &Settlement) -> LeaseAnswer {
    let settlement = settlement.clone();
    let answers = mysql
        .run("settling", move |session| {
            let group = Group::new(std::slice::from_ref(&settlement), HashMap::new(), false);
            Box::pin(async move {
                session.repeated = true;
                group?.write(session, &HashSet::new()).await
            })
        })
        .await;
    answers.unwrap()[0]
}

#[tokio::test]
async fn a_settlement_whose_answer_was_lost_is_known_to_have_been_made() {
    let mysql = opened().await;
    let host = mysql.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap();
    mysql.submit(&[NewTask::new("a", "type", "{}")]).await.unwrap();
    let first = claimed(&mysql, host).await;
    let release = settled(&first, Event::Release { delay: None });
    assert_eq!(mysql.settle(std::slice::from_ref(&release)).await.unwrap(), [LeaseAnswer::Held]);
    assert_eq!(settled_again(&mysql, &release).await, LeaseAnswer::Held);
    assert_eq!(settled_again(&mysql, &settled(&first, Event::Stopped)).await, LeaseAnswer::Lost, "that is not what was settled");
    // Also once another attempt has followed.
    let second = claimed(&mysql, host).await;
    assert_eq!(settled_again(&mysql, &release).await, LeaseAnswer::Held);
    let finish = settled(&second, Event::Finish { output: None, retention: None });
    assert_eq!(settled_again(&mysql, &finish).await, LeaseAnswer::Held, "a first try that was taken back is made now");
    assert_eq!(settled_again(&mysql, &finish).await, LeaseAnswer::Held);
    assert_eq!(mysql.settle(&[finish]).await.unwrap(), [LeaseAnswer::Lost], "who does not ask again is told as ever");
    assert_eq!(mysql.attempts("a").await.unwrap().len(), 2, "nothing is written twice");
}

#[tokio::test]
async fn a_submit_whose_answer_was_lost_is_known_to_have_been_made() {
    let mysql = opened().await;
    let mark = submit::new_mark();
    for repeated in [false, true] {
        let answers = mysql
            .run("submitting", move |session| {
                Box::pin(async move {
                    session.repeated = repeated;
                    let batch = Batch::new(&[NewTask::new("a", "type", "{}"), NewTask::new("b", "type", "{}")])?;
                    submit::submit(session, &[batch], mark).await
                })
            })
            .await;
        assert_eq!(answers.unwrap(), [[Submitted::Created; 2]]);
    }
    assert_eq!(mysql.stats().await.unwrap().types, [("type".to_owned(), 2)]);
}

/// Statements whose cost may grow with their batch, and with nothing else.
const LOOKED_UP: [(&str, &str); 15] = [
    ("oldest", choose::OLDEST),
    ("oldest of users", choose::OLDEST_OF_USERS),
    ("open accounts", choose::OPEN_ACCOUNTS),
    ("candidates of one", choose::CANDIDATES_OF_ONE),
    ("candidates of several", choose::CANDIDATES_OF_SEVERAL),
    ("suspect", choose::SUSPECT),
    ("lease", claim::LEASE),
    ("leased", claim::LEASED),
    ("held", settle::HELD),
    ("finish", settle::FINISH),
    ("settle", settle::SETTLE),
    ("renew", keep::RENEW),
    ("renewed", keep::RENEWED),
    ("held keys", read::HELD),
    ("unsettled", read::UNSETTLED),
];

#[tokio::test]
async fn no_statement_of_the_path_reads_more_than_its_batch() {
    let mysql = opened().await;
    let user = |number: usize| Some(format!("user-{}", number % 50)).filter(|_| number.is_multiple_of(2));
    let tasks: Vec<NewTask> =
        (0..4_000).map(|number| NewTask { user: user(number), ..NewTask::new(number.to_string(), "type", "{}") }).collect();
    mysql.submit(&tasks).await.unwrap();
    mysql.reclaim(&Policy::default()).await.unwrap();
    let mut connection = MySqlConnection::connect_with(&mysql.access.options).await.unwrap();
    sqlx::raw_sql("ANALYZE TABLE laelaps_task, laelaps_ready, laelaps_ready_of_user, laelaps_account, laelaps_task_data")
        .execute(&mut connection)
        .await
        .unwrap();
    for (name, sql) in LOOKED_UP {
        let sql = format!(
            "EXPLAIN {}",
            sql.replace("JSON_TABLE(?", "JSON_TABLE('[]'").replace("LIMIT ?", "LIMIT 1").replace('?', "'1'")
        );
        let plan =
            sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut connection).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        for row in &plan {
            let (table, kind): (Option<String>, Option<String>) = (row.get("table"), row.get("type"));
            let whole = matches!(kind.as_deref(), Some("ALL" | "index"));
            // What was unfolded from the parameter, and what was made of it; a few suspects.
            let batch = table.as_deref().is_none_or(|table| table == "s" || table.starts_with('<') || table == "laelaps_suspect");
            assert!(!whole || batch, "{name} reads a whole table: {table:?}");
        }
    }
}
