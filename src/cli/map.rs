//! `blkholefs map`: prints the data and holes of a device, or what changed in it since an older snapshot.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufWriter};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::HELP;
use super::arguments::{MapArguments, parse};
use crate::error::{Error, Result, shown};
use crate::map::{HoleMap, view};
use crate::mount::argv::CommandLine;
use crate::output::{Stdout, print, written};
use crate::report::{self, Extents, MapFormat, Subject, Totals};
use crate::source::Context;
use crate::source::changes::{self, Changes};
use crate::source::thin::ThinId;
use crate::source::thin::offline::OfflinePool;
use crate::spec::SpecKind;
use crate::units::Bytes;

/// Prints the data and holes that lseek(2) would find in the file of a mount; with `--since`, what changed.
pub fn run(arguments: &[OsString]) -> Result<()> {
    let CommandLine::Run(arguments) = parse(arguments, "map")? else { return print(HELP) };
    match &arguments.since {
        Some(older) => print_changes(&arguments, &changes(&arguments, older)?),
        None => print_map(&arguments),
    }
}

impl MapArguments {
    /// The range that `--offset` and `--length` choose of a device of `len` bytes. Empty if it begins at the end or later.
    fn range(&self, len: Bytes) -> Range<Bytes> {
        let end = self.length.and_then(|length| self.offset.checked_add(length)).unwrap_or(len).min(len);
        self.offset..end.max(self.offset)
    }
}

fn print_map(arguments: &MapArguments) -> Result<()> {
    let handle = arguments.handle()?;
    let len = handle.export().len()?;
    let range = arguments.range(len);
    let counted =
        (arguments.format == MapFormat::Totals && !range.is_empty()).then(|| handle.count_data(&range)).flatten();
    if let Some(data) = counted {
        let holes = range.end.saturating_sub(range.start).saturating_sub(data);
        return written(Totals::new(data, holes).print(&mut Stdout, false));
    }
    printed(
        arguments.format,
        &Subject { len, part: (arguments.offset, arguments.length), since: None },
        &mut handle.walk(range).map(|extent| extent.map_err(io::Error::other)),
    )
}

fn print_changes(arguments: &MapArguments, changes: &Changes) -> Result<()> {
    let len = changes.map.len();
    let runs = view::runs(&changes.map, Bytes::new(1), arguments.range(len));
    printed(
        arguments.format,
        &Subject { len, part: (arguments.offset, arguments.length), since: Some(&changes.identity) },
        &mut runs.map(Ok),
    )
}

/// Prints a map to the standard output. An error of the device, which `extents` passes on, is returned as it was.
fn printed(format: MapFormat, subject: &Subject<'_>, extents: Extents<'_>) -> Result<()> {
    let mut out = BufWriter::new(Stdout);
    match report::map(&mut out, format, subject, extents).map_err(io::Error::downcast::<Error>) {
        Err(Ok(of_device)) => Err(of_device),
        Err(Err(of_output)) => written(Err(of_output)),
        Ok(()) => Ok(()),
    }
}

/// What changed since `older`: a device, or the id of a volume of a pool that is not active. Each kind of source that can
/// compare two devices has its place here.
///
/// # Errors
/// A usage error where no source can compare the two; else as the source.
fn changes(arguments: &MapArguments, older: &OsStr) -> Result<Changes> {
    let refused = |what: &str| Error::usage(format!("--since {}: {what}", shown(older)));
    let source = &arguments.source;
    let newer = match arguments.spec.kind() {
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
