//! `mount.blkholefs`, which mount(8) runs, and `blkholefs mount`.

use std::ffi::OsString;
use std::process::ExitCode;

use log::LevelFilter;
use nix::unistd::{getegid, geteuid, getgid, getuid};

use crate::error::{Error, Result};
use crate::mount::argv::{self, CommandLine, MountRequest};
use crate::mount::daemon::{self, Ready};
use crate::mount::filesystem;
use crate::mount::logging::{self, one_line};
use crate::mount::namespace::Namespace;
use crate::mount::options::{self, ParsedOptions, UnknownOptions};
use crate::mount::point::MountPoint;
use crate::mount::serve::Service;
use crate::mount::session;
use crate::spec::{Spec, absolute};
use crate::sys::process;

const HELPER_USAGE: &str = "\
Usage: mount.blkholefs SPEC DIR [-sfnvhV] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]

Shows the block device SPEC (or a directory of devices, an image, an NBD URI) as a
regular file in DIR whose holes are real. See mount.blkholefs(8).

  -f  do everything but mount         -s  tolerate unknown options
  -n  nothing, for mount(8)           -v  say what is done
  -N  mount in this mount namespace   -o  options, between commas";

const COMMAND_USAGE: &str = "\
Usage: blkholefs mount [-fv] [-o OPTIONS] SPEC DIR

Shows the block device SPEC (or a directory of devices, an image, an NBD URI) as a
regular file in DIR whose holes are real. See blkholefs(8).

  -f, --foreground       serve in this process, and log to its standard error
  -o, --options OPTIONS  options, between commas; mount.blkholefs(8) lists them
  -v, --verbose          say what is done";

/// Runs `mount.blkholefs` with the words after its name. Nothing may have been opened yet.
pub fn main(name: &str, args: &[OsString]) -> ExitCode {
    process::close_inherited_descriptors();
    finish(name, HELPER_USAGE, argv::mount_helper(args), run)
}

/// Runs `blkholefs mount` with the words after that. Nothing may have been opened yet.
pub fn command(args: &[OsString]) -> ExitCode {
    process::close_inherited_descriptors();
    finish("blkholefs", COMMAND_USAGE, argv::mount_command(args), run)
}

/// Does what a command line asks for, and turns its end into an exit code: one line on standard error, and a second one
/// if there is a hint.
pub(super) fn finish<T>(
    name: &str,
    usage: &str,
    command: Result<CommandLine<T>>,
    run: impl FnOnce(&str, T) -> Result<u8>,
) -> ExitCode {
    let result = match command {
        Ok(CommandLine::Help) => {
            println!("{usage}");
            Ok(0)
        }
        Ok(CommandLine::Version) => {
            println!("{name} {}", env!("CARGO_PKG_VERSION"));
            Ok(0)
        }
        Ok(CommandLine::Run(request)) => refuse_setuid().and_then(|()| run(name, request)),
        Err(error) => Err(error.hint(usage.lines().next().unwrap_or_default())),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{}", complaint(name, &error));
            ExitCode::from(error.exit_code())
        }
    }
}

/// The text of an error as the user sees it.
fn complaint(name: &str, error: &Error) -> String {
    let hint = error.hint_text().map(|hint| format!("\n{}", one_line(hint))).unwrap_or_default();
    format!("{name}: {}{hint}", one_line(&error.to_string()))
}

/// A program that trusts its environment and its words must not run for somebody else.
fn refuse_setuid() -> Result<()> {
    if getuid() == geteuid() && getgid() == getegid() {
        return Ok(());
    }
    Err(Error::usage("must not be installed setuid or setgid; users mount through fusermount3"))
}

fn run(name: &str, request: MountRequest) -> Result<u8> {
    logging::start(name, if request.verbose { LevelFilter::Debug } else { LevelFilter::Warn });
    let options = parse_options(&request)?;
    // All paths are made absolute first: entering another mount namespace changes the current directory.
    let spec = Spec::parse(&request.spec)?;
    let dir = absolute(&request.dir)?;
    if options.mount.nofail && spec.is_missing() {
        log::debug!("{spec} does not exist, and with nofail that is no failure");
        return Ok(0);
    }
    let point = MountPoint::find(&dir, Namespace::open(request.namespace.as_deref())?)?;
    let mut paths = spec.path().into_iter().chain(options.source.thin_metadata.as_deref());
    paths.try_for_each(|path| point.leaves(path))?;
    let opened = filesystem::open(&spec, point.shape(), &options)?;
    if request.verbose {
        let does = if request.fake { "would mount" } else { "mounting" };
        eprintln!("{name}: {does} {} on {}", one_line(&spec.to_string()), one_line(&dir.to_string_lossy()));
    }
    if request.fake {
        return Ok(0);
    }
    let place = point.clone();
    let service = Service { spec: &spec, options: &options, hooks: opened.hooks };
    let serve = |ready: &mut Ready| {
        logging::serve();
        service.run(point, ready, |spec, claim, options| {
            let (session, mounted) = session::mount(opened.filesystem, spec.typed(), claim, options)?;
            Ok((move || session.run(), mounted))
        })
    };
    if request.foreground {
        serve(&mut Ready::foreground())?;
        return Ok(0);
    }
    daemon::background(|error| complaint(name, error), serve, || place.remove_dead_mount())
}

fn parse_options(request: &MountRequest) -> Result<ParsedOptions> {
    let unknown = if request.sloppy { UnknownOptions::Warn } else { UnknownOptions::Refuse };
    let options = options::parse(&request.options, unknown)?;
    for warning in &options.warnings {
        log::warn!("{warning}");
    }
    if !geteuid().is_root() && (options.mount.uid.is_some() || options.mount.gid.is_some()) {
        return Err(Error::usage("only root can give the files to another user: uid= and gid= are for root"));
    }
    Ok(options)
}
