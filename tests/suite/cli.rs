//! The command line as people and programs use it.

use std::fs;

use laelaps_tests::{Site, guest};
use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _};

async fn site() -> Site {
    let site = empty_site().await;
    let _ = site.laelaps(["-c", "laelaps.yml", "init"]).await.success();
    site
}

/// A site without tables.
async fn empty_site() -> Site {
    let site = Site::new().await;
    site.configure(json!({ "url": "sqlite:queue.db", "plugins": "plugins", "routes": [{ "type": "echo", "plugin": "zoo" }] }));
    site
}

/// Moments, which are another at every run.
fn without_moments(text: &str) -> String {
    let moment = regex::Regex::new(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z").expect("an expression");
    moment.replace_all(text, "YYYY-MM-DDThh:mm:ssZ").into_owned()
}

async fn run(site: &Site, arguments: &[&str]) -> String {
    let mut all = vec!["-c", "laelaps.yml"];
    all.extend(arguments);
    without_moments(&site.laelaps(&all).await.success().stdout)
}

#[tokio::test]
async fn every_command_says_what_it_takes() {
    let site = Site::new().await;
    let mut told = String::new();
    for command in [
        &["--help"][..],
        &["init", "--help"],
        &["run", "--help"],
        &["submit", "--help"],
        &["list", "--help"],
        &["show", "--help"],
        &["force-finish", "--help"],
        &["retry", "--help"],
        &["cancel", "--help"],
        &["stats", "--help"],
        &["check", "--help"],
        &["plugin", "--help"],
        &["plugin", "list", "--help"],
        &["plugin", "inspect", "--help"],
        &["plugin", "run", "--help"],
        &["watchdog", "--help"],
        &["watchdog", "create-queue", "--help"],
        &["watchdog", "attach", "--help"],
        &["watchdog", "wait-sync", "--help"],
        &["watchdog", "queue-count", "--help"],
        &["watchdog", "check-timers", "--help"],
        &["watchdog", "get-timers", "--help"],
        &["watchdog", "clear-timers", "--help"],
        &["watchdog", "create-timer", "--help"],
        &["watchdog", "consume", "--help"],
        &["watchdog", "kick-dog", "--help"],
        &["watchdog", "status", "--help"],
        &["watchdog", "check-exists", "--help"],
        &["watchdog", "fetch-node", "--help"],
        &["demo", "--help"],
        &["completions", "--help"],
    ] {
        told.push_str(&format!("$ laelaps {}\n{}\n", command.join(" "), site.laelaps(command).await.success().stdout));
    }
    insta::assert_snapshot!(told);
}

#[tokio::test]
async fn the_version_is_one_line() {
    let site = Site::new().await;
    let told = site.laelaps(["--version"]).await.success().stdout;
    let faults = if laelaps_tests::has_faults() { " (fault injection)" } else { "" };
    assert_eq!(told, format!("laelaps {}{faults}\n", env!("CARGO_PKG_VERSION")));
}

#[tokio::test]
async fn init_can_be_called_twice() {
    let site = site().await;
    assert_eq!(run(&site, &["init"]).await, "the queue is ready: schema 1 was there already\n");
}

#[tokio::test]
async fn a_submitted_task_can_be_listed_shown_and_ended_by_hand() {
    let site = site().await;
    let mut told = String::new();
    for arguments in [
        &["submit", "a", "echo", r#"{"n": 1}"#][..],
        &[
            "submit",
            "b",
            "echo",
            r#"{"n": 2}"#,
            "-u",
            "ann",
            "--max-running",
            "3",
            "--max-attempts",
            "5",
            "-t",
            "4102444800",
            "--gzip",
        ],
        &["list"],
        &["list", "--data"],
        &["list", "--user", "ann"],
        &["show", "b"],
        &["show", "b", "--data"],
        &["force_finish", "a"],
        &["cancel", "b"],
        &["list", "--state", "finished", "--state", "cancelled"],
        &["retry", "b"],
        &["stats"],
    ] {
        told.push_str(&format!("$ laelaps {}\n{}", arguments.join(" "), run(&site, arguments).await));
    }
    // How long a task has been ready differs from run to run.
    let age = regex::Regex::new(r"for \d+\.\d+ s").expect("an expression");
    insta::assert_snapshot!(age.replace_all(&told, "for AGE"));
}

#[tokio::test]
async fn programs_read_json_with_the_data_as_it_was_written() {
    let site = site().await;
    let data = r#"{"big":123456789012345678901234567890,"z":1.0,"a":"é"}"#;
    let _ = run(&site, &["submit", "k", "echo", data, "-u", "ann"]).await;
    let line = run(&site, &["list", "--json", "--data"]).await;
    assert!(line.contains(&format!("\"data\":{data}")), "{line}");
    assert_eq!(line.lines().count(), 1);
    let task: Value = serde_json::from_str(&run(&site, &["show", "k", "--json"]).await).expect("JSON");
    assert_eq!((&task["key"], &task["user"], &task["history"]), (&json!("k"), &json!("ann"), &json!([])));
    let stats: Value = serde_json::from_str(&run(&site, &["stats", "--json"]).await).expect("JSON");
    assert_eq!(stats["ready"], 1);
}

#[tokio::test]
async fn lists_go_on_where_they_ended() {
    let site = site().await;
    let lines: String = (0..5).map(|n| format!("{{\"key\":\"k{n}\",\"type\":\"echo\",\"data\":{{\"n\":{n}}}}}\n")).collect();
    let told = site.laelaps_with_input(["-c", "laelaps.yml", "submit", "--file", "-"], &lines).await.success();
    assert_eq!(told.stdout, "5 submitted, 0 existed already, 0 bad lines\n");
    let first = site.laelaps(["-c", "laelaps.yml", "list", "--limit", "2", "--json"]).await.success();
    let ids: Vec<i64> = first
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["id"].as_i64().expect("a number"))
        .collect();
    assert!(first.stderr.contains(&format!("--after {}", ids[1])), "{}", first.stderr);
    let after = ids[1].to_string();
    let rest = run(&site, &["list", "--after", &after, "--json"]).await;
    let keys: Vec<Value> = rest.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")["key"].clone()).collect();
    assert_eq!(keys, [json!("k2"), json!("k3"), json!("k4")]);
}

#[tokio::test]
async fn a_file_can_be_submitted_again_as_a_whole() {
    let site = site().await;
    let lines: String = (0..2_500).map(|n| format!("{{\"key\":\"k{n}\",\"type\":\"echo\",\"data\":{{}}}}\n")).collect();
    fs::write(site.path("tasks.jsonl"), lines).expect("a file");
    assert_eq!(run(&site, &["submit", "--file", "tasks.jsonl"]).await, "2500 submitted, 0 existed already, 0 bad lines\n");
    assert_eq!(run(&site, &["submit", "--file", "tasks.jsonl"]).await, "0 submitted, 2500 existed already, 0 bad lines\n");
}

#[tokio::test]
async fn a_handler_runs_without_host_and_database() {
    let site = Site::new().await;
    site.plug("zoo", &guest("zoo"));
    let told = site.laelaps(["plugin", "run", "plugins/zoo.wasm", "--kind", "echo", "--data", r#"{"a":1}"#]).await.success();
    assert_eq!(told.stdout, r#"{"a":1}"#);
    // The section's name, which every command takes, is not a variable to grant.
    let told = site.laelaps(["-e", "production", "plugin", "run", "plugins/zoo.wasm", "--kind", "environment"]).await.success();
    assert!(told.stdout.contains(r#""environment":{}"#), "{}", told.stdout);
    let arguments = ["plugin", "run", "plugins/zoo.wasm", "--kind", "environment", "--env", "HOME", "-e", "production"];
    let told = site.laelaps(arguments).await.success();
    assert!(told.stdout.contains(r#""environment":{"HOME":"#), "{}", told.stdout);
    let told = site.laelaps(["plugin", "run", "plugins/zoo.wasm", "--kind", "unreachable", "--data", "{}"]).await;
    assert_eq!(told.code, Some(7), "{}", told.stderr);
    assert!(told.stderr.contains("the handler trapped"), "{}", told.stderr);
}

#[tokio::test]
async fn a_handler_that_runs_alone_submits_what_a_route_would_let_it_submit() {
    let site = Site::new().await;
    site.plug("shop", &guest("zoo"));
    let submits = async |data: &str, more: &[&str]| {
        let arguments = [&["plugin", "run", "plugins/shop.wasm", "--kind", "submit", "--data", data], more].concat();
        let told = site.laelaps(arguments).await.success();
        let output: Value = serde_json::from_str(&told.stdout).expect("JSON");
        output["refusals"][0]["code"].as_str().unwrap_or("taken").to_owned()
    };
    let (own, other) = (r#"{"kind":"submit","key":"shop/1"}"#, r#"{"kind":"mail","key":"mail-1","user":"rex"}"#);
    assert_eq!(submits(own, &[]).await, "taken", "its own type, a key with the module's name");
    assert_eq!(submits(own, &["--follow-up-type", "mail"]).await, "not-granted");
    assert_eq!(submits(other, &["--follow-up-type", "mail", "--follow-ups-of-any-user"]).await, "not-granted");
    assert_eq!(submits(other, &["--follow-up-type", "mail", "--follow-up-keys", "mail-"]).await, "not-granted");
    let all = ["--follow-up-type", "mail", "--follow-up-keys", "mail-", "--follow-ups-of-any-user"];
    assert_eq!(submits(other, &all).await, "taken");
    assert_eq!(submits(other, &["--follow-up-type", "any", "--follow-up-keys", "any", "--user", "rex"]).await, "taken");
}

#[tokio::test]
async fn an_inspected_plugin_shows_its_contract_and_what_it_needs() {
    let site = site().await;
    site.plug("zoo", &guest("zoo"));
    let told = run(&site, &["plugin", "inspect", "plugins/zoo.wasm"]).await;
    assert!(told.contains("contract  laelaps:worker@0.1.0") && told.contains("laelaps:worker/handler@0.1.0"), "{told}");
    let told: Value =
        serde_json::from_str(&run(&site, &["plugin", "inspect", "plugins/zoo.wasm", "--json"]).await).expect("JSON");
    assert_eq!(told["fits"], "laelaps:worker@0.1.0");
    let told: Value = serde_json::from_str(&run(&site, &["plugin", "list", "--json"]).await).expect("JSON");
    assert_eq!((&told["plugin"], &told["routes"], &told["problems"]), (&json!("zoo"), &json!([1]), &json!([])));
}

#[tokio::test]
async fn check_is_content_with_a_good_site() {
    let site = site().await;
    site.plug("zoo", &guest("zoo"));
    let told = site.laelaps(["-c", "laelaps.yml", "check"]).await.success();
    assert_eq!(told.stderr, "");
    assert!(told.stdout.contains("database       queue.db: schema 1"), "{}", told.stdout);
}

#[tokio::test]
async fn a_reader_that_has_seen_enough_is_no_error() {
    let site = site().await;
    let lines: String = (0..3_000).map(|n| format!("{{\"key\":\"k{n}\",\"type\":\"echo\",\"data\":{{}}}}\n")).collect();
    let _ = site.laelaps_with_input(["-c", "laelaps.yml", "submit", "--file", "-"], &lines).await.success();
    let script = "\"$1\" -c laelaps.yml list --limit 0 --json 2>err | head -1 > /dev/null; cat err";
    let mut shell = tokio::process::Command::new("sh");
    let shell = shell.args(["-c", script, "sh"]).arg(laelaps_tests::laelaps()).current_dir(site.folder());
    let output = shell.output().await.expect("a shell");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
}

#[tokio::test]
async fn completions_are_offered_for_every_common_shell() {
    let site = Site::new().await;
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let told = site.laelaps(["completions", shell]).await.success().stdout;
        assert!(told.contains("force-finish"), "{shell}");
    }
}

#[tokio::test]
async fn a_dry_run_of_init_prints_the_sql_and_changes_nothing() {
    let site = empty_site().await;
    let told = site.laelaps(["-c", "laelaps.yml", "init", "--dry-run"]).await.success();
    assert!(
        told.stdout.starts_with("-- queue.db: to schema 1\n") && told.stdout.contains("CREATE TABLE task"),
        "{}",
        told.stdout
    );
    assert!(!site.path("queue.db").exists());
    let _ = site.laelaps(["-c", "laelaps.yml", "init"]).await.success();
    let told = site.laelaps(["-c", "laelaps.yml", "init", "--dry-run"]).await.success();
    assert_eq!(told.stdout, "-- nothing to do: the tables are there already\n");
}

#[tokio::test]
async fn a_plugin_version_that_is_not_under_quarantine_cannot_be_released() {
    let site = site().await;
    assert_eq!(run(&site, &["plugin", "quarantine"]).await, "0 entries.\n");
    assert_eq!(run(&site, &["plugin", "quarantine", "--json"]).await, "");
    for (digest, code) in [("abc", 5), (&*"0".repeat(64), 5), ("xyz", 2), (&*"0".repeat(65), 2)] {
        let told = site.laelaps(["-c", "laelaps.yml", "plugin", "release", digest]).await;
        assert_eq!(told.code, Some(code), "{digest}: {}", told.stderr);
    }
}

#[tokio::test]
async fn check_compares_the_tables_only_when_asked() {
    let site = site().await;
    site.plug_guest("zoo");
    let told = run(&site, &["check"]).await;
    assert!(!told.contains("data  "), "{told}");
    let told = run(&site, &["check", "--data"]).await;
    assert!(told.contains("data           every table agrees with every other"), "{told}");
}

#[tokio::test]
async fn a_task_is_named_by_its_key_or_by_its_number() {
    let site = site().await;
    for arguments in
        [&["show"][..], &["show", "k", "--id", "1"], &["cancel", "--id", "one"], &["list", "--id", "1", "--type", "t"]]
    {
        let told = site.laelaps([&["-c", "laelaps.yml"], arguments].concat()).await;
        assert_eq!(told.code, Some(2), "{arguments:?}: {}", told.stderr);
    }
}

#[tokio::test]
async fn check_names_what_somebody_changed_by_hand() {
    let site = site().await;
    site.plug_guest("zoo");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(site.path("queue.db"));
    let mut connection = sqlx::SqliteConnection::connect_with(&options).await.unwrap();
    connection.execute("DROP INDEX task_failed").await.unwrap();
    connection.close().await.unwrap();
    let told = site.laelaps(["-c", "laelaps.yml", "check"]).await;
    assert_eq!(told.code, Some(4), "{}", told.stderr);
    assert!(
        told.stderr.contains("queue.db: the tables are not as init makes them: index task_failed is missing"),
        "{}",
        told.stderr
    );
}
