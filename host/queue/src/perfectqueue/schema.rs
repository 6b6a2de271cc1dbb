//! The tables: PerfectQueue's own, made as its `init` makes it, and ours beside it.
//!
//! Nothing in PerfectQueue's table says what made it, so its columns do: version 1 has no `owner` (before PerfectQueue 0.9), version 2 has
//! one, version 3 has our table of tasks beside it, version 4 those of hosts and their deaths too; a later one stands in the comment of our tables, which may
//! name the oldest that a program must know to work with them: `laelaps 5`, or `laelaps 6 5`. Statements of MySQL that change tables cannot be taken
//! back, so each step may be taken again.

use std::collections::BTreeMap;

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::mysql::{MySqlConnection, MySqlRow};

use super::run::Operation;
use super::table::{DEATHS as DEATHS_NAME, Fit, HOSTS as HOSTS_NAME, Names, SIDE as SIDE_NAME, quoted};
use crate::mysql::failure::Failure;
use crate::{Migration, PerfectQueue, PlannedStep, SchemaStatus};

/// The latest version that this program knows. The comments of our tables say it too.
const KNOWN: i64 = 4;
/// The least `max_allowed_packet` that nothing is said about: what MariaDB comes with.
const ROOM_MIN: i64 = 16 << 20;

/// PerfectQueue's table, without its index.
const TABLE: &str = "CREATE TABLE IF NOT EXISTS {t} (
    id VARCHAR(255) NOT NULL,
    timeout INT NOT NULL,
    data LONGBLOB NOT NULL,
    created_at INT,
    resource VARCHAR(255),
    max_running INT,
    owner BIGINT(21) UNSIGNED NOT NULL DEFAULT 0,
    PRIMARY KEY (id)
) ENGINE=InnoDB";

const OWNER: &str = "ALTER TABLE {t} ADD COLUMN owner BIGINT(21) UNSIGNED NOT NULL DEFAULT 0";

/// Ours. `created_at` tells a task from a later one of the same key. `state` and `timeout` are as we last wrote the task's row, and count
/// only while that row still has this `timeout`: what Ruby wrote since then wins. `root` is the number of the producer's task that a follow-up comes
/// from, NULL for any other. `alone_for` is the host that ends its work to run the task alone, until `alone_until` in Unix seconds (see
/// [`super::suspects`]).
const SIDE: &str = "CREATE TABLE IF NOT EXISTS {s} (
    id VARCHAR(255) NOT NULL,
    created_at BIGINT NOT NULL,
    state VARCHAR(9),
    timeout BIGINT,
    user VARCHAR(255),
    attempts INT UNSIGNED NOT NULL DEFAULT 0,
    max_attempts INT UNSIGNED,
    releases INT UNSIGNED NOT NULL DEFAULT 0,
    lost INT UNSIGNED NOT NULL DEFAULT 0,
    lost_alone INT UNSIGNED NOT NULL DEFAULT 0,
    alone TINYINT UNSIGNED NOT NULL DEFAULT 0,
    alone_for BIGINT UNSIGNED NOT NULL DEFAULT 0,
    alone_until BIGINT NOT NULL DEFAULT 0,
    lost_owner BIGINT UNSIGNED NOT NULL DEFAULT 0,
    lost_at BIGINT,
    root BIGINT,
    depth INT UNSIGNED NOT NULL DEFAULT 0,
    ended_ms BIGINT,
    plugin VARCHAR(255),
    error_code VARCHAR(255),
    error_message TEXT,
    output LONGBLOB,
    progress LONGTEXT,
    records LONGTEXT,
    PRIMARY KEY (id),
    INDEX by_state (state, timeout),
    INDEX by_root (root, state)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin COMMENT='laelaps 4'";

/// Ours of hosts that a watchdog watches (see [`super::hosts`]). Their numbers stand in tokens, so they never come again.
const HOSTS: &str = "CREATE TABLE IF NOT EXISTS {h} (
    id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT,
    identity VARCHAR(255) NOT NULL,
    name VARCHAR(255) NOT NULL,
    process_id INT UNSIGNED NOT NULL,
    started_at BIGINT NOT NULL,
    seen_at BIGINT NOT NULL,
    until BIGINT NOT NULL DEFAULT 0,
    left_at BIGINT,
    plugins LONGTEXT,
    PRIMARY KEY (id),
    INDEX by_identity (identity)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin COMMENT='laelaps 4'";

/// Ours of hosts that died while they ran a single plugin version (see [`super::deaths`]).
const DEATHS: &str = "CREATE TABLE IF NOT EXISTS {d} (
    host BIGINT UNSIGNED NOT NULL,
    name VARCHAR(255) NOT NULL,
    digest VARCHAR(255) NOT NULL,
    at BIGINT NOT NULL,
    PRIMARY KEY (host),
    INDEX by_version (digest, name)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin COMMENT='laelaps 4'";

/// Columns of our tables that older ones lack: table, column, how it is added.
const LATER: [(&str, &str, &str); 4] = [
    (SIDE_NAME, "lost_at", "ALTER TABLE {s} ADD COLUMN lost_at BIGINT"),
    (SIDE_NAME, "alone_for", "ALTER TABLE {s} ADD COLUMN alone_for BIGINT UNSIGNED NOT NULL DEFAULT 0"),
    (SIDE_NAME, "alone_until", "ALTER TABLE {s} ADD COLUMN alone_until BIGINT NOT NULL DEFAULT 0"),
    (HOSTS_NAME, "plugins", "ALTER TABLE {h} ADD COLUMN plugins LONGTEXT"),
];

/// The columns that are used, with the types they have to have. Ruby's older tables have them in other widths, which do no harm.
const COLUMNS: [(&str, &[&str]); 7] = [
    ("id", &["varchar"]),
    ("timeout", &["int", "bigint"]),
    ("data", &["longblob"]),
    ("created_at", &["int", "bigint"]),
    ("resource", &["varchar"]),
    ("max_running", &["int", "bigint"]),
    ("owner", &["bigint"]),
];

/// What the server says of the tables.
#[derive(Debug, Default)]
pub(super) struct Columns {
    /// Of the keys.
    pub(super) charset: String,
    /// Of the keys.
    pub(super) collation: String,
    /// Of the users.
    pub(super) user_charset: String,
    /// An index that begins with the times.
    pub(super) time_index: Option<String>,
    /// Name to type, of PerfectQueue's table.
    found: BTreeMap<String, String>,
    primary_key: Vec<String>,
    has_side: bool,
    has_hosts: bool,
    has_deaths: bool,
    /// Of [`LATER`], those that a table of ours lacks.
    lacks: Vec<(&'static str, &'static str, &'static str)>,
    /// The latest version that made one of our tables, by its comment.
    made_by: i64,
    /// The oldest version that a program must know to work with our tables, by the same.
    oldest: i64,
}

impl Columns {
    /// Look. Of a table that is not there nothing is found.
    pub(super) async fn find(config: &PerfectQueue, connection: &mut MySqlConnection) -> Result<Self, sqlx::Error> {
        const FIND: &str = "SELECT CAST(LOWER(column_name) AS CHAR), CAST(LOWER(data_type) AS CHAR),
                CAST(coalesce(character_set_name, 'binary') AS CHAR), CAST(coalesce(collation_name, 'binary') AS CHAR)
            FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = ?";
        const INDEXES: &str = "SELECT CAST(index_name AS CHAR), CAST(LOWER(column_name) AS CHAR)
            FROM information_schema.statistics WHERE table_schema = DATABASE() AND table_name = ? AND
                (index_name = 'PRIMARY' OR seq_in_index = 1) ORDER BY index_name, seq_in_index";
        const COMMENT: &str = "SELECT CAST(table_comment AS CHAR) FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = ?";
        let text = |row: &MySqlRow, place: usize| row.try_get::<String, _>(place);
        let mut columns = Self::default();
        for row in sqlx::query(FIND).bind(&config.table).fetch_all(&mut *connection).await? {
            let name = text(&row, 0)?;
            if name == "id" {
                (columns.charset, columns.collation) = (text(&row, 2)?, text(&row, 3)?);
            }
            if name == "resource" {
                columns.user_charset = text(&row, 2)?;
            }
            columns.found.insert(name, text(&row, 1)?);
        }
        for row in sqlx::query(INDEXES).bind(&config.table).fetch_all(&mut *connection).await? {
            match (text(&row, 0)?, text(&row, 1)?) {
                (index, column) if index == "PRIMARY" => columns.primary_key.push(column),
                (index, column) if column == "timeout" => columns.time_index = Some(index),
                _ => {}
            }
        }
        let ours =
            [(SIDE_NAME, &mut columns.has_side), (HOSTS_NAME, &mut columns.has_hosts), (DEATHS_NAME, &mut columns.has_deaths)];
        for (name, has) in ours {
            let name = format!("{}{name}", config.table);
            let comment: Option<String> = sqlx::query_scalar(COMMENT).bind(name).fetch_optional(&mut *connection).await?;
            *has = comment.is_some();
            if let Some((version, oldest)) = comment.as_deref().and_then(versions) {
                columns.made_by = columns.made_by.max(version);
                columns.oldest = columns.oldest.max(oldest);
            }
        }
        for later in LATER {
            let (name, column, _) = later;
            let found = sqlx::query(FIND).bind(format!("{}{name}", config.table)).fetch_all(&mut *connection).await?;
            let has = |row: &MySqlRow| text(row, 0).is_ok_and(|found| found == column);
            if !found.is_empty() && !found.iter().any(has) {
                columns.lacks.push(later);
            }
        }
        Ok(columns)
    }

    /// Whether PerfectQueue's table is there.
    pub(super) fn is_there(&self) -> bool {
        self.found.contains_key("id")
    }

    /// How they stand to what is needed.
    pub(super) fn status(&self, config: &PerfectQueue) -> SchemaStatus {
        let needed = needed(config);
        if !self.is_there() {
            return SchemaStatus::Missing;
        }
        if config.side_table && self.made_by > KNOWN {
            let (found, known, oldest, program) = (self.made_by, KNOWN, self.oldest, None);
            return if oldest > known {
                SchemaStatus::TooNew { found, known, oldest, program }
            } else {
                SchemaStatus::Newer { found, known, program }
            };
        }
        let found = if !self.found.contains_key("owner") {
            1
        } else if !config.side_table || !self.has_side {
            2
        } else if !self.has_hosts || !self.has_deaths || !self.lacks.is_empty() {
            3
        } else {
            4
        };
        if found < needed { SchemaStatus::Old { found, needed } } else { SchemaStatus::Current(found) }
    }

    /// What is missing, oldest step first: each version with a statement.
    pub(super) fn steps(&self, config: &PerfectQueue) -> Result<Vec<(i64, String)>, Failure> {
        let names = Names::new(config)?;
        let index = quoted(&format!("index_{}_on_timeout", config.table));
        let mut steps = Vec::new();
        if !self.is_there() {
            steps.push((2, names.sql(TABLE).0));
        } else if !self.found.contains_key("owner") {
            steps.push((2, names.sql(OWNER).0));
        }
        if self.time_index.is_none() {
            steps.push((2, format!("{} {index} ON {} (timeout)", "CREATE INDEX", names.sql("{t}").0)));
        }
        if config.side_table && !self.has_side {
            steps.push((3, names.sql(SIDE).0));
        }
        if config.side_table && !self.has_hosts {
            steps.push((4, names.sql(HOSTS).0));
        }
        if config.side_table && !self.has_deaths {
            steps.push((4, names.sql(DEATHS).0));
        }
        if config.side_table {
            steps.extend(self.lacks.iter().map(|(_, _, add)| (4, names.sql(add).0)));
        }
        Ok(steps)
    }

    /// How the table differs from what is needed, in words.
    pub(super) fn drift(&self, config: &PerfectQueue) -> Vec<String> {
        let table = &config.table;
        let mut differences = Vec::new();
        for (column, types) in COLUMNS {
            match self.found.get(column) {
                None if column == "owner" => {
                    differences.push(format!("{table} has no column owner (it was made before PerfectQueue 0.9); init adds it"));
                }
                None => differences.push(format!("{table} has no column {column}")),
                Some(found) if !types.contains(&found.as_str()) => {
                    differences.push(format!("{table}.{column} is {found}, not {}", types[0]));
                }
                Some(_) => {}
            }
        }
        if self.primary_key != ["id"] {
            differences.push(format!("the primary key of {table} is ({}), not (id)", self.primary_key.join(", ")));
        }
        if self.time_index.is_none() {
            differences
                .push(format!("{table} has no index on timeout; init adds it, and without it every claim reads the whole table"));
        }
        for (name, has) in [(SIDE_NAME, self.has_side), (HOSTS_NAME, self.has_hosts), (DEATHS_NAME, self.has_deaths)] {
            if config.side_table && !has {
                differences.push(format!("there is no table {table}{name}; init makes it"));
            }
        }
        if config.side_table {
            let lacks = self.lacks.iter().map(|(name, column, _)| format!("{table}{name} has no column {column}; init adds it"));
            differences.extend(lacks);
        }
        differences
    }
}

/// The version of a table of ours and the oldest that a program must know to work with it, as its comment tells them.
fn versions(comment: &str) -> Option<(i64, i64)> {
    let mut words = comment.strip_prefix("laelaps ")?.split(' ');
    let version = words.next()?.parse().ok()?;
    // Without a second number only those work with it that know it.
    Some((version, words.next().map_or(Some(version), |oldest| oldest.parse().ok())?))
}

/// The version that this program needs.
fn needed(config: &PerfectQueue) -> i64 {
    if config.side_table { KNOWN } else { 2 }
}

/// Take the steps that are missing. Others that do the same at this moment are waited for.
pub(super) async fn migrate(config: &PerfectQueue, connection: &mut MySqlConnection) -> Result<Migration, Failure> {
    const LOCK: &str = "SELECT GET_LOCK(CONCAT('laelaps.init.', LEFT(SHA2(CONCAT(DATABASE(), '.', ?), 256), 32)), 60)";
    const UNLOCK: &str = "SELECT RELEASE_LOCK(CONCAT('laelaps.init.', LEFT(SHA2(CONCAT(DATABASE(), '.', ?), 256), 32)))";
    let locked: Option<i64> = sqlx::query_scalar(LOCK).bind(&config.table).fetch_one(&mut *connection).await?;
    if locked != Some(1) {
        let waited = std::io::Error::new(std::io::ErrorKind::TimedOut, "another program has been making the tables for 60 s");
        return Err(Failure::Sql(sqlx::Error::Io(waited)));
    }
    let taken = take_steps(config, connection).await;
    // The lock goes with the connection at the latest.
    let _ = sqlx::query(UNLOCK).bind(&config.table).execute(connection).await;
    taken
}

async fn take_steps(config: &PerfectQueue, connection: &mut MySqlConnection) -> Result<Migration, Failure> {
    let columns = Columns::find(config, connection).await?;
    let from = match columns.status(config) {
        SchemaStatus::Missing => 0,
        SchemaStatus::Old { found, .. } => found,
        // An index may be missing all the same.
        SchemaStatus::Current(found) => found,
        later => return Ok(Migration { from: later.fits()?, applied: Vec::new(), version: later.fits()? }),
    };
    let steps = columns.steps(config)?;
    let mut applied = Vec::new();
    for (version, sql) in steps {
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut *connection).await?;
        applied.push(version);
    }
    applied.dedup();
    Ok(Migration { from, applied, version: needed(config) })
}

/// The steps as `init --dry-run` shows them.
pub(super) fn planned(steps: Vec<(i64, String)>) -> Vec<PlannedStep> {
    let mut planned: Vec<PlannedStep> = Vec::new();
    for (version, sql) in steps {
        match planned.last_mut().filter(|step| step.version == version) {
            Some(step) => step.sql = format!("{};\n{sql}", step.sql),
            None => planned.push(PlannedStep { version, oldest_program: version, sql }),
        }
    }
    planned
}

/// What the table's character set and collation, and the server's bounds, mean for tasks.
pub(super) struct Warnings;

#[async_trait]
impl Operation for Warnings {
    type Answer = Vec<String>;
    const DOING: &'static str = "looking at the table";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Self::Answer, Failure> {
        const ALIKE: &str = "SELECT {as_pattern} = {as_pattern}";
        const ROOM: &str = "SELECT CAST(@@max_allowed_packet AS SIGNED)";
        const PAIRS: [(&str, &str, &str, &str); 4] = [
            ("a", "A", "in upper and in lower case", "\"a\" and \"A\""),
            ("e", "é", "with and without accents", "\"e\" and \"é\""),
            ("a", "a ", "with and without spaces at their end", "\"a\" and \"a \""),
            ("😀", "🐎", "with one emoji and with another", "\"😀\" and \"🐎\""),
        ];
        let mut warnings = Vec::new();
        let charset = names.charset();
        if !matches!(names.fit("😀", None), Fit::Yes) {
            warnings.push(format!("the column id is {charset}: tasks whose keys have characters that it lacks are refused"));
        }
        if !matches!(names.fit("", Some("😀")), Fit::Yes) {
            warnings.push("the column resource has not all characters: tasks of users with others are refused".to_owned());
        }
        let mut alike = Vec::new();
        for (one, other, how, example) in PAIRS {
            let both_fit = [one, other].iter().all(|key| names.fit(key, None) == Fit::Yes);
            if both_fit && sqlx::query_scalar(names.sql(ALIKE)).bind(one).bind(other).fetch_one(&mut *connection).await? {
                alike.push(format!("{how} ({example})"));
            }
        }
        if !alike.is_empty() {
            warnings.push(format!(
                "two keys, or two users, are one to the table if they are the same {}: the second task exists already",
                alike.join(", ")
            ));
        }
        let room: i64 = sqlx::query_scalar(ROOM).fetch_one(connection).await?;
        if room < ROOM_MIN {
            warnings
                .push(format!("the server takes {room} bytes at once (max_allowed_packet); tasks with more data are refused"));
        }
        Ok(warnings)
    }
}
