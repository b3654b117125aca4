//! Who answers: a session thread, or a thread of its own when no other session thread is free.
//!
//! A request may wait for a device that waits for us (a loop device over a file of this mount is read by a thread of the
//! kernel, which sends us the reads), or for one that is suspended. As one session thread never waits, there is always one
//! to take the next request. What a thread of ours asks of our mount is refused altogether: following that could go on
//! for ever, and a process that waits for itself cannot even be killed.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;

use log::warn;
use nix::unistd::gettid;

/// Threads that may wait besides the session's. Who needs more waits for something that will not happen.
const MAX_EXTRA: usize = 4096;

/// The threads of this process that look at devices.
static OURS: RwLock<Option<HashSet<u32>>> = RwLock::new(None);

thread_local! {
    /// Names this thread as one of ours as long as it lives.
    static ME: Me = Me::new();
}

struct Me(u32);

impl Me {
    fn new() -> Self {
        let id = gettid().as_raw().unsigned_abs();
        OURS.write().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().insert(id);
        Self(id)
    }
}

impl Drop for Me {
    fn drop(&mut self) {
        if let Some(ours) = &mut *OURS.write().unwrap_or_else(PoisonError::into_inner) {
            ours.remove(&self.0);
        }
    }
}

/// Whether the thread that a request names is one of ours.
pub(super) fn is_ours(thread: u32) -> bool {
    OURS.read().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|ours| ours.contains(&thread))
}

/// The session threads, and those that are started when all of them are at work.
pub(super) struct Crew {
    session_threads: usize,
    busy: AtomicUsize,
    extra: Arc<AtomicUsize>,
}

/// One thread at work.
struct Turn<'a>(&'a AtomicUsize);

impl<'a> Turn<'a> {
    /// Begins, and tells how many are at work now.
    fn begin(count: &'a AtomicUsize) -> (Self, usize) {
        (Self(count), count.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Crew {
    /// A crew of that many session threads.
    pub(super) fn new(session_threads: usize) -> Self {
        Self { session_threads, busy: AtomicUsize::new(0), extra: Arc::default() }
    }

    /// Does the work of a session thread, which calls this, or has it done. Work that is not done at all is dropped.
    pub(super) fn run(&self, work: impl FnOnce() + Send + 'static) {
        let (_turn, busy) = Turn::begin(&self.busy);
        if busy < self.session_threads {
            ME.with(|_| work());
        } else {
            self.run_elsewhere(work);
        }
    }

    fn run_elsewhere(&self, work: impl FnOnce() + Send + 'static) {
        let extra = self.extra.clone();
        if extra.load(Ordering::Relaxed) >= MAX_EXTRA {
            return warn!("{MAX_EXTRA} requests wait for devices: no more are taken");
        }
        let work = move || {
            let (_turn, _) = Turn::begin(&extra);
            ME.with(|_| work());
        };
        if let Err(error) = thread::Builder::new().name("extra".to_owned()).spawn(work) {
            warn!("cannot start a thread: {error}: a request is not answered");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn one_session_thread_is_always_free() {
        let crew = Crew::new(2);
        let (done, wait) = channel::<()>();
        let (say, hear) = channel();
        thread::scope(|scope| {
            let first = say.clone();
            scope.spawn(|| {
                crew.run(move || {
                    first.send(gettid()).unwrap();
                    wait.recv().unwrap();
                });
            });
            hear.recv().unwrap();
            // The first one waits until the second one was here and is done.
            let second = say.clone();
            crew.run(move || second.send(gettid()).unwrap());
            let ran_in = hear.recv().unwrap();
            assert_ne!(ran_in, gettid(), "the last session thread does not do it itself");
            done.send(()).unwrap();
        });
        crew.run(move || say.send(gettid()).unwrap());
        assert_eq!(hear.recv().unwrap(), gettid(), "one of two can");
    }

    #[test]
    fn our_threads_are_known_as_long_as_they_live() {
        let crew = Crew::new(2);
        let id = thread::scope(|scope| {
            let work = || {
                crew.run(|| {});
                let id = gettid().as_raw().unsigned_abs();
                assert!(is_ours(id));
                id
            };
            scope.spawn(work).join().unwrap()
        });
        assert!(!is_ours(1));
        assert!(gone(id));
    }

    /// A scoped thread is joined a moment before its thread-locals are dropped.
    fn gone(id: u32) -> bool {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while is_ours(id) && std::time::Instant::now() < deadline {
            thread::yield_now();
        }
        !is_ours(id)
    }
}
