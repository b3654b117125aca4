//! Which blocks of a thinly provisioned device are mapped: a bitmap that keeps only what is mixed.
//!
//! Blocks are grouped into chunks of 32 768. A chunk without a mapped block is not stored at all, neighbouring chunks
//! that are mapped throughout are one entry, and a mixed chunk holds one bit per block and, above every 64 blocks, two
//! bits that tell whether any and whether all of them are mapped (as ZFS keeps a fill count per indirect block). A
//! lookup is a binary search over the entries and at most three chunks, whatever the device holds, and memory follows
//! what is mapped: at most 1.04 bits per block of virtual size, and next to nothing for a large empty device.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Extent, HoleMap, Kind};
use crate::units::Bytes;

/// Words of 64 blocks in a chunk: with 8 bytes each, one page.
const WORDS: usize = 512;
/// Words of summary in a chunk, one bit per word.
const SUMMARY: usize = WORDS / 64;
/// Blocks in a chunk.
const CHUNK: u64 = 64 * WORDS as u64;
/// Chunks that one map may hold: 1 GiB of them. Only a map of billions of blocks, or one that was made up, has more.
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

/// A chunk while it is filled, possibly by several threads at once.
struct Filling([AtomicU64; WORDS]);

/// Collects the mapped blocks of one device, from any number of [`Filler`]s.
pub struct FillBuilder {
    len: Bytes,
    block_size: Bytes,
    blocks: u64,
    max_chunks: usize,
    mixed: Mutex<BTreeMap<u64, Arc<Filling>>>,
    /// Ranges of whole chunks.
    full: Mutex<Vec<Range<u64>>>,
    overflow: AtomicBool,
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
        }
    }

    /// One thread's way in.
    pub fn filler(&self) -> Filler<'_> {
        Filler { builder: self, chunk: None }
    }

    /// The map of all that the fillers set, or `None` when it would take more memory than any real device needs.
    pub fn finish(self) -> Option<FillMap> {
        if self.overflow.into_inner() {
            return None;
        }
        let mut spans: Vec<Span> = Vec::new();
        let mut full = merged(self.full.into_inner().unwrap_or_else(PoisonError::into_inner)).into_iter().peekable();
        let mut mapped = 0;
        for (at, filling) in self.mixed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            while let Some(whole) = full.next_if(|whole| whole.end <= at) {
                mapped += push(&mut spans, Span { chunks: whole, fill: Fill::Full });
            }
            if full.peek().is_none_or(|whole| at < whole.start) {
                mapped += push(&mut spans, Span { chunks: at..at + 1, fill: Fill::of(&filling) });
            }
        }
        for whole in full {
            mapped += push(&mut spans, Span { chunks: whole, fill: Fill::Full });
        }
        spans.shrink_to_fit();
        Some(FillMap { len: self.len, block_size: self.block_size, blocks: self.blocks, mapped, spans })
    }

    /// The chunk with this index, made when it is not there yet; `None` when there are too many.
    fn chunk(&self, at: u64) -> Option<Arc<Filling>> {
        let mut mixed = self.mixed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(chunk) = mixed.get(&at) {
            return Some(Arc::clone(chunk));
        }
        if mixed.len() >= self.max_chunks {
            self.overflow.store(true, Relaxed);
            return None;
        }
        let chunk = Arc::new(Filling([const { AtomicU64::new(0) }; WORDS]));
        mixed.insert(at, Arc::clone(&chunk));
        Some(chunk)
    }
}

/// Appends `span`, merging it with a full neighbour; the number of its mapped blocks.
fn push(spans: &mut Vec<Span>, span: Span) -> u64 {
    let mapped = match &span.fill {
        Fill::Full => (span.chunks.end - span.chunks.start) * CHUNK,
        Fill::Mixed(chunk) => chunk.words.iter().map(|word| u64::from(word.count_ones())).sum(),
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

/// The same ranges in order, none touching another.
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

/// Sets blocks of a [`FillBuilder`] as mapped. Blocks past the device's end are ignored.
pub struct Filler<'a> {
    builder: &'a FillBuilder,
    /// The chunk that was used last, so that a run of neighbours takes the lock once.
    chunk: Option<(u64, Arc<Filling>)>,
}

impl Filler<'_> {
    /// Sets the blocks of `range`.
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

    /// Sets `blocks`, which must be strictly ascending.
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

    /// Sets `bits` of the device's 64 blocks from `64 * word` on.
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

impl Filling {
    fn set(&self, word: usize, bits: u64) {
        if bits == u64::MAX {
            // A plain store never undoes another thread's bits, for it sets them all.
            self.0[word].store(bits, Relaxed);
        } else {
            self.0[word].fetch_or(bits, Relaxed);
        }
    }
}

/// A finished chunk with mapped and unmapped blocks.
struct Chunk {
    words: [u64; WORDS],
    /// One bit per word: it has a mapped block.
    any: [u64; SUMMARY],
    /// One bit per word: all its blocks are mapped.
    all: [u64; SUMMARY],
}

impl Chunk {
    /// The first mapped block of the chunk at or after `from`.
    fn next_mapped(&self, from: usize) -> Option<usize> {
        let word = from / 64;
        match self.words[word] & (u64::MAX << (from % 64)) {
            0 => next_bit(&self.any, word + 1, 0).map(|word| word * 64 + self.words[word].trailing_zeros() as usize),
            bits => Some(word * 64 + bits.trailing_zeros() as usize),
        }
    }

    /// The first block of the chunk at or after `from` that is not mapped.
    fn next_unmapped(&self, from: usize) -> Option<usize> {
        let word = from / 64;
        match !self.words[word] & (u64::MAX << (from % 64)) {
            0 => next_bit(&self.all, word + 1, u64::MAX)
                .map(|word| word * 64 + self.words[word].trailing_ones() as usize),
            bits => Some(word * 64 + bits.trailing_zeros() as usize),
        }
    }
}

/// The first bit at or after `from` that is set once `bits` are inverted by `invert`.
fn next_bit(bits: &[u64; SUMMARY], from: usize, invert: u64) -> Option<usize> {
    let mut mask = u64::MAX << (from % 64);
    for (at, word) in bits.iter().enumerate().skip(from / 64) {
        let found = (word ^ invert) & mask;
        if found != 0 {
            return Some(at * 64 + found.trailing_zeros() as usize);
        }
        mask = u64::MAX;
    }
    None
}

/// The bits of the word of blocks from `at` on that are in `start..end`.
fn bits_within(at: u64, start: u64, end: u64) -> u64 {
    let below = |limit: u64| match limit.saturating_sub(at) {
        count @ 0..64 => (1 << count) - 1,
        _ => u64::MAX,
    };
    below(end) & !below(start)
}

/// What a span of chunks holds, when it is not empty.
enum Fill {
    Full,
    Mixed(Box<Chunk>),
}

impl Fill {
    fn of(filling: &Filling) -> Self {
        let mut chunk = Box::new(Chunk { words: [0; WORDS], any: [0; SUMMARY], all: [0; SUMMARY] });
        for (at, word) in filling.0.iter().enumerate() {
            let word = word.load(Relaxed);
            chunk.words[at] = word;
            chunk.any[at / 64] |= u64::from(word != 0) << (at % 64);
            chunk.all[at / 64] |= u64::from(word == u64::MAX) << (at % 64);
        }
        if chunk.all == [u64::MAX; SUMMARY] { Self::Full } else { Self::Mixed(chunk) }
    }
}

/// Neighbouring chunks, none of them empty: any number that are full, or one that is mixed.
struct Span {
    chunks: Range<u64>,
    fill: Fill,
}

impl Span {
    /// How many of the blocks in `range`, all of this span, are mapped.
    fn count_mapped(&self, range: &Range<u64>) -> u64 {
        let Fill::Mixed(chunk) = &self.fill else { return range.end - range.start };
        let first = self.chunks.start * CHUNK;
        let (start, end) = (range.start - first, range.end - first);
        let words = chunk.words.iter().zip((0..).step_by(64));
        words.map(|(word, at)| u64::from((word & bits_within(at, start, end)).count_ones())).sum()
    }

    fn is_full(&self) -> bool {
        matches!(self.fill, Fill::Full)
    }
}

/// The mapped blocks of one device, as a [`HoleMap`] whose runs are maximal.
pub struct FillMap {
    len: Bytes,
    block_size: Bytes,
    blocks: u64,
    mapped: u64,
    spans: Vec<Span>,
}

impl FillMap {
    /// The number of mapped blocks.
    pub fn mapped_blocks(&self) -> u64 {
        self.mapped
    }

    /// The first mapped block at or after `from`.
    pub fn next_mapped(&self, from: Block) -> Option<Block> {
        let from = from.get();
        let start = self.spans.partition_point(|span| span.chunks.end <= from / CHUNK);
        // A mixed span has a mapped block, but perhaps only before `from`: then the next span answers.
        self.spans[start..].iter().find_map(|span| {
            let first = from.max(span.chunks.start * CHUNK);
            match &span.fill {
                Fill::Full => Some(Block(first)),
                Fill::Mixed(chunk) => {
                    chunk.next_mapped((first % CHUNK) as usize).map(|at| Block(span.chunks.start * CHUNK + at as u64))
                }
            }
        })
    }

    /// The first block at or after `from` that is not mapped; it may lie past the device's end.
    pub fn next_unmapped(&self, from: Block) -> Block {
        let mut block = from.get();
        let start = self.spans.partition_point(|span| span.chunks.end <= block / CHUNK);
        for span in &self.spans[start..] {
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

    /// How many of the blocks in `range` are mapped.
    fn count_mapped(&self, range: Range<u64>) -> u64 {
        let start = self.spans.partition_point(|span| span.chunks.end <= range.start / CHUNK);
        let within = |span: &Span| {
            let first = range.start.max(span.chunks.start * CHUNK);
            first..range.end.min(span.chunks.end * CHUNK).max(first)
        };
        let spans = self.spans[start..].iter().take_while(|span| span.chunks.start * CHUNK < range.end);
        spans.map(|span| span.count_mapped(&within(span))).sum()
    }

    /// Where `block` starts, at most the device's length.
    fn start_of(&self, block: Block) -> Bytes {
        block.get().checked_mul(self.block_size.get()).map_or(self.len, |start| self.len.min(Bytes::new(start)))
    }
}

impl HoleMap for FillMap {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        if offset >= self.len {
            return Extent { end: offset.saturating_add(Bytes::new(1)), kind: Kind::Data };
        }
        let block = Block(offset.get() / self.block_size.get());
        match self.next_mapped(block) {
            Some(mapped) if mapped == block => {
                Extent { end: self.start_of(self.next_unmapped(block)), kind: Kind::Data }
            }
            Some(mapped) => Extent { end: self.start_of(mapped), kind: Kind::Hole },
            None => Extent { end: self.len, kind: Kind::Hole },
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
        // The ends of a block are those of a unit: no hole is rounded away.
        if !block.is_multiple_of(unit.get()) || range.end > self.len {
            return None;
        }
        let (first, last) = (range.start.get() / block, last / block);
        let is_mapped = |block| self.count_mapped(block..block + 1);
        // The parts of the first and the last block that lie outside of the range.
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

    fn memory(&self) -> Bytes {
        let chunks = self.spans.iter().filter(|span| !span.is_full()).count() * size_of::<Chunk>();
        Bytes::new((size_of::<Self>() + self.spans.capacity() * size_of::<Span>() + chunks) as u64)
    }
}

#[cfg(test)]
mod tests;
