//! Who answers: a session thread, or a spare one when no other session thread is free.
//!
//! A request may wait for a device that waits for us (a loop device over a file of this mount is read by a thread of the
//! kernel, which sends us the reads), or for one that is suspended. As one session thread never waits, there is always one
//! to take the next request. What a thread of ours asks of our mount is refused altogether: following that could go on
//! for ever, and a process that waits for itself cannot even be killed.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use log::warn;
use nix::unistd::gettid;

/// Threads that may wait besides the session's. Who needs more waits for something that will not happen.
const MAX_SPARE: usize = 4096;

/// How long a spare thread stays without work.
const LINGER: Duration = Duration::from_secs(1);

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

/// The session threads, and the spare ones for when all of them are at work.
pub(super) struct Crew {
    session_threads: usize,
    busy: AtomicUsize,
    spare: Arc<Spare>,
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
        Self { session_threads, busy: AtomicUsize::new(0), spare: Arc::default() }
    }

    /// Does the work of a session thread, which calls this, or has it done. Work that is not done at all is dropped.
    pub(super) fn run(&self, work: impl FnOnce() + Send + 'static) {
        let (_turn, busy) = Turn::begin(&self.busy);
        if busy < self.session_threads {
            ME.with(|_| work());
        } else {
            Spare::run(&self.spare, Box::new(work));
        }
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// Threads that take what no session thread may do. They stay for a while, for what comes next.
#[derive(Default)]
struct Spare {
    state: Mutex<State>,
    came: Condvar,
}

#[derive(Default)]
struct State {
    threads: usize,
    /// Threads that wait for work. Each piece of waiting work has one of its own: none waits for other work to be done.
    idle: usize,
    waiting: VecDeque<Work>,
}

impl Spare {
    fn run(spare: &Arc<Self>, work: Work) {
        let mut state = spare.lock();
        if state.idle > state.waiting.len() {
            state.waiting.push_back(work);
            return spare.came.notify_one();
        }
        if state.threads >= MAX_SPARE {
            return warn!("{MAX_SPARE} requests wait for devices: no more are taken");
        }
        state.threads += 1;
        drop(state);
        let mine = spare.clone();
        if let Err(error) = thread::Builder::new().name("spare".to_owned()).spawn(move || mine.serve(work)) {
            spare.lock().threads -= 1;
            warn!("cannot start a thread: {error}: a request is not answered");
        }
    }

    fn serve(&self, first: Work) {
        let _place = Place(self);
        let mut next = Some(first);
        while let Some(work) = next {
            ME.with(|_| work());
            next = self.next();
        }
    }

    /// The next work; `None` when there was none for a while, and this thread is to end.
    fn next(&self) -> Option<Work> {
        let mut state = self.lock();
        state.idle += 1;
        let wait = self.came.wait_timeout_while(state, LINGER, |state| state.waiting.is_empty());
        state = wait.unwrap_or_else(PoisonError::into_inner).0;
        state.idle -= 1;
        let work = state.waiting.pop_front();
        state.threads -= usize::from(work.is_none());
        work
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A spare thread's place. It is given up with the last work, or by a panic.
struct Place<'a>(&'a Spare);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.lock().threads -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Instant;

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

    /// A crew of one session thread, which therefore does nothing itself.
    #[test]
    fn a_spare_thread_takes_the_next_work_unless_it_is_at_work() {
        let crew = Crew::new(1);
        let (say, hear) = channel();
        let run = |wait: Option<Receiver<()>>| {
            let say = say.clone();
            crew.run(move || {
                say.send(gettid()).unwrap();
                wait.map(|wait| wait.recv());
            });
            hear.recv().unwrap()
        };
        let (done, wait) = channel();
        let first = run(Some(wait));
        let second = run(None);
        assert_ne!(first, second, "the first one is at work");
        drop(done);
        let until = |threads| {
            let deadline = Instant::now() + Duration::from_secs(10);
            while crew.spare.lock().idle != threads {
                assert!(Instant::now() < deadline);
                thread::yield_now();
            }
        };
        until(2);
        assert!([first, second].contains(&run(None)));
        until(0);
        assert_eq!(crew.spare.lock().threads, 0);
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
