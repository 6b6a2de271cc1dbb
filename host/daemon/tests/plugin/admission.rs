//! What is admitted, and the words for what is not.

use laelaps::plugin::{CompileLimits, Config, Engine, Error, Inspection};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::guests;
use crate::support::{PATIENCE, config};

fn engine() -> Arc<Engine> {
    Engine::new(&config()).expect("engine")
}

async fn problem(bytes: &[u8]) -> String {
    let Inspection { fits, problems, .. } = engine().inspect(bytes).await.expect("inspected");
    assert_eq!(fits, None);
    problems.join("\n")
}

async fn refusal(engine: &Arc<Engine>, bytes: &[u8]) -> String {
    match engine.load("x", bytes).await {
        Ok(version) => panic!("admitted: {version:?}"),
        Err(error) => error.to_string(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_component_of_the_contracts_world_fits_with_every_import_it_may_have() {
    let inspection = engine().inspect(&guests::handler()).await.expect("inspected");
    assert_eq!(inspection.fits.as_deref(), Some("laelaps:worker@0.1.0"), "{:?}", inspection.problems);
    let functions: usize = inspection.imports.iter().map(|import| import.functions.len()).sum();
    assert_eq!(functions, 21, "{:?}", inspection.imports);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_component_is_refused_by_what_it_is() {
    assert!(problem(b"").await.contains("empty"));
    assert!(problem(b"#!/bin/sh").await.contains("not WebAssembly"));
    assert!(problem(b"\x7fELF\x02\x01").await.contains("never loaded"));
    assert!(problem(b"\0asm\x01\0\0\0").await.contains("core WebAssembly module, not a component"));
    assert!(problem(b"\0asm").await.contains("truncated"));
    assert!(problem(b"\0asm\x09\0\x01\0").await.contains("not a valid component"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_component_is_refused_at_any_length() {
    let whole = guests::handler();
    let engine = engine();
    for part in [1, 2, 5, 8, 9] {
        let refusal = refusal(&engine, &whole[..whole.len() * part / 10]).await;
        assert!(refusal.contains("truncated") || refusal.contains("does not export"), "{part}/10: {refusal}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_component_of_another_world_is_refused_with_what_it_is() {
    let greeter = guests::exporting("(param \"name\" string) (result string)", "test:other/greeter");
    let problem = problem(&greeter).await;
    assert_eq!(problem, "it does not export `laelaps:worker/handler@0.1.0`, so it is no plugin: it exports `test:other/greeter`");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_import_is_refused_by_name() {
    let import =
        "(import \"test:other/database\" (instance (export \"query\" (func (param \"sql\" string) (result (list string))))))";
    let found = problem(&guests::importing(import)).await;
    assert!(found.starts_with("it imports `test:other/database`, which no plugin gets"), "{found}");
    assert!(!found.contains("does not export"), "{found}");
    let import = "(import \"wasi:http/types@0.2.6\" (instance (export \"f\" (func))))";
    let found = problem(&guests::importing(import)).await;
    assert!(found.starts_with("it imports `wasi:http/types@0.2.6`, which no plugin gets: this host offers WASI 0.2"), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_of_another_type_is_refused_with_both_types() {
    let found = problem(&guests::exporting("(param \"task\" string) (result string)", "laelaps:worker/handler@0.1.0")).await;
    assert!(found.contains("function `handle` of another type: expected `func(task: record { key: string"), "{found}");
    assert!(found.contains("found `func(task: string) -> string`"), "{found}");
    let found = problem(&guests::exporting("(param \"task\" string) (result string)", "laelaps:worker/handler@0.2.0")).await;
    assert!(found.contains("exports `laelaps:worker/handler@0.2.0`, but this host speaks version 0.1.0"), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_of_another_type_or_a_newer_version_is_refused_with_the_difference() {
    let import = "(import \"laelaps:worker/context@0.1.1\" (instance
        (export \"deadline\" (func (result string))) (export \"teleport\" (func))))";
    let found = problem(&guests::importing(import)).await;
    assert!(
        found.contains("`deadline` of `laelaps:worker/context@0.1.1` with another type: expected `func() -> option<u64>`"),
        "{found}"
    );
    assert!(
        found.contains("the function `teleport` of `laelaps:worker/context@0.1.1`, which this host does not have"),
        "{found}"
    );
    let import = "(import \"laelaps:worker/context@0.2.0\" (instance (export \"deadline\" (func (result u64)))))";
    let found = problem(&guests::importing(import)).await;
    assert!(found.contains("imports `laelaps:worker/context@0.2.0`, but this host speaks version 0.1.0"), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_self_test_refuses_what_cannot_start() {
    let engine = engine();
    let memory = refusal(&engine, &guests::needs_memory(2_000)).await;
    assert!(memory.contains("memory"), "{memory}");
    let never = refusal(&engine, &guests::never_starts()).await;
    assert!(never.contains("does not start within 10 s"), "{never}");
}

#[tokio::test(flavor = "multi_thread")]
async fn compiling_a_bomb_ends_in_a_refusal_and_costs_nobody_anything() {
    let bomb = guests::bomb(200);
    let memory = CompileLimits { memory_bytes: 48 << 20, ..CompileLimits::default() };
    let little = Engine::new(&Config { compile_limits: memory, ..config() }).expect("engine");
    let found = refusal(&little, &bomb).await;
    assert!(found.contains("compiling it needs more than 50331648 bytes of memory"), "{found}");
    let time = CompileLimits { time: Duration::from_secs(1), ..CompileLimits::default() };
    let brief = Engine::new(&Config { compile_limits: time, ..config() }).expect("engine");
    let found = refusal(&brief, &bomb).await;
    // Whichever is first on a busy machine: the compiler gives way to everything else.
    let bounds = ["compiling it needs more than 1 s of processor time", "compiling it takes longer than 4 s"];
    assert!(bounds.iter().any(|bound| found.contains(bound)), "{found}");
}

/// What a module could do with a fault in the compiler is a matter of the unit tests beside the filter; this is that the real child has it.
#[test]
fn the_compiler_is_confined_before_it_reads_a_byte() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_laelaps"))
        .args([laelaps::plugin::COMPILE_ARGUMENT, "1073741824", "60", "8"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("started");
    let patience = Instant::now() + PATIENCE;
    loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).expect("it waits for its module");
        if status.contains("Seccomp:\t2") {
            assert!(status.contains("NoNewPrivs:\t1"), "{status}");
            break;
        }
        assert!(Instant::now() < patience, "no filter: {status}");
        std::thread::yield_now();
    }
    drop(child.stdin.take());
    assert_eq!(child.wait().expect("it ends").code(), Some(4), "nobody is there any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn compiled_code_is_kept_and_checked_before_it_is_used() {
    let cache = tempfile::tempdir().expect("folder");
    let folder = cache.path().join("code");
    let config = Config { cache_folder: Some(folder.clone()), ..config() };
    let handler = guests::handler();
    Engine::new(&config).expect("engine").load("x", &handler).await.expect("admitted");
    let kept = only_file(&folder);
    let without_compiler = Config { compiler: Some("/nowhere".into()), ..config.clone() };
    Engine::new(&without_compiler).expect("engine").load("x", &handler).await.expect("admitted without being compiled");
    let mut code = std::fs::read(&kept).expect("read");
    let middle = code.len() / 2;
    code[middle] ^= 0xff;
    std::fs::write(&kept, code).expect("written");
    let error = Engine::new(&without_compiler).expect("engine").load("x", &handler).await.expect_err("not loaded");
    assert!(error.to_string().contains("cannot be started"), "{error}");
    Engine::new(&config).expect("engine").load("x", &handler).await.expect("compiled again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_for_code_that_others_can_reach_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let cache = tempfile::tempdir().expect("folder");
    std::fs::set_permissions(cache.path(), std::fs::Permissions::from_mode(0o755)).expect("set");
    let config = Config { cache_folder: Some(cache.path().to_owned()), ..config() };
    let error = Engine::new(&config).err().expect("refused");
    assert!(matches!(&error, Error::Cache { problem, .. } if problem.contains("0755")), "{error}");
    assert!(error.hint().is_some());
}

fn only_file(folder: &Path) -> std::path::PathBuf {
    let files: Vec<_> = std::fs::read_dir(folder).expect("listed").map(|entry| entry.expect("entry").path()).collect();
    let [file] = files.as_slice() else { panic!("{files:?}") };
    file.clone()
}
