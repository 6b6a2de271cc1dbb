//! Wrong input of every kind: one clear error each, with its place, a hint and the documented exit code, and nothing lost. What is told is
//! kept as snapshots beside this file; `cargo insta review`, or INSTA_UPDATE=always, takes over what changed on purpose.

use std::fmt::Write as _;
use std::fs;

use laelaps_tests::{Answer, Site, guest, workspace_file};
use serde_json::json;

/// What somebody at a terminal sees, with the site's own path left out.
fn transcript(site: &Site, command: &str, answer: &Answer) -> String {
    let mut told = format!("$ {command}\nexit code {}\n", answer.code.map_or_else(|| "none".to_owned(), |code| code.to_string()));
    for (name, text) in [("standard output", &answer.stdout), ("standard error", &answer.stderr)] {
        if !text.is_empty() {
            let text = text.replace(&site.folder().display().to_string(), "SITE");
            write!(told, "--- {name}\n{text}").expect("a string takes everything");
        }
    }
    told
}

/// Run each `laelaps ARGUMENTS` in a site and compare what they say with the snapshot of the running test.
macro_rules! assert_told {
    ($site:expr, $([$($argument:expr),+ $(,)?]),+ $(,)?) => {{
        let site = $site;
        let mut told = String::new();
        $(told.push_str(&tell(&site, &[$($argument),+], "").await);)+
        insta::assert_snapshot!(told);
    }};
}

// After the macro, which it uses.
mod database;

async fn tell(site: &Site, arguments: &[&str], input: &str) -> String {
    let answer = site.laelaps_with_input(arguments, input).await;
    let shown = arguments.iter().map(|argument| if argument.len() > 60 { "LONG" } else { argument });
    let command = format!("laelaps {}{}", shown.collect::<Vec<_>>().join(" "), if input.is_empty() { "" } else { " < INPUT" });
    transcript(site, &command, &answer)
}

/// A site whose configuration names everything relative to it.
async fn site() -> Site {
    let site = Site::new().await;
    let routes = json!([{ "type": "echo", "plugin": "zoo" }]);
    // What is told names lines of it, so it has nothing that only makes tests quick.
    site.configure(
        json!({ "url": "sqlite:queue.db", "plugins": "plugins", "plugin_cache": null, "retention_time": null, "suspicion_time": null, "routes": routes }),
    );
    site
}

/// A site with this text as its configuration.
async fn site_with(text: &str) -> Site {
    let site = site().await;
    fs::write(site.path("laelaps.yml"), text).expect("the configuration can be written");
    site
}

/// A site with a queue that holds one waiting task, `kept`.
async fn site_with_task() -> Site {
    let site = site().await;
    let _ = site.laelaps(["-c", "laelaps.yml", "init"]).await.success();
    let _ = site.laelaps(["-c", "laelaps.yml", "submit", "kept", "echo", "{}"]).await.success();
    site
}

/// The task of [`site_with_task`] is still what it was.
async fn assert_nothing_lost(site: &Site) {
    let shown = site.laelaps(["-c", "laelaps.yml", "show", "kept", "--json"]).await.success();
    assert!(shown.stdout.contains(r#""state":"waiting""#) && shown.stdout.contains(r#""data":{}"#), "{}", shown.stdout);
}

// The configuration.

#[tokio::test]
async fn no_configuration() {
    let site = Site::new().await;
    fs::remove_file(site.path("laelaps.yml")).expect("the harness wrote it");
    assert_told!(&site, ["list"], ["-c", "laelaps.yml", "run"]);
}

#[tokio::test]
async fn a_folder_as_configuration() {
    assert_told!(site().await, ["-c", "plugins", "list"]);
}

#[tokio::test]
async fn a_configuration_that_is_not_yaml() {
    assert_told!(site_with("development:\n  type: rdb\n\turl: sqlite:queue.db\n").await, ["-c", "laelaps.yml", "check"]);
}

#[tokio::test]
async fn an_unknown_environment() {
    assert_told!(site().await, ["-c", "laelaps.yml", "-e", "prodution", "list"]);
}

#[tokio::test]
async fn keys_without_a_section() {
    assert_told!(site_with("type: rdb\nurl: sqlite:queue.db\n").await, ["-c", "laelaps.yml", "check"]);
}

#[tokio::test]
async fn many_mistakes_at_once() {
    let text = "\
development:
  type: rdb
  url: sqlite:queue.db
  procesors: 2
  processors: many
  poll_interval: 2 moons
  alive_time: 1
  backoff: {first: 10, max: 1}
  routes:
    - type: echo
    - type: a
      pattern: b
      plugin: zoo
    - pattern: '(?<!x)echo'
      plugin: zoo.wasm
      memory: 5 elephants
      grants:
        network: all
";
    assert_told!(site_with(text).await, ["-c", "laelaps.yml", "check"]);
}

#[tokio::test]
async fn follow_ups_that_cannot_be_granted() {
    let text = "\
development:
  type: rdb
  url: sqlite:queue.db
  routes:
    - type: echo
      plugin: zoo
      follow_ups: {types: any}
      grants:
        follow_ups:
          types: [mail, /^report/]
          users: everybody
          keys: []
          depth: -1
          queues: [two words]
          wating: 5
";
    assert_told!(site_with(text).await, ["-c", "laelaps.yml", "check"]);
}

#[tokio::test]
async fn queues_that_cannot_be_served() {
    let text = "\
development:
  type: rdb
  url: sqlite:queue.db
  processors: 4
  queues:
    two words: {}
    none: {processors: 0}
    many: {processors: 5}
    near: {procesors: 1}
    short: 3
    7: {}
";
    let mut told = tell(&site_with(text).await, &["-c", "laelaps.yml", "check"], "").await;
    for queues in ["{}", "", "[mail, default]", "{mail: {}, mail: {}}"] {
        let text = format!("development:\n  type: rdb\n  url: sqlite:queue.db\n  queues: {queues}\n");
        told.push_str(&tell(&site_with(&text).await, &["-c", "laelaps.yml", "run"], "").await);
    }
    let text = "development:\n  type: rdb_compat\n  url: mysql://joe:hunter2@db/queue\n  table: tasks\n  queues: {default: {}}\n";
    told.push_str(&tell(&site_with(text).await, &["-c", "laelaps.yml", "run"], "").await);
    insta::assert_snapshot!(told);
}

#[tokio::test]
async fn a_url_that_is_not_supported() {
    let text = "development: {type: rdb, url: 'redis://joe:hunter2@db/queue', routes: []}";
    assert_told!(site_with(text).await, ["-c", "laelaps.yml", "list"]);
}

#[tokio::test]
async fn perfectqueues_own_table() {
    let text = "development:\n  type: rdb_compat\n  url: postgres://joe:hunter2@db/queue\n  table: tasks\n  app_key: 1\n  procesors: 4\n";
    assert_told!(site_with(text).await, ["-c", "laelaps.yml", "run"]);
}

#[tokio::test]
async fn a_ruby_template() {
    let text = "development:\n  type: rdb\n  url: \"<%= ENV['URL'] %>\"\n  log: <%= 1 %>\n";
    assert_told!(site_with(text).await, ["-c", "laelaps.yml", "check"]);
}

#[tokio::test]
async fn a_secret_that_is_not_there() {
    let text = "development: {type: rdb, url: {env: LAELAPS_TEST_URL}, routes: []}";
    assert_told!(site_with(text).await, ["-c", "laelaps.yml", "list"]);
}

#[tokio::test]
async fn a_log_that_cannot_be_written() {
    let site = site_with_task().await;
    assert_told!(&site, ["-c", "laelaps.yml", "run", "--log", "missing/host.log"]);
}

#[tokio::test]
async fn perfectqueues_ruby_arguments() {
    let site = site().await;
    assert_told!(&site, ["run", "MyApp::Dispatch", "-I", "lib", "-r", "./app"], ["debug", "127.0.0.1:24333"]);
}

// The plugins.

#[tokio::test]
async fn a_plugin_folder_that_is_not_there() {
    let site = site_with_task().await;
    fs::remove_dir(site.path("plugins")).expect("an empty folder");
    assert_told!(&site, ["-c", "laelaps.yml", "check"], ["-c", "laelaps.yml", "run"]);
    assert_nothing_lost(&site).await;
}

#[tokio::test]
async fn a_route_whose_plugin_is_not_there_yet_is_only_a_warning() {
    assert_told!(site_with_task().await, ["-c", "laelaps.yml", "check"]);
}

/// A component without imports and exports: the preamble alone.
const EMPTY_COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";

/// A component that imports the instance `acme:bank/vault@1.0.0` of an empty instance type, and exports nothing.
const NEEDY_COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0\x07\x03\x01\x42\x00\x0a\x1a\x01\x00\x15acme:bank/vault@1.0.0\x05\x00";

/// A core module without anything: the preamble alone.
const CORE_MODULE: &[u8] = b"\0asm\x01\0\0\0";

#[tokio::test]
async fn files_that_are_no_plugins() {
    let site = site_with_task().await;
    for (name, bytes) in [
        ("core", CORE_MODULE),
        ("empty", &[]),
        ("needy", NEEDY_COMPONENT),
        ("other-world", EMPTY_COMPONENT),
        ("text", b"not a module\n"),
        ("zoo", CORE_MODULE),
    ] {
        site.plug(name, bytes);
    }
    assert_told!(&site, ["-c", "laelaps.yml", "check"]);
    assert_nothing_lost(&site).await;
}

/// A plugin of text: the contract's world around a handler that is never called, with this in its core module.
fn plugin_of_text(memory_pages: u32, more: &str) -> Vec<u8> {
    let text = |name: &str| fs::read_to_string(workspace_file("host/daemon/tests/plugin").join(name)).expect("a file of ours");
    let memory = format!("(memory (export \"memory\") {memory_pages})");
    let room = text("room.wat").replace("(memory (export \"memory\") 2)", &memory);
    let handle = "(func (export \"handle\") (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32) unreachable)";
    let component = text("component.wat").replace(";; ROOM", &room).replace(";; MAIN", &format!("{handle} {more}"));
    wat::parse_str(component.replace(";; MORE IMPORTS", "")).expect("component text")
}

#[tokio::test]
async fn plugins_that_a_host_would_not_serve() {
    let site = site_with_task().await;
    let long = "n".repeat(129);
    let fits = plugin_of_text(2, "");
    for (name, component) in [
        ("fits", &fits),
        ("mis named", &fits),
        (&long, &fits),
        ("too-large", &plugin_of_text(1_025, "")),
        ("zoo", &plugin_of_text(2, "(func $start unreachable) (start $start)")),
    ] {
        site.plug(name, component);
    }
    let digest = regex::Regex::new(r"\b[0-9a-f]{12}([0-9a-f]{52})?\b").expect("an expression");
    let mut told = String::new();
    for arguments in [
        &["-c", "laelaps.yml", "check"][..],
        &["-c", "laelaps.yml", "plugin", "list"],
        &["-c", "laelaps.yml", "plugin", "inspect", "plugins/zoo.wasm"],
        &["plugin", "inspect", "plugins/mis named.wasm"],
    ] {
        told.push_str(&tell(&site, arguments, "").await);
    }
    insta::assert_snapshot!(digest.replace_all(&told, "DIGEST").replace(&long, "LONG"));
    assert_nothing_lost(&site).await;
}

#[tokio::test]
async fn a_truncated_plugin() {
    let site = site_with_task().await;
    let zoo = guest("zoo");
    site.plug("zoo", &zoo[..zoo.len() / 2]);
    // Its digest, and where it breaks off, change with the compiler that made it.
    let answer = site.laelaps(["-c", "laelaps.yml", "check"]).await;
    assert_eq!(answer.code, Some(7));
    assert!(
        answer.stderr.contains("error: plugins/zoo.wasm: ") && answer.stderr.contains("hint: route 1 needs it"),
        "{}",
        answer.stderr
    );
    assert_nothing_lost(&site).await;
}

#[tokio::test]
async fn inspecting_what_is_no_plugin() {
    let site = site().await;
    site.plug("core", CORE_MODULE);
    assert_told!(
        &site,
        ["plugin", "inspect", "plugins/core.wasm"],
        ["plugin", "inspect", "plugins/none.wasm"],
        ["plugin", "run", "plugins/core.wasm", "--kind", "echo"]
    );
}

#[tokio::test]
async fn running_a_plugin_in_a_wrong_way() {
    let site = site().await;
    site.plug("zoo", &guest("zoo"));
    assert_told!(
        &site,
        ["plugin", "run", "plugins/zoo.wasm", "--kind", "echo", "--data", "[]"],
        ["plugin", "run", "plugins/zoo.wasm", "--kind", "echo", "--folder", "nowhere=/data"],
        ["plugin", "run", "plugins/zoo.wasm", "--kind", "echo", "--env", "LAELAPS_TEST_UNSET"],
        ["plugin", "run", "plugins/zoo.wasm", "--kind", "echo", "--memory", "1 ton"]
    );
}

// The tasks.

#[tokio::test]
async fn data_that_is_not_a_json_object() {
    let site = site_with_task().await;
    let submit = |data| ["-c", "laelaps.yml", "submit", "k", "echo", data];
    let told = [
        tell(&site, &submit("not json"), "").await,
        tell(&site, &submit("[1, 2]"), "").await,
        tell(&site, &submit("{\"a\": 1"), "").await,
    ];
    insta::assert_snapshot!(told.concat());
    assert_nothing_lost(&site).await;
}

#[tokio::test]
async fn keys_types_and_users_out_of_their_bounds() {
    let site = site_with_task().await;
    let long = "x".repeat(256);
    assert_told!(
        &site,
        ["-c", "laelaps.yml", "submit", &long, "echo", "{}"],
        ["-c", "laelaps.yml", "submit", "", "echo", "{}"],
        ["-c", "laelaps.yml", "submit", "a\u{7}b", "echo", "{}"],
        ["-c", "laelaps.yml", "submit", "k", &long, "{}"],
        ["-c", "laelaps.yml", "submit", "k", "echo", "{}", "-u", &long]
    );
    assert_nothing_lost(&site).await;
}

#[tokio::test]
async fn options_out_of_their_bounds() {
    let site = site_with_task().await;
    assert_told!(
        &site,
        ["-c", "laelaps.yml", "submit", "k", "echo", "{}", "-t", "tomorrow"],
        ["-c", "laelaps.yml", "submit", "k", "echo", "{}", "--max-attempts", "0"],
        ["-c", "laelaps.yml", "submit", "k", "echo", "{}", "--max-running", "2"],
        ["-c", "laelaps.yml", "list", "--state", "asleep"],
        ["submit"],
        ["lst"]
    );
}

#[tokio::test]
async fn what_a_producer_says_besides() {
    let site = site_with_task().await;
    let with = |more: &[&'static str]| [&["-c", "laelaps.yml", "submit", "k", "echo", "{}"], more].concat();
    let mut told = String::new();
    for more in [
        &["-p", "101"][..],
        &["--priority", "-101"],
        &["--priority=high"],
        &["-p", "1.5"],
        &["-p"],
        &["-p", "1", "-p", "2"],
        &["--prio", "1"],
        &["-u", "ann", "--max-running", "-1"],
        &["--max-attempts", "1e3"],
        &["-t", "2030-02-30"],
        &["--queue", "two words"],
        &["--queue", ""],
        &["--queue", "mail", "--queue", "video"],
    ] {
        told.push_str(&tell(&site, &with(more), "").await);
    }
    let lines = [
        r#""priority":101"#,
        r#""priority":1.0"#,
        r#""priority":"high""#,
        r#""priority":1,"priority":2"#,
        r#""prioritaet":1"#,
        r#""max_running":2"#,
        r#""user":"","max_running":2"#,
        r#""user":"ann","max_running":-1"#,
        r#""max_attempts":0"#,
        r#""run_at":"2030-01-01T12:00:00""#,
        r#""gzip":1"#,
        r#""user":["ann"]"#,
        r#""queue":"two words""#,
        r#""queue":"""#,
        r#""queue":7"#,
        r#""queue":"mail","queue":"video""#,
    ];
    let file: String = lines.iter().map(|more| format!("{{\"key\":\"k\",\"type\":\"echo\",\"data\":{{}},{more}}}\n")).collect();
    told.push_str(&tell(&site, &["-c", "laelaps.yml", "submit", "--file", "-"], &file).await);
    insta::assert_snapshot!(told);
    assert_nothing_lost(&site).await;
}

#[tokio::test]
async fn a_key_that_exists() {
    let site = site_with_task().await;
    assert_told!(
        &site,
        ["-c", "laelaps.yml", "submit", "kept", "other", "{\"a\":1}"],
        ["-c", "laelaps.yml", "submit", "kept", "other", "{\"a\":1}", "--if-new"]
    );
    assert_nothing_lost(&site).await;
}

#[tokio::test]
async fn a_key_that_does_not_exist() {
    let site = site_with_task().await;
    let mut told = String::new();
    for command in ["show", "cancel", "retry", "force-finish"] {
        told.push_str(&tell(&site, &["-c", "laelaps.yml", command, "kep"], "").await);
    }
    insta::assert_snapshot!(told);
}

#[tokio::test]
async fn a_task_in_a_state_that_does_not_allow_it() {
    let site = site_with_task().await;
    let _ = site.laelaps(["-c", "laelaps.yml", "submit", "done", "echo", "{}"]).await.success();
    let _ = site.laelaps(["-c", "laelaps.yml", "finish", "done"]).await.success();
    let mut told = String::new();
    for command in ["force-finish", "cancel", "retry"] {
        told.push_str(&tell(&site, &["-c", "laelaps.yml", command, "done"], "").await);
    }
    told.push_str(&tell(&site, &["-c", "laelaps.yml", "show", "kept", "--output"], "").await);
    insta::assert_snapshot!(told);
}

#[tokio::test]
async fn a_file_with_bad_lines_submits_the_good_ones_and_names_the_others() {
    let site = site_with_task().await;
    let lines = "\
{\"key\":\"a\",\"type\":\"echo\",\"data\":{}}
{\"key\":\"b\",\"type\":\"echo\"}
not json

{\"key\":\"c\",\"type\":\"echo\",\"data\":[]}
{\"key\":\"d\",\"type\":\"echo\",\"data\":{},\"colour\":\"red\"}
{\"key\":\"\",\"type\":\"echo\",\"data\":{}}
{\"key\":\"e\",\"type\":\"echo\",\"data\":{},\"run_at\":\"soon\"}
{\"key\":\"kept\",\"type\":\"echo\",\"data\":{\"new\":true}}
{\"key\":\"f\",\"type\":\"echo\",\"data\":{}}";
    fs::write(site.path("tasks.jsonl"), lines).expect("a file");
    let submit = ["-c", "laelaps.yml", "submit", "--file"];
    let mut told = String::new();
    for (more, input) in [(&["tasks.jsonl", "--dry-run"][..], ""), (&["tasks.jsonl"], ""), (&["-"], lines), (&["none.jsonl"], "")]
    {
        told.push_str(&tell(&site, &[&submit[..], more].concat(), input).await);
    }
    insta::assert_snapshot!(told);
    assert_nothing_lost(&site).await;
}
