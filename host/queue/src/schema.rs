//! Versions of the tables: which steps a program knows, and how a database that others may have moved on stands to it.
//!
//! Authority: the database keeps a record of each step that was taken. A program of schema P works on a database of schema V if V is P, or if V is
//! later and no step asks for programs of more than P (`oldest_program`). So hosts of two builds share a database while an upgrade goes on.
//! A step's text is recorded as a fingerprint: tables that another text of the same number made are not ours to write to.

use std::borrow::Cow;

use crate::{Config, Error, Result, SchemaStatus};

/// A step from one version of the tables to the next.
#[doc(hidden)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaStep {
    /// The version of the tables after it.
    pub version: i64,
    /// The least version that a program must know to work with the tables after it: at most `version`.
    pub oldest_program: i64,
    /// Its statements.
    pub sql: Cow<'static, str>,
}

impl SchemaStep {
    pub(crate) const fn new(version: i64, oldest_program: i64, sql: &'static str) -> Self {
        Self { version, oldest_program, sql: Cow::Borrowed(sql) }
    }

    /// What tells its text from another one, however both are commented and laid out.
    pub(crate) fn fingerprint(&self) -> String {
        let mut sum = flate2::Crc::new();
        for word in self.sql.lines().filter(|line| !line.trim_start().starts_with("--")).flat_map(str::split_whitespace) {
            sum.update(word.as_bytes());
            sum.update(b" ");
        }
        format!("{:08x}", sum.sum())
    }
}

/// The database's record of a step that was taken.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) version: i64,
    pub(crate) oldest_program: i64,
    /// The version of Laelaps that took it; empty if the tables are older than that column.
    pub(crate) program: String,
    pub(crate) fingerprint: String,
}

impl From<(i64, i64, String, String)> for Record {
    fn from((version, oldest_program, program, fingerprint): (i64, i64, String, String)) -> Self {
        Self { version, oldest_program, program, fingerprint }
    }
}

/// The version of Laelaps that a record names.
pub(crate) const PROGRAM: &str = env!("CARGO_PKG_VERSION");

/// All steps that a program knows, from an empty database on, in order.
#[derive(Clone, Debug)]
pub(crate) struct Steps(Vec<SchemaStep>);

impl Steps {
    /// Those of this program; and those of a later one, where a test of upgrades plays it.
    pub(crate) fn new(own: &[SchemaStep], config: &Config) -> Self {
        Self(own.iter().chain(&config.later_steps).cloned().collect())
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &SchemaStep> {
        self.0.iter()
    }

    /// The version that this program needs.
    pub(crate) fn needed(&self) -> i64 {
        self.0.last().map_or(0, |step| step.version)
    }

    /// How a database with these records stands to this program.
    pub(crate) fn status(&self, records: &[Record]) -> SchemaStatus {
        let known = self.needed();
        let Some(last) = records.iter().max_by_key(|record| record.version) else { return SchemaStatus::Missing };
        let differs = |record: &&Record| {
            self.0.iter().any(|step| step.version == record.version && step.fingerprint() != record.fingerprint)
        };
        if let Some(other) = records.iter().find(differs) {
            return SchemaStatus::Other { found: other.version };
        }
        let found = last.version;
        let oldest = records.iter().map(|record| record.oldest_program).max().unwrap_or(found);
        let program = Some(last.program.clone()).filter(|program| !program.is_empty());
        match found {
            found if found == known => SchemaStatus::Current(found),
            found if found < known => SchemaStatus::Old { found, needed: known },
            found if oldest <= known => SchemaStatus::Newer { found, known, program },
            found => SchemaStatus::TooNew { found, known, oldest, program },
        }
    }

    /// The steps that bring a database of this status up to what this program needs, and the version that they begin from.
    ///
    /// # Errors
    /// If this program must not touch its tables.
    pub(crate) fn left(&self, status: &SchemaStatus) -> Result<(i64, Vec<&SchemaStep>)> {
        let from = match status {
            SchemaStatus::Missing => 0,
            SchemaStatus::Old { found, .. } => *found,
            other => other.fits()?,
        };
        Ok((from, self.0.iter().filter(|step| step.version > from).collect()))
    }
}

impl SchemaStatus {
    /// The schema's version, if this program can work with it.
    ///
    /// # Errors
    /// [`Error::NotInitialised`], [`Error::SchemaTooOld`], [`Error::SchemaTooNew`] or [`Error::OtherSchema`] if it cannot.
    pub fn fits(&self) -> Result<i64> {
        match self.clone() {
            Self::Current(version) => Ok(version),
            Self::Newer { found, .. } => Ok(found),
            Self::Missing => Err(Error::NotInitialised),
            Self::Old { found, needed } => Err(Error::SchemaTooOld { found, needed }),
            Self::TooNew { found, known, oldest, program } => Err(Error::SchemaTooNew { found, known, oldest, program }),
            Self::Other { found } => Err(Error::OtherSchema { found }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(known: i64) -> Steps {
        Steps((1..=known).map(step).collect())
    }

    /// Step 3 shuts out programs that do not know step 2.
    fn step(version: i64) -> SchemaStep {
        let oldest_program = if version < 3 { 1 } else { 2 };
        SchemaStep { version, oldest_program, sql: format!("CREATE TABLE t{version} (id INT)").into() }
    }

    fn records(made: i64) -> Vec<Record> {
        let record = |step: SchemaStep| Record {
            version: step.version,
            oldest_program: step.oldest_program,
            program: format!("0.{}.0", step.version),
            fingerprint: step.fingerprint(),
        };
        (1..=made).map(step).map(record).collect()
    }

    #[test]
    fn a_program_works_with_a_later_schema_that_admits_it() {
        assert_eq!(steps(1).status(&[]), SchemaStatus::Missing);
        assert_eq!(steps(2).status(&records(2)), SchemaStatus::Current(2));
        assert_eq!(steps(2).status(&records(1)), SchemaStatus::Old { found: 1, needed: 2 });
        let program = |version: i64| Some(format!("0.{version}.0"));
        assert_eq!(steps(1).status(&records(2)), SchemaStatus::Newer { found: 2, known: 1, program: program(2) });
        assert_eq!(steps(1).status(&records(3)), SchemaStatus::TooNew { found: 3, known: 1, oldest: 2, program: program(3) });
        assert_eq!(steps(2).status(&records(4)), SchemaStatus::Newer { found: 4, known: 2, program: program(4) });
    }

    #[test]
    fn what_a_step_shut_out_no_later_one_lets_in() {
        let mut records = records(4);
        records[3].oldest_program = 1;
        assert!(matches!(steps(1).status(&records), SchemaStatus::TooNew { oldest: 2, .. }));
    }

    #[test]
    fn another_text_of_a_known_step_is_another_schema_and_its_layout_is_not() {
        let mut other = records(3);
        other[0].fingerprint = SchemaStep::new(1, 1, "CREATE TABLE t1 (id INT, more INT)").fingerprint();
        assert_eq!(steps(2).status(&other), SchemaStatus::Other { found: 1 });
        assert!(steps(2).left(&steps(2).status(&other)).is_err());
        other[0].fingerprint = SchemaStep::new(1, 1, "-- A comment; more\nCREATE  TABLE t1\n    (id INT)\n").fingerprint();
        assert!(matches!(steps(2).status(&other), SchemaStatus::Newer { .. }));
    }

    #[test]
    fn a_database_is_moved_on_by_the_steps_that_it_lacks() {
        let left = |known: i64, made: i64| {
            let steps = steps(known);
            let (from, left) = steps.left(&steps.status(&records(made))).unwrap();
            (from, left.iter().map(|step| step.version).collect::<Vec<_>>())
        };
        assert_eq!(left(3, 0), (0, vec![1, 2, 3]));
        assert_eq!(left(3, 1), (1, vec![2, 3]));
        assert_eq!(left(2, 2), (2, vec![]));
        assert_eq!(left(1, 2), (2, vec![]), "nothing is taken back");
    }
}
