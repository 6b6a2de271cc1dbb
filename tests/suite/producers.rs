//! The examples of producers in other languages, run against real databases.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use laelaps_queue::State;
use laelaps_tests::{Database, Site, workspace_file};
use tokio::process::Command;

/// Runs a program that commits the task order-1 and rolls order-2 back.
async fn a_task_is_there_if_and_only_if_its_transaction_was_committed(mut program: Command) {
    let site = Site::new().await;
    let queue = site.queue().await;
    let output = program.env("DATABASE_URL", site.url()).stdin(Stdio::null()).output().await;
    let output = output.unwrap_or_else(|error| panic!("{program:?}: {error}; tests/run --prepare installs it"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let task = queue.get("order-1").await.unwrap().expect("its transaction was committed");
    assert_eq!((task.task_type.as_str(), task.state), ("ship", State::Waiting));
    let data: serde_json::Value = serde_json::from_slice(&task.data.unwrap()).unwrap();
    assert_eq!(data, serde_json::json!({ "order": 1 }));
    assert!(!queue.exists("order-2").await.unwrap(), "its transaction was rolled back");
}

fn name(database: Database) -> &'static str {
    match database {
        Database::Sqlite => "sqlite",
        Database::Postgres => "postgres",
        Database::MariaDb => "mysql",
        Database::PerfectQueue => unreachable!("Ruby's own client produces there"),
    }
}

fn example(name: &str) -> PathBuf {
    workspace_file("examples/producers").join(name)
}

fn python(database: Database) -> Command {
    let mut command = Command::new(workspace_file("target/producers/python/bin/python"));
    command.arg(example(&format!("{}.py", name(database))));
    command
}

fn ruby(database: Database) -> Command {
    let mut command = Command::new("ruby");
    command.arg(example(&format!("{}.rb", name(database))));
    command
}

fn node(database: Database) -> Command {
    // Modules are looked for beside the program.
    let program = format!("{}.mjs", name(database));
    let copy = workspace_file("target/producers/node").join(&program);
    fs::copy(example(&program), &copy).expect("tests/run --prepare makes the folder");
    let mut command = Command::new("node");
    command.arg(copy);
    command
}

fn go(_: Database) -> Command {
    let mut command = Command::new("go");
    command.args(["run", "."]).current_dir(example("go"));
    command
}

macro_rules! in_every_language {
    ($($database:ident: $module:ident),+) => {
        $(mod $module {
            use laelaps_tests::{Database, on};

            in_every_language!(@ $database python ruby node go);
        })+
    };
    (@ $database:ident $($language:ident)+) => {
        $(mod $language {
            use super::*;

            #[tokio::test]
            async fn commits_or_rolls_back() {
                let program = crate::producers::$language(Database::$database);
                let promise = crate::producers::a_task_is_there_if_and_only_if_its_transaction_was_committed(program);
                Box::pin(on(Database::$database, promise)).await;
            }
        })+
    };
}
in_every_language!(Postgres: on_postgres, MariaDb: on_mariadb);

mod on_sqlite {
    use laelaps_tests::{Database, on};

    in_every_language!(@ Sqlite python);
}
