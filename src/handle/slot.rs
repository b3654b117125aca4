//! The place in which a handle keeps its resolved stack, and the cache of all maps can drop it.

use std::sync::{Arc, PoisonError, RwLock};

use super::resolved::{Cost, Resolved};

/// The place of a resolved stack.
#[derive(Default)]
pub(super) struct Slot(RwLock<Content>);

/// What a slot has.
#[derive(Clone, Default)]
pub(super) enum Content {
    /// No stack was resolved, or the user dropped it.
    #[default]
    Empty,
    /// The stack that was resolved last, which may be out of date.
    Stack(Arc<Resolved>),
    /// The stack was dropped for lack of room. Its extents had this cost.
    Evicted(Cost),
}

impl Slot {
    /// What is in the slot now.
    pub(super) fn content(&self) -> Content {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The stack in the slot.
    pub(super) fn stack(&self) -> Option<Arc<Resolved>> {
        match &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            Content::Stack(resolved) => Some(resolved.clone()),
            Content::Empty | Content::Evicted(_) => None,
        }
    }

    /// Replaces what is in the slot.
    pub(super) fn set(&self, content: Content) {
        // What was in the slot is dropped after the lock.
        drop(self.replace(content));
    }

    /// Replaces what is in the slot. What was there is dropped by the caller, after the lock.
    pub(super) fn replace(&self, content: Content) -> Content {
        std::mem::replace(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner), content)
    }

    /// Empties the slot for lack of room, if `resolved` is what it has.
    pub(super) fn evict(&self, resolved: &Arc<Resolved>) {
        let mut content = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if matches!(&*content, Content::Stack(now) if Arc::ptr_eq(now, resolved)) {
            *content = Content::Evicted(resolved.cost());
        }
    }
}
