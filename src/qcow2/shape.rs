//! How many clusters each part of an image has.

use super::{ClusterSize, Error};
use crate::units::Bytes;

/// The size of an entry of the L1 table, the L2 tables and the refcount table.
pub(super) const ENTRY: u64 = 8;
/// The size of an entry of a refcount block.
pub(super) const REFCOUNT: u64 = 2;
/// The largest L1 table (`QCOW_MAX_L1_SIZE` of `block/qcow2.h`).
const MAX_L1: u64 = 32 << 20;
/// The largest refcount table (`QCOW_MAX_REFTABLE_SIZE` of `block/qcow2.h`).
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// The end of the positions that an entry of a table can hold (`L2E_OFFSET_MASK` of `block/qcow2.h`).
const MAX_IMAGE: u64 = 1 << 56;

/// Indexes of the first cluster of each part. The header is cluster 0, and each part ends where the next one begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) refcount_table: u64,
    pub(super) refcount_blocks: u64,
    pub(super) l1: u64,
    pub(super) l2: u64,
    pub(super) data: u64,
    /// The number of clusters of the image.
    pub(super) end: u64,
    /// Entries of the L1 table: at least one, also for a device without bytes.
    pub(super) l1_entries: u64,
}

/// The length of the device in whole sectors, as the size of an image is: `None` if it does not fit in 64 bits.
pub(super) fn virtual_size(len: Bytes) -> Option<Bytes> {
    len.align_up(Bytes::new(512))
}

/// The number of entries of an L1 table for a device of `len` bytes.
pub(super) fn l1_entries(len: Bytes, cluster: ClusterSize) -> u64 {
    len.get().div_ceil(cluster.get()).div_ceil(cluster.get() / ENTRY).max(1)
}

/// Whether a device of `len` bytes fits, even if all of it is data. Of a device that is larger than any image can be, at
/// least the largest part that can be data must fit.
pub(super) fn can_hold(len: Bytes, cluster: ClusterSize) -> bool {
    let tables = l1_entries(len, cluster);
    let clusters = len.get().div_ceil(cluster.get());
    let most = MAX_IMAGE / cluster.get() / 2;
    virtual_size(len).is_some() && Shape::new(len, cluster, tables.min(most), clusters.min(most)).is_ok()
}

impl Shape {
    /// The image of a device of `len` bytes that has `tables` L2 tables and `data` data clusters.
    pub(super) fn new(len: Bytes, cluster: ClusterSize, tables: u64, data: u64) -> Result<Self, Error> {
        let too_large = Error::TooLarge { len, cluster };
        let size = cluster.get();
        let l1_entries = l1_entries(len, cluster);
        if l1_entries * ENTRY > MAX_L1 {
            return Err(too_large);
        }
        let l1_clusters = (l1_entries * ENTRY).div_ceil(size);
        // Neither sum overflows: there are at most 2^52 clusters of a device.
        let others = 1 + l1_clusters + tables + data;
        let (mut table, mut blocks) = (1, 1);
        loop {
            let end = others + table + blocks;
            let needed_blocks = end.div_ceil(size / REFCOUNT);
            let needed_table = (needed_blocks * ENTRY).div_ceil(size);
            if needed_blocks <= blocks && needed_table <= table {
                break;
            }
            (table, blocks) = (needed_table, needed_blocks);
        }
        let l1 = 1 + table + blocks;
        let l2 = l1 + l1_clusters;
        let data_start = l2 + tables;
        let end = data_start + data;
        if end > MAX_IMAGE / size || table * size > MAX_REFCOUNT_TABLE {
            return Err(too_large);
        }
        Ok(Self { refcount_table: 1, refcount_blocks: 1 + table, l1, l2, data: data_start, end, l1_entries })
    }
}
