//! Which queues the next claim asks for, and for how many tasks.
//!
//! Queues without a share of the processors are one group, asked for together. A queue with a share is a group of its own: its claims take no
//! more than its share leaves. A group with nothing to claim rests until the next poll, a wake-up, or the moment its next task becomes due.
//!
//! Groups that rest are asked together in one claim, for no more than the smallest of their shares leaves. So an idle host sends one claim a poll,
//! however many queues it serves. If that claim finds all it asked for, more may wait: its groups are then asked one by one in turns, so that none
//! starves another, until a claim of theirs finds nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::config;

/// Places in the list of groups.
type Group = usize;

/// The queues of a host, and what is known of each.
pub(super) struct Queues {
    groups: Vec<State>,
    /// The groups that have a share, by the name of their queue.
    shares: HashMap<String, Group>,
    /// All queues that are served. None: all there are.
    all: Option<Arc<[String]>>,
    /// Of the groups that are asked in turns, the first from this one on is next.
    turn: Group,
    /// Groups that rest are asked again from this moment on.
    rest_until: Instant,
    /// The last claim asked those that rest: one in turns is first, if there is any.
    rest_was_last: bool,
}

struct State {
    /// None: all queues there are.
    names: Option<Arc<[String]>>,
    /// The most tasks of it that this host has at once.
    share: Option<u32>,
    /// Those that it has: under way in a claim's answer, buffered or running.
    taken: u32,
    rests: bool,
}

/// What a claim asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ask {
    /// Its queues. None: all.
    pub(super) queues: Option<Arc<[String]>>,
    /// The most tasks.
    pub(super) limit: u32,
    whom: Whom,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Whom {
    One(Group),
    /// All that rested and had room.
    Resting(Vec<Group>),
}

/// A place in a queue's share, which its task takes from the claim to the end of its attempt. None: its queue has no share.
pub(super) type Place = Option<Group>;

impl State {
    fn room(&self) -> u32 {
        self.share.map_or(u32::MAX, |share| share.saturating_sub(self.taken))
    }
}

impl Queues {
    pub(super) fn new(served: &config::Queues) -> Self {
        let group = |names, share| State { names, share, taken: 0, rests: true };
        let (mut groups, mut shares, mut all) = (Vec::new(), HashMap::new(), None);
        match served {
            config::Queues::All => groups.push(group(None, None)),
            config::Queues::Named(queues) => {
                all = Some(queues.iter().map(|queue| queue.name.clone()).collect());
                let free: Arc<[String]> =
                    queues.iter().filter(|queue| queue.processors.is_none()).map(|queue| queue.name.clone()).collect();
                if !free.is_empty() {
                    groups.push(group(Some(free), None));
                }
                for queue in queues.iter().filter(|queue| queue.processors.is_some()) {
                    shares.insert(queue.name.clone(), groups.len());
                    groups.push(group(Some(Arc::from([queue.name.clone()])), queue.processors));
                }
            }
        }
        Self { groups, shares, all, turn: 0, rest_until: Instant::now(), rest_was_last: false }
    }

    /// From when on there is a group to ask; None while every share is taken.
    pub(super) fn next_at(&self, not_before: Instant) -> Option<Instant> {
        let mut with_room = self.groups.iter().filter(|group| group.room() > 0).peekable();
        with_room.peek()?;
        Some(if with_room.all(|group| group.rests) { not_before.max(self.rest_until) } else { not_before })
    }

    /// What to ask for with so many free places, if there is a group to ask.
    pub(super) fn ask(&mut self, free: u32, now: Instant) -> Option<Ask> {
        let turn = self.in_turn();
        let rest = now >= self.rest_until && !(self.rest_was_last && turn.is_some());
        let ask = if rest { self.resting(free) } else { None };
        self.rest_was_last = ask.is_some();
        ask.or_else(|| {
            let group = turn?;
            self.turn = (group + 1) % self.groups.len();
            let state = &self.groups[group];
            Some(Ask { queues: state.names.clone(), limit: free.min(state.room()), whom: Whom::One(group) })
        })
    }

    /// For a task that runs alone, while nothing runs, so that every share has room.
    pub(super) fn ask_alone(&mut self) -> Ask {
        for group in &mut self.groups {
            group.rests = true;
        }
        Ask { queues: self.all.clone(), limit: 1, whom: Whom::Resting((0..self.groups.len()).collect()) }
    }

    /// The next group in turns.
    fn in_turn(&self) -> Option<Group> {
        let count = self.groups.len();
        let may = |group: &Group| !self.groups[*group].rests && self.groups[*group].room() > 0;
        (0..count).map(|step| (self.turn + step) % count).find(may)
    }

    fn resting(&self, free: u32) -> Option<Ask> {
        let may = |group: &Group| self.groups[*group].rests && self.groups[*group].room() > 0;
        let groups: Vec<Group> = (0..self.groups.len()).filter(may).collect();
        let limit = groups.iter().map(|group| self.groups[*group].room()).min()?.min(free);
        let queues = match groups.as_slice() {
            [one] => self.groups[*one].names.clone(),
            several if several.len() == self.groups.len() => self.all.clone(),
            several => Some(several.iter().filter_map(|group| self.groups[*group].names.as_deref()).flatten().cloned().collect()),
        };
        Some(Ask { queues, limit, whom: Whom::Resting(groups) })
    }

    /// A claim was answered with so many tasks. `soon`: how long until the next look if it found some, `later`: if not.
    pub(super) fn answered(&mut self, ask: &Ask, found: u32, now: Instant, soon: Duration, later: Duration) {
        match &ask.whom {
            Whom::Resting(_) if found < ask.limit => self.rest_until = now + if found > 0 { soon } else { later },
            Whom::Resting(groups) => {
                for group in groups {
                    self.groups[*group].rests = false;
                }
            }
            Whom::One(group) if found == 0 => {
                let next = now + later;
                let others_rest = self.groups.iter().any(|state| state.rests);
                self.rest_until = if others_rest { self.rest_until.min(next) } else { next };
                self.groups[*group].rests = true;
            }
            Whom::One(_) => {}
        }
    }

    /// Something may wait by now: those that rest are asked again.
    pub(super) fn wake(&mut self, now: Instant) {
        self.rest_until = self.rest_until.min(now);
    }

    /// A task was claimed.
    pub(super) fn take(&mut self, queue: &str) -> Place {
        if self.shares.is_empty() {
            return None;
        }
        let group = *self.shares.get(queue)?;
        self.groups[group].taken += 1;
        Some(group)
    }

    /// Its attempt has ended.
    pub(super) fn give_back(&mut self, place: Place) {
        if let Some(group) = place {
            let state = &mut self.groups[group];
            debug_assert!(state.taken > 0, "a place is given back once");
            state.taken = state.taken.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::ServedQueue;

    const SOON: Duration = Duration::from_millis(1);
    const LATER: Duration = Duration::from_secs(1);

    fn served(queues: &[(&str, Option<u32>)]) -> Queues {
        let queue = |(name, processors): &(&str, Option<u32>)| ServedQueue { name: (*name).to_owned(), processors: *processors };
        Queues::new(&config::Queues::Named(queues.iter().map(queue).collect()))
    }

    /// Asks, and answers with tasks of these queues.
    fn claim(queues: &mut Queues, free: u32, now: Instant, found: &[&str]) -> (String, u32, Vec<Place>) {
        let ask = queues.ask(free, now).expect("a group to ask");
        let places = found.iter().map(|queue| queues.take(queue)).collect();
        queues.answered(&ask, u32::try_from(found.len()).expect("few"), now, SOON, LATER);
        let names = ask.queues.as_deref().map_or_else(|| "all".to_owned(), |names| names.join(" "));
        (names, ask.limit, places)
    }

    fn asked(queues: &mut Queues, free: u32, now: Instant, found: &[&str]) -> (String, u32) {
        let (names, limit, _) = claim(queues, free, now, found);
        (names, limit)
    }

    fn of(names: &str, limit: u32) -> (String, u32) {
        (names.to_owned(), limit)
    }

    #[test]
    fn without_queues_a_host_asks_for_all_of_them_and_rests_when_it_finds_none() {
        let (mut queues, now) = (Queues::new(&config::Queues::All), Instant::now());
        assert_eq!(asked(&mut queues, 4, now, &["a"; 4]), of("all", 4));
        assert_eq!(queues.next_at(now), Some(now), "there may be more");
        assert_eq!(asked(&mut queues, 4, now, &["a"]), of("all", 4));
        assert_eq!(asked(&mut queues, 4, now, &[]), of("all", 4));
        assert_eq!(queues.next_at(now), Some(now + LATER));
        assert_eq!(queues.ask(4, now), None);
        queues.wake(now);
        assert_eq!(asked(&mut queues, 4, now, &["a"]), of("all", 4));
        assert_eq!(queues.next_at(now), Some(now + SOON), "what was found came one by one");
    }

    #[test]
    fn queues_without_a_share_are_asked_for_together_and_others_for_what_their_share_leaves() {
        let (mut queues, now) = (served(&[("mail", Some(2)), ("a", None), ("b", None)]), Instant::now());
        let (names, limit, mail) = claim(&mut queues, 8, now, &["mail", "mail"]);
        assert_eq!((names.as_str(), limit), ("mail a b", 2), "all of them at first, within the smallest share");
        assert_eq!(asked(&mut queues, 6, now, &["a"; 6]), of("a b", 6));
        assert_eq!(asked(&mut queues, 1, now, &["b"]), of("a b", 1), "mail's share is taken");
        queues.give_back(mail[0]);
        assert_eq!(asked(&mut queues, 1, now, &["mail"]), of("mail", 1), "its turn, and one place");
        queues.give_back(mail[1]);
        assert_eq!(asked(&mut queues, 1, now, &["a"]), of("a b", 1), "in turns");
        assert_eq!(asked(&mut queues, 9, now, &[]), of("mail", 1));
        assert_eq!(asked(&mut queues, 9, now, &[]), of("a b", 9));
        assert_eq!(queues.next_at(now), Some(now + LATER), "none of them has more");
    }

    #[test]
    fn a_host_whose_shares_are_all_taken_asks_for_nothing_until_a_task_ends() {
        let (mut queues, now) = (served(&[("mail", Some(1)), ("video", Some(1))]), Instant::now());
        let (_, _, mail) = claim(&mut queues, 8, now, &["mail"]);
        let (names, limit, _) = claim(&mut queues, 7, now, &["video"]);
        assert_eq!((names.as_str(), limit), ("video", 1));
        assert_eq!((queues.next_at(now), queues.ask(6, now)), (None, None));
        queues.give_back(mail[0]);
        assert_eq!(queues.next_at(now), Some(now));
        assert_eq!(asked(&mut queues, 7, now, &[]), of("mail", 1));
        assert_eq!(queues.next_at(now), Some(now + LATER));
    }

    #[test]
    fn an_idle_host_sends_one_claim_a_poll_however_many_queues_it_serves() {
        let names: Vec<String> = (0..1_000).map(|number| format!("queue-{number}")).collect();
        let all: Vec<(&str, Option<u32>)> = names.iter().map(|name| (name.as_str(), Some(1))).collect();
        let (mut queues, begun, mut now) = (served(&all), Instant::now(), Instant::now());
        let mut claims = 0;
        while now < begun + 60 * LATER {
            let (names, limit) = asked(&mut queues, 8, now, &[]);
            assert_eq!((names.split(' ').count(), limit), (1_000, 1));
            claims += 1;
            now = queues.next_at(now).expect("a moment");
        }
        assert!(claims <= 61, "{claims}");
    }

    #[test]
    fn a_queue_with_nothing_to_do_is_asked_once_a_poll_beside_one_that_is_busy() {
        let (mut queues, begun) = (served(&[("mail", Some(4)), ("default", None)]), Instant::now());
        assert_eq!(asked(&mut queues, 4, begun, &["default"; 4]), of("mail default", 4));
        let mut of_mail = 0;
        for millisecond in 0..10_000 {
            let now = begun + Duration::from_millis(millisecond);
            let ask = queues.ask(4, now).expect("a group to ask");
            let is_mail = ask.queues.as_deref().expect("names") == ["mail"];
            of_mail += u32::from(is_mail);
            queues.answered(&ask, if is_mail { 0 } else { 4 }, now, SOON, LATER);
        }
        assert!((10..=12).contains(&of_mail), "{of_mail}");
    }

    #[test]
    fn a_task_that_runs_alone_is_asked_for_in_all_queues_of_the_host() {
        let (mut queues, now) = (served(&[("mail", Some(2)), ("default", None)]), Instant::now());
        let ask = queues.ask_alone();
        assert_eq!((ask.queues.as_deref().map(<[String]>::len), ask.limit), (Some(2), 1));
        queues.answered(&ask, 0, now, SOON, LATER);
        assert_eq!(queues.next_at(now), Some(now + LATER));
        let ask = queues.ask_alone();
        queues.answered(&ask, 1, now, SOON, LATER);
        assert_eq!(queues.next_at(now), Some(now), "what it kept waiting is asked for");
        assert_eq!(Queues::new(&config::Queues::All).ask_alone().queues, None);
    }

    proptest! {
        /// Whatever waits, ends and wakes: no share is passed, nothing that waits and has room is left waiting, and a group that always finds
        /// something keeps no other from being asked.
        #[test]
        fn no_share_is_passed_and_nothing_is_starved(
            shares in proptest::collection::vec(proptest::option::of(1_u32..4), 1..6),
            waiting in proptest::collection::vec(0_u32..40, 6),
            steps in proptest::collection::vec((0_u32..3, any::<bool>()), 200),
            processors in 1_u32..8,
        ) {
            let names: Vec<String> = (0..shares.len()).map(|number| number.to_string()).collect();
            let all: Vec<(&str, Option<u32>)> = names.iter().map(String::as_str).zip(shares.iter().copied()).collect();
            let (mut queues, mut now) = (served(&all), Instant::now());
            let mut waiting = waiting[..shares.len()].to_vec();
            let mut running: Vec<(usize, Place)> = Vec::new();
            let claim = |queues: &mut Queues, waiting: &mut Vec<u32>, running: &mut Vec<(usize, Place)>, now: Instant| {
                let free = processors - u32::try_from(running.len()).expect("few");
                let Some(ask) = (free > 0).then(|| queues.ask(free, now)).flatten() else { return };
                let mut found = 0;
                for name in ask.queues.as_deref().expect("names") {
                    let queue: usize = name.parse().expect("a number");
                    while found < ask.limit && waiting[queue] > 0 {
                        waiting[queue] -= 1;
                        found += 1;
                        running.push((queue, queues.take(name)));
                    }
                }
                queues.answered(&ask, found, now, SOON, LATER);
            };
            for (ends, wakes) in steps {
                for _ in 0..ends.min(u32::try_from(running.len()).expect("few")) {
                    queues.give_back(running.remove(0).1);
                }
                if wakes {
                    queues.wake(now);
                }
                claim(&mut queues, &mut waiting, &mut running, now);
                prop_assert!(running.len() <= processors as usize);
                for (queue, share) in shares.iter().enumerate() {
                    let has = running.iter().filter(|(of, _)| *of == queue).count();
                    prop_assert!(share.is_none_or(|share| has <= share as usize), "{has} of queue {queue}");
                }
                now += SOON;
            }
            // All that waits is claimed in the end, and soon: one claim for each task, each group's last one in vain, and the polls.
            let mut claims = 0;
            while waiting.iter().any(|tasks| *tasks > 0) {
                claim(&mut queues, &mut waiting, &mut running, now);
                if !running.is_empty() {
                    queues.give_back(running.remove(0).1);
                }
                now = queues.next_at(now).map_or(now, |at| at.max(now));
                claims += 1;
                prop_assert!(claims < 1_000, "{waiting:?} wait");
            }
        }
    }
}
