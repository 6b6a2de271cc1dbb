//! Producers that speak SQL: what the view takes, and what it refuses.

use std::time::Duration;

use sqlx::ConnectOptions as _;
use tempfile::TempDir;

use super::super::*;
use super::opened;
use crate::{HostDescription, Submitted};

#[tokio::test]
async fn a_producer_that_speaks_sql_submits_like_any_other() {
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    let host = sqlite.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap();
    let mut producer = options(&folder.path().join("queue.db")).connect().await.unwrap();
    let submit =
        "INSERT INTO submit (key, type, data) VALUES ('a', 'first', '{\"n\": 1}'), ('a', 'second', NULL), ('b', 'bare', NULL);
        INSERT INTO submit (key, type, options) VALUES ('c', 'of a user', '{\"user\":\"u\",\"max_running\":1}'),
            ('d', 'of a user', '{\"user\":\"u\",\"max_running\":1}');
        INSERT INTO submit (key, type, options) VALUES ('e', 'later', '{\"run_at\":32503680000}'), ('f', 'past', '{\"run_at\":-1}');";
    sqlx::raw_sql(submit).execute(&mut producer).await.unwrap();
    assert_eq!(sqlite.submit(&[NewTask::new("a", "third", "{}")]).await.unwrap(), [Submitted::AlreadyExists]);
    let claim = Claim::new(host, 10, Duration::from_secs(60));
    let mut claimed = sqlite.claim(&claim).await.unwrap().tasks;
    claimed.sort_by(|one, other| one.key.cmp(&other.key));
    let seen: Vec<(&str, &str, &[u8])> =
        claimed.iter().map(|task| (task.key.as_str(), task.task_type.as_str(), task.data.as_slice())).collect();
    let expected: [(&str, &str, &[u8]); 4] =
        [("a", "first", b"{\"n\": 1}"), ("b", "bare", b"{}"), ("c", "of a user", b"{}"), ("f", "past", b"{}")];
    assert_eq!(seen, expected);
    let stats = sqlite.stats().await.unwrap();
    assert_eq!((stats.ready, stats.scheduled, stats.running), (1, 1, 4));
    assert_eq!(stats.types[0], ("of a user".to_owned(), 2));
    sqlite.close().await;
}

#[tokio::test]
async fn a_producer_that_speaks_sql_is_told_what_is_wrong() {
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    let mut producer = options(&folder.path().join("queue.db")).connect().await.unwrap();
    let cases = [
        ("(NULL, 't', '{}', NULL)", "key: "),
        ("('', 't', '{}', NULL)", "key: "),
        ("(7, 't', '{}', NULL)", "key: "),
        ("('a' || char(10), 't', '{}', NULL)", "key: "),
        ("('a' || char(133), 't', '{}', NULL)", "key: "),
        ("('a', printf('%.*c', 256, 'x'), '{}', NULL)", "type: "),
        ("('a', 't', '{}', json_object('user', 'u' || char(9)))", "user: "),
        ("('a', 't', '[]', NULL)", "data: "),
        ("('a', 't', 'oops', NULL)", "data: "),
        ("('a', 't', x'7b7d', NULL)", "data: "),
        ("(CAST(x'6d2dfc' AS TEXT), 't', '{}', NULL)", "key: not UTF-8"),
        ("('a', CAST(x'61eda080' AS TEXT), '{}', NULL)", "type: not UTF-8"),
        ("('a', 't', '{}', CAST(x'7b2275736572223a22c080227d' AS TEXT))", "user: not UTF-8"),
        ("('a', 't', '{}', CAST(x'7b2275736572223a22e697227d' AS TEXT))", "user: not UTF-8"),
        ("('a', 't', '{}' || char(0), NULL)", "data: a JSON object"),
        ("('a', 't', '{}' || char(0) || 'x', NULL)", "data: a JSON object"),
        ("('a', 't', CAST(x'efbbbf7b7d' AS TEXT), NULL)", "data: a JSON object"),
        ("('a', 't', '{\"a\":1.}', NULL)", "data: a JSON object"),
        ("('a', 't', CAST(x'7b2261223a22fc227d' AS TEXT), NULL)", "data: not UTF-8"),
        ("('a', 't', CAST(x'7b2261223a22b0227d' AS TEXT), NULL)", "data: not UTF-8"),
        ("('a', 't', CAST(x'7b2261223a22eda080227d' AS TEXT), NULL)", "data: not UTF-8"),
        ("('a', 't', '{\"\\udfff\":1}', NULL)", "data: half a pair"),
        ("('a', 't', '{\"a\":[\"\\ud83d x\\ude00\"]}', NULL)", "data: half a pair"),
        ("('a', 't', '{}', x'7b7d')", "options: a JSON object as text"),
        ("('a', 't', '{}', '{}' || char(0))", "options: a JSON object as text"),
        ("('a', 't', '{}', json_object('user', printf('%.*c', 65536, 'x')))", "options: a JSON object as text"),
        ("('a', 't', '{}', '{\"gzip\":true}')", "gzip: false"),
    ];
    for (row, expected) in cases {
        let sql = format!("INSERT INTO submit (key, type, data, options) VALUES {row}");
        let refused = sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut producer).await.expect_err(row);
        let message = refused.as_database_error().unwrap().message().to_owned();
        assert!(message.starts_with(expected), "{row}: {message}");
    }
    assert_eq!(sqlite.stats().await.unwrap().types, []);
    // What only looks like one of these.
    let names = ["ключ", "日本", "\u{fffd}", "\u{fffe}\u{ffff}", "\u{10ffff}", "\u{d7ff}\u{e000}", "°£"];
    for (number, name) in names.into_iter().enumerate() {
        let data = format!(r#"{{"{name}":"{name}","a":"\ud83d\ude00\\ud800","°":"£"}}"#);
        crate::data::check(data.as_bytes()).unwrap();
        let insert = "INSERT INTO submit (key, type, options, data) VALUES (?1 || ?4, ?2, json_object('user', ?2), ?3)";
        let inserted = sqlx::query(insert).bind(name).bind(name).bind(data.clone()).bind(number.to_string());
        inserted.execute(&mut producer).await.expect(name);
        let stored = sqlite.get(&format!("{name}{number}")).await.unwrap().expect(name);
        assert_eq!((stored.task_type.as_str(), stored.user.as_deref(), stored.data), (name, Some(name), Some(data.into_bytes())));
    }
    sqlite.close().await;
}
