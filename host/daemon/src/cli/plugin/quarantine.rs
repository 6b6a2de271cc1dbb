//! `laelaps plugin quarantine` and `laelaps plugin release`: plugin versions that no host runs any more, because hosts died of them.

use laelaps_queue::Quarantine;
use serde_json::json;

use super::super::output::{Output, exact_moment, in_one_line, moment, table};
use super::super::{Complaint, Exit, Place};

/// Hexadecimal digits of a whole digest.
const DIGITS: usize = 64;

#[derive(Debug, clap::Args)]
pub(super) struct List {
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

impl List {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let (_, queue) = place.open().await?;
        let found = queue.backend().quarantined().await?;
        queue.backend().close().await;
        let mut output = Output::open();
        if self.json {
            for quarantine in &found {
                let Quarantine { version, deaths, since } = quarantine;
                let since = exact_moment(*since);
                output.json(&json!({ "plugin": version.name, "digest": version.digest, "deaths": deaths, "since": since }))?;
            }
        } else {
            let mut rows = table(&["plugin", "sha256", "hosts that died", "the last at"]);
            for Quarantine { version, deaths, since } in &found {
                rows.add_row([
                    in_one_line(&version.name, 150),
                    in_one_line(&version.digest, DIGITS),
                    deaths.to_string(),
                    moment(*since),
                ]);
            }
            if !found.is_empty() {
                output.table(&rows)?;
            }
            output.line(&format!("{} entries.", found.len()))?;
        }
        output.close()?;
        Ok(Exit::Done)
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct Release {
    /// The sha256 of the version, or its first digits
    #[arg(value_name = "DIGEST", value_parser = digits)]
    digest: String,
}

/// The beginning of a digest, or all of it.
fn digits(text: &str) -> Result<String, String> {
    let text = text.to_ascii_lowercase();
    let is_digest = (1..=DIGITS).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_digest {
        Ok(text)
    } else {
        Err(format!("expected 1 to {DIGITS} hexadecimal digits, as `plugin quarantine` shows them"))
    }
}

impl Release {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let (config, queue) = place.open().await?;
        let quarantined = queue.backend().quarantined().await?;
        let digest = chosen(&self.digest, &quarantined)?;
        // A whole digest need not stand in the list: fewer deaths than it takes are forgotten as well.
        let is_released = queue.backend().release_plugin(&digest).await?;
        queue.backend().close().await;
        if !is_released {
            return Err(unknown(&digest).into());
        }
        Place::note(&config, "plugin release", json!({ "sha256": digest }));
        let mut output = Output::open();
        output.line(&format!("plugin version {digest} may run again"))?;
        output.close()?;
        Ok(Exit::Done)
    }
}

/// The one digest that begins so.
fn chosen(beginning: &str, quarantined: &[Quarantine]) -> Result<String, Complaint> {
    let digests = quarantined.iter().map(|quarantine| quarantine.version.digest.as_str());
    let mut found: Vec<&str> = digests.filter(|digest| digest.starts_with(beginning)).collect();
    // One content may serve under two names.
    found.sort_unstable();
    found.dedup();
    match found.as_slice() {
        [one] => Ok((*one).to_owned()),
        [] if beginning.len() == DIGITS => Ok(beginning.to_owned()),
        [] => Err(unknown(beginning)),
        several => {
            let message = format!("{} plugin versions under quarantine begin with {beginning}", several.len());
            Err(Complaint::new(Exit::Usage, message, "give more digits; `laelaps plugin quarantine` shows them all"))
        }
    }
}

fn unknown(digest: &str) -> Complaint {
    let message = format!("no host is known to have died of a plugin version {digest}");
    Complaint::new(Exit::NoSuchTask, message, "`laelaps plugin quarantine` lists the versions that do not run")
}

#[cfg(test)]
mod tests {
    use laelaps_queue::{PluginVersion, Timestamp};

    use super::*;

    fn quarantine(name: &str, digest: &str) -> Quarantine {
        let version = PluginVersion { name: name.to_owned(), digest: digest.to_owned() };
        Quarantine { version, deaths: 3, since: Timestamp(0) }
    }

    #[test]
    fn a_beginning_names_a_version_only_if_it_names_one() {
        let (a, b, whole) = (format!("ab{}", "0".repeat(62)), format!("ac{}", "0".repeat(62)), "d".repeat(64));
        let all = [quarantine("mail", &a), quarantine("post", &a), quarantine("zoo", &b)];
        let exit = |beginning: &str| chosen(beginning, &all).map_err(|complaint| complaint.exit);
        assert_eq!(exit("ab"), Ok(a));
        assert_eq!(exit("ac0"), Ok(b));
        assert_eq!(exit("a"), Err(Exit::Usage));
        assert_eq!(exit("f"), Err(Exit::NoSuchTask));
        assert_eq!(exit(&whole), Ok(whole.clone()), "the queue knows about fewer deaths");
    }

    #[test]
    fn only_digits_are_a_digest() {
        assert_eq!(digits("ABC"), Ok("abc".to_owned()));
        assert!(digits("").is_err() && digits("xyz").is_err() && digits(&"0".repeat(65)).is_err());
    }
}
