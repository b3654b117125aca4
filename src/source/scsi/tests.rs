use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::map::HoleMap;
use crate::sys::sg::Transfer;
use crate::sys::sysfs::IoCounters;

const BLOCK: u64 = 512;
const BLOCKS: u64 = 1000;
const LEN: Bytes = Bytes::new(BLOCKS * BLOCK);

/// A disk in memory: the statuses of its blocks, and how it answers commands.
struct Disk {
    statuses: Mutex<Vec<u8>>,
    /// The number of descriptors of an answer, at most.
    descriptors: usize,
    /// The number of blocks of a descriptor, at most.
    stride: usize,
    lbprz: u8,
    page_b2: bool,
    vendor: [u8; 8],
    /// READ CAPACITY(16) flags.
    flags: AtomicU64,
    /// Sense keys and codes that answer the next commands, the last one first. The key FFh makes the command
    /// unsendable.
    sense: Mutex<Vec<(u8, u8)>>,
    /// The number of GET LBA STATUS commands that were received.
    queries: AtomicUsize,
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            statuses: Mutex::new(vec![1; BLOCKS as usize]),
            descriptors: 255,
            stride: usize::MAX,
            lbprz: 1,
            page_b2: true,
            vendor: *b"Linux   ",
            flags: AtomicU64::new(0xc0),
            sense: Mutex::default(),
            queries: AtomicUsize::new(0),
        }
    }
}

impl Disk {
    fn set(&self, range: std::ops::Range<usize>, status: u8) {
        self.statuses.lock().unwrap()[range].fill(status);
    }

    fn answer(&self, cdb: &[u8]) -> Vec<u8> {
        match (cdb[0], cdb[1], cdb[2]) {
            (0x12, 0, _) => [&[0, 0, 7, 2, 31, 0, 0, 0][..], &self.vendor, &[b' '; 20]].concat(),
            (0x12, 1, 0x00) if self.page_b2 => vec![0, 0, 0, 2, 0, 0xb2],
            (0x12, 1, 0x00) => vec![0, 0, 0, 1, 0],
            (0x12, 1, 0xb2) => vec![0, 0xb2, 0, 4, 0, 0xe0 | self.lbprz << 2, 2, 0],
            (0x9e, 0x10, _) => {
                let mut data = vec![0; 32];
                data[..8].copy_from_slice(&(BLOCKS - 1).to_be_bytes());
                data[8..12].copy_from_slice(&(BLOCK as u32).to_be_bytes());
                data[14] = self.flags.load(Ordering::Relaxed) as u8;
                data
            }
            (0x9e, 0x12, _) => self.status(u64::from_be_bytes(cdb[2..10].try_into().unwrap())),
            _ => panic!("an unexpected command {cdb:02x?}"),
        }
    }

    fn status(&self, lba: u64) -> Vec<u8> {
        self.queries.fetch_add(1, Ordering::Relaxed);
        let statuses = self.statuses.lock().unwrap();
        let mut list = Vec::new();
        let mut at = lba as usize;
        for _ in 0..self.descriptors {
            let Some(&status) = statuses.get(at) else { break };
            let blocks = statuses[at..].iter().take(self.stride).take_while(|next| **next == status).count();
            list.extend((at as u64).to_be_bytes());
            list.extend((blocks as u32).to_be_bytes());
            list.extend([status, 0, 0, 0]);
            at += blocks;
        }
        [&(list.len() as u32 + 4).to_be_bytes()[..], &[0; 4], &list].concat()
    }

    fn device(self: &Arc<Self>) -> ScsiDevice {
        let disk = Arc::clone(self);
        ScsiDevice::new(move |cdb, data| {
            if let Some((key, code)) = disk.sense.lock().unwrap().pop() {
                return match key {
                    0xff => Err(io::Error::from_raw_os_error(libc::EIO)),
                    _ => Ok(Transfer { len: 0, status: 2, sense: vec![0x72, key, code, 0] }),
                };
            }
            let answer = disk.answer(cdb);
            let len = answer.len().min(data.len());
            data[..len].copy_from_slice(&answer[..len]);
            Ok(Transfer { len, status: 0, sense: Vec::new() })
        })
    }

    fn map(self: &Arc<Self>) -> Result<LiveMap<LbaStatusSource>> {
        map("disk", self.device(), quiet(), LEN, Bytes::new(BLOCK), None)
    }
}

/// The counters of a disk that this host does not write to.
fn quiet() -> WriteEvidence {
    WriteEvidence::of(|| Some(IoCounters::default()))
}

/// The whole map as pairs of end in blocks and whether it is a hole, neighbours merged.
fn walk(map: &dyn HoleMap) -> Vec<(u64, bool)> {
    let mut runs: Vec<(u64, bool)> = Vec::new();
    let mut at = Bytes::ZERO;
    while at < map.len() {
        let run = map.extent_at(at);
        assert!(run.end > at && run.end <= map.len());
        at = run.end;
        let (end, hole) = (run.end.get() / BLOCK, run.kind == ExtentKind::Hole);
        match runs.last_mut() {
            Some(last) if last.1 == hole => last.0 = end,
            _ => runs.push((end, hole)),
        }
    }
    runs
}

#[test]
fn the_map_shows_the_statuses_with_any_number_of_descriptors() {
    for (descriptors, stride) in [(255, usize::MAX), (1, usize::MAX), (3, 7), (1, 1)] {
        let disk = Arc::new(Disk { descriptors, stride, ..Disk::default() });
        disk.set(100..200, 0);
        disk.set(200..300, 2);
        disk.set(300..301, 3);
        disk.set(990..1000, 4);
        let map = disk.map().unwrap();
        let expected = [(100, true), (200, false), (300, true), (301, false), (990, true), (1000, false)];
        assert_eq!(walk(&map), expected, "{descriptors} descriptors of {stride}");
        // In the middle of a block and of a run, and the last byte.
        assert_eq!(
            map.extent_at(Bytes::new(99 * BLOCK + 511)),
            Extent { end: Bytes::new(100 * BLOCK), kind: ExtentKind::Hole }
        );
        assert_eq!(
            map.extent_at(Bytes::new(300 * BLOCK + 1)),
            Extent { end: Bytes::new(301 * BLOCK), kind: ExtentKind::Data }
        );
        assert_eq!(map.extent_at(LEN.saturating_sub(Bytes::new(1))), Extent { end: LEN, kind: ExtentKind::Data });
        assert_eq!(map.extent_at(LEN), Extent { end: LEN.saturating_add(Bytes::new(1)), kind: ExtentKind::Data });
    }
}

#[test]
fn a_hole_is_queried_again_and_data_is_not() {
    let disk = Arc::new(Disk::default());
    disk.set(0..100, 0);
    let map = disk.map().unwrap();
    let hole = Bytes::new(500 * BLOCK);
    assert_eq!(map.extent_at(hole).kind, ExtentKind::Hole);
    // Another host writes; this one's counters do not move.
    disk.set(100..1000, 0);
    assert_eq!(map.extent_at(hole).kind, ExtentKind::Data);
    let before = disk.queries.load(Ordering::Relaxed);
    for block in [0, 50, 99, 500, 999] {
        assert_eq!(map.extent_at(Bytes::new(block * BLOCK)).kind, ExtentKind::Data);
    }
    assert_eq!(disk.queries.load(Ordering::Relaxed), before, "all of it is remembered");
    assert!(map.memory() > Bytes::ZERO);
}

#[test]
fn a_disk_that_does_not_report_zeros_has_no_holes() {
    for (what, disk) in [
        ("LBPME is 0", Disk { flags: AtomicU64::new(0x40), ..Disk::default() }),
        ("LBPRZ is 0", Disk { flags: AtomicU64::new(0x80), ..Disk::default() }),
        ("VPD page B2h", Disk { lbprz: 2, ..Disk::default() }),
        ("VPD page B2h", Disk { lbprz: 0, ..Disk::default() }),
        ("ATA", Disk { vendor: *b"ATA     ", ..Disk::default() }),
        ("does not support INQUIRY", Disk { sense: vec![(5, 0x20)].into(), ..Disk::default() }),
        ("sense key 3h, code 11h/00h", Disk { sense: vec![(3, 0x11)].into(), ..Disk::default() }),
        ("UNIT ATTENTION", Disk { sense: vec![(6, 0x29); 4].into(), ..Disk::default() }),
        ("cannot send INQUIRY", Disk { sense: vec![(0xff, 0)].into(), ..Disk::default() }),
    ] {
        let error = Arc::new(disk).map().err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains(what), "{what}: {error}");
    }
    let disk = Arc::new(Disk { page_b2: false, lbprz: 0, ..Disk::default() });
    assert_eq!(walk(&disk.map().unwrap()), [(1000, true)], "a disk without page B2h");
}

#[test]
fn sizes_must_agree_with_the_kernels() {
    let disk = Arc::new(Disk::default());
    for (len, block) in [(LEN.get() - 512, 512), (LEN.get() + 512, 512), (LEN.get(), 4096)] {
        assert!(
            map("disk", disk.device(), quiet(), Bytes::new(len), Bytes::new(block), None).is_err(),
            "{len} {block}"
        );
    }
}

#[test]
fn no_command_is_sent_after_a_failed_one() {
    for (sense, what) in [((5, 0x20), "does not support GET LBA STATUS"), ((0xff, 0), "cannot send GET LBA STATUS")] {
        let disk = Arc::new(Disk::default());
        let map = disk.map().unwrap();
        assert_eq!(map.dense_because(), None);
        disk.sense.lock().unwrap().push(sense);
        assert_eq!(map.extent_at(Bytes::ZERO), Extent { end: LEN, kind: ExtentKind::Data });
        let queries = disk.queries.load(Ordering::Relaxed);
        assert_eq!(walk(&map), [(1000, false)]);
        assert_eq!(disk.queries.load(Ordering::Relaxed), queries);
        assert!(map.dense_because().unwrap().to_string().contains(what));
    }
}

#[test]
fn after_unit_attention_the_parameters_are_read_again() {
    let disk = Arc::new(Disk::default());
    let map = disk.map().unwrap();
    disk.sense.lock().unwrap().push((6, 0x2a));
    assert_eq!(map.extent_at(Bytes::ZERO), Extent { end: LEN, kind: ExtentKind::Hole });
    disk.sense.lock().unwrap().push((6, 0x2a));
    disk.flags.store(0x80, Ordering::Relaxed);
    assert_eq!(map.extent_at(Bytes::ZERO), Extent { end: LEN, kind: ExtentKind::Data });
    assert!(map.dense_because().unwrap().to_string().contains("LBPRZ"));
}

/// UNIT ATTENTION was the answer to a command of another program.
#[test]
fn changed_parameters_are_seen_without_unit_attention() {
    let disk = Arc::new(Disk::default());
    let map = disk.map().unwrap();
    assert_eq!(map.extent_at(Bytes::ZERO), Extent { end: LEN, kind: ExtentKind::Hole });
    disk.flags.store(0x80, Ordering::Relaxed);
    assert_eq!(map.extent_at(Bytes::ZERO), Extent { end: LEN, kind: ExtentKind::Data });
    assert!(map.dense_because().unwrap().to_string().contains("LBPRZ"));
}

#[test]
fn an_extent_that_takes_too_long_is_data_for_a_while() {
    let disk = Arc::new(Disk::default());
    let map = disk.map().unwrap();
    let at = Bytes::new(10 * BLOCK);
    map.spend_budget(at, ExtentKind::Hole);
    assert_eq!(map.extent_at(at).kind, ExtentKind::Data);
    assert_eq!(map.extent_at(at).kind, ExtentKind::Data, "the same for the next question");
    assert_eq!(map.extent_at(Bytes::ZERO).kind, ExtentKind::Hole);
}

#[test]
fn a_file_that_is_no_scsi_disk_is_dense() {
    let file = Arc::new(File::open("/dev/null").unwrap());
    let null = BlockDevice { id: DeviceId { major: 1, minor: 3 }, path: "/dev/null".into(), file, len: LEN };
    let layer = layer(&null, Bytes::new(BLOCK), &Context::default());
    assert!(layer.map.dense_because().unwrap().to_string().contains("cannot send INQUIRY"));
    assert_eq!(layer.map.extent_at(Bytes::ZERO), Extent { end: LEN, kind: ExtentKind::Data });
}

#[test]
fn a_static_disk_is_asked_once_and_promises_zeros_for_each_answer_with_a_hole() {
    let disk = Arc::new(Disk { descriptors: 3, stride: 7, ..Disk::default() });
    disk.set(0..10, 0);
    let devices = StaticDevices::new(Bytes::new(1 << 20));
    let map = map("disk", disk.device(), quiet(), LEN, Bytes::new(BLOCK), Some(&devices)).unwrap();
    assert_eq!(walk(&map), [(10, false), (1000, true)]);
    let queries = disk.queries.load(Ordering::Relaxed);
    assert_eq!(walk(&map), [(10, false), (1000, true)]);
    assert_eq!(disk.queries.load(Ordering::Relaxed), queries, "each extent is asked once");
}

/// The first extent of the answer is data, and the hole behind it is kept.
#[test]
fn a_hole_that_is_kept_needs_the_promise_of_zeros_too() {
    let disk = Arc::new(Disk::default());
    disk.set(0..10, 0);
    let devices = StaticDevices::new(Bytes::new(1 << 20));
    let map = map("disk", disk.device(), quiet(), LEN, Bytes::new(BLOCK), Some(&devices)).unwrap();
    disk.flags.store(0x80, Ordering::Relaxed);
    // The data at the start is remembered from the probe.
    assert_eq!(walk(&map), [(1000, false)]);
    assert!(map.dense_because().unwrap().to_string().contains("LBPRZ"));
}
