//! The first cluster of an image: the header, its extensions, and the name of the backing file.

use super::shape::Shape;
use super::{ClusterSize, Error};
use crate::units::Bytes;

/// `QFI` and 0xFB.
const MAGIC: u32 = 0x5146_49FB;
const VERSION: u32 = 3;
/// The length of the header of version 3, without the fields that are optional.
const HEADER_LENGTH: u32 = 104;
/// The logarithm of the bits of a refcount: 16.
const REFCOUNT_ORDER: u32 = 4;
/// The extension with the format of the backing file. QEMU warns about images without it, as it would have to guess.
const BACKING_FORMAT: u32 = 0xE279_2ACA;
/// The longest name of a backing file.
pub const LONGEST_BACKING_NAME: usize = 1023;

/// The format of a backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingFormat {
    /// The bytes of a device.
    Raw,
    /// A qcow2 image.
    Qcow2,
}

/// The file that has the unchanged clusters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The file's name, as QEMU takes it: a relative name is relative to the folder of the image, and a name with a colon
    /// before the first slash names a protocol.
    pub name: Vec<u8>,
    /// The file's format.
    pub format: BackingFormat,
}

impl Backing {
    /// # Errors
    /// If QEMU would read another name than this, or none.
    pub(super) fn check(&self) -> Result<(), Error> {
        let valid = (1..=LONGEST_BACKING_NAME).contains(&self.name.len()) && !self.name.contains(&0);
        valid.then_some(()).ok_or(Error::BackingName)
    }
}

/// The bytes of the first cluster up to the last that is not zero.
pub(super) fn encode(size: Bytes, cluster: ClusterSize, shape: &Shape, backing: Option<&Backing>) -> Vec<u8> {
    let mut extensions = Vec::new();
    if let Some(backing) = backing {
        let format: &[u8] = match backing.format {
            BackingFormat::Raw => b"raw",
            BackingFormat::Qcow2 => b"qcow2",
        };
        extensions.extend(BACKING_FORMAT.to_be_bytes());
        extensions.extend((format.len() as u32).to_be_bytes());
        extensions.extend(format);
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    }
    // The end of the extensions: type and length are zero.
    extensions.extend([0; 8]);
    let name: &[u8] = backing.map_or(&[], |backing| &backing.name);
    let name_at = if name.is_empty() { 0 } else { u64::from(HEADER_LENGTH) + extensions.len() as u64 };
    let mut header = Vec::new();
    let put32 = |header: &mut Vec<u8>, value: u32| header.extend(value.to_be_bytes());
    let put64 = |header: &mut Vec<u8>, value: u64| header.extend(value.to_be_bytes());
    put32(&mut header, MAGIC);
    put32(&mut header, VERSION);
    put64(&mut header, name_at);
    put32(&mut header, name.len() as u32);
    put32(&mut header, cluster.get().trailing_zeros());
    put64(&mut header, size.get());
    put32(&mut header, 0); // not encrypted
    put32(&mut header, shape.l1_entries as u32);
    put64(&mut header, shape.l1 * cluster.get());
    put64(&mut header, shape.refcount_table * cluster.get());
    put32(&mut header, (shape.refcount_blocks - shape.refcount_table) as u32);
    put32(&mut header, 0); // no snapshots
    put64(&mut header, 0); // and no table of them
    put64(&mut header, 0); // no incompatible features
    put64(&mut header, 0); // no compatible features
    put64(&mut header, 0); // no autoclear features
    put32(&mut header, REFCOUNT_ORDER);
    put32(&mut header, HEADER_LENGTH);
    header.extend(extensions);
    header.extend(name);
    header
}
