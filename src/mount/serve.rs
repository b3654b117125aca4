//! The life of a daemon: from the mount, through signals, to the unmount.

use std::ffi::OsStr;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::geteuid;

use crate::error::{Error, ErrorKind, Result};
use crate::mount::daemon::Ready;
use crate::mount::logging;
use crate::mount::options::MountOptions;
use crate::mount::point::{MountPoint, Mounted};
use crate::mount::record::{self, Record};
use crate::source::nbd::{Transport, Uri};
use crate::sys::process::{self, Capability};

/// How long requests under way may take after TERM, when the mount is still in use.
const GRACE: Duration = Duration::from_secs(2);

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
    pub spec: &'a OsStr,
    /// The words of `-o`.
    pub options: &'a MountOptions,
    /// What signals do.
    pub hooks: Hooks,
}

enum Event {
    Ended(io::Result<()>),
    Signal(Signal),
}

impl Service<'_> {
    /// Mounts with `mount`, reports, and runs the session that it returns until the mount is gone or a signal ends it.
    ///
    /// # Errors
    /// When it cannot mount, or when the session broke. The mount is gone then.
    pub fn run<R>(
        self,
        point: MountPoint,
        ready: &mut Ready,
        mount: impl FnOnce(&OsStr, MountPoint, &MountOptions) -> Result<(R, Mounted)>,
    ) -> Result<()>
    where
        R: FnOnce() -> io::Result<()> + Send + 'static,
    {
        let signals = block_signals()?;
        let (session, mounted) = mount(self.spec, point, self.options)?;
        let record = create_record(&mounted);
        let started = self.drop_privileges(&mounted).and_then(|()| ready.report());
        if let Err(error) = started {
            mounted.unmount()?;
            return Err(error);
        }
        log::info!("{} is mounted on {}", self.spec.display(), mounted.dir().display());
        let result = start(session, signals).and_then(|events| self.watch(&mounted, &events));
        log::info!("{} is unmounted", mounted.dir().display());
        drop(self.hooks);
        // A request may still be at work: what it holds of a pool is to be released before the process ends.
        crate::source::thin::held::finish();
        drop(record);
        result
    }

    fn watch(&self, mounted: &Mounted, events: &Receiver<Event>) -> Result<()> {
        loop {
            match events.recv() {
                Ok(Event::Ended(Ok(()))) => return Ok(()),
                Ok(Event::Ended(Err(e))) => {
                    let error = Error::failed("the session broke").on(mounted.dir()).because(e);
                    return mounted.unmount().and(Err(error));
                }
                Ok(Event::Signal(Signal::SIGHUP)) => (self.hooks.drop_maps)(),
                Ok(Event::Signal(Signal::SIGUSR1)) => (self.hooks.log_counters)(),
                Ok(Event::Signal(Signal::SIGUSR2)) => logging::toggle_debug(),
                Ok(Event::Signal(signal)) => return end(signal, mounted, events),
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
        let uris = [self.spec.to_str(), self.options.nbd.as_deref()].into_iter().flatten();
        let mut uris = uris.filter_map(|text| Uri::parse(text).ok());
        uris.any(|uri| matches!(uri.transport(), Transport::Unix { .. }))
    }
}

/// Unmounts, and gives those who are still inside a moment.
fn end(signal: Signal, mounted: &Mounted, events: &Receiver<Event>) -> Result<()> {
    log::info!("{signal}: unmounting {}", mounted.dir().display());
    mounted.unmount()?;
    loop {
        match events.recv_timeout(GRACE) {
            Ok(Event::Signal(_)) => {}
            Ok(Event::Ended(_)) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                log::warn!("{}: files are still open, their readers get an error now", mounted.dir().display());
                return Ok(());
            }
        }
    }
}

/// Blocks the signals that we wait for, in this thread and in those that it will start.
fn block_signals() -> Result<SigSet> {
    let signals = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2]
        .into_iter()
        .collect::<SigSet>();
    signals.thread_block().map_err(|e| Error::new(ErrorKind::System, "cannot block signals").because(e))?;
    Ok(signals)
}

/// Starts the session, and a thread that waits for signals.
fn start<R>(session: R, signals: SigSet) -> Result<Receiver<Event>>
where
    R: FnOnce() -> io::Result<()> + Send + 'static,
{
    let (sender, events) = channel();
    let ended = sender.clone();
    // Nobody hears an event when the daemon is at its end.
    spawn("session", move || drop(ended.send(Event::Ended(session()))))?;
    spawn("signals", move || forward_signals(&signals, &sender))?;
    Ok(events)
}

fn forward_signals(signals: &SigSet, events: &Sender<Event>) {
    while let Ok(signal) = signals.wait() {
        if events.send(Event::Signal(signal)).is_err() {
            return;
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.map(drop).map_err(|e| Error::new(ErrorKind::System, "cannot start a thread").because(e))
}

fn create_record(mounted: &Mounted) -> Option<Record> {
    let directory = record::directory()?;
    Record::create(&directory, mounted.device())
        .inspect_err(|error| log::debug!("{}: no record of the daemon: {error}", directory.display()))
        .ok()
}
