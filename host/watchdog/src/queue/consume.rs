//! Taking an item: whoever deletes its node has it.

use zookeeper_client::Error as Zk;

use crate::root::ITEM_PREFIX;
use crate::session::plain;
use crate::timer::sequence;
use crate::{Error, Item, Result, WatchdogQueue};

/// Names kept from one listing at most. Few enough that what peers take meanwhile costs little, many enough that not every item costs a listing.
const SEEN_MAX: usize = 64;

pub(super) async fn consume(queue: &WatchdogQueue) -> Result<Option<Item>> {
    while let Some(item) = next(queue).await? {
        if delete(queue, &item).await? {
            return Ok(Some(item));
        }
    }
    Ok(None)
}

/// An item that was there a moment ago; none if there is none.
pub(super) async fn next(queue: &WatchdogQueue) -> Result<Option<Item>> {
    loop {
        let name = queue.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop();
        match name {
            Some(name) => match queue.session.fetch_node(&queue.root.child(&name)).await {
                Ok(node) => return Ok(Some(Item { name, data: node.data, czxid: node.czxid, version: node.version })),
                // A peer was quicker.
                Err(Error::NoNode(_)) => {}
                Err(error) => return Err(error),
            },
            None if !look_for_items(queue).await? => return Ok(None),
            None => {}
        }
    }
}

/// Lists the items; false if there are none. The oldest are tried first, a few of them in an order of chance, so that children which began at the
/// same moment do not all run after the same node.
async fn look_for_items(queue: &WatchdogQueue) -> Result<bool> {
    let mut names = queue.children().await?;
    names.retain(|name| name.starts_with(ITEM_PREFIX));
    names.sort_unstable_by_key(|name| sequence(name));
    names.truncate(SEEN_MAX);
    fastrand::shuffle(&mut names);
    let found = !names.is_empty();
    *queue.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = names;
    Ok(found)
}

/// Whether this delete gave us the item; not if a peer was quicker.
async fn delete(queue: &WatchdogQueue, item: &Item) -> Result<bool> {
    let path = queue.root.child(&item.name);
    loop {
        // The version keeps us from deleting an item that was written anew since it was read.
        match plain(queue.session.client().delete(&path, Some(item.version)).await) {
            Ok(()) => return Ok(true),
            Err(Zk::NoNode | Zk::BadVersion) => return Ok(false),
            Err(Zk::ConnectionLoss) => match queue.session.fetch_node(&path).await {
                Ok(again) if again.czxid == item.czxid => {}
                Ok(_) | Err(Error::NoNode(_)) => {
                    return Err(Error::Uncertain { doing: "taking", path, item: Some(item.clone()) });
                }
                Err(error) => return Err(error),
            },
            Err(source) => return Err(Error::of("taking", &path, source)),
        }
    }
}
