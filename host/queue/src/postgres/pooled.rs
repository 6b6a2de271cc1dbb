//! Statements through a pooler, which may give each transaction another session of the server.
//!
//! Authority: the server behind the pooler. A session's settings and the statements that were prepared in it are not ours then: a pooler such as
//! PgBouncer passes no settings on, and before its version 1.21 it knows of no prepared statements, so that one is executed in a session that never
//! heard of it. What is found missing when the queue is opened ([`Pooler`]) is made good by [`Db`]: the settings are local to each
//! transaction, nothing is prepared beyond one, and a statement that stands alone gets a transaction of its own. That costs two more round
//! trips for each of these. Where a pooler keeps prepared statements and the role has the settings, nothing is changed.

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgArguments, PgConnection, PgQueryResult, PgRow, PgStatement, PgTypeInfo, Postgres};
use sqlx::{AssertSqlSafe, Either, Error, Execute, Executor, Row as _, SqlStr};

/// What a pooler between this program and the server keeps from us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pooler {
    /// It knows nothing of prepared statements (PgBouncer before 1.21, or without `max_prepared_statements`).
    pub(super) forgets_statements: bool,
    /// The settings that each transaction makes for itself; None if the role has them.
    settings: Option<String>,
}

impl Pooler {
    /// What stands in the way, found by looking; None if connections are sessions of the server.
    pub(super) async fn find(connection: &mut PgConnection, settings: &[(&str, String)]) -> Result<Option<Self>, Error> {
        // A direct connection has the settings that it asked for. What a role or the server's files set has another source.
        const LOOK: &str = "SELECT (SELECT source = 'client' FROM pg_settings WHERE name = 'enable_seqscan'),
            current_setting('enable_seqscan') = 'off' AND current_setting('enable_bitmapscan') = 'off' AND current_setting('enable_hashjoin') = 'off'
                AND current_setting('enable_mergejoin') = 'off' AND current_setting('jit') = 'off'
                AND current_setting('default_transaction_isolation') = 'read committed'";
        let row = sqlx::raw_sql(LOOK).fetch_one(&mut *connection).await?;
        if row.try_get(0)? {
            return Ok(None);
        }
        let has_settings: bool = row.try_get(1)?;
        let forgets_statements = forgets_statements(connection).await?;
        let local = settings.iter().map(|(name, value)| format!("; SET LOCAL {name} = '{value}'")).collect();
        Ok(Some(Self { forgets_statements, settings: if has_settings { None } else { Some(local) } }))
    }

    /// Whether anything has to be made good.
    pub(super) fn needs_care(&self) -> bool {
        self.forgets_statements || self.settings.is_some()
    }

    /// How a transaction begins.
    pub(super) fn begin(&self) -> String {
        format!("BEGIN ISOLATION LEVEL READ COMMITTED{}", self.settings())
    }

    /// What follows the beginning of a transaction.
    pub(super) fn settings(&self) -> &str {
        self.settings.as_deref().unwrap_or_default()
    }

    /// What of it an operator may want to change; a sentence each.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.forgets_statements {
            warnings.push(
                "the pooler knows no prepared statements: each statement is prepared again, in a transaction; PgBouncer keeps them from 1.21 on, \
                with max_prepared_statements"
                    .to_owned(),
            );
        }
        if self.settings.is_some() {
            warnings.push(
                "the pooler keeps our settings from the server: each transaction sets them; give them to the role, as docs/databases.md tells"
                    .to_owned(),
            );
        }
        warnings
    }
}

/// Whether a statement has our name for it in the session of the server: then the pooler does not know of it.
async fn forgets_statements(connection: &mut PgConnection) -> Result<bool, Error> {
    // It is prepared itself while it looks, under a name that begins so if nobody has changed it.
    const LOOK: &str = "SELECT name FROM pg_prepared_statements WHERE name LIKE 'sqlx\\_s\\_%' AND statement LIKE $1";
    sqlx::raw_sql("BEGIN").execute(&mut *connection).await?;
    let found =
        sqlx::query_scalar::<_, String>(LOOK).bind("SELECT name FROM pg_prepared_statements%").fetch_all(&mut *connection).await;
    let forgets = match found {
        Ok(names) => {
            // Not to be in the way of others in that session.
            for name in &names {
                sqlx::raw_sql(AssertSqlSafe(format!("DEALLOCATE \"{name}\""))).execute(&mut *connection).await?;
            }
            !names.is_empty()
        }
        // Somebody else's has the name (42P05), or it is gone by the time that it is executed (26000).
        Err(error)
            if error
                .as_database_error()
                .is_some_and(|error| error.code().is_some_and(|code| code == "42P05" || code == "26000")) =>
        {
            true
        }
        Err(error) => return Err(error),
    };
    sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await?;
    Ok(forgets)
}

/// Where statements run.
#[derive(Debug)]
pub(super) struct Db<'c> {
    connection: &'c mut PgConnection,
    /// Set if something has to be made good.
    pooler: Option<&'c Pooler>,
    /// Outside a transaction.
    is_alone: bool,
}

impl<'c> Db<'c> {
    /// A connection of an operation's, inside a transaction or not.
    pub(super) fn new(connection: &'c mut PgConnection, pooler: Option<&'c Pooler>, is_alone: bool) -> Self {
        Self { connection, pooler: pooler.filter(|pooler| pooler.needs_care()), is_alone }
    }

    /// A connection of the caller's, inside a transaction.
    pub(super) fn of_caller(connection: &'c mut PgConnection) -> Self {
        Self { connection, pooler: None, is_alone: false }
    }

    /// For a statement of several.
    pub(super) fn again(&mut self) -> Db<'_> {
        Db { connection: self.connection, pooler: self.pooler, is_alone: self.is_alone }
    }
}

type Step = Either<PgQueryResult, PgRow>;

/// Run a statement to its end, with what the pooler keeps from it.
async fn run<'q>(
    connection: &mut PgConnection,
    pooler: &Pooler,
    is_alone: bool,
    mut query: impl Execute<'q, Postgres>,
) -> Result<Vec<Step>, Error> {
    let arguments = query.take_arguments().map_err(Error::Encode)?;
    // Without arguments it is sent as it is, and is a transaction by itself or a part of one.
    let is_alone = is_alone && arguments.is_some();
    let statement = Statement { arguments, persistent: !pooler.forgets_statements, sql: query.sql() };
    if !is_alone {
        return connection.fetch_many(statement).try_collect().await;
    }
    sqlx::raw_sql(AssertSqlSafe(pooler.begin())).execute(&mut *connection).await?;
    let done: Result<Vec<Step>, Error> = connection.fetch_many(statement).try_collect().await;
    let ended = sqlx::raw_sql(if done.is_ok() { "COMMIT" } else { "ROLLBACK" }).execute(&mut *connection).await;
    match (done, ended) {
        (Err(error), Ok(_)) => Err(error),
        // A connection that cannot be taken out of its transaction is of no more use, whatever else was wrong.
        (_, Err(error)) => Err(error),
        (Ok(steps), Ok(_)) => Ok(steps),
    }
}

impl<'c> Executor<'c> for Db<'c> {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Step, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let Self { connection, pooler, is_alone } = self;
        let Some(pooler) = pooler else { return connection.fetch_many(query) };
        let steps =
            async move { run(connection, pooler, is_alone, query).await.map(|steps| futures::stream::iter(steps).map(Ok)) };
        futures::stream::once(steps).try_flatten().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let Self { connection, pooler, is_alone } = self;
        let Some(pooler) = pooler else { return connection.fetch_optional(query) };
        Box::pin(async move {
            let steps = run(connection, pooler, is_alone, query).await?;
            Ok(steps.into_iter().find_map(Either::right))
        })
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, Result<PgStatement, Error>>
    where
        'c: 'e,
    {
        self.connection.prepare_with(sql, parameters)
    }
}

/// A statement that is kept prepared or not, whatever it said itself.
struct Statement {
    sql: SqlStr,
    arguments: Option<PgArguments>,
    persistent: bool,
}

impl Execute<'_, Postgres> for Statement {
    fn sql(self) -> SqlStr {
        self.sql
    }

    fn statement(&self) -> Option<&PgStatement> {
        None
    }

    fn take_arguments(&mut self) -> Result<Option<PgArguments>, BoxDynError> {
        Ok(self.arguments.take())
    }

    fn persistent(&self) -> bool {
        self.persistent
    }
}
