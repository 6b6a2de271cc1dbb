//! Pointers, lengths and cases that lie: what a guest hands over in the canonical ABI, and what it returns.

use laelaps_queue::State;
use serde_json::json;

use super::wat::{HANDLE, plugin, room};
use super::{Yard, attack};

/// Bodies of `handle`, and a word of what its attempt must end with. Each has `$memory`, `log`, `submit` and what else is imported below.
const LIES: [(&str, &str, &str); 19] = [
    ("result-beyond", "(i32.const 0x7ffffff8)", "trap"),
    ("result-negative", "(i32.const -8)", "trap"),
    ("result-unaligned", "(i32.const 3)", "trap"),
    ("case-unknown", "(i32.store8 (i32.const 1024) (i32.const 77)) (i32.const 1024)", "trap"),
    ("outcome-unknown", "(i32.store8 (i32.const 1032) (i32.const 200)) (i32.const 1024)", "trap"),
    ("output-beyond", "(call $finish (i32.const 0x7ffffff0) (i32.const 64)) (i32.const 1024)", "trap"),
    ("output-wraps", "(call $finish (i32.const 16) (i32.const -1)) (i32.const 1024)", ""),
    ("output-longer", "(call $finish (i32.const 131000) (i32.const 4096)) (i32.const 1024)", "trap"),
    (
        "output-huge",
        "(drop (memory.grow (i32.const 800))) (call $finish (i32.const 0) (i32.const 52428800)) (i32.const 1024)",
        "",
    ),
    ("log-beyond", "(call $log (i32.const 2) (i32.const -16) (i32.const 8)) (i32.const 0)", "trap"),
    ("log-wraps", "(call $log (i32.const 2) (i32.const 64) (i32.const -1)) (i32.const 0)", ""),
    ("log-level", "(call $log (i32.const 99) (i32.const 0) (i32.const 8)) (i32.const 0)", "trap"),
    (
        "log-no-text",
        "(i32.store (i32.const 0) (i32.const 0xfffefdfc)) (call $log (i32.const 2) (i32.const 0) (i32.const 4)) (i32.const 0)",
        "trap",
    ),
    ("setting-beyond", "(call $setting (i32.const 0x7fffffff) (i32.const 1) (i32.const 2048)) (i32.const 0)", "trap"),
    ("answer-beyond", "(call $setting (i32.const 0) (i32.const 1) (i32.const 0x7ffffff0)) (i32.const 0)", "trap"),
    ("answer-unaligned", "(call $settings (i32.const 2049)) (i32.const 0)", "trap"),
    ("copy-beyond", "(memory.copy (i32.const 0) (i32.const 131000) (i32.const 1000)) (i32.const 0)", "trap"),
    ("fill-beyond", "(memory.fill (i32.const 65536) (i32.const 1) (i32.const -1)) (i32.const 0)", "trap"),
    ("call-beyond", "(call_indirect (type $none) (i32.const 70)) (i32.const 0)", "trap"),
];

fn liar(body: &str) -> Vec<u8> {
    plugin(&format!(
        "(import \"context\" \"setting\" (func $setting (param i32 i32 i32)))
        (import \"context\" \"settings\" (func $settings (param i32)))
        (import \"log\" \"log\" (func $log (param i32 i32 i32)))
        (import \"room\" \"memory\" (memory 1))
        (type $none (func)) (table 4 funcref)
        (func $finish (param $at i32) (param $length i32)
            (i32.store8 (i32.const 1040) (i32.const 1))
            (i32.store (i32.const 1044) (local.get $at))
            (i32.store (i32.const 1048) (local.get $length)))
        (func (export \"handle\") {HANDLE} {body})"
    ))
}

/// Rooms whose `cabi_realloc` lies: it is called for the task's own key.
fn rooms() -> Vec<(&'static str, Vec<u8>)> {
    let with = |body: &str| {
        let realloc = format!("(func $r (export \"cabi_realloc\") (param i32 i32 i32 i32) (result i32) {body})");
        room(&format!("(memory (export \"memory\") 2) {realloc}"), "(i32.const 1024)")
    };
    vec![
        ("realloc-beyond", with("(i32.const 0x7ffffff0)")),
        ("realloc-negative", with("(i32.const -1)")),
        ("realloc-end", with("(i32.const 131071)")),
        ("realloc-unaligned", with("(i32.const 2049)")),
        ("realloc-traps", with("unreachable")),
        ("realloc-recurses", with("(call $r (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 1))")),
        ("realloc-spins", with("(loop $l (br $l)) (i32.const 0)")),
        ("realloc-same", with("(i32.const 1040)")),
    ]
}

#[tokio::test]
async fn lying_pointers_lengths_and_cases_end_their_own_attempt() {
    let mut modules: Vec<_> = LIES.iter().map(|(name, body, _)| (*name, liar(body))).collect();
    modules.extend(rooms());
    // All others end by themselves, on any machine.
    let time_limit = |name: &str| if name == "realloc-spins" { 1 } else { 86_400 };
    let route = |name: &str| json!({ "type": name, "plugin": name, "time_limit": time_limit(name) });
    let routes: Vec<_> = modules.iter().map(|(name, _)| route(name)).collect();
    let mut yard = Yard::open(&routes, &modules).await;
    yard.survives("lying pointers", async |yard, round| {
        let tasks: Vec<_> = modules
            .iter()
            .map(|(name, _)| attack(format!("{name}-{round}"), name, json!({ "some": "data that has to be handed over" })))
            .collect();
        for ended in yard.ends(&tasks).await {
            let (code, message) = (ended.error_code.unwrap_or_default(), ended.error_message.unwrap_or_default());
            let expected = LIES.iter().find(|(name, _, _)| *name == ended.task_type).map_or("", |(_, _, code)| code);
            match ended.task_type.as_str() {
                "realloc-spins" => assert_eq!(code, "time-out", "{message}"),
                // A text may begin anywhere, and data may lie where the result does: what comes of it is its own.
                "realloc-unaligned" | "realloc-same" => {}
                name => {
                    assert_eq!(ended.state, State::Failed, "{name}: {code} {message}");
                    assert!(["trap", "malformed", "memory"].contains(&code.as_str()), "{name}: {code} {message}");
                    assert!(expected.is_empty() || code == expected, "{name}: {code} {message}");
                    assert!(!message.is_empty() && message.len() <= 4_096, "{name}: {message}");
                }
            }
        }
    })
    .await;
}
