//! Mutated configurations: read as one, or refused with a place.

use std::fs;
use std::path::Path;
use std::time::Duration;

use laelaps::config::{Config, Source};
use laelaps_tests::{Dice, Mutation, workspace_file};

use super::{assert_no_panic, count_panics, peak_bytes};
use crate::support::PATIENCE;

/// What reading a configuration may cost this process.
const HOST_BYTES_MAX: u64 = 512 << 20;

/// What YAML and the configuration have signs and words for.
const WORDS: [&str; 36] = [
    "&a ",
    "*a",
    "<<: *a",
    "<<: [*a, *a]",
    "- ",
    ": ",
    "? ",
    "!!binary ",
    "!!set ",
    "!tag ",
    "| ",
    "> ",
    "{",
    "}",
    "[",
    "]",
    "\"",
    "'",
    "%",
    "# ",
    "---\n",
    "...\n",
    "\t",
    "~",
    "null",
    ".inf",
    "-.nan",
    "1e999",
    "0x7fffffffffffffff",
    "-1",
    "18446744073709551616",
    "9999999999h",
    "64MiB",
    "\u{feff}",
    "\u{85}",
    "\u{1b}[31m",
];

/// Every block of YAML in the documentation, and one section with each key that the tests of other parts write.
fn corpus() -> Vec<String> {
    let mut blocks = vec![
        "development:\n  type: rdb\n  url: sqlite:queue.db\n  routes:\n  - {type: mail, plugin: mail, memory: 64MiB, time_limit: 5s}\n".to_owned(),
        "a: &a {retry_wait: 5s}\ndevelopment:\n  <<: *a\n  type: rdb\n  url: sqlite:queue.db\n  processors: 2\n".to_owned(),
    ];
    let pages = fs::read_dir(workspace_file("docs")).expect("docs").flatten().map(|entry| entry.path());
    for page in pages.chain([workspace_file("README.md")]) {
        let text = fs::read_to_string(page).expect("a page");
        let mut fences = text.split("\n```");
        while let Some(fence) = fences.next() {
            if let Some((_, block)) = fence.split_once("yaml\n") {
                blocks.push(block.to_owned());
                fences.next();
            }
        }
    }
    blocks
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mutated_configuration_is_read_or_refused_with_its_place() {
    count_panics();
    let corpus = corpus();
    assert!(corpus.len() > 8, "the documentation has blocks of YAML");
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("laelaps.yml");
    let (mut valid, mut cases) = (0_u32, 0_u32);
    let mut mutation = Mutation::begin("configurations");
    while let Some(mut dice) = mutation.next_case() {
        let text = mutated(&mut dice, &corpus);
        fs::write(&path, &text).expect("written");
        let source = Source { path: Some(path.clone()), environment: dice.one_in(2).then(|| "development".to_owned()) };
        let load = tokio::task::spawn_blocking(move || Config::load(&source));
        let loaded = tokio::time::timeout(PATIENCE, load).await.expect("it is decided about").expect("no panic");
        cases += 1;
        match loaded {
            Ok(_) => valid += 1,
            Err(error) => assert_tells_a_place(&error, &path),
        }
        assert_no_panic();
        assert!(peak_bytes() < HOST_BYTES_MAX, "this process came to {} MiB", peak_bytes() >> 20);
    }
    println!("measured: mutated configurations that are valid: {valid} of {cases}");
}

fn assert_tells_a_place(error: &laelaps::config::Error, path: &Path) {
    let text = error.to_string();
    assert!(text.starts_with(&path.display().to_string()), "no file is named: {text}");
    assert!(!error.problems().is_empty(), "{text}");
    for problem in error.problems() {
        assert!(!problem.message.is_empty() && problem.message.len() <= 4_096, "{} bytes: {problem}", problem.message.len());
    }
}

fn mutated(dice: &mut Dice, corpus: &[String]) -> Vec<u8> {
    let mut text = corpus[dice.below(corpus.len())].clone();
    let other = &corpus[dice.below(corpus.len())];
    for _ in 0..=dice.below(6) {
        text = match dice.below(6) {
            0 => with_word(dice, &text),
            1 => with_lines_moved(dice, &text, other),
            2 => with_nesting(dice, &text),
            3 => with_value(dice, &text),
            4 => with_much(dice, &text),
            _ => text,
        };
    }
    let mut bytes = text.into_bytes();
    if dice.one_in(3) {
        dice.mutate(&mut bytes, other.as_bytes());
    }
    bytes
}

/// A place between two characters.
fn place(dice: &mut Dice, text: &str) -> usize {
    let mut at = dice.below(text.len() + 1);
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

fn with_word(dice: &mut Dice, text: &str) -> String {
    let at = place(dice, text);
    format!("{}{}{}", &text[..at], dice.choose(&WORDS), &text[at..])
}

fn with_lines_moved(dice: &mut Dice, text: &str, other: &str) -> String {
    let mut lines: Vec<&str> = text.lines().collect();
    let others: Vec<&str> = other.lines().collect();
    if lines.is_empty() || others.is_empty() {
        return text.to_owned();
    }
    let (at, to) = (dice.below(lines.len()), dice.below(lines.len()));
    match dice.below(4) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(to, lines[at]),
        2 => lines.swap(at, to),
        _ => lines.insert(to, others[dice.below(others.len())]),
    }
    lines.join("\n")
}

fn with_nesting(dice: &mut Dice, text: &str) -> String {
    let at = place(dice, text);
    let depth = 1 << dice.below(14);
    format!("{}{}{}", &text[..at], dice.choose(&["[", "{a: ", "- ", "? ", "!!x "]).repeat(depth), &text[at..])
}

/// Another value behind some colon.
fn with_value(dice: &mut Dice, text: &str) -> String {
    let colons: Vec<usize> = text.match_indices(": ").map(|(at, _)| at + 2).collect();
    if colons.is_empty() {
        return text.to_owned();
    }
    let at = colons[dice.below(colons.len())];
    let end = text[at..].find(['\n', ',', '}']).map_or(text.len(), |length| at + length);
    let value = match dice.below(4) {
        0 => dice.number().to_string(),
        1 => String::from_utf8_lossy(&dice.bytes(20)).into_owned(),
        2 => "x".repeat(1 << dice.below(16)),
        _ => (*dice.choose(&WORDS)).to_owned(),
    };
    format!("{}{value}{}", &text[..at], &text[end..])
}

/// Anchors that multiply what they name.
fn with_much(dice: &mut Dice, text: &str) -> String {
    if !dice.one_in(8) {
        return text.to_owned();
    }
    let (entries, aliases) = (1 << dice.below(15), 1 << dice.below(15));
    let list = format!("much: &much [{}]\nmore: [{}]\n", "1, ".repeat(entries), "*much, ".repeat(aliases));
    format!("{list}{text}")
}

#[test]
fn aliases_that_multiply_a_configuration_are_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("laelaps.yml");
    // 200 KB that would be 900 million values, the second time with a mark in it that one of the two YAML libraries takes.
    for sign in ["", "\u{feff}"] {
        let list = format!("much: &much [{sign}{}]\nmore: [{}]\n", "1,".repeat(30_000), "*much,".repeat(20_000));
        fs::write(&path, format!("{list}development:\n  type: rdb\n  url: sqlite:queue.db\n")).expect("written");
        let before = std::time::Instant::now();
        let error = Config::load(&Source { path: Some(path.clone()), environment: None }).expect_err("refused");
        println!("measured: refusing aliases that multiply: {:?}", before.elapsed().max(Duration::from_millis(1)));
        assert_tells_a_place(&error, &path);
        assert!(error.to_string().contains("alias"), "{error}");
    }
}
