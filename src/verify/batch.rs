//! Pieces that wait for further reads.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The number of pieces that are read again together, so that they share the pauses.
const ENOUGH: usize = 1024;

/// Pieces that are read again when there are enough of them.
pub(super) struct Batch<T>(Mutex<Vec<T>>);

impl<T> Default for Batch<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Batch<T> {
    /// Adds a piece. Returns all pieces if there are enough now, and otherwise none.
    pub(super) fn add(&self, piece: T) -> Vec<T> {
        let mut waiting = self.lock();
        waiting.push(piece);
        if waiting.len() < ENOUGH { Vec::new() } else { std::mem::take(&mut *waiting) }
    }

    /// All pieces that wait.
    pub(super) fn take(&self) -> Vec<T> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
