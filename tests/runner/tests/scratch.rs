//! The runner on a package of its own, whose tests pass, fail, or do one after the other.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

const MANIFEST: &str = "[package]\nname = \"scratch\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[workspace]\n";

const TESTS: &str = r#"
#[test]
fn steady() {
    println!("waited 61.000 s for: the moon");
}

#[test]
fn shaky() {
    if !std::path::Path::new("passed").exists() {
        std::fs::write("passed", "").unwrap();
        panic!("the first time");
    }
    println!("the second time");
}

#[test]
fn broken() {
    panic!("every time");
}
"#;

/// nextest's reports as tests/run asks for them.
const CONFIGURATION: &str = "[profile.default.junit]\npath = \"junit.xml\"\nstore-success-output = true\n";

fn package() -> TempDir {
    let folder = TempDir::new().expect("a temporary folder");
    for (path, text) in [("Cargo.toml", MANIFEST), ("src/lib.rs", TESTS), (".config/nextest.toml", CONFIGURATION)] {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().expect("below the folder")).expect("a folder");
        fs::write(path, text).expect("a file");
    }
    folder
}

/// Runs the runner in the package.
fn run(package: &Path, arguments: &[&str]) -> Output {
    let mut runner = Command::new(env!("CARGO_BIN_EXE_laelaps-test-runner"));
    runner.current_dir(package).args(["--nextest", &nextest()]).args(arguments);
    // What the nextest around this test tells it is not meant for the one within.
    for (name, _) in variables().filter(|(name, _)| name.starts_with("NEXTEST") || name.starts_with("CARGO_")) {
        runner.env_remove(name);
    }
    runner.output().expect("the runner runs")
}

#[expect(clippy::disallowed_methods, reason = "tests read what the program that runs them sets")]
fn variables() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// The cargo-nextest that runs this test.
fn nextest() -> String {
    let given = variables().find(|(name, _)| name == "LAELAPS_TEST_NEXTEST").map(|(_, program)| program);
    given.unwrap_or_else(|| "cargo-nextest".to_owned())
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_flaky_test_is_named_kept_and_fails_only_a_strict_run() {
    let package = package();
    let lenient = run(package.path(), &["--", "steady", "shaky"]);
    let said = text(&lenient);
    assert_eq!(lenient.status.code(), Some(0), "{said}{}", String::from_utf8_lossy(&lenient.stderr));
    assert!(said.contains("tests/run: FLAKY scratch shaky\n"), "{said}");
    assert!(said.ends_with("\n2 passed, 0 failed, 0 skipped\n"), "{said}");
    for (which, expected) in [("first", "the first time"), ("again", "the second time")] {
        let kept = package.path().join(format!("target/tests/round-1/scratch-shaky.{which}.txt"));
        let kept = fs::read_to_string(&kept).unwrap_or_else(|error| panic!("{}: {error}", kept.display()));
        assert!(kept.contains(expected), "{which}: {kept}");
    }
    fs::remove_file(package.path().join("passed")).expect("the test has left it");
    let strict = run(package.path(), &["--strict", "--", "steady", "shaky"]);
    assert_eq!(strict.status.code(), Some(1), "{}", text(&strict));
    let steady = run(package.path(), &["--strict", "--", "steady", "shaky"]);
    let said = text(&steady);
    assert_eq!(steady.status.code(), Some(0), "{said}");
    assert!(!said.contains("FLAKY") && !package.path().join("target/tests").exists(), "an older run's outputs are gone: {said}");
}

#[test]
fn a_test_that_fails_again_fails_the_run_and_every_round_counts() {
    let package = package();
    fs::write(package.path().join("passed"), "").expect("a file");
    let output = run(package.path(), &["--repeat", "2", "--beside-load", "--skip", "shaky", "--left-out", "no moon"]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("tests/run: 2 busy loops run beside the tests\n"), "{said}");
    assert!(said.contains("tests/run: round 2 of 2: 1 passed, 1 failed, 1 skipped\n"), "{said}");
    assert!(said.contains("tests/run: FAILED scratch broken\n") && !said.contains("FLAKY"), "{said}");
    assert!(said.contains("tests/run: LEFT OUT: no moon\n"), "{said}");
    assert!(said.contains(" s  the moon\n"), "the slowest tests say what they waited for: {said}");
    assert!(said.ends_with("\n2 passed, 2 failed, 2 skipped\n"), "{said}");
}

#[test]
fn a_name_that_no_test_has_is_an_error() {
    let package = package();
    let output = run(package.path(), &["--", "nobody"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("no test's name contains [\"nobody\"]"), "{error}");
}
