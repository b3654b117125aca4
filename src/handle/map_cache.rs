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
    /// The stack that the extents belong to.
    resolved: Weak<Resolved>,
    memory: Bytes,
}

impl Kept {
    /// The memory that is still taken: none after the stack was replaced or dropped.
    fn used(&self) -> Bytes {
        if self.resolved.strong_count() > 0 { self.memory } else { Bytes::ZERO }
    }
}

impl Default for MapCache {
    fn default() -> Self {
        Self::new(None)
    }
}

impl MapCache {
    /// A cache of at most `limit` bytes, 256 MiB by default. Extents of one device that alone take more are kept too,
    /// and those of all other devices are dropped.
    pub fn new(limit: Option<Bytes>) -> Self {
        Self { limit: limit.unwrap_or(DEFAULT_LIMIT), maps: Mutex::new(LruCache::unbounded()) }
    }

    /// The largest number of bytes.
    pub fn limit(&self) -> Bytes {
        self.limit
    }

    /// Counts the extents of a stack that were just loaded, or grew, and drops the oldest others until all fit. A stack that is no
    /// longer in `slot` was replaced or dropped during the load, and does not count: only the running request uses it.
    pub(super) fn keep(&self, slot: &Arc<Slot>, resolved: &Arc<Resolved>, memory: Bytes) {
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        let is_in_slot =
            |current: &Option<Arc<Resolved>>| current.as_ref().is_some_and(|now| Arc::ptr_eq(now, resolved));
        if !is_in_slot(&slot.read().unwrap_or_else(PoisonError::into_inner)) {
            return;
        }
        maps.push(key(slot), Kept { slot: Arc::downgrade(slot), resolved: Arc::downgrade(resolved), memory });
        let mut used = maps.iter().fold(Bytes::ZERO, |used, (_, kept)| used.saturating_add(kept.used()));
        while used > self.limit && maps.len() > 1 {
            let Some((_, oldest)) = maps.pop_lru() else { break };
            let freed = oldest.used();
            if freed == Bytes::ZERO {
                continue;
            }
            used = used.saturating_sub(freed);
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
        maps.iter().fold(Bytes::ZERO, |used, (_, kept)| used.saturating_add(kept.used()))
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

    fn current(slot: &Arc<Slot>) -> Arc<Resolved> {
        slot.read().unwrap().clone().unwrap()
    }

    fn keep(cache: &MapCache, slot: &Arc<Slot>, memory: u64) {
        cache.keep(slot, &current(slot), Bytes::new(memory));
    }

    #[test]
    fn the_oldest_maps_go_first_and_the_newest_stays() {
        let cache = MapCache::new(Some(Bytes::new(100)));
        let (first, second, third) = (slot(), slot(), slot());
        keep(&cache, &first, 40);
        keep(&cache, &second, 60);
        assert!(is_kept(&first) && is_kept(&second));
        // Made again: now the second one is the oldest.
        keep(&cache, &first, 40);
        keep(&cache, &third, 50);
        assert!(is_kept(&first) && !is_kept(&second) && is_kept(&third));
        assert_eq!(cache.used(), Bytes::new(90));
        keep(&cache, &third, 1000);
        assert!(!is_kept(&first) && is_kept(&third));
        cache.release(&third);
        assert_eq!(cache.used(), Bytes::ZERO);
    }

    #[test]
    fn extents_of_a_replaced_stack_do_not_count() {
        let cache = MapCache::new(Some(Bytes::new(100)));
        let (first, second, third) = (slot(), slot(), slot());
        keep(&cache, &first, 30);
        keep(&cache, &second, 60);
        // The second device is resolved again, and not loaded.
        *second.write().unwrap() = Some(current(&slot()));
        assert_eq!(cache.used(), Bytes::new(30));
        keep(&cache, &third, 60);
        assert!(is_kept(&first) && is_kept(&second) && is_kept(&third), "they fit");
        *third.write().unwrap() = None;
        assert_eq!(cache.used(), Bytes::new(30));
    }

    #[test]
    fn extents_that_are_loaded_after_their_stack_was_replaced_do_not_count() {
        let cache = MapCache::default();
        let slot = slot();
        let old = current(&slot);
        *slot.write().unwrap() = Some(current(&self::slot()));
        keep(&cache, &slot, 40);
        cache.keep(&slot, &old, Bytes::new(1000));
        assert_eq!(cache.used(), Bytes::new(40));
        *slot.write().unwrap() = None;
        cache.keep(&slot, &old, Bytes::new(1000));
        assert_eq!(cache.used(), Bytes::ZERO);
    }
}
