//! Devices and their virtual qcow2 images, and a small reader of the format that shares no code with the program.

use std::ops::Range;

use blkholefs::testing::map::ExtentKind;
use blkholefs::testing::qcow2::{Backing, Builder, ClusterSize, Content, Error, Layout};
use blkholefs::testing::units::Bytes;

/// The extents of a device, from its start to its end.
pub type Extents = Vec<(Range<u64>, ExtentKind)>;

pub fn cluster(size: u64) -> ClusterSize {
    ClusterSize::new(Bytes::new(size)).expect("a valid size")
}

pub fn layout(len: u64, size: u64, backing: Option<Backing>, extents: &Extents) -> Result<Layout, Error> {
    let mut builder = Builder::new(Bytes::new(len), cluster(size), backing);
    for (range, kind) in extents {
        builder.push(Bytes::new(range.start)..Bytes::new(range.end), *kind);
    }
    builder.finish()
}

/// Reads an image whose data clusters hold the bytes that `device` returns for an offset.
pub fn read(layout: &Layout, device: impl Fn(u64) -> u8, range: Range<u64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let part = layout.part_at(Bytes::new(at));
        assert!(part.range.start.get() == at && part.range.end.get() > at, "{part:?} at {at}");
        let end = part.range.end.get().min(range.end);
        match part.content {
            Content::Metadata => {
                let start = bytes.len();
                bytes.resize(start + (end - at) as usize, 0xAA);
                layout.fill_metadata(Bytes::new(at), &mut bytes[start..]);
            }
            Content::Device(offset) => bytes.extend((0..end - at).map(|byte| device(offset.get() + byte))),
            Content::Zeros => bytes.resize(bytes.len() + (end - at) as usize, 0),
        }
        at = end;
    }
    bytes
}

/// What an image says of a cluster of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is at this position.
    Data(u64),
    Zero,
    Unallocated,
}

/// An image that is read as the format's documentation says, all of it from its bytes.
pub struct Reader<'a> {
    layout: &'a Layout,
    pub cluster: u64,
    pub size: u64,
    pub backing: Vec<u8>,
    l1: Vec<u64>,
    refcounts: (u64, u64),
}

impl<'a> Reader<'a> {
    pub fn new(layout: &'a Layout) -> Self {
        let header = read(layout, |_| panic!("the header is metadata"), 0..104);
        let int = |range: Range<usize>| header[range].iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        assert_eq!((int(0..4), int(4..8), int(100..104)), (0x5146_49FB, 3, 104));
        assert_eq!((int(32..36), int(60..64), int(72..96), int(96..100)), (0, 0, 0, 4));
        let cluster = 1 << int(20..24);
        let backing = read(layout, |_| panic!("the name is metadata"), int(8..16)..int(8..16) + int(16..20));
        let mut image = Self { layout, cluster, size: int(24..32), backing, l1: Vec::new(), refcounts: (0, 0) };
        image.l1 = image.words(int(40..48), int(36..40));
        image.refcounts = (int(48..56), int(56..60) * cluster / 8);
        image
    }

    fn words(&self, at: u64, count: u64) -> Vec<u64> {
        let bytes = read(self.layout, |_| panic!("a table is metadata"), at..at + 8 * count);
        bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect()
    }

    pub fn state(&self, cluster: u64) -> State {
        let per_table = self.cluster / 8;
        let table = self.l1[(cluster / per_table) as usize];
        if table == 0 {
            return State::Unallocated;
        }
        let table = self.target(table);
        match self.words(table + cluster % per_table * 8, 1)[0] {
            0 => State::Unallocated,
            1 => State::Zero,
            entry => State::Data(self.target(entry)),
        }
    }

    fn target(&self, entry: u64) -> u64 {
        assert_eq!(entry >> 56, 0x80, "an entry is a position, with the highest bit set");
        let position = entry & ((1 << 56) - 1);
        assert!(position.is_multiple_of(self.cluster), "{position} is the start of a cluster");
        position
    }

    /// The refcount of a cluster of the image.
    pub fn refcount(&self, position: u64) -> u16 {
        let (table, entries) = self.refcounts;
        let (index, per_block) = (position / self.cluster, self.cluster / 2);
        if index / per_block >= entries {
            return 0;
        }
        match self.words(table + index / per_block * 8, 1)[0] {
            0 => 0,
            block => {
                let at = block + index % per_block * 2;
                let bytes = read(self.layout, |_| panic!("a refcount is metadata"), at..at + 2);
                u16::from_be_bytes([bytes[0], bytes[1]])
            }
        }
    }
}
