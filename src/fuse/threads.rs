//! The threads that run requests: session threads, and worker threads for when all but one session thread are busy.
//!
//! A request may block for as long as a device does. The device may be suspended, or it may itself depend on this mount:
//! the reads of a loop device whose backing file is a file of the mount become new requests here. So one session thread
//! runs no request that may block. It hands such requests to worker threads, and can always read the next request.
//!
//! Requests that this process sends to its own mount are refused (see [`is_own_thread`]): each could lead to another one
//! without end, and a process that waits for itself cannot even be killed.
//!
//! A panic ends only the request in which it occurs: the reply is dropped, whereupon the FUSE library sends EIO, and the
//! thread continues with the next request. Therefore the whole program ignores that a lock is poisoned.

#[cfg(test)]
mod tests;

use std::any::Any;
use std::collections::{HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use log::{error, warn};
use nix::unistd::gettid;

/// The largest number of worker threads. It is far above the number of requests that are in progress when all devices
/// respond, and limits the threads and the memory when devices do not respond.
const MAX_WORKERS: usize = 4096;

/// How long a worker thread waits for another request before it ends.
const IDLE_TIME: Duration = Duration::from_secs(1);

/// The ids of all threads of this process that have run a request.
static OWN_THREADS: RwLock<Option<HashSet<u32>>> = RwLock::new(None);

thread_local! {
    /// Registers this thread in [`OWN_THREADS`] until it ends.
    static REGISTRATION: Registration = Registration::new();
}

/// An entry of [`OWN_THREADS`], which is removed when this value is dropped.
struct Registration(u32);

impl Registration {
    fn new() -> Self {
        let id = gettid().as_raw().unsigned_abs();
        OWN_THREADS.write().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().insert(id);
        Self(id)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(threads) = &mut *OWN_THREADS.write().unwrap_or_else(PoisonError::into_inner) {
            threads.remove(&self.0);
        }
    }
}

/// Whether `thread`, the sender of a request, is a thread of this process that runs requests.
pub(super) fn is_own_thread(thread: u32) -> bool {
    let threads = OWN_THREADS.read().unwrap_or_else(PoisonError::into_inner);
    threads.as_ref().is_some_and(|threads| threads.contains(&thread))
}

/// What happens to a request if no thread is idle and none can be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IfNoThread {
    /// The request is dropped, whereupon it fails with EIO.
    Refuse,
    /// The request waits in a queue for the next thread that becomes idle. For requests that must not be lost, such as
    /// closing a device.
    Postpone,
}

/// The session threads of one mount, and its worker threads.
pub(super) struct Threads {
    /// The largest number of session threads that may be busy at the same time: all but one.
    max_busy: usize,
    /// The number of session threads that are busy.
    busy: AtomicUsize,
    workers: Arc<Workers>,
}

/// Counts the calling session thread as busy until it is dropped.
struct BusyGuard<'a>(&'a AtomicUsize);

impl<'a> BusyGuard<'a> {
    /// `None` if `max` session threads are busy already.
    fn new(busy: &'a AtomicUsize, max: usize) -> Option<Self> {
        // The order of operations on `busy` and on `Workers::postponed` must be the same for all threads (SeqCst). One thread
        // postpones a request and then finds that all others are busy; another one stops being busy and then looks for
        // postponed requests. At least one of them must see what the other did, or the request would stay in the queue.
        let increment = |busy: usize| (busy < max).then_some(busy + 1);
        busy.fetch_update(Ordering::SeqCst, Ordering::SeqCst, increment).ok().map(|_| Self(busy))
    }
}

impl Drop for BusyGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Threads {
    /// The threads of a mount with `session_threads` session threads. No worker thread is started yet.
    pub(super) fn new(session_threads: usize) -> Self {
        Self::with_limit(session_threads, MAX_WORKERS)
    }

    fn with_limit(session_threads: usize, max_workers: usize) -> Self {
        let workers = Workers { max: max_workers, ..Workers::default() };
        Self { max_busy: session_threads.saturating_sub(1), busy: AtomicUsize::new(0), workers: Arc::new(workers) }
    }

    /// Runs a request that may block: in the calling session thread, or in a worker thread if all other session threads
    /// are busy.
    pub(super) fn run(&self, if_no_thread: IfNoThread, request: impl FnOnce() + Send + 'static) {
        match BusyGuard::new(&self.busy, self.max_busy) {
            Some(_busy) => run_caught(request),
            None => Workers::run(&self.workers, if_no_thread, Box::new(request)),
        }
        self.run_postponed();
    }

    /// As [`Threads::run`], for a request that is refused if there is no thread for it. It returns the function that sends its
    /// reply, which must not block.
    ///
    /// The session thread does not count as busy while it sends the reply. The sender of the request may run before this
    /// thread does again, and send its next request, which must not be handed to a worker thread for that.
    pub(super) fn run_then_reply<C, R>(&self, context: &Arc<C>, request: impl FnOnce(&C) -> R + Send + 'static)
    where
        C: Send + Sync + 'static,
        R: FnOnce(),
    {
        match BusyGuard::new(&self.busy, self.max_busy) {
            Some(busy) => run_caught(|| {
                let reply = request(context);
                drop(busy);
                reply();
            }),
            None => {
                let context = context.clone();
                Workers::run(&self.workers, IfNoThread::Refuse, Box::new(move || request(&context)()));
            }
        }
        self.run_postponed();
    }

    /// Runs the postponed requests. If all other session threads are busy it returns, and the first of them that is done
    /// calls this function.
    fn run_postponed(&self) {
        while self.workers.postponed.load(Ordering::SeqCst) > 0 {
            let Some(_busy) = BusyGuard::new(&self.busy, self.max_busy) else { return };
            let Some(request) = self.workers.take_postponed() else { return };
            run_caught(request);
        }
    }
}

/// Runs a request in the calling thread, and catches its panic. Called directly only for requests that never block.
pub(super) fn run_caught(request: impl FnOnce()) {
    // Unwind safety: what the request shares with others is behind locks, and a value behind a lock is consistent at every
    // point at which code that holds the lock can panic.
    if let Err(panic) = REGISTRATION.with(|_| catch_unwind(AssertUnwindSafe(request))) {
        error!("a bug of the program ended a request, which fails with EIO: {}", panic_message(&*panic));
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

type BoxedRequest = Box<dyn FnOnce() + Send>;

/// The worker threads.
#[derive(Default)]
struct Workers {
    /// The largest number of worker threads.
    max: usize,
    queues: Mutex<WorkerQueues>,
    /// Notified when a request was added to either queue.
    added: Condvar,
    /// The length of [`WorkerQueues::postponed`], readable without the lock.
    postponed: AtomicUsize,
}

#[derive(Default)]
struct WorkerQueues {
    /// The number of worker threads.
    threads: usize,
    /// The number of worker threads that wait for a request.
    idle: usize,
    /// Requests that idle threads are about to take. There are never more than idle threads, so that no request has to wait
    /// until another one is done.
    assigned: VecDeque<BoxedRequest>,
    /// Requests for which there is no thread yet.
    postponed: VecDeque<BoxedRequest>,
}

impl Workers {
    /// Runs a request in an idle worker thread, or in a new one.
    fn run(workers: &Arc<Self>, if_no_thread: IfNoThread, request: BoxedRequest) {
        let mut queues = workers.lock();
        if queues.idle > queues.assigned.len() {
            queues.assigned.push_back(request);
            return workers.added.notify_one();
        }
        if queues.threads >= workers.max {
            drop(queues);
            let reason = format!("{} requests wait for devices", workers.max);
            return workers.no_thread(if_no_thread, request, &reason);
        }
        queues.threads += 1;
        drop(queues);
        // The request is passed in a shared slot: a closure that cannot be started is dropped with all that it owns.
        let slot = Arc::new(Mutex::new(Some(request)));
        let (its_workers, its_slot) = (workers.clone(), slot.clone());
        let started = thread::Builder::new().name("worker".to_owned());
        if let Err(error) = started.spawn(move || its_workers.work(take(&its_slot))) {
            workers.lock().threads -= 1;
            if let Some(request) = take(&slot) {
                workers.no_thread(if_no_thread, request, &format!("cannot start a thread: {error}"));
            }
        }
    }

    /// Refuses or postpones a request for which there is no thread.
    fn no_thread(&self, if_no_thread: IfNoThread, request: BoxedRequest, reason: &str) {
        match if_no_thread {
            IfNoThread::Refuse => error!("{reason}: a request fails with EIO"),
            IfNoThread::Postpone => {
                warn!("{reason}: a file is closed later");
                let mut queues = self.lock();
                queues.postponed.push_back(request);
                self.postponed.fetch_add(1, Ordering::SeqCst);
                self.added.notify_one();
            }
        }
    }

    fn take_postponed(&self) -> Option<BoxedRequest> {
        self.pop_postponed(&mut self.lock())
    }

    fn pop_postponed(&self, queues: &mut WorkerQueues) -> Option<BoxedRequest> {
        let request = queues.postponed.pop_front()?;
        self.postponed.fetch_sub(1, Ordering::SeqCst);
        Some(request)
    }

    /// The main function of a worker thread.
    fn work(&self, first: Option<BoxedRequest>) {
        let mut next = first;
        while let Some(request) = next {
            run_caught(request);
            next = self.next();
        }
    }

    /// Waits for the next request. `None` if there was none for [`IDLE_TIME`]: the calling thread no longer counts then, and
    /// must end.
    fn next(&self) -> Option<BoxedRequest> {
        let mut queues = self.lock();
        queues.idle += 1;
        let is_empty = |queues: &mut WorkerQueues| queues.assigned.is_empty() && queues.postponed.is_empty();
        let wait = self.added.wait_timeout_while(queues, IDLE_TIME, is_empty);
        queues = wait.unwrap_or_else(PoisonError::into_inner).0;
        queues.idle -= 1;
        let assigned = queues.assigned.pop_front();
        let request = assigned.or_else(|| self.pop_postponed(&mut queues));
        queues.threads -= usize::from(request.is_none());
        request
    }

    fn lock(&self) -> MutexGuard<'_, WorkerQueues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take(slot: &Mutex<Option<BoxedRequest>>) -> Option<BoxedRequest> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}
