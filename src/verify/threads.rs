//! Several threads, so that a device has several reads in progress.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::{panic, thread};

use crate::error::Result;

/// The number of reads in progress.
const THREADS: usize = 8;

/// Calls `work` for each piece, with a `T` of its thread. Pieces are taken in order, one by one.
///
/// # Errors
/// The first error of the pieces or of `work`. No piece is taken after it.
pub(super) fn for_each<P, T: Default>(
    pieces: impl Iterator<Item = Result<P>> + Send,
    work: impl Fn(P, &mut T) -> Result<()> + Sync,
) -> Result<()> {
    let pieces = Mutex::new(pieces);
    let failed = AtomicBool::new(false);
    let take = || match failed.load(Ordering::Relaxed) {
        true => None,
        false => pieces.lock().unwrap_or_else(PoisonError::into_inner).next(),
    };
    let run = || {
        let mut own = T::default();
        while let Some(piece) = take() {
            piece.and_then(|piece| work(piece, &mut own)).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(run)).collect();
        let results =
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause)));
        // All are waited for.
        results.fold(Ok(()), Result::and)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::error::Error;

    #[test]
    fn each_piece_is_taken_once() {
        let sum = AtomicU64::new(0);
        let add = |piece: u64, _: &mut ()| {
            sum.fetch_add(piece, Ordering::Relaxed);
            Ok(())
        };
        for_each((1..=1000).map(Ok), add).unwrap();
        assert_eq!(sum.into_inner(), 500_500);
    }

    #[test]
    fn an_error_ends_it() {
        let taken = AtomicU64::new(0);
        let fail = |piece: u64, _: &mut ()| {
            taken.fetch_add(1, Ordering::Relaxed);
            if piece < 10 { Ok(()) } else { Err(Error::failed("broken")) }
        };
        assert!(for_each((0..u64::MAX).map(Ok), fail).is_err());
        assert!(taken.into_inner() >= 11);
        let pieces = [Ok(1), Err(Error::failed("gone")), Ok(2)];
        assert!(for_each(pieces.into_iter(), |_: u64, _: &mut ()| Ok(())).is_err());
    }
}
