//! The state of a stack as a number, from which the times of a file are derived.
//!
//! Each guard adds what it guards to a [`Trace`]. Equal results prove that nothing changed in between: within one process, or
//! also between processes of one boot. Which of the two it is depends on what was added, and is a part of the result
//! ([`Reach`]).

use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use siphasher::sip128::{Hasher128, SipHasher24};

use crate::sys::boot::BootId;
use crate::sys::stamp::Stamp;

/// The version of the values that are added. Values of two versions are never equal.
const VERSION: (u32, &str) = (1, env!("CARGO_PKG_VERSION"));

/// Between whom an equal result is a proof, from the least to the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// It is none. The result is another one each time.
    Nothing,
    /// While the device is open, by one handle of this process: otherwise programs that look again after they have read a file
    /// would find that it changed.
    Open,
    /// Within this process.
    Process,
    /// Between all processes of this boot.
    Boot,
}

/// A number that no other value of this process has.
#[derive(Debug, Hash)]
pub struct Unique(u64);

impl Unique {
    /// The next number.
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What the guards of a stack have added so far.
pub struct Trace {
    hasher: SipHasher24,
    reach: Reach,
    files: Vec<SystemTime>,
}

/// The result of a trace. Two of one process that are equal prove that nothing changed in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackTrace {
    /// The number: SipHash-2-4-128 of all values, with the boot id as its key.
    pub number: u128,
    /// Between whom it is a proof.
    pub reach: Reach,
    /// The last change of the file at the bottom, if there is exactly one file.
    pub file_changed: Option<SystemTime>,
}

impl Trace {
    /// A trace without values.
    pub fn new() -> Self {
        let boot = BootId::current();
        let hasher = SipHasher24::new_with_key(&boot.map_or(0, BootId::get).to_le_bytes());
        let reach = if boot.is_some() { Reach::Boot } else { Reach::Process };
        let mut trace = Self { hasher, reach, files: Vec::new() };
        trace.add(&VERSION);
        trace
    }

    /// Adds a value that is the same in another process if nothing changed.
    pub fn add(&mut self, value: &impl Hash) {
        value.hash(self);
    }

    /// Adds a value that is compared only within this process.
    pub fn add_of_process(&mut self, value: &impl Hash) {
        value.hash(self);
        self.limit(Reach::Process);
    }

    /// Adds a value that is to be compared between processes. Without it, nothing is proven.
    pub fn add_or_nothing<E>(&mut self, value: Result<impl Hash, E>) {
        match value {
            Ok(value) => self.add(&value),
            Err(_) => self.limit(Reach::Nothing),
        }
    }

    /// Lets the result prove no more than `reach`.
    pub fn limit(&mut self, reach: Reach) {
        self.reach = self.reach.min(reach);
    }

    /// Adds a file that can be written past the devices above it. An unsettled stamp proves nothing: the file may be written
    /// again within the same tick.
    pub fn add_file(&mut self, stamp: &Stamp) {
        match stamp.state() {
            Some(state) => self.add(&state),
            None => self.limit(Reach::Nothing),
        }
        // Within this process such a file counts as unchanged all the same: otherwise its times would never be stable.
        if !stamp.has_mapped_writes() {
            self.limit(Reach::Process);
        }
        self.files.push(stamp.changed());
    }

    /// The result.
    pub fn finish(mut self) -> StackTrace {
        if self.reach == Reach::Nothing {
            Unique::next().hash(&mut self);
        }
        let number = self.hasher.finish128().as_u128();
        let file_changed = if let [file] = self.files[..] { Some(file) } else { None };
        StackTrace { number, reach: self.reach, file_changed }
    }
}

/// Values add their bytes. A value of variable length adds its length or an end too, as every [`Hash`] does.
impl Hasher for Trace {
    fn write(&mut self, bytes: &[u8]) {
        self.hasher.write(bytes);
    }

    fn finish(&self) -> u64 {
        unreachable!("a value adds itself and asks for no result")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traced(work: impl Fn(&mut Trace)) -> StackTrace {
        let mut trace = Trace::new();
        work(&mut trace);
        trace.finish()
    }

    #[test]
    fn equal_values_have_equal_results_and_others_do_not() {
        let results: Vec<_> =
            [("a", "bc"), ("ab", "c"), ("", "abc")].map(|words| traced(|trace| trace.add(&words))).into();
        assert_eq!(results[0], traced(|trace| trace.add(&("a", "bc"))));
        assert_eq!(results[0].reach, Reach::Boot);
        assert!(results[0] != results[1] && results[1] != results[2] && results[0] != results[2]);
    }

    #[test]
    fn the_least_reach_counts_and_nothing_equals_nothing() {
        let process = |trace: &mut Trace| trace.add_of_process(&1);
        assert_eq!(traced(process).reach, Reach::Process);
        assert_eq!(traced(process), traced(process));
        let nothing = |trace: &mut Trace| {
            trace.add_or_nothing(Err::<u8, ()>(()));
            trace.limit(Reach::Boot);
        };
        assert_eq!(traced(nothing).reach, Reach::Nothing);
        assert_ne!(traced(nothing).number, traced(nothing).number);
        assert_eq!(traced(|trace| trace.add_or_nothing(Ok::<_, ()>(1))).reach, Reach::Boot);
    }
}
