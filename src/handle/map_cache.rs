//! The byte budget of all maps: those that were made longest ago are forgotten first, and made again when asked.

use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use log::debug;
use lru::LruCache;

use super::Held;
use crate::units::Bytes;

/// Where a handle keeps its stack.
pub(super) type Slot = RwLock<Option<Arc<Held>>>;

/// The default of `-o map_cache`.
const DEFAULT_LIMIT: Bytes = Bytes::new(256 << 20);

/// All maps of a mount, in the order in which they were made.
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
    /// A cache of at most `limit` bytes, 256 MiB by default. One map may be larger: it is kept while it is the only one.
    pub fn new(limit: Option<Bytes>) -> Self {
        Self { limit: limit.unwrap_or(DEFAULT_LIMIT), maps: Mutex::new(LruCache::unbounded()) }
    }

    /// Counts the map that is in `slot` now, and forgets others until all fit.
    pub(super) fn keep(&self, slot: &Arc<Slot>, memory: Bytes) {
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        maps.push(key(slot), Kept { slot: Arc::downgrade(slot), memory });
        let mut used = maps.iter().fold(Bytes::ZERO, |used, (_, kept)| used.saturating_add(kept.memory));
        while used > self.limit && maps.len() > 1 {
            let Some((_, oldest)) = maps.pop_lru() else { break };
            used = used.saturating_sub(oldest.memory);
            if let Some(slot) = oldest.slot.upgrade() {
                debug!("a map of {} bytes is forgotten, for others", oldest.memory);
                *slot.write().unwrap_or_else(PoisonError::into_inner) = None;
            }
        }
    }

    /// Stops counting the map of a handle that is closed.
    pub(super) fn release(&self, slot: &Arc<Slot>) {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner).pop(&key(slot));
    }

    /// Bytes that all maps hold now.
    pub fn used(&self) -> Bytes {
        let maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        maps.iter().fold(Bytes::ZERO, |used, (_, kept)| used.saturating_add(kept.memory))
    }
}

/// A slot is known by its address, which is its own as long as it is kept.
fn key(slot: &Arc<Slot>) -> usize {
    Arc::as_ptr(slot).addr()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::handle::order::Moment;
    use crate::source::{Context, Stack, dense};

    fn slot() -> Arc<Slot> {
        let layer = Arc::new(dense::layer("x", "y", Bytes::ZERO, "z"));
        let stack = Stack::build(&Context::default(), |_| layer);
        let (born, made, resolved_in) = (Moment::now(), Instant::now(), Duration::ZERO);
        let (slowest, told) = (AtomicU64::new(0), AtomicBool::new(false));
        let held = Held { stack, born, made, resolved_in, slowest, told, fits: true };
        Arc::new(RwLock::new(Some(Arc::new(held))))
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
