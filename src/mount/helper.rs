//! `mount.blkholefs`, which mount(8) runs, and `blkholefs mount`.

use std::ffi::OsString;
use std::process::ExitCode;

use nix::unistd::{getegid, geteuid, getgid, getuid};

use crate::error::{Error, Result};
use crate::mount::argv::{self, CommandLine, MountRequest};
use crate::mount::logging::one_line;
use crate::mount::options::FirstRw;
use crate::mount::start;
use crate::output;
use crate::sys::process::{self, Parent};

const HELPER_USAGE: &str = "\
Usage: mount.blkholefs SPEC DIR [-sfnvhV] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]

Shows the block device SPEC (or a directory of devices, an image, an NBD URI)
as a regular file in DIR whose holes are real. See mount.blkholefs(8).

  -f  do everything but mount         -s  warn about unknown options
  -n  ignored, for mount(8)           -v  print what is done
  -N  mount in this mount namespace   -o  options, between commas";

const COMMAND_USAGE: &str = "\
Usage: blkholefs mount [-fv] [-o OPTIONS] SPEC DIR

Shows the block device SPEC (or a directory of devices, an image, an NBD URI)
as a regular file in DIR whose holes are real. See blkholefs(8).

  -f, --foreground       serve in this process, and log to its standard error
  -o, --options OPTIONS  options, between commas; mount.blkholefs(8) lists them
  -v, --verbose          print what is done";

/// Runs `mount.blkholefs` with the words after its name. The program must not have opened anything before.
pub fn main(name: &str, args: &[OsString]) -> ExitCode {
    process::close_inherited_descriptors();
    finish(name, HELPER_USAGE, argv::mount_helper(args), |request| {
        let first_rw = match process::parent() {
            Parent::Mount => FirstRw::IsImplied,
            Parent::MayBeMount => FirstRw::IsUnclear,
            Parent::Other => FirstRw::IsWanted,
        };
        start::run(name, &MountRequest { first_rw, ..request })
    })
}

/// Runs `blkholefs mount` with the words after that. The program must not have opened anything before.
pub fn command(args: &[OsString]) -> ExitCode {
    process::close_inherited_descriptors();
    finish("blkholefs", COMMAND_USAGE, argv::mount_command(args), |request| start::run("blkholefs", &request))
}

/// Mounts what mount.fuse3(8) runs this program for ([`argv::mount_fuse`]). The program must not have opened anything before.
///
/// The shell between mount(8) and this process hides who put `rw` first, which mount(8) does for each mount that is not `ro`.
pub fn fuse(request: MountRequest) -> ExitCode {
    process::close_inherited_descriptors();
    let request = MountRequest { first_rw: FirstRw::IsImplied, ..request };
    finish("blkholefs", COMMAND_USAGE, Ok(CommandLine::Run(request)), |request| {
        if request.dir.starts_with("/dev/fd") {
            let why = "the daemon needs its privileges, to unmount and to ask device-mapper";
            return Err(Error::usage(format!("option 'drop_privileges' of mount.fuse3 is not possible: {why}")));
        }
        start::run("blkholefs", &request)
    })
}

/// Runs a command line, or prints its help or version. Returns the exit code. An error is one line on standard error, and
/// its hint, if any, a second line.
pub(super) fn finish<T>(
    name: &str,
    usage: &str,
    command_line: Result<CommandLine<T>>,
    run: impl FnOnce(T) -> Result<u8>,
) -> ExitCode {
    let result = match command_line {
        Ok(CommandLine::Help) => output::print(&format!("{usage}\n")).map(|()| 0),
        Ok(CommandLine::Version) => output::print(&format!("{name} {}\n", env!("CARGO_PKG_VERSION"))).map(|()| 0),
        Ok(CommandLine::Run(request)) => refuse_setuid().and_then(|()| run(request)),
        Err(error) => Err(error.hint(usage.lines().next().unwrap_or_default())),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::say(error_text(name, &error));
            ExitCode::from(error.exit_code())
        }
    }
}

/// The text of an error on standard error and in the log.
pub(super) fn error_text(name: &str, error: &Error) -> String {
    let hint = error.hint_text().map(|hint| format!("\n{}", one_line(hint))).unwrap_or_default();
    format!("{name}: {}{hint}", one_line(&error.to_string()))
}

/// Refuses to run with the rights of another user than the caller: the environment and the command line are the caller's.
fn refuse_setuid() -> Result<()> {
    if getuid() == geteuid() && getgid() == getegid() {
        return Ok(());
    }
    Err(Error::usage("must not be installed setuid or setgid; users mount through fusermount3"))
}
