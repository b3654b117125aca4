//! The byte budget of all loaded extents. The ones that were loaded longest ago are dropped first, and loaded again at the
//! next question.

use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use log::debug;
use lru::LruCache;

use super::Resolved;
use crate::units::Bytes;

/// The place in which a handle keeps its resolved stack.
pub(super) type Slot = RwLock<Option<Arc<Resolved>>>;

/// The default of `-o map_cache`.
const DEFAULT_LIMIT: Bytes = Bytes::new(256 << 20);

/// The loaded extents of a mount, in the order in which they were loaded.
pub struct MapCache {
    limit: Bytes,
    maps: Mutex<LruCache<usize, Kept>>,
}

struct Kept {
    slot: Weak<Slot>,
    memory: Bytes,
}

impl Default for MapCache {
    fn default() -> Self {
        Self::new(None)
    }
}

impl MapCache {
    /// A cache of at most `limit` bytes, 256 MiB by default. The extents of one device may take more: they are kept while no
    /// others are.
    pub fn new(limit: Option<Bytes>) -> Self {
        Self { limit: limit.unwrap_or(DEFAULT_LIMIT), maps: Mutex::new(LruCache::unbounded()) }
    }

    /// Counts the extents that are in `slot` now, and drops the oldest others until all fit.
    pub(super) fn keep(&self, slot: &Arc<Slot>, memory: Bytes) {
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        maps.push(key(slot), Kept { slot: Arc::downgrade(slot), memory });
        let mut used = maps.iter().fold(Bytes::ZERO, |used, (_, kept)| used.saturating_add(kept.memory));
        while used > self.limit && maps.len() > 1 {
            let Some((_, oldest)) = maps.pop_lru() else { break };
            used = used.saturating_sub(oldest.memory);
            if let Some(slot) = oldest.slot.upgrade() {
                debug!("extents of {} bytes are dropped, to keep within the limit of map_cache", oldest.memory);
                *slot.write().unwrap_or_else(PoisonError::into_inner) = None;
            }
        }
    }

    /// Stops counting the extents of a handle that is closed.
    pub(super) fn release(&self, slot: &Arc<Slot>) {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner).pop(&key(slot));
    }

    /// The bytes that all loaded extents take now.
    pub fn used(&self) -> Bytes {
        let maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        maps.iter().fold(Bytes::ZERO, |used, (_, kept)| used.saturating_add(kept.memory))
    }
}

/// The key of a slot is its address, which no other slot has while this one exists.
fn key(slot: &Arc<Slot>) -> usize {
    Arc::as_ptr(slot).addr()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Context, Stack, dense};

    fn slot() -> Arc<Slot> {
        let layer = Arc::new(dense::layer("x", "y", Bytes::ZERO, "z"));
        let resolved = Resolved::new(|| Stack::build(&Context::default(), |_| layer), || Some(Bytes::ZERO));
        Arc::new(RwLock::new(Some(Arc::new(resolved))))
    }

    fn is_kept(slot: &Arc<Slot>) -> bool {
        slot.read().unwrap().is_some()
    }

    #[test]
    fn the_oldest_maps_go_first_and_the_newest_stays() {
        let cache = MapCache::new(Some(Bytes::new(100)));
        let (first, second, third) = (slot(), slot(), slot());
        cache.keep(&first, Bytes::new(40));
        cache.keep(&second, Bytes::new(60));
        assert!(is_kept(&first) && is_kept(&second));
        // Made again: now the second one is the oldest.
        cache.keep(&first, Bytes::new(40));
        cache.keep(&third, Bytes::new(50));
        assert!(is_kept(&first) && !is_kept(&second) && is_kept(&third));
        assert_eq!(cache.used(), Bytes::new(90));
        cache.keep(&third, Bytes::new(1000));
        assert!(!is_kept(&first) && is_kept(&third));
        cache.release(&third);
        assert_eq!(cache.used(), Bytes::ZERO);
    }
}
