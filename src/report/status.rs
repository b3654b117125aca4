//! The mounts of this machine, as a table and as JSON.

use std::fmt::Write as _;
use std::path::Path;
use std::time::SystemTime;

use super::human;
use super::text::{quoted, time};
use crate::error::shown;
use crate::fs::{FileStatus, Status};
use crate::handle::DenseLayer;
use crate::mount::logging::one_line;
use crate::mount::status::{MountState, MountStatus};

/// The heads of the columns. The last one is not padded.
const HEADS: [&str; 8] = ["SPEC", "DIR", "PID", "OPEN", "MAPS", "AHEAD", "RSS", "OPTIONS"];

/// A table with a line for each mount, and below it what there is to say about it.
pub fn status(mounts: &[MountStatus]) -> String {
    if mounts.is_empty() {
        return "no mounts of blkholefs\n".to_owned();
    }
    let rows: Vec<_> = mounts.iter().map(cells).collect();
    let width = |column: usize| {
        let widths = rows.iter().map(|row| row[column].chars().count());
        widths.chain([HEADS[column].len()]).max().unwrap_or_default()
    };
    let widths: Vec<_> = (0..HEADS.len()).map(width).collect();
    let mut text = String::new();
    line(&HEADS.map(str::to_owned), &widths, &mut text);
    for (mount, row) in mounts.iter().zip(&rows) {
        line(row, &widths, &mut text);
        for remark in remarks(mount) {
            let _ = writeln!(text, "  {remark}");
        }
    }
    text
}

fn line(cells: &[String; HEADS.len()], widths: &[usize], text: &mut String) {
    let padded: Vec<_> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
    let _ = writeln!(text, "{}", padded.join("  ").trim_end());
}

/// The cells of a mount. What is not known is `-`.
fn cells(mount: &MountStatus) -> [String; HEADS.len()] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let of_status = |text: &dyn Fn(&Status) -> String| match &mount.state {
        MountState::Serving(status) => text(status),
        _ => "-".to_owned(),
    };
    [
        or_dash(known(mount.spec.as_ref()).map(|spec| shown(spec).to_string())),
        or_dash(known(&mount.directory).map(|directory| shown(directory).to_string())),
        or_dash(mount.daemon.map(|daemon| daemon.to_string())),
        of_status(&|status| status.open_files.to_string()),
        of_status(&|status| human(status.map_memory)),
        of_status(&|status| human(status.read_ahead)),
        or_dash(mount.resident.map(human)),
        or_dash(mount.options.as_ref().map(|options| shown(options).to_string())),
    ]
}

/// A SPEC or directory. It is empty where neither a record nor the kernel's list has it.
fn known(name: &Path) -> Option<&Path> {
    Some(name).filter(|name| !name.as_os_str().is_empty())
}

/// What there is to say about a mount, each on one line.
fn remarks(mount: &MountStatus) -> Vec<String> {
    let directory = shown(&mount.directory);
    let mut remarks = match &mount.state {
        MountState::Serving(status) => status.files.iter().flat_map(remarks_about_file).collect(),
        MountState::Silent(reason) => vec![format!("no answer of the daemon: {}", one_line(reason))],
        MountState::Killed => vec![format!("the daemon was killed and the mount is left: umount {directory}")],
        MountState::NoRecord => vec!["the daemon has no record: it is not known what it does".to_owned()],
        MountState::OfOtherUser => vec![format!(
            "a mount of {}, who can see more of it",
            mount.user.map_or("another user".to_owned(), |user| if user == 0 {
                "root".into()
            } else {
                format!("user {user}")
            })
        )],
    };
    if mount.mountpoints.is_empty() {
        remarks.push("not mounted in this mount namespace".to_owned());
    }
    let others = mount.mountpoints.iter().filter(|point| **point != mount.directory);
    remarks.extend(others.map(|point| format!("also mounted on {}", shown(point))));
    remarks
}

fn remarks_about_file(file: &FileStatus) -> impl Iterator<Item = String> {
    file.dense.iter().map(|dense| {
        let what = if dense.is_degraded { "degraded to data" } else { "all data" };
        let since = match dense.since {
            Some(since) if dense.is_degraded => format!(" since {}", time(since)),
            _ => String::new(),
        };
        let (layer, reason) = (one_line(&dense.layer), one_line(&dense.reason));
        format!("{}: {what}{since}: {layer}: {reason}", shown(&file.name))
    })
}

/// The mounts as JSON: `{"mounts":[{"spec","directory","mountpoints","options",...}]}`.
pub fn status_json(mounts: &[MountStatus]) -> String {
    let mounts: Vec<_> = mounts.iter().map(json_mount).collect();
    format!("{{ \"mounts\": {} }}\n", array(&mounts))
}

fn json_mount(mount: &MountStatus) -> String {
    let (state, status) = match &mount.state {
        MountState::Serving(status) => ("serving", Some(status)),
        MountState::Silent(_) => ("no-answer", None),
        MountState::Killed => ("killed", None),
        MountState::NoRecord => ("no-record", None),
        MountState::OfOtherUser => ("other-user", None),
    };
    let reason = match &mount.state {
        MountState::Silent(reason) => quoted(reason),
        _ => NULL.to_owned(),
    };
    let mountpoints: Vec<_> = mount.mountpoints.iter().map(|point| name(point)).collect();
    let options = mount.options.as_ref().map(|options| shown(options).to_string());
    let is_writable = options.as_deref().map(|options| (options == "rw" || options.starts_with("rw,")).to_string());
    let files: &[FileStatus] = status.map_or(&[], |status| &status.files);
    let fields = [
        ("spec", or_null(known(mount.spec.as_ref()).map(name))),
        ("directory", or_null(known(&mount.directory).map(name))),
        ("mountpoints", array(&mountpoints)),
        ("options", or_null(options.as_deref().map(quoted))),
        ("writable", or_null(is_writable)),
        ("user", or_null(mount.user.map(|user| user.to_string()))),
        ("pid", or_null(mount.daemon.map(|daemon| daemon.to_string()))),
        ("state", quoted(state)),
        ("no-answer-because", reason),
        ("open-files", or_null(status.map(|status| status.open_files.to_string()))),
        ("memory", json_memory(mount, status)),
        ("files", array(&files.iter().map(json_file).collect::<Vec<_>>())),
        ("degraded", array(&files.iter().flat_map(|file| json_dense(file, true)).collect::<Vec<_>>())),
        ("all-data", array(&files.iter().flat_map(|file| json_dense(file, false)).collect::<Vec<_>>())),
    ];
    object(&fields)
}

fn json_memory(mount: &MountStatus, status: Option<&Status>) -> String {
    let of_status = |bytes: fn(&Status) -> crate::units::Bytes| or_null(status.map(|status| bytes(status).to_string()));
    object(&[
        ("maps", of_status(|status| status.map_memory)),
        ("maps-limit", of_status(|status| status.map_limit)),
        ("read-ahead", of_status(|status| status.read_ahead)),
        ("resident", or_null(mount.resident.map(|bytes| bytes.to_string()))),
    ])
}

fn json_file(file: &FileStatus) -> String {
    let (opens, maps) = (file.opens.to_string(), file.map_memory.to_string());
    object(&[("file", name(file.name.as_ref())), ("opens", opens), ("maps", maps)])
}

/// The layers of a file that are degraded, or those that are data by design.
fn json_dense(file: &FileStatus, is_degraded: bool) -> impl Iterator<Item = String> {
    let json = |DenseLayer { layer, reason, since, .. }: &DenseLayer| {
        let since = or_null(since.map(|since: SystemTime| quoted(&time(since))));
        object(&[
            ("file", name(file.name.as_ref())),
            ("layer", quoted(layer)),
            ("since", since),
            ("reason", quoted(reason)),
        ])
    };
    file.dense.iter().filter(move |dense| dense.is_degraded == is_degraded).map(json)
}

const NULL: &str = "null";

fn or_null(json: Option<String>) -> String {
    json.unwrap_or_else(|| NULL.to_owned())
}

/// A name as a string: its text if it is UTF-8, and else with escapes, as in the names of `info --json`.
fn name(name: &Path) -> String {
    name.to_str().map_or_else(|| quoted(&shown(name).to_string()), quoted)
}

fn array(values: &[String]) -> String {
    format!("[{}]", values.join(", "))
}

fn object(fields: &[(&str, String)]) -> String {
    let fields: Vec<_> = fields.iter().map(|(key, value)| format!("\"{key}\": {value}")).collect();
    format!("{{ {} }}", fields.join(", "))
}
