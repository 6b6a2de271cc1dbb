//! What was measured, in words and for programs, and what was promised of it.

use std::time::Duration;

use serde_json::{Value, json};

use crate::words::Words;

/// The middle of several measurements of the same, and how far they lie apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        // Of an even number what lies between the two in the middle.
        let median = if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) };
        Self { median, least: sorted[0], most: sorted[sorted.len() - 1] }
    }
}

/// The median, in milliseconds.
pub(crate) fn median_ms(times: &[Duration]) -> f64 {
    Spread::of(&times.iter().map(|time| time.as_secs_f64() * 1_000.0).collect::<Vec<f64>>()).median
}

/// The value of each round divided by the other's of the same round.
pub(crate) fn ratios(values: &[f64], others: &[f64]) -> Vec<f64> {
    values.iter().zip(others).map(|(value, other)| value / other).collect()
}

/// Of each round the best of several candidates.
pub(crate) fn best_of_rounds<'v>(candidates: impl Iterator<Item = &'v Vec<f64>>) -> Vec<f64> {
    candidates.fold(Vec::new(), |best, values| {
        if best.is_empty() { values.clone() } else { best.iter().zip(values).map(|(best, value)| best.max(*value)).collect() }
    })
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    fn is_kept_by(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
        }
    }

    fn words(self) -> String {
        match self {
            Self::AtLeast(least) => format!(">= {}", number(least)),
            Self::AtMost(most) => format!("<= {}", number(most)),
        }
    }
}

struct Promise {
    what: String,
    measured: f64,
    bound: Bound,
    unit: &'static str,
    remark: String,
}

/// Everything that was measured so far.
pub(crate) struct Report {
    json: bool,
    figures: Vec<Value>,
    promises: Vec<Promise>,
}

impl Report {
    pub(crate) fn new(words: &Words) -> Self {
        Self { json: words.json, figures: Vec::new(), promises: Vec::new() }
    }

    /// A line for people.
    pub(crate) fn say(&self, line: impl AsRef<str>) {
        if self.json { eprintln!("{}", line.as_ref()) } else { println!("{}", line.as_ref()) }
    }

    /// A figure, one value for each round.
    pub(crate) fn figure(&mut self, database: &str, what: &str, unit: &str, values: &[f64]) -> Spread {
        let spread = self.figure_quietly(database, what, unit, values);
        let Spread { median, least, most } = spread;
        let apart = format!("{} .. {}", number(least), number(most));
        self.say(format!("  {what:58} {:>10} {unit:8} {apart:>20}", number(median)));
        spread
    }

    /// A figure that stands in a table of its own.
    pub(crate) fn figure_quietly(&mut self, database: &str, what: &str, unit: &str, values: &[f64]) -> Spread {
        let spread = Spread::of(values);
        let Spread { median, least, most } = spread;
        self.figures.push(json!({
            "database": database, "what": what, "unit": unit, "median": median, "min": least, "max": most, "values": values,
        }));
        spread
    }

    /// Hold a figure against what was promised.
    pub(crate) fn promise(&mut self, what: String, measured: f64, bound: Bound, unit: &'static str, remark: impl Into<String>) {
        self.promises.push(Promise { what, measured, bound, unit, remark: remark.into() });
    }

    /// Print what was promised and what came of it; answers whether all was kept.
    pub(crate) fn conclude(self, words: &Words) -> bool {
        let mut kept = true;
        if !self.promises.is_empty() {
            self.say(format!("{:68} {:>12} {:>12}  kept?", "promise", "bound", "measured"));
        }
        for Promise { what, measured, bound, unit, remark } in &self.promises {
            let keeps = bound.is_kept_by(*measured);
            kept &= keeps;
            let answer = if keeps { "yes" } else { "NO" };
            let what = if unit.is_empty() { what.clone() } else { format!("{what}, {unit}") };
            self.say(format!("{what:68} {:>12} {:>12}  {answer:4} {remark}", bound.words(), number(*measured)));
        }
        if words.quick && !self.promises.is_empty() {
            self.say("(quick: smaller sizes and fewer rounds than was promised for)");
        }
        if words.json {
            let promises: Vec<Value> = self.promises.iter().map(Promise::to_json).collect();
            println!(
                "{}",
                json!({ "quick": words.quick, "rounds": words.rounds(), "figures": self.figures, "promises": promises })
            );
        }
        kept
    }
}

impl Promise {
    fn to_json(&self) -> Value {
        let (relation, bound) = match self.bound {
            Bound::AtLeast(least) => ("at least", least),
            Bound::AtMost(most) => ("at most", most),
        };
        json!({
            "what": self.what, "unit": self.unit, "measured": self.measured, "relation": relation, "bound": bound,
            "kept": self.bound.is_kept_by(self.measured), "remark": self.remark,
        })
    }
}

/// As many digits as say something.
fn number(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}
