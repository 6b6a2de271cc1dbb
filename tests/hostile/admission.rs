//! Files in the plugin folder that are no plugins, and modules that attack whoever reads, compiles or starts them.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::process::Command;

use laelaps_queue::State;
use laelaps_tests::{LONG, guest, scaled, with_edition};
use serde_json::json;

use super::wat::{HANDLE, plugin, room};
use super::yard::fresh_number;
use super::{Yard, attack, refusals};

#[tokio::test]
async fn what_is_no_module_is_refused_by_what_it_is_and_nothing_blocks() {
    let mut yard = Yard::open(&[], &[]).await;
    yard.survives("files that are no modules", async |yard, round| {
        let path = |name: &str| yard.site.plugin_path(&format!("{name}-{round}"));
        // Moved in, so that what is seen is whole.
        assert!(Command::new("mkfifo").arg(path("pipe")).status().unwrap().success());
        fs::create_dir(path("folder")).unwrap();
        symlink("nowhere", path("dangling")).unwrap();
        symlink(path("itself"), path("itself")).unwrap();
        symlink("/dev/zero", path("device")).unwrap();
        File::create(path("empty")).unwrap();
        let sparse = File::create(yard.site.path("sparse")).unwrap();
        sparse.set_len(300 << 20).unwrap();
        fs::rename(yard.site.path("sparse"), path("sparse")).unwrap();
        let expected = [
            ("pipe", "it is not a file"),
            ("folder", "it is not a file"),
            ("device", "it is not a file"),
            ("empty", "empty"),
            ("sparse", "314572800 bytes"),
        ];
        for (name, reason) in expected {
            let line = refusals(yard, &format!("{name}-{round}"), 1).await;
            assert!(line.contains(reason), "{name}: {line}");
        }
        for name in ["pipe", "dangling", "itself", "device", "empty", "sparse"] {
            fs::remove_file(yard.site.plugin_path(&format!("{name}-{round}"))).unwrap();
        }
        fs::remove_dir(yard.site.plugin_path(&format!("folder-{round}"))).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_module_that_does_not_start_is_refused_while_others_serve() {
    let handler = format!("(func (export \"handle\") {HANDLE} unreachable)");
    let start = |body: &str| plugin(&format!("{handler} (func $start {body}) (start $start)"));
    let big = room(
        "(memory (export \"memory\") 2000) (func (export \"cabi_realloc\") (param i32 i32 i32 i32) (result i32) unreachable)",
        "unreachable",
    );
    let modules = [
        ("spins", start("(loop $l (br $l))"), "does not start within 10 s"),
        ("traps", start("unreachable"), "it cannot be started"),
        ("recurses", start("(call $start)"), "overflowed"),
        ("divides", start("(drop (i32.div_u (i32.const 1) (i32.const 0)))"), "it cannot be started"),
        ("big", big, "memory"),
    ];
    let mut yard = Yard::open(&[], &[]).await;
    let mut times = 0;
    yard.survives("modules that do not start", async |yard, _round| {
        times += 1;
        for (name, module, _) in &modules {
            yard.plug(name, module);
        }
        for (name, _, reason) in &modules {
            let line = refusals(yard, name, times).await;
            assert!(line.contains(reason), "{name}: {line}");
        }
    })
    .await;
}

/// Modules that are much work for a compiler, `size` times as much as the smallest of their kind.
fn bombs(size: usize) -> Vec<(&'static str, Vec<u8>)> {
    let handler = format!("(import \"room\" \"memory\" (memory 1)) (func (export \"handle\") {HANDLE} unreachable)");
    let with = |text: String| plugin(&format!("{handler} {text}"));
    let step = "(local.set 0 (i64.mul (i64.add (local.get 0) (i64.load (i32.wrap_i64 (local.get 0)))) (i64.const 7)))";
    let nested = |depth: usize| format!("(func {} {})", "block ".repeat(depth), "end ".repeat(depth));
    let locals = format!("(func (local {}))", "i64 ".repeat(45_000));
    let table: String = (0..size * 2_000).map(|_| "0 ").collect();
    vec![
        ("one-function", with(format!("(func (param i64) {})", step.repeat(size * 1_000)))),
        ("many-functions", with("(func)".repeat(size * 4_000))),
        ("deep-blocks", with(nested(size * 2_000))),
        ("many-locals", with(locals.repeat(size))),
        ("wide-table", with(format!("(func (param i32) (block (br_table {table} 0 (local.get 0))))"))),
        (
            "many-types",
            with((0..size * 500).map(|number| format!("(type (func (param {})))", "i32 ".repeat(number % 900))).collect()),
        ),
        ("many-segments", with("(data (i32.const 0) \"x\")".repeat(size * 1_000))),
        ("many-exports", with((0..size * 1_000).map(|number| format!("(func (export \"f{number}\"))")).collect())),
    ]
}

#[tokio::test]
async fn a_module_that_is_much_work_to_compile_costs_the_host_nothing() {
    let bombs = bombs(scaled(30));
    let mut yard = Yard::open(&[], &[]).await;
    let mut times = 0;
    yard.survives("modules that are much work to compile", async |yard, _round| {
        times += 1;
        for (name, module) in &bombs {
            yard.plug(name, module);
        }
        for (name, _) in &bombs {
            let named = format!("plugin={name} ");
            // It serves then, or is refused.
            yard.until(LONG, &format!("{name} is decided"), async |yard| {
                let lines = yard.host.lines_with(&named);
                if lines.len() >= times { Ok(()) } else { Err(format!("{lines:?}")) }
            })
            .await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_file_that_is_replaced_all_the_time_serves_in_its_last_edition() {
    let mut yard = Yard::open(&[json!({ "pattern": "^flutter$", "plugin": "flutter" })], &[]).await;
    let (noop, edition) = (guest("noop"), fresh_number());
    let mut last = 0;
    yard.survives("a file that is replaced all the time", async |yard, round| {
        for number in 0..u32::try_from(scaled(500)).unwrap() {
            let path = yard.site.plugin_path("flutter");
            match number % 5 {
                0 => fs::write(&path, &noop[..noop.len() / 2]).unwrap(),
                1 => drop(fs::remove_file(&path)),
                2 => fs::write(&path, "no module").unwrap(),
                _ => yard.site.plug("flutter", &with_edition(&noop, edition.wrapping_add(number % 7))),
            }
            tokio::task::yield_now().await;
        }
        last += 1;
        yard.plug("flutter", &noop);
        let ended = yard.ends(&[attack(format!("flutter-{round}"), "flutter", json!({}))]).await;
        assert_eq!(ended[0].state, State::Finished, "{:?}", ended[0].error_message);
    })
    .await;
    assert!(last > 0);
}
