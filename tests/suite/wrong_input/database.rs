//! Databases that are not there, not ours, not whole, held by somebody else or out of room, and folders that may not be read.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use laelaps_tests::{Answer, Site, laelaps};
use serde_json::json;
use sqlx::{Connection as _, Executor as _, SqliteConnection};

use super::{assert_nothing_lost, site, site_with_task, tell, transcript};

async fn database(site: &Site) -> SqliteConnection {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(site.path("queue.db")).create_if_missing(true);
    SqliteConnection::connect_with(&options).await.expect("the database opens")
}

#[tokio::test]
async fn a_database_that_is_not_there() {
    let site = site().await;
    let mut told = String::new();
    for command in ["list", "check", "run"] {
        told.push_str(&tell(&site, &["-c", "laelaps.yml", command], "").await);
    }
    insta::assert_snapshot!(told);
    assert!(!site.path("queue.db").exists(), "only init makes a database");
}

#[tokio::test]
async fn a_database_in_a_folder_that_is_not_there() {
    let site = site().await;
    site.configure(json!({ "url": "sqlite:missing/queue.db", "plugins": "plugins" }));
    assert_told!(&site, ["-c", "laelaps.yml", "init"]);
}

#[tokio::test]
async fn a_database_without_tables() {
    let site = site().await;
    fs::write(site.path("queue.db"), "").expect("an empty file");
    assert_told!(&site, ["-c", "laelaps.yml", "list"], ["-c", "laelaps.yml", "check"]);
}

#[tokio::test]
async fn a_file_that_is_no_database() {
    let site = site().await;
    fs::write(site.path("queue.db"), "this is a text about queues\n".repeat(100)).expect("a file");
    assert_told!(&site, ["-c", "laelaps.yml", "list"], ["-c", "laelaps.yml", "init"]);
}

#[tokio::test]
async fn a_database_of_another_program() {
    let site = site().await;
    let mut other = database(&site).await;
    other.execute("CREATE TABLE customers (name TEXT)").await.expect("a table");
    other.close().await.expect("closed");
    assert_told!(&site, ["-c", "laelaps.yml", "init"], ["-c", "laelaps.yml", "list"]);
}

/// What these commands say of a database whose schema somebody has changed by this statement.
async fn told_of_schema(sql: &'static str, commands: &[&str]) -> String {
    let site = site_with_task().await;
    let mut changed = database(&site).await;
    changed.execute(sql).await.expect("another schema");
    let mut told = String::new();
    for command in commands {
        let arguments: Vec<&str> = ["-c", "laelaps.yml"].into_iter().chain(command.split(' ')).collect();
        told.push_str(&tell(&site, &arguments, "").await);
    }
    changed.execute("DELETE FROM laelaps_schema WHERE version <> 1").await.expect("the schema as it was");
    if sql.contains("schema_was") {
        changed.execute("UPDATE laelaps_schema SET fingerprint = (SELECT was FROM schema_was)").await.expect("likewise");
    }
    changed.close().await.expect("closed");
    assert_nothing_lost(&site).await;
    told.replace(&format!("Laelaps {}", env!("CARGO_PKG_VERSION")), "Laelaps VERSION")
}

#[tokio::test]
async fn a_schema_of_a_newer_program() {
    let sql =
        "INSERT INTO laelaps_schema (version, oldest_program, applied_at, program, fingerprint) VALUES (99, 98, 0, '9.9.0', '')";
    insta::assert_snapshot!(told_of_schema(sql, &["list", "init", "init --dry-run", "check", "run", "submit k echo {}"]).await);
}

#[tokio::test]
async fn a_schema_of_a_newer_program_that_admits_this_one() {
    let sql =
        "INSERT INTO laelaps_schema (version, oldest_program, applied_at, program, fingerprint) VALUES (99, 1, 0, '9.9.0', '')";
    insta::assert_snapshot!(told_of_schema(sql, &["submit k echo {}", "init", "init --dry-run", "check"]).await);
}

#[tokio::test]
async fn a_schema_of_a_development_build() {
    let sql = "CREATE TABLE schema_was AS SELECT fingerprint AS was FROM laelaps_schema; UPDATE laelaps_schema SET fingerprint = '00000000'";
    insta::assert_snapshot!(told_of_schema(sql, &["list", "init", "init --dry-run", "check", "run", "submit k echo {}"]).await);
}

#[tokio::test]
async fn a_locked_database() {
    let site = site_with_task().await;
    site.configure(json!({ "url": "sqlite:queue.db", "plugins": "plugins", "pq_connect_timeout": 3 }));
    let mut holder = database(&site).await;
    holder.execute("BEGIN IMMEDIATE").await.expect("the lock");
    let told = tell(&site, &["-c", "laelaps.yml", "submit", "k", "echo", "{}"], "").await;
    let waited = regex::Regex::new(r"for \d+ ms").expect("an expression");
    insta::assert_snapshot!(waited.replace(&told, "for TIME"));
    holder.execute("ROLLBACK").await.expect("the lock is given back");
    holder.close().await.expect("closed");
    assert_nothing_lost(&site).await;
}

/// What a command answers that is not `laelaps` itself.
async fn answer(command: &mut tokio::process::Command) -> Answer {
    let output = command.stdin(Stdio::null()).output().await.expect("the command runs");
    Answer {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// `laelaps ARGUMENTS` in a site, by somebody whom permissions stop, which they do root only once it has given up overriding them.
async fn answer_under_permissions(site: &Site, arguments: &[&str]) -> Answer {
    let is_root = rustix::process::geteuid().is_root();
    let mut command = tokio::process::Command::new(if is_root { "setpriv" } else { "env" });
    if is_root {
        command.args(["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search", "--"]);
    }
    answer(command.arg(laelaps()).args(arguments).current_dir(site.folder()).env("NO_COLOR", "1")).await
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;

    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("our own file");
}

#[tokio::test]
async fn a_read_only_database() {
    let site = site_with_task().await;
    set_mode(&site.path("queue.db"), 0o444);
    set_mode(site.folder(), 0o555);
    let told = answer_under_permissions(&site, &["-c", "laelaps.yml", "submit", "k", "echo", "{}"]).await;
    set_mode(site.folder(), 0o755);
    set_mode(&site.path("queue.db"), 0o644);
    insta::assert_snapshot!(transcript(&site, "laelaps submit", &told));
    assert_nothing_lost(&site).await;
}

#[tokio::test]
async fn a_plugin_folder_that_cannot_be_read() {
    let site = site_with_task().await;
    set_mode(&site.path("plugins"), 0o000);
    let mut told = String::new();
    for command in ["check", "run"] {
        let answer = answer_under_permissions(&site, &["-c", "laelaps.yml", command]).await;
        told.push_str(&transcript(&site, &format!("laelaps {command}"), &answer));
    }
    set_mode(&site.path("plugins"), 0o755);
    insta::assert_snapshot!(told);
    assert_nothing_lost(&site).await;
}

#[tokio::test]
async fn a_damaged_database() {
    let site = site_with_task().await;
    let good = fs::read(site.path("queue.db")).expect("our own file");
    let mut damaged = good.clone();
    // The first page still says that it is a database of ours.
    damaged[4_096..].fill(0x5a);
    fs::write(site.path("queue.db"), &damaged).expect("our own file");
    assert_told!(
        &site,
        ["-c", "laelaps.yml", "list"],
        ["-c", "laelaps.yml", "submit", "k", "echo", "{}"],
        ["-c", "laelaps.yml", "run"]
    );
    assert!(fs::read(site.path("queue.db")).expect("our own file")[4_096..] == damaged[4_096..], "it is left as it was found");
    fs::write(site.path("queue.db"), good).expect("our own file");
    assert_nothing_lost(&site).await;
}

#[tokio::test]
async fn a_full_disk() {
    let site = site().await;
    site.configure(json!({ "url": "sqlite:disk/queue.db", "plugins": "plugins" }));
    fs::create_dir(site.path("disk")).expect("a folder");
    fs::write(site.path("big.json"), format!("{{\"text\":\"{}\"}}", "x".repeat(4 << 20))).expect("a file");
    // A disk of 2 MiB that only these commands see.
    let script = "mount -t tmpfs -o size=2m tmpfs disk || exit 99
        \"$1\" -c laelaps.yml init > /dev/null || exit 98
        \"$1\" -c laelaps.yml submit kept echo '{}' > /dev/null || exit 97
        \"$1\" -c laelaps.yml submit big echo - < big.json; code=$?
        \"$1\" -c laelaps.yml list | sed 's/ *[0-9]*-[0-9]*-[0-9]*T.*//'
        exit $code";
    let mut command = tokio::process::Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]).arg(laelaps());
    let told = answer(command.current_dir(site.folder()).env("NO_COLOR", "1")).await;
    if told.code == Some(99) || told.stderr.contains("unshare:") {
        // Some containers allow no file systems of one's own; then the queue's own test of a full database has to do.
        assert!(!is_ci(), "CI has to let its tests mount a small disk: {}", told.stderr.trim());
        eprintln!("a_full_disk: this machine lets nobody mount a small disk: {}", told.stderr.trim());
        return;
    }
    insta::assert_snapshot!(transcript(&site, "laelaps submit big echo - < big.json; laelaps list", &told));
}

/// Whether what cannot be tested here has to fail (as in tests/run).
#[expect(clippy::disallowed_methods, reason = "tests read what .ci/run sets")]
fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|ci| ci == "true")
}
