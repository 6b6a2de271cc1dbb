//! Items of work: what a queue is made of, how it is packed into requests, and how a child takes an item.

use std::ops::Range;

use crate::{Error, Result};

/// Bytes of an item at most: ZooKeeper takes requests of less than 1 MiB, path and access list included.
pub const ITEM_BYTES_MAX: usize = 1_024 * 1_024 - 8 * 1_024;
/// Bytes of an item that a Perl peer reads; it gets longer ones cut.
pub const PERL_BYTES_MAX: usize = 1_023;
/// Items of a queue at most: every child lists them all in one answer.
const ITEMS_MAX: usize = 100_000;
/// Bytes of one request at most, as we reckon them: generously, since the servers' own record of a request is longer than the request.
const REQUEST_BYTES_MAX: usize = 1_000_000;
/// What an operation costs beside its path, its data and its access list, generously.
const OPERATION_BYTES: usize = 128;

/// What [`crate::WatchdogQueue::create_queue`] makes.
#[derive(Clone, Debug, Default)]
pub struct NewQueue {
    /// The items, up to 100,000, each of [`ITEM_BYTES_MAX`] bytes at most.
    pub items: Vec<Vec<u8>>,
    /// Make the barrier `sync`, which the first child that creates a timer removes.
    pub sync_start: bool,
    /// Make the missing nodes above the root, too.
    pub parents: bool,
}

impl NewQueue {
    /// Checks the items' sizes and their number. Returns how many a Perl peer would get cut.
    pub(crate) fn check(&self) -> Result<usize> {
        if self.items.len() > ITEMS_MAX {
            return Err(Error::config(
                "items",
                &self.items.len().to_string(),
                format!("at most {ITEMS_MAX} items are allowed in a queue"),
            ));
        }
        if let Some((index, item)) = self.items.iter().enumerate().find(|(_, item)| item.len() > ITEM_BYTES_MAX) {
            let start = String::from_utf8_lossy(&item[..64]).into_owned();
            let problem = format!(
                "item {index} has {} bytes, at most {ITEM_BYTES_MAX} are allowed; put the data elsewhere, and its name here",
                item.len()
            );
            return Err(Error::config("items", &start, problem));
        }
        Ok(self.items.iter().filter(|item| item.len() > PERL_BYTES_MAX).count())
    }

    /// The items of each request: as few requests as will do, and always one. `overhead` is what the path and the access list of one item
    /// take, in bytes.
    pub(crate) fn requests(&self, overhead: usize) -> Vec<Range<usize>> {
        // Root, barrier, and the root's data once more.
        let fixed = 3 * (overhead + OPERATION_BYTES);
        let mut requests = Vec::new();
        let (mut begin, mut bytes) = (0, fixed);
        for (index, item) in self.items.iter().enumerate() {
            let cost = overhead + OPERATION_BYTES + item.len();
            if index > begin && bytes + cost > REQUEST_BYTES_MAX {
                requests.push(begin..index);
                (begin, bytes) = (index, fixed);
            }
            bytes += cost;
        }
        requests.push(begin..self.items.len());
        requests
    }
}

/// An item that a child has taken, or may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The name of its node, `queue-` and ten digits.
    pub name: String,
    /// The item.
    pub data: Vec<u8>,
    /// The transaction that made it, which a node of the same name in a root made anew does not share.
    pub czxid: i64,
    /// How often its data was written since.
    pub(crate) version: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_queue_is_made_in_one_request() {
        assert_eq!(NewQueue::default().requests(100).len(), 1);
        let queue = NewQueue { items: vec![vec![0; 100]; 1_000], ..NewQueue::default() };
        assert_eq!(queue.requests(100).len(), 1);
    }

    #[test]
    fn a_large_queue_is_split_without_losing_or_doubling_an_item() {
        let items: Vec<_> = (0..5_000_usize).map(|n| vec![0; n * 37 % 9_000]).chain([vec![0; ITEM_BYTES_MAX]]).collect();
        let queue = NewQueue { items, ..NewQueue::default() };
        let requests = queue.requests(200);
        assert_eq!(requests.iter().map(|range| range.len()).sum::<usize>(), 5_001);
        assert!(requests.windows(2).all(|pair| pair[0].end == pair[1].start));
        for range in requests {
            let bytes: usize = queue.items[range.clone()].iter().map(|item| item.len() + 200).sum();
            assert!(bytes <= REQUEST_BYTES_MAX || range.len() == 1, "{range:?} has {bytes} bytes");
        }
    }

    #[test]
    fn an_item_that_no_node_can_hold_is_refused_by_its_number() {
        let queue = NewQueue { items: vec![vec![], vec![b'x'; ITEM_BYTES_MAX + 1]], ..NewQueue::default() };
        let error = queue.check().unwrap_err().to_string();
        assert!(error.contains("item 1 has 1040385 bytes"), "{error}");
        let queue = NewQueue { items: vec![vec![0; 1_023], vec![0; 1_024]], ..NewQueue::default() };
        assert_eq!(queue.check().unwrap(), 1);
    }
}
