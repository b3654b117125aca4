//! A regular file: its holes come from lseek(2) on its file system.
//!
//! The holes must be those of the bytes that are read. Most local file systems take the page cache into account, which
//! reads use too, or do so once dirty pages are written back. A server of NFS or FUSE reports the holes of its own copy,
//! while the page cache of this machine may hold older bytes: its holes are used only where reads use direct I/O.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use log::warn;

use crate::error::{plain, shown};
use crate::map::{self, Extent, ExtentKind, HoleMap};
use crate::reason::{Degraded, DegradedState, DenseReason};
use crate::source::{Guard, Layer, Reach, Resolver, Trace, dense};
use crate::sys::device;
use crate::sys::file::{Seeks, end, len_now, next_data, next_hole, reads_from_server};
use crate::sys::stamp::Stamp;
use crate::units::Bytes;

/// Why a file on an unknown file system, or one with a server, is dense.
const STALE: &str = "its file system is not known to find holes only where reads find zeros: ext4, XFS, btrfs and tmpfs are, \
                     and NFS and FUSE below a loop device with direct I/O (losetup --direct-io=on)";

/// The extents of an open file. Each question calls lseek(2), so each answer is true now, delayed allocation included.
pub struct FileMap {
    file: File,
    len: Bytes,
    seeks: Seeks,
    /// Whether the last lseek failed.
    failing: DegradedState,
}

impl FileMap {
    /// The map of a file of `len` bytes. The descriptor must be private: lseek moves its position.
    pub fn new(file: File, len: Bytes) -> Self {
        let seeks = Seeks::of(&file);
        Self { file, len, seeks, failing: DegradedState::default() }
    }

    fn size(&self) -> io::Result<Bytes> {
        size(&self.file, self.seeks)
    }

    fn try_run(&self, offset: Bytes) -> io::Result<Extent> {
        let size = self.size()?;
        if offset >= size {
            // Past the end of a file that was cut short: a loop device answers such reads with an error, not with zeros.
            return Ok(Extent { end: self.len, kind: ExtentKind::Data });
        }
        let end_of_map = size.min(self.len);
        match next_data(&self.file, offset)? {
            Some(data) if data > offset => Ok(Extent { end: data.min(end_of_map), kind: ExtentKind::Hole }),
            Some(_) => {
                let data_end = next_hole(&self.file, offset)?.unwrap_or(end_of_map);
                Ok(Extent { end: data_end.min(end_of_map), kind: ExtentKind::Data })
            }
            // "No more data" and "past the end" have the same errno. With an unchanged size it is the former.
            None if self.size()? == size => Ok(Extent { end: end_of_map, kind: ExtentKind::Hole }),
            None => Ok(Extent { end: end_of_map, kind: ExtentKind::Data }),
        }
    }

    /// The next data, if one call finds it. Then the file is at least as long.
    fn quick_data(&self, offset: Bytes) -> Option<Bytes> {
        let data = next_data(&self.file, offset).ok()?.filter(|&data| data >= offset)?;
        self.failing.clear();
        Some(data.min(self.len))
    }

    /// The next hole, if two calls find it: one for the hole, and one that proves it is not the end of a file that was cut
    /// short.
    fn quick_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        let Seeks::Exact { unit } = self.seeks else { return None };
        let hole = next_hole(&self.file, offset).ok()?.filter(|&hole| offset <= hole && hole < self.len)?;
        self.failing.clear();
        let unit_end = hole.align_down(unit).checked_add(unit)?;
        (end(&self.file).ok()? == self.len).then(|| hole..unit_end.min(self.len))
    }
}

impl HoleMap for FileMap {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let one_more = offset.saturating_add(Bytes::new(1));
        match self.try_run(offset) {
            Ok(run) => {
                self.failing.clear();
                Extent { end: run.end.max(one_more), kind: run.kind }
            }
            Err(error) => {
                let failed = format!("lseek on the backing file failed at {offset}: {}", plain(&error));
                warn!("{failed}: shown as data");
                self.failing.set(failed);
                Extent { end: self.len.max(one_more), kind: ExtentKind::Data }
            }
        }
    }

    fn next_data(&self, offset: Bytes) -> Bytes {
        self.quick_data(offset).unwrap_or_else(|| map::next_data_by_extents(self, offset))
    }

    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        self.quick_hole(offset).or_else(|| map::next_hole_by_extents(self, offset))
    }

    fn data_inside(&self, offset: Bytes) -> Option<Bytes> {
        self.quick_data(offset).filter(|&data| data < self.len)
    }

    fn hole_inside(&self, offset: Bytes) -> Option<Range<Bytes>> {
        self.quick_hole(offset)
    }

    fn allocated(&self) -> Option<Bytes> {
        // st_blocks counts sectors of 512 bytes on every Linux file system, and the file system's own blocks too.
        let blocks = self.file.metadata().ok()?.blocks();
        Some(Bytes::new(blocks.checked_mul(512)?).min(self.len))
    }

    fn degraded(&self) -> Option<Degraded> {
        self.failing.now()
    }
}

/// The length of a file now. lseek takes half the time of fstat, but a file system with a server may answer it from its
/// cache.
fn size(file: &File, seeks: Seeks) -> io::Result<Bytes> {
    match seeks {
        Seeks::Elsewhere => len_now(file),
        Seeks::Exact { .. } | Seeks::AfterWriteBack => end(file),
    }
}

/// Guards the length of a file. Its extents are asked live, and need no guard.
struct FileSizeGuard {
    file: File,
    len: Bytes,
    seeks: Seeks,
}

impl Guard for FileSizeGuard {
    fn unchanged(&self) -> bool {
        size(&self.file, self.seeks).is_ok_and(|len| len == self.len)
    }
}

/// The times of a file below a device. They change when the file is written past the device.
struct Times(File);

impl Guard for Times {
    /// The extents are asked live, so they are always valid.
    fn unchanged(&self) -> bool {
        true
    }

    fn file(&self) -> Option<&File> {
        Some(&self.0)
    }

    fn trace(&self, trace: &mut Trace) {
        match Stamp::of(&self.0) {
            Ok(stamp) => trace.add_file(&stamp),
            Err(_) => trace.limit(Reach::Nothing),
        }
    }
}

/// How the bytes of a file are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// Through its page cache.
    Cached,
    /// With direct I/O, past its page cache.
    Direct,
}

/// The layer of a regular file, exported as it is.
pub fn layer(file: &File, path: &Path, len: Bytes, reads: Reads, resolver: &mut Resolver<'_>) -> Layer {
    let name = shown(path).to_string();
    match (file.try_clone(), device::reopen(file)) {
        (Ok(same), Ok(private)) => {
            let seeks = Seeks::of(&same);
            resolver.guard(FileSizeGuard { file: same, len, seeks });
            backing(private, name, len, reads, resolver)
        }
        (Err(error), _) | (_, Err(error)) => {
            dense::layer(name, "file", len, DenseReason::cannot("open it once more", &error))
        }
    }
}

/// The layer of a file below a device. The device guards its own length.
pub fn backing(file: File, name: String, len: Bytes, reads: Reads, resolver: &mut Resolver<'_>) -> Layer {
    let (times, pages) = match (file.try_clone(), file.try_clone()) {
        (Ok(times), Ok(pages)) => (times, pages),
        (Err(error), _) | (_, Err(error)) => {
            return dense::layer(name, "file", len, DenseReason::cannot("duplicate its descriptor", &error));
        }
    };
    resolver.guard(Times(times));
    // On any other file system it is not known that lseek reports the bytes that are read.
    let is_from_server = reads_from_server(&file);
    let map = FileMap::new(file, len);
    if map.seeks == Seeks::Elsewhere && !(reads == Reads::Direct && is_from_server) {
        return dense::layer(name, "file", len, DenseReason::Unproven(STALE.into()));
    }
    if !matches!(map.seeks, Seeks::Exact { .. }) {
        resolver.written_through(pages);
    }
    Layer {
        name,
        kind: "file".to_owned(),
        holes_from: "SEEK_HOLE of its file system".to_owned(),
        map: Arc::new(map),
        device: None,
        below: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nix::fcntl::FallocateFlags;

    use super::*;

    const PUNCH: FallocateFlags = FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(FallocateFlags::FALLOC_FL_KEEP_SIZE);

    #[test]
    fn the_extents_are_those_of_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 256 << 10).unwrap();
        let map = FileMap::new(file.try_clone().unwrap(), Bytes::new(1 << 20));
        let run = |at: u64| (map.extent_at(Bytes::new(at)).end.get(), map.extent_at(Bytes::new(at)).kind);
        assert_eq!(run(0), (256 << 10, ExtentKind::Hole));
        assert_eq!(run((256 << 10) - 1), (256 << 10, ExtentKind::Hole));
        assert_eq!(run(256 << 10), ((256 << 10) + 4096, ExtentKind::Data));
        assert_eq!(run((256 << 10) + 4096), (1 << 20, ExtentKind::Hole));
        // A write is seen at once; what is past the end of a shorter file is data.
        file.write_all_at(&[1; 4096], 0).unwrap();
        assert_eq!(run(0), (4096, ExtentKind::Data));
        file.set_len(512 << 10).unwrap();
        assert_eq!(run(300 << 10), (512 << 10, ExtentKind::Hole));
        assert_eq!(run(512 << 10), (1 << 20, ExtentKind::Data));
    }

    #[test]
    fn a_file_that_cannot_be_seeked_is_data_with_a_reason() {
        use std::os::unix::fs::OpenOptionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        // lseek(2) of such a descriptor is EBADF.
        let path_only = File::options().read(true).custom_flags(libc::O_PATH).open(file.path()).unwrap();
        let map = FileMap::new(path_only, Bytes::new(4096));
        assert_eq!(map.degraded(), None);
        assert_eq!(map.extent_at(Bytes::ZERO), Extent { end: Bytes::new(4096), kind: ExtentKind::Data });
        assert!(map.degraded().unwrap().reason.starts_with("lseek on the backing file failed at 0: "));
    }

    /// Compares the quick answers with those found extent by extent, on file systems for which quick answers are used.
    #[test]
    fn quick_answers_equal_those_found_extent_by_extent() {
        const LEN: u64 = 4 << 20;
        for directory in [std::env::temp_dir(), "/dev/shm".into()] {
            let Ok(file) = tempfile::tempfile_in(directory) else { continue };
            file.set_len(LEN).unwrap();
            let map = FileMap::new(file.try_clone().unwrap(), Bytes::new(LEN));
            let mut state = 1_u64;
            let mut random = |below: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) % below
            };
            for round in 0..300 {
                let (start, len) = (random(LEN - 100_000), 1 + random(60_000));
                let (offset, end) = (i64::try_from(start).unwrap(), i64::try_from(start + len).unwrap());
                match round % 4 {
                    0 => drop(nix::fcntl::fallocate(&file, FallocateFlags::empty(), offset, end - offset)),
                    1 => drop(nix::fcntl::fallocate(&file, PUNCH, offset, end - offset)),
                    _ => file.write_all_at(&vec![1; usize::try_from(len).unwrap()], start).unwrap(),
                }
                let at = Bytes::new(random(LEN));
                assert_eq!(map.next_data(at), map::next_data_by_extents(&map, at), "round {round}, data at {at}");
                let (quick, slow) = (map.next_hole(at), map::next_hole_by_extents(&map, at));
                assert_eq!(quick.is_some(), slow.is_some(), "round {round}, hole at {at}");
                for (quick, slow) in quick.into_iter().zip(slow) {
                    assert!(quick.start == slow.start && quick.end <= slow.end, "{quick:?} of {slow:?}");
                }
            }
            // Cut short: what is behind the end is no hole.
            file.set_len(LEN / 2).unwrap();
            assert_eq!(map.next_hole(Bytes::new(LEN / 2)), None);
            assert!(map.next_hole(Bytes::ZERO).is_none_or(|hole| hole.end.get() <= LEN / 2));
        }
    }
}
