//! The output of a command for one device or for several.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use super::report_error;
use crate::error::{Error, Result, shown};
use crate::output::{Stdout, written};
use crate::report::quoted;

/// Why the output for a device ended early.
pub enum Failure {
    /// The device cannot be opened or read. The next one is tried.
    Device(Error),
    /// Nothing more can be printed.
    Output(io::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Device(error)
    }
}

impl From<io::Error> for Failure {
    /// An error of the extents passes through the functions that print them.
    fn from(error: io::Error) -> Self {
        match error.downcast::<Error>() {
            Ok(of_device) => Self::Device(of_device),
            Err(of_output) => Self::Output(of_output),
        }
    }
}

/// What divides the outputs of several devices.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Division {
    /// A line with the name of the device before each output, as head(1) prints it.
    Headers,
    /// An empty line between outputs that have the name of the device themselves.
    Lines,
    /// Each output is the fields of an object in a JSON array, beside the field `device`.
    Json,
}

/// The standard output, while a command prints what it knows of its devices.
pub struct Output<'a> {
    out: &'a mut dyn Write,
    /// `None` for one device, whose output stands alone.
    division: Option<Division>,
    /// Whether the output of any device was begun.
    is_first: bool,
    /// Whether an object was begun and has no end yet.
    is_within: bool,
}

impl<'a> Output<'a> {
    /// An output to which nothing was printed. Without a division it is for one device.
    pub fn new(out: &'a mut dyn Write, division: Option<Division>) -> Self {
        Self { out, division, is_first: true, is_within: false }
    }

    /// Whether the fields of an object are to be printed, and not a whole document.
    pub fn is_list(&self) -> bool {
        self.division == Some(Division::Json)
    }

    /// Begins the output of a device, which is open.
    ///
    /// # Errors
    /// As write(2).
    pub fn begin(&mut self, device: &OsStr) -> io::Result<&mut dyn Write> {
        let (name, is_first) = (shown(device).to_string(), std::mem::take(&mut self.is_first));
        let gap = if is_first { "" } else { "\n" };
        match self.division {
            None => {}
            Some(Division::Headers) => writeln!(self.out, "{gap}==> {name} <==")?,
            Some(Division::Lines) => write!(self.out, "{gap}")?,
            Some(Division::Json) => {
                let before = if is_first { "[" } else { ",\n" };
                write!(self.out, "{before}{{ \"device\": {}, ", quoted(&name))?;
                self.is_within = true;
            }
        }
        Ok(self.out)
    }

    /// Ends the output of a device, with the error that it ended with.
    ///
    /// # Errors
    /// As write(2).
    pub fn end(&mut self, device: &OsStr, error: Option<&Error>) -> io::Result<()> {
        if self.is_list() {
            if let Some(error) = error {
                let comma = if self.is_within { ", " } else { "" };
                if !self.is_within {
                    self.begin(device)?;
                }
                write!(self.out, "{comma}\"error\": {}", quoted(&error.to_string()))?;
            }
            write!(self.out, "}}")?;
            self.is_within = false;
        }
        self.out.flush()
    }
}

/// Prints something for each device. An error of a device is reported, and the next one follows. Returns the exit code of the
/// worst error: the largest one.
///
/// # Errors
/// When the output cannot be written.
pub fn each(
    devices: &[OsString],
    division: Division,
    mut print: impl FnMut(&OsStr, &mut Output<'_>) -> std::result::Result<(), Failure>,
) -> Result<ExitCode> {
    let mut out = BufWriter::new(Stdout);
    let division = (devices.len() > 1).then_some(division);
    let mut output = Output::new(&mut out, division);
    let mut worst = 0;
    let mut printed = || {
        for device in devices {
            match print(device, &mut output) {
                Ok(()) => output.end(device, None)?,
                Err(Failure::Output(error)) => return Err(error),
                Err(Failure::Device(error)) => {
                    output.end(device, Some(&error))?;
                    report_error(&error);
                    worst = worst.max(error.exit_code());
                }
            }
        }
        if output.is_list() {
            writeln!(output.out, "]")?;
        }
        output.out.flush()
    };
    written(printed())?;
    Ok(ExitCode::from(worst))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The output for devices, each with what is printed and whether it fails before or after that.
    fn printed(division: Option<Division>, devices: &[(&str, &str, bool)]) -> String {
        let mut out = Vec::new();
        let mut output = Output::new(&mut out, division);
        for (device, text, fails) in devices {
            let device = OsStr::new(device);
            if !text.is_empty() {
                write!(output.begin(device).unwrap(), "{text}").unwrap();
            }
            let error = Error::failed("cannot \"read\"").on(device);
            output.end(device, fails.then_some(&error)).unwrap();
        }
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn one_device_stands_alone() {
        assert_eq!(printed(None, &[("a", "text\n", false)]), "text\n");
        assert_eq!(printed(None, &[("a", "", true)]), "");
    }

    #[test]
    fn headers_are_before_devices_that_are_open() {
        let devices = [("a", "", true), ("b\n", "1\n", false), ("c", "2\n", true)];
        assert_eq!(printed(Some(Division::Headers), &devices), "==> b\\n <==\n1\n\n==> c <==\n2\n");
        assert_eq!(printed(Some(Division::Lines), &devices), "1\n\n2\n");
    }

    #[test]
    fn objects_have_the_device_and_the_error() {
        let devices =
            [("a", "", true), ("b\"", "\"map\": [1]\n", false), ("c", "\"map\": []\n", true), ("d", "", true)];
        let text = printed(Some(Division::Json), &devices) + "]\n";
        let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
        let expected = serde_json::json!([
            { "device": "a", "error": "a: cannot \"read\"" },
            { "device": "b\"", "map": [1] },
            { "device": "c", "map": [], "error": "c: cannot \"read\"" },
            { "device": "d", "error": "d: cannot \"read\"" },
        ]);
        assert_eq!(parsed, expected, "{text}");
    }
}
