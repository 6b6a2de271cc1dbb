//! Tasks that wait apart come back to where hosts that serve their types claim them.

use std::time::Duration;

use super::claim::{count, move_in};
use super::failure::Failure;
use super::writer::Session;
use crate::Claim;
use crate::unserved::{self, KINDS_MAX, Kind, LOOKS_MAX, Look, Place, Watch};

/// A few probes for each kind, however many of it there are: SQLite looks a pair up by its first column alone.
pub(super) const KINDS: &str = "WITH RECURSIVE kind (queue, type) AS (
            SELECT coalesce(CAST(?1 AS TEXT), ''), coalesce(CAST(?2 AS TEXT), '')
            UNION ALL SELECT
                iif(EXISTS (SELECT 1 FROM unserved WHERE queue = kind.queue AND type > kind.type), kind.queue,
                    (SELECT min(queue) FROM unserved WHERE queue > kind.queue)),
                coalesce((SELECT min(type) FROM unserved WHERE queue = kind.queue AND type > kind.type),
                    (SELECT min(type) FROM unserved WHERE queue = (SELECT min(queue) FROM unserved WHERE queue > kind.queue)))
            FROM kind WHERE kind.queue IS NOT NULL LIMIT ?3 + 1)
        SELECT CAST(queue AS BLOB), CAST(type AS BLOB) FROM kind WHERE queue IS NOT NULL LIMIT ?3 OFFSET 1";

/// The first of a kind without user, and of users behind one.
pub(super) const FIRST: &str = "SELECT * FROM (SELECT x'', turn, task FROM unserved
            WHERE queue = coalesce(CAST(?1 AS TEXT), '') AND type = coalesce(CAST(?2 AS TEXT), '') AND user = '' ORDER BY turn, task LIMIT ?4)
        UNION ALL SELECT * FROM (SELECT CAST(user AS BLOB), turn, task FROM unserved
            WHERE queue = coalesce(CAST(?1 AS TEXT), '') AND type = coalesce(CAST(?2 AS TEXT), '') AND user > coalesce(CAST(?3 AS TEXT), '')
            ORDER BY user, turn, task LIMIT ?4)";

/// Take back what this claim's host serves, if it is time to look. Answers after how long to look again, if that may be worth it.
pub(super) async fn take_back(
    session: &mut Session,
    watch: &Watch,
    claim: &Claim,
    limit: usize,
) -> Result<Option<Duration>, Failure> {
    let mut wait = None;
    for _ in 0..LOOKS_MAX {
        let from = match watch.look(claim) {
            Look::Now(from) => from,
            Look::After(wait) => return Ok(claim.accepts.is_some().then_some(wait)),
        };
        let query = sqlx::query_as(KINDS).bind(from.kind.queue.clone()).bind(from.kind.task_type.clone()).bind(count(KINDS_MAX));
        let kinds: Vec<(Vec<u8>, Vec<u8>)> = query.fetch_all(session.db()).await?;
        let kinds = kinds.into_iter().map(|(queue, task_type)| Kind { queue, task_type }).collect();
        let (wanted, kind, again) = unserved::wanted(kinds, &from, claim);
        let (any, user) = take(session, &wanted, &from.user, limit).await?;
        wait = watch.looked(claim, &from, again, (kind, user));
        if any || !again {
            break;
        }
    }
    Ok(wait)
}

/// Take some of each kind. Answers whether there were any, and behind which user to go on.
async fn take(session: &mut Session, kinds: &[Kind], user: &[u8], limit: usize) -> Result<(bool, Vec<u8>), Failure> {
    let mut places = Vec::new();
    for (at, Kind { queue, task_type }) in kinds.iter().enumerate() {
        let query = sqlx::query_as(FIRST).bind(queue.clone()).bind(task_type.clone()).bind(user.to_vec()).bind(count(limit));
        let found: Vec<(Vec<u8>, i64, i64)> = query.fetch_all(session.db()).await?;
        places.extend(found.into_iter().map(|(user, turn, task)| Place { kind: at, user, turn, task }));
    }
    let (first, user) = unserved::first(places, limit);
    let tasks: Vec<i64> = first.iter().map(|place| place.task).collect();
    for place in first {
        leave(session, &kinds[place.kind], place).await?;
    }
    let any = !tasks.is_empty();
    if any {
        move_in(session, tasks).await?;
    }
    Ok((any, user))
}

async fn leave(session: &mut Session, kind: &Kind, place: Place) -> Result<(), Failure> {
    const LEAVE: &str =
        "DELETE FROM unserved WHERE queue = coalesce(CAST(?1 AS TEXT), '') AND type = coalesce(CAST(?2 AS TEXT), '')
        AND user = coalesce(CAST(?3 AS TEXT), '') AND turn = ?4 AND task = ?5";
    let query = sqlx::query(LEAVE).bind(kind.queue.clone()).bind(kind.task_type.clone()).bind(place.user);
    query.bind(place.turn).bind(place.task).execute(session.db()).await?;
    Ok(())
}
