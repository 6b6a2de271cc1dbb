//! What a guest may have: memory, tables, stack, handles, random numbers, waits.

use laelaps_queue::State;
use laelaps_tests::guest;
use serde_json::json;

use super::wat::{HANDLE, plugin, with_imports};
use super::{Yard, attack};

/// A guest of WASI's clocks and random numbers, without a language's library between.
fn wasi(body: &str) -> Vec<u8> {
    let imports = "
        (import \"wasi:io/poll@0.2.0\" (instance $poll
            (export \"pollable\" (type (sub resource)))))
        (alias export $poll \"pollable\" (type $pollable))
        (import \"wasi:clocks/monotonic-clock@0.2.0\" (instance $clock
            (alias outer 1 $pollable (type)) (export \"pollable\" (type (eq 0)))
            (type (own 1)) (type (func (param \"when\" u64) (result 2)))
            (export \"subscribe-duration\" (func (type 3)))))
        (import \"wasi:random/random@0.2.0\" (instance $random
            (type (list u8)) (type (func (param \"len\" u64) (result 0)))
            (export \"get-random-bytes\" (func (type 1)))))";
    let lowered = "
        (core func $wasi-subscribe (canon lower (func $clock \"subscribe-duration\")))
        (core func $wasi-random (canon lower (func $random \"get-random-bytes\") (memory $memory) (realloc $realloc)))
";
    let handed_over = "(with \"wasi\" (instance
        (export \"subscribe\" (func $wasi-subscribe)) (export \"random\" (func $wasi-random))))";
    let main = format!(
        "(import \"wasi\" \"subscribe\" (func $subscribe (param i64) (result i32)))
        (import \"wasi\" \"random\" (func $random (param i64 i32)))
        (import \"room\" \"memory\" (memory 1))
        (func (export \"handle\") {HANDLE} {body})"
    );
    with_imports(imports, lowered, handed_over, &main)
}

#[tokio::test]
async fn pollables_without_end_and_huge_random_numbers_end_their_own_attempt() {
    let modules = [
        ("pollables", wasi("(loop $l (drop (call $subscribe (i64.const -1))) (br $l)) unreachable")),
        ("random", wasi("(call $random (i64.const -1) (i32.const 1024)) (i32.const 0)")),
        ("random-much", wasi("(loop $l (call $random (i64.const 16777216) (i32.const 1024)) (br $l)) unreachable")),
    ];
    // The first two end by themselves, on any machine.
    let time_limit = |name: &str| if name == "random-much" { 1 } else { 86_400 };
    let route = |name: &str| json!({ "type": name, "plugin": name, "time_limit": time_limit(name) });
    let routes: Vec<_> = modules.iter().map(|(name, _)| route(name)).collect();
    let mut yard = Yard::open(&routes, &modules).await;
    yard.survives("pollables without end and huge random numbers", async |yard, round| {
        let tasks: Vec<_> = modules.iter().map(|(name, _)| attack(format!("{name}-{round}"), name, json!({}))).collect();
        for ended in yard.ends(&tasks).await {
            assert_eq!(ended.state, State::Failed, "{}", ended.key);
            let message = ended.error_message.unwrap_or_default();
            if ended.task_type == "pollables" {
                assert!(message.contains("more than 128 handles"), "{message}");
            }
            assert!(!message.is_empty(), "{}", ended.key);
        }
    })
    .await;
}

#[tokio::test]
async fn memory_tables_and_stack_are_bounded() {
    let handler = |text: &str, body: &str| {
        plugin(&format!("(import \"room\" \"memory\" (memory 1)) {text} (func (export \"handle\") {HANDLE} {body})"))
    };
    let table = "(loop $l (br_if $l (i32.ne (table.grow 0 (ref.null func) (i32.const 1000)) (i32.const -1)))) unreachable";
    let modules = [
        ("zoo", guest("zoo")),
        ("tables", handler("(table 1 funcref)", table)),
        (
            "fills",
            handler(
                "",
                "(drop (memory.grow (i32.const 900))) (loop $l (memory.fill (i32.const 0) (i32.const 1) (i32.const 58982400)) (br $l)) unreachable",
            ),
        ),
        ("grows", handler("", "(loop $l (drop (memory.grow (i32.const 60000))) (br $l)) unreachable")),
        (
            "recurses",
            handler(
                "(func $f (param i64) (result i64) (i64.add (i64.const 1) (call $f (i64.add (local.get 0) (i64.const 1)))))",
                "(i32.wrap_i64 (call $f (i64.const 0)))",
            ),
        ),
    ];
    let mut routes: Vec<_> =
        modules[1..].iter().map(|(name, _)| json!({ "type": name, "plugin": name, "time_limit": 0.5 })).collect();
    routes.push(json!({ "pattern": "^(allocate|overflow|spin|sleep|panic|exit)$", "plugin": "zoo", "time_limit": 0.5 }));
    let expected = [
        ("tables", "trap"),
        ("fills", "time-out"),
        ("grows", "time-out"),
        ("recurses", "trap"),
        ("allocate", "memory"),
        ("overflow", "trap"),
        ("spin", "time-out"),
        ("sleep", "time-out"),
        ("panic", "trap"),
        ("exit", "trap"),
    ];
    let mut yard = Yard::open(&routes, &modules).await;
    yard.survives("memory, tables and stack without end", async |yard, round| {
        let tasks: Vec<_> = expected.iter().map(|(kind, _)| attack(format!("{kind}-{round}"), kind, json!({}))).collect();
        for (ended, (kind, code)) in yard.ends(&tasks).await.into_iter().zip(expected) {
            let message = ended.error_message.unwrap_or_default();
            // A slow machine's time may be over before the memory is.
            let is_as_expected = ended.error_code.as_deref() == Some(code) || ended.error_code.as_deref() == Some("time-out");
            assert!(ended.state == State::Failed && is_as_expected, "{kind}: {:?} {message}", ended.error_code);
        }
    })
    .await;
}

#[tokio::test]
async fn open_files_without_end_end_at_the_routes_limit() {
    let yard = Yard::open(&[], &[("zoo", guest("zoo"))]).await;
    std::fs::write(yard.site.path("marks/file"), "x").unwrap();
    let folders = json!([{ "host": yard.site.path("marks"), "guest": "/rw", "writable": true }]);
    let route = json!({ "type": "open-many", "plugin": "zoo", "grants": { "folders": folders } });
    let mut yard = yard.reconfigure(&[route]).await;
    yard.survives("open files without end", async |yard, round| {
        let ended = yard.ends(&[attack(format!("open-{round}"), "open-many", json!({ "path": "/rw/file" }))]).await;
        assert!(ended[0].state.is_terminal(), "{:?}", ended[0]);
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", yard.host.process_id())).unwrap().count();
        assert!(descriptors < 400, "the host has {descriptors} files open");
    })
    .await;
}
