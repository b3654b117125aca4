//! `blkholefs info`: prints the layers of a device, and where their holes come from.

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;
use std::sync::Arc;

use super::arguments::{MapArguments, parse};
use super::devices::{self, Division};
use super::print_about;
use crate::error::Result;
use crate::export;
use crate::mount::argv::CommandLine;
use crate::report;
use crate::source::Context;
use crate::source::thin::offline::OfflinePool;
use crate::spec::Spec;

/// Prints the layers of each device, and where the holes of each layer come from. It changes nothing on the system, apart from
/// writing back dirty pages.
pub fn run(arguments: &[OsString]) -> Result<ExitCode> {
    let arguments = match parse(arguments, "info")? {
        CommandLine::Run(arguments) => arguments,
        asked => return print_about(&asked).map(|()| ExitCode::SUCCESS),
    };
    let division = if arguments.is_json() { Division::Json } else { Division::Headers };
    devices::each(&arguments.devices, division, |device, output| {
        let text = text(&arguments, device, output.is_list())?;
        Ok(output.begin(device)?.write_all(text.as_bytes())?)
    })
}

/// The layers of a device, or the volumes of a pool. In a list of devices, the fields of an object.
fn text(arguments: &MapArguments, device: &OsStr, is_list: bool) -> Result<String> {
    let (is_json, spec) = (arguments.is_json(), Spec::parse(device)?);
    if let (Some(metadata), None, Some(data)) = (&arguments.source.thin_metadata, arguments.source.volume, spec.path())
    {
        let volumes = Arc::new(OfflinePool::open(metadata, data)?).volumes()?;
        return Ok(if is_json { report::volumes_json(&volumes) } else { report::volumes(&volumes) });
    }
    let export = arguments.open(&spec)?;
    let context = Context { no_metadata_snapshots: true, ..arguments.context(&*export)? };
    let export = export::view_of(export, &arguments.source.views, &context)?;
    let stack = export.stack(&context);
    stack.write_back();
    Ok(match (is_json, is_list) {
        (true, true) => report::json_fields(&stack),
        (true, false) => report::json(&stack),
        (false, _) => report::tree(&stack),
    })
}
