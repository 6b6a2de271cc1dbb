//! From a file to the chosen section: reading, YAML, merges, and where things stand.
//!
//! `serde_yaml` says what the values are; `saphyr`, which keeps positions, only says on which line a key stands.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use saphyr::{LoadableYamlNode, MarkedYamlOwned, YamlDataOwned};
use saphyr_parser::{Event, Parser};
use serde_yaml::{Mapping, Value};

use super::keys::nearest;
use super::{Error, Problem};

/// The most bytes of a configuration file.
const FILE_BYTES_MAX: usize = 256 << 10;
/// The longest message about one value.
const MESSAGE_BYTES_MAX: usize = 4_000;
/// The most that aliases may make of it: each value counts with its text and [`VALUE_BYTES`].
const EXPANDED_BYTES_MAX: usize = 8 << 20;
/// What a value takes besides its text, about.
const VALUE_BYTES: usize = 16;

/// One step from a section to a value in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The value of a key.
    Key(String),
    /// An entry of a list, from 0.
    Entry(usize),
}

/// What was found about a document so far, and the means to say where.
#[derive(Debug)]
pub(super) struct Report {
    path: PathBuf,
    section: String,
    positions: Option<MarkedYamlOwned>,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
}

/// The whole file as text.
pub(super) fn read(path: &Path) -> Result<String, Error> {
    let unreadable = |source| Error::Unreadable { path: path.to_path_buf(), source };
    // A pipe or a device could be endless; a folder opens as a file but cannot be read.
    let bytes = {
        use std::io::Read as _;
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).map_err(unreadable)?;
        file.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        bytes
    };
    if bytes.len() > FILE_BYTES_MAX {
        return Err(refuse(path, None, format!("the file is larger than {} KiB", FILE_BYTES_MAX >> 10), None));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..valid].iter().filter(|byte| **byte == b'\n').count() + 1;
        refuse(path, Some(line), "this line is not UTF-8".to_owned(), Some("save the file as UTF-8".to_owned()))
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// The chosen section with its merges done, and a report to fill.
pub(super) fn section(path: &Path, text: &str, name: &str) -> Result<(Mapping, Report), Error> {
    if let Some((line, message)) = multiplied_at(text) {
        return Err(refuse(path, Some(line), message, Some("write out what they stand for, or leave some of it out".to_owned())));
    }
    let document: Value = serde_yaml::from_str(text).map_err(|error| not_yaml(path, text, &error))?;
    // Only the lines are lost if the two libraries disagree about a file.
    let positions = MarkedYamlOwned::load_from_str(text).ok().and_then(|documents| documents.into_iter().next());
    let mut report =
        Report { path: path.to_path_buf(), section: name.to_owned(), positions, problems: Vec::new(), warnings: Vec::new() };
    let Value::Mapping(mut sections) = document else {
        let found = if document.is_null() { "the file is empty".to_owned() } else { "the file is not a mapping".to_owned() };
        return Err(refuse(path, None, format!("{found}, expected a section for each environment"), Some(example(name))));
    };
    let Some(chosen) = sections.remove(name) else {
        return Err(no_such_section(path, &sections, name));
    };
    let merged = match chosen {
        Value::Mapping(mapping) => {
            merge(mapping).map_err(|place| (place, "a merge (<<) takes a mapping or a list of mappings".to_owned()))
        }
        other => Err((Vec::new(), format!("found {}, expected a mapping of keys", super::keys::describe(&other)))),
    };
    match merged {
        Ok(mapping) => Ok((mapping, report)),
        Err((place, message)) => {
            report.problem(&place, message, None);
            Err(report.into_error())
        }
    }
}

impl Report {
    /// Note a mistake at a place below the section.
    pub(super) fn problem(&mut self, place: &[Step], message: String, hint: Option<String>) {
        let (line, key, message) = (self.line(place), Some(self.name(place)), bounded(message));
        self.problems.push(Problem { path: self.path.clone(), line, key, message, hint });
    }

    /// Note something odd at a place below the section.
    pub(super) fn warning(&mut self, place: &[Step], message: &str) {
        let problem = Problem {
            path: self.path.clone(),
            line: self.line(place),
            key: Some(self.name(place)),
            message: bounded(message.to_owned()),
            hint: None,
        };
        self.warnings.push(problem);
    }

    /// Whether there is a mistake.
    pub(super) fn has_problems(&self) -> bool {
        !self.problems.is_empty()
    }

    /// The file refused.
    pub(super) fn into_error(mut self) -> Error {
        self.problems.sort_by_key(|problem| problem.line);
        Error::Invalid { problems: self.problems, warnings: in_order(self.warnings) }
    }

    /// What was odd about a file that is accepted.
    pub(super) fn into_warnings(self) -> Vec<String> {
        in_order(self.warnings)
    }

    /// The line of a place, from 1. A place that is not in the file, such as a missing key, has the line of what it is missing from.
    pub(super) fn line(&self, place: &[Step]) -> Option<usize> {
        let root = self.positions.as_ref()?;
        let (mut line, mut node) = find(root, &self.section)?;
        for step in place {
            let next = match step {
                Step::Key(key) => find(node, key),
                Step::Entry(index) => entries(node).and_then(|nodes| nodes.get(*index)).map(|node| (line_of(node), node)),
            };
            let Some(next) = next else { break };
            (line, node) = next;
        }
        Some(line)
    }

    fn name(&self, place: &[Step]) -> String {
        let mut name = self.section.clone();
        for step in place {
            match step {
                Step::Key(key) => {
                    name.push('.');
                    name.push_str(key);
                }
                Step::Entry(index) => name.push_str(&format!("[{}]", index + 1)),
            }
        }
        name
    }
}

fn in_order(mut warnings: Vec<Problem>) -> Vec<String> {
    warnings.sort_by_key(|warning| warning.line);
    warnings.iter().map(Problem::to_string).collect()
}

/// The merges (`<<`) of a mapping done, at every depth: its own keys win, then those of the sources in their order. `serde_yaml`'s own
/// `apply_merge` stops after one step, and `production: *a` with `a: {<<: *b}` and `b: {<<: *c}` is common in real files.
fn merge(mapping: Mapping) -> Result<Mapping, Vec<Step>> {
    let mut merged = Mapping::new();
    let mut sources = Vec::new();
    for (key, value) in mapping {
        if key.as_str() == Some("<<") {
            let steps = || vec![Step::Key("<<".to_owned())];
            match value {
                Value::Mapping(source) => sources.push(source),
                Value::Sequence(several) => {
                    for source in several {
                        let Value::Mapping(source) = source else { return Err(steps()) };
                        sources.push(source);
                    }
                }
                _ => return Err(steps()),
            }
            continue;
        }
        let step = key.as_str().map(|key| Step::Key(key.to_owned()));
        merged.insert(key, merge_below(value).map_err(|place| step.into_iter().chain(place).collect::<Vec<_>>())?);
    }
    for source in sources {
        for (key, value) in merge(source)? {
            merged.entry(key).or_insert(value);
        }
    }
    Ok(merged)
}

fn merge_below(value: Value) -> Result<Value, Vec<Step>> {
    match value {
        Value::Mapping(mapping) => merge(mapping).map(Value::Mapping),
        Value::Sequence(list) => {
            let entries = list.into_iter().enumerate().map(|(index, value)| {
                merge_below(value).map_err(|place| std::iter::once(Step::Entry(index)).chain(place).collect::<Vec<_>>())
            });
            entries.collect::<Result<Vec<_>, _>>().map(Value::Sequence)
        }
        other => Ok(other),
    }
}

/// The line with whose alias a text stands for more than [`EXPANDED_BYTES_MAX`], and that in words; None if none does. Neither of the two libraries has a bound
/// that holds: 200 KB can stand for gigabytes. Behind what the parser of events does not take, and the other library may, each alias counts as
/// doubling the text.
fn multiplied_at(text: &str) -> Option<(usize, String)> {
    const MIB: usize = EXPANDED_BYTES_MAX >> 20;
    let mut sizes = HashMap::new();
    // Collections that have begun: their anchors, and what stood before them.
    let mut open = Vec::new();
    let mut total = 0_usize;
    for event in Parser::new_from_str(text) {
        let (event, span) = match event {
            Ok(event) => event,
            Err(error) => {
                let doublings = u32::try_from(aliases(text)).unwrap_or(u32::MAX);
                let most = 1_usize.checked_shl(doublings).and_then(|times| times.checked_mul(text.len()));
                let message = format!("{}; the aliases (*name) of this file may make more than {MIB} MiB of it", error.info());
                return most.is_none_or(|most| most > EXPANDED_BYTES_MAX).then(|| (error.marker().line(), message));
            }
        };
        match event {
            Event::Alias(anchor) => {
                total = total.saturating_add(sizes.get(&anchor).copied().unwrap_or(VALUE_BYTES));
                if total > EXPANDED_BYTES_MAX {
                    let message = format!("the aliases (*name) up to here make more than {MIB} MiB of this file");
                    return Some((span.start.line(), message));
                }
            }
            Event::Scalar(text, _, anchor, _) => {
                total = total.saturating_add(VALUE_BYTES + text.len());
                sizes.insert(anchor, VALUE_BYTES + text.len());
            }
            Event::SequenceStart(anchor, _) | Event::MappingStart(anchor, _) => {
                open.push((anchor, total));
                total = total.saturating_add(VALUE_BYTES);
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some((anchor, before)) = open.pop() {
                    sizes.insert(anchor, total - before);
                }
            }
            _ => {}
        }
    }
    None
}

/// How often something may be an alias: an asterisk where a value begins.
fn aliases(text: &str) -> usize {
    let bytes = text.as_bytes();
    let begins = |at: usize| {
        at == 0 || matches!(bytes[at - 1], 128..|b' '| b'\t' | b'\r' | b'\n' | b'[' | b',' | b'{' | b':' | b'-' | b'?')
    };
    bytes.iter().enumerate().filter(|(at, byte)| **byte == b'*' && begins(*at)).count()
}

fn find<'a>(node: &'a MarkedYamlOwned, key: &str) -> Option<(usize, &'a MarkedYamlOwned)> {
    let YamlDataOwned::Mapping(mapping) = &node.data else { return None };
    let named = |name: &str| mapping.iter().find(|(found, _)| found.data.as_str() == Some(name));
    if let Some((key, value)) = named(key) {
        return Some((line_of(key), value));
    }
    let (_, source) = named("<<")?;
    match entries(source) {
        Some(sources) => sources.iter().find_map(|source| find(source, key)),
        None => find(source, key),
    }
}

fn entries(node: &MarkedYamlOwned) -> Option<&Vec<MarkedYamlOwned>> {
    match &node.data {
        YamlDataOwned::Sequence(entries) => Some(entries),
        _ => None,
    }
}

fn line_of(node: &MarkedYamlOwned) -> usize {
    node.span.start.line()
}

fn refuse(path: &Path, line: Option<usize>, message: String, hint: Option<String>) -> Error {
    let problem = Problem { path: path.to_path_buf(), line, key: None, message, hint };
    Error::Invalid { problems: vec![problem], warnings: Vec::new() }
}

fn not_yaml(path: &Path, text: &str, error: &serde_yaml::Error) -> Error {
    let message = error.to_string();
    let line = error.location().map(|location| location.line());
    // The line stands in front already.
    let message = message.split(" at line ").next().unwrap_or(&message);
    let hint = if text.contains("<%") {
        Some(super::keys::ERB_HINT.to_owned())
    } else if message.contains("duplicate entry") && message.contains("<<") {
        Some("write several merges as one list: `<<: [*first, *second]`".to_owned())
    } else if message.contains("more than one document") {
        Some("keep one document: leave out the lines that hold only `---`".to_owned())
    } else if text.lines().any(|line| line.trim_start_matches(' ').starts_with('\t')) {
        Some("YAML is indented with spaces, not with tabs".to_owned())
    } else {
        None
    };
    refuse(path, line, format!("not valid YAML: {message}"), hint)
}

fn no_such_section(path: &Path, sections: &Mapping, name: &str) -> Error {
    let names: Vec<&str> = sections.iter().filter(|(_, value)| value.is_mapping()).filter_map(|(key, _)| key.as_str()).collect();
    if sections.contains_key("type") || sections.contains_key("url") {
        let message = format!("there is no section {name:?}: the keys stand at the top of the file");
        return refuse(path, None, message, Some(format!("write `{name}:` above them and indent them by two spaces")));
    }
    let message = if names.is_empty() {
        format!("there is no section {name:?}, nor any other")
    } else {
        format!("there is no section {name:?}, found {}", names.join(", "))
    };
    let hint = match nearest(name, names.iter().copied()) {
        Some(near) => {
            format!("did you mean -e {near}? The section is chosen by -e, else LAELAPS_ENV, else RAILS_ENV, else development")
        }
        None => "choose a section with -e ENV, or with LAELAPS_ENV or RAILS_ENV".to_owned(),
    };
    refuse(path, None, message, Some(hint))
}

fn example(name: &str) -> String {
    format!("start with: `{name}: {{type: rdb, url: \"sqlite:laelaps.db\", routes: []}}` (docs/configuration.md has more)")
}

/// What is said of one value, which it repeats: a value may have as many bytes as the file.
fn bounded(mut message: String) -> String {
    if message.len() > MESSAGE_BYTES_MAX {
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
        message.push('…');
    }
    message
}
