//! Reproducible random numbers, and the length of the tests that use them.

use std::ops::Range;
use std::time::{Duration, Instant};

/// The length of a test with random steps: a number of rounds, or the seconds in `BLKHOLEFS_SECONDS`.
#[derive(Clone, Copy)]
pub struct Length {
    rounds: u64,
    end: Option<Instant>,
}

impl Length {
    /// That many rounds, unless the environment has a time.
    pub fn rounds(rounds: u64) -> Self {
        let seconds = std::env::var("BLKHOLEFS_SECONDS").ok();
        let seconds = seconds.map(|text| text.parse().expect("BLKHOLEFS_SECONDS is a number"));
        Self { rounds, end: seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds)) }
    }

    /// That time, unless the environment has another one.
    pub fn time(time: Duration) -> Self {
        let Self { end, .. } = Self::rounds(0);
        Self { rounds: 0, end: end.or_else(|| Some(Instant::now() + time)) }
    }

    /// The numbers of the rounds, from 0.
    pub fn numbers(self) -> impl Iterator<Item = u64> {
        (0..).take_while(move |number| self.end.map_or(*number < self.rounds, |end| Instant::now() < end))
    }
}

/// The seed in `BLKHOLEFS_SEED`.
pub fn chosen_seed() -> Option<u64> {
    std::env::var("BLKHOLEFS_SEED").ok().map(|text| text.parse().expect("BLKHOLEFS_SEED is a number"))
}

/// The seed in `BLKHOLEFS_SEED` alone; else as many seeds from `first` on as [`Length`] says.
pub fn seeds(first: u64, count: u64) -> Box<dyn Iterator<Item = u64>> {
    match chosen_seed() {
        Some(seed) => Box::new(std::iter::once(seed)),
        None => Box::new(Length::rounds(count).numbers().map(move |number| first + number)),
    }
}

/// The seed in `BLKHOLEFS_SEED` alone; else seeds from `first` on, for a time as [`Length`] says.
pub fn seeds_for(first: u64, time: Duration) -> Box<dyn Iterator<Item = u64>> {
    match chosen_seed() {
        Some(seed) => Box::new(std::iter::once(seed)),
        None => Box::new(Length::time(time).numbers().map(move |number| first + number)),
    }
}

/// A small generator (xorshift64*), so that a printed seed repeats a failure.
pub struct Random(u64);

impl Random {
    /// A generator for this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The seed in `BLKHOLEFS_SEED`, or `default`.
    pub fn seed_or(default: u64) -> u64 {
        chosen_seed().unwrap_or(default)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number in the range.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    /// A range of whole `unit`s inside `0..size`, not empty, mostly short.
    pub fn range(&mut self, size: u64, unit: u64) -> Range<u64> {
        let units = size / unit;
        let longest = if self.one_in(4) { units / 4 + 1 } else { units.min(16) };
        let start = self.within(0..units);
        let length = self.within(1..longest + 1).min(units - start);
        start * unit..(start + length) * unit
    }

    /// `length` bytes, none of them zero.
    pub fn bytes(&mut self, length: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < length {
            bytes.extend(self.next().to_le_bytes().map(|byte| byte | 1));
        }
        bytes.truncate(usize::try_from(length).expect("a length in memory"));
        bytes
    }
}
