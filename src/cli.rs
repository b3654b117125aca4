//! `blkholefs COMMAND`: what people type; mount(8) comes in through [`crate::mount`].

mod demo;

use std::ffi::{OsStr, OsString};
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use lexopt::ValueExt;
use lexopt::prelude::{Long, Short, Value};

use crate::error::{Error, Result};
use crate::handle::Handle;
use crate::mount::options::{self, MountOptions, Unknown};
use crate::report::{self, MapFormat, MapPrinter};
use crate::source::nbd::{NbdExport, SideExport, Uri};
use crate::source::thin::ThinId;
use crate::source::thin::offline::{OfflinePool, VolumeMedium};
use crate::source::{Backing, Context};
use crate::units::Bytes;

const HELP: &str = "\
Shows block devices as regular files whose holes are real.

Usage:
  blkholefs mount [-f|--foreground] [-o OPTIONS] SPEC DIR
  blkholefs umount DIR
  blkholefs map [--json|--totals] [--offset N] [--length N] [-o OPTIONS] DEVICE
  blkholefs info [--json] [-o OPTIONS] DEVICE
  blkholefs demo

Commands:
  mount    shows SPEC (a device, an image, or a directory of devices) at DIR
  umount   unmounts DIR and waits until the device was let go
  map      prints the data and holes of a device, without mounting it
  info     prints what a device stands on, and where its holes come from
  demo     shows it all on a sparse image of its own, and cleans up

Options:
  -o thin_metadata=META   DEVICE holds the data of a thin pool that is not active
      --volume ID         the volume of that pool
  -o nbd=URI              the export that the kernel's NBD device is connected to
  -h, --help      this text
  -V, --version   the version

See blkholefs(8) and mount.blkholefs(8).
";

/// Runs every command but `mount` and `umount`, from the words after the program's name.
pub fn main(words: &[OsString]) -> ExitCode {
    let (command, arguments) = words.split_first().map_or((None, words), |(first, rest)| (first.to_str(), rest));
    let result = match command {
        Some("map") => map(arguments),
        Some("info") => info(arguments),
        Some("demo") => demo::run(),
        Some("-h" | "--help" | "help") => print(HELP),
        Some("-V" | "--version") => print(&format!("blkholefs {}\n", env!("CARGO_PKG_VERSION"))),
        Some(other) => Err(Error::usage(format!("there is no command {other:?}")).hint("see blkholefs --help")),
        None => Err(Error::usage("a command is missing").hint("see blkholefs --help")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report_error(&error),
    }
}

/// Prints a failure as one line, with its hint on the next; answers its exit code.
fn report_error(error: &Error) -> ExitCode {
    eprintln!("blkholefs: {error}");
    if let Some(hint) = error.hint_text() {
        eprintln!("{hint}");
    }
    ExitCode::from(error.exit_code())
}

fn print(text: &str) -> Result<()> {
    written(io::stdout().write_all(text.as_bytes()))
}

/// A reader that went away, as `head` does, is no failure.
fn written(result: io::Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::failed("cannot write the output").because(error))
        }
        _ => Ok(()),
    }
}

/// What `map` and `info` are told.
#[derive(Default)]
struct Asked {
    device: PathBuf,
    json: bool,
    totals: bool,
    offset: Bytes,
    length: Option<Bytes>,
    options: MountOptions,
    volume: Option<ThinId>,
}

impl Asked {
    /// What the options say of the sources below.
    fn context(&self, shown: &Backing) -> Result<Context> {
        let uri = self.options.nbd.as_deref().map(Uri::parse).transpose()?;
        let nbd = uri.map(|uri| SideExport::new(uri, shown)).transpose()?;
        Ok(Context { nbd, ..Context::default() })
    }

    /// Opens what was asked for.
    fn open(&self) -> Result<Backing> {
        if let Some(text) = self.device.to_str().filter(|text| Uri::looks_like(text)) {
            return Ok(Backing::new(&self.device, NbdExport::new(Uri::parse(text)?).open()?));
        }
        let Some(metadata) = &self.options.thin_metadata else { return Backing::open(&self.device) };
        let pool = Arc::new(OfflinePool::open(metadata, &self.device)?);
        let id = match (self.volume, pool.volumes()?.as_slice()) {
            (Some(id), _) => id,
            (None, [only]) => only.id,
            (None, _) => return Err(Error::usage("which volume of the pool? name it with --volume")),
        };
        Ok(Backing::new(&metadata.join(id.to_string()), VolumeMedium::new(pool.volume(id)?)))
    }
}

fn parse(arguments: &[OsString], command: &str) -> Result<Asked> {
    let usage = |error: lexopt::Error| Error::usage(error.to_string()).hint("see blkholefs --help");
    let mut parser = lexopt::Parser::from_args(arguments.iter().cloned());
    let mut asked = Asked::default();
    let mut devices = Vec::new();
    let is_map = command == "map";
    while let Some(argument) = parser.next().map_err(usage)? {
        match argument {
            Long("json") => asked.json = true,
            Long("totals") if is_map => asked.totals = true,
            Long("offset") if is_map => asked.offset = size(&parser.value().map_err(usage)?)?,
            Long("length") if is_map => asked.length = Some(size(&parser.value().map_err(usage)?)?),
            Short('o') => asked.options = options::parse(&parser.value().map_err(usage)?, Unknown::Refused)?,
            Long("volume") => {
                let id: u32 = parser.value().and_then(|value| value.parse()).map_err(usage)?;
                asked.volume = Some(ThinId::new(id).ok_or_else(|| Error::usage(format!("no volume has the id {id}")))?);
            }
            Short('h') | Long("help") => {
                print(HELP)?;
                std::process::exit(0);
            }
            Value(device) => devices.push(device),
            other => return Err(usage(other.unexpected())),
        }
    }
    if asked.json && asked.totals {
        return Err(Error::usage("--json and --totals exclude each other"));
    }
    match devices.len() {
        1 => Ok(Asked { device: devices.remove(0).into(), ..asked }),
        0 => Err(Error::usage(format!("{command}: a device is missing")).hint("see blkholefs --help")),
        _ => Err(Error::usage(format!("{command}: one device at a time"))),
    }
}

/// Reads a number of bytes with an optional binary suffix: `4096`, `64K`, `1G`.
fn size(text: &OsStr) -> Result<Bytes> {
    let size = text.to_str().and_then(options::parse_size);
    size.ok_or_else(|| Error::usage(format!("not a size: {}", text.display())))
}

/// `blkholefs map`: the same answers that a seek through a mount gets.
fn map(arguments: &[OsString]) -> Result<()> {
    let asked = parse(arguments, "map")?;
    let backing = asked.open()?;
    let context = asked.context(&backing)?;
    let handle = Handle::new(backing, Arc::new(context), Arc::default());
    let len = handle.backing().len()?;
    let end = asked.length.and_then(|length| asked.offset.checked_add(length)).unwrap_or(len).min(len);
    let format = match (asked.json, asked.totals) {
        (true, _) => MapFormat::Json,
        (_, true) => MapFormat::Totals,
        _ => MapFormat::Plain,
    };
    let mut printer = MapPrinter::new(BufWriter::new(io::stdout().lock()), format);
    let mut at = asked.offset;
    if format == MapFormat::Totals
        && at < end
        && let Some(data) = handle.count_data(&(at..end))
    {
        printer.sums(data, end.saturating_sub(at).saturating_sub(data));
        at = end;
    }
    while at < end {
        for (start, run) in handle.runs(at..end)? {
            at = run.end;
            if printer.run(start, run).is_err() {
                return written(printer.finish());
            }
        }
    }
    written(printer.finish())
}

/// `blkholefs info`: what a device stands on.
fn info(arguments: &[OsString]) -> Result<()> {
    let asked = parse(arguments, "info")?;
    if let (Some(metadata), None) = (&asked.options.thin_metadata, asked.volume) {
        let volumes = Arc::new(OfflinePool::open(metadata, &asked.device)?).volumes()?;
        return print(&if asked.json { report::volumes_json(&volumes) } else { report::volumes(&volumes) });
    }
    let backing = asked.open()?;
    let stack = backing.resolve(&asked.context(&backing)?);
    stack.write_back();
    print(&if asked.json { report::json(&stack) } else { report::tree(&stack) })
}
