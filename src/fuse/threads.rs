//! Which thread answers a request: a session thread, or a spare one when no other session thread is free.
//!
//! A request may wait for a device that waits for this file system (a loop device over a file of this mount is read by a
//! thread of the kernel, which sends the reads here), or for one that is suspended. One session thread never does such
//! work, so there is always one to take the next request. What a thread of this process asks of its own mount is refused
//! altogether: following that could go on for ever, and a process that waits for itself cannot even be killed.
//!
//! A panic ends the request that it happened in, and nothing else: the reply is dropped, which answers EIO, and the thread
//! goes on. All locks of the program are taken whether they are poisoned or not.

use std::any::Any;
use std::collections::{HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use log::{error, warn};
use nix::unistd::gettid;

/// Threads that may wait besides the session's. A client that needs more waits for something that will not happen.
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

/// What becomes of a request for which no thread is free and none can be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IfNoThread {
    /// It is dropped, which answers it with EIO.
    Refuse,
    /// It waits for the next thread that is free. For what must be done, such as closing a device.
    Postpone,
}

/// The session threads, and the spare ones for when all of them are at work.
pub(super) struct Threads {
    /// Session threads that may be at work at the same time: all but one.
    most_busy: usize,
    /// Those that are.
    busy: AtomicUsize,
    spare: Arc<Spare>,
}

/// One session thread at work.
struct Turn<'a>(&'a AtomicUsize);

impl<'a> Turn<'a> {
    /// Begins, unless as many are at work as may be.
    fn begin(busy: &'a AtomicUsize, most: usize) -> Option<Self> {
        // SeqCst here, below, and for `Spare::postponed`: of a thread that postpones work and then finds all busy, and one
        // of these that is done and then looks for postponed work, at least one sees what the other did.
        let one_more = |busy: usize| (busy < most).then_some(busy + 1);
        busy.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).ok().map(|_| Self(busy))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Threads {
    /// For that many session threads.
    pub(super) fn new(session_threads: usize) -> Self {
        Self::with_limit(session_threads, MAX_SPARE)
    }

    fn with_limit(session_threads: usize, most_spare: usize) -> Self {
        let spare = Spare { most: most_spare, ..Spare::default() };
        Self { most_busy: session_threads.saturating_sub(1), busy: AtomicUsize::new(0), spare: Arc::new(spare) }
    }

    /// Does the work in the session thread that calls this, or hands it to a spare one.
    pub(super) fn run(&self, if_no_thread: IfNoThread, work: impl FnOnce() + Send + 'static) {
        match Turn::begin(&self.busy, self.most_busy) {
            Some(_turn) => perform(work),
            None => Spare::run(&self.spare, if_no_thread, Box::new(work)),
        }
        self.catch_up();
    }

    /// Does what was postponed. When all are busy, one of them does it as soon as it is done.
    fn catch_up(&self) {
        while self.spare.postponed.load(Ordering::SeqCst) > 0 {
            let Some(_turn) = Turn::begin(&self.busy, self.most_busy) else { return };
            let Some(work) = self.spare.take_postponed() else { return };
            perform(work);
        }
    }
}

/// Does work that waits for nothing, in the thread that calls this.
pub(super) fn perform(work: impl FnOnce()) {
    // What the work leaves half done is behind locks, each of which guards values that are right at any time.
    if let Err(panic) = ME.with(|_| catch_unwind(AssertUnwindSafe(work))) {
        error!("a fault of the program ended a request, which fails with EIO: {}", message(&*panic));
    }
}

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

type Work = Box<dyn FnOnce() + Send>;

/// Threads that take what no session thread may do. They stay for a while, for what comes next.
#[derive(Default)]
struct Spare {
    /// Threads that there may be.
    most: usize,
    state: Mutex<State>,
    came: Condvar,
    /// How much work is in [`State::postponed`].
    postponed: AtomicUsize,
}

#[derive(Default)]
struct State {
    threads: usize,
    /// Threads that wait for work. Each piece of waiting work has one of its own: none waits for other work to be done.
    idle: usize,
    waiting: VecDeque<Work>,
    /// Work that has no thread yet.
    postponed: VecDeque<Work>,
}

impl Spare {
    fn run(spare: &Arc<Self>, if_no_thread: IfNoThread, work: Work) {
        let mut state = spare.lock();
        if state.idle > state.waiting.len() {
            state.waiting.push_back(work);
            return spare.came.notify_one();
        }
        if state.threads >= spare.most {
            drop(state);
            return spare.no_thread(if_no_thread, work, &format!("{} requests wait for devices", spare.most));
        }
        state.threads += 1;
        drop(state);
        // The work stays here until the thread runs: a start that fails would drop it.
        let first = Arc::new(Mutex::new(Some(work)));
        let (mine, its) = (spare.clone(), first.clone());
        let started = thread::Builder::new().name("spare".to_owned()).spawn(move || mine.serve(take(&its)));
        if let Err(error) = started {
            spare.lock().threads -= 1;
            if let Some(work) = take(&first) {
                spare.no_thread(if_no_thread, work, &format!("cannot start a thread: {error}"));
            }
        }
    }

    fn no_thread(&self, if_no_thread: IfNoThread, work: Work, why: &str) {
        match if_no_thread {
            IfNoThread::Refuse => error!("{why}: a request fails with EIO"),
            IfNoThread::Postpone => {
                warn!("{why}: a file is closed later");
                let mut state = self.lock();
                state.postponed.push_back(work);
                self.postponed.fetch_add(1, Ordering::SeqCst);
                self.came.notify_one();
            }
        }
    }

    fn take_postponed(&self) -> Option<Work> {
        self.pop_postponed(&mut self.lock())
    }

    fn pop_postponed(&self, state: &mut State) -> Option<Work> {
        let work = state.postponed.pop_front()?;
        self.postponed.fetch_sub(1, Ordering::SeqCst);
        Some(work)
    }

    fn serve(&self, first: Option<Work>) {
        let mut next = first;
        while let Some(work) = next {
            perform(work);
            next = self.next();
        }
    }

    /// The next work; `None` when there was none for a while, and this thread is to end.
    fn next(&self) -> Option<Work> {
        let mut state = self.lock();
        state.idle += 1;
        let nothing = |state: &mut State| state.waiting.is_empty() && state.postponed.is_empty();
        let wait = self.came.wait_timeout_while(state, LINGER, nothing);
        state = wait.unwrap_or_else(PoisonError::into_inner).0;
        state.idle -= 1;
        let waiting = state.waiting.pop_front();
        let work = waiting.or_else(|| self.pop_postponed(&mut state));
        state.threads -= usize::from(work.is_none());
        work
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take(work: &Mutex<Option<Work>>) -> Option<Work> {
    work.lock().unwrap_or_else(PoisonError::into_inner).take()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Instant;

    use super::*;
    use IfNoThread::{Postpone, Refuse};

    /// What a test hands over to wait, and how it lets it go on.
    fn waits_for(release: Receiver<()>, began: Sender<nix::unistd::Pid>) -> impl FnOnce() + Send + 'static {
        move || {
            began.send(gettid()).unwrap();
            release.recv().unwrap();
        }
    }

    fn becomes(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
    }

    #[test]
    fn one_session_thread_is_always_free() {
        let threads = Threads::new(2);
        let (done, wait) = channel();
        let (say, hear) = channel();
        thread::scope(|scope| {
            let first = say.clone();
            scope.spawn(|| threads.run(Refuse, waits_for(wait, first)));
            hear.recv().unwrap();
            // The first one waits until the second one was here and is done.
            let second = say.clone();
            threads.run(Refuse, move || second.send(gettid()).unwrap());
            let ran_in = hear.recv().unwrap();
            assert_ne!(ran_in, gettid(), "the last session thread does not do it itself");
            done.send(()).unwrap();
        });
        threads.run(Refuse, move || say.send(gettid()).unwrap());
        assert_eq!(hear.recv().unwrap(), gettid(), "one of two can");
    }

    /// With one session thread, which therefore does nothing itself.
    #[test]
    fn a_spare_thread_takes_the_next_work_unless_it_is_at_work() {
        let threads = Threads::new(1);
        let (say, hear) = channel();
        let run = |wait: Option<Receiver<()>>| {
            let say = say.clone();
            threads.run(Refuse, move || {
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
        becomes(|| threads.spare.lock().idle == 2);
        assert!([first, second].contains(&run(None)));
        becomes(|| threads.spare.lock().idle == 0);
        assert_eq!(threads.spare.lock().threads, 0);
    }

    /// More panics than there are threads of either kind, with a lock held: each ends its own request only.
    #[test]
    fn a_panic_ends_its_request_and_no_thread() {
        let lock = Arc::new(Mutex::new(()));
        for session_threads in [1, 8] {
            let threads = Threads::with_limit(session_threads, 2);
            for _ in 0..20 {
                let (reply, answer) = channel::<()>();
                let lock = lock.clone();
                threads.run(Refuse, move || {
                    let _reply = reply;
                    let _held = lock.lock().unwrap_or_else(PoisonError::into_inner);
                    panic!("a fault of a test");
                });
                assert!(answer.recv().is_err(), "the reply is dropped, which answers EIO");
            }
            assert_eq!(threads.busy.load(Ordering::SeqCst), 0);
            // A spare thread is free a moment after the reply was dropped.
            becomes(|| {
                let (say, hear) = channel();
                threads.run(Refuse, move || say.send(gettid()).unwrap());
                hear.recv().is_ok_and(|ran_in| (ran_in == gettid()) == (session_threads > 1))
            });
        }
        assert!(lock.is_poisoned(), "the panics held it");
    }

    /// The limit of spare threads is reached: a read fails at once, and a close is made up for.
    #[test]
    fn a_request_without_a_thread_is_refused_or_postponed_and_never_forgotten() {
        let threads = Arc::new(Threads::with_limit(2, 1));
        let (began, begins) = channel();
        let (release_session, wait) = channel();
        let session = {
            let (threads, began) = (threads.clone(), began.clone());
            thread::spawn(move || threads.run(Refuse, waits_for(wait, began)))
        };
        begins.recv().unwrap();
        let (release_spare, wait) = channel();
        threads.run(Refuse, waits_for(wait, began));
        begins.recv().unwrap();

        let (reply, answer) = channel::<()>();
        threads.run(Refuse, move || reply.send(()).unwrap());
        assert!(answer.recv().is_err(), "the reply is dropped, which answers EIO");
        let (closed, closes) = channel();
        for n in 0..2 {
            let closed = closed.clone();
            threads.run(Postpone, move || closed.send(n).unwrap());
        }
        assert!(closes.try_recv().is_err(), "there is no thread for it yet");
        release_session.send(()).unwrap();
        session.join().unwrap();
        assert_eq!([closes.recv().unwrap(), closes.recv().unwrap()], [0, 1], "by the thread that became free");
        release_spare.send(()).unwrap();
        assert_eq!(threads.spare.postponed.load(Ordering::SeqCst), 0);
    }

    /// The other way round: what was postponed is done by the spare thread when that is the first to be free.
    #[test]
    fn a_spare_thread_does_what_was_postponed() {
        let threads = Threads::with_limit(1, 1);
        let (began, begins) = channel();
        let (release, wait) = channel();
        threads.run(Refuse, waits_for(wait, began));
        let spare = begins.recv().unwrap();
        let (closed, closes) = channel();
        threads.run(Postpone, move || closed.send(gettid()).unwrap());
        assert!(closes.try_recv().is_err());
        release.send(()).unwrap();
        assert_eq!(closes.recv().unwrap(), spare);
    }

    #[test]
    fn our_threads_are_known_as_long_as_they_live() {
        let threads = Threads::new(2);
        let id = thread::scope(|scope| {
            let work = || {
                threads.run(Refuse, || {});
                let id = gettid().as_raw().unsigned_abs();
                assert!(is_ours(id));
                id
            };
            scope.spawn(work).join().unwrap()
        });
        assert!(!is_ours(1));
        // A scoped thread is joined a moment before its thread-locals are dropped.
        becomes(|| !is_ours(id));
    }
}
