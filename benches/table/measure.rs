//! Rounds, medians, and the table.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;

/// Something to measure: a name, and one run of it that returns what it cost.
pub struct Contender<'a> {
    name: String,
    run: Box<dyn FnMut() -> f64 + 'a>,
}

impl<'a> Contender<'a> {
    /// Names a measurement.
    pub fn new(name: impl Into<String>, run: impl FnMut() -> f64 + 'a) -> Self {
        Self { name: name.into(), run: Box::new(run) }
    }
}

/// What the contenders of one case cost, in the same rounds.
pub struct Measured {
    names: Vec<String>,
    rounds: Vec<Vec<f64>>,
}

/// Two contenders to compare, by their places among all of them, and the ratio to reach.
pub struct Pair {
    /// Ours.
    pub ours: usize,
    /// What it is compared with.
    pub other: usize,
    /// The ratio to reach, if there is one.
    pub target: Option<f64>,
}

/// Runs all contenders once for each round, in turn, beginning with another one each time. A round before the first
/// warms up and is not counted.
pub fn rounds(count: usize, mut contenders: Vec<Contender<'_>>) -> Measured {
    let all = contenders.len();
    let mut rounds = Vec::new();
    for round in 0..=count {
        let mut costs = vec![0.0; all];
        for turn in 0..all {
            let index = (round + turn) % all;
            costs[index] = (contenders[index].run)();
        }
        rounds.push(costs);
    }
    rounds.remove(0);
    Measured { names: contenders.into_iter().map(|contender| contender.name).collect(), rounds }
}

impl Measured {
    fn cost(&self, index: usize) -> f64 {
        median(self.rounds.iter().map(|costs| costs[index]).collect())
    }

    /// The median of the ratios of one round each: what drifts from round to round drops out.
    fn ratio(&self, one: usize, other: usize) -> f64 {
        median(self.rounds.iter().map(|costs| costs[one] / costs[other]).collect())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[half - 1] + values[half]) / 2.0 } else { values[half] }
}

/// What is above the columns of the table.
const HEADS: [&str; 7] = ["case", "ours", "against", "theirs", "ratio", "target", "reached"];

/// The results so far. They are printed as they come, and once more as a table at the end.
#[derive(Default)]
pub struct Table {
    rows: Vec<[String; 7]>,
    skipped: Vec<String>,
}

impl Table {
    /// Adds a row for each contender after the first, which is ours. `targets` are the ratios to reach, in the same order.
    pub fn add(&mut self, case: &str, unit: &str, measured: &Measured, targets: &[Option<f64>]) {
        for (other, target) in (1..measured.names.len()).zip(targets) {
            self.pair(case, unit, measured, Pair { ours: 0, other, target: *target });
        }
    }

    /// Adds a row for two of the contenders.
    pub fn pair(&mut self, case: &str, unit: &str, measured: &Measured, pair: Pair) {
        let theirs = (measured.names[pair.other].as_str(), measured.cost(pair.other));
        let ratio = measured.ratio(pair.ours, pair.other);
        self.compare(case, unit, measured.cost(pair.ours), theirs, ratio, pair.target);
    }

    /// Adds a row for two values that were measured once.
    pub fn row(&mut self, case: &str, unit: &str, ours: f64, theirs: (&str, f64), target: Option<f64>) {
        self.compare(case, unit, ours, theirs, ours / theirs.1, target);
    }

    fn compare(&mut self, case: &str, unit: &str, ours: f64, theirs: (&str, f64), ratio: f64, target: Option<f64>) {
        let verdict = match target {
            Some(target) if ratio <= target => "yes",
            Some(_) => "NO",
            None => "",
        };
        self.push([
            case.to_owned(),
            number(ours, unit),
            theirs.0.to_owned(),
            number(theirs.1, unit),
            if ratio < 0.1 { format!("{ratio:.3}") } else { format!("{ratio:.2}") },
            target.map_or(String::new(), |target| format!("<= {target:.2}")),
            verdict.to_owned(),
        ]);
    }

    /// Adds a row that only tells something.
    pub fn note(&mut self, case: &str, value: String) {
        self.push([case.to_owned(), value, String::new(), String::new(), String::new(), String::new(), String::new()]);
    }

    /// Adds a line that another run of this program printed, if it is a row of the table.
    pub fn add_printed(&mut self, line: &str) {
        let cells = line.trim_end().strip_prefix('|').and_then(|rest| rest.strip_suffix('|'));
        let cells: Option<Vec<String>> =
            cells.map(|cells| cells.split('|').map(|cell| cell.trim().to_owned()).collect());
        let row: Option<[String; 7]> = cells.and_then(|cells| cells.try_into().ok());
        if let Some(row) = row.filter(|row| row[0] != HEADS[0] && !row[0].starts_with("---")) {
            self.push(row);
        }
    }

    fn push(&mut self, row: [String; 7]) {
        eprintln!("{}", row.join(" | "));
        self.rows.push(row);
    }

    /// Says that something could not be run.
    pub fn skip(&mut self, what: &str, why: &str) {
        eprintln!("not run: {what}: {why}");
        self.skipped.push(format!("{what}: {why}"));
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let heads = HEADS.map(str::to_owned);
        let width = |column: usize| {
            self.rows.iter().chain([&heads]).map(|row| row[column].chars().count()).max().unwrap_or_default()
        };
        let line = |row: &[String; 7]| {
            row.iter().enumerate().fold("|".to_owned(), |mut line, (column, cell)| {
                let _ = write!(line, " {cell:<width$} |", width = width(column));
                line
            })
        };
        writeln!(f, "{}", line(&heads))?;
        writeln!(f, "|{}", "---|".repeat(heads.len()))?;
        self.rows.iter().try_for_each(|row| writeln!(f, "{}", line(row)))?;
        self.skipped.iter().try_for_each(|skipped| writeln!(f, "\nNot run: {skipped}"))
    }
}

fn number(value: f64, unit: &str) -> String {
    match value {
        0.0..10.0 => format!("{value:.2} {unit}"),
        10.0..100.0 => format!("{value:.1} {unit}"),
        _ => format!("{value:.0} {unit}"),
    }
}

/// How long something takes, in seconds.
pub fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().max(Duration::from_nanos(1)).as_secs_f64()
}

/// The word that makes this program run another one, and print how much memory that took at most.
pub const PEAK: &str = "--peak";

/// The memory that a program takes at most, in MiB.
pub fn peak(command: &Command) -> f64 {
    let mut meter = Command::new(std::env::current_exe().expect("this program has a path"));
    meter.arg(PEAK).arg(command.get_program()).args(command.get_args());
    let output = meter.stdin(Stdio::null()).stderr(Stdio::inherit()).output().expect("this program starts");
    let kib: f64 = String::from_utf8_lossy(&output.stdout).trim().parse().expect("a number of KiB");
    kib / 1024.0
}

/// Runs a program for [`peak`]: the arguments after [`PEAK`].
pub fn print_peak(arguments: &[String]) {
    let mut command = Command::new(&arguments[0]);
    let ended = command.args(&arguments[1..]).stdin(Stdio::null()).stdout(Stdio::null()).status();
    assert!(ended.expect("the program starts").success(), "{command:?}");
    println!("{}", getrusage(UsageWho::RUSAGE_CHILDREN).expect("our own children").max_rss());
}

/// Keeps all threads of a process on the first `cores` processors. Process 0 is the calling thread.
pub fn keep_on(pid: u32, cores: usize) {
    let mut set = CpuSet::new();
    (0..cores).for_each(|core| set.set(core).expect("a processor's number"));
    let tasks = match pid {
        0 => vec![0],
        _ => threads(pid),
    };
    for task in tasks {
        // A thread that has just ended is no matter.
        let _ = sched_setaffinity(Pid::from_raw(task), &set);
    }
}

fn threads(pid: u32) -> Vec<i32> {
    let tasks = std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task")).expect("the process runs");
    tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// How many processors this process may run on, as of its start: [`keep_on`] takes some away.
pub fn processors() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}
