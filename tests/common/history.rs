//! Devices whose sectors have a pattern that names the operation that wrote them, and the record of what each sector may have
//! after a fault.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::MIB;
use super::log_writes::DISCARDED;

/// The unit that a device writes completely or not at all.
pub const SECTOR: u64 = 512;

type Sector = [u8; SECTOR as usize];

/// The first bytes of a sector that an operation has written.
const MAGIC: u64 = 0x6b63_6162_7961_7765;

/// An operation, counted from 1 in the order in which they began.
pub type Operation = u64;

/// The bytes that an operation writes to a range of whole sectors. Each sector names the operation and its own position.
pub fn pattern(range: &Range<u64>, operation: Operation) -> Vec<u8> {
    let sectors = (range.start / SECTOR..range.end / SECTOR).map(|sector| sector_pattern(sector, operation));
    sectors.collect::<Vec<_>>().concat()
}

fn sector_pattern(sector: u64, operation: Operation) -> Sector {
    let words = [MAGIC, sector, operation, !operation].map(u64::to_le_bytes);
    let mut bytes = [0; SECTOR as usize];
    for part in bytes.chunks_exact_mut(size_of_val(&words)) {
        part.copy_from_slice(words.as_flattened());
    }
    bytes
}

/// Fills a range with bytes that no operation writes: what was in unused space before.
pub fn write_unrelated(file: &File, range: Range<u64>) {
    let bytes = vec![0xa5; usize::try_from(MIB).expect("small")];
    let mut at = range.start;
    while at < range.end {
        let size = usize::try_from((range.end - at).min(MIB)).expect("small");
        file.write_all_at(&bytes[..size], at).expect("a write inside the device");
        at += size as u64;
    }
}

/// What a sector has after an operation on it, or before all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Zeros,
    Of(Operation),
}

impl Content {
    fn bytes(self, sector: u64) -> Sector {
        match self {
            Self::Zeros => [0; SECTOR as usize],
            Self::Of(operation) => sector_pattern(sector, operation),
        }
    }
}

/// One operation on a sector.
#[derive(Clone, Copy)]
struct Event {
    operation: Operation,
    is_zero: bool,
    /// An error was reported for it, so it is done, or not done, in any part.
    has_failed: bool,
}

/// All operations on a device, for each of its sectors.
#[derive(Clone)]
pub struct History {
    events: Vec<Vec<Event>>,
    last: Operation,
}

/// How many sectors have what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// As they are after the last operation that is certain.
    pub settled: u64,
    /// As they are after a later operation.
    pub later: u64,
    /// Each byte as it is after one of these: a large write is divided, and not always where sectors end.
    pub mixed: u64,
    /// What a disk may return for discarded sectors, where a later operation makes zeros.
    pub discarded: u64,
}

impl History {
    /// A device of `size` bytes that is all zeros.
    pub fn new(size: u64) -> Self {
        Self { events: vec![Vec::new(); usize::try_from(size / SECTOR).expect("small")], last: 0 }
    }

    /// The length of the device.
    pub fn size(&self) -> u64 {
        self.events.len() as u64 * SECTOR
    }

    /// The last operation that began.
    pub fn last(&self) -> Operation {
        self.last
    }

    /// Begins a write of [`pattern`] to a range, or the making of zeros there.
    pub fn begin(&mut self, range: &Range<u64>, is_zero: bool) -> Operation {
        self.last += 1;
        for events in &mut self.events[sectors(range)] {
            events.push(Event { operation: self.last, is_zero, has_failed: false });
        }
        self.last
    }

    /// Notes that an operation has reported an error.
    pub fn fail(&mut self, range: &Range<u64>, operation: Operation) {
        let events = self.events[sectors(range)].iter_mut().flatten();
        events.filter(|event| event.operation == operation).for_each(|event| event.has_failed = true);
    }

    /// Notes that an operation that has reported an error is certain for a range: the part that was counted.
    pub fn succeed_in(&mut self, range: &Range<u64>, operation: Operation) {
        let events = self.events[sectors(range)].iter_mut().flatten();
        events.filter(|event| event.operation == operation).for_each(|event| event.has_failed = false);
    }

    /// Compares the bytes of a device with the record. Each byte must have the value that the operations up to `settled` have given it,
    /// or the value that one of the later operations up to `begun` gives it.
    ///
    /// # Errors
    /// The first sectors that have something else.
    pub fn compare(&self, bytes: &[u8], settled: Operation, begun: Operation) -> Result<Counts, String> {
        assert_eq!(bytes.len() as u64, self.size());
        let mut counts = Counts::default();
        let mut wrong = Vec::new();
        for ((bytes, events), sector) in bytes.chunks_exact(SECTOR as usize).zip(&self.events).zip(0..) {
            let mut allowed = vec![Content::Zeros];
            for event in events.iter().filter(|event| event.operation <= settled) {
                if !event.has_failed {
                    allowed.clear();
                }
                allowed.push(event.content());
            }
            let certain = allowed.len();
            let later = events.iter().filter(|event| event.operation > settled && event.operation <= begun);
            allowed.extend(later.map(Event::content));
            match allowed.iter().position(|content| content.bytes(sector) == bytes) {
                Some(index) if index < certain => counts.settled += 1,
                Some(_) => counts.later += 1,
                None if allowed[certain..].contains(&Content::Zeros) && bytes == [DISCARDED; SECTOR as usize] => {
                    counts.discarded += 1;
                }
                None if is_mix(bytes, &allowed, sector) => counts.mixed += 1,
                None => wrong.push(format!("sector {sector} is none of {allowed:?}: {:?}", &bytes[..32])),
            }
        }
        if wrong.is_empty() {
            return Ok(counts);
        }
        Err(format!("{} sectors: {}", wrong.len(), wrong[..wrong.len().min(10)].join("; ")))
    }

    /// [`History::compare`] with the bytes of a device.
    ///
    /// # Errors
    /// The first sectors that have something else.
    pub fn compare_device(&self, device: &Path, settled: Operation, begun: Operation) -> Result<Counts, String> {
        let file = File::open(device).expect("the device opens");
        let mut bytes = vec![0; usize::try_from(self.size()).expect("small")];
        file.read_exact_at(&mut bytes, 0).expect("the device can be read");
        self.compare(&bytes, settled, begun)
    }

    /// Checks a device after all operations have ended.
    pub fn check(&self, device: &Path) {
        self.compare_device(device, self.last, self.last).unwrap_or_else(|error| panic!("{error}"));
    }
}

/// Whether each byte of a sector is that of one of the contents.
fn is_mix(bytes: &[u8], contents: &[Content], sector: u64) -> bool {
    let contents: Vec<_> = contents.iter().map(|content| content.bytes(sector)).collect();
    (0..bytes.len()).all(|at| contents.iter().any(|content| content[at] == bytes[at]))
}

impl Event {
    fn content(&self) -> Content {
        if self.is_zero { Content::Zeros } else { Content::Of(self.operation) }
    }
}

fn sectors(range: &Range<u64>) -> Range<usize> {
    let sector = |offset: u64| usize::try_from(offset / SECTOR).expect("small");
    sector(range.start)..sector(range.end)
}
