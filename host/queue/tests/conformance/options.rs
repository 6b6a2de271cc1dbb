//! One meaning of what a producer says of a task beside its key, type and data: the same options are taken and refused by SQL on each database.
//! (The command line reads the same file: host/daemon/src/cli/submit/line.rs.)

use laelaps_queue::{Queue, Timestamp};
use serde::Deserialize;

const OPTIONS: &str = include_str!("../../../../tests/data/options.json");

/// Options, and what comes of them.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    options: String,
    /// The task as it is stored then.
    is: Option<Said>,
    /// What their refusal names.
    refused: Option<String>,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
struct Said {
    /// None: the default one.
    queue: Option<String>,
    user: Option<String>,
    /// None: at once.
    run_at: Option<i64>,
    priority: i32,
    max_running: Option<u32>,
    max_attempts: Option<u32>,
}

/// Submit a task with each of the options, and tell what is answered otherwise than it should be.
async fn answered_otherwise(queue: &Queue, mut submit: impl AsyncFnMut(&str, &str) -> Result<(), sqlx::Error>) -> Vec<String> {
    let mut otherwise = Vec::new();
    for (number, Case { options, is, refused }) in serde_json::from_str::<Vec<Case>>(OPTIONS).unwrap().into_iter().enumerate() {
        let key = format!("options {number}");
        match (submit(&key, &options).await, is, refused) {
            (Ok(()), Some(expected), None) => {
                let task = queue.get(&key).await.unwrap().unwrap();
                let is_later = task.run_at > task.created_at;
                let run_at = is_later.then_some(task.run_at).map(|Timestamp(moment)| moment);
                let (priority, max_running, max_attempts) = (task.priority, task.max_running, task.max_attempts);
                let queue = Some(task.queue).filter(|queue| queue != "default");
                let said = Said { queue, user: task.user, run_at, priority, max_running, max_attempts };
                if said != expected {
                    otherwise.push(format!("{options} is {said:?}"));
                }
            }
            (Err(error), None, Some(named)) => {
                let message = error.as_database_error().expect("the server refuses it").message().to_owned();
                if !message.contains(&named) {
                    otherwise.push(format!("{options} is refused without naming {named}: {message}"));
                }
            }
            (answer, ..) => otherwise.push(format!("{options}: {answer:?}")),
        }
    }
    otherwise
}

mod sql {
    use sqlx::Connection as _;

    use super::answered_otherwise;
    use crate::fixture::Fixture;

    pub(super) async fn view(fixture: &Fixture) -> Vec<String> {
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(fixture.path());
        let mut producer = sqlx::SqliteConnection::connect_with(&options).await.unwrap();
        let submit = "INSERT INTO submit (key, type, options) VALUES (?, 't', ?)";
        answered_otherwise(&fixture.queue, async |key, options| {
            sqlx::query(submit).bind(key).bind(options).execute(&mut producer).await.map(drop)
        })
        .await
    }

    pub(super) async fn function(fixture: &Fixture) -> Vec<String> {
        let mut producer = sqlx::PgConnection::connect(&fixture.direct_url().await).await.unwrap();
        let submit = "SELECT laelaps.submit($1, 't', NULL::text, $2::text)";
        answered_otherwise(&fixture.queue, async |key, options| {
            sqlx::query(submit).bind(key).bind(options).execute(&mut producer).await.map(drop)
        })
        .await
    }

    pub(super) async fn procedure(fixture: &Fixture) -> Vec<String> {
        let mut producer = sqlx::MySqlConnection::connect(&fixture.config.url).await.unwrap();
        let submit = "CALL laelaps_submit(?, 't', NULL, ?)";
        answered_otherwise(&fixture.queue, async |key, options| {
            sqlx::query(submit).bind(key).bind(options).execute(&mut producer).await.map(drop)
        })
        .await
    }
}

macro_rules! sql_takes_the_same {
    ($module:ident, $database:ident, $way:ident) => {
        mod $module {
            use crate::fixture::{Database, Fixture};

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn sql_takes_the_same_options_as_every_other_way() {
                let fixture = Fixture::new(Database::$database).await;
                assert_eq!(super::sql::$way(&fixture).await, [""; 0]);
            }
        }
    };
}

sql_takes_the_same!(in_sql_on_sqlite, Sqlite, view);
sql_takes_the_same!(in_sql_on_postgres, Postgres, function);
sql_takes_the_same!(in_sql_on_mariadb, MariaDb, procedure);
