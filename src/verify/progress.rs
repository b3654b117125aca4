//! How far a verification is: a bar on a terminal, else a line from time to time.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::units::Bytes;

/// The time between two lines.
const PAUSE: Duration = Duration::from_secs(10);

/// The bar: how much of the device was passed, how much of that is data that need not be read, and the rest of the time.
const TEMPLATE: &str = "{bar:40} {percent:>3}% of {binary_total_bytes}, {eta} left";

/// Shows how many of the bytes of a device were passed, on the standard error.
pub struct Progress {
    done: AtomicU64,
    output: Output,
}

enum Output {
    None,
    Bar(ProgressBar),
    Lines(Lines),
}

impl Progress {
    /// Shows nothing.
    pub fn hidden() -> Self {
        Self::with(Output::None)
    }

    /// Shows a bar if the standard error is a terminal that can draw one, else lines that begin with `name`.
    pub fn shown(name: String) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        // Where TERM is `dumb` or not set, a terminal is hidden too.
        if bar.is_hidden() {
            return Self::with(Output::Lines(Lines::new(name, Instant::now())));
        }
        let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self::with(Output::Bar(bar.with_style(style.progress_chars("#- "))))
    }

    fn with(output: Output) -> Self {
        Self { done: AtomicU64::new(0), output }
    }

    /// Begins a part of the work that passes `total` bytes.
    pub(super) fn begin(&self, total: Bytes) {
        self.done.store(0, Ordering::Relaxed);
        match &self.output {
            Output::None => {}
            Output::Bar(bar) => {
                bar.reset();
                bar.set_length(total.get());
            }
            Output::Lines(lines) => lines.total.store(total.get(), Ordering::Relaxed),
        }
    }

    /// Notes that `bytes` more were passed.
    pub(super) fn advance(&self, bytes: Bytes) {
        let done = self.done.fetch_add(bytes.get(), Ordering::Relaxed).saturating_add(bytes.get());
        match &self.output {
            Output::None => {}
            Output::Bar(bar) => bar.set_position(done),
            Output::Lines(lines) => {
                if let Some(line) = lines.due(done, Instant::now()) {
                    // A closed standard error must not end the work.
                    let _ = writeln!(io::stderr(), "{line}");
                }
            }
        }
    }

    /// Removes the bar.
    pub fn end(&self) {
        if let Output::Bar(bar) = &self.output {
            bar.finish_and_clear();
        }
    }
}

/// At most one line in each [`PAUSE`].
struct Lines {
    name: String,
    total: AtomicU64,
    last: Mutex<Instant>,
}

impl Lines {
    fn new(name: String, now: Instant) -> Self {
        Self { name, total: AtomicU64::new(0), last: Mutex::new(now) }
    }

    /// The line that is to be printed at `now`, if one is.
    fn due(&self, done: u64, now: Instant) -> Option<String> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(*last) < PAUSE {
            return None;
        }
        *last = now;
        let total = u128::from(self.total.load(Ordering::Relaxed).max(1));
        let percent = (u128::from(done) * 100 / total).min(100);
        Some(format!("{}: {percent}% done", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_line_every_ten_seconds_at_most() {
        let begin = Instant::now();
        let lines = Lines::new("/dev/x".to_owned(), begin);
        lines.total.store(1000, Ordering::Relaxed);
        let at = |seconds, done| lines.due(done, begin + Duration::from_secs(seconds));
        assert_eq!(at(9, 100), None);
        assert_eq!(at(10, 250).as_deref(), Some("/dev/x: 25% done"));
        assert_eq!(at(19, 900), None);
        assert_eq!(at(25, 2000).as_deref(), Some("/dev/x: 100% done"));
        lines.total.store(0, Ordering::Relaxed);
        assert_eq!(at(50, 0).as_deref(), Some("/dev/x: 0% done"));
    }

    #[test]
    fn the_bar_has_a_valid_template() {
        ProgressStyle::with_template(TEMPLATE).unwrap();
    }
}
