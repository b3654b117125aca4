//! The program: its name and its first word choose what it does.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use crate::cli;
use crate::mount::{argv, helper, logging, umount};
use crate::source::thin::keeper;
use crate::sys::process;

/// The exit code for an internal error (mount(8)).
const INTERNAL: u8 = 4;

/// Runs the program with the words of its command line, its own name first. Returns the exit code.
pub fn run(args: &[OsString]) -> ExitCode {
    let name = args.first().and_then(|path| Path::new(path).file_name()).and_then(OsStr::to_str).unwrap_or("blkholefs");
    let words = args.get(1..).unwrap_or_default();
    std::panic::catch_unwind(|| dispatch(name, words)).unwrap_or(ExitCode::from(INTERNAL))
}

/// Runs the command that the name of the program, or else the first word, stands for.
fn dispatch(name: &str, words: &[OsString]) -> ExitCode {
    // Below `mount -t fuse` the first word is a SPEC, also where it is that of a command, or where the program was named as
    // `mount.blkholefs#`.
    if let Some(request) = argv::mount_fuse(words).filter(|_| process::is_in_shell_of_mount()) {
        return helper::fuse(request);
    }
    match (name, words.first().and_then(|word| word.to_str())) {
        ("mount.blkholefs" | "mount.fuse.blkholefs", _) => helper::main(name, words),
        ("umount.blkholefs" | "umount.fuse.blkholefs", _) => umount::main(name, words),
        (_, Some("mount")) => helper::command(&words[1..]),
        (_, Some("umount")) => umount::command(&words[1..]),
        // This program starts itself with this command.
        (_, Some(keeper::COMMAND)) => {
            process::close_inherited_descriptors();
            logging::start_helper("blkholefs");
            keep(&words[1..])
        }
        (_, Some(word)) if cli::is_command(word) => cli::main(words),
        _ => match argv::mount_fuse(words) {
            Some(request) => helper::fuse(request),
            None => cli::main(words),
        },
    }
}

fn keep(words: &[OsString]) -> ExitCode {
    match keeper::main(words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}
