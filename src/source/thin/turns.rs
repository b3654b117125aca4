//! Who reads a live pool: one at a time, for all who wait meanwhile.
//!
//! Each reading makes its pool commit, and a commit spoils the reading of another. So the maps of several devices of one
//! pool that are wanted at the same time come from one reading.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sys::device::DeviceId;

/// Devices that one reading is for at most: the longer it takes, the more likely the pool commits meanwhile.
const TOGETHER: usize = 16;

/// The turns of all pools, by their devices.
pub struct Pools<W, M>(Mutex<HashMap<DeviceId, Arc<Turns<W, M>>>>);

impl<W, M> Default for Pools<W, M> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<W, M> Pools<W, M> {
    /// The turns of one pool.
    pub fn of(&self, pool: DeviceId) -> Arc<Turns<W, M>> {
        lock(&self.0).entry(pool).or_default().clone()
    }
}

/// The turns of one pool: `W` tells what is wanted of a reading, `M` is what it gives for that.
pub struct Turns<W, M> {
    waiting: Mutex<Vec<Arc<Turn<W, M>>>>,
    reading: Mutex<()>,
}

struct Turn<W, M> {
    wanted: W,
    given: Mutex<Option<M>>,
}

impl<W, M> Default for Turns<W, M> {
    fn default() -> Self {
        Self { waiting: Mutex::default(), reading: Mutex::default() }
    }
}

impl<W: Copy, M> Turns<W, M> {
    /// What is wanted, from a reading that begins after this is called: by `read`, or by somebody else's.
    ///
    /// `read` is given what the caller wants, and then what others want, and answers in that order. It may answer
    /// fewer: who got nothing reads again, as all do after an error.
    ///
    /// # Errors
    /// Those of `read`. `None` when it answered nothing at all.
    pub fn take<E>(&self, wanted: W, read: impl FnOnce(&[W]) -> Result<Vec<M>, E>) -> Result<Option<M>, E> {
        let mine = Arc::new(Turn { wanted, given: Mutex::default() });
        lock(&self.waiting).push(mine.clone());
        let _one_at_a_time = lock(&self.reading);
        if let Some(given) = lock(&mine.given).take() {
            return Ok(Some(given));
        }
        // Not in the list any more if a reading failed that was for it too.
        let mut turns = vec![mine.clone()];
        let mut waiting = lock(&self.waiting);
        waiting.retain(|turn| !Arc::ptr_eq(turn, &mine));
        let others = waiting.len().min(TOGETHER - 1);
        turns.extend(waiting.drain(..others));
        drop(waiting);
        let wanted: Vec<W> = turns.iter().map(|turn| turn.wanted).collect();
        for (turn, given) in turns.iter().zip(read(&wanted)?) {
            *lock(&turn.given) = Some(given);
        }
        Ok(lock(&mine.given).take())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    fn until(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
    }

    type Given = Result<Option<u64>, ()>;

    /// Four who want 0 to 3. The reading for 0 lasts until the others wait, and `rest` tells how those after it go, by
    /// their number. Answers what was read each time, and what each one was given.
    fn four(rest: impl Fn(usize) -> Result<usize, ()> + Sync) -> (Vec<Vec<u64>>, Vec<Given>) {
        let turns = Turns::<u64, u64>::default();
        let readings = Mutex::new(Vec::new());
        let take = |wanted: u64| {
            turns.take(wanted, |all| {
                let number = lock(&readings).len();
                lock(&readings).push(all.to_vec());
                let count = if number == 0 { all.len() } else { rest(number)? };
                if number == 0 {
                    until(|| lock(&turns.waiting).len() == 3);
                }
                Ok(all.iter().take(count).map(|wanted| wanted * 10).collect())
            })
        };
        let given = thread::scope(|scope| {
            let first = scope.spawn(|| take(0));
            until(|| lock(&readings).len() == 1);
            let others: Vec<_> = (1..4).map(|wanted| scope.spawn(move || take(wanted))).collect();
            [first].into_iter().chain(others).map(|thread| thread.join().unwrap()).collect()
        });
        (readings.into_inner().unwrap(), given)
    }

    #[test]
    fn those_who_wait_share_the_next_reading() {
        let (mut readings, given) = four(|_| Ok(3));
        assert_eq!(given, [0, 10, 20, 30].map(|given| Ok(Some(given))));
        readings[1].sort_unstable();
        assert_eq!(readings, [vec![0], vec![1, 2, 3]]);
    }

    #[test]
    fn who_got_nothing_reads_again() {
        let (readings, given) = four(|number| if number == 1 { Err(()) } else { Ok(1) });
        assert_eq!(readings.len(), 4, "{readings:?}");
        let failed = usize::try_from(readings[1][0]).unwrap();
        for (wanted, given) in given.into_iter().enumerate() {
            assert_eq!(given, if wanted == failed { Err(()) } else { Ok(Some(wanted as u64 * 10)) });
        }
        let (_, given) = four(|_| Ok(0));
        assert_eq!(given, [Ok(Some(0)), Ok(None), Ok(None), Ok(None)]);
    }
}
