//! The order between users, by a slow and plain model and by what it promises.

use proptest::prelude::*;

use super::*;

fn candidates(tasks: impl IntoIterator<Item = (i64, Option<i64>)>) -> VecDeque<Candidate> {
    tasks.into_iter().map(|(task, max_running)| Candidate { turn: task, task, max_running }).collect()
}

fn account(user: &str, running: i64, tasks: impl IntoIterator<Item = (i64, Option<i64>)>) -> Account {
    Account { user: user.to_owned(), running, picked: 0, candidates: candidates(tasks), rest: Rest::Nothing }
}

fn order(accounts: &mut [Account], limit: usize) -> Vec<i64> {
    pick(accounts, limit, 1).into_iter().map(|pick| pick.candidate.task).collect()
}

#[test]
fn users_get_shares_in_proportion_to_their_max_running() {
    let mut accounts =
        [account("a", 0, (0..20).map(|task| (task, Some(4)))), account("b", 0, (100..120).map(|task| (task, Some(2))))];
    assert_eq!(order(&mut accounts, 6), [0, 1, 100, 2, 3, 101]);
    assert_eq!((accounts[0].running, accounts[1].running), (4, 2));
    assert_eq!(order(&mut accounts, 6), [0; 0], "both are at their limits");
}

#[test]
fn without_a_max_running_users_take_turns() {
    let mut accounts = [account("a", 0, (0..9).map(|task| (task, None))), account("b", 1, (10..19).map(|task| (task, None)))];
    assert_eq!(order(&mut accounts, 5), [0, 1, 10, 2, 11]);
}

#[test]
fn a_batch_never_goes_over_a_users_max_running() {
    let mut accounts = [account("a", 1, (0..9).map(|task| (task, Some(3))))];
    assert_eq!(order(&mut accounts, 9), [0, 1]);
}

#[test]
fn a_max_running_of_zero_passes_while_nothing_runs() {
    let mut accounts = [account("a", 0, [(0, Some(0)), (1, Some(0))])];
    assert_eq!(order(&mut accounts, 9), [0]);
}

#[test]
fn the_candidates_own_max_running_is_the_limit() {
    let mut accounts = [account("a", 1, [(0, Some(2)), (1, Some(5)), (2, Some(3)), (3, Some(9))])];
    assert_eq!(order(&mut accounts, 9), [0, 1], "the third sees three running and its limit is three");
}

#[test]
fn tasks_without_user_are_never_held_back() {
    let mut accounts = [account("", 50, [(0, Some(1)), (1, Some(1)), (2, None)]), account("a", 0, [(3, None), (4, None)])];
    assert_eq!(order(&mut accounts, 9), [0, 1, 2, 3, 4]);
}

#[test]
fn equal_weights_go_by_age() {
    let mut accounts = [account("a", 0, [(7, None)]), account("b", 0, [(5, None)]), account("c", 0, [(6, None)])];
    assert_eq!(order(&mut accounts, 9), [5, 6, 7]);
}

#[test]
fn a_pick_stops_where_the_next_task_is_not_known() {
    let mut accounts = [account("a", 0, [(0, None), (1, None)]), account("b", 0, [(9, None)])];
    accounts[0].rest = Rest::Unknown;
    assert_eq!(order(&mut accounts, 9), [0, 9, 1]);
}

#[test]
fn an_estimate_covers_the_batch_when_a_users_tasks_are_alike() {
    let heads = [account("a", 0, [(0, Some(4))]), account("b", 0, [(1, Some(2))]), account("c", 9, [(2, Some(9))])];
    assert_eq!(estimate(&heads, 6, 1), [5, 3, 0]);
    assert_eq!(estimate(&heads, 100, 1), [5, 3, 0]);
    assert_eq!(estimate(&[account("", 3, [(0, None)])], 10, 1), [11]);
}

/// Any users, some with limits, with few tasks each.
fn any_accounts() -> impl Strategy<Value = Vec<Account>> {
    let tasks = proptest::collection::vec((0i64..50, proptest::option::of(0i64..6)), 0..8);
    let one = (0i64..6, 0i64..200, tasks, any::<bool>()).prop_map(|(running, picked, mut tasks, unknown)| {
        tasks.sort_unstable();
        let candidates: VecDeque<Candidate> =
            tasks.into_iter().map(|(turn, max_running)| Candidate { turn, task: 0, max_running }).collect();
        let rest = if unknown && !candidates.is_empty() { Rest::Unknown } else { Rest::Nothing };
        Account { user: String::new(), running, picked, candidates, rest }
    });
    proptest::collection::vec(one, 0..8).prop_map(|mut accounts| {
        let mut number = 0;
        for (place, account) in accounts.iter_mut().enumerate() {
            account.user = if place == 0 { String::new() } else { format!("user{place}") };
            for candidate in &mut account.candidates {
                number += 1;
                candidate.task = number;
            }
        }
        accounts
    })
}

/// The same order by looking at everybody before each pick.
fn plainly(accounts: &mut [Account], limit: usize, first_pick: i64) -> Vec<Pick> {
    let mut picks = Vec::new();
    for number in (first_pick..).take(limit) {
        let open: Vec<usize> = (0..accounts.len()).filter(|&account| accounts[account].open().is_some()).collect();
        let aged = open.iter().copied().min_by_key(|&account| accounts[account].picked);
        let aged = aged.filter(|&account| number % AGED_EVERY == 0 && number - accounts[account].picked > AGED_AFTER);
        let Some(account) = aged.or_else(|| open.iter().copied().max_by_key(|&account| Place::of(accounts, account))) else {
            break;
        };
        let owner = &mut accounts[account];
        let candidate = owner.candidates.pop_front().expect("an open account has a candidate");
        owner.running += 1;
        owner.picked = number;
        picks.push(Pick { account, candidate });
        if owner.candidates.is_empty() && owner.rest == Rest::Unknown {
            break;
        }
    }
    picks
}

proptest! {
    #[test]
    fn the_heap_agrees_with_the_plain_model(accounts in any_accounts(), limit in 0usize..40, first_pick in 1i64..400) {
        let (mut fast, mut slow) = (accounts.clone(), accounts);
        prop_assert_eq!(pick(&mut fast, limit, first_pick), plainly(&mut slow, limit, first_pick));
    }

    #[test]
    fn no_pick_is_over_its_own_limit(mut accounts in any_accounts(), limit in 0usize..40, first_pick in 1i64..400) {
        let mut running: Vec<i64> = accounts.iter().map(|account| account.running).collect();
        let users: Vec<String> = accounts.iter().map(|account| account.user.clone()).collect();
        for pick in pick(&mut accounts, limit, first_pick) {
            if let Some(most) = pick.candidate.max_running.filter(|_| !users[pick.account].is_empty()) {
                prop_assert!(running[pick.account] < most.max(1));
            }
            running[pick.account] += 1;
        }
    }

    #[test]
    fn nothing_open_is_left_while_there_is_room(mut accounts in any_accounts(), first_pick in 1i64..400) {
        for account in &mut accounts {
            account.rest = Rest::Nothing;
        }
        pick(&mut accounts, 1_000, first_pick);
        prop_assert!(accounts.iter().all(|account| account.open().is_none()));
    }

    #[test]
    fn nobody_is_passed_over_for_longer_than_the_bound(users in 2usize..30, favoured in 1usize..10, first_pick in 1i64..400) {
        // The favoured have so much weight that by weight alone nobody else would ever be picked.
        let mut accounts: Vec<Account> = (0..users)
            .map(|user| Account {
                user: format!("user{user}"),
                running: 0,
                picked: first_pick - 1,
                candidates: [Candidate { turn: 0, task: i64::try_from(user).unwrap(), max_running: Some(if user < favoured { 1_000_000 } else { 900 }) }].into(),
                rest: Rest::Alike,
            })
            .collect();
        let bound = AGED_AFTER + AGED_EVERY * i64::try_from(users).unwrap();
        let mut last = vec![first_pick - 1; users];
        for (number, pick) in (first_pick..).zip(pick(&mut accounts, 3_000, first_pick)) {
            last[pick.account] = number;
            for (user, last) in last.iter().enumerate() {
                prop_assert!(number - last <= bound, "user {} was passed over for {} picks", user, number - last);
            }
        }
    }
}
