//! Which accounts a claim looks at: the heaviest open ones and those passed over for long, of all queues or of those that it asks for.

use std::collections::HashSet;

use super::claim::count;
use super::failure::Failure;
use super::session::Session;

/// An open account's name, and what it is ordered by.
macro_rules! open_columns {
    () => {
        "SELECT queue, user_name, weight, head_turn, head_task, picked FROM laelaps.account WHERE open"
    };
}

/// The order of the heaviest.
macro_rules! by_weight {
    ($limit:literal) => {
        concat!(" ORDER BY weight DESC, head_turn, head_task LIMIT (SELECT ", $limit, "::int8)")
    };
}

/// The accounts of a sort, of all queues: $1 to $4 as in [`OPEN_ACCOUNTS`].
macro_rules! of_all {
    ($and:literal, $order:expr) => {
        concat!(
            "SELECT queue, user_name FROM ((",
            open_columns!(),
            " AND queue = ''",
            $and,
            $order,
            ") UNION ALL (",
            open_columns!(),
            " AND octet_length(queue) > 0",
            $and,
            $order,
            ")) AS either",
            $order
        )
    };
}

/// The accounts of a sort, of the queues $5.
macro_rules! of_some {
    ($and:literal, $order:expr) => {
        concat!(
            "SELECT queue, user_name FROM ((",
            open_columns!(),
            " AND queue = '' AND '' = ANY((SELECT $5::text[])::text[])",
            $and,
            $order,
            ") UNION ALL (SELECT first.* FROM unnest((SELECT $5::text[])) AS asked (name) CROSS JOIN LATERAL (",
            open_columns!(),
            " AND queue <> '' AND queue = asked.name",
            $and,
            $order,
            ") AS first)) AS either",
            $order
        )
    };
}

/// The accounts that are found so, locked in one order.
macro_rules! locked {
    ($heaviest:expr, $oldest:expr, $without_limit:expr) => {
        concat!(
            "SELECT account.* FROM (SELECT queue, user_name FROM (",
            $heaviest,
            ") AS heaviest UNION SELECT queue, user_name FROM (",
            $oldest,
            ") AS oldest UNION SELECT queue, user_name FROM (",
            $without_limit,
            ") AS without_limit ORDER BY queue, user_name) AS chosen
        CROSS JOIN LATERAL (
            SELECT queue, user_name, running, picked, head_turn, head_task, head_max FROM laelaps.account
            WHERE account.queue = chosen.queue AND account.user_name = chosen.user_name AND CASE WHEN open THEN true END
            FOR UPDATE) AS account"
        )
    };
}

/// Those of the greatest weight, $1, and those passed over for long, before $2 and at most $3. They may all have a limit: where only so many tasks of such
/// users are wanted, also those of the greatest weight that have none, $4. In one statement, so that all are locked in one order.
///
/// The second look at `open` is worded so that no partial index is taken for it: that would hold all open users. What is given is asked for, so that
/// the planner cannot think a plan for just that the better one, and make it anew each time.
pub(super) const OPEN_ACCOUNTS: &str = locked!(
    of_all!("", by_weight!("$1")),
    of_all!(" AND picked < (SELECT $2::int8)", " ORDER BY picked LIMIT (SELECT $3::int8)"),
    of_all!(" AND head_max IS NULL", by_weight!("$4"))
);

/// As [`OPEN_ACCOUNTS`], in the queues $5.
pub(super) const OPEN_ACCOUNTS_OF: &str = locked!(
    of_some!("", by_weight!("$1")),
    of_some!(" AND picked < (SELECT $2::int8)", " ORDER BY picked LIMIT (SELECT $3::int8)"),
    of_some!(" AND head_max IS NULL", by_weight!("$4"))
);

/// The queues of the first $3 accounts of each sort, the default queue aside; $1 and $2 as $2 and $4 of [`OPEN_ACCOUNTS`].
pub(super) const NEAR: &str = concat!(
    "SELECT ARRAY(SELECT queue FROM (",
    open_columns!(),
    " AND octet_length(queue) > 0",
    by_weight!("$3"),
    ") AS heaviest), ARRAY(SELECT queue FROM (",
    open_columns!(),
    " AND octet_length(queue) > 0 AND picked < (SELECT $1::int8) ORDER BY picked LIMIT (SELECT $3::int8)",
    ") AS oldest), ARRAY(SELECT queue FROM (",
    open_columns!(),
    " AND octet_length(queue) > 0 AND head_max IS NULL",
    by_weight!("CASE WHEN $2::int8 > 0 THEN $3::int8 ELSE 0 END"),
    ") AS without_limit)"
);

/// How many accounts of each sort are wanted, and before which pick those were picked that were passed over for long.
pub(super) struct Wanted {
    pub(super) heaviest: i64,
    pub(super) picked_before: i64,
    pub(super) oldest: i64,
    pub(super) without_limit: i64,
}

/// Of many queues those that have the wanted accounts, so that not each has to be looked at. None: that cannot be told without.
pub(super) async fn near(session: &mut Session, queues: &[String], wanted: &Wanted) -> Result<Option<Vec<String>>, Failure> {
    let most = 2 * wanted.heaviest + 32;
    let query = sqlx::query_as(NEAR).bind(wanted.picked_before).bind(wanted.without_limit).bind(most);
    let (heaviest, oldest, without_limit): (Vec<String>, Vec<String>, Vec<String>) = query.fetch_one(session.db()?).await?;
    let ours: HashSet<&str> = queues.iter().map(String::as_str).collect();
    let mut near: HashSet<String> = HashSet::new();
    for (found, wanted) in [(heaviest, wanted.heaviest), (oldest, wanted.oldest), (without_limit, wanted.without_limit)] {
        let is_all = count(found.len()) < most;
        let first: Vec<String> =
            found.into_iter().filter(|queue| ours.contains(queue.as_str())).take(usize::try_from(wanted).unwrap_or(0)).collect();
        if !is_all && count(first.len()) < wanted {
            return Ok(None);
        }
        near.extend(first);
    }
    near.extend(ours.contains("").then(String::new));
    Ok(Some(near.into_iter().collect()))
}
