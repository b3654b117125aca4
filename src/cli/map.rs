//! `blkholefs map`: prints the data and holes of a device, or what changed in it since an older snapshot.

use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use super::arguments::{Form, MapArguments, parse};
use super::devices::{self, Division, Failure, Output};
use super::svg_file::SvgFile;
use super::{print_about, terminal};
use crate::error::{Error, Result, shown};
use crate::map::{HoleMap, view};
use crate::mount::argv::CommandLine;
use crate::report::{self, Extents, MapFormat, Scene, Subject, Totals};
use crate::source::Context;
use crate::source::changes::{self, Changes};
use crate::source::thin::ThinId;
use crate::source::thin::offline::OfflinePool;
use crate::spec::{Spec, SpecKind};
use crate::units::Bytes;

/// The result for one device.
type Printed = std::result::Result<(), Failure>;

/// Prints the data and holes that lseek(2) would find in the file of a mount; with `--since`, what changed.
pub fn run(arguments: &[OsString]) -> Result<ExitCode> {
    let arguments = match parse(arguments, "map")? {
        CommandLine::Run(arguments) => arguments,
        asked => return print_about(&asked).map(|()| ExitCode::SUCCESS),
    };
    let division = match &arguments.form {
        Form::Text(MapFormat::Json) => Division::Json,
        Form::Text(_) => Division::Headers,
        Form::Picture { .. } | Form::Svg(_) => Division::Lines,
    };
    devices::each(&arguments.devices, division, |device, output| match &arguments.since {
        Some(older) => print_changes(&arguments, device, older, output),
        None => print_map(&arguments, device, output),
    })
}

impl MapArguments {
    /// The range that `--offset` and `--length` choose of a device of `len` bytes. Empty if it begins at the end or later.
    fn range(&self, len: Bytes) -> Range<Bytes> {
        let end = self.length.and_then(|length| self.offset.checked_add(length)).unwrap_or(len).min(len);
        self.offset..end.max(self.offset)
    }
}

fn print_map(arguments: &MapArguments, device: &OsStr, output: &mut Output<'_>) -> Printed {
    let handle = arguments.handle(device)?;
    let len = handle.export().len()?;
    let range = arguments.range(len);
    let counted = (arguments.form == Form::Text(MapFormat::Totals) && !range.is_empty())
        .then(|| handle.count_data(&range))
        .flatten();
    if let Some(data) = counted {
        let holes = range.end.saturating_sub(range.start).saturating_sub(data);
        return Ok(Totals::new(data, holes).print(output.begin(device)?, false)?);
    }
    let part = (arguments.offset, arguments.length);
    let mut extents = handle.walk(range).map(|extent| extent.map_err(io::Error::other));
    print_extents(arguments, device, &Subject { len, part, since: None }, &mut extents, output)
}

fn print_changes(arguments: &MapArguments, device: &OsStr, older: &OsStr, output: &mut Output<'_>) -> Printed {
    let changes = changes(arguments, device, older)?;
    let len = changes.map.len();
    let part = (arguments.offset, arguments.length);
    let mut extents = view::runs(&changes.map, Bytes::new(1), arguments.range(len)).map(Ok);
    print_extents(arguments, device, &Subject { len, part, since: Some(&changes.identity) }, &mut extents, output)
}

/// Prints the extents of a device in the form that was chosen.
fn print_extents(
    arguments: &MapArguments,
    device: &OsStr,
    subject: &Subject<'_>,
    extents: Extents<'_>,
    output: &mut Output<'_>,
) -> Printed {
    let (name, older) = (title(arguments, device), arguments.since.as_ref().map(|older| shown(older).to_string()));
    let range = arguments.range(subject.len);
    let scene = Scene { name: &name, older: older.as_deref(), len: subject.len, range: &range };
    match &arguments.form {
        Form::Text(MapFormat::Json) if output.is_list() => return print_field(device, subject, extents, output),
        Form::Text(format) => report::map(output.begin(device)?, *format, subject, extents)?,
        Form::Picture { is_ascii } => {
            report::picture(output.begin(device)?, &scene, terminal::look(*is_ascii), extents)?;
        }
        Form::Svg(file) if file == "-" => report::svg(output.begin(device)?, &scene, extents)?,
        Form::Svg(file) => {
            let file = SvgFile::new(file, device)?;
            let mut picture = Vec::new();
            report::svg(&mut picture, &scene, extents)?;
            file.write(&picture)?;
        }
    }
    Ok(())
}

/// What a picture is of: the device, and the volume or the view that the options name.
fn title(arguments: &MapArguments, device: &OsStr) -> String {
    let volume = arguments.source.volume.map(|id| format!(", volume {id}")).unwrap_or_default();
    let views = &arguments.source.views;
    let view = match (views.used, views.compact) {
        (true, _) => ", used space",
        (_, true) => ", compact image",
        _ => "",
    };
    format!("{}{volume}{view}", shown(device))
}

/// Prints the map as a field of the object of its device. The array is closed also where the device fails, so that the document
/// stays valid; the object then has the error too.
fn print_field(device: &OsStr, subject: &Subject<'_>, extents: Extents<'_>, output: &mut Output<'_>) -> Printed {
    let out = output.begin(device)?;
    write!(out, "\"map\": ")?;
    let mut failure = None;
    let mut whole = extents.map_while(|extent| extent.map_err(|error| failure = Some(error)).ok().map(Ok));
    report::map(out, MapFormat::Json, subject, &mut whole)?;
    failure.map_or(Ok(()), |error| Err(error.into()))
}

/// What changed since `older`: a device, or the id of a volume of a pool that is not active. Each kind of source that can
/// compare two devices has its place here.
///
/// # Errors
/// A usage error where no source can compare the two; else as the source.
fn changes(arguments: &MapArguments, device: &OsStr, older: &OsStr) -> Result<Changes> {
    let refused = |what: &str| Error::usage(format!("--since {}: {what}", shown(older)));
    let (source, spec) = (&arguments.source, Spec::parse(device)?);
    let newer = match spec.kind() {
        SpecKind::Path(newer) => newer,
        SpecKind::Nbd(uri) => {
            let bitmap = older.to_str().ok_or_else(|| refused("is no name of a dirty bitmap"))?;
            return changes::nbd::since_bitmap(uri, bitmap);
        }
    };
    if source.nbd.is_some() {
        return Err(refused("the changes of an NBD device are not supported, so -o nbd is not possible"));
    }
    let Some(metadata) = &source.thin_metadata else {
        let (older, newer) = (changes::open(Path::new(older))?, changes::open(newer)?);
        return changes::between(&older, &newer, &Context::default());
    };
    let id = older.to_str().and_then(ThinId::parse);
    let older = id.ok_or_else(|| refused("is no id of a volume"))?;
    let newer_id = source.volume.ok_or_else(|| refused("the newer volume is missing: choose it with --volume"))?;
    Arc::new(OfflinePool::open(metadata, newer)?).changes(older, newer_id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{Extent, ExtentKind};

    #[test]
    fn a_list_stays_valid_where_a_device_fails_within_its_map() {
        let mut out = Vec::new();
        let (mut output, device) = (Output::new(&mut out, Some(Division::Json)), OsStr::new("a"));
        let hole = Extent { end: Bytes::new(4096), kind: ExtentKind::Hole };
        let failed = io::Error::other(Error::failed("cannot read").on(device));
        let mut extents = [Ok((Bytes::ZERO, hole)), Err(failed), Ok((Bytes::new(4096), hole))].into_iter();
        let subject = Subject { len: Bytes::new(8192), part: (Bytes::ZERO, None), since: None };
        let Err(Failure::Device(error)) = print_field(device, &subject, &mut extents, &mut output) else {
            panic!("the error of the device is returned");
        };
        output.end(device, Some(&error)).unwrap();
        let parsed: serde_json::Value = serde_json::from_str(&format!("{}]", String::from_utf8(out).unwrap())).unwrap();
        assert_eq!(parsed[0]["error"], "a: cannot read");
        assert_eq!(parsed[0]["map"].as_array().map(Vec::len), Some(1));
    }
}
