//! The same on PerfectQueue's table, with what is special about it: a producer is any program that may write the table, and leases are told by
//! their moments, since their numbers are drawn.

use std::collections::HashMap;
use std::time::Duration;

use laelaps_test_databases::gate::{Gate, Protocol};
use laelaps_test_databases::{Replication, mariadb};
use sqlx::{AssertSqlSafe, Connection, Executor, MySqlConnection};

use super::super::history::{Answer, Asked, Held, Operation};
use super::super::worker::place_of;
use super::{Database, Fixture, Place, Server, through};

impl Place {
    /// Servers of its own, as on MariaDB. Their clock is the machine's: by it claims get their order ([`Self::in_order`]).
    pub(in super::super) async fn of_perfectqueue() -> Self {
        let pair = Box::pin(mariadb::Pair::start(Replication::Synchronous, None)).await;
        let gate = Gate::before(pair.primary().port(), Protocol::MySql).await;
        let fixture = Fixture::on_perfectqueue(through(&pair.create_database().await, &gate)).await;
        let (url, server) = (place_of(&fixture.config), Server::MariaDb(Box::new(pair)));
        Self { database: Database::MariaDb, url, fixture, server, gate: Some(gate), clock: None }
    }

    async fn somebody(&self) -> MySqlConnection {
        MySqlConnection::connect(&self.fixture.config.url).await.expect("the server lets us in")
    }

    pub(super) async fn hold_rows(&self, keys: &[String], time: Duration) {
        let mut producer = self.somebody().await;
        producer.execute("START TRANSACTION").await.expect("a transaction begins");
        for key in keys {
            let submit = format!(
                "INSERT IGNORE INTO {} (id, timeout, data, created_at) VALUES (?, UNIX_TIMESTAMP(), '{{}}', UNIX_TIMESTAMP())",
                self.fixture.table()
            );
            let submitted = sqlx::query(AssertSqlSafe(submit)).bind(key).execute(&mut producer).await;
            // Others may be in the way.
            assert!(submitted.is_ok() || submitted.is_err_and(|error| error.as_database_error().is_some()));
        }
        tokio::time::sleep(time).await;
        producer.execute("ROLLBACK").await.expect("what was done can be taken back");
    }

    /// What is not compressed can always be read.
    pub(super) async fn damage_rows(&self, keys: &str) {
        let damage = format!(
            "UPDATE {} SET data = CONCAT(x'1f8b', 'oops') WHERE JSON_CONTAINS(?, JSON_QUOTE(id))
                AND timeout BETWEEN 1300000001 AND UNIX_TIMESTAMP() AND created_at IS NOT NULL",
            self.fixture.table()
        );
        let damaged = sqlx::query(AssertSqlSafe(damage)).bind(keys).execute(&mut self.somebody().await).await;
        assert!(damaged.is_ok() || damaged.is_err_and(|error| error.as_database_error().is_some()));
    }

    /// The history as the checker reads it. PerfectQueue's table has no numbers that grow: a token is drawn for all tasks of a claim, and which of
    /// two claims came later is told by the server's clock.
    pub(in super::super) fn in_order(&self, mut history: Vec<Operation>) -> Vec<Operation> {
        if self.fixture.is_perfectqueue() {
            number_by_moment(&mut history);
        }
        history
    }
}

/// Give each claim of a task a number that grows with the moment of the claim. A token that one task has had twice keeps one number, which is a fault that
/// the checker finds.
pub(in super::super) fn number_by_moment(history: &mut [Operation]) {
    let mut claims: Vec<(i64, u64, Held)> = Vec::new();
    for operation in &*history {
        if let Answer::Claimed(tasks) = &operation.answer {
            claims.extend(tasks.iter().map(|taken| (taken.claimed_at, operation.begun, taken.held)));
        }
    }
    claims.sort_unstable();
    let mut numbers: HashMap<Held, i64> = HashMap::with_capacity(claims.len());
    for ((.., held), number) in claims.into_iter().zip(1..) {
        numbers.entry(held).or_insert(number);
    }
    let change = |held: &mut Held| held.lease = numbers.get(held).copied().unwrap_or(held.lease);
    for operation in history {
        match &mut operation.asked {
            Asked::Renew(leases, _) => leases.iter_mut().for_each(change),
            Asked::Settle(settled) => settled.iter_mut().for_each(|(held, ..)| change(held)),
            Asked::Update(held) => change(held),
            _ => {}
        }
        if let Answer::Claimed(tasks) = &mut operation.answer {
            tasks.iter_mut().for_each(|taken| change(&mut taken.held));
        }
    }
}
