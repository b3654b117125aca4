//! The commands `blkholefs map`, `info`, `verify` and `demo`. The module [`crate::mount`] has `mount` and `umount`.

mod demo;
mod map;
mod verify;

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;

use lexopt::ValueExt;
use lexopt::prelude::{Long, Short, Value};

use crate::error::{Error, Result, shown};
use crate::export::{self, Export, NbdExportFile, VolumeExport};
use crate::handle::Handle;
use crate::mount::argv::CommandLine;
use crate::mount::options;
use crate::report::{self, MapFormat};
use crate::source::Context;
use crate::source::nbd::NbdExport;
use crate::source::thin::ThinId;
use crate::source::thin::offline::OfflinePool;
use crate::spec::{Older, SourceOptions, Spec, SpecKind};
use crate::units::Bytes;
use crate::verify::LARGEST_SAMPLE;

const HELP: &str = "\
Shows block devices as regular files whose holes are real.

Usage:
  blkholefs mount [-f|--foreground] [-o OPTIONS] SPEC DIR
  blkholefs umount DIR
  blkholefs map [--json|--totals|--format FORM] [--since OLDER] [--offset N] [--length N] [-o OPTIONS] DEVICE
  blkholefs info [--json] [-o OPTIONS] DEVICE
  blkholefs verify [--sample N [--seed S] | --against FILE] [-o OPTIONS] DEVICE
  blkholefs demo

Commands:
  mount    shows SPEC (a device, an image, or a directory of devices) at DIR
  umount   unmounts DIR and waits until the daemon has closed the device
  map      prints the data and holes of a device, without a mount
  info     prints the layers of a device, and where their holes come from
  verify   reads the holes of a device and compares them with zeros, or compares a copy with the device
  demo     mounts and copies a sparse image that it makes, and removes everything

Options of map:
  --json                  prints JSON: as qemu-img map; with --since, an identity and extents
  --totals                prints only the sums
  --format FORM           prints a map that another program reads: borg, bmap (bmaptool), ddrescue, csi
  --since OLDER           prints what changed in DEVICE since OLDER, an older snapshot of it: a device; with thin_metadata, the
                          id of a volume; with an NBD URI, the name of a dirty bitmap
  --offset N, --length N  limit the range, in bytes

Options of verify:
  --sample N              reads N pieces of holes, which are chosen at random, and prints the seed
  --seed S                chooses the same pieces as the run that printed this seed
  --against FILE          compares FILE, a copy of DEVICE, with it; what is a hole in both is not read

Options of map, info and verify:
  -o thin_metadata=META   DEVICE is the data of a thin pool that is not active
      --volume ID         the volume of that pool
  -o nbd=URI              the export that the NBD device of the kernel is connected to
  -o used                 the view of the used space, instead of the exact file
  -o compact              the compact image, instead of the exact file

Options of all commands:
  -h, --help              prints this text
  -V, --version           prints the version

See blkholefs(8) and mount.blkholefs(8).
";

/// Runs `map`, `info`, `verify`, `demo`, `--help` or `--version`, from the words after the program's name.
pub fn main(words: &[OsString]) -> ExitCode {
    let (command, arguments) = words.split_first().map_or((None, words), |(first, rest)| (first.to_str(), rest));
    let result = match command {
        Some("map") => map::run(arguments),
        Some("info") => info(arguments),
        Some("verify") => verify::run(arguments),
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

/// The command line of `map`, `info` and `verify`.
struct MapArguments {
    spec: Spec,
    source: SourceOptions,
    format: MapFormat,
    /// The older device, or the older volume of a pool that is not active, as it was typed.
    since: Option<OsString>,
    offset: Bytes,
    length: Option<Bytes>,
    verify: VerifyOptions,
}

/// The options of `verify`.
#[derive(Default)]
struct VerifyOptions {
    /// The number of pieces of a sample.
    sample: Option<u64>,
    /// The seed of a sample.
    seed: Option<u64>,
    /// The copy.
    against: Option<OsString>,
}

impl VerifyOptions {
    /// # Errors
    /// A usage error where the options are not possible together.
    fn check(&self) -> Result<()> {
        let refused = |what: String| Err(Error::usage(what).hint("see blkholefs --help"));
        match (self.sample, self.seed, &self.against) {
            (Some(_), _, Some(_)) => refused("--sample and --against exclude each other".to_owned()),
            (None, Some(_), _) => refused("--seed is the seed of a sample, and needs --sample".to_owned()),
            (Some(count), ..) if count == 0 || count > LARGEST_SAMPLE => {
                refused(format!("--sample: a number from 1 to {LARGEST_SAMPLE}"))
            }
            _ => Ok(()),
        }
    }
}

impl MapArguments {
    /// Opens what the command is about: the device, or the view of it that the options name.
    fn handle(&self) -> Result<Handle> {
        let export = self.open()?;
        let context = self.context(&*export)?;
        let export = export::view_of(export, &self.source.views, &context)?;
        Ok(Handle::new(export, Arc::new(context), Arc::default()))
    }

    /// The context for an open export, with the option `nbd`.
    fn context(&self, export: &dyn Export) -> Result<Context> {
        let nbd = self.source.nbd.clone().map(|uri| export.side_export(uri).map(Arc::new)).transpose()?;
        Ok(Context { nbd, ..Context::default() })
    }

    /// Opens the device, the image, the NBD export or the volume of a pool that is not active.
    fn open(&self) -> Result<Arc<dyn Export>> {
        let (Some(metadata), Some(path)) = (&self.source.thin_metadata, self.spec.path()) else {
            return open(&self.spec);
        };
        let pool = Arc::new(OfflinePool::open(metadata, path)?);
        let id = match (self.source.volume, pool.volumes()?.as_slice()) {
            (Some(id), _) => id,
            (None, [only]) => only.id,
            (None, _) => return Err(Error::usage("the pool has no volume, or several: choose one with --volume")),
        };
        Ok(Arc::new(VolumeExport::new(pool.volume(id)?)))
    }
}

/// Opens a device, an image or an NBD export.
fn open(spec: &Spec) -> Result<Arc<dyn Export>> {
    match spec.kind() {
        SpecKind::Nbd(uri) => Ok(Arc::new(NbdExportFile::open(&NbdExport::new(uri.clone()))?)),
        SpecKind::Path(path) => export::open(path),
    }
}

/// Parses the words after `map`, `info` or `verify`.
///
/// # Errors
/// A usage error: an unknown flag, an option of mounts, a wrong value, no device or more than one.
fn parse(arguments: &[OsString], command: &str) -> Result<CommandLine<MapArguments>> {
    let usage = |error: lexopt::Error| Error::usage(error.to_string()).hint("see blkholefs --help");
    let mut parser = lexopt::Parser::from_args(arguments.iter().cloned());
    let (mut formats, mut since, mut offset, mut length) = (Vec::new(), None, Bytes::ZERO, None);
    let (mut list, mut volume, mut devices) = (OsString::new(), None, Vec::new());
    let (is_map, is_verify, mut verify) = (command == "map", command == "verify", VerifyOptions::default());
    while let Some(argument) = parser.next().map_err(usage)? {
        match argument {
            Long("json") if !is_verify => formats.push(MapFormat::Json),
            Long("totals") if is_map => formats.push(MapFormat::Totals),
            Long("format") if is_map => formats.push(format_named(&parser.value().map_err(usage)?)?),
            Long("since") if is_map => since = Some(parser.value().map_err(usage)?),
            Long("offset") if is_map => offset = size(&parser.value().map_err(usage)?)?,
            Long("length") if is_map => length = Some(size(&parser.value().map_err(usage)?)?),
            Long("sample") if is_verify => {
                verify.sample = Some(parser.value().and_then(|it| it.parse()).map_err(usage)?);
            }
            Long("seed") if is_verify => verify.seed = Some(parser.value().and_then(|it| it.parse()).map_err(usage)?),
            Long("against") if is_verify => verify.against = Some(parser.value().map_err(usage)?),
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
    formats.dedup();
    if formats.len() > 1 {
        return Err(Error::usage("--json, --totals and --format exclude each other"));
    }
    let format = formats.pop().unwrap_or_default();
    if format.needs_all() && (offset > Bytes::ZERO || length.is_some()) {
        return Err(Error::usage("this form describes a whole device: --offset and --length are not possible with it"));
    }
    let source = SourceOptions { volume, ..options::parse_source(&list, command)? };
    let since = since.filter(|_| is_map).or_else(|| source.views.since.as_ref().map(Older::typed));
    if since.is_some() && !is_map {
        return Err(Error::usage("what changed since a snapshot is printed by map").hint("see blkholefs --help"));
    }
    if volume.is_some() && source.thin_metadata.is_none() {
        return Err(Error::usage("--volume is the volume of a thin pool, and needs -o thin_metadata=META"));
    }
    verify.check()?;
    match devices.as_slice() {
        [device] => {
            let spec = Spec::parse(device)?;
            Ok(CommandLine::Run(MapArguments { spec, source, format, since, offset, length, verify }))
        }
        [] => Err(Error::usage(format!("{command}: a device is missing")).hint("see blkholefs --help")),
        _ => Err(Error::usage(format!("{command}: one device at a time"))),
    }
}

/// Parses the name of a form.
fn format_named(name: &OsStr) -> Result<MapFormat> {
    let found = MapFormat::NAMED.into_iter().find(|(known, _)| name == *known);
    let names = || MapFormat::NAMED.map(|(known, _)| known).join(", ");
    found
        .map(|(_, format)| format)
        .ok_or_else(|| Error::usage(format!("no form is called {}: there are {}", shown(name), names())))
}

/// Parses a size in bytes: `4096`, `64K`, `1G`.
fn size(text: &OsStr) -> Result<Bytes> {
    let size = text.to_str().and_then(options::parse_size);
    size.ok_or_else(|| Error::usage(format!("not a size: {}", text.display())))
}

/// `blkholefs info`: prints the layers of a device, and where the holes of each layer come from. It changes nothing on the
/// system, apart from writing back dirty pages.
fn info(arguments: &[OsString]) -> Result<()> {
    let CommandLine::Run(arguments) = parse(arguments, "info")? else { return print(HELP) };
    let is_json = arguments.format == MapFormat::Json;
    if let (Some(metadata), None, Some(data)) =
        (&arguments.source.thin_metadata, arguments.source.volume, arguments.spec.path())
    {
        let volumes = Arc::new(OfflinePool::open(metadata, data)?).volumes()?;
        return print(&if is_json { report::volumes_json(&volumes) } else { report::volumes(&volumes) });
    }
    let export = arguments.open()?;
    let context = Context { no_metadata_snapshots: true, ..arguments.context(&*export)? };
    let export = export::view_of(export, &arguments.source.views, &context)?;
    let stack = export.stack(&context);
    stack.write_back();
    print(&if is_json { report::json(&stack) } else { report::tree(&stack) })
}
