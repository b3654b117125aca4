//! Concurrent writers and seeks: a write that completed before an lseek is never inside a hole.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use super::check::{check, open, seek_data, seek_hole, sysfs, verify};
use super::image::discard;
use super::random::{Length, Random};

const PAGE: u64 = 4096;
/// Writers of one device.
const WRITERS: u64 = 3;

/// For each page a number that is odd while the page is known to hold data, and changes with every change.
struct Pages(Vec<AtomicU32>);

impl Pages {
    fn new(size: u64) -> Self {
        Self((0..size / PAGE).map(|_| AtomicU32::new(0)).collect())
    }

    fn written(&self, page: u64) {
        self.of(page).fetch_or(1, Ordering::SeqCst);
    }

    /// From here on the page may become a hole.
    fn forget(&self, page: u64) {
        let of = self.of(page);
        of.store((of.load(Ordering::SeqCst) | 1) + 1, Ordering::SeqCst);
    }

    fn of(&self, page: u64) -> &AtomicU32 {
        &self.0[usize::try_from(page).expect("a page number")]
    }

    fn snapshot(&self) -> Vec<u32> {
        self.0.iter().map(|page| page.load(Ordering::SeqCst)).collect()
    }
}

/// What writers did.
pub struct Raced {
    /// Completed writes. Each one was followed by a seek at its offset.
    pub writes: u64,
    /// How often the whole map was read during the writes.
    pub walks: u64,
}

/// Runs [`writers`], and checks in the end that the file and its holes equal the device.
pub fn race(file: &Path, device: &Path, size: u64, rounds: u64) {
    let raced = writers(file, device, size, rounds);
    println!("{}: {} writes, {} walks", device.display(), raced.writes, raced.walks);
    check(file, device);
}

/// Lets writers write and discard parts of `device`, `rounds` times each or as long as the environment says (see
/// [`Length`]). Each of them seeks in `file` to its page right after the write, while another thread reads the whole map.
/// Now and then one of them lets `blkholefs verify` compare the holes with zeros, while the others write.
pub fn writers(file: &Path, device: &Path, size: u64, rounds: u64) -> Raced {
    let length = Length::rounds(rounds);
    let pages = Pages::new(size);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let share = size / PAGE / WRITERS;
                let own = writer * share..(writer + 1) * share;
                let pages = &pages;
                scope.spawn(move || write_and_seek(file, device, own, length, pages))
            })
            .collect();
        let walker = scope.spawn(|| walk(file, &pages, &done));
        let results: Vec<_> = writers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::SeqCst);
        let writes = results.into_iter().map(|writes| writes.expect("no write is inside a hole")).sum();
        let walks = walker.join().expect("no walk finds a wrong hole");
        assert!(walks > 0, "the map was never read");
        Raced { writes, walks }
    })
}

/// Returns the number of writes.
fn write_and_seek(file: &Path, device: &Path, own: Range<u64>, length: Length, pages: &Pages) -> u64 {
    let writer = OpenOptions::new().write(true).open(device).expect("the device opens for writing");
    let seeker = open(file);
    let mut random = Random::new(own.start + 1);
    let unit = discard_unit(device);
    let mut writes = 0;
    for _ in length.numbers() {
        let page = random.within(own.clone());
        let inside = random.within(0..8) * 512;
        writer.write_all_at(&random.bytes(512), page * PAGE + inside).expect("a write inside the device");
        if random.one_in(4) {
            writer.sync_data().expect("data reaches the device");
        }
        pages.written(page);
        writes += 1;
        assert_data(&seeker, page);
        // Not all the time: it writes back dirty pages, as an lseek must.
        if random.one_in(32) {
            verify(device);
        }
        if random.one_in(8) {
            // A smaller discard would be ignored, and pages of other writers must not be discarded.
            let first = page - page % unit;
            let discarded = first.max(own.start)..(first + unit).min(own.end);
            if discarded.end - discarded.start == unit {
                discarded.clone().for_each(|page| pages.forget(page));
                discard(device, discarded.start * PAGE..discarded.end * PAGE);
            }
        }
    }
    writes
}

/// The pages of the least that the device can discard.
fn discard_unit(device: &Path) -> u64 {
    let text = std::fs::read_to_string(sysfs(device).join("queue/discard_granularity"));
    // A partition has no queue of its own.
    let bytes: u64 = text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(PAGE);
    (bytes / PAGE).max(1)
}

fn assert_data(file: &File, page: u64) {
    let offset = page * PAGE;
    assert_eq!(seek_data(file, offset), Some(offset), "page {page} was written");
    assert_ne!(seek_hole(file, offset), Some(offset), "page {page} was written");
}

/// Reads the whole map until the writers are done; returns how often.
fn walk(file: &Path, pages: &Pages, done: &AtomicBool) -> u64 {
    let file = open(file);
    let mut walks = 0;
    loop {
        let last = done.load(Ordering::SeqCst);
        let before = pages.snapshot();
        let holes = holes(&file);
        let after = pages.snapshot();
        for range in holes {
            for page in range.start.div_ceil(PAGE)..range.end / PAGE {
                let page = usize::try_from(page).expect("a page number");
                let held = before[page] % 2 == 1 && before[page] == after[page];
                assert!(!held, "page {page} was written before the walk, and is in the hole {range:?}");
            }
        }
        walks += 1;
        if last {
            return walks;
        }
    }
}

/// The holes that one walk sees. Between two seeks a hole may have become data and data a hole: then the walk steps on.
fn holes(file: &File) -> Vec<Range<u64>> {
    let mut holes = Vec::new();
    let size = file.metadata().expect("the file has attributes").len();
    let mut offset = 0;
    while let Some(hole) = seek_hole(file, offset) {
        let data = seek_data(file, hole).unwrap_or(size);
        holes.push(hole..data);
        offset = data.max(offset + PAGE);
    }
    holes
}
