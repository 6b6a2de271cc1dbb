//! PerfectQueue's table: its names in statements, its columns as the server has them, and the numbers that its one column of times lives by.

use sqlx::AssertSqlSafe;
use sqlx::mysql::MySqlConnection;

use super::schema::Columns;
use crate::{Error, PerfectQueue, Result};

/// What a finished row's time is set back by, and what separates the retained from what may be removed, in seconds.
pub(super) const DELETE_OFFSET: i64 = 1_000_000_000;
/// Rows whose time is not later than this are never acquired. With this very time and not ended, a row is held.
pub(super) const EVENT_HORIZON: i64 = 1_300_000_000;
/// The last moment that the table's INT can hold. It marks rows that are set aside; tasks wait for earlier ones only.
pub(super) const TIME_MAX: i64 = 2_147_483_647;
/// The owner of rows that are set aside, since nobody can read them: "laelaps" in ASCII.
pub(super) const SET_ASIDE: u64 = 0x6c61_656c_6170_7300;

/// The bit that tells our tokens from connection numbers.
const TOKEN: u64 = 1 << 62;

/// Below it stands the number of the host that claimed, in 22 bits, and below that what is random.
const NUMBER_SHIFT: u32 = 40;
/// The greatest number of a host.
pub(super) const NUMBER_MAX: u32 = (1 << 22) - 1;
/// The bits of a token that are not its host's number.
pub(super) const WITHOUT_NUMBER: u64 = !(((1 << 22) - 1) << NUMBER_SHIFT);

/// A number for `owner` that no connection has and no other claim: a one, the number of the host that claims (0 for one that nobody watches), and 39
/// random bits. They are enough, since `timeout` is part of every fence: a token has to differ only from others that the same row, or for the undoing
/// of a claim another row, gets with the same second written. It is even; the odd number behind it marks the row that a settlement under this token
/// has finished.
pub(super) fn token(number: u32) -> u64 {
    loop {
        let random = fastrand::u64(..1 << NUMBER_SHIFT) & !1;
        let token = TOKEN | u64::from(number.min(NUMBER_MAX)) << NUMBER_SHIFT | random;
        if token != SET_ASIDE {
            return token;
        }
    }
}

/// The number of the host whose claim wrote this token; 0 if nobody watches it.
pub(super) fn number_in(token: u64) -> u32 {
    u32::try_from((token & !WITHOUT_NUMBER) >> NUMBER_SHIFT).unwrap_or_default()
}

/// Whether an `owner` was written by a claim of ours.
pub(super) fn is_token(owner: u64) -> bool {
    owner >> 62 == 1 && owner != SET_ASIDE
}

/// The names that statements need.
#[derive(Debug)]
pub(super) struct Names {
    table: String,
    side: String,
    hosts: String,
    deaths: String,
    lock: String,
    has_side: bool,
    /// `FORCE INDEX` with the index on the times, whatever it is called; empty if there is none.
    index: String,
    /// How a key out of a set has to be spelt to be compared with the table's own.
    as_key: String,
    /// The same for a pattern of keys that is bound.
    as_pattern: String,
    /// The same for a key of our table.
    side_key: String,
    /// How a user out of a set has to be spelt to be stored.
    as_user: String,
    /// The character sets of keys and users.
    charset: String,
    user_charset: String,
}

impl Names {
    /// The names, before anything is known of the table as it is.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that MySQL cannot have.
    pub(super) fn new(config: &PerfectQueue) -> Result<Self> {
        let name = &config.table;
        let problem = |problem: String| Error::Config { setting: "table", problem };
        let characters = name.chars().count();
        let most = if config.side_table { 64 - HOSTS.len() } else { 64 };
        if characters == 0 || characters > most {
            return Err(problem(format!("the name has {characters} characters; 1 to {most} are allowed")));
        }
        if let Some(wrong) = name.chars().find(|&character| character == '\0' || u32::from(character) > 0xffff) {
            return Err(problem(format!("the name contains {wrong:?}, which MySQL does not allow")));
        }
        if name.ends_with(' ') {
            return Err(problem("the name ends with a space, which MySQL does not allow".to_owned()));
        }
        Ok(Self {
            table: quoted(name),
            side: quoted(&format!("{name}{SIDE}")),
            hosts: quoted(&format!("{name}{HOSTS}")),
            deaths: quoted(&format!("{name}{DEATHS}")),
            lock: name.clone(),
            has_side: config.side_table,
            index: String::new(),
            as_key: "f.id".to_owned(),
            as_pattern: "?".to_owned(),
            side_key: "s.id".to_owned(),
            as_user: "f.user".to_owned(),
            charset: String::new(),
            user_charset: String::new(),
        })
    }

    /// The names with what the server says of the table.
    pub(super) fn with(config: &PerfectQueue, columns: &Columns) -> Result<Self> {
        let index = columns.time_index.as_deref().map(|index| format!("FORCE INDEX ({})", quoted(index))).unwrap_or_default();
        let (charset, collation) = (&columns.charset, &columns.collation);
        // Sets come with all characters, whatever the database's own character set is.
        let collate = if charset == "binary" { String::new() } else { format!(" COLLATE {collation}") };
        let spelt = |key: &str| format!("CONVERT({key} USING {charset}){collate}");
        let as_user = format!("CONVERT(f.user USING {})", columns.user_charset);
        let (charset, user_charset) = (charset.clone(), columns.user_charset.clone());
        let (as_key, as_pattern, side_key) = (spelt("f.id"), spelt("?"), spelt("s.id"));
        Ok(Self { index, as_key, as_pattern, side_key, as_user, charset, user_charset, ..Self::new(config)? })
    }

    /// The name of the lock under which tasks are acquired.
    pub(super) fn lock(&self) -> &str {
        &self.lock
    }

    /// The names of the table, and of ours beside it if there are any, as they are.
    pub(super) fn plain(&self) -> Vec<String> {
        let all = ["", SIDE, HOSTS, DEATHS];
        let used = if self.has_side { &all[..] } else { &all[..1] };
        used.iter().map(|ours| format!("{}{ours}", self.lock)).collect()
    }

    /// The character set of keys.
    pub(super) fn charset(&self) -> &str {
        &self.charset
    }

    /// What of a task's names the columns cannot hold, in words. [`Fit::Unknown`]: only the server can tell.
    pub(super) fn fit(&self, key: &str, user: Option<&str>) -> Fit {
        let fits = [("key", "id", holds(&self.charset, key), &self.charset)];
        let of_user = user.map(|user| ("user", "resource", holds(&self.user_charset, user), &self.user_charset));
        let mut unknown = false;
        for (what, column, holds, charset) in fits.into_iter().chain(of_user) {
            match holds {
                Some(true) => {}
                Some(false) => return Fit::No(misfit(what, column, charset)),
                None => unknown = true,
            }
        }
        if unknown { Fit::Unknown } else { Fit::Yes }
    }

    /// The words for a key or user that the server says it cannot hold.
    pub(super) fn misfit(&self, is_key: bool) -> String {
        if is_key { misfit("key", "id", &self.charset) } else { misfit("user", "resource", &self.user_charset) }
    }

    /// Whether there are tables of ours beside it.
    pub(super) fn has_side(&self) -> bool {
        self.has_side
    }

    /// A statement with its names in place: `{t}` the table, `{s}` ours beside it, `{h}` ours of hosts, `{d}` ours of their deaths, `{index}` a hint to use the index on times,
    /// `{as_key}` the key `f.id` of a set, `{as_user}` the user `f.user` of a set, `{as_pattern}` a bound pattern of keys, `{as_side_key}` the text `f.id` of a set for our tables, `{side_key}` the key
    /// `s.id` of our table, `{number}` the number of the row `t`, `{side_number}` that of the row `s` of ours, `{host}` the number of the host in its owner, `{now}` the time in milliseconds.
    pub(super) fn sql(&self, statement: &str) -> AssertSqlSafe<String> {
        let mut sql = String::with_capacity(statement.len() + 256);
        let mut rest = statement;
        while let Some((before, behind)) = rest.split_once('{') {
            sql.push_str(before);
            let (name, behind) = behind.split_once('}').unwrap_or((behind, ""));
            sql.push_str(match name {
                "t" => &self.table,
                "s" => &self.side,
                "h" => &self.hosts,
                "d" => &self.deaths,
                "index" => &self.index,
                "as_key" => &self.as_key,
                "as_pattern" => &self.as_pattern,
                "as_user" => &self.as_user,
                "side_key" => &self.side_key,
                "as_side_key" => "CONVERT(f.id USING utf8mb4) COLLATE utf8mb4_bin",
                "number" => "CAST(CONV(LEFT(SHA2(CONVERT(t.id USING utf8mb4), 256), 15), 16, 10) AS SIGNED)",
                "side_number" => "CAST(CONV(LEFT(SHA2(s.id, 256), 15), 16, 10) AS SIGNED)",
                "host" => "((t.owner >> 40) & 4194303)",
                "now" => "CAST(CEILING(UNIX_TIMESTAMP(NOW(6)) * 1000) AS SIGNED)",
                other => unreachable!("a statement names {other}"),
            });
            rest = behind;
        }
        sql.push_str(rest);
        AssertSqlSafe(sql)
    }
}

/// Whether the columns can hold a task's names.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fit {
    Yes,
    /// What they cannot hold.
    No(String),
    Unknown,
}

fn misfit(what: &str, column: &str, charset: &str) -> String {
    format!("the {what} has characters that the column {column} of PerfectQueue's table, which is {charset}, cannot hold")
}

/// Whether a character set has all characters of a text; None: it is not known here.
fn holds(charset: &str, text: &str) -> Option<bool> {
    // What stands at 0x80 to 0x9f in MySQL's latin1, beside what has no sign there.
    const LATIN1: &str = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ\u{81}\u{8d}\u{8f}\u{90}\u{9d}";
    match charset {
        "utf8mb4" | "utf16" | "utf16le" | "utf32" | "binary" => Some(true),
        "utf8" | "utf8mb3" | "ucs2" => Some(text.chars().all(|character| u32::from(character) <= 0xffff)),
        "latin1" => {
            let is_there = |character: char| {
                character.is_ascii() || ('\u{a0}'..='\u{ff}').contains(&character) || LATIN1.contains(character)
            };
            Some(text.chars().all(is_there))
        }
        "ascii" => Some(text.is_ascii()),
        _ => text.is_ascii().then_some(true),
    }
}

/// What the names of our tables add to PerfectQueue's.
pub(super) const SIDE: &str = "_laelaps";
pub(super) const HOSTS: &str = "_laelaps_hosts";
pub(super) const DEATHS: &str = "_laelaps_death";

/// A name as MySQL reads any name.
pub(super) fn quoted(name: &str) -> String {
    format!("`{}`", name.replace('`', "``"))
}

/// A set of rows for one parameter.
pub(super) fn json<T: serde::Serialize>(rows: impl IntoIterator<Item = T>) -> String {
    let rows: Vec<T> = rows.into_iter().collect();
    serde_json::to_string(&rows).unwrap_or_else(|error| unreachable!("plain values are JSON: {error}"))
}

/// Rows of one statement.
const PART_ROWS: usize = 1_000;
/// Data of one statement, unless one row alone has more: below the least `max_allowed_packet` that servers come with.
const PART_BYTES: usize = 8 << 20;

/// Parts of a set that fit into a statement each; `bytes` tells how much data a row has.
pub(super) fn parts<T>(rows: &[T], bytes: impl Fn(&T) -> usize) -> impl Iterator<Item = &[T]> {
    let mut rest = rows;
    std::iter::from_fn(move || {
        let mut total = 0_usize;
        let fitting = rest.iter().take(PART_ROWS).take_while(|row| {
            total = total.saturating_add(bytes(row));
            total <= PART_BYTES
        });
        let (part, others) = rest.split_at(fitting.count().max(1).min(rest.len()));
        rest = others;
        (!part.is_empty()).then_some(part)
    })
}

/// The database's clock in milliseconds, rounded up.
pub(super) async fn now(names: &Names, connection: &mut MySqlConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(names.sql("SELECT {now}")).fetch_one(connection).await
}

/// The first whole second that is not before a moment in milliseconds, as the table can hold it.
pub(super) fn second_from(moment_ms: i64) -> i64 {
    (moment_ms.saturating_add(999) / 1_000).min(TIME_MAX - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(table: &str) -> PerfectQueue {
        PerfectQueue { table: table.to_owned(), cleanup_interval: 20, side_table: true }
    }

    #[test]
    fn any_name_is_quoted_and_none_gets_out() {
        let names = Names::new(&config("we`ird {s} name")).unwrap();
        assert_eq!(names.sql("SELECT 1 FROM {t} JOIN {s}").0, "SELECT 1 FROM `we``ird {s} name` JOIN `we``ird {s} name_laelaps`");
        assert_eq!(names.lock(), "we`ird {s} name");
    }

    #[test]
    fn character_sets_hold_what_they_have() {
        let holds = |charset: &str| ["a", "é", "€", "Ж", "日", "😀"].map(|text| holds(charset, text));
        let (yes, no) = (Some(true), Some(false));
        assert_eq!(holds("utf8mb4"), [yes; 6]);
        assert_eq!(holds("utf8mb3"), [yes, yes, yes, yes, yes, no]);
        assert_eq!(holds("latin1"), [yes, yes, yes, no, no, no]);
        assert_eq!(holds("ascii"), [yes, no, no, no, no, no]);
        assert_eq!(holds("koi8r"), [yes, None, None, None, None, None]);
    }

    #[test]
    fn names_that_mysql_cannot_have_are_refused() {
        let long = "x".repeat(51);
        for name in ["", "a\0b", "a ", "a\u{1f40e}", long.as_str()] {
            assert!(matches!(Names::new(&config(name)), Err(Error::Config { setting: "table", .. })), "{name:?}");
        }
    }

    #[test]
    fn tokens_are_told_from_connections_and_from_what_is_set_aside() {
        for number in (0..1_000).chain([2_908_517, NUMBER_MAX]) {
            let token = token(number);
            assert!(is_token(token) && token.is_multiple_of(2) && i64::try_from(token).is_ok());
            assert_eq!((number_in(token), number_in(token + 1)), (number, number));
            assert!(is_token(token & WITHOUT_NUMBER) && number_in(token & WITHOUT_NUMBER) == 0);
        }
        assert!(!is_token(0) && !is_token(u64::from(u32::MAX)) && !is_token(SET_ASIDE) && SET_ASIDE >> 62 == 1);
    }

    #[test]
    fn seconds_are_rounded_up() {
        assert_eq!([second_from(1_000), second_from(1_001), second_from(i64::MAX)], [1, 2, TIME_MAX - 1]);
    }
}
