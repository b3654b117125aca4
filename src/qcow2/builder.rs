//! Makes a layout from the extents of a device.

use std::ops::Range;

use super::header::Backing;
use super::layout::Layout;
use super::shape::{self, ENTRY, Shape};
use super::{ClusterSize, Error};
use crate::map::{Block, ExtentKind, FillBuilder, FillMap, HoleMap as _};
use crate::units::Bytes;

/// What an image says of a cluster of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It is stored in the image.
    Data,
    /// It reads as zeros, whatever the backing file holds.
    Zero,
    /// It is what the backing file holds, or zeros if there is none.
    Unallocated,
}

/// Takes the extents of a device, and makes the [`Layout`] of its image.
///
/// A cluster that is data in part, or of which one part is zeros and another is unchanged, is stored as data. "Unchanged" has
/// a meaning only above a backing file; without one it is data.
pub struct Builder {
    len: Bytes,
    cluster: ClusterSize,
    backing: Option<Backing>,
    data: FillBuilder,
    zero: FillBuilder,
    tables: FillBuilder,
    /// The end of the tables that are in the map.
    tables_end: u64,
    /// The end of the extents so far.
    at: Bytes,
    /// The state of the cluster that holds `at`, as far as it is known.
    partial: Option<State>,
    /// Clusters of one state that are not in the maps yet.
    run: (Range<u64>, State),
    /// Whether an extent did not begin at the end of the one before it, or ended beyond the device.
    gap: bool,
}

impl Builder {
    /// A builder for a device of `len` bytes.
    pub fn new(len: Bytes, cluster: ClusterSize, backing: Option<Backing>) -> Self {
        let clusters = Bytes::new(len.get().div_ceil(cluster.get()));
        let tables = Bytes::new(shape::l1_entries(len, cluster));
        let map = |blocks| FillBuilder::new(blocks, Bytes::new(1));
        Self {
            len,
            cluster,
            backing,
            data: map(clusters),
            zero: map(clusters),
            tables: map(tables),
            tables_end: 0,
            at: Bytes::ZERO,
            partial: None,
            run: (0..0, State::Unallocated),
            gap: false,
        }
    }

    /// Adds the extent of `range`, which begins where the extent before it ended. The first one begins at 0, and the last one
    /// ends at the length of the device. Anything else is an error of [`Builder::finish`].
    pub fn push(&mut self, range: Range<Bytes>, kind: ExtentKind) {
        self.gap |= range.start != self.at || range.end < range.start || range.end > self.len;
        if self.gap || range.start == range.end {
            return;
        }
        let state = match (kind, &self.backing) {
            (ExtentKind::Data, _) | (ExtentKind::Unchanged, None) => State::Data,
            (ExtentKind::Hole | ExtentKind::Free, Some(_)) => State::Zero,
            (ExtentKind::Hole | ExtentKind::Free, None) | (ExtentKind::Unchanged, Some(_)) => State::Unallocated,
        };
        self.add(range.end.get(), state);
    }

    /// Adds the bytes up to `end`, of one state.
    fn add(&mut self, end: u64, state: State) {
        let size = self.cluster.get();
        let mut cluster = self.at.get() / size;
        self.at = Bytes::new(end);
        if let Some(before) = self.partial.take() {
            let merged = if before == state { state } else { State::Data };
            if end / size == cluster {
                self.partial = Some(merged);
                return;
            }
            self.add_clusters(cluster..cluster + 1, merged);
            cluster += 1;
        }
        self.add_clusters(cluster..end / size, state);
        self.partial = (!end.is_multiple_of(size)).then_some(state);
    }

    /// Adds whole clusters.
    fn add_clusters(&mut self, clusters: Range<u64>, state: State) {
        if self.run.1 == state && self.run.0.end == clusters.start {
            self.run.0.end = clusters.end;
        } else if !clusters.is_empty() {
            self.flush();
            self.run = (clusters, state);
        }
    }

    /// Enters the clusters of `run` into the maps.
    fn flush(&mut self) {
        let (clusters, state) = (self.run.0.clone(), self.run.1);
        let map = match state {
            State::Data => &mut self.data,
            State::Zero => &mut self.zero,
            State::Unallocated => return,
        };
        if clusters.is_empty() {
            return;
        }
        let tables = tables_of(&clusters, self.cluster);
        map.set_range(blocks(clusters));
        if tables.end > self.tables_end {
            self.tables_end = tables.end;
            self.tables.set_range(blocks(tables));
        }
    }

    /// The layout of the image.
    ///
    /// # Errors
    /// If the extents have gaps, if the image would be larger than QEMU allows, if the maps of the clusters would take too
    /// much memory, or if the backing file has an impossible name.
    pub fn finish(mut self) -> Result<Layout, Error> {
        if let Some(backing) = &self.backing {
            backing.check()?;
        }
        if self.gap || self.at != self.len {
            return Err(Error::Gap { at: self.at });
        }
        let too_large = Error::TooLarge { len: self.len, cluster: self.cluster };
        let size = shape::virtual_size(self.len).ok_or(too_large)?;
        if size > self.len && self.backing.is_some() {
            // The image is longer than the device by less than a sector, in which a backing file could have other bytes.
            self.add(size.get(), State::Zero);
        }
        if let Some(state) = self.partial {
            let last = self.len.get() / self.cluster.get();
            self.add_clusters(last..last + 1, state);
        }
        self.flush();
        let [data, zero, tables] =
            [self.data, self.zero, self.tables].map(|map| map.finish().ok_or(Error::TooScattered));
        let (data, zero, tables) = (data?, zero?, tables?);
        let shape = Shape::new(self.len, self.cluster, tables.mapped(), data.mapped())?;
        Ok(Layout::new((self.len, size), self.cluster, shape, self.backing.as_ref(), [data, zero, tables]))
    }
}

impl Layout {
    /// The layout of an image, without a backing file, of a device whose blocks are clusters: the mapped blocks of `data` are
    /// stored. It is the one that a [`Builder`] makes of the extents of `data`. `None` if the blocks have another length than
    /// `cluster`.
    ///
    /// # Errors
    /// If the image would be larger than QEMU allows.
    pub fn of_blocks(data: &FillMap, cluster: ClusterSize) -> Option<Result<Self, Error>> {
        (data.block_size() == cluster.bytes()).then(|| Self::of_clusters(data, cluster))
    }

    fn of_clusters(data: &FillMap, cluster: ClusterSize) -> Result<Self, Error> {
        let len = data.len();
        let size = shape::virtual_size(len).ok_or(Error::TooLarge { len, cluster })?;
        let new = |len: u64| FillBuilder::new(Bytes::new(len), Bytes::new(1));
        let mut tables = new(shape::l1_entries(len, cluster));
        let mut next = data.next_mapped(Block::new(0));
        while let Some(first) = next {
            let of_run = tables_of(&(first.get()..data.next_unmapped(first).get()), cluster);
            // No table is looked at twice.
            next = data.next_mapped(Block::new(of_run.end * (cluster.get() / ENTRY)));
            tables.set_range(blocks(of_run));
        }
        let tables = tables.finish().ok_or(Error::TooScattered)?;
        let zero = new(len.get().div_ceil(cluster.get())).finish().ok_or(Error::TooScattered)?;
        let shape = Shape::new(len, cluster, tables.mapped(), data.mapped())?;
        Ok(Self::new((len, size), cluster, shape, None, [data.clone(), zero, tables]))
    }
}

/// The indexes of the L2 tables of clusters of the device.
fn tables_of(clusters: &Range<u64>, cluster: ClusterSize) -> Range<u64> {
    let per_table = cluster.get() / ENTRY;
    clusters.start / per_table..clusters.end.div_ceil(per_table)
}

fn blocks(range: Range<u64>) -> Range<Block> {
    Block::new(range.start)..Block::new(range.end)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::map::{Concat, HoleMap, Uniform, view};
    use crate::qcow2::Part;

    const CLUSTER: Bytes = Bytes::new(4096);

    /// All metadata of an image, and all of its parts.
    fn described(layout: &Layout) -> (Bytes, Vec<u8>, Vec<Part>) {
        let (mut at, mut parts) = (Bytes::ZERO, Vec::new());
        while at < layout.len() {
            let part = layout.part_at(at);
            at = part.range.end;
            parts.push(part);
        }
        let mut metadata = vec![0; usize::try_from(parts[0].range.end.get()).unwrap()];
        layout.fill_metadata(Bytes::ZERO, &mut metadata);
        (layout.virtual_size(), metadata, parts)
    }

    fn by_extents(map: &dyn HoleMap, cluster: ClusterSize) -> Layout {
        let mut builder = Builder::new(map.len(), cluster, None);
        for (start, extent) in view::runs(map, Bytes::new(512), Bytes::ZERO..map.len()) {
            builder.push(start..extent.end, extent.kind);
        }
        builder.finish().unwrap()
    }

    proptest! {
        /// A table has 512 entries, and a chunk of the map has 32 768 blocks.
        #[test]
        fn an_image_of_blocks_is_that_of_their_extents(
            runs in vec((0_u64..100_000, 1_u64..2000), 0..12),
            tail in 0..4096_u64,
        ) {
            let cluster = ClusterSize::new(CLUSTER).unwrap();
            let mut builder = FillBuilder::new(Bytes::new(100_000 * 4096 + tail), CLUSTER);
            for (start, len) in runs {
                builder.set_range(blocks(start..start + len));
            }
            let map = builder.finish().unwrap();
            let of_blocks = Layout::of_blocks(&map, cluster).unwrap().unwrap();
            prop_assert!(described(&of_blocks) == described(&by_extents(&map, cluster)));
        }
    }

    #[test]
    fn only_blocks_that_are_clusters_are_taken_as_they_are() {
        let map = FillBuilder::new(Bytes::new(1 << 20), CLUSTER).finish().unwrap();
        assert!(Layout::of_blocks(&map, ClusterSize::new(Bytes::new(8192)).unwrap()).is_none());
        let map: Arc<dyn HoleMap> = Arc::new(map);
        let whole = Concat::new(vec![map.clone()]).unwrap();
        assert_eq!(whole.fill_map().map(HoleMap::len), Some(map.len()));
        let rest = Uniform { len: CLUSTER, kind: ExtentKind::Data };
        assert!(Concat::new(vec![map, Arc::new(rest)]).unwrap().fill_map().is_none());
    }
}
