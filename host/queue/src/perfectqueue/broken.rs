//! Rows that nobody can read: compressed data that is damaged, data that is far too large, a key or user that is not text. One of them stops every
//! Ruby worker that acquires it, again and again.
//!
//! Such a row is set aside: its time becomes the last that the table can hold, 2147483647 in January 2038, so that nobody acquires it, its user is taken off, so
//! that it does not count as running, and its owner becomes [`SET_ASIDE`], by which it is recognised. Its data stays as it is. Our own table
//! keeps its user, the log tells all of it. Once the data is repaired, `retry` puts it back; `cancel` ends it.

use sqlx::mysql::MySqlConnection;

use super::candidates::Broken;
use super::side::{self, Side};
use super::table::{Names, SET_ASIDE, TIME_MAX};

/// The short name of what is wrong with damaged data.
pub(super) const CODE: &str = "damaged-data";
/// The same of a key or user.
pub(super) const UNREADABLE: &str = "unreadable";

/// Set a row aside, unless it has changed since it was read.
pub(super) async fn set_aside(broken: &Broken, names: &Names, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    // By its number, since its key may be what cannot be read.
    const ASIDE: &str = "UPDATE {t} AS t {index} SET t.timeout = ?, t.owner = ?, t.resource = NULL
        WHERE t.timeout = ? AND {number} = ? AND t.owner = ? AND t.created_at IS NOT NULL";
    let Broken { place: (time, key), number, created_at, user, owner, code, problem } = broken;
    // One that fails closes the connection.
    sqlx::raw_sql("START TRANSACTION").execute(&mut *connection).await?;
    let query = sqlx::query(names.sql(ASIDE)).bind(TIME_MAX).bind(SET_ASIDE).bind(time).bind(number).bind(owner);
    let is_aside = query.execute(&mut *connection).await?.rows_affected() > 0;
    if is_aside && names.has_side() {
        let known = side::load(&[key], true, names, connection).await?.remove(key);
        let mut side = known.filter(|side| side.created_at == *created_at).unwrap_or_else(|| Side::new(*created_at));
        side.user.clone_from(user);
        (side.error_code, side.error_message) = (
            Some((*code).to_owned()),
            Some(format!("{problem}; `laelaps show --id {number}` shows it, `laelaps cancel --id {number}` removes it")),
        );
        side::store(&[(key, side)], names, connection).await?;
    }
    sqlx::raw_sql("COMMIT").execute(&mut *connection).await?;
    if is_aside {
        tracing::error!(
            task = key,
            number,
            user,
            problem,
            "a task cannot be read; it is set aside, with its time in January 2038 and without its user. `laelaps show --id` shows it: repair it and retry it, or cancel it"
        );
    }
    Ok(())
}
