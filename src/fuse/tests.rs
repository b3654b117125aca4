//! Panics in a source, over a real mount.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use nix::errno::Errno as SystemErrno;
use nix::unistd::{Whence, geteuid, lseek};

use super::*;
use crate::export::{Export, HostNode, MIN_ALIGN};
use crate::fs::{Limits, Ownership};
use crate::handle::{Handle, MapCache};
use crate::source::{Context, Stack};
use crate::spec::{SourceOptions, Spec};
use crate::sys::buffer::AlignedBuffer;

/// A device on which every operation but its size panics.
struct Faulty;

impl Export for Faulty {
    fn name(&self) -> &Path {
        Path::new("faulty")
    }

    fn size(&self) -> io::Result<Bytes> {
        Ok(Bytes::new(1 << 20))
    }

    fn align(&self) -> Bytes {
        MIN_ALIGN
    }

    fn read_at(&self, _buffer: &mut AlignedBuffer, _offset: Bytes, _size: usize) -> io::Result<Range<usize>> {
        panic!("a fault of a test, in a read");
    }

    fn resolve(&self, _context: &Context) -> Stack {
        panic!("panic of a test, in a source");
    }

    fn host_node(&self) -> io::Result<HostNode> {
        panic!("a fault of a test, in a node");
    }
}

/// Causes more panics than there are session threads. Each request fails with EIO, and the mount continues to serve.
#[test]
fn a_panic_in_a_source_is_eio_and_the_mount_continues() {
    if !geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        assert!(std::env::var_os("CI").is_none_or(|value| value.is_empty()), "this test needs root and /dev/fuse");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let point = directory.path().join("mount");
    std::fs::create_dir(&point).unwrap();
    let spec = Spec::parse(image.as_os_str()).unwrap();
    let ownership = Ownership { uid: None, gid: None, mode: 0o777, is_writable: false };
    let fs = Arc::new(FileSystem::new(&spec, &SourceOptions::default(), ownership, Limits::default()).unwrap());
    let mut config = fuser::Config::default();
    config.n_threads = Some(SESSION_THREADS);
    let session = fuser::spawn_mount(BlkHoleFs::new(fs.clone(), false), &point, &config).unwrap();

    let shown = point.join("image");
    let file = File::open(&shown).unwrap();
    fs.replace_handles(&Arc::new(Handle::new(Arc::new(Faulty), Arc::default(), Arc::new(MapCache::default()))));
    for round in 0..2 * SESSION_THREADS as i64 {
        assert_eq!(lseek(&file, round, Whence::SeekData), Err(SystemErrno::EIO), "round {round}");
    }
    let other = File::open(&shown).unwrap();
    assert_eq!(lseek(&other, 0, Whence::SeekData), Err(SystemErrno::ENXIO), "the image is one hole");
    drop((file, other));
    session.umount_and_join().unwrap();
}
