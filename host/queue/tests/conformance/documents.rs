//! One meaning of JSON: the same documents are taken and refused by every way in. docs/tasks.md says in words what decides.

use laelaps_queue::NewTask;

use crate::fixture::{Fixture, task};
use crate::promises;

const TAKEN: bool = true;
const REFUSED: bool = false;

/// Documents, and what every way in says to each.
#[rustfmt::skip]
pub(crate) const DOCUMENTS: [(&[u8], bool); 91] = [
    // What RFC 8259 allows, however unusual.
    (b"{}", TAKEN),
    (b"{ }", TAKEN),
    (b" {}\n", TAKEN),
    (b"\t\r\n {} \t\r\n", TAKEN),
    (br#"{"a":1}"#, TAKEN),
    (br#"{ "z" : 1.50 , "a":[ 1 , 2 ] }"#, TAKEN),
    (br#"{"a":-0}"#, TAKEN),
    (br#"{"a":-0.0e-0}"#, TAKEN),
    (br#"{"a":1E+2}"#, TAKEN),
    (br#"{"a":1e400}"#, TAKEN),
    (br#"{"a":1e-400}"#, TAKEN),
    (br#"{"a":123456789012345678901234567890}"#, TAKEN),
    (br#"{"":""}"#, TAKEN),
    (br#"{"a":true,"b":false,"c":null}"#, TAKEN),
    (br#"{"a":[],"b":{},"c":[[1,[2,[3]]],{"d":[{}]}]}"#, TAKEN),
    (br#"{"a":1,"a":2}"#, TAKEN),
    (br#"{"a":"\"\\\/\b\f\n\r\t"}"#, TAKEN),
    (br#"{"\u0061\n":1}"#, TAKEN),
    (br#"{"a":"\u0000"}"#, TAKEN),
    (br#"{"a":"\uffff\ufeff\u2028"}"#, TAKEN),
    (br#"{"a":"\ud83d\ude00"}"#, TAKEN),
    (br#"{"a":"\uD83D\uDE00\uDBFF\uDFFF"}"#, TAKEN),
    (br#"{"a":"\\ud800"}"#, TAKEN),
    (br#"{"a":"\\\\\ud83d\ude00"}"#, TAKEN),
    ("{\"a\":\"äöü 日本 😀 \u{10ffff}\"}".as_bytes(), TAKEN),
    ("{\"a\":\"\u{7f}\u{85}\u{2028}\u{feff}\u{fffe}\"}".as_bytes(), TAKEN),
    ("{\"ключ\":1}".as_bytes(), TAKEN),
    (br#"{"a":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}"#, TAKEN),
    // Not an object.
    (b" ", REFUSED),
    (b"[]", REFUSED),
    (br#"[{"a":1}]"#, REFUSED),
    (b"1", REFUSED),
    (b"null", REFUSED),
    (b"true", REFUSED),
    (br#""{}""#, REFUSED),
    // Not whole, or more than one.
    (b"{", REFUSED),
    (b"}", REFUSED),
    (br#"{"a":1"#, REFUSED),
    (br#"{"a":"b}"#, REFUSED),
    (br#"{"a":[1}"#, REFUSED),
    (br#"{"a":{"b":1]}"#, REFUSED),
    (b"{}}", REFUSED),
    (b"{}{}", REFUSED),
    (b"{} x", REFUSED),
    (b"{},", REFUSED),
    // Signs that are missing or too many.
    (br#"{"a":1,}"#, REFUSED),
    (b"{,}", REFUSED),
    (br#"{"a":1,,"b":2}"#, REFUSED),
    (br#"{"a":1 "b":2}"#, REFUSED),
    (br#"{"a" 1}"#, REFUSED),
    (br#"{"a"}"#, REFUSED),
    (br#"{"a":}"#, REFUSED),
    (br#"{"a":[1,]}"#, REFUSED),
    (br#"{"a":[,1]}"#, REFUSED),
    (b"{a:1}", REFUSED),
    (b"{'a':1}", REFUSED),
    (b"{1:2}", REFUSED),
    (b"{/* no */}", REFUSED),
    (b"{} // no", REFUSED),
    // Numbers and words of other languages.
    (br#"{"a":1.}"#, REFUSED),
    (br#"{"a":.5}"#, REFUSED),
    (br#"{"a":+1}"#, REFUSED),
    (br#"{"a":01}"#, REFUSED),
    (br#"{"a":-}"#, REFUSED),
    (br#"{"a":--1}"#, REFUSED),
    (br#"{"a":1e}"#, REFUSED),
    (br#"{"a":1.e5}"#, REFUSED),
    (br#"{"a":0x1}"#, REFUSED),
    (br#"{"a":NaN}"#, REFUSED),
    (br#"{"a":-Infinity}"#, REFUSED),
    (br#"{"a":True}"#, REFUSED),
    (br#"{"a":nul}"#, REFUSED),
    // Strings.
    (b"{\"a\":\"\n\"}", REFUSED),
    (b"{\"a\":\"\t\"}", REFUSED),
    (b"{\"a\":\"\x01\"}", REFUSED),
    (br#"{"a":"\x41"}"#, REFUSED),
    (br#"{"a":"\u12"}"#, REFUSED),
    (br#"{"a":"\ud800"}"#, REFUSED),
    (br#"{"a":"\udc00\ud800"}"#, REFUSED),
    (br#"{"a":"\ud83d\ud83d\ude00"}"#, REFUSED),
    (br#"{"a":"\ud83d x\ude00"}"#, REFUSED),
    (br#"{"\uDFFF":1}"#, REFUSED),
    // Bytes.
    (b"\xef\xbb\xbf{}", REFUSED),
    (b"\0{}", REFUSED),
    (b"{}\0", REFUSED),
    (b"{\"a\":\"\0\"}", REFUSED),
    (b"{\"a\":\"\xff\"}", REFUSED),
    (b"{\"a\":\"\xc0\x80\"}", REFUSED),
    (b"{\"a\":\"\xed\xa0\x80\"}", REFUSED),
    (b"\x0c{}", REFUSED),
    ("{\u{a0}}".as_bytes(), REFUSED),
];

/// Ask for each document whether it is taken, and tell those that are answered otherwise than they should be.
async fn answered_otherwise(mut take: impl AsyncFnMut(String, &'static [u8]) -> bool) -> Vec<String> {
    let mut otherwise = Vec::new();
    for (number, (document, expected)) in DOCUMENTS.into_iter().enumerate() {
        if take(format!("document {number}"), document).await != expected {
            let answer = if expected { "refuses" } else { "takes" };
            otherwise.push(format!("{answer} {}", document.escape_ascii()));
        }
    }
    otherwise
}

/// Nothing.
const NONE: [&str; 0] = [];

promises! {
    async fn rust_takes_exactly_the_documents_that_are_json_objects(fixture: &Fixture) {
        let otherwise = answered_otherwise(async |key, document| {
            fixture.queue.submit(NewTask { data: document.to_vec(), ..task(&key) }).await.is_ok()
        });
        assert_eq!(otherwise.await, NONE);
        // What was taken comes back byte by byte.
        for (number, (document, taken)) in DOCUMENTS.into_iter().enumerate() {
            let stored = fixture.queue.get(&format!("document {number}")).await.unwrap().and_then(|task| task.data);
            assert_eq!(stored.as_deref(), taken.then_some(document));
        }
    }
}

/// The ways in for producers that speak SQL, each with its own database's connection: what each answers otherwise.
mod sql {
    use sqlx::Connection as _;

    use super::{Fixture, answered_otherwise};

    pub(super) async fn view(fixture: &Fixture) -> Vec<String> {
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(fixture.path());
        let mut producer = sqlx::SqliteConnection::connect_with(&options).await.unwrap();
        let submit = "INSERT INTO submit (key, type, data) VALUES (?, 't', CAST(? AS TEXT))";
        answered_otherwise(async |key, document| {
            sqlx::query(submit).bind(key).bind(document).execute(&mut producer).await.is_ok()
        })
        .await
    }

    pub(super) async fn function(fixture: &Fixture) -> Vec<String> {
        let mut producer = sqlx::PgConnection::connect(&fixture.direct_url().await).await.unwrap();
        let submit = "SELECT laelaps.submit($1, 't', convert_from($2, 'UTF8')::json)";
        answered_otherwise(async |key, document| {
            sqlx::query(submit).bind(key).bind(document).execute(&mut producer).await.is_ok()
        })
        .await
    }

    pub(super) async fn procedure(fixture: &Fixture) -> Vec<String> {
        let mut producer = sqlx::MySqlConnection::connect(&fixture.config.url).await.unwrap();
        let submit = "CALL laelaps_submit(?, 't', ?, NULL)";
        answered_otherwise(async |key, document| {
            sqlx::query(submit).bind(key).bind(document).execute(&mut producer).await.is_ok()
        })
        .await
    }
}

macro_rules! sql_takes_the_same {
    ($module:ident, $database:ident, $way:ident) => {
        mod $module {
            use crate::fixture::{Database, Fixture};

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn sql_takes_exactly_the_documents_that_rust_takes() {
                let fixture = Fixture::new(Database::$database).await;
                assert_eq!(super::sql::$way(&fixture).await, super::NONE);
            }
        }
    };
}

sql_takes_the_same!(in_sql_on_sqlite, Sqlite, view);
sql_takes_the_same!(in_sql_on_postgres, Postgres, function);
sql_takes_the_same!(in_sql_on_mariadb, MariaDb, procedure);
