//! The entries of `grants:`, and whether they go together.

use std::path::PathBuf;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use serde_yaml::Value;

use super::document::{Report, Step};
use super::keys::{Keys, Unknown, mismatch};
use super::{Lookup, Route, follow_ups};
use crate::plugin::{FolderGrant, FollowUps, Grants, nested};

/// The most granted folders and the most granted variables of a route.
const ENTRIES_MAX: usize = 256;
/// The largest `size_limit`: 1 PiB.
const SIZE_LIMIT_MAX: u64 = 1 << 50;
/// The largest `file_limit`. Each file that handlers have made costs the host about 100 bytes.
const FILE_LIMIT_MAX: u32 = 10_000_000;
/// How long the granted folders may take to be looked at. A mount that hangs must not keep a host from starting.
const LOOK_TIME: Duration = Duration::from_secs(5);

/// What belongs to the host itself, as far as it is a file or in a folder.
pub(super) struct Own {
    /// The key that names it; none: the configuration file.
    pub(super) key: Option<&'static str>,
    pub(super) what: &'static str,
    /// The file, or any name in the folder.
    pub(super) path: PathBuf,
}

/// Refuse a granted folder within one that handlers may write to, whatever routes they belong to: a handler could rename what the inner
/// one's path needs, and put a link to another place there. And refuse that handlers may write to what is the host's own.
pub(super) fn refuse_nested(routes: &[Route], own: &[Own], report: &mut Report) {
    let all: Vec<_> = routes
        .iter()
        .flat_map(|route| route.grants.folders.iter().enumerate().map(move |(index, folder)| (route, index, folder)))
        .collect();
    if !all.iter().any(|(_, _, folder)| folder.writable) {
        return;
    }
    let step = |key: &str| Step::Key(key.to_owned());
    let granted = all.iter().map(|(_, _, folder)| (*folder).clone());
    let folders: Vec<FolderGrant> =
        granted.chain(own.iter().map(|own| FolderGrant::read_only(own.path.clone(), own.what))).collect();
    let Some(pairs) = look(folders) else {
        let most = LOOK_TIME.as_secs();
        let message =
            format!("the granted folders could not be looked at within {most} s; whether one lies within another is not known");
        return report.warning(&[step("routes")], &message);
    };
    for (inner, outer) in pairs {
        let (outer_route, _, outer) = &all[outer];
        let outer = format!(
            "{}, to which handlers of route {} at line {} may write",
            outer.host.display(),
            outer_route.index + 1,
            outer_route.line
        );
        match all.get(inner) {
            Some((route, index, folder)) => {
                let place = [step("routes"), Step::Entry(route.index), step("grants"), step("folders"), Step::Entry(*index)];
                let inner = folder.host.display();
                let message = format!("the folder {inner} lies within {outer}: they could change where its path leads");
                let hint = "move one of the two out of the other, or grant the outer one without `writable: true`";
                report.problem(&place, message, Some(hint.to_owned()));
            }
            None => {
                let own = &own[inner - all.len()];
                let place: Vec<Step> = own.key.map(step).into_iter().collect();
                let message = format!("{} lies in {outer}: they could take over this host", own.what);
                let hint = "grant a folder that holds nothing of the host's, or grant it without `writable: true`";
                report.problem(&place, message, Some(hint.to_owned()));
            }
        }
    }
}

/// Which lie within which, if that can be found out in time.
fn look(folders: Vec<FolderGrant>) -> Option<Vec<(usize, usize)>> {
    let (answer, answered) = sync_channel(1);
    let look = move || {
        let _ = answer.send(nested(&folders.iter().collect::<Vec<_>>()));
    };
    std::thread::Builder::new().name("laelaps-config".into()).spawn(look).ok()?;
    answered.recv_timeout(LOOK_TIME).ok()
}

/// What one route grants.
pub(super) fn read(mut keys: Keys<'_>, follow_ups: &FollowUps, lookup: &Lookup<'_>) -> Grants {
    let folders = keys.list("folders", "a list of folders", ENTRIES_MAX).unwrap_or_default();
    let (mut granted, mut environment) = (Vec::new(), Vec::new());
    for (index, entry) in folders.into_iter().enumerate() {
        let mut place = keys.place("folders");
        place.push(Step::Entry(index));
        match entry {
            Value::Mapping(mapping) => {
                let folder = folder(Keys::new(mapping, place, keys.report));
                granted.extend(folder);
            }
            other => mismatch(keys.report, &place, &other, "a mapping of host, guest and writable"),
        }
    }
    for (index, entry) in granted.iter().enumerate() {
        if granted[..index].iter().any(|earlier: &FolderGrant| earlier.guest == entry.guest) {
            let message = format!("two folders have the guest name {:?}", entry.guest);
            keys.report.problem(&keys.place("folders"), message, Some("give each a name of its own".to_owned()));
        }
    }
    let names = keys.list("environment", "a list of names", ENTRIES_MAX).unwrap_or_default();
    for (index, entry) in names.into_iter().enumerate() {
        let mut place = keys.place("environment");
        place.push(Step::Entry(index));
        match entry.as_str().filter(|name| !name.is_empty() && !name.contains(['=', '\0'])) {
            Some(name) => match lookup(name) {
                Some(value) => environment.push((name.to_owned(), value)),
                None => {
                    keys.report.warning(&place, &format!("the environment variable {name} is not set; handlers do not see it"))
                }
            },
            None => mismatch(keys.report, &place, &entry, "the name of an environment variable"),
        }
    }
    let follow_ups = match keys.mapping("follow_ups", "a mapping of types, users, keys, queues, depth and waiting") {
        Some(keys) => follow_ups::read(keys, follow_ups),
        None => follow_ups.clone(),
    };
    keys.finish(Unknown::Refuse);
    Grants { folders: granted.into(), environment, follow_ups }
}

fn folder(mut keys: Keys<'_>) -> Option<FolderGrant> {
    let mut required = |key: &'static str, what: &str| {
        if !keys.has(key) {
            keys.take(key);
            keys.problem_here(format!("found no {key}, expected {what}"), None);
            return None;
        }
        keys.text(key, what)
    };
    let host = required("host", "the path of a folder on this machine");
    let guest = required("guest", "the path under which the handler sees it, for example /data");
    let writable = keys.yes_or_no("writable").unwrap_or(false);
    for key in ["size_limit", "file_limit"] {
        if !writable && keys.has(key) {
            keys.warn(key, "says nothing about a folder that is not writable");
        }
    }
    let bytes_max = keys.size_or("size_limit", 0..=SIZE_LIMIT_MAX, "unlimited");
    let files_max = keys.whole_or("file_limit", 0..=FILE_LIMIT_MAX, "unlimited");
    if let Some(guest) = guest.as_ref().filter(|guest| !guest.starts_with('/')) {
        keys.problem("guest", format!("found {guest:?}, expected a path that starts with /"), None);
    }
    keys.finish(Unknown::Refuse);
    let defaults = FolderGrant::read_only(host?, guest?);
    Some(FolderGrant {
        writable,
        bytes_max: bytes_max.unwrap_or(defaults.bytes_max),
        files_max: files_max.map_or(defaults.files_max, |limit| limit.map(u64::from)),
        ..defaults
    })
}
