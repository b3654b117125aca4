//! Serving a mount: the threads of the daemon, and what its main thread does until the unmount.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::error::{Error, ErrorKind, Result, shown};
use crate::fs::FileSystem;
use crate::mount::logging;
use crate::mount::point::{Mounted, Unmounted};
use crate::mount::session::{self, Session};
use crate::mount::signals::{SignalAction, Signals};

/// The time that requests have to end in after a signal such as SIGTERM, when files are still open.
const UNMOUNT_GRACE: Duration = Duration::from_secs(2);

/// The time between two attempts to unmount while another mount covers this one.
const UNMOUNT_INTERVAL: Duration = Duration::from_secs(1);

/// The time that the session has for starting its threads. Nothing blocks them.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// What the main thread waits for.
pub enum Event {
    /// The session has ended.
    Ended(io::Result<()>),
    /// A signal was received.
    Signal(SignalAction),
}

/// Starts the session and a thread that waits for signals. Returns when all threads of the session run.
///
/// # Errors
/// When a thread cannot be started, and when a signal ends the start.
pub fn start(session: Session, signals: Signals) -> Result<Receiver<Event>> {
    let (sender, events) = channel();
    let (session_sender, resender) = (sender.clone(), sender.clone());
    // Before the threads: a signal that came during mount(2) ends the start, whichever thread runs first.
    let cannot = |e: Errno| Error::new(ErrorKind::System, "cannot receive signals").because(e);
    while let Some(action) = signals.pending().map_err(cannot)? {
        if let SignalAction::Unmount(signal) = &action {
            return Err(ended_by(signal));
        }
        let _ = resender.send(Event::Signal(action));
    }
    spawn("signals", move || forward_signals(&signals, &sender))?;
    // Sending fails when the main thread has ended, and is of no use then.
    spawn("session", move || drop(session_sender.send(Event::Ended(session.run()))))?;
    let cannot = |e: io::Error| Error::new(ErrorKind::System, "cannot start the session").because(e);
    let deadline = Instant::now() + START_TIMEOUT;
    // The FUSE library does not report when its threads run, so proc(5) is polled.
    while !session::all_threads_run().map_err(cannot)? {
        match events.recv_timeout(Duration::from_millis(1)) {
            Ok(Event::Ended(Err(error))) => return Err(cannot(error)),
            // Another process has already unmounted the mount. The event is for the caller, and cannot be lost while
            // `events` exists.
            Ok(Event::Ended(Ok(()))) => {
                let _ = resender.send(Event::Ended(Ok(())));
                break;
            }
            Ok(Event::Signal(SignalAction::Unmount(signal))) => {
                return Err(ended_by(&signal));
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() > deadline => {
                return Err(cannot(io::ErrorKind::TimedOut.into()));
            }
            _ => {}
        }
    }
    Ok(events)
}

fn ended_by(signal: &str) -> Error {
    Error::new(ErrorKind::Interrupted, format!("ended by {signal}"))
}

/// Sends each signal to the main thread, as an event. Returns when no signal can be received any more, and when the
/// main thread receives no more events.
fn forward_signals(signals: &Signals, events: &Sender<Event>) {
    while let Ok(action) = signals.next().inspect_err(|e| log::error!("cannot receive signals any more: {e}")) {
        if events.send(Event::Signal(action)).is_err() {
            return;
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.map(drop).map_err(|e| Error::new(ErrorKind::System, "cannot start a thread").because(e))
}

/// Acts on signals until the mount is gone, or a signal ends the daemon.
///
/// # Errors
/// When the session breaks, and when the mount cannot be unmounted.
pub fn until_unmounted(fs: &FileSystem, mounted: &Mounted, events: &Receiver<Event>) -> Result<()> {
    loop {
        match events.recv() {
            Ok(Event::Ended(Ok(()))) => return Ok(()),
            Ok(Event::Ended(Err(e))) => {
                let error = Error::failed("the session broke").on(mounted.dir()).because(e);
                return Err(mounted.unmount_after(error));
            }
            Ok(Event::Signal(SignalAction::DropMaps)) => fs.drop_maps(),
            Ok(Event::Signal(SignalAction::LogCounters)) => fs.log_counters(),
            Ok(Event::Signal(SignalAction::ToggleDebug)) => logging::toggle_debug(),
            Ok(Event::Signal(SignalAction::Unmount(signal))) => return unmount(&signal, mounted, events),
            Err(_) => return Err(Error::new(ErrorKind::Internal, "no thread is left").on(mounted.dir())),
        }
    }
}

/// Unmounts because of a signal, and gives open files some time to be closed. A mount that another one covers cannot be
/// unmounted, and would answer ENOTCONN without its daemon: it is served until the other mount is gone.
fn unmount(signal: &str, mounted: &Mounted, events: &Receiver<Event>) -> Result<()> {
    log::info!("{signal}: unmounting {}", shown(mounted.dir()));
    let mut logged = false;
    while let Unmounted::Covered(place) = mounted.unmount()? {
        if !logged {
            let place = shown(&place);
            log::error!("{place}: cannot unmount: something else is mounted over it; this ends when that is unmounted");
            logged = true;
        }
        if ended_within(UNMOUNT_INTERVAL, events) {
            return Ok(());
        }
    }
    if !ended_within(UNMOUNT_GRACE, events) {
        log::warn!("{}: files are still open, their readers get an error now", shown(mounted.dir()));
    }
    Ok(())
}

/// Waits for the end of the session. Returns whether it ended in time.
fn ended_within(time: Duration, events: &Receiver<Event>) -> bool {
    let deadline = Instant::now() + time;
    loop {
        match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Signal(_)) => {}
            Ok(Event::Ended(_)) | Err(RecvTimeoutError::Disconnected) => return true,
            Err(RecvTimeoutError::Timeout) => return false,
        }
    }
}
