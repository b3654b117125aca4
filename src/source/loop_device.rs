//! A loop device: the holes of its backing file, shifted by its offset.
//!
//! The kernel names the backing file twice: by device and inode (`LOOP_GET_STATUS64`) and by path (sysfs). A file
//! is used only if it was opened by that path and has that inode. It has a descriptor of its own, because lseek moves the
//! position of a descriptor.
//!
//! Without direct I/O the driver reads through the page cache of what it is bound to (`do_req_filebacked` of
//! `drivers/block/loop.c`). The page cache of a block device keeps pages that were discarded below it, by a mounted file
//! system for example: there a hole below is no hole above.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::shown;
use crate::map::{Clip, Extent, HoleMap};
use crate::reason::DenseReason;
use crate::source::device::{BlockDevice, MediumGuard};
use crate::source::file::Reads;
use crate::source::{Guard, Layer, Reach, Resolver, Trace, below, dense, file};
use crate::sys::device::{self, DeviceId};
use crate::sys::loopdev::{LoopStatus, MAJOR};
use crate::sys::sysfs;
use crate::units::Bytes;

/// Why a loop device over a block device is dense without direct I/O.
const BUFFERED: &str = "it reads through the page cache of the device below, which may be older than that device: \
                        switch on direct I/O (losetup --direct-io=on)";

/// The binding of a loop device. Its offset and direct I/O can change without a new disk sequence number, so the guard
/// reads the status itself.
struct LoopGuard {
    file: Arc<File>,
    status: LoopStatus,
    /// Whether the stack has a guard of what the device is bound to.
    guards_below: bool,
    /// Whether all that was written to the block device below is in its counters, and not in its page cache.
    counts_below: bool,
}

impl Guard for LoopGuard {
    fn unchanged(&self) -> bool {
        LoopStatus::of(&self.file).is_ok_and(|status| status == self.status)
    }

    /// A file that cannot be reached may be written without a trace. It counts as unchanged while the device is open.
    fn trace(&self, trace: &mut Trace) {
        trace.add(&self.status);
        match self.status.block_device {
            Some(below) => {
                if !self.counts_below {
                    trace.limit(Reach::Open);
                }
                trace.add_or_nothing(sysfs::incarnations(below));
                trace.add_or_nothing(below::activity(below));
            }
            None if self.guards_below => {}
            None => trace.limit(Reach::Open),
        }
    }
}

/// Whether a device is a loop device.
///
/// # Errors
/// None: the number decides.
pub fn is_loop(id: DeviceId) -> io::Result<bool> {
    Ok(id.major == MAJOR)
}

/// The layer of a loop device.
pub fn layer(device: &BlockDevice, resolver: &mut Resolver<'_>) -> Layer {
    // Before the status is read: a new binding from here on is seen.
    let medium = MediumGuard::new(device);
    let dense = |reason: DenseReason| dense::layer(device.name(), "loop", device.len, reason);
    let status = match LoopStatus::of(&device.file) {
        Ok(status) => status,
        Err(error) => {
            resolver.guard(medium);
            return dense(match error.raw_os_error() {
                Some(libc::ENXIO) => DenseReason::State("nothing is bound to it".into()),
                _ => DenseReason::cannot("read its status", &error),
            });
        }
    };
    let mut counts_below = true;
    let below = match status.block_device {
        _ if status.encrypted => Err("it is encrypted".into()),
        Some(id) if !status.direct_io => {
            counts_below = resolver.read_cached(id);
            Err(DenseReason::Unproven(BUFFERED.into()))
        }
        Some(id) => Ok(resolver.device(id, status.offset.saturating_add(device.len))),
        None => backing_file(device, &status, resolver).map(Arc::new),
    };
    let guards_below = below.is_ok();
    resolver.guard(LoopGuard { file: device.file.clone(), status, guards_below, counts_below });
    // A regular file is held open below, so no other file has its inode number: the status alone proves the binding.
    if status.block_device.is_some() || below.is_err() {
        resolver.guard(medium);
    }
    match below {
        Err(reason) => dense(reason),
        Ok(below) => Layer {
            name: device.name(),
            kind: "loop".to_owned(),
            holes_from: "its backing file".to_owned(),
            map: window(Clip { inner: below.map.clone(), start: status.offset, len: device.len }, &status),
            device: None,
            below: vec![below],
        },
    }
}

/// The map of a loop device that is this part of what it is bound to.
fn window(clip: Clip, status: &LoopStatus) -> Arc<dyn HoleMap> {
    if status.block_device.is_some() { Arc::new(clip) } else { Arc::new(FileWindow(clip)) }
}

/// The part of a regular file that a loop device shows.
///
/// The length of a loop device is that of its file at the time of the binding, or at the last request to take it over
/// (`loop_set_capacity` of `drivers/block/loop.c`). Where the file has data or a hole, it is at least as long. So an answer
/// that a look at the file gave is right for a device that has become longer or shorter since: there is no need to ask for
/// its length. The only exception is a device whose file was cut short, taken over, and made longer again. An answer may
/// then lie behind the end of the device; the bytes up to there that the device has are as it says.
struct FileWindow(Clip);

impl FileWindow {
    /// The offset in the file, if it is there.
    fn in_file(&self, offset: Bytes) -> Option<Bytes> {
        self.0.start.checked_add(offset).filter(|&at| at < self.0.inner.len())
    }
}

impl HoleMap for FileWindow {
    fn len(&self) -> Bytes {
        self.0.len()
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        self.0.extent_at(offset)
    }

    fn next_data(&self, offset: Bytes) -> Bytes {
        self.0.next_data(offset)
    }

    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        self.0.next_hole(offset)
    }

    fn data_inside(&self, offset: Bytes) -> Option<Bytes> {
        let data = self.0.inner.data_inside(self.in_file(offset)?)?.checked_sub(self.0.start)?;
        (data < self.0.len).then_some(data)
    }

    fn hole_inside(&self, offset: Bytes) -> Option<Range<Bytes>> {
        let hole = self.0.inner.hole_inside(self.in_file(offset)?)?;
        let (start, end) = (hole.start.checked_sub(self.0.start)?, hole.end.checked_sub(self.0.start)?);
        (end <= self.0.len).then_some(start..end)
    }

    fn allocated(&self) -> Option<Bytes> {
        self.0.allocated()
    }

    fn dense_because(&self) -> Option<DenseReason> {
        self.0.dense_because()
    }

    fn memory(&self) -> Bytes {
        self.0.memory()
    }
}

/// Opens the backing file of a loop device, or says why that cannot be done.
fn backing_file(device: &BlockDevice, status: &LoopStatus, resolver: &mut Resolver<'_>) -> Result<Layer, DenseReason> {
    let path = sysfs::bytes(device.id, "loop/backing_file")
        .map_err(|error| DenseReason::cannot("read the path of its backing file", &error))?;
    // `file_path` of `fs/d_path.c` escapes nothing.
    let path = PathBuf::from(OsString::from_vec(path.ok_or("its backing file is not known")?));
    let name = shown(&path).to_string();
    match open_if_same(&path, status) {
        Ok(Some(file)) => {
            let len = file.metadata().map_err(|error| DenseReason::cannot("stat its backing file", &error))?.len();
            let reads = if status.direct_io { Reads::Direct } else { Reads::Cached };
            Ok(file::backing(file, name, Bytes::new(len), reads, resolver))
        }
        Ok(None) => {
            let why =
                format!("{name} is not the file that is bound to it: that was moved, or is in another mount namespace");
            Err(DenseReason::State(why.into()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(DenseReason::State(format!("its backing file is not reachable: {name}").into()))
        }
        Err(error) => Err(DenseReason::cannot(format!("open its backing file {name}"), &error)),
    }
}

/// Opens `path` when it is the file that the loop device is bound to.
fn open_if_same(path: &Path, status: &LoopStatus) -> io::Result<Option<File>> {
    let file = device::open(path, false)?;
    let metadata = file.metadata()?;
    let same = DeviceId::from_dev(metadata.dev()) == status.device && metadata.ino() == status.inode;
    Ok((same && metadata.file_type().is_file()).then_some(file))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::map::view::{self, Whence};
    use crate::source::file::FileMap;

    /// For windows of any offset and length in a file, and at any offset in them.
    #[test]
    fn answers_inside_equal_the_answers_that_look_at_the_length() {
        const UNIT: u64 = 4096;
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 * UNIT).unwrap();
        for unit in [1, 2, 5, 9, 12] {
            file.write_all_at(&[1; UNIT as usize], unit * UNIT).unwrap();
        }
        let inner: Arc<dyn HoleMap> = Arc::new(FileMap::new(file, Bytes::new(16 * UNIT)));
        let mut inside = 0;
        for (start, len) in [(0, 16 * UNIT), (UNIT, 8 * UNIT), (512, 11 * UNIT), (3 * UNIT, 40 * UNIT), (0, 7 * 512)] {
            let clip = Clip { inner: inner.clone(), start: Bytes::new(start), len: Bytes::new(len) };
            let map = FileWindow(clip);
            for offset in (0..len + 2 * UNIT).step_by(512).map(Bytes::new) {
                for whence in [Whence::Data, Whence::Hole] {
                    let align = Bytes::new(UNIT);
                    if let Some(found) = view::seek_inside(&map, align, offset, whence) {
                        assert_eq!(
                            Some(found),
                            view::seek(&map, align, offset, whence),
                            "{whence:?} {offset} of {start}"
                        );
                        assert!(found < map.len());
                        inside += 1;
                    }
                }
            }
        }
        assert!(inside > 100, "most answers lie inside, and not {inside}");
    }
}
