//! In which order two operations do their statements.

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Left,
    Right,
}

impl Side {
    pub(super) const BOTH: [Self; 2] = [Self::Left, Self::Right];

    pub(super) fn other(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
        }
    }

    pub(super) fn place(self) -> usize {
        usize::from(self == Self::Right)
    }
}

/// Whose statement is next, again and again; after the last one whoever has not ended goes on. A side that waits for a lock or has ended gives
/// its turn away, and has it later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Schedule {
    turns: Vec<Side>,
    done: usize,
}

impl Schedule {
    fn of(turns: Vec<Side>) -> Self {
        Self { turns, done: 0 }
    }

    /// One after the other.
    pub(super) fn serial(first: Side) -> Self {
        Self::of(vec![first; STATEMENTS_MAX])
    }

    /// One does so many statements, then the other all of its own, then the first one the rest.
    pub(super) fn one_switch(first: Side, statements: usize) -> Self {
        let mut turns = vec![first; statements];
        turns.extend([first.other(); STATEMENTS_MAX]);
        Self::of(turns)
    }

    /// All orders of so many statements of each.
    pub(super) fn all(statements: [usize; 2]) -> Vec<Self> {
        let mut orders = vec![(Vec::new(), statements)];
        for _ in 0..statements[0] + statements[1] {
            orders = orders
                .into_iter()
                .flat_map(|(turns, left)| Side::BOTH.map(|side| longer(&turns, left, side)))
                .flatten()
                .collect();
        }
        orders.into_iter().map(|(turns, _)| Self::of(turns)).collect()
    }

    /// Any order of so many statements of each. Runs of one side are as likely to be long as short: few switches find more than many.
    pub(super) fn random(statements: [usize; 2], random: &mut fastrand::Rng) -> Self {
        let mut turns = Vec::new();
        let mut left = statements;
        let mut side = Side::BOTH[random.usize(..2)];
        while left[0] + left[1] > 0 {
            let run = random.usize(..=left[side.place()]);
            turns.extend(std::iter::repeat_n(side, run));
            left[side.place()] -= run;
            side = side.other();
        }
        Self::of(turns)
    }

    /// Whose turn it is, of those that can go on. None if neither can.
    pub(super) fn next(&mut self, can_go_on: [bool; 2]) -> Option<Side> {
        let wanted = self.turns.get(self.done).copied();
        match wanted {
            Some(side) if can_go_on[side.place()] => {
                self.done += 1;
                Some(side)
            }
            Some(side) => Some(side.other()).filter(|side| can_go_on[side.place()]),
            None => Side::BOTH.into_iter().find(|side| can_go_on[side.place()]),
        }
    }
}

/// No operation has so many.
const STATEMENTS_MAX: usize = 200;

fn longer(turns: &[Side], left: [usize; 2], side: Side) -> Option<(Vec<Side>, [usize; 2])> {
    let mut left = left;
    left[side.place()] = left[side.place()].checked_sub(1)?;
    let mut turns = turns.to_vec();
    turns.push(side);
    Some((turns, left))
}

/// In how many orders so many statements of each can be done; at most `most`.
pub(super) fn orders(statements: [usize; 2], most: usize) -> usize {
    let (all, fewer) = (statements[0] + statements[1], statements[0].min(statements[1]));
    let mut orders = 1_usize;
    for step in 1..=fewer {
        orders = orders.saturating_mul(all - fewer + step) / step;
        if orders > most {
            return most;
        }
    }
    orders
}

#[test]
fn orders_are_counted_and_are_all_different() {
    assert_eq!(orders([2, 3], 100), 10);
    let mut all = Schedule::all([2, 3]);
    assert_eq!(all.len(), 10);
    all.dedup();
    assert_eq!(all.len(), 10);
    assert_eq!(orders([20, 20], 70), 70);
}

#[test]
fn who_cannot_go_on_gives_its_turn_away_and_has_it_later() {
    let mut schedule = Schedule::one_switch(Side::Left, 2);
    assert_eq!(schedule.next([true, true]), Some(Side::Left));
    assert_eq!(schedule.next([false, true]), Some(Side::Right));
    assert_eq!(schedule.next([true, true]), Some(Side::Left));
    assert_eq!(schedule.next([true, true]), Some(Side::Right));
    assert_eq!(schedule.next([true, false]), Some(Side::Left));
    assert_eq!(schedule.next([false, false]), None);
}
