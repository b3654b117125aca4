//! Mounts with `-o static`: the server is asked once.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use blkholefs::testing::map::ExtentKind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::check::{Extent, Kind, map_holes, map_of, seek_data, seek_hole};
use crate::common::mount::Mount;
use crate::common::nbd::{Server, directory, image, nbdinfo_map};
use crate::common::random::{Random, seeds};
use crate::common::{KIB, MIB, needs, wait_until};
use crate::fake::{Action, BLOCK, Dialect, FakeServer, Message, Step};

const BLOCKS: usize = 512;
const SIZE: u64 = (BLOCKS * BLOCK) as u64;

/// A server that counts block status queries, and closes the connection after a read when `closes` is set.
struct Fixture {
    fake: FakeServer,
    queries: Arc<AtomicUsize>,
    closes: Arc<AtomicBool>,
}

impl Fixture {
    /// A disk of which every other block is data.
    fn new(dialect: Dialect) -> Self {
        let mut disk = vec![0; BLOCKS * BLOCK];
        disk.chunks_mut(BLOCK).step_by(2).for_each(|block| block.fill(1));
        let (queries, closes) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, closed) = (queries.clone(), closes.clone());
        let hook = move |message: &mut Message| {
            counted.fetch_add(usize::from(message.step == Step::Status), Ordering::Relaxed);
            match message.step == Step::Read && closed.swap(false, Ordering::Relaxed) {
                true => Action::Close,
                false => Action::Continue,
            }
        };
        Self { fake: FakeServer::new(dialect, &disk, Arc::new(hook)), queries, closes }
    }

    fn mount(&self, options: &[&str]) -> Mount {
        Mount::with_options(self.fake.uri.as_ref(), options)
    }

    /// The number of queries that a walk over all extents of an open file causes.
    fn queries_of_walk(&self, file: &File) -> usize {
        let before = self.queries.load(Ordering::Relaxed);
        for block in (0..SIZE).step_by(2 * BLOCK) {
            assert_eq!((seek_data(file, block), seek_hole(file, block)), (Some(block), Some(block + BLOCK as u64)));
        }
        self.queries.load(Ordering::Relaxed) - before
    }
}

fn open(mount: &Mount) -> File {
    File::open(mount.directory().join("nbd")).unwrap()
}

#[test]
fn a_static_export_is_asked_once_as_long_as_it_is_open() {
    needs!(root);
    for dialect in [Dialect::Structured, Dialect::Extended] {
        let fixture = Fixture::new(dialect);
        let mount = fixture.mount(&["-o", "static"]);
        let file = open(&mount);
        assert!(fixture.queries_of_walk(&file) <= 1, "the device is shorter than one range");
        for _ in 0..3 {
            assert_eq!(fixture.queries_of_walk(&file), 0);
        }
        drop(file);
        let before = fixture.queries.load(Ordering::Relaxed);
        assert!(std::fs::metadata(mount.directory().join("nbd")).unwrap().blocks() < SIZE / 512);
        assert_eq!(fixture.queries.load(Ordering::Relaxed), before, "a stat asks nothing more");
        drop(mount);
        let mount = fixture.mount(&[]);
        let file = open(&mount);
        for _ in 0..3 {
            assert!(fixture.queries_of_walk(&file) >= BLOCKS / 2, "without the option, each hole is asked each time");
        }
    }
}

#[test]
fn a_lost_connection_ends_the_option_with_one_warning() {
    needs!(root);
    let fixture = Fixture::new(Dialect::Structured);
    let mount = fixture.mount(&["-o", "static,direct_io"]);
    let file = open(&mount);
    fixture.queries_of_walk(&file);
    assert_eq!(fixture.queries_of_walk(&file), 0);
    fixture.closes.store(true, Ordering::Relaxed);
    // The first read is answered before the connection is closed. The second one needs another connection.
    for _ in 0..2 {
        file.read_exact_at(&mut [0; 4096], 0).unwrap();
    }
    assert!(!fixture.closes.load(Ordering::Relaxed), "a connection was closed");
    let holes = BLOCKS / 2;
    assert!(fixture.queries_of_walk(&file) >= holes);
    drop(file);
    let file = open(&mount);
    assert!(fixture.queries_of_walk(&file) >= holes, "a new open does not return to the promise");
    let log = mount.log();
    assert_eq!(log.matches("a connection was lost").count(), 1, "{log}");
    assert_eq!(log.matches("option 'static' ends").count(), 1, "{log}");
}

/// The maps are dropped as those of other devices are, and counted as they grow.
#[test]
fn what_is_kept_counts_and_is_asked_again_after_it_was_dropped() {
    needs!(root);
    let fixture = Fixture::new(Dialect::Structured);
    let mount = fixture.mount(&["-o", "static"]);
    let file = open(&mount);
    fixture.queries_of_walk(&file);
    let signal = |signal| kill(Pid::from_raw(i32::try_from(mount.pid()).unwrap()), signal).unwrap();
    let maps = || {
        let log = mount.log();
        let (_, text) = log.rsplit_once("maps of ")?;
        text.split(' ').next()?.parse::<usize>().ok()
    };
    signal(Signal::SIGUSR1);
    assert!(wait_until(|| maps().is_some()), "{}", mount.log());
    assert!(maps() >= Some(BLOCKS * 8), "{}", mount.log());
    signal(Signal::SIGHUP);
    assert!(wait_until(|| mount.log().contains("dropped the maps")), "{}", mount.log());
    assert_eq!((fixture.queries_of_walk(&file), fixture.queries_of_walk(&file)), (1, 0));
}

fn kinds(map: &[Extent]) -> Vec<(u64, ExtentKind)> {
    let kind = |kind| if kind == Kind::Hole { ExtentKind::Hole } else { ExtentKind::Data };
    map.iter().map(|extent| (extent.1.end, kind(extent.0))).collect()
}

/// Random images, and seeks at random places before and after the whole map, within any limit of memory.
#[test]
fn a_static_mount_of_a_random_export_equals_nbdinfo() {
    needs!(root, programs["nbdkit", "nbdinfo"]);
    let directory = directory();
    let (disk, socket) = (directory.path().join("disk"), directory.path().join("s"));
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    for seed in seeds(1, 6) {
        let mut random = Random::new(seed);
        let size = 4 * KIB * (1 + random.within(0..MIB / 8));
        let mut data = Vec::new();
        let mut block = random.within(0..100);
        let longest = 1 << random.within(6..14);
        while block < size / 4096 {
            let end = (block + 1 + random.within(0..8)).min(size / 4096);
            data.push(block..end);
            block = end + 1 + random.within(0..longest);
        }
        image(&disk, size, &data);
        let server = Server::nbdkit(&socket, &["--readonly", "file", disk.to_str().unwrap()]);
        let options = ["static", "static,map_cache=64K", "static,map_cache=0"][random.within(0..3) as usize];
        let mount = Mount::with_options(uri.as_ref(), &["-o", options]);
        let path = mount.directory().join("disk");
        let message = format!("seed {seed}, {options}, {size} bytes, {} ranges", data.len());
        check_seeks(&path, size, &data, &mut random, &message);
        for _ in 0..2 {
            let map = map_holes(&path);
            assert_eq!(kinds(&map), nbdinfo_map(&uri), "{message}");
            let bytes: Vec<_> = data.iter().map(|range| range.start * 4096..range.end * 4096).collect();
            assert_eq!(map, map_of(size, &bytes), "{message}");
        }
        check_seeks(&path, size, &data, &mut random, &message);
        assert!(!mount.log().contains("static"), "{}", mount.log());
        drop((mount, server));
        std::fs::remove_file(&socket).unwrap();
    }
}

/// Compares seeks at random places with the blocks of data.
fn check_seeks(path: &Path, size: u64, data: &[std::ops::Range<u64>], random: &mut Random, message: &str) {
    let file = File::open(path).unwrap();
    for _ in 0..100 {
        let at = random.within(0..size);
        let block = at / 4096;
        let next = data.iter().find(|range| range.end > block);
        let (next_data, next_hole) = match next {
            Some(range) if range.start <= block => (Some(at), range.end * 4096),
            Some(range) => (Some(range.start * 4096), at),
            None => (None, at),
        };
        assert_eq!((seek_data(&file, at), seek_hole(&file, at)), (next_data, Some(next_hole)), "{message}, byte {at}");
    }
}
