//! Which host runs a row that must run alone. To do so it first ends everything else that it has, so each such row asks one host at a time: it is reserved
//! in our table, under the lock of all claims. Rows without our table are never known to have to run alone.

use sqlx::Row as _;
use sqlx::mysql::MySqlConnection;

use super::order::Pick;
use super::table::{NUMBER_MAX, Names, json};
use crate::HostId;

/// How long such a row waits for the host that ends its work for it, before another may do the same, in seconds.
const RESERVED_SECONDS: i64 = 300;

/// Reserve one of these rows for a host, which may all run now, unless they are all reserved for other hosts. One that was reserved for it before stays so.
pub(super) async fn reserve(
    suspects: &[&Pick],
    host: HostId,
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<bool, sqlx::Error> {
    // A watched host that has left ends nothing for anybody; of others it is not known.
    const RESERVED: &str = "SELECT f.place, s.alone_for = ?, s.alone_until > UNIX_TIMESTAMP() + ? FROM
        JSON_TABLE(?, '$[*]' COLUMNS (place INT PATH '$[0]', id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[1]')) AS f
        STRAIGHT_JOIN {s} AS s FORCE INDEX (PRIMARY) ON s.id = {as_side_key}
        LEFT JOIN {h} AS h FORCE INDEX (PRIMARY) ON h.id = s.alone_for AND h.left_at IS NULL
        WHERE s.alone_until > UNIX_TIMESTAMP() AND (s.alone_for = ? OR s.alone_for > ? OR h.id IS NOT NULL)";
    const RESERVE: &str = "UPDATE {s} SET alone_for = ?, alone_until = UNIX_TIMESTAMP() + ? WHERE id = ?";
    if suspects.is_empty() {
        return Ok(false);
    }
    let number = host.0.unsigned_abs();
    let keys = json(suspects.iter().map(|suspect| suspect.place.1.as_str()).enumerate());
    let query = sqlx::query(names.sql(RESERVED)).bind(number).bind(RESERVED_SECONDS / 2).bind(keys).bind(number).bind(NUMBER_MAX);
    let (mut ours, mut others) = (None, vec![false; suspects.len()]);
    for row in query.fetch_all(&mut *connection).await? {
        let place = usize::try_from(row.try_get::<i32, _>(0)?).unwrap_or(usize::MAX);
        if row.try_get(1)? {
            ours = Some((place, row.try_get::<bool, _>(2)?));
        } else if let Some(others) = others.get_mut(place) {
            *others = true;
        }
    }
    let place = match ours {
        Some((_, true)) => return Ok(true),
        Some((place, false)) => Some(place),
        None => others.iter().position(|others| !others),
    };
    let Some(suspect) = place.and_then(|place| suspects.get(place)) else { return Ok(false) };
    let query = sqlx::query(names.sql(RESERVE)).bind(number).bind(RESERVED_SECONDS).bind(&suspect.place.1);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

/// A row is about to run alone: it is reserved for nobody any more.
pub(super) async fn release(key: &str, names: &Names, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    const RELEASE: &str = "UPDATE {s} SET alone_for = 0, alone_until = 0 WHERE id = ? AND alone_for <> 0";
    sqlx::query(names.sql(RELEASE)).bind(key).execute(connection).await.map(drop)
}
