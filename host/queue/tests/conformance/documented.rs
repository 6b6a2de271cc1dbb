//! The SQL that the documentation gives to operators runs on the tables as they are.

use crate::fixture::{Database, Fixture, task, task_of};

const PAGES: [(Database, &str, &str); 2] = [
    (Database::Postgres, include_str!("../../../../docs/databases.md"), "### With psql"),
    (Database::MariaDb, include_str!("../../../../docs/databases-mysql.md"), "## What an operator sees"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_operator_is_told_to_ask_the_server_can_be_asked() {
    for (database, page, heading) in PAGES {
        let (_, section) = page.split_once(heading).expect("the heading is there");
        let (_, block) = section.split_once("```sql\n").expect("SQL follows");
        let (block, _) = block.split_once("```").expect("it ends");
        assert!(block.lines().filter(|line| line.starts_with("SELECT ")).count() >= 4, "{block}");
        let fixture = Fixture::new(database).await;
        fixture.submit(&[task("a"), task_of("u", "b", None)]).await;
        for statement in block.lines() {
            println!("{statement}");
            // A test has few of them, and they are there for as long as it runs.
            fixture.meddle(String::from(statement).leak()).await;
        }
    }
}
