//! The commands `blkholefs map`, `info` and `demo`. The module [`crate::mount`] has `mount` and `umount`.

mod demo;

use std::ffi::{OsStr, OsString};
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;
use std::sync::Arc;

use lexopt::ValueExt;
use lexopt::prelude::{Long, Short, Value};

use crate::error::{Error, Result};
use crate::export::{self, Export, NbdExportFile, VolumeExport};
use crate::handle::Handle;
use crate::mount::argv::CommandLine;
use crate::mount::options;
use crate::report::{self, MapFormat, MapPrinter};
use crate::source::Context;
use crate::source::nbd::NbdExport;
use crate::source::thin::ThinId;
use crate::source::thin::offline::OfflinePool;
use crate::spec::{SourceOptions, Spec, SpecKind};
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
  umount   unmounts DIR and waits until the daemon has closed the device
  map      prints the data and holes of a device, without a mount
  info     prints the layers of a device, and where their holes come from
  demo     mounts and copies a sparse image that it makes, and removes everything

Options of map and info:
  -o thin_metadata=META   DEVICE is the data of a thin pool that is not active
      --volume ID         the volume of that pool
  -o nbd=URI              the export that the NBD device of the kernel is connected to

Options of all commands:
  -h, --help              prints this text
  -V, --version           prints the version

See blkholefs(8) and mount.blkholefs(8).
";

/// Runs `map`, `info`, `demo`, `--help` or `--version`, from the words after the program's name.
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

/// Prints an error on one line and its hint, if any, on the next. Returns its exit code.
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

/// Turns a failed write into an error. A pipe whose reader has exited, as `head` does, is no error.
fn written(result: io::Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::failed("cannot write the output").because(error))
        }
        _ => Ok(()),
    }
}

/// The command line of `map` and of `info`.
struct MapArguments {
    spec: Spec,
    source: SourceOptions,
    json: bool,
    totals: bool,
    offset: Bytes,
    length: Option<Bytes>,
}

impl MapArguments {
    /// The context for an open export, with the option `nbd`.
    fn context(&self, export: &dyn Export) -> Result<Context> {
        let nbd = self.source.nbd.clone().map(|uri| export.side_export(uri)).transpose()?;
        Ok(Context { nbd, ..Context::default() })
    }

    /// Opens the device, the image, the NBD export or the volume of a pool that is not active.
    fn open(&self) -> Result<Arc<dyn Export>> {
        let path = match self.spec.kind() {
            SpecKind::Nbd(uri) => return Ok(Arc::new(NbdExportFile::open(&NbdExport::new(uri.clone()))?)),
            SpecKind::Path(path) => path,
        };
        let Some(metadata) = &self.source.thin_metadata else { return export::open(path) };
        let pool = Arc::new(OfflinePool::open(metadata, path)?);
        let id = match (self.source.volume, pool.volumes()?.as_slice()) {
            (Some(id), _) => id,
            (None, [only]) => only.id,
            (None, _) => return Err(Error::usage("the pool has no volume, or several: choose one with --volume")),
        };
        Ok(Arc::new(VolumeExport::new(pool.volume(id)?)))
    }

    fn format(&self) -> MapFormat {
        match (self.json, self.totals) {
            (true, _) => MapFormat::Json,
            (_, true) => MapFormat::Totals,
            _ => MapFormat::Plain,
        }
    }
}

/// Parses the words after `map` or `info`.
///
/// # Errors
/// A usage error: an unknown flag, an option of mounts, a wrong value, no device or more than one.
fn parse(arguments: &[OsString], command: &str) -> Result<CommandLine<MapArguments>> {
    let usage = |error: lexopt::Error| Error::usage(error.to_string()).hint("see blkholefs --help");
    let mut parser = lexopt::Parser::from_args(arguments.iter().cloned());
    let (mut json, mut totals, mut offset, mut length) = (false, false, Bytes::ZERO, None);
    let (mut list, mut volume, mut devices) = (OsString::new(), None, Vec::new());
    let is_map = command == "map";
    while let Some(argument) = parser.next().map_err(usage)? {
        match argument {
            Long("json") => json = true,
            Long("totals") if is_map => totals = true,
            Long("offset") if is_map => offset = size(&parser.value().map_err(usage)?)?,
            Long("length") if is_map => length = Some(size(&parser.value().map_err(usage)?)?),
            Short('o') => options::append(&mut list, &parser.value().map_err(usage)?),
            Long("volume") => {
                let id: u32 = parser.value().and_then(|value| value.parse()).map_err(usage)?;
                volume = Some(ThinId::new(id).ok_or_else(|| Error::usage(format!("no volume has the id {id}")))?);
            }
            Short('h') | Long("help") => return Ok(CommandLine::Help),
            Value(device) => devices.push(device),
            other => return Err(usage(other.unexpected())),
        }
    }
    if json && totals {
        return Err(Error::usage("--json and --totals exclude each other"));
    }
    let source = SourceOptions { volume, ..options::parse_source(&list, command)? };
    if volume.is_some() && source.thin_metadata.is_none() {
        return Err(Error::usage("--volume is the volume of a thin pool, and needs -o thin_metadata=META"));
    }
    match devices.as_slice() {
        [device] => {
            let spec = Spec::parse(device)?;
            Ok(CommandLine::Run(MapArguments { spec, source, json, totals, offset, length }))
        }
        [] => Err(Error::usage(format!("{command}: a device is missing")).hint("see blkholefs --help")),
        _ => Err(Error::usage(format!("{command}: one device at a time"))),
    }
}

/// Parses a size in bytes: `4096`, `64K`, `1G`.
fn size(text: &OsStr) -> Result<Bytes> {
    let size = text.to_str().and_then(options::parse_size);
    size.ok_or_else(|| Error::usage(format!("not a size: {}", text.display())))
}

/// `blkholefs map`: prints the data and holes that lseek(2) would find in the file of a mount.
fn map(arguments: &[OsString]) -> Result<()> {
    let CommandLine::Run(arguments) = parse(arguments, "map")? else { return print(HELP) };
    let export = arguments.open()?;
    let context = arguments.context(&*export)?;
    let handle = Handle::new(export, Arc::new(context), Arc::default());
    let len = handle.export().len()?;
    let end = arguments.length.and_then(|length| arguments.offset.checked_add(length)).unwrap_or(len).min(len);
    let format = arguments.format();
    let mut printer = MapPrinter::new(BufWriter::new(io::stdout().lock()), format);
    let mut at = arguments.offset;
    if format == MapFormat::Totals
        && at < end
        && let Some(data) = handle.count_data(&(at..end))
    {
        printer.add(data, end.saturating_sub(at).saturating_sub(data));
        at = end;
    }
    while at < end {
        for (start, extent) in handle.extents(at..end)? {
            at = extent.end;
            if printer.extent(start, extent).is_err() {
                return written(printer.finish());
            }
        }
    }
    written(printer.finish())
}

/// `blkholefs info`: prints the layers of a device, and where the holes of each layer come from. It changes nothing on the
/// system, apart from writing back dirty pages.
fn info(arguments: &[OsString]) -> Result<()> {
    let CommandLine::Run(arguments) = parse(arguments, "info")? else { return print(HELP) };
    if let (Some(metadata), None, Some(data)) =
        (&arguments.source.thin_metadata, arguments.source.volume, arguments.spec.path())
    {
        let volumes = Arc::new(OfflinePool::open(metadata, data)?).volumes()?;
        return print(&if arguments.json { report::volumes_json(&volumes) } else { report::volumes(&volumes) });
    }
    let export = arguments.open()?;
    let context = Context { no_metadata_snapshots: true, ..arguments.context(&*export)? };
    let stack = export.stack(&context);
    stack.write_back();
    print(&if arguments.json { report::json(&stack) } else { report::tree(&stack) })
}
