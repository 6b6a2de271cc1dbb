//! The closing lines.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;

use crate::outcome::{Outcome, Test};

/// Tests that are listed as the slowest.
const SLOWEST: usize = 10;
/// What is said of each of them: the longest waits.
const WAITS: usize = 3;
/// Letters that are kept of what a test waited for.
const WAIT_LETTERS_MAX: usize = 90;

/// The slowest tests, what was left out, what failed or is flaky, and, as the last line, the counts.
pub(crate) fn closing(outcome: &Outcome, reasons: &[String], left_out: usize, took: &[(&str, Duration)]) -> String {
    let mut text = slowest(outcome);
    let mut line = |line: String| writeln!(text, "tests/run: {line}").expect("text can be written");
    for reason in reasons {
        line(format!("LEFT OUT: {reason}"));
    }
    for name in outcome.failed() {
        line(format!("FAILED {name}"));
    }
    let flaky = outcome.flaky();
    for name in &flaky {
        line(format!("FLAKY {name}"));
    }
    if !flaky.is_empty() {
        line(format!("a flaky test failed, and passed when it was run again alone; {} has both outputs", crate::KEPT));
    }
    let took: Vec<String> = took.iter().map(|(part, took)| format!("{part} took {}", in_words(*took))).collect();
    line(took.join(", "));
    text + &format!("{}\n", outcome.counts(left_out))
}

/// Minutes and seconds.
fn in_words(duration: Duration) -> String {
    let seconds = duration.as_secs();
    format!("{} min {} s", seconds / 60, seconds % 60)
}

fn slowest(outcome: &Outcome) -> String {
    let mut tests: Vec<&Test> = outcome.rounds.iter().flat_map(|round| &round.tests).collect();
    tests.sort_by_key(|test| std::cmp::Reverse(test.took));
    let mut text = String::from("tests/run: the slowest tests, and what each waited for\n");
    for test in tests.into_iter().take(SLOWEST) {
        writeln!(text, "  {:6.1} s  {}", test.took.as_secs_f64(), test.name()).expect("text can be written");
        for (what, wait) in waits(&test.output).into_iter().take(WAITS) {
            let (what, times) = match wait.times {
                1 => (wait.first, String::new()),
                times => (what, format!(" ({times} times)")),
            };
            let what: String = what.chars().take(WAIT_LETTERS_MAX).collect();
            writeln!(text, "            {:6.1} s  {what}{times}", wait.sum.as_secs_f64()).expect("text can be written");
        }
    }
    text
}

/// How long a test waited for something, and how often.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wait {
    sum: Duration,
    times: usize,
    /// In the test's own words.
    first: String,
}

/// What a test says of its waits (tests/src/patience.rs prints `waited 1.234 s for: WHAT`), the longest first.
fn waits(output: &str) -> Vec<(String, Wait)> {
    let mut waits: HashMap<String, Wait> = HashMap::new();
    for line in output.lines() {
        let Some((seconds, what)) = line.strip_prefix("waited ").and_then(|line| line.split_once(" s for: ")) else { continue };
        let Ok(seconds) = seconds.parse::<f64>() else { continue };
        let Ok(waited) = Duration::try_from_secs_f64(seconds) else { continue };
        // Numbers tell apart what is of one kind: task 1, task 2.
        let kind: String = what.chars().map(|letter| if letter.is_ascii_digit() { '#' } else { letter }).collect();
        let wait = waits.entry(kind).or_insert_with(|| Wait { first: what.to_owned(), ..Wait::default() });
        wait.sum += waited;
        wait.times += 1;
    }
    let mut waits: Vec<_> = waits.into_iter().collect();
    waits.sort_by(|(one, a), (other, b)| b.sum.cmp(&a.sum).then_with(|| one.cmp(other)));
    waits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Round;

    #[test]
    fn waits_of_one_kind_are_added_up_and_the_longest_stands_first() {
        let output = "waited 0.250 s for: task a-1\nother\nwaited 3.000 s for: READY\nwaited 0.500 s for: task a-2\nwaited x s for: nothing\n";
        let wait = |millis, times, first: &str| Wait { sum: Duration::from_millis(millis), times, first: first.to_owned() };
        let expected = [("READY".to_owned(), wait(3_000, 1, "READY")), ("task a-#".to_owned(), wait(750, 2, "task a-1"))];
        assert_eq!(waits(output), expected);
    }

    #[test]
    fn the_counts_are_the_last_line_and_each_flaky_test_has_one() {
        let test = |name: &str, passed, passed_again, seconds| Test {
            binary: "suite".to_owned(),
            test: name.to_owned(),
            passed,
            passed_again,
            took: Duration::from_secs(seconds),
            output: String::new(),
        };
        let tests = vec![test("quick", true, false, 1), test("shaky", false, true, 3), test("broken", false, false, 2)];
        let outcome = Outcome::of(vec![Round { tests, ..Round::default() }]);
        let text = closing(
            &outcome,
            &["tests of Z: no Z".to_owned()],
            7,
            &[("building", Duration::from_secs(9)), ("testing", Duration::from_secs(61))],
        );
        let expected = "tests/run: the slowest tests, and what each waited for
     3.0 s  suite shaky
     2.0 s  suite broken
     1.0 s  suite quick
tests/run: LEFT OUT: tests of Z: no Z
tests/run: FAILED suite broken
tests/run: FLAKY suite shaky
tests/run: a flaky test failed, and passed when it was run again alone; target/tests has both outputs
tests/run: building took 0 min 9 s, testing took 1 min 1 s
2 passed, 1 failed, 7 skipped
";
        assert_eq!(text, expected);
    }
}
