//! What changed between two thin devices of one pool.
//!
//! A block is unchanged if both devices map it to the same data block, or if neither of them maps it and neither has an
//! external origin. A data block that two devices map is not written as long as both do: see "Unchanged" in
//! `docs/correctness.md`. The time in the value of a mapping does not count.

mod compare;
mod live;

pub use live::{are_of_one_pool, between};

use std::ops::Range;

use self::compare::{Comparison, Difference};
use super::error::{ThinError, ThinResult};
use super::metadata::Metadata;
use super::{DeviceDetails, ThinId};
use crate::map::{Block, ChangeMap, FillBuilder, Filler, HoleMap};
use crate::source::changes::{Identity, IdentityValue};
use crate::units::Bytes;

/// One of two devices that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compared {
    /// Its number in the pool.
    pub id: ThinId,
    /// Its length. Mappings past it are left out.
    pub len: Bytes,
}

/// The changes between two devices, and what identifies the devices.
pub struct DeviceChanges {
    /// The changes.
    pub map: ChangeMap,
    older: (ThinId, DeviceDetails),
    newer: (ThinId, DeviceDetails),
    block: Bytes,
}

impl DeviceChanges {
    /// The changes from `older` to `newer`, as [`Metadata::changes`].
    ///
    /// # Errors
    /// As [`Metadata::changes`].
    pub fn read(metadata: &Metadata, older: Compared, newer: Compared, over_origin: bool) -> ThinResult<Self> {
        let map = metadata.changes(older, newer, over_origin)?;
        let details = |id| Ok((id, metadata.details(id)?));
        let block = metadata.superblock().data_block_size.bytes();
        Ok(Self { map, older: details(older.id)?, newer: details(newer.id)?, block })
    }

    /// The identity of the devices. `pool` is the pool's uuid, which the metadata does not have.
    ///
    /// The transaction is that in which the newer device was created: it stays the same for the life of the device,
    /// while that of the pool grows with each volume that is created or removed.
    pub fn identity(&self, pool: Option<String>) -> Identity {
        let number = |number: u64| IdentityValue::Number(number);
        let ((older, older_details), (newer, newer_details)) = (self.older, self.newer);
        let fields = vec![
            ("pool", pool.map_or(IdentityValue::None, IdentityValue::Text)),
            ("older", number(older.get().into())),
            ("newer", number(newer.get().into())),
            ("older-created", number(older_details.created.into())),
            ("newer-created", number(newer_details.created.into())),
            ("transaction", number(newer_details.transaction)),
            ("size", number(self.map.len().get())),
            ("block-size", number(self.block.get())),
        ];
        Identity { kind: "thin", fields }
    }
}

/// Collects neighbouring blocks, so that they are marked as one range.
struct Marker<'a> {
    filler: Filler<'a>,
    run: Range<u64>,
}

impl<'a> Marker<'a> {
    fn new(builder: &'a FillBuilder) -> Self {
        Self { filler: builder.filler(), run: 0..0 }
    }

    fn mark(&mut self, block: u64) {
        if block != self.run.end {
            self.finish();
            self.run.start = block;
        }
        self.run.end = block + 1;
    }

    fn finish(&mut self) {
        let run = Block::new(self.run.start)..Block::new(self.run.end);
        self.filler.set_range(run);
    }
}

impl Drop for Marker<'_> {
    fn drop(&mut self) {
        self.finish();
    }
}

/// The result while it is collected.
struct Collected {
    changed: FillBuilder,
    cleared: FillBuilder,
}

impl Metadata {
    /// What changed from `older` to `newer`, as a map that is as long as the newer one.
    ///
    /// `over_origin` is whether one of them has an external origin. Then only a block that both map is unchanged, and a
    /// block that is not mapped is data. (What is read there depends on the length that the origin had when each device
    /// was last resumed, which the kernel does not show.) The map of the whole newer device is read for that.
    ///
    /// Nothing past the end of the older one is unchanged. Nor is the block in which it ends, unless both have the same
    /// length.
    ///
    /// # Errors
    /// When the pool has no such device, a node that is needed cannot be read or fails a check, or the trees do not
    /// differ by as many mappings as their details.
    pub fn changes(&self, older: Compared, newer: Compared, over_origin: bool) -> ThinResult<ChangeMap> {
        let block = self.superblock().data_block_size.bytes();
        let new = || FillBuilder::new(newer.len, block);
        let collected = Collected { changed: new(), cleared: new() };
        let end = Bytes::new(older.len.get().div_ceil(block.get()));
        self.collect_differences(older, newer, over_origin, end.get(), &collected)?;
        if newer.len != older.len {
            let in_last = older.len.get() / block.get()..end.get();
            collected.changed.filler().set_range(Block::new(in_last.start)..Block::new(in_last.end));
        }
        self.collect_after(end.get(), newer, block, &collected)?;
        if over_origin {
            self.collect_unmapped(newer, block, &collected.changed)?;
        }
        let changed = collected.changed.finish().ok_or(ThinError::TooLarge)?;
        let cleared = collected.cleared.finish().ok_or(ThinError::TooLarge)?;
        ChangeMap::new(changed, cleared).ok_or(ThinError::TooLarge)
    }

    /// Marks the blocks before `end` in which the trees differ.
    fn collect_differences(
        &self,
        older: Compared,
        newer: Compared,
        over_origin: bool,
        end: u64,
        collected: &Collected,
    ) -> ThinResult<()> {
        let trees = (self.mapping_tree(older.id)?, self.mapping_tree(newer.id)?);
        let stated = (self.details(older.id)?.mapped_blocks, self.details(newer.id)?.mapped_blocks);
        let mut changed = Marker::new(&collected.changed);
        let mut cleared = Marker::new(&collected.cleared);
        // All keys, including those past the ends, so that the number of mappings can be checked.
        let mut more = 0;
        Comparison::new(self.reader(), Some(trees.0), trees.1).differences(0..u64::MAX, &mut |key, difference| {
            more += match difference {
                Difference::OnlyOlder => -1,
                Difference::OnlyNewer => 1,
                Difference::Moved => 0,
            };
            match difference {
                _ if key >= end => {}
                Difference::OnlyOlder if !over_origin => cleared.mark(key),
                _ => changed.mark(key),
            }
        })?;
        if i128::from(stated.1) - i128::from(stated.0) != more {
            return Err(ThinError::OtherDifference { older: older.id, newer: newer.id });
        }
        Ok(())
    }

    /// Marks the blocks from `end` on, the end of the older device: mapped blocks are changed, others read as zeros.
    fn collect_after(&self, end: u64, newer: Compared, block: Bytes, collected: &Collected) -> ThinResult<()> {
        let after = end..newer.len.get().div_ceil(block.get());
        if after.is_empty() {
            return Ok(());
        }
        collected.cleared.filler().set_range(Block::new(after.start)..Block::new(after.end));
        let mut changed = Marker::new(&collected.changed);
        let tree = self.mapping_tree(newer.id)?;
        Comparison::new(self.reader(), None, tree).differences(after, &mut |key, _| changed.mark(key))
    }

    /// Marks the blocks that the newer device does not map.
    fn collect_unmapped(&self, newer: Compared, block: Bytes, changed: &FillBuilder) -> ThinResult<()> {
        let mapped = self.map(newer.id, newer.len, 1)?;
        let mut filler = changed.filler();
        let mut at = Bytes::ZERO;
        while let Some(hole) = mapped.next_hole(at) {
            let blocks = hole.start.get() / block.get()..hole.end.get().div_ceil(block.get());
            filler.set_range(Block::new(blocks.start)..Block::new(blocks.end));
            at = hole.end;
        }
        Ok(())
    }
}
