//! The start of a mount, step by step, and its end.

use std::ffi::OsString;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use log::LevelFilter;
use nix::unistd::geteuid;

use crate::error::{Error, ErrorKind, Result, plain, shown};
use crate::fs::FileSystem;
use crate::fuse::BlkHoleFs;
use crate::mount::argv::MountRequest;
use crate::mount::daemon::{self, Forked, StartOutcome, StartReport, StartingDaemon};
use crate::mount::helper::error_text;
use crate::mount::logging;
use crate::mount::namespace::Namespace;
use crate::mount::options::{self, ParsedOptions, UnknownOptions};
use crate::mount::point::{MountPoint, MountPointKind, Mounted};
use crate::mount::record::{self, Description, MountRecord};
use crate::mount::signals::Signals;
use crate::mount::status::StatusSocket;
use crate::mount::{resources, serve, session};
use crate::output::say;
use crate::source::nbd::Uri;
use crate::source::thin::held;
use crate::spec::{Older, Spec, absolute};
use crate::sys::process::{self, Capability};

/// Makes a mount and has a daemon serve it; in the foreground, serves it until it is unmounted. `name` is the program's
/// name in messages. Returns the exit code.
///
/// # Errors
/// When the mount cannot be made or served. Nothing is left then: no mount, no record, no process.
pub fn run(name: &str, request: &MountRequest) -> Result<u8> {
    logging::start(name, if request.verbose { LevelFilter::Debug } else { LevelFilter::Warn });
    let options = parse_options(request)?;
    // All paths are made absolute first: entering another mount namespace changes the current directory.
    let spec = Spec::parse(&request.spec);
    let dir = absolute(&request.dir)?;
    if options.mount.nofail && is_missing(&spec) {
        log::debug!("{} does not exist, and with nofail that is no failure", shown(&request.spec));
        return Ok(0);
    }
    let spec = spec?;
    let point = MountPoint::find(&dir, Namespace::open(request.namespace.as_deref())?)?;
    for path in spec.path().into_iter().chain(options.source.thin_metadata.as_deref()) {
        point.keeps_visible(path)?;
    }
    let fs = open_file_system(&spec, &options, point.kind())?;
    if request.verbose {
        let action = if request.fake { "would mount" } else { "mounting" };
        say(format_args!("{name}: {action} {spec} on {}", shown(&dir)));
    }
    if request.fake {
        return Ok(0);
    }
    if request.foreground {
        serve_mount(&spec, &options, fs, point, &mut StartReport::foreground())?;
        return Ok(0);
    }
    match daemon::fork()? {
        Forked::Command(daemon) => wait_for(daemon, &point),
        Forked::Daemon(mut report) => {
            let left = daemon::leave_directory();
            let Err(error) = left.and_then(|()| serve_mount(&spec, &options, fs, point, &mut report)) else {
                return Ok(0);
            };
            report.failed(&error_text(name, &error), error.exit_code());
            Ok(error.exit_code())
        }
    }
}

/// Whether a SPEC leads to nothing: a path, or a tag that no device has.
fn is_missing(spec: &Result<Spec>) -> bool {
    match spec {
        Ok(spec) => spec.is_missing(),
        Err(error) => error.errno() == libc::ENOENT,
    }
}

/// Mounts, reports that the mount is served, and serves it until it is unmounted.
///
/// # Errors
/// When it cannot mount, and when the session breaks. The mount and the record are removed then.
fn serve_mount(
    spec: &Spec,
    options: &ParsedOptions,
    fs: Arc<FileSystem>,
    point: MountPoint,
    report: &mut StartReport,
) -> Result<()> {
    logging::raise_to_info();
    // Each open file takes some descriptors. When none is left, an open fails with EMFILE.
    if let Err(error) = process::raise_descriptor_limit() {
        log::debug!("cannot raise the limit of open files: {error}");
    }
    resources::check()?;
    let claim = point.claim()?;
    let signals = Signals::block(report.is_foreground())?;
    let filesystem = BlkHoleFs::new(fs.clone(), options.mount.direct_io);
    let (session, mounted) = session::mount(filesystem, spec.typed(), &claim, &options.mount)?;
    let record = create_record(description(spec, options, &mounted), &mounted);
    let status = record.as_ref().and_then(|_| create_status_socket(&mounted));
    // Privileges are dropped before the first thread starts, because each thread has capabilities of its own. An error in one
    // of these steps unmounts.
    let started = drop_privileges(&mounted, needs_override(spec, options))
        .and_then(|()| serve::start(session, signals))
        .inspect(|_| answer_status(status.as_ref(), &fs))
        .and_then(|events| report.serving().map(|()| events));
    let events = started.map_err(|error| mounted.unmount_after(error))?;
    drop(claim);
    // Releases the metadata snapshots that killed daemons left held, without waiting for it.
    held::recover_once(Duration::ZERO);
    log::info!("{} is mounted on {}", shown(spec.typed()), shown(mounted.dir()));
    let result = serve::until_unmounted(&fs, &mounted, &events);
    log::info!("{} is unmounted", shown(mounted.dir()));
    // From here on, another mount may have the device number that the record is named by.
    drop(status);
    drop(record);
    drop(fs);
    // A thread of the session may still read a pool's metadata snapshot, which is released before the process ends.
    held::finish();
    result
}

/// Waits until the daemon serves the mount or has failed. Returns the exit code.
fn wait_for(daemon: StartingDaemon, point: &MountPoint) -> Result<u8> {
    match daemon.wait()? {
        StartOutcome::Serving => Ok(0),
        StartOutcome::Failed { text, exit_code } => {
            say(text);
            Ok(exit_code)
        }
        StartOutcome::Died(error) => Err(match point.remove_dead_mount() {
            Ok(()) => error,
            Err(left) => error.hint(format!("its mount is still there: {left}")),
        }),
    }
}

/// Parses the options, and logs the warnings about them.
fn parse_options(request: &MountRequest) -> Result<ParsedOptions> {
    let unknown = if request.sloppy { UnknownOptions::Warn } else { UnknownOptions::Refuse };
    let options = options::parse(&request.options, unknown, request.first_rw)?;
    for warning in &options.warnings {
        log::warn!("{warning}");
    }
    if !geteuid().is_root() && (options.mount.uid.is_some() || options.mount.gid.is_some()) {
        return Err(Error::usage("only root can give the files to another user: uid= and gid= are for root"));
    }
    Ok(options)
}

/// Opens what the SPEC names, to find out whether it can be shown. Starts no thread, because the daemon is forked after
/// this.
///
/// # Errors
/// When it cannot be shown, when it is more than one file and the mountpoint is a regular file, and for a name that is too long.
fn open_file_system(spec: &Spec, options: &ParsedOptions, kind: MountPointKind) -> Result<Arc<FileSystem>> {
    let mut fs = FileSystem::new(spec, &options.source, options.mount.ownership(), options.mount.limits)?;
    if kind == MountPointKind::File {
        if options.source.name.is_some() {
            let why = "option 'name' is not possible: the mountpoint is a file, and its name is that of the device";
            return Err(Error::usage(why).hint("mount on a directory, or leave the option out"));
        }
        fs.show_as_file()?;
    } else {
        fs.check_names()?;
    }
    if let Some(directory) = record::directory() {
        fs.share_times_in(&directory);
    }
    Ok(Arc::new(fs))
}

/// Creates the record of the daemon. A mount without one is served all the same; a user without a session has no
/// directory for it.
fn create_record(description: Description, mounted: &Mounted) -> Option<MountRecord> {
    let directory = record::directory()?;
    MountRecord::create(&directory, mounted.device(), description)
        .inspect_err(|e| log::warn!("{}: no record, umount will not wait: {}", directory.display(), plain(e)))
        .ok()
}

/// What the record contains about the mount.
fn description(spec: &Spec, options: &ParsedOptions, mounted: &Mounted) -> Description {
    let (mount, source) = (&options.mount, &options.source);
    let mut words = OsString::from(if mount.is_writable() { "rw" } else { "ro" });
    let flags = [
        ("allow_other", mount.allow_other),
        ("direct_io", mount.direct_io),
        ("static", source.is_static),
        ("compact", source.views.compact),
        ("used", source.views.used),
    ];
    for (word, _) in flags.into_iter().filter(|(_, is_set)| *is_set) {
        words.push(format!(",{word}"));
    }
    let values = [
        ("since", source.views.since.as_ref().map(Older::typed)),
        ("thin_metadata", source.thin_metadata.clone().map(OsString::from)),
        ("nbd", source.nbd.as_ref().map(|uri| uri.to_string().into())),
    ];
    for (word, value) in values {
        if let Some(value) = value {
            words.push(format!(",{word}="));
            words.push(value);
        }
    }
    Description { spec: spec.typed().to_owned(), directory: mounted.dir().to_owned(), options: words }
}

/// Creates the socket for `blkholefs status`, while the daemon has all its privileges. A mount without one is served all the same.
fn create_status_socket(mounted: &Mounted) -> Option<StatusSocket> {
    let directory = record::directory()?;
    StatusSocket::new(&directory, mounted.device())
        .inspect_err(|e| log::info!("{}: no socket for the status: {}", directory.display(), plain(e)))
        .ok()
}

/// Starts the thread that answers `blkholefs status`.
fn answer_status(socket: Option<&StatusSocket>, fs: &Arc<FileSystem>) {
    if let Some(Err(error)) = socket.map(|socket| socket.answer(fs)) {
        log::info!("cannot start the thread for the status: {}", plain(&error));
    }
}

/// Whether the daemon may have to open what belongs to other users for writing: the Unix socket of an NBD server, or an image.
fn needs_override(spec: &Spec, options: &ParsedOptions) -> bool {
    options.mount.is_writable() || spec.nbd_uri().into_iter().chain(&options.source.nbd).any(Uri::has_unix_socket)
}

/// Drops the capabilities that serving does not need. A daemon of root keeps CAP_SYS_ADMIN (umount(2), device-mapper) and
/// CAP_DAC_READ_SEARCH (images of other users), CAP_SYS_CHROOT for a mount in another namespace (setns(2)), and
/// CAP_DAC_OVERRIDE for what belongs to other users and is opened for writing (images, and the Unix sockets of NBD servers). The
/// daemon of another user has none, and must be able to run the setuid program fusermount3 for the unmount.
fn drop_privileges(mounted: &Mounted, needs_override: bool) -> Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let mut keep = vec![Capability::SYS_ADMIN, Capability::DAC_READ_SEARCH];
    if mounted.is_elsewhere() {
        keep.push(Capability::SYS_CHROOT);
    }
    if needs_override {
        keep.push(Capability::DAC_OVERRIDE);
    }
    nix::sys::prctl::set_no_new_privs()
        .map_err(io::Error::from)
        .and_then(|()| process::keep_capabilities(&keep))
        .map_err(|e| Error::new(ErrorKind::System, "cannot drop privileges").because(e))
}
