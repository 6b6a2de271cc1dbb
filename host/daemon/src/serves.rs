//! What a host serves, in the words of the database; and which tasks no host serves.

use std::collections::HashSet;

use laelaps_queue::{HostRecord, QueuedType, ServedRoute, ServedTypes, Serves};
use regex::Regex;

use crate::config::{Config, Matcher, Queues};
use crate::plugin::Store;

/// What this host serves now.
pub(crate) fn of(config: &Config, store: &Store) -> Serves {
    let queues = match &config.queues {
        Queues::All => None,
        Queues::Named(queues) => Some(queues.iter().map(|queue| queue.name.clone()).collect()),
    };
    let route = |route: &crate::config::Route| ServedRoute {
        types: match &route.matcher {
            Matcher::Exact(exact) => ServedTypes::Type(exact.clone()),
            Matcher::Pattern(pattern) => ServedTypes::Pattern(pattern.as_str().to_owned()),
        },
        plugin: route.plugin.clone(),
        is_loaded: store.current(&route.plugin).is_some(),
    };
    Serves { queues, routes: config.routes.iter().map(route).collect() }
}

/// Whether a host may live, as far as the database can tell.
fn may_live(host: &HostRecord) -> bool {
    host.alive != Some(false)
}

/// Whether any of the hosts may live.
pub(crate) fn any_lives(hosts: &[HostRecord]) -> bool {
    hosts.iter().any(may_live)
}

/// Those of the types that none of the hosts would run: each is of no queue of theirs, or of no route, or its plugin is not there. Dead hosts do
/// not count, and one that has not said what it serves counts as serving nothing.
pub(crate) fn unserved(hosts: &[HostRecord], types: Vec<QueuedType>) -> Vec<QueuedType> {
    // Most hosts of a fleet say the same.
    let said: HashSet<&Serves> = hosts.iter().filter(|host| may_live(host)).filter_map(|host| host.serves.as_ref()).collect();
    let served: Vec<Served> = said.into_iter().map(Served::new).collect();
    types.into_iter().filter(|queued| !served.iter().any(|served| served.runs(queued))).collect()
}

/// What one or more hosts serve, ready to be compared.
struct Served<'a> {
    queues: Option<HashSet<&'a str>>,
    routes: Vec<(Matcher, bool)>,
}

impl<'a> Served<'a> {
    fn new(serves: &'a Serves) -> Self {
        let matcher = |route: &ServedRoute| match &route.types {
            ServedTypes::Type(exact) => Some(Matcher::Exact(exact.clone())),
            // A host has read it, so it is one, unless somebody wrote it by hand.
            ServedTypes::Pattern(pattern) => Regex::new(pattern).ok().map(Matcher::Pattern),
        };
        Self {
            queues: serves.queues.as_ref().map(|queues| queues.iter().map(String::as_str).collect()),
            routes: serves.routes.iter().filter_map(|route| Some((matcher(route)?, route.is_loaded))).collect(),
        }
    }

    fn runs(&self, queued: &QueuedType) -> bool {
        let is_asked_for = self.queues.as_ref().is_none_or(|queues| queues.contains(queued.queue.as_str()));
        let first = self.routes.iter().find(|(matcher, _)| matcher.matches(&queued.task_type));
        is_asked_for && first.is_some_and(|(_, is_loaded)| *is_loaded)
    }
}

#[cfg(test)]
mod tests {
    use laelaps_queue::{HostId, Timestamp};

    use super::*;

    fn host(alive: Option<bool>, serves: Option<Serves>) -> HostRecord {
        HostRecord {
            id: HostId(1),
            name: String::new(),
            process_id: 1,
            started_at: Timestamp(0),
            running: 0,
            alive,
            identity: None,
            serves,
        }
    }

    fn route(types: ServedTypes, is_loaded: bool) -> ServedRoute {
        ServedRoute { types, plugin: "p".to_owned(), is_loaded }
    }

    fn exact(name: &str) -> ServedTypes {
        ServedTypes::Type(name.to_owned())
    }

    fn pattern(pattern: &str) -> ServedTypes {
        ServedTypes::Pattern(pattern.to_owned())
    }

    fn serving(queues: Option<&[&str]>, routes: Vec<ServedRoute>) -> Option<Serves> {
        Some(Serves { queues: queues.map(|queues| queues.iter().map(|queue| (*queue).to_owned()).collect()), routes })
    }

    fn left(hosts: &[HostRecord], types: &[(&str, &str)]) -> Vec<String> {
        let queued =
            |(queue, name): &(&str, &str)| QueuedType { queue: (*queue).to_owned(), task_type: (*name).to_owned(), tasks: 1 };
        unserved(hosts, types.iter().map(queued).collect()).into_iter().map(|queued| queued.task_type).collect()
    }

    #[test]
    fn the_first_route_that_takes_a_type_decides() {
        let routes = vec![route(exact("a"), false), route(pattern("^[ab]$"), true), route(exact("c"), true)];
        let hosts = [host(None, serving(None, routes))];
        assert_eq!(left(&hosts, &[("default", "a"), ("default", "b"), ("mail", "c"), ("default", "d")]), ["a", "d"]);
    }

    #[test]
    fn a_type_is_served_in_the_queues_of_a_host_alone() {
        let hosts = [
            host(Some(true), serving(Some(&["mail"]), vec![route(pattern(""), true)])),
            host(Some(true), serving(Some(&["default"]), vec![route(exact("a"), true)])),
        ];
        assert_eq!(left(&hosts, &[("default", "a"), ("default", "b"), ("mail", "b"), ("video", "a")]), ["b", "a"]);
    }

    #[test]
    fn hosts_that_are_dead_or_say_nothing_serve_nothing() {
        let all = || serving(None, vec![route(pattern(""), true)]);
        assert_eq!(left(&[host(Some(false), all()), host(Some(true), None)], &[("default", "a")]), ["a"]);
        assert!(left(&[host(Some(false), all()), host(None, all())], &[("default", "a")]).is_empty());
        assert_eq!(left(&[host(None, serving(None, vec![route(pattern("("), true)]))], &[("default", "a")]), ["a"]);
        assert!(left(&[], &[]).is_empty());
    }
}
