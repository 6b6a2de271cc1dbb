//! `laelaps demo`, as somebody who has just cloned the repository sees it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use laelaps_tests::{laelaps, workspace_file};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

/// Longer than the demo waits by itself for anything.
const PATIENCE: Duration = Duration::from_secs(900);

/// The demo, with a folder of its own for temporary files and nothing else to start from.
fn demo(folder: &Path, tasks: &str) -> Command {
    let mut command = Command::new(laelaps());
    command.args(["demo", "--tasks", tasks]).current_dir(folder).env_clear().env("TMPDIR", folder).env("HOME", folder);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

fn left_behind(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[tokio::test]
async fn the_demo_replaces_a_component_while_tasks_flow_loses_nothing_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let output = tokio::time::timeout(PATIENCE, demo(folder.path(), "60").output()).await.expect("the demo ends").unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("60 tasks submitted, 60 finished, 0 lost"), "{said}");
    assert!(said.contains("edition 1, sha256 ") && said.contains("edition 2, sha256 "), "both versions ran: {said}");
    assert!(said.contains("4000 requests"), "{said}");
    assert_eq!(left_behind(folder.path()), Vec::<String>::new());
}

#[tokio::test]
async fn an_interrupted_demo_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = demo(folder.path(), "10000").spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let begun = tokio::time::timeout(PATIENCE, lines.next_line()).await.expect("the demo begins").unwrap();
    assert!(begun.is_some_and(|line| line.contains("run in")), "the host runs");
    let process = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.expect("the demo ends").unwrap();
    assert!(!status.success());
    assert_eq!(left_behind(folder.path()), Vec::<String>::new());
}

/// The daemon's build script, compiled, in a folder where cargo, rustc and rustup are scripts.
struct Build {
    folder: tempfile::TempDir,
}

impl Build {
    async fn script() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut rustc = Command::new("rustc");
        rustc.args(["--edition", "2024", "--out-dir"]).arg(folder.path()).arg(workspace_file("host/daemon/build.rs"));
        let compiled = rustc.current_dir(workspace_file("")).output().await.unwrap();
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        let build = Self { folder };
        // A toolchain that has not got the target: it answers where the target's libraries would be.
        build.tool("rustc", "echo /nowhere/lib");
        // Its last argument is the target folder.
        build.tool(
            "cargo",
            "for last; do :; done; mkdir -p $last/wasm32-wasip2/plugin; echo > $last/wasm32-wasip2/plugin/access_log.wasm",
        );
        build
    }

    fn tool(&self, name: &str, script: &str) {
        let folder = self.folder.path().join("bin");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(name), format!("#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")).unwrap();
        fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What the script tells cargo.
    async fn run(&self) -> String {
        let folder = self.folder.path();
        let out = folder.join("target/debug/build/laelaps/out");
        fs::create_dir_all(&out).unwrap();
        let mut script = Command::new(folder.join("build"));
        script.env_clear().env("PATH", folder.join("bin")).env("OUT_DIR", out).env("CARGO_FEATURE_DEMO", "1");
        script.env("CARGO_MANIFEST_DIR", workspace_file("host/daemon"));
        script.env("CARGO", folder.join("bin/cargo")).env("RUSTC", folder.join("bin/rustc"));
        let output = script.output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

#[tokio::test]
async fn where_rusts_wasm_target_is_missing_the_build_adds_it_and_says_so() {
    let build = Build::script().await;
    let called = build.folder.path().join("called");
    build.tool("rustup", &format!("echo \"$@\" >> {}", called.display()));
    let told = build.run().await;
    assert!(told.contains("cargo::warning=added Rust's target wasm32-wasip2"), "{told}");
    assert!(!told.contains("cargo::error"), "{told}");
    assert_eq!(fs::read_to_string(called).unwrap(), "target add wasm32-wasip2\n");
}

#[tokio::test]
async fn where_rusts_wasm_target_cannot_be_added_the_build_says_what_to_do() {
    let build = Build::script().await;
    let by_hand = "cargo::error=add it by hand: `rustup target add wasm32-wasip2`";
    let told = build.run().await;
    assert!(told.contains("is missing, and rustup cannot be run to add it") && told.contains(by_hand), "{told}");
    build.tool("rustup", "echo 'no network' >&2; exit 1");
    let told = build.run().await;
    assert!(told.contains("`rustup target add wasm32-wasip2` failed: no network") && told.contains(by_hand), "{told}");
}
