//! The same JSON through every way of `laelaps submit`: it takes what `NewTask::check` takes, and stores it byte by byte.

use laelaps_queue::NewTask;
use laelaps_tests::Site;
use serde_json::json;

/// Documents on which parsers of JSON disagree.
const DOCUMENTS: [&str; 32] = [
    "{}",
    " {\t} ",
    r#"{"a":1}"#,
    r#"{"a":1,"a":2}"#,
    r#"{"":0}"#,
    r#"{"a":-0}"#,
    r#"{"a":1e400}"#,
    r#"{"a":123456789012345678901234567890.5}"#,
    r#"{"a":"\u0000"}"#,
    r#"{"a":"\ud83d\ude00"}"#,
    r#"{"a":"\ud800"}"#,
    r#"{"\udc00":1}"#,
    r#"{"a":"é"}"#,
    "{\"a\":\"\u{7f}\u{2028}\u{feff}\"}",
    "{\"a\":\"\u{1}\"}",
    r#"{"a":"\x"}"#,
    r#"{"a":1.}"#,
    r#"{"a":.5}"#,
    r#"{"a":01}"#,
    r#"{"a":+1}"#,
    r#"{"a":1e}"#,
    r#"{"a":NaN}"#,
    r#"{"a":Infinity}"#,
    r#"{"a":1,}"#,
    r#"{a:1}"#,
    r#"{'a':1}"#,
    r#"{"a":1}/**/"#,
    r#"{"a":[1,]}"#,
    r#"{"a":1}{}"#,
    "[]",
    "null",
    "\u{feff}{}",
];

#[tokio::test]
async fn a_document_is_taken_or_refused_alike_however_it_is_submitted() {
    let site = Site::new().await;
    let queue = site.queue().await;
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(200), "]".repeat(200));
    for (number, document) in DOCUMENTS.into_iter().chain([deep.as_str()]).enumerate() {
        let expected = NewTask::new("k", "t", document).check();
        let line = |key: &str| format!("{{\"key\":\"{key}\",\"type\":\"t\",\"data\":{document}}}\n");
        let (direct, piped, filed) = (format!("d{number}"), format!("p{number}"), format!("f{number}"));
        let base = ["-c", "laelaps.yml", "submit"];
        let answers = [
            (&direct, site.laelaps([&base[..], &[&direct, "t", document]].concat()).await),
            (&piped, site.laelaps_with_input([&base[..], &[&piped, "t", "-"]].concat(), document).await),
            (&filed, site.laelaps_with_input([&base[..], &["--file", "-"]].concat(), &line(&filed)).await),
        ];
        for (key, answer) in answers {
            let stored = queue.get(key).await.unwrap();
            match &expected {
                Ok(()) => {
                    assert_eq!(answer.code, Some(0), "{document}: {}", answer.stderr);
                    // What stands around a value in a line is the line's.
                    let data = String::from_utf8(stored.unwrap().data.unwrap()).unwrap();
                    let same = if *key == filed { data.trim() == document.trim() } else { data == document };
                    assert!(same, "{document}: stored as {data}");
                }
                Err(refused) => {
                    assert_eq!(answer.code, Some(2), "{document}: {refused}, and yet {}", answer.stdout);
                    assert!(stored.is_none(), "{document}");
                }
            }
        }
    }
    queue.close().await;
}

#[tokio::test]
async fn a_file_may_begin_with_a_byte_order_mark_and_wait_until_the_end_of_time() {
    let site = Site::new().await;
    let queue = site.queue().await;
    let lines = concat!(
        "\u{feff}{\"key\":\"marked\",\"type\":\"t\",\"data\":{}}\r\n",
        "{\"key\":\"last-day\",\"type\":\"t\",\"data\":{},\"run_at\":\"9999-12-31\"}\r\n",
        "{\"key\":\"last-moment\",\"type\":\"t\",\"data\":{},\"run_at\":\"9999-12-31T23:59:59.999Z\"}\n",
        "\u{feff}{\"key\":\"late-mark\",\"type\":\"t\",\"data\":{}}\n",
    );
    let told = site.laelaps_with_input(["-c", "laelaps.yml", "submit", "--file", "-"], lines).await;
    assert_eq!(told.code, Some(2), "{}", told.stderr);
    assert_eq!(told.stdout, "3 submitted, 0 existed already, 1 bad line\n");
    assert!(told.stderr.contains("standard input:4: not JSON"), "a mark is one at the beginning only: {}", told.stderr);
    let task = queue.get("last-moment").await.unwrap().unwrap();
    assert_eq!(task.run_at, NewTask::RUN_AT_MAX);
    assert!(!task.is_held());
    let shown = site.laelaps(["-c", "laelaps.yml", "show", "last-moment", "--json"]).await.success().stdout;
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["run_at"], json!("9999-12-31T23:59:59.999Z"));
    queue.close().await;
}
