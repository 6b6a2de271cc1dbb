//! What the queue's clock can have shown, when steps of it are known.

use super::history::Moment;

struct Step {
    begun: Moment,
    ended: Moment,
    ahead_ms: i64,
}

/// The queue's clock. Until it steps it shows what ours does.
#[derive(Default)]
pub(super) struct Clock {
    /// In their order.
    steps: Vec<Step>,
}

impl Clock {
    pub(super) fn step(&mut self, begun: Moment, ended: Option<Moment>, ahead_ms: i64) {
        self.steps.push(Step { begun, ended: ended.unwrap_or(Moment::MAX), ahead_ms });
    }

    /// The latest it can have shown between two moments, in milliseconds.
    pub(super) fn latest(&self, from: Moment, to: Moment) -> i64 {
        let shown = self.stretches(from, to).map(|(_, last, ahead_ms)| ms(last).saturating_add(ahead_ms));
        shown.max().unwrap_or(i64::MAX)
    }

    /// The earliest it can have shown between two moments, in milliseconds.
    pub(super) fn earliest(&self, from: Moment, to: Moment) -> i64 {
        let shown = self.stretches(from, to).map(|(first, _, ahead_ms)| ms(first).saturating_add(ahead_ms));
        shown.min().unwrap_or(i64::MIN)
    }

    /// The parts of a time in which it may have been so far ahead.
    fn stretches(&self, from: Moment, to: Moment) -> impl Iterator<Item = (Moment, Moment, i64)> {
        let begins = [(0, 0)].into_iter().chain(self.steps.iter().map(|step| (step.begun, step.ahead_ms)));
        let ends = self.steps.iter().map(|step| step.ended).chain([Moment::MAX]);
        let stretches = begins.zip(ends).map(move |((begin, ahead_ms), end)| (begin.max(from), end.min(to), ahead_ms));
        stretches.filter(|(first, last, _)| first <= last)
    }
}

fn ms(moment: Moment) -> i64 {
    i64::try_from(moment / 1_000).unwrap_or(i64::MAX)
}
