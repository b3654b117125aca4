//! Shares reads of a live pool between threads: one thread reads at a time, and its read serves all threads that wait.
//!
//! Each read makes the pool commit, and a commit makes a concurrent read of the same pool invalid. So one read returns
//! the maps of all devices of a pool that are requested at the same time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ThinId;
use super::error::ThinResult;
use crate::map::FillMap;
use crate::reason::DenseReason;
use crate::sys::device::DeviceId;
use crate::units::{Bytes, Sectors};

/// The limit of devices that one read is for. The longer a read takes, the more likely the pool commits during it.
const MAX_SHARED: usize = 16;

/// The reads of all pools, by the pool's device.
#[derive(Default)]
pub struct SharedReadsByPool(Mutex<HashMap<DeviceId, Arc<SharedReads>>>);

impl SharedReadsByPool {
    /// The reads of one pool.
    pub fn of(&self, pool: DeviceId) -> Arc<SharedReads> {
        lock(&self.0).entry(pool).or_default().clone()
    }
}

/// A request for the map of one thin device.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// The number of the device in the pool.
    pub id: ThinId,
    /// The length of the device.
    pub len: Bytes,
    /// The size of its mapped blocks, as its status reports it.
    pub mapped: Sectors,
}

/// The results of one read, in the order of the requests. There may be fewer results than requests.
pub type Maps = Vec<ThinResult<FillMap>>;

/// The reads of one pool.
#[derive(Default)]
pub struct SharedReads {
    /// Requests that no read has begun to serve.
    waiting: Mutex<Vec<Arc<PendingRead>>>,
    /// Held by the thread that reads.
    reading: Mutex<()>,
}

struct PendingRead {
    wanted: Wanted,
    result: Mutex<Option<ThinResult<FillMap>>>,
}

impl SharedReads {
    /// The result for `wanted` of a read that begins after the call: of `read`, or of another thread's.
    ///
    /// `read` gets the caller's request first and then those of other threads. It returns the results in that order, or
    /// only the first of them. A thread whose request has no result then, and each one after an error, calls its own
    /// `read`.
    ///
    /// # Errors
    /// Those of `read`. `None` when `read` returned no result at all.
    pub fn take(
        &self,
        wanted: Wanted,
        read: impl FnOnce(&[Wanted]) -> Result<Maps, DenseReason>,
    ) -> Result<Option<ThinResult<FillMap>>, DenseReason> {
        let mine = Arc::new(PendingRead { wanted, result: Mutex::default() });
        lock(&self.waiting).push(mine.clone());
        let _one_at_a_time = lock(&self.reading);
        if let Some(result) = lock(&mine.result).take() {
            return Ok(Some(result));
        }
        // The request is no longer in the list if a read that was for it failed.
        let mut reads = vec![mine.clone()];
        let mut waiting = lock(&self.waiting);
        waiting.retain(|other| !Arc::ptr_eq(other, &mine));
        let others = waiting.len().min(MAX_SHARED - 1);
        reads.extend(waiting.drain(..others));
        drop(waiting);
        let wanted: Vec<Wanted> = reads.iter().map(|read| read.wanted).collect();
        for (pending, result) in reads.iter().zip(read(&wanted)?) {
            *lock(&pending.result) = Some(result);
        }
        Ok(lock(&mine.result).take())
    }

    /// The result of `read`, which runs while no other thread reads.
    pub fn alone<T>(&self, read: impl FnOnce() -> T) -> T {
        let _one_at_a_time = lock(&self.reading);
        read()
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
    use crate::source::thin::error::ThinError;

    fn until(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
    }

    type Received = Result<Option<u32>, DenseReason>;

    fn wanted(id: u32) -> Wanted {
        Wanted { id: ThinId::new(id).unwrap(), len: Bytes::ZERO, mapped: Sectors::new(0) }
    }

    /// A result that belongs to one request only.
    fn result(wanted: &Wanted) -> ThinResult<FillMap> {
        Err(ThinError::Unknown(wanted.id))
    }

    /// The request that a result belongs to.
    fn id_of(result: ThinResult<FillMap>) -> u32 {
        match result {
            Err(ThinError::Unknown(id)) => id.get(),
            _ => panic!("not a result of a test"),
        }
    }

    fn failure() -> DenseReason {
        "the read failed".into()
    }

    /// Runs four threads that request 0 to 3. The read for 0 lasts until the others wait. `rest` returns how many
    /// results a later read, whose number it gets, returns. Returns the requests of each read, and what each thread
    /// received.
    fn four_threads(rest: impl Fn(usize) -> Result<usize, DenseReason> + Sync) -> (Vec<Vec<u32>>, Vec<Received>) {
        let reads = SharedReads::default();
        let requests = Mutex::new(Vec::new());
        let take = |id: u32| {
            let received = reads.take(wanted(id), |all| {
                let number = lock(&requests).len();
                lock(&requests).push(all.iter().map(|wanted| wanted.id.get()).collect::<Vec<_>>());
                let count = if number == 0 { all.len() } else { rest(number)? };
                if number == 0 {
                    until(|| lock(&reads.waiting).len() == 3);
                }
                Ok(all.iter().take(count).map(result).collect())
            });
            received.map(|result| result.map(id_of))
        };
        let received = thread::scope(|scope| {
            let first = scope.spawn(|| take(0));
            until(|| lock(&requests).len() == 1);
            let others: Vec<_> = (1..4).map(|wanted| scope.spawn(move || take(wanted))).collect();
            [first].into_iter().chain(others).map(|thread| thread.join().unwrap()).collect()
        });
        (requests.into_inner().unwrap(), received)
    }

    #[test]
    fn waiting_threads_share_the_next_read() {
        let (mut requests, received) = four_threads(|_| Ok(3));
        assert_eq!(received, [0, 1, 2, 3].map(|received| Ok(Some(received))));
        requests[1].sort_unstable();
        assert_eq!(requests, [vec![0], vec![1, 2, 3]]);
    }

    #[test]
    fn a_thread_without_a_result_reads_itself() {
        let (requests, received) = four_threads(|number| if number == 1 { Err(failure()) } else { Ok(1) });
        assert_eq!(requests.len(), 4, "{requests:?}");
        let failed = usize::try_from(requests[1][0]).unwrap();
        for (wanted, received) in received.into_iter().enumerate() {
            assert_eq!(received, if wanted == failed { Err(failure()) } else { Ok(Some(wanted as u32)) });
        }
        let (_, received) = four_threads(|_| Ok(0));
        assert_eq!(received, [Ok(Some(0)), Ok(None), Ok(None), Ok(None)]);
    }
}
