//! The life of a daemon: everything that can fail, the report, then requests and signals until the unmount.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::geteuid;

use crate::error::{Error, ErrorKind, Result, plain};
use crate::mount::daemon::Ready;
use crate::mount::options::{MountOptions, ParsedOptions};
use crate::mount::point::{Claim, MountPoint, Mounted, Unmounted};
use crate::mount::record::{self, Record};
use crate::mount::signals::{Signals, Wish};
use crate::mount::{logging, resources, session};
use crate::source::nbd::Uri;
use crate::spec::Spec;
use crate::sys::process::{self, Capability};

/// How long requests under way may take after TERM, when the mount is still in use.
const GRACE: Duration = Duration::from_secs(2);

/// How often a mount that is to end is looked at while another mount covers it.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How long the session may take to start its threads. They wait for nothing.
const START: Duration = Duration::from_secs(10);

/// What signals ask of the file system.
pub struct Hooks {
    /// SIGHUP: forget every map, so that the next question looks at the device again.
    pub drop_maps: Box<dyn Fn()>,
    /// SIGUSR1: write the counters to the log.
    pub log_counters: Box<dyn Fn()>,
}

/// One mount to serve.
pub struct Service<'a> {
    /// What was mounted, as typed.
    pub spec: &'a Spec,
    /// The words of `-o`.
    pub options: &'a ParsedOptions,
    /// What signals do.
    pub hooks: Hooks,
}

enum Event {
    Ended(io::Result<()>),
    Wish(Wish),
}

impl Service<'_> {
    /// Mounts with `mount`, reports when everything that serves the mount runs, and serves until the mount is gone or a
    /// signal ends it.
    ///
    /// # Errors
    /// When it cannot mount, or when the session broke. Nothing is left then: no mount, no record.
    pub fn run<R>(
        self,
        point: MountPoint,
        ready: &mut Ready,
        mount: impl FnOnce(&Spec, &Claim, &MountOptions) -> Result<(R, Mounted)>,
    ) -> Result<()>
    where
        R: FnOnce() -> io::Result<()> + Send + 'static,
    {
        // Each open file takes some. An open that finds none left fails with EMFILE.
        if let Err(error) = process::raise_descriptor_limit() {
            log::debug!("the limit of open files stays as it is: {error}");
        }
        resources::check()?;
        let claim = point.claim()?;
        let signals = Signals::hold(ready.is_foreground())?;
        let (session, mounted) = mount(self.spec, &claim, &self.options.mount)?;
        let record = create_record(&mounted);
        let started = self.drop_privileges(&mounted).and_then(|()| start(session, signals));
        let events = match started.and_then(|events| ready.report().map(|()| events)) {
            Ok(events) => events,
            Err(error) => return Err(take_away(&mounted, error)),
        };
        drop(claim);
        crate::source::thin::held::recover_once(std::time::Duration::ZERO);
        log::info!("{} is mounted on {}", self.spec.typed().display(), mounted.dir().display());
        let result = self.watch(&mounted, &events);
        log::info!("{} is unmounted", mounted.dir().display());
        // The mount's number may be another one's from now on.
        drop(record);
        drop(self.hooks);
        // A request may still be at work: what it holds of a pool is to be released before the process ends.
        crate::source::thin::held::finish();
        result
    }

    fn watch(&self, mounted: &Mounted, events: &Receiver<Event>) -> Result<()> {
        loop {
            match events.recv() {
                Ok(Event::Ended(Ok(()))) => return Ok(()),
                Ok(Event::Ended(Err(e))) => {
                    let error = Error::failed("the session broke").on(mounted.dir()).because(e);
                    return Err(take_away(mounted, error));
                }
                Ok(Event::Wish(Wish::DropMaps)) => (self.hooks.drop_maps)(),
                Ok(Event::Wish(Wish::LogCounters)) => (self.hooks.log_counters)(),
                Ok(Event::Wish(Wish::ToggleDebug)) => logging::toggle_debug(),
                Ok(Event::Wish(Wish::End(signal))) => return end(&signal, mounted, events),
                Err(_) => return Err(Error::new(ErrorKind::Internal, "no thread is left").on(mounted.dir())),
            }
        }
    }

    /// Root keeps what unmounting, device-mapper, other people's images and sockets need. A user's daemon has nothing to
    /// give up, and needs the setuid program fusermount3 at its end.
    fn drop_privileges(&self, mounted: &Mounted) -> Result<()> {
        if !geteuid().is_root() {
            return Ok(());
        }
        let mut keep = vec![Capability::SYS_ADMIN, Capability::DAC_READ_SEARCH];
        if mounted.is_elsewhere() {
            keep.push(Capability::SYS_CHROOT);
        }
        if self.connects_to_socket() {
            keep.push(Capability::DAC_OVERRIDE);
        }
        nix::sys::prctl::set_no_new_privs()
            .map_err(io::Error::from)
            .and_then(|()| process::keep_capabilities(&keep))
            .map_err(|e| Error::new(ErrorKind::System, "cannot drop privileges").because(e))
    }

    /// Whether an NBD server is reached by a Unix socket.
    fn connects_to_socket(&self) -> bool {
        self.spec.nbd_uri().into_iter().chain(&self.options.source.nbd).any(Uri::has_unix_socket)
    }
}

/// Unmounts after a failure; the error that is to be reported, with what is left behind.
fn take_away(mounted: &Mounted, error: Error) -> Error {
    match mounted.unmount() {
        Ok(Unmounted::Everywhere) => error,
        Ok(Unmounted::Covered(place)) => {
            error.hint(format!("the mount is still there, below another one on {}", place.display()))
        }
        Err(left) => error.hint(format!("the mount is still there: {left}")),
    }
}

/// Unmounts, and gives those who are still inside a moment. A mount that another one covers cannot be unmounted, and
/// without its daemon it would answer ENOTCONN: it is served until the other one is gone.
fn end(signal: &str, mounted: &Mounted, events: &Receiver<Event>) -> Result<()> {
    log::info!("{signal}: unmounting {}", mounted.dir().display());
    let mut told = false;
    while let Unmounted::Covered(place) = mounted.unmount()? {
        if !told {
            let place = place.display();
            log::error!("{place}: cannot unmount: something else is mounted over it; this ends when that is unmounted");
            told = true;
        }
        if ended_within(LOOK_AGAIN, events) {
            return Ok(());
        }
    }
    if !ended_within(GRACE, events) {
        log::warn!("{}: files are still open, their readers get an error now", mounted.dir().display());
    }
    Ok(())
}

/// Waits for the end of the session; whether it came in time.
fn ended_within(time: Duration, events: &Receiver<Event>) -> bool {
    let deadline = Instant::now() + time;
    loop {
        match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Wish(_)) => {}
            Ok(Event::Ended(_)) | Err(RecvTimeoutError::Disconnected) => return true,
            Err(RecvTimeoutError::Timeout) => return false,
        }
    }
}

/// Starts the session, and a thread that waits for signals. Returns when all threads of the session run.
fn start<R>(session: R, signals: Signals) -> Result<Receiver<Event>>
where
    R: FnOnce() -> io::Result<()> + Send + 'static,
{
    let (sender, events) = channel();
    let (ended, again) = (sender.clone(), sender.clone());
    spawn("signals", move || forward_signals(&signals, &sender))?;
    // Nobody hears an event when the daemon is at its end.
    spawn("session", move || drop(ended.send(Event::Ended(session()))))?;
    let cannot = |e: io::Error| Error::new(ErrorKind::System, "cannot start the session").because(e);
    let deadline = Instant::now() + START;
    // The session cannot be asked, but the kernel can.
    while !session::all_threads_run().map_err(cannot)? {
        match events.recv_timeout(Duration::from_millis(1)) {
            Ok(Event::Ended(Err(error))) => return Err(cannot(error)),
            // Somebody found the mount and unmounted it in this moment. `events` lives, so it is not lost.
            Ok(Event::Ended(Ok(()))) => {
                let _ = again.send(Event::Ended(Ok(())));
                break;
            }
            Ok(Event::Wish(Wish::End(signal))) => {
                return Err(Error::new(ErrorKind::Interrupted, format!("ended by {signal}")));
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() > deadline => {
                return Err(cannot(io::ErrorKind::TimedOut.into()));
            }
            _ => {}
        }
    }
    Ok(events)
}

fn forward_signals(signals: &Signals, events: &Sender<Event>) {
    while let Ok(wish) = signals.next().inspect_err(|e| log::error!("no signal is heard any more: {e}")) {
        if events.send(Event::Wish(wish)).is_err() {
            return;
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.map(drop).map_err(|e| Error::new(ErrorKind::System, "cannot start a thread").because(e))
}

/// A mount without a record is served all the same; a user without a session has no place for one.
fn create_record(mounted: &Mounted) -> Option<Record> {
    let directory = record::directory()?;
    Record::create(&directory, mounted.device())
        .inspect_err(|e| log::warn!("{}: no record, umount will not wait: {}", directory.display(), plain(e)))
        .ok()
}
