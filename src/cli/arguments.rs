//! The command line of `map`, `info` and `verify`.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use lexopt::ValueExt;
use lexopt::prelude::{Long, Short, Value};

use crate::error::{Error, Result, shown};
use crate::export::{self, Export, NbdExportFile, VolumeExport};
use crate::handle::Handle;
use crate::mount::argv::CommandLine;
use crate::mount::options;
use crate::report::MapFormat;
use crate::source::Context;
use crate::source::nbd::NbdExport;
use crate::source::thin::ThinId;
use crate::source::thin::offline::OfflinePool;
use crate::spec::{Older, SourceOptions, Spec, SpecKind};
use crate::units::Bytes;
use crate::verify::LARGEST_SAMPLE;

/// The command line of `map`, `info` and `verify`.
pub struct MapArguments {
    pub spec: Spec,
    pub source: SourceOptions,
    pub format: MapFormat,
    /// The older device, or the older volume of a pool that is not active, as it was typed.
    pub since: Option<OsString>,
    pub offset: Bytes,
    pub length: Option<Bytes>,
    pub verify: VerifyOptions,
}

/// The options of `verify`.
#[derive(Default)]
pub struct VerifyOptions {
    /// The number of pieces of a sample.
    pub sample: Option<u64>,
    /// The seed of a sample.
    pub seed: Option<u64>,
    /// The copy.
    pub against: Option<OsString>,
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
    pub fn handle(&self) -> Result<Handle> {
        let export = self.open()?;
        let context = self.context(&*export)?;
        let export = export::view_of(export, &self.source.views, &context)?;
        Ok(Handle::new(export, Arc::new(context), Arc::default()))
    }

    /// The context for an open export, with the option `nbd`.
    pub fn context(&self, export: &dyn Export) -> Result<Context> {
        let nbd = self.source.nbd.clone().map(|uri| export.side_export(uri).map(Arc::new)).transpose()?;
        Ok(Context { nbd, ..Context::default() })
    }

    /// Opens the device, the image, the NBD export or the volume of a pool that is not active.
    pub fn open(&self) -> Result<Arc<dyn Export>> {
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
pub fn open(spec: &Spec) -> Result<Arc<dyn Export>> {
    match spec.kind() {
        SpecKind::Nbd(uri) => Ok(Arc::new(NbdExportFile::open(&NbdExport::new(uri.clone()))?)),
        SpecKind::Path(path) => export::open(path),
    }
}

/// Parses the words after `map`, `info` or `verify`.
///
/// # Errors
/// A usage error: an unknown flag, an option of mounts, a wrong value, no device or more than one.
pub fn parse(arguments: &[OsString], command: &str) -> Result<CommandLine<MapArguments>> {
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
