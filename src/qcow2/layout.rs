//! Where each byte of an image comes from.

use std::ops::Range;

use super::ClusterSize;
use super::header::{self, Backing};
use super::shape::{ENTRY, REFCOUNT, Shape};
use crate::map::{Block, FillMap, HoleMap};
use crate::units::Bytes;

/// The refcount of the cluster that an entry points to is one (`QCOW_OFLAG_COPIED` of `block/qcow2.h`).
const COPIED: u64 = 1 << 63;
/// The cluster reads as zeros (`QCOW_OFLAG_ZERO` of `block/qcow2.h`).
const ZERO: u64 = 1;
/// Metadata is made in units of this many bytes: 64 entries of a table, whose states are one word of a map. Clusters are
/// multiples of it.
const UNIT: usize = 64 * ENTRY as usize;

/// Where the bytes of a part come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// [`Layout::fill_metadata`] makes them.
    Metadata,
    /// They are the bytes of the device from this offset on.
    Device(Bytes),
    /// They are zeros.
    Zeros,
}

/// A part of an image whose bytes come from one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The positions in the image.
    pub range: Range<Bytes>,
    /// Where the bytes come from.
    pub content: Content,
}

/// The layout of a qcow2 image of a device.
///
/// The image has [`Layout::len`] bytes, a multiple of the cluster size: first all metadata, then the data clusters. Where the
/// last cluster of the device is data and ends beyond the device, the rest of it is zeros.
pub struct Layout {
    /// The length of the device.
    device: Bytes,
    /// The size of the disk that the image describes.
    virtual_size: Bytes,
    cluster: ClusterSize,
    shape: Shape,
    /// The first bytes of the first cluster. The rest of it is zeros.
    header: Vec<u8>,
    /// The clusters of the device that are stored.
    data: FillMap,
    /// The clusters of the device that read as zeros whatever the backing file holds.
    zero: FillMap,
    /// The indexes in the L1 table of the L2 tables that exist.
    tables: FillMap,
}

impl Layout {
    pub(super) fn new(
        (device, virtual_size): (Bytes, Bytes),
        cluster: ClusterSize,
        shape: Shape,
        backing: Option<&Backing>,
        [data, zero, tables]: [FillMap; 3],
    ) -> Self {
        let header = header::encode(virtual_size, cluster, &shape, backing);
        Self { device, virtual_size, cluster, shape, header, data, zero, tables }
    }

    /// The length of the image.
    pub fn len(&self) -> Bytes {
        self.position(self.shape.end)
    }

    /// The size of the clusters.
    pub fn cluster_size(&self) -> ClusterSize {
        self.cluster
    }

    /// The size of the disk that the image describes: the length of the device, rounded up to 512 bytes.
    pub fn virtual_size(&self) -> Bytes {
        self.virtual_size
    }

    /// The number of clusters of the device that are stored in the image.
    pub fn data_clusters(&self) -> u64 {
        self.data.mapped()
    }

    /// The memory that the layout occupies.
    pub fn memory(&self) -> Bytes {
        let maps = [&self.data, &self.zero, &self.tables].map(|map| map.memory().get());
        Bytes::new((size_of::<Self>() + self.header.capacity()) as u64 + maps.iter().sum::<u64>())
    }

    /// The part from `position` on, as long as possible. At and beyond the end of the image it is empty.
    pub fn part_at(&self, position: Bytes) -> Part {
        let (size, data, end) = (self.cluster.get(), self.position(self.shape.data), self.len());
        if position >= end {
            return Part { range: position..position, content: Content::Zeros };
        }
        let Some(within) = position.checked_sub(data) else {
            return Part { range: position..data, content: Content::Metadata };
        };
        let (index, in_cluster) = (within.get() / size, within.get() % size);
        let Some(cluster) = self.data.nth_mapped(index) else {
            return Part { range: position..end, content: Content::Zeros };
        };
        let offset = cluster.get() * size + in_cluster;
        let run_end = self.data.next_unmapped(cluster).get().saturating_mul(size).min(self.device.get());
        match run_end.checked_sub(offset) {
            Some(len @ 1..) => {
                let range = position..Bytes::new(position.get() + len);
                Part { range, content: Content::Device(Bytes::new(offset)) }
            }
            _ => Part { range: position..end, content: Content::Zeros },
        }
    }

    /// The parts of `range` in order, each cut at its end. There are none beyond the end of the image.
    pub fn parts(&self, range: Range<Bytes>) -> impl Iterator<Item = Part> {
        let (mut at, end) = (range.start, range.end.min(self.len()));
        std::iter::from_fn(move || {
            let part = (at < end).then(|| self.part_at(at))?;
            at = part.range.end.min(end);
            Some(Part { range: part.range.start..at, ..part })
        })
    }

    /// The position in the image of the byte of the device at `offset`, or `None` if that is not stored.
    pub fn position_of(&self, offset: Bytes) -> Option<Bytes> {
        let (cluster, in_cluster) = (offset.get() / self.cluster.get(), offset.get() % self.cluster.get());
        let stored = offset < self.device && self.data.word(cluster / 64) & (1 << (cluster % 64)) != 0;
        let index = stored.then(|| self.data.mapped_before(Block::new(cluster)))?;
        Some(Bytes::new(self.position(self.shape.data + index).get() + in_cluster))
    }

    /// Fills `buffer` with the metadata at `position`. Positions that are not metadata become zeros.
    pub fn fill_metadata(&self, position: Bytes, buffer: &mut [u8]) {
        let mut maker = Maker { layout: self, next: None };
        let (mut at, mut rest) = (position.get(), buffer);
        while !rest.is_empty() {
            let skip = (at % UNIT as u64) as usize;
            let (now, later) = rest.split_at_mut(rest.len().min(UNIT - skip));
            match <&mut [u8; UNIT]>::try_from(&mut *now) {
                Ok(unit) => maker.make(at / UNIT as u64, unit),
                Err(_) => {
                    let mut unit = [0; UNIT];
                    maker.make(at / UNIT as u64, &mut unit);
                    now.copy_from_slice(&unit[skip..skip + now.len()]);
                }
            }
            at = at.saturating_add(now.len() as u64);
            rest = later;
        }
    }

    /// The position of a cluster of the image.
    fn position(&self, cluster: u64) -> Bytes {
        // No overflow: an image has less than 2^56 bytes.
        Bytes::new(cluster * self.cluster.get())
    }
}

/// Makes units of metadata. In ascending order the units of a table need no search for the number of entries before them.
struct Maker<'a> {
    layout: &'a Layout,
    /// What the last unit of an L2 table leaves for the next one.
    next: Option<NextUnit>,
}

struct NextUnit {
    /// The unit of the image.
    unit: u64,
    /// The index in the L1 table of the L2 table of the last unit.
    table: u64,
    /// The number of data clusters before it.
    rank: u64,
}

impl Maker<'_> {
    /// Makes the unit with this index.
    fn make(&mut self, index: u64, unit: &mut [u8; UNIT]) {
        unit.fill(0);
        let Shape { refcount_table, refcount_blocks, l1, l2, data, .. } = self.layout.shape;
        let units = self.layout.cluster.get() / UNIT as u64;
        match index / units {
            0 => self.make_header(index, unit),
            cluster if cluster < refcount_blocks => self.make_refcount_table(index - refcount_table * units, unit),
            cluster if cluster < l1 => self.make_refcounts(index - refcount_blocks * units, unit),
            cluster if cluster < l2 => self.make_l1(index - l1 * units, unit),
            cluster if cluster < data => self.make_l2(index, index - l2 * units, unit),
            _ => {}
        }
    }

    fn make_header(&self, index: u64, unit: &mut [u8; UNIT]) {
        let rest = self.layout.header.get(index as usize * UNIT..).unwrap_or_default();
        let count = rest.len().min(UNIT);
        unit[..count].copy_from_slice(&rest[..count]);
    }

    fn make_refcount_table(&self, index: u64, unit: &mut [u8; UNIT]) {
        let Shape { refcount_blocks, l1, .. } = self.layout.shape;
        for (entry, block) in unit.as_chunks_mut().0.iter_mut().zip(refcount_blocks + 64 * index..l1) {
            *entry = self.layout.position(block).get().to_be_bytes();
        }
    }

    fn make_refcounts(&self, index: u64, unit: &mut [u8; UNIT]) {
        let first = index * (UNIT as u64 / REFCOUNT);
        for (entry, _) in unit.as_chunks_mut().0.iter_mut().zip(first..self.layout.shape.end) {
            *entry = 1_u16.to_be_bytes();
        }
    }

    fn make_l1(&self, index: u64, unit: &mut [u8; UNIT]) {
        let rank = self.layout.tables.mapped_before(Block::new(64 * index));
        self.make_entries(unit, (self.layout.tables.word(index), 0), self.layout.shape.l2 + rank);
    }

    /// `index` is that of the unit in the L2 tables, `at` that in the image.
    fn make_l2(&mut self, at: u64, index: u64, unit: &mut [u8; UNIT]) {
        let layout = self.layout;
        let units = layout.cluster.get() / UNIT as u64;
        let (table, rank) = match self.next.take().filter(|next| next.unit == at) {
            // No cluster is data between two L2 tables that follow each other in the image.
            Some(next) if index.is_multiple_of(units) => {
                (layout.tables.next_mapped(Block::new(next.table + 1)).map(Block::get), Some(next.rank))
            }
            Some(next) => (Some(next.table), Some(next.rank)),
            None => (layout.tables.nth_mapped(index / units).map(Block::get), None),
        };
        let Some(table) = table else { return };
        let word = table * units + index % units;
        let rank = rank.unwrap_or_else(|| layout.data.mapped_before(Block::new(64 * word)));
        let data = layout.data.word(word);
        self.make_entries(unit, (data, layout.zero.word(word)), layout.shape.data + rank);
        self.next = Some(NextUnit { unit: at + 1, table, rank: rank + u64::from(data.count_ones()) });
    }

    /// Makes 64 entries. Those whose bits are set in `stored` point to the clusters from `cluster` on.
    fn make_entries(&self, unit: &mut [u8; UNIT], (stored, zero): (u64, u64), cluster: u64) {
        let mut cluster = cluster;
        for (bit, entry) in unit.as_chunks_mut().0.iter_mut().enumerate() {
            if stored & (1 << bit) != 0 {
                *entry = (self.layout.position(cluster).get() | COPIED).to_be_bytes();
                cluster += 1;
            } else if zero & (1 << bit) != 0 {
                *entry = ZERO.to_be_bytes();
            }
        }
    }
}
