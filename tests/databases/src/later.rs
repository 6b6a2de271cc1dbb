//! Steps of the schema as a later build of Laelaps may have them, for tests of upgrades: a column more for every task, and a table more.

/// The statements of the step to `version` on the database of this URL. On MariaDB, whose DDL commits by itself, each of them can be run again.
#[must_use]
pub fn later_step(url: &str, version: i64) -> String {
    match url.split(':').next() {
        Some("sqlite") => format!(
            "ALTER TABLE task ADD COLUMN later_{version} INTEGER NOT NULL DEFAULT 0;
            CREATE TABLE later_{version} (task INTEGER PRIMARY KEY, words TEXT NOT NULL) STRICT;"
        ),
        Some("postgres" | "postgresql") => format!(
            "ALTER TABLE laelaps.task ADD COLUMN later_{version} int4 NOT NULL DEFAULT 0;
            CREATE TABLE laelaps.later_{version} (task int8 PRIMARY KEY, words text NOT NULL);"
        ),
        _ => format!(
            "ALTER TABLE laelaps_task ADD COLUMN later_{version} INT NOT NULL DEFAULT 0;\n\
            CREATE TABLE IF NOT EXISTS laelaps_later_{version} (task BIGINT NOT NULL, words TEXT NOT NULL, PRIMARY KEY (task)) ENGINE = InnoDB;\n"
        ),
    }
}
