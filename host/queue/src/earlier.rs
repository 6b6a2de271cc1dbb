//! Operations that are tried again although an earlier try may have been committed: its answer was lost with the connection.

use std::sync::{Arc, Mutex, PoisonError};

/// What the last try of an operation had come to when it was about to commit. Where there is something, that commit was not answered: the next try looks
/// whether it took place, and then answers this. Clones share it.
#[derive(Debug)]
pub(crate) struct Earlier<T>(Arc<Mutex<Option<T>>>);

impl<T> Default for Earlier<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Clone for Earlier<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: Clone> Earlier<T> {
    /// This try is about to commit.
    pub(crate) fn note(&self, outcome: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
    }

    /// What an earlier try had come to.
    pub(crate) fn get(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
