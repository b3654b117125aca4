//! `blkholefs status`: prints the mounts of this machine, and how their daemons do.

use std::ffi::OsString;

use lexopt::prelude::{Long, Short, Value};

use super::{HELP, report_error};
use crate::error::{Error, Result};
use crate::mount::argv::CommandLine;
use crate::mount::status::{self, Mounts};
use crate::output::print;
use crate::report;

/// The command line of `status`.
#[derive(Default)]
struct Arguments {
    is_json: bool,
    /// The directories of the mounts; all mounts where there are none.
    directories: Vec<OsString>,
}

/// Prints the mounts.
///
/// # Errors
/// When the mounts cannot be listed. A usage error, after the others were printed, where a directory is no mount.
pub fn run(arguments: &[OsString]) -> Result<()> {
    let CommandLine::Run(arguments) = parse(arguments)? else { return print(HELP) };
    let Mounts { found, mut missing } = status::list(&arguments.directories)?;
    if !found.is_empty() || missing.is_empty() || arguments.is_json {
        print(&if arguments.is_json { report::status_json(&found) } else { report::status(&found) })?;
    }
    let Some(last) = missing.pop() else { return Ok(()) };
    for error in &missing {
        report_error(error);
    }
    Err(last)
}

fn parse(arguments: &[OsString]) -> Result<CommandLine<Arguments>> {
    let wrong = |error: lexopt::Error| Error::usage(error.to_string()).hint("see blkholefs --help");
    let mut parsed = Arguments::default();
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(argument) = parser.next().map_err(wrong)? {
        match argument {
            Long("json") => parsed.is_json = true,
            Short('h') | Long("help") => return Ok(CommandLine::Help),
            Value(directory) => parsed.directories.push(directory),
            other => return Err(wrong(other.unexpected())),
        }
    }
    Ok(CommandLine::Run(parsed))
}
