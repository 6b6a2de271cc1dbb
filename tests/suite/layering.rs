//! Who may know what: the boundaries that design.md draws, checked in the sources themselves.

use std::fs;
use std::path::{Path, PathBuf};

use laelaps_tests::workspace_file;
use regex::Regex;

/// A crate, and the only place below `host/` and `sdk/` where Rust code may name it (a prefix of the path).
const HOMES: [(&str, &str); 5] = [
    ("sqlx", "host/queue/"),
    ("wasmtime", "host/daemon/src/plugin"),
    ("wasmtime_wasi", "host/daemon/src/plugin"),
    ("zookeeper_client", "host/watchdog/"),
    ("serde_yaml", "host/daemon/src/config"),
];

#[test]
fn each_foreign_crate_is_named_in_its_one_home_only() {
    let mut strays = Vec::new();
    for (path, text) in sources() {
        for (name, home) in HOMES {
            let named = Regex::new(&format!(r"\b{name}(::|;| as )")).unwrap();
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//") && named.is_match(line));
            strays
                .extend(lines.filter(|_| !path.starts_with(home)).map(|(number, line)| format!("{path}:{}: {line}", number + 1)));
        }
    }
    assert!(strays.is_empty(), "outside of their homes {HOMES:?}:\n{}", strays.join("\n"));
}

#[test]
fn the_queue_knows_neither_webassembly_nor_zookeeper() {
    let manifest = fs::read_to_string(workspace_file("host/queue/Cargo.toml")).unwrap();
    for stranger in ["wasmtime", "zookeeper", "wit-"] {
        assert!(!manifest.contains(stranger), "host/queue/Cargo.toml names {stranger}");
    }
}

#[test]
fn only_settlement_decides_what_follows_an_outcome() {
    // The verdict on an event is built in one file; everybody else takes it apart.
    let made = Regex::new(r"Verdict::(Finish|Wait|Fail)\s*\{[^}]*\}\s*(,|;|\))?\s*$").unwrap();
    let decided: Vec<String> = sources()
        .filter(|(path, _)| path.starts_with("host/daemon/src") && path != "host/queue/src/settlement.rs")
        .flat_map(|(path, text)| {
            text.lines()
                .filter(|line| made.is_match(line) && !line.contains("=>"))
                .map(|line| format!("{path}: {line}"))
                .collect::<Vec<_>>()
        })
        .collect();
    assert!(decided.is_empty(), "verdicts made outside of settlement.rs:\n{}", decided.join("\n"));
}

#[test]
fn no_part_of_the_host_reads_the_machine_s_clock() {
    // Clippy refuses the call too; this finds an exception to that rule where leases and schedules are kept. `plugin run` has no database
    // whose clock it could ask; `check` tells how far the two are apart.
    let read = Regex::new(r"SystemTime::now|Timestamp::now\(\)|Zoned::now|UNIX_EPOCH").unwrap();
    let clocks: Vec<String> = sources()
        .filter(|(path, _)| path.starts_with("host/queue/src") || path.starts_with("host/daemon/src"))
        .filter(|(path, _)| !["host/daemon/src/cli/plugin/run.rs", "host/daemon/src/cli/check.rs"].contains(&path.as_str()))
        .flat_map(|(path, text)| {
            let lines = text.lines().take_while(|line| !line.contains("#[cfg(test)]"));
            let read = lines.filter(|line| read.is_match(line) && !line.trim_start().starts_with("//"));
            read.map(|line| format!("{path}: {line}")).collect::<Vec<_>>()
        })
        .collect();
    assert!(clocks.is_empty(), "time in leases and schedules is the database's:\n{}", clocks.join("\n"));
}

#[test]
fn the_contract_that_plugins_are_built_against_does_not_change() {
    // Records, variants and enums of laelaps:worker@0.1.0 are frozen: a field or case more breaks every plugin that exists.
    let wit = workspace_file("wit");
    for (file, frozen) in [
        ("types.wit", "record task { key: string, kind: string, data: list<u8>, user: option<string>, attempt: u32, }"),
        ("types.wit", "record finished { output: option<list<u8>>, retention: option<milliseconds>, }"),
        ("types.wit", "variant outcome { finish(finished), retry(option<milliseconds>), release(option<milliseconds>), }"),
        ("types.wit", "enum failure-kind { retry, reject, }"),
        ("types.wit", "record failure { kind: failure-kind, code: string, message: string, }"),
        ("handler.wit", "handle: func(task: task) -> result<outcome, failure>;"),
        ("context.wit", "enum cancellation { graceful, immediate, lease-lost, }"),
    ] {
        let text = fs::read_to_string(wit.join(file)).unwrap();
        let code: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap_or("").trim()).collect();
        let code = code.join(" ").split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(code.contains(frozen), "wit/{file} no longer says `{frozen}`");
    }
}

/// Every Rust file below `host/` and `sdk/`, with its path from the root of the repository.
fn sources() -> impl Iterator<Item = (String, String)> {
    let root = workspace_file("");
    let mut files = Vec::new();
    for folder in ["host", "sdk"] {
        collect(&root.join(folder), &mut files);
    }
    assert!(files.len() > 10, "the sources are where they were");
    files.into_iter().map(move |file| {
        let path = file.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).unwrap();
        (path, text)
    })
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}
