//! The invariants of ARCHITECTURE.md, and the tests that would fail without each. A test that is renamed or removed is missed here.

use std::fs;
use std::path::Path;

use laelaps_tests::workspace_file;

/// Number and short name of each invariant, with the tests that guard it.
const GUARDS: [(&str, &[&str]); 10] = [
    (
        "1, no task is lost",
        &[
            "after_kill_9_the_next_start_runs_the_interrupted_tasks_within_two_seconds",
            "a_killed_process_loses_nothing_and_its_tasks_come_back_at_once",
            "quit_gives_everything_back_and_ends",
            "term_gives_the_buffer_back_and_waits_for_what_runs",
            "two_hosts_on_one_file_settle_each_task_once",
            "a_task_that_kills_its_host_ends_failed_and_the_others_finish",
        ],
    ),
    (
        "2, every write about an attempt names its lease",
        &[
            "a_stale_worker_cannot_finish_its_successors_attempt",
            "a_lease_that_ran_out_untouched_is_lost",
            "a_cancelled_task_is_lost_to_its_worker",
            "a_task_finished_by_force_is_lost_to_its_worker",
            "lease_numbers_grow_and_never_repeat",
            "a_host_that_slept_past_its_lease_changes_nothing_when_it_wakes",
        ],
    ),
    (
        "3, time is the database's clock",
        &["no_part_of_the_host_reads_the_machine_s_clock", "a_scheduled_task_runs_when_its_time_has_come_and_not_before"],
    ),
    ("4, only settlement.rs decides", &["only_settlement_decides_what_follows_an_outcome"]),
    ("5, an attempt keeps one plugin version", &["an_attempt_keeps_its_version_and_the_next_one_gets_the_new"]),
    (
        "6, a module that fails never replaces the serving one",
        &[
            "a_file_that_does_not_fit_is_refused_with_the_reason_and_changes_nothing",
            "swaps_under_load_fail_no_task_and_lose_none",
            "a_half_written_file_never_serves_and_the_whole_one_does",
        ],
    ),
    (
        "7, a guest cannot stall the host",
        &[
            "a_light_task_is_hardly_slower_beside_an_offender",
            "a_slot_is_free_within_100_ms_of_an_immediate_stop",
            "quit_stops_handlers_of_every_sort_at_once",
            "an_immediate_stop_is_answered_at_once_whatever_the_guest_does",
            "a_stuck_thread_is_replaced_and_its_task_runs_again_while_others_go_on",
            "a_stuck_thread_holds_no_other_guest",
        ],
    ),
    (
        "8, the database decides who owns a task",
        &["two_hosts_on_one_file_settle_each_task_once", "a_living_host_takes_over_what_a_dead_one_held"],
    ),
    (
        "9, nothing is granted by default, everything is bounded",
        &[
            "nothing_is_granted_by_default",
            "open_handles_are_bounded",
            "memory_is_empty_for_every_attempt",
            "compiling_a_bomb_ends_in_a_refusal_and_costs_nobody_anything",
            "endless_output_is_cut_at_the_route_s_limit_and_counted",
            "a_follow_up_is_a_task_like_any_other_and_a_bad_one_is_refused_in_the_call",
            "a_handler_cannot_work_through_another_plugin_nor_in_anothers_name",
            "a_fork_bomb_ends_and_good_tasks_go_on",
        ],
    ),
    ("10, idle is quiet", &["an_idle_host_writes_no_log_and_uses_almost_no_processor"]),
];

#[test]
fn every_invariant_has_its_tests() {
    let mut sources = String::new();
    for folder in ["tests/suite", "tests/hostile", "host/queue/tests", "host/queue/src", "host/daemon/tests", "host/daemon/src"] {
        collect(&workspace_file(folder), &mut sources);
    }
    for (invariant, guards) in GUARDS {
        for guard in guards {
            assert!(sources.contains(&format!("fn {guard}(")), "invariant {invariant}: its test {guard} is gone");
        }
    }
    let architecture = fs::read_to_string(workspace_file("ARCHITECTURE.md")).unwrap();
    let (_, listed) = architecture.split_once("## Invariants").expect("ARCHITECTURE.md lists the invariants");
    let listed = listed.split("\n## ").next().unwrap();
    let numbered =
        listed.lines().filter(|line| line.split_once(". ").is_some_and(|(number, _)| number.parse::<u32>().is_ok())).count();
    assert_eq!(numbered, GUARDS.len(), "ARCHITECTURE.md and this list name the same invariants");
}

/// docs/security.md lists each promise with the tests that keep it. Those of tests/hostile are all listed.
#[test]
fn every_promise_of_the_security_page_has_its_tests() {
    let mut sources = String::new();
    for folder in ["tests/suite", "tests/hostile", "host/daemon/tests", "host/daemon/src"] {
        collect(&workspace_file(folder), &mut sources);
    }
    let page = fs::read_to_string(workspace_file("docs/security.md")).unwrap();
    let (_, promises) = page.split_once("## Promises").expect("docs/security.md lists the promises");
    let promises = promises.split("\n## ").next().unwrap();
    for row in promises.lines().filter(|line| line.starts_with("| ")).skip(2) {
        let tests: Vec<&str> = row.split('`').skip(1).step_by(2).filter(|name| name.matches('_').count() >= 3).collect();
        assert!(!tests.is_empty(), "no test keeps this promise: {row}");
        for test in tests {
            assert!(sources.contains(&format!("fn {test}(")), "docs/security.md names a test that is gone: {test}");
        }
    }
    let mut hostile = String::new();
    collect(&workspace_file("tests/hostile"), &mut hostile);
    let attacks = hostile.split("#[tokio::test]").skip(1);
    for attack in attacks.filter_map(|test| test.split_once("fn ")?.1.split('(').next()) {
        assert!(promises.contains(&format!("`{attack}`")), "docs/security.md does not name {attack}");
    }
}

fn collect(folder: &Path, text: &mut String) {
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}
