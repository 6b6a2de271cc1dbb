//! cargo-nextest: which tests there are, and what became of them.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use quick_junit::{Report, TestCaseStatus};
use serde::Deserialize;
use tokio::process::Command;

use crate::Arguments;
use crate::outcome::{Counts, Test};
use crate::servers::Servers;

/// nextest's report, below the folder of the workspace (.config/nextest.toml names the file).
const REPORT: &str = "target/nextest/default/junit.xml";

/// Tells the tests of the runner itself (tests/runner/tests) which cargo-nextest there is.
const PROGRAM: &str = "LAELAPS_TEST_NEXTEST";

/// nextest's exit code if tests failed.
const TESTS_FAILED: i32 = 100;

pub(crate) struct Nextest {
    program: String,
    cargo: Vec<String>,
    names: Vec<String>,
    skips: Vec<String>,
    at_once: u16,
    figures: bool,
}

/// The tests of a run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    /// Binary and name.
    pub(crate) tests: Vec<(String, String)>,
    /// How many more there would be if nothing was skipped.
    pub(crate) left_out: usize,
}

/// What came of a test that was run alone.
pub(crate) struct Again {
    pub(crate) passed: bool,
    pub(crate) output: String,
}

impl Nextest {
    pub(crate) fn new(arguments: &Arguments) -> Self {
        Self {
            program: arguments.nextest.clone(),
            cargo: arguments.cargo.clone(),
            names: arguments.names.clone(),
            skips: arguments.skips.clone(),
            at_once: if arguments.figures { 1 } else { arguments.at_once },
            figures: arguments.figures,
        }
    }

    /// Finds the tests whose names contain one of the wanted ones, and parts them into chosen and skipped.
    pub(crate) async fn list(&self) -> anyhow::Result<Chosen> {
        let mut command = self.command("list");
        command.args(["--message-format", "json", "--"]).args(&self.names).stderr(Stdio::inherit());
        let output = command.output().await.with_context(|| self.cannot_run())?;
        ensure!(output.status.success(), "cargo-nextest could not list the tests ({})", output.status);
        chosen(&output.stdout, &self.skips)
    }

    /// Runs the chosen tests, and returns what became of each.
    pub(crate) async fn run(&self, chosen: &Chosen, servers: &Servers) -> anyhow::Result<Vec<Test>> {
        if chosen.tests.is_empty() {
            return Ok(Vec::new());
        }
        remove_report()?;
        let mut command = self.command("run");
        command.args(["--no-fail-fast", "--test-threads"]).arg(self.at_once.to_string()).envs(servers.environment());
        if self.figures {
            command.args(["--success-output", "immediate"]);
        }
        command.arg("--").args(&self.names);
        for skip in &self.skips {
            command.args(["--skip", skip]);
        }
        let status = command.status().await.with_context(|| self.cannot_run())?;
        let mut tests = read_report(status)?;
        add_missing(&mut tests, chosen);
        Ok(tests)
    }

    /// Runs one test, with nothing beside it.
    pub(crate) async fn again(&self, test: &Test, servers: &Servers) -> anyhow::Result<Again> {
        let mut command = self.command("run");
        let one = format!("binary_id(={}) & test(={})", test.binary, test.test);
        command.args(["--test-threads", "1", "--success-output", "immediate", "-E", &one]).envs(servers.environment());
        let output = command.output().await.with_context(|| self.cannot_run())?;
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        Ok(Again { passed: output.status.success(), output: text })
    }

    /// Runs the examples in documentation, which nextest does not know of.
    pub(crate) async fn documentation(&self) -> anyhow::Result<Counts> {
        let mut command = Command::new("cargo");
        command.args(["test", "--doc", "--no-fail-fast"]).args(&self.cargo).arg("--").args(&self.names);
        for skip in &self.skips {
            command.args(["--skip", skip]);
        }
        let output = command.stderr(Stdio::inherit()).stdin(Stdio::null()).output().await.context("cargo cannot be run")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let counts = Counts::of_test_results(&text);
        if !output.status.success() {
            print!("{text}");
        }
        println!("tests/run: examples in documentation: {counts}");
        ensure!(
            output.status.success() || counts.failed > 0,
            "the examples in documentation could not be run ({})",
            output.status
        );
        Ok(counts)
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["nextest", verb]).args(&self.cargo).env(PROGRAM, &self.program).stdin(Stdio::null());
        command
    }

    fn cannot_run(&self) -> String {
        format!("{} cannot be run; tests/run --prepare installs it", self.program)
    }
}

/// What `nextest list` prints, as far as it matters.
#[derive(Deserialize)]
struct List {
    #[serde(rename = "rust-suites")]
    suites: BTreeMap<String, Suite>,
}

#[derive(Deserialize)]
struct Suite {
    #[serde(default)]
    testcases: BTreeMap<String, Listed>,
}

#[derive(Deserialize)]
struct Listed {
    #[serde(rename = "filter-match")]
    filter: Filter,
}

#[derive(Deserialize)]
struct Filter {
    status: String,
}

fn chosen(list: &[u8], skips: &[String]) -> anyhow::Result<Chosen> {
    let list: List = serde_json::from_slice(list).context("cargo-nextest's list is not as it was")?;
    let mut chosen = Chosen { tests: Vec::new(), left_out: 0 };
    for (binary, suite) in list.suites {
        for (name, _) in suite.testcases.into_iter().filter(|(_, test)| test.filter.status == "matches") {
            if skips.iter().any(|skip| name.contains(skip.as_str())) {
                chosen.left_out += 1;
            } else {
                chosen.tests.push((binary.clone(), name));
            }
        }
    }
    Ok(chosen)
}

/// Takes an older run's report away, so that it cannot stand for this one's.
fn remove_report() -> anyhow::Result<()> {
    match std::fs::remove_file(REPORT) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).with_context(|| format!("cannot remove {REPORT}")),
        _ => Ok(()),
    }
}

fn read_report(status: ExitStatus) -> anyhow::Result<Vec<Test>> {
    if !status.success() && status.code() != Some(TESTS_FAILED) && !Path::new(REPORT).exists() {
        bail!("cargo-nextest ended with {status}, and left no report");
    }
    let text = std::fs::read_to_string(REPORT).with_context(|| format!("{REPORT} cannot be read"))?;
    tests_of(&text)
}

fn tests_of(report: &str) -> anyhow::Result<Vec<Test>> {
    let report = Report::deserialize_from_str(report).with_context(|| format!("{REPORT} is no report of tests"))?;
    let mut tests = Vec::new();
    for suite in report.test_suites {
        for case in suite.test_cases {
            if matches!(case.status, TestCaseStatus::Skipped { .. }) {
                continue;
            }
            let output =
                |text: &Option<quick_junit::XmlString>| text.as_ref().map(|text| text.as_str().to_owned()).unwrap_or_default();
            tests.push(Test {
                binary: suite.name.as_str().to_owned(),
                test: case.name.as_str().to_owned(),
                passed: matches!(case.status, TestCaseStatus::Success { .. }),
                passed_again: false,
                took: case.time.unwrap_or(Duration::ZERO),
                output: output(&case.system_out) + &output(&case.system_err),
            });
        }
    }
    Ok(tests)
}

/// What was chosen and is not in the report did not run, and has not passed.
fn add_missing(tests: &mut Vec<Test>, chosen: &Chosen) {
    let reported: std::collections::HashSet<(&str, &str)> =
        tests.iter().map(|test| (test.binary.as_str(), test.test.as_str())).collect();
    let is_missing = |(binary, name): &&(String, String)| !reported.contains(&(binary.as_str(), name.as_str()));
    let missing: Vec<Test> = chosen
        .tests
        .iter()
        .filter(is_missing)
        .map(|(binary, name)| Test {
            binary: binary.clone(),
            test: name.clone(),
            output: "cargo-nextest reported nothing of this test".to_owned(),
            ..Test::default()
        })
        .collect();
    tests.extend(missing);
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &[u8] = br#"{"rust-suites": {
        "queue::conformance": {"testcases": {
            "on_postgres::a": {"ignored": false, "filter-match": {"status": "matches"}},
            "on_sqlite::a": {"ignored": false, "filter-match": {"status": "matches"}},
            "on_sqlite::b": {"ignored": false, "filter-match": {"status": "mismatch", "reason": "string"}}}},
        "empty": {}}}"#;

    #[test]
    fn what_is_skipped_is_counted_by_the_test_and_what_was_not_asked_for_is_not() {
        let chosen = chosen(LIST, &["on_postgres::".to_owned()]).unwrap();
        assert_eq!(chosen, Chosen { tests: vec![("queue::conformance".to_owned(), "on_sqlite::a".to_owned())], left_out: 1 });
    }

    #[test]
    fn a_test_that_no_report_mentions_has_failed() {
        let chosen = chosen(LIST, &[]).unwrap();
        let report = r#"<testsuites name="r" tests="1" failures="0" errors="0"><testsuite name="queue::conformance" tests="1" disabled="0" errors="0" failures="0">
            <testcase name="on_sqlite::a" time="1.5"><system-out>hello</system-out></testcase></testsuite></testsuites>"#;
        let mut tests = tests_of(report).unwrap();
        add_missing(&mut tests, &chosen);
        let seen: Vec<(&str, bool)> = tests.iter().map(|test| (test.test.as_str(), test.passed)).collect();
        assert_eq!(seen, [("on_sqlite::a", true), ("on_postgres::a", false)]);
        assert_eq!((tests[0].took, tests[0].output.as_str()), (Duration::from_millis(1_500), "hello"));
    }
}
