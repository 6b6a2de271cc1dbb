//! Types of a module's imports and exports, which a refusal describes: the text must be short, and made outside of the host.

use laelaps_tests::{laelaps, scaled};
use tokio::process::Command;

use super::wat::{importing, parse};
use super::yard::assert_printable;
use super::{Yard, refusals};

/// Levels of `tuple<T, T>`. In a soak as many as a component may have, by the size of its types (a million); a quarter of that stands for 6 GB
/// of text, and costs the compiling child a quarter of the time.
fn levels() -> usize {
    if scaled(10) == 10 { 18 } else { 16 }
}

/// A field's name that is nearly as long as a name may be.
const FIELD_BYTES: usize = 99_000;

/// Types of an instance: a record, a variant or another first type, named as components demand it, and doubled level by level. Then a function
/// that takes the last of them.
fn doubled(first: &str) -> String {
    let mut text = format!("(type {first}) (export \"first\" (type (eq 0)))");
    let mut last = 1;
    for _ in 0..levels() {
        text.push_str(&format!(" (type (tuple {last} {last}))"));
        last += 1;
    }
    text.push_str(&format!(" (type (func (param \"p\" {last}))) (export \"f\" (func (type {})))", last + 1));
    text
}

fn record() -> String {
    format!("(record (field \"{}\" u8))", "f".repeat(FIELD_BYTES))
}

fn variant() -> String {
    format!("(variant (case \"{}\") (case \"b\" u8))", "c".repeat(FIELD_BYTES))
}

/// An import of an interface of this name.
fn import(name: &str, types: &str) -> Vec<u8> {
    importing(&format!("(import \"{name}\" (instance {types}))"))
}

/// Lists within lists, as deep as components may go, and flags with many names.
fn nested_lists() -> String {
    let mut text = String::from("(type (list u8))");
    for level in 0..90 {
        text.push_str(&format!(" (type (list {level}))"));
    }
    text.push_str(" (type (func (param \"p\" 90))) (export \"f\" (func (type 91)))");
    text
}

/// A component that exports the contract's interface with a `handle` of its own type, doubled.
fn exporting(function: &str) -> Vec<u8> {
    let mut types = format!("(type $first {}) (export $t0 \"first\" (type $first))", record());
    let levels = levels();
    for level in 0..levels {
        types.push_str(&format!(" (type $t{} (tuple $t{level} $t{level}))", level + 1));
    }
    parse(&format!(
        "(component {types}
            (core module $main
                (memory (export \"memory\") 1)
                (func (export \"realloc\") (param i32 i32 i32 i32) (result i32) unreachable)
                (func (export \"f\") (param i32)))
            (core instance $main (instantiate $main))
            (alias core export $main \"memory\" (core memory $memory))
            (func $f (param \"task\" $t{levels}) (canon lift (core func $main \"f\") (memory $memory)
                (realloc (core func $main \"realloc\"))))
            (instance $handler (export \"first\" (type $t0)) (export \"{function}\" (func $f)))
            (export \"laelaps:worker/handler@0.1.0\" (instance $handler)))"
    ))
}

/// As many imports as components may have, each with a name of its own.
fn many_imports(name_bytes: usize, count: usize) -> Vec<u8> {
    let long = "x".repeat(name_bytes);
    let imports: Vec<String> =
        (0..count).map(|number| format!("(import \"test:n{number}/{long}\" (instance (export \"f\" (func))))")).collect();
    importing(&imports.join(" "))
}

fn modules() -> Vec<(&'static str, Vec<u8>)> {
    // Another one than the component has already, by its name.
    let deadline = "laelaps:worker/context@0.1.1";
    let functions: Vec<String> = (0..900).map(|number| format!("(export \"f{number}\" (func))")).collect();
    vec![
        ("import-record", import("test:types/bomb", &doubled(&record()))),
        ("import-variant", import("test:types/bomb", &doubled(&variant()))),
        ("import-lists", import("test:types/bomb", &nested_lists())),
        ("import-function", import(deadline, &doubled(&record()).replace("export \"f\"", "export \"deadline\""))),
        ("import-unknown", import(deadline, &functions.join(" "))),
        ("export-handle", exporting("handle")),
        ("export-other", exporting("other")),
        ("many-imports", many_imports(8, 900)),
        ("long-names", many_imports(90_000, 20)),
        ("wasi-record", import("wasi:clocks/wall-clock@0.2.0", &doubled(&record()).replace("export \"f\"", "export \"now\""))),
        ("escapes", escapes()),
    ]
}

/// An import of a core module cannot be; its name is in the module all the same, and in what the compiler says of it.
fn escapes() -> Vec<u8> {
    parse(
        "(component (core module (import \"\\1b[31mred\\1b]0;t\\07\\c2\\9b31m\\e2\\80\\ae\\0a2026-11-27T00:00:00Z  INFO forged\" \"x\" (func)))
            (core instance (instantiate 0)))",
    )
}

#[tokio::test]
async fn a_module_whose_types_explode_in_words_is_refused_with_few() {
    let modules = modules();
    let mut yard = Yard::open(&[], &[]).await;
    let mut times = 0;
    yard.survives("modules whose types explode in words", async |yard, _round| {
        times += 1;
        for (name, module) in &modules {
            yard.plug(name, module);
        }
        for (name, _) in &modules {
            let line = refusals(yard, name, times).await;
            let (_, reason) = line.split_once("reason=").unwrap_or_else(|| panic!("{name}: {line}"));
            assert!(reason.len() > 20 && reason.len() <= 4_096 + 300, "{name}: {} bytes: {line}", reason.len());
            assert_printable(&line, false);
        }
    })
    .await;
    yard.no_line_is_forged();
}

#[tokio::test]
async fn inspecting_a_module_whose_types_explode_prints_little() {
    let yard = Yard::open(&[], &[]).await;
    // Each takes a second or more to compile: both forms of the answer, in turn.
    for ((name, module), json) in modules().into_iter().zip([&[][..], &["--json"]].into_iter().cycle()) {
        let file = yard.site.path(&format!("{name}.wasm"));
        std::fs::write(&file, module).unwrap();
        // It runs outside of the yard's cage, so that its data is limited instead.
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -S -d 2097152 && exec \"$0\" \"$@\""]).arg(laelaps()).args(["plugin", "inspect"]);
        let answer = command.arg(&file).args(json).env_clear().current_dir(yard.site.folder()).output().await.unwrap();
        let text = String::from_utf8_lossy(&answer.stdout) + String::from_utf8_lossy(&answer.stderr);
        let start: String = text.chars().take(600).collect();
        assert_eq!(answer.status.code(), Some(7), "{name}: {}: {start}", answer.status);
        assert!(
            !text.contains("cannot set up") && !text.contains("cannot bound"),
            "{name}: the limit itself is in the way: {start}"
        );
        assert!(text.len() <= 1 << 20, "{name}: {} bytes: {start}", text.len());
        assert_printable(&text, true);
    }
}
