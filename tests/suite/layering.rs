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
    // The compiler lets nobody else make a settlement, as long as the verdict in it is private.
    let settlement = fs::read_to_string(workspace_file("host/queue/src/settlement.rs")).unwrap();
    assert!(settlement.contains("\n    verdict: Verdict,\n"), "a settlement can only be made by Settlement::of");
    // Nor does anybody else make a verdict to go by; everybody else takes it apart.
    let verdicts = Regex::new(r"Verdict::(Finish|Wait|Fail)\s*\{[^{}]*\}").unwrap();
    let pattern = Regex::new(r"^\s*(=>|=[^=]|\||if\b)").unwrap();
    let decided: Vec<String> = sources()
        .filter(|(path, _)| path.starts_with("host/") && path.contains("/src/"))
        .filter(|(path, _)| path != "host/queue/src/settlement.rs" && !path.ends_with("/tests.rs"))
        .flat_map(|(path, text)| {
            let found = verdicts.find_iter(&text).filter(|found| {
                let statement = text[..found.start()].rsplit([';', '{', '}']).next().unwrap();
                !pattern.is_match(&text[found.end()..]) && !statement.contains("matches!(")
            });
            found.map(|found| format!("{path}: {}", found.as_str())).collect::<Vec<_>>()
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
        .filter(|(path, _)| ["host/queue/src", "host/daemon/src", "host/watchdog/src"].iter().any(|part| path.starts_with(part)))
        .filter(|(path, _)| !["host/daemon/src/cli/plugin/run.rs", "host/daemon/src/cli/check.rs"].contains(&path.as_str()))
        .flat_map(|(path, text)| {
            let lines = text.lines().take_while(|line| !line.contains("#[cfg(test)]"));
            let read = lines.filter(|line| read.is_match(line) && !line.trim_start().starts_with("//"));
            read.map(|line| format!("{path}: {line}")).collect::<Vec<_>>()
        })
        .collect();
    assert!(clocks.is_empty(), "time in leases and schedules is the database's:\n{}", clocks.join("\n"));
}

/// The contract as it was when 0.1.0 was frozen. Never to be changed.
const FROZEN: &str = "tests/data/wit-0.1.0";

#[test]
fn the_contract_that_plugins_are_built_against_does_not_change() {
    // Records, variants and enums of laelaps:worker@0.1.0 are frozen: a field or case more breaks every plugin that exists.
    let declaration = Regex::new(r"(?s)\b(record|variant|enum|flags|resource|type) [a-z0-9-]+( \{.*?\}| = [^;]*;)").unwrap();
    let mut compared = 0;
    for entry in fs::read_dir(workspace_file(FROZEN)).unwrap() {
        let file = entry.unwrap().file_name();
        let (frozen, current) = (code(&workspace_file(FROZEN).join(&file)), code(&workspace_file("wit").join(&file)));
        for declared in declaration.find_iter(&frozen) {
            let kept = declaration.find_iter(&current).any(|kept| kept.as_str() == declared.as_str());
            assert!(kept, "wit/{} no longer says `{}`", file.display(), declared.as_str());
            compared += 1;
        }
        let handle = "handle: func(task: task) -> result<outcome, failure>;";
        assert_eq!(current.contains(handle), file == "handler.wit", "what a plugin exports");
    }
    assert_eq!(compared, 13, "every type of the contract was compared");
}

#[test]
fn a_plugin_built_against_the_frozen_contract_fits_todays() {
    // Two packages of one version cannot be looked at together; the comparison heeds no versions.
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(workspace_file(FROZEN)).unwrap() {
        let entry = entry.unwrap();
        let text = fs::read_to_string(entry.path()).unwrap();
        fs::write(folder.path().join(entry.file_name()), text.replace("laelaps:worker@0.1.0;", "laelaps:worker@0.0.1;")).unwrap();
    }
    let mut resolve = wit_parser::Resolve::default();
    let (frozen, _) = resolve.push_dir(folder.path()).unwrap();
    let (current, _) = resolve.push_dir(workspace_file("wit")).unwrap();
    let [frozen, current] = [frozen, current].map(|package| resolve.select_world(&[package], Some("plugin")).unwrap());
    if let Err(error) = wit_component::semver_check(resolve, frozen, current) {
        panic!("a plugin that was built against {FROZEN} would be refused: {error:#}");
    }
}

/// A WIT file without comments, and with single blanks.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let code: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap_or("").trim()).collect();
    code.join(" ").split_whitespace().collect::<Vec<_>>().join(" ")
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
