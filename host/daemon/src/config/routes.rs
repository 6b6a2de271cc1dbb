//! From a task's type to its route.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use super::Route;

/// The routes of a configuration: the first that fits wins. Answers are remembered for each type.
#[derive(Debug)]
pub struct Routes {
    routes: Vec<Arc<Route>>,
    /// Types and the place of their route, None for a type without one. Types come from producers, so it is bounded.
    remembered: RwLock<HashMap<String, Option<usize>>>,
}

impl Routes {
    /// The most types that are remembered. One more, and all are forgotten: a queue with that many has types that do not come back.
    pub const REMEMBERED_MAX: usize = 4_096;

    /// Routes in the order of the configuration.
    #[must_use]
    pub fn new(routes: Vec<Route>) -> Self {
        Self { routes: routes.into_iter().map(Arc::new).collect(), remembered: RwLock::new(HashMap::new()) }
    }

    /// The route of a type.
    #[must_use]
    pub fn route(&self, task_type: &str) -> Option<&Arc<Route>> {
        let remembered = self.remembered.read().unwrap_or_else(PoisonError::into_inner).get(task_type).copied();
        let place = remembered.unwrap_or_else(|| {
            let place = self.routes.iter().position(|route| route.matcher.matches(task_type));
            let mut remembered = self.remembered.write().unwrap_or_else(PoisonError::into_inner);
            if remembered.len() >= Self::REMEMBERED_MAX {
                remembered.clear();
            }
            remembered.insert(task_type.to_owned(), place);
            place
        });
        place.map(|place| &self.routes[place])
    }
}
