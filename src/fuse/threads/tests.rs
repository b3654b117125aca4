use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use super::*;
use IfNoThread::{Postpone, Refuse};

/// A request that reports its thread to `began`, and blocks until something arrives in `release`.
fn blocks_until(release: Receiver<()>, began: Sender<nix::unistd::Pid>) -> impl FnOnce() + Send + 'static {
    move || {
        began.send(gettid()).unwrap();
        release.recv().unwrap();
    }
}

fn wait_until(condition: impl Fn() -> bool) {
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
    let (sender, receiver) = channel();
    thread::scope(|scope| {
        let first = sender.clone();
        scope.spawn(|| threads.run(Refuse, blocks_until(wait, first)));
        receiver.recv().unwrap();
        // The first request blocks until the second one is done.
        let second = sender.clone();
        threads.run(Refuse, move || second.send(gettid()).unwrap());
        let ran_in = receiver.recv().unwrap();
        assert_ne!(ran_in, gettid(), "the last idle session thread hands the request over");
        done.send(()).unwrap();
    });
    threads.run(Refuse, move || sender.send(gettid()).unwrap());
    assert_eq!(receiver.recv().unwrap(), gettid(), "one of two session threads may be busy");
}

/// The sender of a request may send the next one before the session thread has done anything after the reply.
#[test]
fn a_session_thread_that_sends_a_reply_is_not_busy() {
    let threads = Threads::new(2);
    let (replied, reply) = channel();
    let (done, wait) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(|| {
            threads.run_then_reply(&Arc::new(()), move |()| {
                move || {
                    replied.send(()).unwrap();
                    wait.recv().unwrap();
                }
            });
        });
        reply.recv().unwrap();
        let (sender, receiver) = channel();
        threads.run(Refuse, move || sender.send(gettid()).unwrap());
        assert_eq!(receiver.recv().unwrap(), gettid(), "no worker thread is needed");
        done.send(()).unwrap();
    });
    assert_eq!(threads.busy.load(Ordering::SeqCst), 0);
}

/// With a single session thread, which hands every request over.
#[test]
fn a_worker_thread_takes_the_next_request_unless_it_is_busy() {
    let threads = Threads::new(1);
    let (sender, receiver) = channel();
    let run = |wait: Option<Receiver<()>>| {
        let sender = sender.clone();
        threads.run(Refuse, move || {
            sender.send(gettid()).unwrap();
            wait.map(|wait| wait.recv());
        });
        receiver.recv().unwrap()
    };
    let (done, wait) = channel();
    let first = run(Some(wait));
    let second = run(None);
    assert_ne!(first, second, "the first worker is busy");
    drop(done);
    wait_until(|| threads.workers.lock().idle == 2);
    assert!([first, second].contains(&run(None)));
    wait_until(|| threads.workers.lock().idle == 0);
    assert_eq!(threads.workers.lock().threads, 0);
}

/// Causes more panics than there are session and worker threads, with a lock held. Each ends only its own request.
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
                panic!("panic of a test");
            });
            assert!(answer.recv().is_err(), "the reply is dropped, whereupon the library sends EIO");
        }
        assert_eq!(threads.busy.load(Ordering::SeqCst), 0);
        // A worker thread becomes idle some time after the reply was dropped.
        wait_until(|| {
            let (sender, receiver) = channel();
            threads.run(Refuse, move || sender.send(gettid()).unwrap());
            receiver.recv().is_ok_and(|ran_in| (ran_in == gettid()) == (session_threads > 1))
        });
    }
    assert!(lock.is_poisoned(), "a thread panicked while it held the lock");
}

/// With all threads busy: a read fails immediately, and closes are done later.
#[test]
fn a_request_without_a_thread_is_refused_or_postponed_and_never_lost() {
    let threads = Arc::new(Threads::with_limit(2, 1));
    let (began, begins) = channel();
    let (release_session, wait) = channel();
    let session = {
        let (threads, began) = (threads.clone(), began.clone());
        thread::spawn(move || threads.run(Refuse, blocks_until(wait, began)))
    };
    begins.recv().unwrap();
    let (release_worker, wait) = channel();
    threads.run(Refuse, blocks_until(wait, began));
    begins.recv().unwrap();

    let (reply, answer) = channel::<()>();
    threads.run(Refuse, move || reply.send(()).unwrap());
    assert!(answer.recv().is_err(), "the reply is dropped, whereupon the library sends EIO");
    let (closed, closes) = channel();
    for n in 0..2 {
        let closed = closed.clone();
        threads.run(Postpone, move || closed.send(n).unwrap());
    }
    assert!(closes.try_recv().is_err(), "there is no idle thread yet");
    release_session.send(()).unwrap();
    session.join().unwrap();
    assert_eq!(
        [closes.recv().unwrap(), closes.recv().unwrap()],
        [0, 1],
        "by the session thread, as soon as it is idle"
    );
    release_worker.send(()).unwrap();
    assert_eq!(threads.workers.postponed.load(Ordering::SeqCst), 0);
}

/// A postponed request is run by a worker thread if that is the first thread to become idle.
#[test]
fn a_worker_thread_runs_postponed_requests() {
    let threads = Threads::with_limit(1, 1);
    let (began, begins) = channel();
    let (release, wait) = channel();
    threads.run(Refuse, blocks_until(wait, began));
    let worker = begins.recv().unwrap();
    let (closed, closes) = channel();
    threads.run(Postpone, move || closed.send(gettid()).unwrap());
    assert!(closes.try_recv().is_err());
    release.send(()).unwrap();
    assert_eq!(closes.recv().unwrap(), worker);
}

#[test]
fn own_threads_are_known_until_they_end() {
    let threads = Threads::new(2);
    let id = thread::scope(|scope| {
        let look = || {
            threads.run(Refuse, || {});
            let id = gettid().as_raw().unsigned_abs();
            assert!(is_own_thread(id));
            id
        };
        scope.spawn(look).join().unwrap()
    });
    assert!(!is_own_thread(1));
    // A scoped thread counts as joined before its thread-local values are dropped.
    wait_until(|| !is_own_thread(id));
}
