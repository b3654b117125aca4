//! The commands `blkholefs map`, `info`, `verify` and `demo`. The module [`crate::mount`] has `mount` and `umount`.

mod arguments;
mod demo;
mod devices;
mod help;
mod info;
mod map;
mod svg_file;
mod terminal;
mod verify;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use crate::error::{Error, Result};
use crate::mount::argv::CommandLine;
use help::HELP;

/// Printed by `--version`.
const VERSION: &str = concat!("blkholefs ", env!("CARGO_PKG_VERSION"), "\n");

/// Runs `map`, `info`, `verify`, `demo`, `--help` or `--version`, from the words after the program's name.
pub fn main(words: &[OsString]) -> ExitCode {
    let (command, arguments) = words.split_first().map_or((None, words), |(first, rest)| (first.to_str(), rest));
    let result = match command {
        // These two report the error of each device, and end with the worst exit code.
        Some("map") => return map::run(arguments).unwrap_or_else(|error| report_error(&error)),
        Some("info") => return info::run(arguments).unwrap_or_else(|error| report_error(&error)),
        Some("verify") => verify::run(arguments),
        Some("demo") => demo::run(),
        Some("-h" | "--help" | "help") => print(HELP),
        Some("-V" | "--version") => print(VERSION),
        Some(other) => Err(Error::usage(format!("there is no command {other:?}")).hint("see blkholefs --help")),
        None => Err(Error::usage("a command is missing").hint("see blkholefs --help")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report_error(&error),
    }
}

/// Prints an error on one line and its hint, if any, on the next. Returns its exit code.
fn report_error(error: &Error) -> ExitCode {
    eprintln!("blkholefs: {error}");
    if let Some(hint) = error.hint_text() {
        eprintln!("{hint}");
    }
    ExitCode::from(error.exit_code())
}

/// Prints the help text or the version, which a command line asked for instead of the command.
fn print_about<T>(asked: &CommandLine<T>) -> Result<()> {
    print(if matches!(asked, CommandLine::Version) { VERSION } else { HELP })
}

fn print(text: &str) -> Result<()> {
    written(io::stdout().write_all(text.as_bytes()))
}

/// Turns a failed write into an error. A pipe whose reader has exited, as `head` does, is no error.
fn written(result: io::Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::failed("cannot write the output").because(error))
        }
        _ => Ok(()),
    }
}
