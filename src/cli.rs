//! The commands `blkholefs map`, `info`, `verify`, `status` and `demo`. The module [`crate::mount`] has `mount` and `umount`.

mod arguments;
mod demo;
mod devices;
mod help;
mod info;
mod map;
mod status;
mod svg_file;
mod terminal;
mod verify;

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use crate::error::{Error, Result, shown};
use crate::mount::argv::CommandLine;
use crate::mount::words;
use crate::output::{print, say};
use help::HELP;

/// Printed by `--version`.
const VERSION: &str = concat!("blkholefs ", env!("CARGO_PKG_VERSION"), "\n");

/// The commands that [`main`] runs.
const COMMANDS: [&str; 6] = ["map", "info", "verify", "status", "demo", "help"];

/// Whether [`main`] has a command with this name.
pub fn is_command(word: &str) -> bool {
    COMMANDS.contains(&word)
}

/// Runs `map`, `info`, `verify`, `status`, `demo`, `--help` or `--version`, from the words after the program's name.
pub fn main(words: &[OsString]) -> ExitCode {
    run(words).unwrap_or_else(|error| report_error(&error))
}

/// Runs a command. Those that have several devices report the error of each, and return the worst exit code.
fn run(words: &[OsString]) -> Result<ExitCode> {
    let hinted = |error: Error| error.hint("see blkholefs --help");
    let Some((command, arguments)) = words.split_first() else {
        return Err(hinted(Error::usage("a command is missing")));
    };
    let is_only = |names: [&str; 2]| matches!(arguments, [word] if names.iter().any(|name| word == name));
    let result = match command.to_str() {
        Some("map") => return map::run(arguments),
        Some("info") => return info::run(arguments),
        Some("verify") => verify::run(arguments),
        Some("status" | "demo") if is_only(["-V", "--version"]) => print(VERSION),
        Some("status") => status::run(arguments),
        Some("demo") if is_only(["-h", "--help"]) => print(HELP),
        Some("demo") => alone(command, arguments).and_then(|()| demo::run()),
        Some("-h" | "--help" | "help") => alone(command, arguments).and_then(|()| print(HELP)),
        Some("-V" | "--version") => alone(command, arguments).and_then(|()| print(VERSION)),
        _ => Err(unknown(command)),
    };
    result.map(|()| ExitCode::SUCCESS)
}

/// The error for a first word that is neither a command nor an option.
fn unknown(word: &OsStr) -> Error {
    let what = if word.as_encoded_bytes().starts_with(b"-") { "option" } else { "command" };
    let error = Error::usage(format!("there is no {what} '{}'", shown(word)));
    let known = COMMANDS.into_iter().chain(["mount", "umount", "--help", "--version"]);
    match word.to_str().map(|word| words::near_in(word, known)).as_deref() {
        Some([nearest, ..]) => error.hint(format!("did you mean {nearest}? see blkholefs --help")),
        _ => error.hint("see blkholefs --help"),
    }
}

/// Refuses arguments of a command that has none.
fn alone(command: &OsStr, arguments: &[OsString]) -> Result<()> {
    let Some(first) = arguments.first() else { return Ok(()) };
    let (command, first) = (shown(command), shown(first));
    Err(Error::usage(format!("{command}: unexpected argument '{first}'")).hint("see blkholefs --help"))
}

/// Prints an error on one line and its hint, if any, on the next. Returns its exit code.
fn report_error(error: &Error) -> ExitCode {
    say(format_args!("blkholefs: {error}"));
    if let Some(hint) = error.hint_text() {
        say(hint);
    }
    ExitCode::from(error.exit_code())
}

/// Prints the help text or the version, which a command line asked for instead of the command.
fn print_about<T>(asked: &CommandLine<T>) -> Result<()> {
    print(if matches!(asked, CommandLine::Version) { VERSION } else { HELP })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_command_has_a_hint() {
        for (word, message, hint) in [
            ("mout", "there is no command 'mout'", "did you mean mount? see blkholefs --help"),
            ("unmount", "there is no command 'unmount'", "did you mean umount? see blkholefs --help"),
            ("statu", "there is no command 'statu'", "did you mean status? see blkholefs --help"),
            ("--versio", "there is no option '--versio'", "did you mean --version? see blkholefs --help"),
            ("-v", "there is no option '-v'", "see blkholefs --help"),
            ("frob", "there is no command 'frob'", "see blkholefs --help"),
        ] {
            let error = run(&[word.into()]).unwrap_err();
            assert_eq!((error.to_string().as_str(), error.hint_text()), (message, Some(hint)));
            assert_eq!(error.exit_code(), 1);
        }
    }

    /// Words that begin with another one are those of mount.fuse3 ([`crate::mount::argv::mount_fuse`]).
    #[test]
    fn every_command_of_the_help_text_is_known() {
        let commands = HELP.split("\nCommands:\n").nth(1).and_then(|rest| rest.split("\n\n").next()).unwrap();
        let commands: Vec<_> = commands.lines().filter_map(|line| line.split_whitespace().next()).collect();
        assert!(commands.contains(&"map"), "{commands:?}");
        for command in commands {
            assert!(is_command(command) || matches!(command, "mount" | "umount"), "{command}");
        }
    }
}
