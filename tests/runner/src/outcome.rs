//! What became of the tests.

use std::fmt::{Display, Formatter};
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

/// A test that was run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Test {
    /// nextest's name of the program that it is in, such as `laelaps-queue::conformance`.
    pub(crate) binary: String,
    /// Its name there.
    pub(crate) test: String,
    pub(crate) passed: bool,
    /// Whether it failed, and passed when it was run again alone.
    pub(crate) passed_again: bool,
    pub(crate) took: Duration,
    /// What it printed.
    pub(crate) output: String,
}

impl Test {
    pub(crate) fn name(&self) -> String {
        format!("{} {}", self.binary, self.test)
    }

    /// Keeps both outputs of a test that failed.
    pub(crate) fn keep(&self, folder: &Path, again: &str) -> anyhow::Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let name = self.name().replace(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_', "-");
        for (which, text) in [("first", self.output.as_str()), ("again", again)] {
            let path = folder.join(format!("{name}.{which}.txt"));
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

impl Counts {
    /// The sum of what libtest says in lines such as `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
    pub(crate) fn of_test_results(text: &str) -> Self {
        let mut counts = Self::default();
        for line in text.lines().filter_map(|line| line.strip_prefix("test result: ")) {
            let number = |unit: &str| {
                let words: Vec<&str> = line.split([' ', ';']).collect();
                let place = words.iter().position(|word| *word == unit)?;
                words.get(place.checked_sub(1)?)?.parse::<usize>().ok()
            };
            counts.passed += number("passed").unwrap_or(0);
            counts.failed += number("failed").unwrap_or(0);
            counts.skipped += number("ignored").unwrap_or(0);
        }
        counts
    }
}

impl Display for Counts {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// All tests, once.
#[derive(Debug, Default)]
pub(crate) struct Round {
    pub(crate) tests: Vec<Test>,
    /// The examples in documentation.
    pub(crate) documentation: Counts,
    pub(crate) took: Duration,
}

impl Round {
    /// A flaky test has passed in the end.
    pub(crate) fn counts(&self, left_out: usize) -> Counts {
        let passed = self.tests.iter().filter(|test| test.passed || test.passed_again).count();
        Counts {
            passed: passed + self.documentation.passed,
            failed: self.tests.len() - passed + self.documentation.failed,
            skipped: left_out + self.documentation.skipped,
        }
    }
}

/// All rounds.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) rounds: Vec<Round>,
}

impl Outcome {
    pub(crate) fn of(rounds: Vec<Round>) -> Self {
        Self { rounds }
    }

    pub(crate) fn counts(&self, left_out: usize) -> Counts {
        let mut sum = Counts::default();
        for round in &self.rounds {
            let counts = round.counts(left_out);
            sum.passed += counts.passed;
            sum.failed += counts.failed;
            sum.skipped += counts.skipped;
        }
        sum
    }

    /// Names of tests that failed and passed when run again alone; once for each round in which they did.
    pub(crate) fn flaky(&self) -> Vec<String> {
        self.with(|test| !test.passed && test.passed_again)
    }

    /// Names of tests that failed, and failed again.
    pub(crate) fn failed(&self) -> Vec<String> {
        self.with(|test| !test.passed && !test.passed_again)
    }

    fn with(&self, is_meant: impl Fn(&Test) -> bool) -> Vec<String> {
        self.rounds.iter().flat_map(|round| &round.tests).filter(|test| is_meant(test)).map(Test::name).collect()
    }

    /// Whether the run passes; one that is strict has no flaky test.
    pub(crate) fn passes(&self, strict: bool) -> bool {
        self.counts(0).failed == 0 && (!strict || self.flaky().is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(passed: bool, passed_again: bool) -> Test {
        Test { passed, passed_again, ..Test::default() }
    }

    #[test]
    fn a_flaky_test_fails_only_a_strict_run() {
        let flaky = Outcome::of(vec![Round { tests: vec![test(true, false), test(false, true)], ..Round::default() }]);
        assert_eq!(flaky.counts(3), Counts { passed: 2, failed: 0, skipped: 3 });
        assert!(flaky.passes(false) && !flaky.passes(true));
        let failed = Outcome::of(vec![Round { tests: vec![test(false, false)], ..Round::default() }]);
        assert!(!failed.passes(false) && !failed.passes(true));
    }

    #[test]
    fn documentation_is_counted_by_what_libtest_says() {
        let text = "running 2 tests\ntest result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s\n\
            test result: FAILED. 0 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s\n";
        assert_eq!(Counts::of_test_results(text), Counts { passed: 2, failed: 4, skipped: 1 });
    }
}
