//! The sole use of a device or image, as long as its free space is shown as holes.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::Wanted;
use crate::error::{Error, Result};
use crate::export::Export;
use crate::source::{BlockDevice, Context, Guard, Stack, WriteGuard};
use crate::sys::device::{self, DeviceId};
use crate::sys::stamp::Stamp;

/// A device that nobody else may use exclusively, or an image whose times are watched.
///
/// A block device is opened with O_EXCL, as a mount does it (`bd_prepare_to_claim` of `block/bdev.c`): a mounted device is
/// refused, and cannot be mounted while it is open here. A program that writes to the device without O_EXCL is not kept
/// from it, but its writes are counted, and are found by [`Claim::holds`]. So are writes to a file below the device, by its times.
pub(super) struct Claim {
    kind: Kind,
    /// The writes of a device. One without counters is guarded by the claim alone.
    writes: Option<WriteGuard>,
    /// The files below a device, with their times: they can be written past the device, as by another loop device.
    files: Vec<(File, Stamp)>,
    /// The stack at the open: the table of a device-mapper device, or the binding of a loop device, may change.
    stack: Stack,
}

enum Kind {
    /// The descriptor holds the claim. There is none where only attributes are wanted.
    Device {
        _claimed: Option<Arc<File>>,
    },
    Image {
        file: File,
        stamp: Stamp,
    },
    /// A volume of a pool that is not active: its metadata is claimed while the pool is open.
    Volume,
}

impl Claim {
    /// Claims a device.
    ///
    /// # Errors
    /// EBUSY when it is mounted, or claimed otherwise. When there is no way to claim it.
    pub(super) fn new(export: &dyn Export, wanted: Wanted, context: &Context) -> Result<Self> {
        let kind = Kind::of(export, wanted)?;
        // Its dirty pages are written back before its metadata is read past its page cache, and before its writes are counted.
        let stack = export.stack(context);
        if !stack.write_back() {
            return Err(Error::failed("cannot write back the dirty pages").on(export.name()));
        }
        let writes = export.device().and_then(|device| WriteGuard::new(device).ok());
        let stamped = |file: &File| Ok((file.try_clone()?, Stamp::settled_in_time(file)?));
        let files = export.device().map(|_| stack.files().map(stamped).collect::<io::Result<_>>()).transpose();
        let files: Vec<_> = files.map_err(|error| refused(export, error))?.unwrap_or_default();
        if !files.iter().all(|(file, stamp): &(File, Stamp)| stamp.proves_unchanged(file)) {
            return Err(refused(
                export,
                io::Error::other("the times of a file below it do not prove that it is unchanged"),
            ));
        }
        Ok(Self { kind, writes, files, stack: stack.without_extents() })
    }

    /// Whether nobody wrote to the device since it was claimed.
    pub(super) fn holds(&self) -> bool {
        let unwritten = match &self.kind {
            Kind::Image { file, stamp } => stamp.proves_unchanged(file),
            Kind::Device { .. } | Kind::Volume => self.writes.as_ref().is_none_or(Guard::unchanged),
        };
        unwritten && self.files.iter().all(|(file, stamp)| stamp.proves_unchanged(file)) && self.stack.same_shape()
    }
}

impl Kind {
    fn of(export: &dyn Export, wanted: Wanted) -> Result<Self> {
        let refused = |error| refused(export, error);
        if let Some(device) = export.device() {
            let claimed = (wanted == Wanted::Contents).then(|| claimed(device)).transpose().map_err(refused)?;
            return Ok(Self::Device { _claimed: claimed });
        }
        if export.is_claimed() {
            return Ok(Self::Volume);
        }
        let no_claim = || refused(io::Error::other("nothing keeps other hosts from writing to it"));
        let file = export.regular_file().ok_or_else(no_claim)?.try_clone().map_err(refused)?;
        let stamp = Stamp::settled(&file).map_err(refused)?;
        if !stamp.proves_unchanged(&file) {
            const WRITTEN: &str =
                "it is open for writing, or its file system has no times that prove that it is unchanged";
            return Err(refused(io::Error::other(WRITTEN)));
        }
        Ok(Self::Image { file, stamp })
    }
}

fn refused(export: &dyn Export, error: io::Error) -> Error {
    let busy = error.raw_os_error() == Some(libc::EBUSY);
    let refused = Error::failed("its used space cannot be shown").on(export.name()).because(error);
    if busy { refused.hint("it is mounted or in use: unmount it, or show a snapshot of it") } else { refused }
}

/// A descriptor with the claim of a device. All views of this process share it: close(2) of one view returns before this process
/// gets the request for it, so that the next open may come first.
fn claimed(device: &BlockDevice) -> io::Result<Arc<File>> {
    static CLAIMED: Mutex<Option<HashMap<DeviceId, Weak<File>>>> = Mutex::new(None);
    let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
    let claimed = claimed.get_or_insert_default();
    claimed.retain(|_, file| file.strong_count() > 0);
    if let Some(file) = claimed.get(&device.id).and_then(Weak::upgrade) {
        return Ok(file);
    }
    let file = Arc::new(device::reopen_exclusive(&device.file)?);
    claimed.insert(device.id, Arc::downgrade(&file));
    Ok(file)
}
