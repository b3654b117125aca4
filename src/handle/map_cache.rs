//! The byte budget of all loaded extents. Extents that are in use stay. Where others do not fit beside them, those are used
//! for the question for which they were loaded, and not kept.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use log::debug;

use super::clock::Clock;
use super::resolved::Resolved;
use super::slot::Slot;
use crate::units::Bytes;

/// The default of `-o map_cache`.
const DEFAULT_LIMIT: Bytes = Bytes::new(256 << 20);

/// The loaded extents of a mount.
pub struct MapCache {
    limit: Bytes,
    /// The clock of all devices of the mount.
    pub(super) clock: Clock,
    /// By the address of the slot, which no other slot has while this one exists.
    maps: Mutex<HashMap<usize, Kept>>,
}

struct Kept {
    slot: Weak<Slot>,
    /// The stack that the extents belong to.
    resolved: Weak<Resolved>,
    memory: Bytes,
}

/// Extents that are still in the slot of their handle.
struct InSlot {
    key: usize,
    slot: Arc<Slot>,
    resolved: Arc<Resolved>,
    memory: Bytes,
}

impl Kept {
    /// The extents, unless their stack was replaced or dropped.
    fn in_slot(&self, key: usize) -> Option<InSlot> {
        let slot = self.slot.upgrade()?;
        let resolved = self.resolved.upgrade()?;
        let now = slot.stack()?;
        Arc::ptr_eq(&now, &resolved).then_some(InSlot { key, slot, resolved, memory: self.memory })
    }
}

impl Default for MapCache {
    fn default() -> Self {
        Self::new(None)
    }
}

impl MapCache {
    /// A cache of at most `limit` bytes, 256 MiB by default. Extents of one device that alone take more are kept too, while
    /// those of no other device are.
    pub fn new(limit: Option<Bytes>) -> Self {
        Self::with_clock(limit, Clock::monotonic())
    }

    /// The largest number of bytes.
    pub fn limit(&self) -> Bytes {
        self.limit
    }

    pub(super) fn with_clock(limit: Option<Bytes>, clock: Clock) -> Self {
        Self { limit: limit.unwrap_or(DEFAULT_LIMIT), clock, maps: Mutex::default() }
    }

    /// Counts the extents of a stack that were just loaded, for a question that came at the time `asked`. Until all fit, the
    /// extents that were not used for longest are dropped. Those that were in use when the question came stay: if it needs
    /// one of them, the new extents are dropped instead, and none of the others.
    ///
    /// A stack that is no longer in `slot` was replaced or dropped during the load, and does not count: only the running
    /// request uses it. The same holds for extents that are dropped.
    pub(super) fn keep(&self, slot: &Arc<Slot>, resolved: &Arc<Resolved>, memory: Bytes, asked: Duration) {
        let key = Arc::as_ptr(slot).addr();
        let new = Kept { slot: Arc::downgrade(slot), resolved: Arc::downgrade(resolved), memory };
        // Declared before the lock, so that what is dropped is freed after it.
        let victims;
        let mut maps = self.lock();
        if new.in_slot(key).is_none() {
            return;
        }
        maps.remove(&key);
        victims = self.victims(maps.iter().filter_map(|(key, kept)| kept.in_slot(*key)), memory, asked);
        let Some(victims) = &victims else {
            debug!("extents of {memory} bytes do not fit beside those in use, and are not kept");
            slot.evict(resolved);
            return;
        };
        for victim in victims {
            debug!("extents of {} bytes are dropped, to keep within the limit of map_cache", victim.memory);
            victim.slot.evict(&victim.resolved);
            maps.remove(&victim.key);
        }
        maps.insert(key, new);
    }

    /// Those of `others` that must be dropped so that `memory` bytes fit. `None` if they do not fit beside those in use.
    fn victims(&self, others: impl Iterator<Item = InSlot>, memory: Bytes, asked: Duration) -> Option<Vec<InSlot>> {
        // Extents that are queried and not stored take no memory.
        if memory == Bytes::ZERO {
            return Some(Vec::new());
        }
        let others = others.filter(|other| other.memory > Bytes::ZERO);
        let (in_use, mut idle): (Vec<_>, Vec<_>) = others.partition(|other| other.resolved.in_use(asked));
        let all = in_use.iter().chain(&idle);
        let mut used = all.fold(memory, |used, other| used.saturating_add(other.memory));
        idle.sort_by_key(|other| (other.resolved.last_used(), other.resolved.born));
        let is_enough = |victim: &InSlot| {
            let is_enough = used <= self.limit;
            used = if is_enough { used } else { used.saturating_sub(victim.memory) };
            is_enough
        };
        let count = idle.iter().position(is_enough).unwrap_or(idle.len());
        idle.truncate(count);
        // Extents that alone exceed the limit are kept when no others are.
        (used <= self.limit || in_use.is_empty()).then_some(idle)
    }

    /// Stops counting the extents of a handle that is closed.
    pub(super) fn release(&self, slot: &Arc<Slot>) {
        self.lock().remove(&Arc::as_ptr(slot).addr());
    }

    /// The bytes that all loaded extents take now.
    pub fn used(&self) -> Bytes {
        let maps = self.lock();
        let in_slots = maps.iter().filter_map(|(key, kept)| kept.in_slot(*key));
        in_slots.fold(Bytes::ZERO, |used, map| used.saturating_add(map.memory))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<usize, Kept>> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::slot::Content;
    use crate::source::{Context, Stack, dense};

    const COST: Duration = Duration::from_millis(20);

    fn cache(limit: u64) -> MapCache {
        MapCache::with_clock(Some(Bytes::new(limit)), Clock::Manual(Mutex::default()))
    }

    /// A stack whose extents were loaded in `cost`.
    fn loaded(clock: &Clock, cost: Duration) -> Content {
        let resolve = || {
            clock.sleep(cost);
            let layer = Arc::new(dense::layer("x", "y", Bytes::ZERO, "z"));
            Stack::build(&Context::default(), |_| layer)
        };
        let resolved = Resolved::new(clock, None, resolve, || Some(Bytes::ZERO));
        resolved.load(clock, |_| {});
        Content::Stack(Arc::new(resolved))
    }

    fn slot(cache: &MapCache, cost: Duration) -> Arc<Slot> {
        let slot = Arc::new(Slot::default());
        slot.set(loaded(&cache.clock, cost));
        slot
    }

    fn is_kept(slot: &Arc<Slot>) -> bool {
        slot.stack().is_some()
    }

    /// Keeps extents for a question that comes now.
    fn keep(cache: &MapCache, slot: &Arc<Slot>, memory: u64) {
        cache.keep(slot, &slot.stack().unwrap(), Bytes::new(memory), cache.clock.now());
    }

    /// Passes the time in which extents that cost [`COST`] are in use.
    fn pass_rest(cache: &MapCache) {
        cache.clock.sleep(10 * COST);
    }

    #[test]
    fn the_maps_that_were_not_used_for_longest_go_first_and_the_newest_stays() {
        let cache = cache(100);
        let [first, second, third] = [40, 60, 50].map(|memory| {
            let slot = slot(&cache, COST);
            pass_rest(&cache);
            (slot, memory)
        });
        keep(&cache, &first.0, first.1);
        keep(&cache, &second.0, second.1);
        assert!(is_kept(&first.0) && is_kept(&second.0));
        // Now the second one was not used for longest.
        first.0.stack().unwrap().set_used(cache.clock.now());
        pass_rest(&cache);
        keep(&cache, &third.0, third.1);
        assert!(is_kept(&first.0) && !is_kept(&second.0) && is_kept(&third.0));
        assert_eq!(cache.used(), Bytes::new(90));
        keep(&cache, &third.0, 1000);
        assert!(!is_kept(&first.0) && is_kept(&third.0), "alone");
        assert_eq!(cache.used(), Bytes::new(1000));
        cache.release(&third.0);
        assert_eq!(cache.used(), Bytes::ZERO);
    }

    #[test]
    fn a_map_that_is_in_use_stays_and_none_is_dropped_when_that_does_not_suffice() {
        let cache = cache(100);
        let (idle, used) = (slot(&cache, COST), slot(&cache, 10 * COST));
        keep(&cache, &idle, 20);
        keep(&cache, &used, 60);
        pass_rest(&cache);
        for (memory, kept) in [(50, false), (1000, false), (100, false), (40, true)] {
            let new = slot(&cache, Duration::ZERO);
            keep(&cache, &new, memory);
            assert_eq!((is_kept(&new), is_kept(&idle), is_kept(&used)), (kept, !kept, true), "{memory} bytes");
            assert!(cache.used() <= Bytes::new(100));
        }
    }

    #[test]
    fn a_map_is_in_use_for_nine_times_its_cost_and_for_a_tenth_of_a_second_at_least() {
        for (cost, passed, in_use) in
            [(20, 0, true), (20, 180, true), (20, 182, false), (1, 0, true), (1, 100, true), (1, 102, false)]
        {
            let cache = cache(100);
            let (old, new) = (slot(&cache, Duration::from_millis(cost)), slot(&cache, Duration::ZERO));
            keep(&cache, &old, 60);
            cache.clock.sleep(Duration::from_millis(passed));
            keep(&cache, &new, 60);
            assert_eq!((is_kept(&old), is_kept(&new)), (in_use, !in_use), "{cost} ms, after {passed} ms");
        }
    }

    #[test]
    fn the_wait_of_a_question_does_not_make_the_others_unused() {
        let cache = cache(100);
        let (old, new) = (slot(&cache, COST), slot(&cache, COST));
        keep(&cache, &old, 60);
        let asked = cache.clock.now();
        cache.clock.sleep(1000 * COST);
        cache.keep(&new, &new.stack().unwrap(), Bytes::new(60), asked);
        assert!(is_kept(&old) && !is_kept(&new));
    }

    #[test]
    fn extents_that_take_no_memory_replace_none_and_are_not_replaced() {
        let cache = cache(100);
        let (large, none, other) = (slot(&cache, COST), slot(&cache, COST), slot(&cache, COST));
        keep(&cache, &large, 1000);
        keep(&cache, &none, 0);
        assert!(is_kept(&large) && is_kept(&none));
        pass_rest(&cache);
        keep(&cache, &other, 10);
        assert!(!is_kept(&large) && is_kept(&none) && is_kept(&other));
    }

    #[test]
    fn extents_of_a_replaced_stack_do_not_count() {
        let cache = cache(100);
        let [first, second, third] = [(); 3].map(|()| slot(&cache, COST));
        keep(&cache, &first, 30);
        keep(&cache, &second, 60);
        // The second device is resolved again, and not loaded.
        second.set(loaded(&cache.clock, COST));
        assert_eq!(cache.used(), Bytes::new(30));
        keep(&cache, &third, 60);
        assert!(is_kept(&first) && is_kept(&second) && is_kept(&third), "they fit");
        third.set(Content::Empty);
        assert_eq!(cache.used(), Bytes::new(30));
    }

    #[test]
    fn extents_that_are_loaded_after_their_stack_was_replaced_do_not_count() {
        let cache = cache(100);
        let slot = slot(&cache, COST);
        let old = slot.stack().unwrap();
        slot.set(loaded(&cache.clock, COST));
        keep(&cache, &slot, 40);
        cache.keep(&slot, &old, Bytes::new(1000), cache.clock.now());
        assert_eq!(cache.used(), Bytes::new(40));
        slot.set(Content::Empty);
        cache.keep(&slot, &old, Bytes::new(1000), cache.clock.now());
        assert_eq!(cache.used(), Bytes::ZERO);
    }
}
