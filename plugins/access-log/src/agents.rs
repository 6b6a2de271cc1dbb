//! The second edition's addition: what the user agents are.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// Families by the first mark that a user agent holds; bots first, since they like to call themselves browsers, and among browsers those
/// first that also name the others.
const FAMILIES: [(&str, &[&str]); 11] = [
    ("Googlebot", &["Googlebot", "AdsBot-Google", "Mediapartners-Google"]),
    ("Bingbot", &["bingbot", "msnbot", "BingPreview"]),
    ("other bot", &["bot", "Bot", "BOT", "spider", "Spider", "crawl", "Crawl", "slurp", "Slurp", "facebookexternalhit"]),
    ("feed reader", &["feed", "Feed", "RSS", "Tiny Tiny", "Reeder", "Netvibes", "NetNewsWire"]),
    (
        "tool",
        &[
            "curl",
            "Wget",
            "wget",
            "python",
            "Python",
            "Ruby",
            "Java/",
            "Go ",
            "Go-http",
            "libwww",
            "Apache-HttpClient",
            "UniversalFeed",
        ],
    ),
    ("Edge", &["Edge/", "Edg/"]),
    ("Opera", &["Opera", "OPR/"]),
    ("Internet Explorer", &["MSIE", "Trident/"]),
    ("Firefox", &["Firefox/", "Iceweasel"]),
    ("Chrome", &["Chrome/", "Chromium/", "CriOS/"]),
    ("Safari", &["Safari/"]),
];
const BOTS: [&str; 3] = ["Googlebot", "Bingbot", "other bot"];

/// Requests per family of user agents.
#[derive(Debug, Default)]
pub(crate) struct Agents {
    families: BTreeMap<&'static str, u64>,
}

impl Agents {
    pub(crate) fn add(&mut self, agent: Option<&str>) {
        *self.families.entry(agent.map_or("none", family)).or_default() += 1;
    }

    /// Adds `agents` and `bot_share`, the bots' part of the requests from 0 to 1, to the report.
    pub(crate) fn report_into(&self, report: &mut Value) {
        let bots: u64 = BOTS.iter().filter_map(|family| self.families.get(family)).sum();
        let all: u64 = self.families.values().sum();
        report["agents"] = json!(self.families);
        report["bots"] = json!(bots);
        #[allow(clippy::cast_precision_loss, reason = "a share for people")]
        let share = if all == 0 { 0.0 } else { (bots as f64 / all as f64 * 1e4).round() / 1e4 };
        report["bot_share"] = json!(share);
    }
}

fn family(agent: &str) -> &'static str {
    FAMILIES.iter().find(|(_, marks)| marks.iter().any(|mark| agent.contains(mark))).map_or("other", |(family, _)| *family)
}
