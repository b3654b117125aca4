//! The fuzz targets without libFuzzer: each runs all inputs of its corpus, and then for a second inputs that are made
//! of these by random changes.
//!
//! Each input has a number. A number stands for the same bytes as long as the corpus does not change.
//! `BLKHOLEFS_SECONDS` is another time for the changed inputs of each target. `BLKHOLEFS_SEED` is the number of the
//! only input to run. An input that fails is written to a file below `target/tmp/fuzz`.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use std::{fs, iter, thread};

#[path = "support/fuzz/mutate.rs"]
mod mutate;
#[path = "common/random.rs"]
#[allow(dead_code, reason = "what makes devices and images random is not used here")]
mod random;
#[path = "support/fuzz/mod.rs"]
mod targets;
use random::Random;

/// For how long mutated inputs run.
const TIME: Duration = Duration::from_secs(1);
/// An input that takes longer is a failure. `tests/fuzz/run` has the same limit.
const LONGEST_INPUT: Duration = Duration::from_secs(20);

/// The inputs of one target by their numbers: first those of the corpus in the order of their names, then mutated ones.
struct Inputs {
    target: &'static str,
    corpus: Vec<Vec<u8>>,
}

impl Inputs {
    fn new(target: &'static str) -> Self {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
        let mut paths: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        assert!(!paths.is_empty(), "{target} has inputs");
        Self { target, corpus: paths.into_iter().map(|path| fs::read(path).unwrap()).collect() }
    }

    fn input(&self, number: u64) -> Vec<u8> {
        match self.corpus.get(number as usize) {
            Some(input) => input.clone(),
            None => mutate::mutated(&self.corpus, &mut Random::new(number)),
        }
    }

    /// The numbers to run. The time of the mutated inputs begins with the first of them.
    fn numbers(&self) -> impl Iterator<Item = u64> {
        let corpus = self.corpus.len() as u64;
        let whole_corpus = if random::chosen_seed().is_some() { 0..0 } else { 0..corpus };
        whole_corpus.chain(iter::once_with(move || random::seeds_for(corpus, TIME)).flatten())
    }

    /// Writes an input to a file. Returns the path, and the command that runs the input again.
    fn save(&self, number: u64) -> String {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
        let path = directory.join(format!("{}-{number}", self.target));
        fs::create_dir_all(directory).unwrap();
        fs::write(&path, self.input(number)).unwrap();
        let target = self.target;
        format!(
            "{target} fails with {}; to run it again: BLKHOLEFS_SEED={number} cargo test --test fuzz_corpus {target}",
            path.display()
        )
    }
}

/// Runs a target in a thread of its own, so that an input for which it never returns is a failure too.
fn check(target: &'static str, run: fn(&[u8])) {
    let inputs = Arc::new(Inputs::new(target));
    let current = Arc::new(AtomicU64::new(0));
    let (running, ended) = mpsc::channel::<()>();
    let worker = thread::spawn({
        let (inputs, current) = (inputs.clone(), current.clone());
        move || {
            for number in inputs.numbers() {
                current.store(number, Ordering::Relaxed);
                run(&inputs.input(number));
            }
            drop(running);
        }
    });
    let mut last = None;
    while ended.recv_timeout(LONGEST_INPUT) == Err(mpsc::RecvTimeoutError::Timeout) {
        let now = current.load(Ordering::Relaxed);
        assert!(Some(now) != last, "no end within {LONGEST_INPUT:?}: {}", inputs.save(now));
        last = Some(now);
    }
    let last = current.load(Ordering::Relaxed);
    assert!(worker.join().is_ok(), "{}", inputs.save(last));
    println!("{target}: the last input was number {last}");
}

macro_rules! targets {
    ($($target:ident),*) => {
        $(
            #[test]
            fn $target() {
                check(stringify!($target), targets::$target::run);
            }
        )*

        #[test]
        fn every_target_has_a_test() {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/fuzz_targets");
            let mut all: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            all.sort();
            assert_eq!(all, [$(concat!(stringify!($target), ".rs")),*]);
        }
    };
}

targets!(
    btrfs,
    dm_tables,
    ext,
    kernel_texts,
    mount_words,
    nbd,
    nbd_client,
    partitions,
    qcow2,
    scsi_pages,
    status,
    thin_changes,
    thin_metadata,
    thin_params,
    xfs
);
