//! The tables: as Ruby makes them, as Ruby made them once, and ours.

use laelaps_queue::{Config, Error, Kind, PerfectQueue, Queue, SchemaStatus};

use crate::fixture::{Site, keys, table, task};

/// As PerfectQueue's `init` made it before 0.9.
const OLD: &str = "CREATE TABLE {t} (id VARCHAR(256) NOT NULL, timeout INT NOT NULL, data LONGBLOB NOT NULL, created_at INT,
    resource VARCHAR(256), max_running INT, PRIMARY KEY (id))";

#[tokio::test]
async fn an_empty_database_gets_all_tables() {
    for (side_table, version) in [(true, 4), (false, 2)] {
        let site = Site::empty(table(side_table)).await;
        assert_eq!(site.queue.schema_status().await.unwrap(), SchemaStatus::Missing);
        assert!(matches!(site.queue.submit(task("a")).await, Err(Error::NotInitialised)));
        let plan = site.backend().plan().await.unwrap();
        assert_eq!(plan.iter().map(|step| step.version).collect::<Vec<_>>(), (2..=version).collect::<Vec<_>>());
        assert!(
            plan[0].sql.contains(&format!("CREATE INDEX `index_{0}_on_timeout` ON `{0}` (timeout)", site.table())),
            "{}",
            plan[0].sql
        );
        assert_eq!(site.queue.schema_status().await.unwrap(), SchemaStatus::Missing, "a plan changes nothing");
        let done = site.queue.init().await.unwrap();
        assert_eq!((done.version, done.applied), (version, (2..=version).collect()));
        assert!(site.queue.init().await.unwrap().applied.is_empty());
        assert!(site.backend().plan().await.unwrap().is_empty());
        assert_eq!(site.queue.schema_status().await.unwrap(), SchemaStatus::Current(version));
        assert!(site.backend().drift().await.unwrap().is_empty());
        site.submit(&[task("a")]).await;
    }
}

#[tokio::test]
async fn many_hosts_at_once_make_one_schema() {
    let site = Site::empty(table(true)).await;
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let queue = site.another().await.queue;
        running.spawn(async move { queue.init().await });
    }
    let mut applied = 0;
    while let Some(done) = running.join_next().await {
        applied += done.unwrap().unwrap().applied.len();
    }
    assert_eq!(applied, 3);
    assert!(site.backend().drift().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_table_without_owner_is_told_and_gets_one() {
    let site = Site::empty(table(true)).await;
    let mut ruby = site.ruby().await;
    ruby.run(OLD).await;
    ruby.submit("there", br#"{"type":"t"}"#).await;
    assert_eq!(site.queue.schema_status().await.unwrap(), SchemaStatus::Old { found: 1, needed: 4 });
    let host = site.host().await;
    let refused = site.backend().claim(&crate::fixture::asking(host, 1)).await.unwrap_err();
    assert!(matches!(refused, Error::SchemaTooOld { found: 1, needed: 4 }), "{refused}");
    let drift = site.backend().drift().await.unwrap().join("; ");
    assert!(
        drift.contains("no column owner") && drift.contains("no index on timeout") && drift.contains("_laelaps; init makes it"),
        "{drift}"
    );
    site.queue.init().await.unwrap();
    assert!(site.backend().drift().await.unwrap().is_empty());
    assert_eq!(keys(&site.claim(host, 1).await), ["there"]);
}

#[tokio::test]
async fn an_installation_with_one_table_of_ours_gets_the_other() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    site.submit(&[laelaps_queue::NewTask { max_attempts: Some(7), ..task("a") }]).await;
    ruby.run("DROP TABLE {h}").await;
    let site = site.another().await;
    assert_eq!(site.queue.schema_status().await.unwrap(), SchemaStatus::Old { found: 3, needed: 4 });
    assert_eq!(
        site.backend().drift().await.unwrap(),
        [format!("there is no table {}_laelaps_hosts; init makes it", site.table())]
    );
    let plan = site.backend().plan().await.unwrap();
    assert_eq!(plan.len(), 1);
    assert!(plan[0].version == 4 && plan[0].sql.contains(&format!("`{}_laelaps_hosts`", site.table())), "{}", plan[0].sql);
    assert_eq!(site.queue.init().await.unwrap().applied, [4]);
    assert!(site.backend().drift().await.unwrap().is_empty());
    let host = site.watched("h").await;
    assert_eq!(site.claim(host, 1).await[0].max_attempts, Some(7), "what was noted stays");
}

#[tokio::test]
async fn tables_of_a_newer_program_are_left_alone() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    ruby.run("ALTER TABLE {s} ADD COLUMN more INT, COMMENT 'laelaps 5'").await;
    let site = site.another().await;
    assert_eq!(site.queue.schema_status().await.unwrap(), SchemaStatus::TooNew { found: 5, known: 4, oldest: 5, program: None });
    let refused = [site.queue.init().await.map(drop).unwrap_err(), site.queue.submit(task("a")).await.map(drop).unwrap_err()];
    for refused in refused {
        assert!(matches!(refused, Error::SchemaTooNew { found: 5, known: 4, oldest: 5, .. }), "{refused}");
    }
    // Without our tables there is nothing that a newer program could have changed.
    let without = PerfectQueue { table: site.table().to_owned(), ..table(false) };
    let queue = Queue::open(&Config { kind: Kind::PerfectQueue(without), ..site.config.clone() }).await.unwrap();
    assert_eq!(queue.schema_status().await.unwrap(), SchemaStatus::Current(2));
}

#[tokio::test]
async fn tables_of_a_newer_program_that_admits_this_one_are_worked_on() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    ruby.run("ALTER TABLE {s} ADD COLUMN more INT, COMMENT 'laelaps 6 4'").await;
    let site = site.another().await;
    assert_eq!(site.queue.schema_status().await.unwrap(), SchemaStatus::Newer { found: 6, known: 4, program: None });
    let migration = site.queue.init().await.unwrap();
    assert_eq!((migration.from, migration.applied, migration.version), (6, vec![], 6));
    site.submit(&[task("a")]).await;
    let host = site.host().await;
    let claimed = site.claim(host, 9).await;
    assert_eq!(site.settle(&claimed[0], crate::fixture::finish()).await, laelaps_queue::LeaseAnswer::Held);
    // One table of a program that asks for more is enough.
    ruby.run("ALTER TABLE {h} COMMENT 'laelaps 6 5'").await;
    let site = site.another().await;
    assert_eq!(site.queue.schema_status().await.unwrap(), SchemaStatus::TooNew { found: 6, known: 4, oldest: 5, program: None });
}

#[tokio::test]
async fn what_somebody_changed_is_told() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    ruby.run("ALTER TABLE {t} DROP PRIMARY KEY, MODIFY data BLOB NOT NULL, DROP COLUMN max_running").await;
    let drift = site.backend().drift().await.unwrap();
    let table = site.table();
    let expected = [
        format!("{table}.data is blob, not longblob"),
        format!("{table} has no column max_running"),
        format!("the primary key of {table} is (), not (id)"),
    ];
    assert_eq!(drift, expected);
}

#[tokio::test]
async fn any_name_and_any_character_set_will_do() {
    let weird = PerfectQueue { table: "odd `name`, 'really' {t}".to_owned(), ..table(true) };
    let site = Site::empty(weird).await;
    let mut server = crate::ruby::Ruby::connect(&site.config.url, "x").await;
    server.run_or_not("ALTER DATABASE CHARACTER SET latin1 COLLATE latin1_german1_ci").await;
    site.queue.init().await.unwrap();
    let host = site.host().await;
    let keys = ["plain", "umläut", "it's \"quoted\" \\"];
    site.submit(&keys.map(task)).await;
    for side in [true, false] {
        let claimed = site.claim(host, 9).await;
        assert_eq!(claimed.len(), 3, "{side}");
        for task in &claimed {
            assert!(keys.contains(&task.key.as_str()));
            assert_eq!(site.beat(task).await, laelaps_queue::LeaseAnswer::Held);
            let event = if side { laelaps_queue::Event::Stopped } else { crate::fixture::finish() };
            assert_eq!(site.settle(task, event).await, laelaps_queue::LeaseAnswer::Held);
        }
    }
    let charset = "SELECT COUNT(*) FROM information_schema.columns WHERE table_schema = DATABASE() AND collation_name = 'latin1_german1_ci'";
    assert_eq!(server.number(charset).await, 2);
    assert_eq!(site.get("UMLÄUT").await.state, laelaps_queue::State::Finished);
    site.submit(&[task("größe.1").on_hold(), task("groesse.1").on_hold()]).await;
    assert_eq!(site.backend().held("grö").await.unwrap(), ["größe.1"]);
    assert!(site.backend().has_unsettled("größe").await.unwrap() && !site.backend().has_unsettled("日本").await.unwrap());
}

#[tokio::test]
async fn urls_of_ruby_are_taken_and_others_refused() {
    let site = Site::new().await;
    for scheme in ["mysql2", "mariadb"] {
        let url = site.config.url.replacen("mysql", scheme, 1);
        let queue = Queue::open(&Config { url, ..site.config.clone() }).await.unwrap();
        assert_eq!(queue.schema_status().await.unwrap(), SchemaStatus::Current(4));
    }
    let sqlite = Config { kind: Kind::PerfectQueue(table(true)), ..Config::new("sqlite:x.db") };
    assert!(matches!(Queue::open(&sqlite).await, Err(Error::Config { setting: "url", .. })));
    let nameless =
        Config { kind: Kind::PerfectQueue(PerfectQueue { table: String::new(), ..table(true) }), ..site.config.clone() };
    assert!(matches!(Queue::open(&nameless).await, Err(Error::Config { setting: "table", .. })));
}
