//! `blkholefs verify`: reads the holes of a device and compares them with zeros, or compares a copy with the device.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::sync::Arc;

use super::arguments::{open, parse};
use super::print_about;
use crate::error::{Error, Result, shown};
use crate::handle::Handle;
use crate::mount::argv::CommandLine;
use crate::output::print;
use crate::source::Context;
use crate::spec::Spec;
use crate::units::Bytes;
use crate::verify::{self, CopyReport, Findings, HolesReport, Progress, Ranges, SAMPLE};

/// The number of ranges of one kind that are printed. Of further ones the bytes are printed.
const LISTED: usize = 10;

/// Verifies the holes of a device, or a copy of it.
///
/// # Errors
/// When something does not agree or cannot be read.
pub fn run(arguments: &[OsString]) -> Result<()> {
    let arguments = match parse(arguments, "verify")? {
        CommandLine::Run(arguments) => arguments,
        asked => return print_about(&asked),
    };
    let [device] = arguments.devices.as_slice() else { return Err(Error::usage("verify: one device at a time")) };
    let handle = arguments.handle(device)?;
    let name = shown(handle.export().name()).to_string();
    let progress = Progress::shown(format!("blkholefs: {name}"));
    let options = &arguments.verify;
    let (text, agrees) = match (&options.against, options.sample) {
        (Some(copy), _) => {
            let found = with(&progress, || verify::copy(&handle, &opened(copy)?, &progress))?;
            (text_of_copy(&name, copy, &found), found.agrees())
        }
        (None, Some(count)) => {
            let seed = options.seed.unwrap_or_else(verify::random_seed);
            print(&format!("seed {seed}\n"))?;
            let found = with(&progress, || verify::sample(&handle, count, seed, &progress))?;
            (text_of_holes(&name, &handle, &found), found.findings.is_empty())
        }
        (None, None) => {
            let found = with(&progress, || verify::holes(&handle, &progress))?;
            (text_of_holes(&name, &handle, &found), found.findings.is_empty())
        }
    };
    // What was found counts also if it cannot be printed.
    let printed = print(&text);
    if agrees { printed } else { Err(Error::failed("verification failed").on(handle.export().name())) }
}

/// Opens the copy.
fn opened(copy: &OsStr) -> Result<Handle> {
    let export = open(&Spec::parse(copy)?)?;
    Ok(Handle::new(export, Arc::new(Context::default()), Arc::default()))
}

/// The result of `work`, after which the bar is removed.
fn with<T>(progress: &Progress, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let result = work();
    progress.end();
    result
}

fn text_of_holes(name: &str, handle: &Handle, found: &HolesReport) -> String {
    let mut text = String::new();
    list_findings(&mut text, &found.findings);
    let _ = write!(text, "{name}: ");
    if found.holes == 0 && found.findings.is_empty() {
        let reason = handle.dense_because().map(|reason| format!(": {reason}")).unwrap_or_default();
        let _ = writeln!(text, "no holes: nothing to verify{reason}");
        return text;
    }
    let _ = write!(text, "{} in {}: ", bytes(found.bytes), counted(found.holes, "hole"));
    if found.chosen > 0 {
        let pieces = counted(found.chosen, "piece");
        let _ = write!(text, "{pieces} of {SAMPLE} bytes at random, ");
    }
    let _ = writeln!(text, "{} read, {}", bytes(found.read), verdict(&found.findings, "all zero"));
    text
}

fn text_of_copy(name: &str, copy: &OsStr, found: &CopyReport) -> String {
    let mut text = String::new();
    list_findings(&mut text, &found.device);
    list_findings(&mut text, &found.copy);
    let counts = &found.counts;
    let _ = writeln!(
        text,
        "hole in both: {}; hole in the device only: {}; hole in the copy only: {}; data in both: {}",
        counts.holes, counts.only_device, counts.only_copy, counts.data
    );
    let _ = write!(text, "{name}: {}: ", shown(copy));
    if found.device_len != found.copy_len {
        let _ = write!(text, "{} long, and the device {}; ", bytes(found.copy_len), bytes(found.device_len));
    }
    let both = [(&found.device, ""), (&found.copy, " (of the copy)")];
    let verdicts: Vec<_> =
        both.into_iter().filter(|it| !it.0.is_empty()).map(|(findings, of)| format!("{findings}{of}")).collect();
    let compared = found.device_len.min(found.copy_len);
    let _ = match verdicts.is_empty() {
        true => writeln!(text, "{} are the same", bytes(compared)),
        false => writeln!(text, "{}", verdicts.join("; ")),
    };
    text
}

/// The findings in a few words, or `agreed`.
fn verdict(findings: &Findings, agreed: &str) -> String {
    if findings.is_empty() { agreed.to_owned() } else { findings.to_string() }
}

/// One line for each of the first findings.
fn list_findings(text: &mut String, findings: &Findings) {
    list(text, "different", &findings.different);
    list(text, "not zero in a hole", &findings.wrong);
    list(text, "not zero in a hole, or written at that moment", &findings.undecided);
    for error in &findings.errors {
        let _ = writeln!(text, "{error}");
    }
}

fn list(text: &mut String, what: &str, ranges: &Ranges) {
    let mut listed = Bytes::ZERO;
    for range in ranges.iter().take(LISTED) {
        let length = range.end.saturating_sub(range.start);
        listed = listed.saturating_add(length);
        let _ = writeln!(text, "{what}: {} at {}", bytes(length), range.start);
    }
    let rest = ranges.bytes().saturating_sub(listed);
    if rest > Bytes::ZERO {
        let _ = writeln!(text, "{what}: {} more", bytes(rest));
    }
}

fn bytes(bytes: Bytes) -> String {
    counted(bytes.get(), "byte")
}

fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use crate::cli::HELP;

    #[test]
    fn the_help_text_and_the_man_page_have_every_option() {
        let page = include_str!("../../mount-helpers/man/blkholefs.8");
        for option in ["sample", "seed", "against"] {
            assert!(HELP.contains(&format!("\n  --{option} ")), "{option}");
            assert!(page.contains(&format!("\n.BI \\-\\-{option} \" ")), "{option}");
        }
    }
}
