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
use std::hash::{Hash, Hasher};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::shown;
use crate::map::Clip;
use crate::reason::DenseReason;
use crate::source::device::{BlockDevice, MediumGuard};
use crate::source::file::Reads;
use crate::source::{Guard, Layer, Resolver, dense, file};
use crate::sys::device::{self, DeviceId};
use crate::sys::loopdev::LoopStatus;
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
}

impl Guard for LoopGuard {
    fn unchanged(&self) -> bool {
        LoopStatus::of(&self.file).is_ok_and(|status| status == self.status)
    }

    fn trace(&self, mut trace: &mut dyn Hasher) {
        self.status.hash(&mut trace);
    }
}

/// The loop driver's major number (`Documentation/admin-guide/devices.txt`).
const MAJOR: u32 = 7;

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
    resolver.guard(LoopGuard { file: device.file.clone(), status });
    let below = match status.block_device {
        _ if status.encrypted => Err("it is encrypted".into()),
        Some(_) if !status.direct_io => Err(DenseReason::Unproven(BUFFERED.into())),
        Some(id) => Ok(resolver.device(id, status.offset.saturating_add(device.len))),
        None => backing_file(device, &status, resolver).map(Arc::new),
    };
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
            map: Arc::new(Clip { inner: below.map.clone(), start: status.offset, len: device.len }),
            device: None,
            below: vec![below],
        },
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
            Err(DenseReason::Unproven(why.into()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(DenseReason::Unproven(format!("its backing file is not reachable: {name}").into()))
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
