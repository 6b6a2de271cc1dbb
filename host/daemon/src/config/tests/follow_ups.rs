//! Which follow-up tasks a route grants.

use super::refusals::problems;
use super::*;
use crate::plugin::{FollowUps, Keys, Queues, Types, Users};

/// What a route grants whose grants are these; None: it has none.
fn granted_of(section: &str, grants: Option<&str>) -> FollowUps {
    let grants = grants.map(|grants| format!(", grants: {{{grants}}}")).unwrap_or_default();
    let text = format!("{section}  routes:\n  - {{type: a, plugin: p{grants}}}\n");
    load(&text).expect("valid").routes[0].grants.follow_ups.clone()
}

fn granted(follow_ups: &str) -> FollowUps {
    granted_of(MINIMAL, Some(&format!("follow_ups: {{{follow_ups}}}")))
}

#[test]
fn without_a_word_a_native_queue_grants_a_plugins_own_and_perfectqueues_table_anything() {
    let own =
        FollowUps { types: Types::Own, users: Users::Own, keys: Keys::Own, queues: Queues::Own, depth: 10, waiting: 10_000 };
    let any = FollowUps { types: Types::Any, users: Users::Any, keys: Keys::Any, ..own.clone() };
    let compat = "development:\n  type: rdb_compat\n  url: mysql://localhost/test\n  table: queue\n";
    for grants in [None, Some(""), Some("environment: []"), Some("follow_ups: {}"), Some("follow_ups: ~")] {
        assert_eq!(granted_of(MINIMAL, grants), own, "{grants:?}");
        assert_eq!(granted_of(compat, grants), any, "{grants:?}");
    }
    // What is said counts, the rest stays.
    let strict = granted_of(compat, Some("follow_ups: {users: own, types: [b]}"));
    assert_eq!(strict, FollowUps { users: Users::Own, types: Types::Listed(vec!["b".to_owned()]), ..any });
}

#[test]
fn each_key_says_what_it_says() {
    let own = FollowUps::default();
    assert_eq!(
        granted("types: [a, b.c]"),
        FollowUps { types: Types::Listed(vec!["a".to_owned(), "b.c".to_owned()]), ..own.clone() }
    );
    assert_eq!(granted("types: []"), FollowUps { types: Types::Listed(Vec::new()), ..own.clone() });
    assert_eq!(
        granted("types: any, users: any, keys: any"),
        FollowUps { depth: 10, waiting: 10_000, ..FollowUps::of_perfectqueue() }
    );
    assert_eq!(granted("users: own, keys: invoice-"), FollowUps { keys: Keys::Prefix("invoice-".to_owned()), ..own.clone() });
    assert_eq!(
        granted("queues: [mail, video/4k]"),
        FollowUps { queues: Queues::Listed(vec!["mail".to_owned(), "video/4k".to_owned()]), ..own.clone() }
    );
    assert_eq!(granted("queues: any"), FollowUps { queues: Queues::Any, ..own.clone() });
    assert_eq!(granted("queues: own"), own);
    assert_eq!(granted("depth: 0, waiting: 0"), FollowUps { depth: 0, waiting: 0, ..own.clone() });
    assert_eq!(granted("depth: 1000, waiting: 1_000_000"), FollowUps { depth: 1_000, waiting: 1_000_000, ..own });
}

#[test]
fn every_mistake_is_told_with_its_place_and_a_hint() {
    let told = |keys: &str, expected: &str| {
        let text = with(&format!("routes:\n- type: a\n  plugin: p\n  grants:\n    follow_ups:\n      {keys}"));
        assert_eq!(problems(&text), [format!("9: development.routes[1].grants.follow_ups{expected}")]);
    };
    told(
        "types: report",
        ".types: found \"report\", expected a list of task types, or `any` | write `types: [report]` for one type",
    );
    told("types: 5", ".types: found 5, expected a list of task types, or `any`");
    told("types: [a, '']", ".types[2]: found \"\", expected a task type: a text of 1 to 255 bytes");
    told("types: [5]", ".types[1]: found 5, expected a task type: a text of 1 to 255 bytes");
    told("types: [/^a/]", ".types[1]: found \"/^a/\", expected a task type | name each type; patterns do not count here");
    let many = format!("types: [{}]", (0..257).map(|number| format!("t{number}")).collect::<Vec<_>>().join(", "));
    told(&many, ".types: found 257 entries, expected at most 256");
    told(
        "users: all",
        ".users: found \"all\", expected `own` or `any` | `own` is the user of the task that submits, within its limit; `any` is every user, and none",
    );
    let keys = "expected the beginning of the keys (a text of 1 to 255 bytes), or `any`";
    told("keys: ''", &format!(".keys: found \"\", {keys}"));
    told("keys: [a/, b/]", &format!(".keys: found a list, {keys} | one beginning, not a list of them"));
    told("depth: 1001", ".depth: found 1001, expected a whole number from 0 to 1,000");
    told("waiting: some", ".waiting: found \"some\", expected a whole number from 0 to 1,000,000");
    told(
        "queues: mail",
        ".queues: found \"mail\", expected a list of queues, `own` or `any` | write `queues: [mail]` for one queue",
    );
    told("queues: [a, 7]", ".queues[2]: found 7, expected a queue's name");
    told(
        "queues: [two words]",
        ".queues[1]: the queue's name contains ' '; letters and digits of ASCII and _ - . : / are allowed",
    );
    told("type: a", ".type: no such key | did you mean types?");
    let text = with("routes:\n- type: a\n  plugin: p\n  grants:\n    follow_ups: 7");
    assert_eq!(
        problems(&text),
        [
            "8: development.routes[1].grants.follow_ups: found 7, expected a mapping of types, users, keys, queues, depth and waiting"
        ]
    );
}

/// The number beside the grants is another thing: how many one attempt may submit.
#[test]
fn follow_ups_of_the_route_itself_is_still_a_number() {
    let config = load(&with("routes:\n- {type: a, plugin: p, follow_ups: 7, grants: {follow_ups: {depth: 2}}}")).expect("valid");
    assert_eq!((config.routes[0].limits.follow_ups, config.routes[0].grants.follow_ups.depth), (7, 2));
    let text = with("routes:\n- {type: a, plugin: p, follow_ups: {types: any}}");
    assert_eq!(
        problems(&text),
        [
            "5: development.routes[1].follow_ups: found a mapping, expected a whole number from 0 to 10,000 | which follow-ups it may submit stands in its grants: `grants: {follow_ups: {...}}`"
        ]
    );
}
