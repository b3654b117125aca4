//! A chunk: one bit for each of 32 768 neighbouring blocks.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Words of 64 blocks in a chunk: 512 words of 8 bytes are one page.
pub(super) const WORDS: usize = 512;
/// Words of summary in a chunk, which has one bit per word.
const SUMMARY: usize = WORDS / 64;
/// Blocks in a chunk.
pub(super) const CHUNK: u64 = 64 * WORDS as u64;

/// A chunk in which blocks are being marked, by any number of threads at once.
pub(super) struct ChunkBuilder([AtomicU64; WORDS]);

impl ChunkBuilder {
    /// A chunk without mapped blocks.
    pub(super) fn new() -> Self {
        Self([const { AtomicU64::new(0) }; WORDS])
    }

    /// Marks those blocks of `word` whose bits are set in `bits`.
    pub(super) fn set(&self, word: usize, bits: u64) {
        if bits == u64::MAX {
            // A plain store is enough: it sets every bit that another thread may have set.
            self.0[word].store(bits, Relaxed);
        } else {
            self.0[word].fetch_or(bits, Relaxed);
        }
    }

    /// The finished chunk.
    pub(super) fn finish(&self) -> Box<MixedChunk> {
        let mut chunk =
            Box::new(MixedChunk { words: [0; WORDS], any: [0; SUMMARY], all: [0; SUMMARY], before: [0; SUMMARY] });
        for (at, word) in self.0.iter().enumerate() {
            let word = word.load(Relaxed);
            chunk.words[at] = word;
            chunk.any[at / 64] |= u64::from(word != 0) << (at % 64);
            chunk.all[at / 64] |= u64::from(word == u64::MAX) << (at % 64);
        }
        let mut before = 0;
        for (group, words) in chunk.before.iter_mut().zip(chunk.words.chunks(64)) {
            *group = before;
            before += words.iter().map(|word| word.count_ones() as u16).sum::<u16>();
        }
        chunk
    }
}

/// A finished chunk, in which some blocks are mapped and others are not.
#[derive(Clone)]
pub(super) struct MixedChunk {
    /// One bit per block: it is mapped.
    words: [u64; WORDS],
    /// One bit per word: at least one of its blocks is mapped.
    any: [u64; SUMMARY],
    /// One bit per word: all of its blocks are mapped.
    all: [u64; SUMMARY],
    /// For each group of 64 words: the number of mapped blocks of the chunk before it.
    before: [u16; SUMMARY],
}

impl MixedChunk {
    /// Whether all blocks are mapped, so that the chunk need not be stored.
    pub(super) fn is_full(&self) -> bool {
        self.all == [u64::MAX; SUMMARY]
    }

    /// How many of the blocks in `range`, counted from the start of the chunk, are mapped.
    pub(super) fn count_mapped(&self, range: &Range<u64>) -> u64 {
        self.mapped_before(range.end) - self.mapped_before(range.start)
    }

    /// How many of the blocks of the chunk before `block` are mapped. `block` may be the end of the chunk.
    fn mapped_before(&self, block: u64) -> u64 {
        let word = (block / 64) as usize;
        let group = (word / 64).min(SUMMARY - 1);
        let words = self.words[group * 64..word].iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        let last = self.words.get(word).map_or(0, |word| (word & ((1 << (block % 64)) - 1)).count_ones());
        u64::from(self.before[group]) + words + u64::from(last)
    }

    /// The mapped block of the chunk before which exactly `count` blocks of the chunk are mapped.
    pub(super) fn nth_mapped(&self, count: u64) -> Option<u64> {
        let group = self.before.partition_point(|before| u64::from(*before) <= count) - 1;
        let mut left = count - u64::from(self.before[group]);
        for (word, at) in self.words.iter().zip((0..).step_by(64)).skip(group * 64) {
            let mapped = u64::from(word.count_ones());
            if left < mapped {
                let mut bits = *word;
                (0..left).for_each(|_| bits &= bits - 1);
                return Some(at + u64::from(bits.trailing_zeros()));
            }
            left -= mapped;
        }
        None
    }

    /// The blocks of one word.
    pub(super) fn word(&self, word: usize) -> u64 {
        self.words[word]
    }

    /// The first mapped block of the chunk at or after `from`.
    pub(super) fn next_mapped(&self, from: usize) -> Option<usize> {
        let word = from / 64;
        match self.words[word] & (u64::MAX << (from % 64)) {
            0 => next_bit(&self.any, word + 1, 0).map(|word| word * 64 + self.words[word].trailing_zeros() as usize),
            bits => Some(word * 64 + bits.trailing_zeros() as usize),
        }
    }

    /// The first block of the chunk at or after `from` that is not mapped.
    pub(super) fn next_unmapped(&self, from: usize) -> Option<usize> {
        let word = from / 64;
        match !self.words[word] & (u64::MAX << (from % 64)) {
            0 => next_bit(&self.all, word + 1, u64::MAX)
                .map(|word| word * 64 + self.words[word].trailing_ones() as usize),
            bits => Some(word * 64 + bits.trailing_zeros() as usize),
        }
    }
}

/// The index of the first bit at or after `from` that is set in `bits` XOR `invert`, where `invert` is applied to each word.
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
