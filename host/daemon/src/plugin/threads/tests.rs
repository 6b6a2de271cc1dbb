use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use super::*;

const PATIENCE: Duration = Duration::from_secs(120);

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let patience = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < patience, "{what} within {PATIENCE:?}");
        thread::yield_now();
    }
}

/// A guest that keeps its thread until the answer is used, and says so first.
fn block(threads: &Threads) -> SyncSender<()> {
    let (release, released) = sync_channel::<()>(1);
    let (begun, begins): (_, Receiver<()>) = sync_channel(1);
    threads.spawn(async move {
        begun.send(()).expect("the test listens");
        let _ = released.recv();
    });
    begins.recv_timeout(PATIENCE).expect("it gets a thread");
    release
}

/// Whether another guest gets a thread.
fn serves(threads: &Threads) -> Receiver<()> {
    let (served, serves) = sync_channel(1);
    threads.spawn(async move { served.send(()).expect("the test listens") });
    serves
}

#[test]
fn a_lost_thread_is_replaced_and_ends_when_it_comes_back() {
    let threads = Threads::start(1, 1).expect("threads");
    let replacements = threads.replacements();
    for _ in 0..2 {
        let releases: Vec<_> = (0..4)
            .map(|_| {
                let release = block(&threads);
                let waits = serves(&threads);
                assert!(waits.try_recv().is_err(), "there is no other thread");
                replacements.call();
                waits.recv_timeout(PATIENCE).expect("the replacement serves");
                release
            })
            .collect();
        assert_eq!(threads.shared.state().threads, 5);
        for release in releases {
            replacements.release();
            release.send(()).expect("it waits");
        }
        eventually("one thread is left", || threads.shared.state().threads == 1);
        serves(&threads).recv_timeout(PATIENCE).expect("it serves");
    }
}

#[test]
fn a_stuck_thread_holds_no_other_guest() {
    let threads = Threads::start(2, 2).expect("threads");
    // Some give up their turn all the time, some wait for timers: each was on either thread before.
    let rounds: Arc<[AtomicU32; 8]> = Arc::default();
    let over = Arc::new(AtomicBool::new(false));
    for guest in 0..rounds.len() {
        let (rounds, over) = (rounds.clone(), over.clone());
        threads.spawn(async move {
            while !over.load(Ordering::SeqCst) {
                rounds[guest].fetch_add(1, Ordering::SeqCst);
                if guest % 2 == 0 {
                    tokio::task::yield_now().await;
                } else {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        });
    }
    for _ in 0..20 {
        let release = block(&threads);
        for (guest, before) in rounds.iter().map(|rounds| rounds.load(Ordering::SeqCst)).enumerate() {
            eventually(&format!("guest {guest} goes on"), || rounds[guest].load(Ordering::SeqCst) > before + 2);
        }
        release.send(()).expect("it waits");
    }
    over.store(true, Ordering::SeqCst);
    eventually("they end", || threads.shared.state().alive == 0);
}

#[test]
fn a_burst_of_guests_wakes_no_more_threads_than_are_eager() {
    let threads = Threads::start(8, 2).expect("threads");
    eventually("all wait", || threads.shared.state().idle == 8);
    // Whoever is told cannot look before the lock is free, as in a burst that is faster than the threads wake.
    let mut state = threads.shared.state();
    let told = (0..8).filter(|_| state.may_wake() && state.tell()).count();
    assert_eq!((told, state.idle), (2, 6));
    drop(state);
    for _ in 0..told {
        threads.shared.changed.notify_one();
    }
    eventually("they look, and wait again", || threads.shared.state().idle == 8);
    serves(&threads).recv_timeout(PATIENCE).expect("it serves");
}

#[test]
fn a_thread_more_is_woken_when_those_that_are_awake_do_not_get_on() {
    let threads = Threads::start(4, 2).expect("threads");
    let mut relief = threads.relief();
    eventually("all wait", || threads.shared.state().idle == 4);
    let releases = [block(&threads), block(&threads)];
    eventually("no other one is awake", || threads.shared.state().idle == 2);
    let waits = serves(&threads);
    relief.look();
    assert!(waits.try_recv().is_err(), "somebody had a turn since the look before");
    relief.look();
    waits.recv_timeout(PATIENCE).expect("another thread serves");
    for release in releases {
        release.send(()).expect("it waits");
    }
}

/// A guest that does nothing but give up its turn until it is over. Answers how many turns it had.
fn busy(threads: &Threads, over: &Arc<AtomicBool>) -> Arc<AtomicU32> {
    let (turns, over) = (Arc::<AtomicU32>::default(), over.clone());
    let counted = turns.clone();
    threads.spawn(async move {
        while !over.load(Ordering::SeqCst) {
            counted.fetch_add(1, Ordering::SeqCst);
            tokio::task::yield_now().await;
        }
    });
    turns
}

#[test]
fn a_guest_that_begins_goes_before_busy_ones_and_does_not_starve_them() {
    let threads = Arc::new(Threads::start(1, 1).expect("threads"));
    let over = Arc::new(AtomicBool::new(false));
    let turns: Vec<_> = (0..3).map(|_| busy(&threads, &over)).collect();
    eventually("they are busy", || turns.iter().all(|turns| turns.load(Ordering::SeqCst) > 1));
    let sum = move || turns.iter().map(|turns| turns.load(Ordering::SeqCst)).sum::<u32>();
    // Each begins while the one before it has the only thread, so that its own turn could be the next.
    fn follow(threads: &Arc<Threads>, sum: impl Fn() -> u32 + Send + 'static, told: SyncSender<u32>, left: u32) {
        let inner = threads.clone();
        threads.spawn(async move {
            let _ = told.send(sum());
            if left > 0 {
                follow(&inner, sum, told, left - 1);
            }
        });
    }
    let (told, tells) = sync_channel(10 * TURNS_BEFORE_BUSY as usize + 1);
    follow(&threads, sum, told, 10 * TURNS_BEFORE_BUSY);
    let mut told: Vec<u32> = tells.iter().collect();
    let busy_turns = told.last().expect("it told") - told[0];
    told.dedup();
    assert_eq!(told.len(), busy_turns as usize + 1, "busy guests had their turns one by one");
    assert_eq!(busy_turns, 10, "one for {TURNS_BEFORE_BUSY} of others");
    over.store(true, Ordering::SeqCst);
    eventually("they end", || threads.shared.state().alive == 0);
}

#[test]
fn busy_guests_leave_threads_to_others() {
    let threads = Threads::start(4, 2).expect("threads");
    let (begun, begins) = sync_channel(3);
    let releases: Vec<_> = (0..3)
        .map(|_| {
            let (release, released) = sync_channel::<()>(1);
            let begun = begun.clone();
            threads.spawn(async move {
                tokio::task::yield_now().await;
                begun.send(()).expect("the test listens");
                let _ = released.recv();
            });
            release
        })
        .collect();
    for _ in 0..2 {
        begins.recv_timeout(PATIENCE).expect("two have threads");
    }
    serves(&threads).recv_timeout(PATIENCE).expect("one that begins has another");
    eventually("the rest waits", || threads.shared.state().idle == 2 && threads.shared.state().busy.len() == 1);
    // Nobody had a turn for a whole tick: the third gets its own.
    let mut relief = threads.relief();
    relief.look();
    relief.look();
    begins.recv_timeout(PATIENCE).expect("the third has a thread");
    drop(releases);
    eventually("they end", || threads.shared.state().alive == 0);
}

#[test]
fn a_guest_that_counted_on_a_thread_which_takes_a_busy_one_gets_another() {
    let threads = Arc::new(Threads::start(4, 2).expect("threads"));
    // One that is still starting would look for guests by itself.
    eventually("all wait", || threads.shared.state().idle == 4);
    let first = block(&threads);
    let (end, ends) = sync_channel::<()>(1);
    let (begun, begins) = sync_channel::<()>(1);
    let (release, released) = sync_channel::<()>(1);
    let spawn = threads.clone();
    threads.spawn(async move {
        // Behind these, which all go to its own thread, it is a busy guest's turn; the first two turns were the one above and this one.
        for _ in 3..TURNS_BEFORE_BUSY {
            spawn.spawn(async {});
        }
        spawn.spawn(async move {
            begun.send(()).expect("the test listens");
            let _ = ends.recv();
        });
        tokio::task::yield_now().await;
        let _ = released.recv();
    });
    begins.recv_timeout(PATIENCE).expect("the last of them has the thread");
    let waits = serves(&threads);
    eventually("it waits", || threads.shared.state().ready.len() == 1);
    end.send(()).expect("it waits");
    waits.recv_timeout(PATIENCE).expect("a third thread serves it");
    assert_eq!(threads.shared.state().running_busy, 1, "the second one has the busy guest");
    drop((first, release));
    eventually("they end", || threads.shared.state().alive == 0);
}

#[test]
fn a_guest_that_panics_ends_alone() {
    let threads = Threads::start(1, 1).expect("threads");
    threads.spawn(async { panic!("on purpose") });
    serves(&threads).recv_timeout(PATIENCE).expect("its thread goes on");
    eventually("it is gone", || threads.shared.state().alive == 0);
}

#[test]
fn threads_end_when_their_owner_is_gone_and_their_guests_have_ended() {
    let threads = Threads::start(3, 3).expect("threads");
    let shared = threads.shared.clone();
    let release = block(&threads);
    drop(threads);
    assert_eq!(shared.state().threads, 3, "a guest is left");
    release.send(()).expect("it waits");
    eventually("no thread is left", || shared.state().threads == 0);
}
