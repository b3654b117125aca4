//! `blkholefs info`: prints the layers of a device, and where their holes come from.

use std::ffi::OsString;
use std::sync::Arc;

use super::HELP;
use super::arguments::parse;
use crate::error::Result;
use crate::export;
use crate::mount::argv::CommandLine;
use crate::output::print;
use crate::report::{self, MapFormat};
use crate::source::Context;
use crate::source::thin::offline::OfflinePool;

/// Prints the layers of a device, and where the holes of each layer come from. It changes nothing on the system, apart from
/// writing back dirty pages.
pub fn run(arguments: &[OsString]) -> Result<()> {
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
