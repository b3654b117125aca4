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
    /// The devices as they were typed: one or more, and one for `verify` and for what is about one device.
    pub devices: Vec<OsString>,
    pub source: SourceOptions,
    pub form: Form,
    /// The older device, or the older volume of a pool that is not active, as it was typed.
    pub since: Option<OsString>,
    pub offset: Bytes,
    pub length: Option<Bytes>,
    pub verify: VerifyOptions,
}

/// How a map is printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// As text.
    Text(MapFormat),
    /// As a grid of characters.
    Picture {
        /// Whether all of them are ASCII, without colours.
        is_ascii: bool,
    },
    /// As a grid of squares in this file; `-` is the standard output.
    Svg(OsString),
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
    /// Whether JSON was chosen.
    pub fn is_json(&self) -> bool {
        self.form == Form::Text(MapFormat::Json)
    }

    /// Opens what the command is about: the device, or the view of it that the options name.
    pub fn handle(&self, device: &OsStr) -> Result<Handle> {
        let export = self.open(&Spec::parse(device)?)?;
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
    pub fn open(&self, spec: &Spec) -> Result<Arc<dyn Export>> {
        let (Some(metadata), Some(path)) = (&self.source.thin_metadata, spec.path()) else {
            return open(spec);
        };
        let pool = Arc::new(OfflinePool::open(metadata, path)?);
        let id = match (self.source.volume, pool.volumes()?.as_slice()) {
            (Some(id), _) => id,
            (None, [only]) => only.id,
            (None, _) => return Err(Error::usage("the pool has no volume, or several: choose one with --volume")),
        };
        Ok(Arc::new(VolumeExport::new(pool.volume(id)?)))
    }

    /// # Errors
    /// A usage error where the options are not possible together, or with that number of devices.
    fn check(&self, command: &str) -> Result<()> {
        self.verify.check()?;
        if let Form::Text(format) = self.form
            && format.needs_all()
            && (self.offset > Bytes::ZERO || self.length.is_some())
        {
            let what = "this form describes a whole device: --offset and --length are not possible with it";
            return Err(Error::usage(what));
        }
        if self.since.is_some() && command != "map" {
            return Err(Error::usage("what changed since a snapshot is printed by map").hint("see blkholefs --help"));
        }
        if self.source.volume.is_some() && self.source.thin_metadata.is_none() {
            return Err(Error::usage("--volume is the volume of a thin pool, and needs -o thin_metadata=META"));
        }
        match (self.devices.len(), self.single(command)) {
            (0, _) => Err(Error::usage(format!("{command}: a device is missing")).hint("see blkholefs --help")),
            (1, _) | (_, None) => Ok(()),
            (_, Some(why)) => Err(Error::usage(format!("{command}: one device at a time{why}"))),
        }
    }

    /// Why only one device is possible, as the end of a sentence. `None` where several are.
    fn single(&self, command: &str) -> Option<&'static str> {
        match &self.form {
            _ if command == "verify" => Some(""),
            Form::Text(format) if MapFormat::NAMED.iter().any(|(_, named)| named == format) => Some(" with --format"),
            Form::Svg(_) => Some(" with --svg"),
            _ if self.since.is_some() => Some(" is compared with its older snapshot"),
            _ if self.source.thin_metadata.is_some() => Some(" with -o thin_metadata"),
            _ if self.source.nbd.is_some() => Some(" with -o nbd"),
            _ => None,
        }
    }
}

/// Opens a device, an image or an NBD export.
pub fn open(spec: &Spec) -> Result<Arc<dyn Export>> {
    match spec.kind() {
        SpecKind::Nbd(uri) => Ok(Arc::new(NbdExportFile::open(&NbdExport::new(uri.clone()))?)),
        SpecKind::Path(path) => export::open(path),
    }
}

/// The words of a command line, before they are checked.
#[derive(Default)]
struct Words {
    forms: Vec<Form>,
    is_ascii: bool,
    since: Option<OsString>,
    offset: Bytes,
    length: Option<Bytes>,
    list: OsString,
    volume: Option<ThinId>,
    devices: Vec<OsString>,
    verify: VerifyOptions,
}

/// Parses the words after `map`, `info` or `verify`.
///
/// # Errors
/// A usage error: an unknown flag, an option of mounts, a wrong value, no device, or several where only one is possible.
pub fn parse(arguments: &[OsString], command: &str) -> Result<CommandLine<MapArguments>> {
    let mut parser = lexopt::Parser::from_args(arguments.iter().cloned());
    let mut words = Words::default();
    while let Some(argument) = parser.next().map_err(usage)? {
        match argument {
            Short('o') => options::append(&mut words.list, &parser.value().map_err(usage)?),
            Long("volume") => {
                let id: u32 = parser.value().and_then(|value| value.parse()).map_err(usage)?;
                words.volume = Some(ThinId::new(id).ok_or_else(|| Error::usage(format!("no volume has the id {id}")))?);
            }
            Short('h') | Long("help") => return Ok(CommandLine::Help),
            Short('V') | Long("version") => return Ok(CommandLine::Version),
            Value(device) => words.devices.push(device),
            Long(option) => {
                let option = option.to_owned();
                words.option(&option, command, &mut parser)?;
            }
            other => return Err(usage(other.unexpected())),
        }
    }
    words.checked(command).map(CommandLine::Run)
}

impl Words {
    /// Takes a long option that only some of the commands have, with its value.
    fn option(&mut self, option: &str, command: &str, parser: &mut lexopt::Parser) -> Result<()> {
        match (command, option) {
            ("map" | "info", "json") => self.forms.push(Form::Text(MapFormat::Json)),
            ("map", "totals") => self.forms.push(Form::Text(MapFormat::Totals)),
            ("map", "picture") => self.forms.push(Form::Picture { is_ascii: false }),
            ("map", "ascii") => self.is_ascii = true,
            ("map", "svg") => self.forms.push(Form::Svg(parser.value().map_err(usage)?)),
            ("map", "format") => {
                self.forms.push(Form::Text(format_named(&parser.value().map_err(usage)?)?));
            }
            ("map", "since") => self.since = Some(parser.value().map_err(usage)?),
            ("map", "offset") => self.offset = size(&parser.value().map_err(usage)?)?,
            ("map", "length") => self.length = Some(size(&parser.value().map_err(usage)?)?),
            ("verify", "sample") => {
                self.verify.sample = Some(parser.value().and_then(|it| it.parse()).map_err(usage)?);
            }
            ("verify", "seed") => self.verify.seed = Some(parser.value().and_then(|it| it.parse()).map_err(usage)?),
            ("verify", "against") => self.verify.against = Some(parser.value().map_err(usage)?),
            _ => return Err(usage(Long(option).unexpected())),
        }
        Ok(())
    }

    /// # Errors
    /// A usage error where the options are not possible together, or with that number of devices.
    fn checked(mut self, command: &str) -> Result<MapArguments> {
        self.forms.dedup();
        if self.forms.len() > 1 {
            return Err(Error::usage("--json, --totals, --picture, --svg and --format exclude each other"));
        }
        let form = match (self.forms.pop(), self.is_ascii) {
            (Some(Form::Picture { .. }), is_ascii) => Form::Picture { is_ascii },
            (_, true) => return Err(Error::usage("--ascii is for pictures, and needs --picture")),
            (form, false) => form.unwrap_or(Form::Text(MapFormat::default())),
        };
        let source = SourceOptions { volume: self.volume, ..options::parse_source(&self.list, command)? };
        let since = self.since.or_else(|| source.views.since.as_ref().map(Older::typed));
        let (offset, length, verify) = (self.offset, self.length, self.verify);
        let arguments = MapArguments { devices: self.devices, source, form, since, offset, length, verify };
        arguments.check(command)?;
        Ok(arguments)
    }
}

fn usage(error: lexopt::Error) -> Error {
    Error::usage(error.to_string()).hint("see blkholefs --help")
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
