//! What a device holds, and its used space: the entry point of this module.
//!
//! A device may hold one thing only. The signatures of two kinds on one device mean that it is not certain which of them is
//! the right one, so nothing of it is free. That also holds for the signatures of containers and file systems that this
//! program cannot read ([`foreign`]).

mod foreign;

use std::sync::Arc;

use super::window::Window;
use super::{ReadBytes, btrfs, ext, partitions, swap, xfs};
use crate::map::{Concat, ExtentKind, FillMap, FreeSpace, HoleMap, Uniform};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The start of a device in which all signatures of the known kinds are: that of btrfs is behind 64 KiB.
const HEAD: u64 = 128 << 10;

/// A kind of contents whose used space can be found.
struct Kind {
    name: &'static str,
    /// Whether a device that begins with these bytes has the signature.
    is: fn(&[u8]) -> bool,
    /// Its used space.
    used: fn(&dyn ReadBytes) -> Result<FillMap, DenseReason>,
}

/// All kinds, apart from tables of partitions.
const KINDS: &[Kind] = &[
    Kind { name: "ext4", is: ext::is_ext, used: ext::used },
    Kind { name: "XFS", is: xfs::is_xfs, used: xfs::used },
    Kind { name: "swap", is: swap::is_swap, used: swap::used },
    Kind { name: "btrfs", is: btrfs::is_btrfs, used: btrfs::used },
];

/// The name of a table of partitions in [`UsedSpace::kind`].
const PARTITIONS: &str = "partitions";

/// The used space of a device.
pub struct UsedSpace {
    /// What it holds: a file system, `swap`, or `partitions`.
    pub kind: &'static str,
    /// Data, and [`ExtentKind::Free`].
    pub map: Arc<dyn HoleMap>,
    /// The partitions of a disk in the order of their positions: what each holds, or why all of it is data.
    pub parts: Vec<(String, Result<&'static str, DenseReason>)>,
}

/// What a device holds by its signatures only, for lists. [`used_space`] may refuse it nevertheless.
pub fn recognise(device: &dyn ReadBytes) -> Option<&'static str> {
    let head = read_head(device).ok()?;
    let kind = single_kind(&head, device.len()).ok()??;
    Some(kind.map_or(PARTITIONS, |kind| kind.name))
}

/// The used space of a device, to which nobody else may write.
///
/// # Errors
/// When it is not understood, not clean or damaged, when it has the signatures of several kinds, and when it cannot be read.
/// A partition for which that is so is data, and no error.
pub fn used_space(device: &dyn ReadBytes) -> Result<UsedSpace, DenseReason> {
    match certain_kind(device)? {
        Some(kind) => used_by(kind, device),
        None => partitions_used(device),
    }
}

/// The used space of a device that holds that kind.
fn used_by(kind: &Kind, device: &dyn ReadBytes) -> Result<UsedSpace, DenseReason> {
    let used = (kind.used)(device).map_err(|reason| reason.of_kind(kind.name))?;
    Ok(UsedSpace { kind: kind.name, map: Arc::new(FreeSpace::new(used)), parts: Vec::new() })
}

/// The used space of a disk with partitions. All that is outside of partitions is data.
fn partitions_used(device: &dyn ReadBytes) -> Result<UsedSpace, DenseReason> {
    let data = |len: Bytes| Arc::new(Uniform { len, kind: ExtentKind::Data }) as Arc<dyn HoleMap>;
    let mut maps = Vec::new();
    let mut parts = Vec::new();
    let mut at = Bytes::ZERO;
    for partition in partitions::read(device).map_err(|reason| reason.of_kind(PARTITIONS))? {
        let len = partition.end.saturating_sub(partition.start);
        let window = Window::new(device, partition.start, len).ok_or("a partition lies beyond its end")?;
        let used = certain_kind(&window).and_then(|kind| used_by(kind.ok_or("it has partitions itself")?, &window));
        let (map, part) = match used {
            Ok(used) => (used.map, Ok(used.kind)),
            Err(reason) => (data(len), Err(reason)),
        };
        maps.extend([data(partition.start.saturating_sub(at)), map]);
        parts.push((format!("partition {}", partition.number), part));
        at = partition.end;
    }
    maps.push(data(device.len().saturating_sub(at)));
    let map = Concat::new(maps).ok_or("its partitions are too large")?;
    Ok(UsedSpace { kind: PARTITIONS, map: Arc::new(map), parts })
}

/// What a device holds, without any doubt. `None` is a table of partitions.
fn certain_kind(device: &dyn ReadBytes) -> Result<Option<&'static Kind>, DenseReason> {
    let unreadable = |error| DenseReason::cannot("read its signatures", &error);
    let head = read_head(device).map_err(unreadable)?;
    let kind = single_kind(&head, device.len())?;
    let name = kind.flatten().map_or(PARTITIONS, |kind| kind.name);
    match (kind, foreign::found(device, &head).map_err(unreadable)?) {
        (Some(_), Some(other)) => Err(format!("it has the signatures of {name} and of {other}").into()),
        (None, Some(other)) => Err(format!("the free space of {other} is not supported").into()),
        (None, None) => Err("it holds no file system that is known here".into()),
        (Some(kind), None) => Ok(kind),
    }
}

/// The kind whose signature is in the head of a device: `Some(None)` is a table of partitions, `None` is nothing known.
///
/// # Errors
/// When there are several.
fn single_kind(head: &[u8], len: Bytes) -> Result<Option<Option<&'static Kind>>, DenseReason> {
    let of_kinds = KINDS.iter().filter(|kind| (kind.is)(head)).map(Some);
    let found: Vec<_> = of_kinds.chain(partitions::is_partitioned(head, len).then_some(None)).collect();
    match found[..] {
        [] => Ok(None),
        [kind] => Ok(Some(kind)),
        _ => {
            let names: Vec<_> = found.iter().map(|kind| kind.map_or(PARTITIONS, |kind| kind.name)).collect();
            Err(format!("it has the signatures of {}", names.join(" and of ")).into())
        }
    }
}

fn read_head(device: &dyn ReadBytes) -> std::io::Result<Vec<u8>> {
    let mut head = vec![0; device.len().get().min(HEAD) as usize];
    device.read_exact(Bytes::ZERO, &mut head)?;
    Ok(head)
}

#[cfg(test)]
mod tests;
