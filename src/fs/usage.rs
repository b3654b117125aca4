//! The sizes for statfs(2), which are kept for a second.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::export::{Catalog, Usage};

/// How long a sum is used: bsdtar calls statfs(2) for each file.
const LIFE: Duration = Duration::from_secs(1);

/// The last sum, and when it was made.
#[derive(Default)]
pub struct UsageCache(Mutex<Option<(Instant, Usage)>>);

impl UsageCache {
    /// The sum for a SPEC.
    pub fn of(&self, catalog: &Catalog) -> Usage {
        let last = *self.lock();
        if let Some((_, usage)) = last.filter(|(made, _)| made.elapsed() < LIFE) {
            return usage;
        }
        // Without the lock: a directory of a network file system may take long.
        let usage = catalog.usage();
        *self.lock() = Some((Instant::now(), usage));
        usage
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(Instant, Usage)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
