//! Deleting a root with all that is below it.

use futures::future::join_all;
use zookeeper_client::Error as Zk;

use crate::{Error, Result, Root, Session};

/// Deletes under way at once.
const BATCH: usize = 500;
/// How often children that were made meanwhile are looked for again. A living child makes one timer; whoever makes more is no queue's child.
const ROUNDS: usize = 100;

/// Deletes every child of `root`, then `root`. Returns how many nodes it deleted itself. What vanishes meanwhile is fine.
pub(super) async fn clear(session: &Session, root: &Root) -> Result<usize> {
    let mut deleted = 0;
    for _ in 0..ROUNDS {
        let children = match session.repeat(|| session.client().list_children(root.path())).await {
            Ok(children) => children,
            Err(Zk::NoNode) => return Ok(deleted),
            Err(source) => return Err(Error::of("listing", root.path(), source)),
        };
        for batch in children.chunks(BATCH) {
            let deletes = batch.iter().map(|name| delete(session, root.child(name)));
            for done in join_all(deletes).await {
                deleted += usize::from(done?);
            }
        }
        match delete(session, root.path().to_owned()).await {
            Ok(done) => return Ok(deleted + usize::from(done)),
            // A child was made meanwhile.
            Err(Error::NotEmpty(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Err(Error::NotEmpty(root.path().to_owned()))
}

/// Whether this deleted it; false if it was gone.
async fn delete(session: &Session, path: String) -> Result<bool> {
    match session.repeat(|| session.client().delete(&path, None)).await {
        Ok(()) => Ok(true),
        Err(Zk::NoNode) => Ok(false),
        Err(Zk::NotEmpty) => Err(Error::NotEmpty(path)),
        Err(source) => Err(Error::of("deleting", &path, source)),
    }
}
