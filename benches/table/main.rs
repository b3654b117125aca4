//! The benchmark: `cargo bench --bench table [-- [--quick] [WORD...]]`, as root.
//!
//! Runs each case and its floor or peer in turn within one run, and prints a table of medians and of the ratios of the
//! same round. Words name the cases to run. Everything is made below `TMPDIR` and taken away again.

#[path = "../../tests/common/mod.rs"]
mod common;
mod copy;
mod delta;
mod floor;
mod kernel;
mod latency;
mod lseek;
mod measure;
mod memory;
mod metadata;
mod peer;
mod read;
mod restore;
mod shape;
mod thin;
#[path = "../../tests/support/thin_image.rs"]
#[allow(dead_code, reason = "only the bytes of nodes are needed here")]
mod thin_image;
mod used;
mod views;
mod walk;

use std::collections::HashSet;

use measure::Table;
use shape::Scratch;

/// A case: the word that chooses it, and what it runs.
type Case = (&'static str, fn(&Bench, &mut Table));

const CASES: [Case; 18] = [
    ("lseek", lseek::one_client),
    ("clients", lseek::many_clients),
    ("thin", thin::lseek),
    ("walk", walk::all),
    ("delta", delta::all),
    ("views", views::all),
    ("used", used::all),
    ("read", read::all),
    ("reads", read::many_clients),
    ("copy", copy::all),
    ("sizes", copy::sizes),
    ("restore-loop", restore::to_loop_device),
    ("restore-thin", restore::to_thin_volume),
    ("memory", memory::all),
    ("latency-nbd", latency::of_nbd),
    ("latency-random", latency::at_random),
    ("latency-loop", latency::of_loop),
    ("latency-volumes", latency::volumes),
];

/// What all cases share.
pub struct Bench {
    quick: bool,
    scratch: Scratch,
}

impl Bench {
    /// How many rounds are counted.
    fn rounds(&self) -> usize {
        if self.quick { 3 } else { 7 }
    }

    /// A size, divided in the quick mode.
    fn scale(&self, size: u64, quick: u64) -> u64 {
        if self.quick { size / quick } else { size }
    }

    /// Whether a program is there; the table says so if not.
    fn has(&self, table: &mut Table, program: &str, case: &str) -> bool {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).any(|directory| directory.join(program).is_file());
        if !found {
            table.skip(&format!("{case} against {program}"), "the program is not installed");
        }
        found
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    if arguments.first().is_some_and(|word| word == floor::WORD) {
        return floor::serve(&arguments[1..]);
    }
    if arguments.first().is_some_and(|word| word == measure::PEAK) {
        return measure::print_peak(&arguments[1..]);
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("the benchmark mounts and makes loop devices: run it as root");
        std::process::exit(1);
    }
    measure::processors();
    let (options, words): (Vec<String>, HashSet<String>) = split(arguments);
    let bench = Bench { quick: options.iter().any(|option| option == "--quick"), scratch: Scratch::new() };
    let mut table = Table::default();
    for (word, case) in CASES {
        if words.is_empty() || words.iter().any(|chosen| names(chosen, word)) {
            case(&bench, &mut table);
        }
    }
    print!("{table}");
}

/// Whether a word of the command line names a case: by its whole name, or by the part of it before a hyphen.
fn names(chosen: &str, case: &str) -> bool {
    case.strip_prefix(chosen).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// Parts options from the names of cases; a word that is neither ends the program.
fn split(arguments: Vec<String>) -> (Vec<String>, HashSet<String>) {
    let (options, words): (Vec<_>, Vec<_>) = arguments.into_iter().partition(|word| word.starts_with("--"));
    let known = |word: &String| word == "--quick" || CASES.iter().any(|(case, _)| names(word, case));
    if let Some(word) = options.iter().chain(&words).find(|word| !known(word)) {
        let names = CASES.map(|(name, _)| name).join(" ");
        eprintln!("{word}: unknown; options: --quick; cases: {names}");
        std::process::exit(1);
    }
    (options, words.into_iter().collect())
}
