//! The mapped blocks of a thinly provisioned device, as a compressed bitmap.
//!
//! Blocks are grouped into chunks of 32 768. A chunk without a mapped block is not stored. Neighbouring chunks in which
//! every block is mapped are stored as one range. A mixed chunk is stored with one bit per block, and with two bits of
//! summary for every 64 blocks: whether any of them is mapped, and whether all of them are. A lookup is a binary search
//! over the stored ranges and chunks, and a search in at most three chunks. Each stored range and chunk has the number of
//! mapped blocks before it, so that counting the mapped blocks before a block, and finding the n-th mapped block, are binary
//! searches too. The map takes at most 1.05 bits per block of the device's virtual size, and next to nothing for a large
//! empty device.

mod chunk;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Extent, ExtentKind, HoleMap};
use crate::units::Bytes;
use chunk::{CHUNK, ChunkBuilder, MixedChunk, WORDS};

/// The largest number of chunks that one map may store: 1 GiB of memory. Only damaged metadata, or a device of billions of
/// blocks, has more.
const MAX_CHUNKS: usize = 1 << 18;

/// The index of a block in a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(u64);

impl Block {
    /// The block with this index.
    pub const fn new(index: u64) -> Self {
        Self(index)
    }

    /// The index.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Collects the mapped blocks of one device from any number of [`Filler`]s, each used by one thread.
pub struct FillBuilder {
    len: Bytes,
    block_size: Bytes,
    /// The number of blocks of the device.
    blocks: u64,
    max_chunks: usize,
    /// The chunks in which single blocks were marked, by index.
    mixed: Mutex<BTreeMap<u64, Arc<ChunkBuilder>>>,
    /// Ranges of chunks that were marked as a whole.
    full: Mutex<Vec<Range<u64>>>,
    /// Whether a chunk was dropped, since there were `max_chunks` already.
    overflow: AtomicBool,
    /// The chunk that [`FillBuilder::set_range`] used last, with its index.
    last: Option<(u64, Arc<ChunkBuilder>)>,
}

impl FillBuilder {
    /// A builder for a device of `len` bytes in blocks of `block_size`, which must not be zero and need not be a power
    /// of two; the last block may be partial.
    pub fn new(len: Bytes, block_size: Bytes) -> Self {
        assert!(block_size > Bytes::ZERO, "blocks have a size");
        Self {
            len,
            block_size,
            blocks: len.get().div_ceil(block_size.get()),
            max_chunks: MAX_CHUNKS,
            mixed: Mutex::new(BTreeMap::new()),
            full: Mutex::new(Vec::new()),
            overflow: AtomicBool::new(false),
            last: None,
        }
    }

    /// Marks the blocks of `range`, as [`Filler::set_range`] does, for a builder that one thread uses alone.
    pub fn set_range(&mut self, range: Range<Block>) {
        let last = self.last.take();
        let mut filler = Filler { builder: self, chunk: last };
        filler.set_range(range);
        self.last = filler.chunk;
    }

    /// A filler for one thread.
    pub fn filler(&self) -> Filler<'_> {
        Filler { builder: self, chunk: None }
    }

    /// The map of all marked blocks, or `None` if it takes more than `MAX_CHUNKS`.
    pub fn finish(self) -> Option<FillMap> {
        if self.overflow.into_inner() {
            return None;
        }
        let mut spans: Vec<Span> = Vec::new();
        let mut full = merged(self.full.into_inner().unwrap_or_else(PoisonError::into_inner)).into_iter().peekable();
        let mut mapped = 0;
        for (at, chunk) in self.mixed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            while let Some(whole) = full.next_if(|whole| whole.end <= at) {
                mapped += push(&mut spans, Span { chunks: whole, before: mapped, fill: Fill::Full });
            }
            if full.peek().is_none_or(|whole| at < whole.start) {
                mapped += push(&mut spans, Span { chunks: at..at + 1, before: mapped, fill: Fill::of(&chunk) });
            }
        }
        for whole in full {
            mapped += push(&mut spans, Span { chunks: whole, before: mapped, fill: Fill::Full });
        }
        spans.shrink_to_fit();
        Some(FillMap { len: self.len, block_size: self.block_size, blocks: self.blocks, mapped, spans })
    }

    /// The chunk with the index `at`, which is added if it does not exist; `None` if there are too many chunks.
    fn chunk(&self, at: u64) -> Option<Arc<ChunkBuilder>> {
        let mut mixed = self.mixed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(chunk) = mixed.get(&at) {
            return Some(Arc::clone(chunk));
        }
        if mixed.len() >= self.max_chunks {
            self.overflow.store(true, Relaxed);
            return None;
        }
        let chunk = Arc::new(ChunkBuilder::new());
        mixed.insert(at, Arc::clone(&chunk));
        Some(chunk)
    }
}

/// Appends `span`, or merges it with the last span if both are full. Returns the number of mapped blocks of `span`.
fn push(spans: &mut Vec<Span>, span: Span) -> u64 {
    let mapped = match &span.fill {
        Fill::Full => (span.chunks.end - span.chunks.start) * CHUNK,
        Fill::Mixed(chunk) => chunk.count_mapped(&(0..CHUNK)),
    };
    match spans.last_mut() {
        _ if mapped == 0 => {}
        Some(last) if last.is_full() && span.is_full() && last.chunks.end == span.chunks.start => {
            last.chunks.end = span.chunks.end;
        }
        _ => spans.push(span),
    }
    mapped
}

/// The union of `ranges`, in ascending order, as ranges that neither overlap nor touch.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Marks blocks of a [`FillBuilder`] as mapped. Blocks beyond the end of the device are ignored.
pub struct Filler<'a> {
    builder: &'a FillBuilder,
    /// The chunk that was used last, with its index: for further blocks of it the lock of the builder is not needed.
    chunk: Option<(u64, Arc<ChunkBuilder>)>,
}

impl Filler<'_> {
    /// Marks the blocks of `range`.
    pub fn set_range(&mut self, range: Range<Block>) {
        let (mut first, end) = (range.start.get(), range.end.get().min(self.builder.blocks));
        while first < end {
            let whole = first / CHUNK..end / CHUNK;
            if first.is_multiple_of(CHUNK) && !whole.is_empty() {
                first = whole.end * CHUNK;
                self.builder.full.lock().unwrap_or_else(PoisonError::into_inner).push(whole);
                continue;
            }
            let count = (end - first).min(64 - first % 64);
            self.set_bits(first / 64, (u64::MAX >> (64 - count)) << (first % 64));
            first += count;
        }
    }

    /// Marks `blocks`, which must be strictly ascending.
    pub fn set_ascending(&mut self, blocks: impl DoubleEndedIterator<Item = Block> + ExactSizeIterator + Clone) {
        let Some((first, last)) = blocks.clone().next().zip(blocks.clone().next_back()) else { return };
        let (first, last) = (first.get(), last.get());
        if usize::try_from(last - first).is_ok_and(|distance| distance == blocks.len() - 1) {
            return self.set_range(Block::new(first)..Block::new(last.saturating_add(1)));
        }
        let (mut word, mut bits) = (first / 64, 0);
        for block in blocks {
            let block = block.get();
            if block >= self.builder.blocks {
                break;
            }
            if block / 64 != word {
                self.set_bits(word, bits);
                (word, bits) = (block / 64, 0);
            }
            bits |= 1 << (block % 64);
        }
        if bits != 0 {
            self.set_bits(word, bits);
        }
    }

    /// Marks those of the 64 blocks from `64 * word` on whose bits are set in `bits`.
    fn set_bits(&mut self, word: u64, bits: u64) {
        let at = word / WORDS as u64;
        let in_chunk = (word % WORDS as u64) as usize;
        match &self.chunk {
            Some((current, chunk)) if *current == at => chunk.set(in_chunk, bits),
            _ => {
                let Some(chunk) = self.builder.chunk(at) else { return };
                chunk.set(in_chunk, bits);
                self.chunk = Some((at, chunk));
            }
        }
    }
}

/// What a span of chunks holds.
#[derive(Clone)]
enum Fill {
    /// All blocks are mapped.
    Full,
    /// Some blocks are mapped.
    Mixed(Box<MixedChunk>),
}

impl Fill {
    fn of(chunk: &ChunkBuilder) -> Self {
        let chunk = chunk.finish();
        if chunk.is_full() { Self::Full } else { Self::Mixed(chunk) }
    }
}

/// Neighbouring chunks with mapped blocks: any number of full chunks, or one mixed chunk.
#[derive(Clone)]
struct Span {
    /// Indexes of chunks.
    chunks: Range<u64>,
    /// The number of mapped blocks of all spans before this one.
    before: u64,
    fill: Fill,
}

impl Span {
    /// How many of the blocks in `range`, which lies within this span, are mapped.
    fn count_mapped(&self, range: &Range<u64>) -> u64 {
        let Fill::Mixed(chunk) = &self.fill else { return range.end - range.start };
        let first = self.chunks.start * CHUNK;
        chunk.count_mapped(&(range.start - first..range.end - first))
    }

    fn is_full(&self) -> bool {
        matches!(self.fill, Fill::Full)
    }
}

/// The mapped blocks of one device. As a [`HoleMap`] it returns maximal extents: mapped blocks are data, others holes.
#[derive(Clone)]
pub struct FillMap {
    len: Bytes,
    block_size: Bytes,
    /// The number of blocks of the device.
    blocks: u64,
    /// The number of mapped blocks.
    mapped: u64,
    /// In ascending order.
    spans: Vec<Span>,
}

impl FillMap {
    /// The length of a block.
    pub fn block_size(&self) -> Bytes {
        self.block_size
    }

    /// The spans from the first one on that does not end before `block`.
    fn spans_from(&self, block: u64) -> &[Span] {
        &self.spans[self.spans.partition_point(|span| span.chunks.end <= block / CHUNK)..]
    }

    /// The first mapped block at or after `from`.
    pub fn next_mapped(&self, from: Block) -> Option<Block> {
        next_mapped(self.spans_from(from.get()), from.get())
    }

    /// The first block at or after `from` that is not mapped. It may lie beyond the end of the device.
    pub fn next_unmapped(&self, from: Block) -> Block {
        next_unmapped(self.spans_from(from.get()), from.get())
    }

    /// How many of the blocks before `block` are mapped.
    pub fn mapped_before(&self, block: Block) -> u64 {
        let block = block.get();
        let after = self.spans.partition_point(|span| span.chunks.start * CHUNK < block);
        let Some(span) = after.checked_sub(1).map(|last| &self.spans[last]) else { return 0 };
        span.before + span.count_mapped(&(span.chunks.start * CHUNK..block.min(span.chunks.end * CHUNK)))
    }

    /// The mapped block before which exactly `count` blocks are mapped, or `None` if no more than `count` are mapped at all.
    pub fn nth_mapped(&self, count: u64) -> Option<Block> {
        let after = self.spans.partition_point(|span| span.before <= count);
        let span = &self.spans[after.checked_sub(1).filter(|_| count < self.mapped)?];
        let (first, within) = (span.chunks.start * CHUNK, count - span.before);
        match &span.fill {
            Fill::Full => Some(Block(first + within)),
            Fill::Mixed(chunk) => chunk.nth_mapped(within).map(|at| Block(first + at)),
        }
    }

    /// The number of mapped blocks.
    pub fn mapped(&self) -> u64 {
        self.mapped
    }

    /// Which of the 64 blocks from block `64 * word` on are mapped, the first of them in the lowest bit.
    pub fn word(&self, word: u64) -> u64 {
        let at = word / WORDS as u64;
        match self.spans.get(self.spans.partition_point(|span| span.chunks.end <= at)) {
            Some(Span { chunks, fill, .. }) if chunks.start <= at => match fill {
                Fill::Full => u64::MAX,
                Fill::Mixed(chunk) => chunk.word((word % WORDS as u64) as usize),
            },
            _ => 0,
        }
    }

    /// How many of the blocks in `range` are mapped.
    fn count_mapped(&self, range: Range<u64>) -> u64 {
        self.mapped_before(Block(range.end)) - self.mapped_before(Block(range.start))
    }

    /// The position of `block`, limited to the length of the device.
    fn start_of(&self, block: Block) -> Bytes {
        block.get().checked_mul(self.block_size.get()).map_or(self.len, |start| self.len.min(Bytes::new(start)))
    }
}

/// The first mapped block at or after `from` in `spans`, none of which ends before `from`.
fn next_mapped(spans: &[Span], from: u64) -> Option<Block> {
    // All mapped blocks of a mixed span may lie before `from`. Then the answer is in the next span.
    spans.iter().find_map(|span| {
        let first = from.max(span.chunks.start * CHUNK);
        match &span.fill {
            Fill::Full => Some(Block(first)),
            Fill::Mixed(chunk) => {
                chunk.next_mapped((first % CHUNK) as usize).map(|at| Block(span.chunks.start * CHUNK + at as u64))
            }
        }
    })
}

/// The first block at or after `from` that is not mapped, where `spans` are all spans that do not end before `from`.
fn next_unmapped(spans: &[Span], from: u64) -> Block {
    let mut block = from;
    for span in spans {
        if span.chunks.start > block / CHUNK {
            break;
        }
        match &span.fill {
            Fill::Full => block = span.chunks.end * CHUNK,
            Fill::Mixed(chunk) => match chunk.next_unmapped((block % CHUNK) as usize) {
                Some(at) => return Block(span.chunks.start * CHUNK + at as u64),
                None => block = span.chunks.end * CHUNK,
            },
        }
    }
    Block(block)
}

impl HoleMap for FillMap {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        if offset >= self.len {
            return Extent::outside(offset);
        }
        let block = Block(offset.get() / self.block_size.get());
        // One search for both ends: a walk over many extents spends most of its time in it.
        let spans = self.spans_from(block.get());
        match next_mapped(spans, block.get()) {
            Some(mapped) if mapped == block => {
                Extent { end: self.start_of(next_unmapped(spans, block.get())), kind: ExtentKind::Data }
            }
            Some(mapped) => Extent { end: self.start_of(mapped), kind: ExtentKind::Hole },
            None => Extent { end: self.len, kind: ExtentKind::Hole },
        }
    }

    fn next_data(&self, offset: Bytes) -> Bytes {
        let block = Block(offset.get() / self.block_size.get());
        self.next_mapped(block).map_or(self.len, |mapped| self.start_of(mapped)).max(offset).min(self.len)
    }

    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        let hole = self.next_unmapped(Block(offset.get() / self.block_size.get()));
        let end = self.next_mapped(hole).map_or(self.len, |mapped| self.start_of(mapped));
        Some(self.start_of(hole).max(offset)..end).filter(|hole| hole.start < hole.end)
    }

    fn count_data(&self, range: &Range<Bytes>, unit: Bytes) -> Option<Bytes> {
        let block = self.block_size.get();
        let Some(last) = range.end.get().checked_sub(1).filter(|_| range.start < range.end) else {
            return Some(Bytes::ZERO);
        };
        // Blocks must be whole units, as otherwise parts of holes would be rounded off.
        if !block.is_multiple_of(unit.get()) || range.end > self.len {
            return None;
        }
        let (first, last) = (range.start.get() / block, last / block);
        let is_mapped = |block| self.count_mapped(block..block + 1);
        // The bytes of the first and the last block that lie outside of the range.
        let before = is_mapped(first) * (range.start.get() - first * block);
        let after = is_mapped(last) * (block - (range.end.get() - last * block));
        let all = self.count_mapped(first..last + 1).checked_mul(block)?;
        Some(Bytes::new(all - before - after))
    }

    fn allocated(&self) -> Option<Bytes> {
        let Some(last) = self.blocks.checked_sub(1) else { return Some(Bytes::ZERO) };
        let of_blocks = |blocks: u64| Bytes::new(blocks.saturating_mul(self.block_size.get()));
        if self.next_mapped(Block(last)).is_some() {
            let tail = self.len.saturating_sub(of_blocks(last));
            return Some(of_blocks(self.mapped - 1).saturating_add(tail));
        }
        Some(of_blocks(self.mapped))
    }

    fn fill_map(&self) -> Option<&FillMap> {
        Some(self)
    }

    fn memory(&self) -> Bytes {
        let chunks = self.spans.iter().filter(|span| !span.is_full()).count() * size_of::<MixedChunk>();
        Bytes::new((size_of::<Self>() + self.spans.capacity() * size_of::<Span>() + chunks) as u64)
    }
}

#[cfg(test)]
mod tests;
