//! Which queues a host serves.

use laelaps_queue::Claim;

use super::refusals::problems;
use super::*;

fn queues(keys: &str) -> Queues {
    load(&with(keys)).expect("valid").queues
}

fn named(queues: &[(&str, Option<u32>)]) -> Queues {
    let queue = |(name, processors): &(&str, Option<u32>)| ServedQueue { name: (*name).to_owned(), processors: *processors };
    Queues::Named(queues.iter().map(queue).collect())
}

#[test]
fn without_a_word_a_host_serves_all_queues() {
    assert_eq!(load(MINIMAL).expect("valid").queues, Queues::All);
    assert_eq!(Queues::All.to_string(), "all");
}

#[test]
fn a_mapping_names_the_queues_with_their_shares() {
    let expected = named(&[("mail", Some(3)), ("default", None), ("video/4k:eu.west_1-a", None)]);
    assert_eq!(queues("processors: 4\nqueues: {mail: {processors: 3}, default: {}, video/4k:eu.west_1-a: ~}"), expected);
    assert_eq!(expected.to_string(), "mail (at most 3), default, video/4k:eu.west_1-a");
    assert_eq!(queues("processors: 4\nqueues:\n  mail: {processors: 4}"), named(&[("mail", Some(4))]));
    assert_eq!(
        queues("queues: {mail: {processors: 1}}"),
        named(&[("mail", Some(1))]),
        "a host has one processor unless it says more"
    );
    assert_eq!(queues("queues: {'7': {}}"), named(&[("7", None)]));
    let many: Vec<String> = (0..Claim::QUEUES_MAX).map(|number| format!("q{number}: {{}}")).collect();
    let Queues::Named(many) = queues(&format!("queues: {{{}}}", many.join(", "))) else { panic!("they have names") };
    assert_eq!(many.len(), Claim::QUEUES_MAX);
    let short = Queues::Named(many).in_short();
    assert!(short.ends_with("q19 and 980 more"), "{short}");
}

#[test]
fn every_mistake_is_told_with_its_place_and_a_hint() {
    let told = |keys: &str, expected: &str| assert_eq!(problems(&with(keys)), [expected], "{keys}");
    let example = "write, for example, `queues: {mail: {processors: 4}, default: {}}`";
    for nothing in ["queues: {}", "queues: ~", "queues:"] {
        let expected = format!(
            "4: development.queues: found no queue, expected one or more | {example}; leave it out, and the host serves all queues"
        );
        told(nothing, &expected);
    }
    let mapping = "expected a mapping from names to settings";
    told("queues: [mail]", &format!("4: development.queues: found a list, {mapping} | {example}"));
    told("queues: mail", &format!("4: development.queues: found \"mail\", {mapping} | {example}"));
    let name = "a name has 1 to 64 letters, digits and characters out of _-.:/";
    told("queues: {'': {}}", &format!("4: development.queues.: the queue's name is empty | {name}"));
    told(
        "queues:\n  default: {}\n  two words: {}",
        &format!(
            "6: development.queues.two words: the queue's name contains ' '; letters and digits of ASCII and _ - . : / are allowed | {name}"
        ),
    );
    told("queues: {7: {}}", "4: development.queues.7: found 7, expected a queue's name | write it in quotes");
    told(
        "queues: {mail: 4}",
        "4: development.queues.mail: found 4, expected a mapping with processors, or nothing | write `mail: {processors: 4}`",
    );
    told(
        "queues: {mail: {processors: 0}}",
        "4: development.queues.mail.processors: found 0, expected a whole number from 1 to 1,024",
    );
    told(
        "processors: 2\nqueues:\n  mail:\n    processors: 3",
        "7: development.queues.mail.processors: found 3, but the host has 2 | lower it, leave it out, or raise `processors` of the host",
    );
    told("queues: {mail: {processor: 1}}", "4: development.queues.mail.processor: no such key | did you mean processors?");
    told("queues: {mail: {weight: 1}}", "4: development.queues.mail.weight: no such key | known here: processors");
    // Of a number that cannot be used nothing follows.
    told(
        "processors: many\nqueues: {mail: {processors: 3}}",
        "4: development.processors: found \"many\", expected a whole number from 1 to 1,024",
    );
    let found = problems(&with("queues: {mail: {}, mail: {}}"));
    assert!(found.len() == 1 && found[0].contains("duplicate entry with key \"mail\""), "{found:?}");
    let many: Vec<String> = (0..=Claim::QUEUES_MAX).map(|number| format!("q{number}: {{}}")).collect();
    told(
        &format!("queues: {{{}}}", many.join(", ")),
        "4: development.queues: found 1,001 queues, expected at most 1,000 | leave it out, and the host serves all queues; or divide them between hosts",
    );
}

#[test]
fn perfectqueues_table_is_one_queue() {
    let compat = "development:\n  type: rdb_compat\n  url: mysql://localhost/test\n  table: queue\n";
    assert_eq!(load(compat).expect("valid").queues, Queues::All);
    let expected = "5: development.queues: a table of PerfectQueue's is one queue | leave it out; the host serves the table";
    for queues in ["{}", "{default: {}}", "~"] {
        assert_eq!(problems(&format!("{compat}  queues: {queues}\n")), [expected]);
    }
    let route = "  routes:\n  - {type: a, plugin: p, grants: {follow_ups: {queues: [mail]}}}\n";
    assert_eq!(
        problems(&format!("{compat}{route}")),
        [
            "6: development.routes[1].grants.follow_ups.queues: a table of PerfectQueue's is one queue | leave it out: follow-ups go to the same table"
        ]
    );
}
