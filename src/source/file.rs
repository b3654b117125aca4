//! A regular file: its file system knows the holes.
//!
//! The answer must be about what is read. Most local file systems answer from the page cache that reads go through, or
//! do so once dirty pages are written back. A server, of NFS or FUSE for example, answers from what it has, and the page
//! cache of this machine may hold older bytes: there is a hole only where reads are known to use direct I/O.

use std::fs::File;
use std::hash::{Hash, Hasher};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use log::warn;

use crate::error::{plain, shown};
use crate::map::{self, Extent, HoleMap, Kind};
use crate::source::{Guard, Layer, Resolver, dense};
use crate::sys::device;
use crate::sys::file::{Seeks, end, len_now, next_data, next_hole, reads_from_server};
use crate::sys::stamp::{self, Stamp};
use crate::units::Bytes;

/// Why a file on an unknown file system, or one with a server, is dense.
const STALE: &str = "its file system is not known to find holes only where reads find zeros: ext4, XFS, btrfs and tmpfs are, \
                     and NFS and FUSE below a loop device with direct I/O (losetup --direct-io=on)";

/// The runs of an open file, asked from its file system at every question: always the truth of now, delayed allocation
/// included.
pub struct FileMap {
    file: File,
    len: Bytes,
    seeks: Seeks,
}

impl FileMap {
    /// The map of a file of `len` bytes. The descriptor must be private: lseek moves its position.
    pub fn new(file: File, len: Bytes) -> Self {
        let seeks = Seeks::of(&file);
        Self { file, len, seeks }
    }

    fn size(&self) -> io::Result<Bytes> {
        size(&self.file, self.seeks)
    }

    fn try_run(&self, offset: Bytes) -> io::Result<Extent> {
        let size = self.size()?;
        if offset >= size {
            // Past the end of a file that was cut short: a loop device answers such reads with an error, not with zeros.
            return Ok(Extent { end: self.len, kind: Kind::Data });
        }
        let end_of_map = size.min(self.len);
        match next_data(&self.file, offset)? {
            Some(data) if data > offset => Ok(Extent { end: data.min(end_of_map), kind: Kind::Hole }),
            Some(_) => {
                let data_end = next_hole(&self.file, offset)?.unwrap_or(end_of_map);
                Ok(Extent { end: data_end.min(end_of_map), kind: Kind::Data })
            }
            // "No more data" and "past the end" are one errno: only an unchanged size tells them apart.
            None if self.size()? == size => Ok(Extent { end: end_of_map, kind: Kind::Hole }),
            None => Ok(Extent { end: end_of_map, kind: Kind::Data }),
        }
    }

    /// The next data, when one call answers: then the file goes on up to there.
    fn quick_data(&self, offset: Bytes) -> Option<Bytes> {
        next_data(&self.file, offset).ok()?.filter(|&data| data >= offset).map(|data| data.min(self.len))
    }

    /// The next hole, when two calls answer: one finds it, and one tells it from the end of a file that was cut short.
    fn quick_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        let Seeks::Exact { unit } = self.seeks else { return None };
        let hole = next_hole(&self.file, offset).ok()?.filter(|&hole| offset <= hole && hole < self.len)?;
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
            Ok(run) => Extent { end: run.end.max(one_more), kind: run.kind },
            Err(error) => {
                warn!("lseek on the backing file failed at {offset}: {}: taken for data", plain(&error));
                Extent { end: self.len.max(one_more), kind: Kind::Data }
            }
        }
    }

    fn next_data(&self, offset: Bytes) -> Bytes {
        self.quick_data(offset).unwrap_or_else(|| map::next_data_by_runs(self, offset))
    }

    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        self.quick_hole(offset).or_else(|| map::next_hole_by_runs(self, offset))
    }

    fn allocated(&self) -> Option<Bytes> {
        // st_blocks counts sectors of 512 bytes on every Linux file system, and the file system's own blocks too.
        let blocks = self.file.metadata().ok()?.blocks();
        Some(Bytes::new(blocks.checked_mul(512)?).min(self.len))
    }
}

/// The length of a file now. lseek costs half of fstat, but a file system with a server may answer it from memory.
fn size(file: &File, seeks: Seeks) -> io::Result<Bytes> {
    match seeks {
        Seeks::Elsewhere => len_now(file),
        Seeks::Exact { .. } | Seeks::AfterWriteBack => end(file),
    }
}

/// The file's length: everything else about it is asked live.
struct SizeGuard {
    file: File,
    len: Bytes,
    seeks: Seeks,
}

impl Guard for SizeGuard {
    fn unchanged(&self) -> bool {
        size(&self.file, self.seeks).is_ok_and(|len| len == self.len)
    }
}

/// The times of a file below a device, which move when it is written past the device.
struct Times(File);

impl Guard for Times {
    /// The map is asked from the file system at every question, so it is always true.
    fn unchanged(&self) -> bool {
        true
    }

    /// Times that prove nothing yet are like no others: what was written a moment ago may be written once more unseen.
    fn trace(&self, mut trace: &mut dyn Hasher) {
        match Stamp::of(&self.0) {
            Ok(stamp) => stamp.hash(&mut trace),
            Err(_) => stamp::later_than_before().hash(&mut trace),
        }
    }
}

/// How those who read a file read it.
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
            resolver.guard(SizeGuard { file: same, len, seeks });
            backing(private, name, len, reads, resolver)
        }
        (Err(error), _) | (_, Err(error)) => {
            dense::layer(name, "file", len, format!("cannot open it once more: {}", plain(&error)))
        }
    }
}

/// The layer of a file that a device stands on; the device has guards of its own.
pub fn backing(file: File, name: String, len: Bytes, reads: Reads, resolver: &mut Resolver<'_>) -> Layer {
    let (times, pages) = match (file.try_clone(), file.try_clone()) {
        (Ok(times), Ok(pages)) => (times, pages),
        (Err(error), _) | (_, Err(error)) => {
            return dense::layer(name, "file", len, format!("cannot use its descriptor twice: {}", plain(&error)));
        }
    };
    resolver.guard(Times(times));
    // On any other file system nothing says that its seeks are about what is read.
    let is_from_server = reads_from_server(&file);
    let map = FileMap::new(file, len);
    if map.seeks == Seeks::Elsewhere && !(reads == Reads::Direct && is_from_server) {
        return dense::layer(name, "file", len, STALE);
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
    fn the_runs_of_a_sparse_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 256 << 10).unwrap();
        let map = FileMap::new(file.try_clone().unwrap(), Bytes::new(1 << 20));
        let run = |at: u64| (map.extent_at(Bytes::new(at)).end.get(), map.extent_at(Bytes::new(at)).kind);
        assert_eq!(run(0), (256 << 10, Kind::Hole));
        assert_eq!(run((256 << 10) - 1), (256 << 10, Kind::Hole));
        assert_eq!(run(256 << 10), ((256 << 10) + 4096, Kind::Data));
        assert_eq!(run((256 << 10) + 4096), (1 << 20, Kind::Hole));
        // A write is seen at once; what is past the end of a shorter file is data.
        file.write_all_at(&[1; 4096], 0).unwrap();
        assert_eq!(run(0), (4096, Kind::Data));
        file.set_len(512 << 10).unwrap();
        assert_eq!(run(300 << 10), (512 << 10, Kind::Hole));
        assert_eq!(run(512 << 10), (1 << 20, Kind::Data));
    }

    /// The short ways to an answer against the long one, on file systems that are allowed the short ones.
    #[test]
    fn quick_answers_are_those_of_the_runs() {
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
                assert_eq!(map.next_data(at), map::next_data_by_runs(&map, at), "round {round}, data at {at}");
                let (quick, slow) = (map.next_hole(at), map::next_hole_by_runs(&map, at));
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
