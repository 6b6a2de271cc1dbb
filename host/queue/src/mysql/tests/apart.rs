//! What waits apart, since hosts that met it do not serve its type.

use super::*;
use crate::Accepts;

/// A row has a list of the events that can be.
#[tokio::test]
async fn what_was_not_begun_is_noted_for_its_reason() {
    let mysql = opened().await;
    let host = mysql.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap();
    mysql.submit(&[NewTask::new("a", "type", "{}")]).await.unwrap();
    let message = "why".to_owned();
    let unrouted = settled(&claimed(&mysql, host).await, Event::Unrouted { message: message.clone() });
    assert_eq!(mysql.settle(&[unrouted]).await.unwrap(), [LeaseAnswer::Held]);
    assert!(mysql.attempts("a").await.unwrap().is_empty());
    let quarantined = settled(&claimed(&mysql, host).await, Event::Quarantined { message });
    assert_eq!(mysql.settle(&[quarantined]).await.unwrap(), [LeaseAnswer::Held]);
    assert_eq!(mysql.attempts("a").await.unwrap()[0].event, "quarantined");
}

#[tokio::test]
async fn a_look_for_what_waits_apart_costs_what_it_takes_however_much_there_is() {
    let mysql = opened().await;
    let host = mysql.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap();
    let mut connection = MySqlConnection::connect_with(&mysql.access.options).await.unwrap();
    let many = format!(
        "INSERT INTO laelaps_unserved (queue, type, user, turn, task)
        SELECT IF(seq MOD 2 = 0, '', 'mail'), CONCAT('type ', seq MOD 6), IF(seq MOD 3 = 0, '', seq DIV 100), seq, seq FROM seq_1_to_{MANY}"
    );
    sqlx::raw_sql(AssertSqlSafe(many)).execute(&mut connection).await.unwrap();
    let before = rows_read(&mut connection).await;
    let first: String = sqlx::query_scalar(unserved::FIRST_KIND).fetch_one(&mut connection).await.unwrap();
    for (task_type, most) in [("another", 200), ("type 3", 1_000), ("type 4", 1_000)] {
        let before = rows_read(&mut connection).await;
        let accepts = Some(Accepts::new(move |name| name == task_type));
        let claim = Claim { accepts, ..Claim::new(host, 9, Duration::from_secs(300)) };
        let mut session = Session::joining(&mut connection).await.unwrap();
        let looked = unserved::look(&mut session, &claim, &crate::unserved::From::default(), &first).await.unwrap();
        let read = rows_read(&mut connection).await - before;
        assert_eq!(looked.again, task_type != "another", "it saw the types");
        assert!(read < most, "{read} rows were read for {task_type}");
    }
    let read = rows_read(&mut connection).await - before;
    assert!(read > 10, "they are counted");
}
