//! Where log lines go: to standard error or the journal; for a daemon without a terminal, to the journal, syslog or the
//! kernel's log.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use log::{Level, LevelFilter};

/// The socket of the system logger (syslog(3)).
const SYSLOG_SOCKET: &str = "/dev/log";

/// The kernel's log. Only root may write to it.
const KERNEL_LOG: &str = "/dev/kmsg";

/// `LOG_DAEMON` of syslog(3).
const FACILITY_DAEMON: u8 = 3 << 3;

enum Output {
    /// Standard error: each line begins with the program's name.
    Stderr { name: String },
    /// Standard error that ends in the journal: each line begins with a priority `<N>` (sd-daemon(3)).
    Journal,
    /// The system logger: one datagram for each line (RFC 3164, without the time and the host, which the logger adds).
    Syslog { socket: UnixDatagram, name: String },
    /// The kernel's log (`Documentation/ABI/testing/dev-kmsg`), where no system logger runs: early in the boot, or in a
    /// rescue system.
    Kernel { ring: File, name: String },
    /// Lines are dropped.
    Discard,
}

static OUTPUT: Mutex<Output> = Mutex::new(Output::Discard);

/// Starts logging to standard error: lines of this program up to `level`, and no lines of the FUSE library. `name` is the
/// program's name in them. If `RUST_LOG` is set, it determines the level instead; lines of the FUSE library are logged when
/// it names `fuser`.
///
/// Later calls change only the name and the level.
pub fn start(name: &str, level: LevelFilter) {
    set(if stderr_is_journal() { Output::Journal } else { Output::Stderr { name: name.to_owned() } });
    let logger = logger(std::env::var(LEVELS).ok().as_deref());
    let chosen = logger.filter();
    // Fails when it was called before. The logger that was set then is the same.
    let _ = log::set_boxed_logger(Box::new(logger));
    log::set_max_level(if is_chosen() { chosen } else { level });
}

/// The environment variable that determines what is logged.
const LEVELS: &str = "RUST_LOG";

fn is_chosen() -> bool {
    std::env::var_os(LEVELS).is_some()
}

fn logger(levels: Option<&str>) -> env_logger::Logger {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(LevelFilter::Debug).filter_module("fuser", LevelFilter::Off);
    builder.parse_filters(levels.unwrap_or_default());
    builder.target(env_logger::Target::Pipe(Box::new(LineWriter)));
    builder.format(|line, record| {
        writeln!(line, "<{}>{}", priority(record.level()), one_line(&record.args().to_string()))
    });
    builder.build()
}

/// Starts logging for a process that a daemon started. Its lines go where those of the daemon go.
pub fn start_helper(name: &str) {
    start(name, LevelFilter::Info);
    let null = std::fs::metadata("/dev/null").map(|null| null.rdev());
    let stderr = std::fs::metadata("/proc/self/fd/2").map(|stderr| stderr.rdev());
    if matches!((stderr, null), (Ok(stderr), Ok(null)) if stderr == null) {
        leave_terminal();
    }
}

/// Raises the level to info, for mount, unmount and new maps. A level that `RUST_LOG` determines, or a higher level, stays.
pub fn raise_to_info() {
    if !is_chosen() && log::max_level() < LevelFilter::Info {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Logs to syslog or the kernel's log from here on, unless standard error ends in the journal. Returns whether standard
/// error must stay open.
pub fn leave_terminal() -> bool {
    std::panic::set_hook(Box::new(|panic| log::error!("internal error: {panic}")));
    let mut output = OUTPUT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Output::Stderr { name } = &*output {
        let name = name.clone();
        *output = match connect(Path::new(SYSLOG_SOCKET)) {
            Ok(socket) => Output::Syslog { socket, name },
            Err(_) => match File::options().write(true).open(KERNEL_LOG) {
                Ok(ring) => Output::Kernel { ring, name },
                Err(_) => Output::Discard,
            },
        };
    }
    matches!(*output, Output::Journal)
}

/// Switches debug lines on or off.
pub fn toggle_debug() {
    let on = log::max_level() < LevelFilter::Debug;
    log::set_max_level(if on { LevelFilter::Debug } else { LevelFilter::Info });
    log::info!("debug lines are {}", if on { "on" } else { "off" });
}

/// The text with line breaks and other control characters escaped. Names of devices and files may contain any.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            // Writing to a String cannot fail.
            let _ = write!(line, "{}", character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

fn set(output: Output) {
    *OUTPUT.lock().unwrap_or_else(PoisonError::into_inner) = output;
}

fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

fn connect(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(path)?;
    // A system logger that hangs must not block the file system.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Whether standard error is the stream that systemd named in `$JOURNAL_STREAM` (systemd.exec(5)).
fn stderr_is_journal() -> bool {
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let stderr = std::fs::metadata("/proc/self/fd/2").map(|stderr| format!("{}:{}", stderr.dev(), stderr.ino()));
    stderr.is_ok_and(|stderr| stderr == named)
}

/// Receives whole lines `<N>TEXT` from the logger. A line that cannot be delivered is lost.
struct LineWriter;

impl Write for LineWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        deliver(&OUTPUT.lock().unwrap_or_else(PoisonError::into_inner), bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a line of the logger, `<N>TEXT` with the priority N, in the format of `output`.
fn deliver(output: &Output, line: &[u8]) {
    let (priority, text) = match line {
        [b'<', digit, b'>', text @ ..] => (digit.wrapping_sub(b'0') & 7, text.strip_suffix(b"\n").unwrap_or(text)),
        _ => return,
    };
    let text = String::from_utf8_lossy(text);
    let for_daemons = |name| format!("<{}>{name}[{}]: {text}", FACILITY_DAEMON | priority, std::process::id());
    let _ = match output {
        Output::Stderr { name } => writeln!(io::stderr(), "{name}: {text}"),
        Output::Journal => writeln!(io::stderr(), "<{priority}>{text}"),
        Output::Syslog { socket, name } => socket.send(for_daemons(name).as_bytes()).map(drop),
        // One write is one record of the kernel's log.
        Output::Kernel { ring, name } => (&*ring).write(for_daemons(name).as_bytes()).map(drop),
        Output::Discard => Ok(()),
    };
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn rust_log_determines_the_levels() {
        use log::{Level::*, Log as _, Metadata};
        let enabled = |levels, target: &str, level| {
            logger(levels).enabled(&Metadata::builder().target(target).level(level).build())
        };
        for (levels, shown, hidden) in [
            (None, Debug, Trace),
            (Some("debug"), Debug, Trace),
            (Some("warn"), Warn, Info),
            (Some("trace"), Trace, Trace),
            (Some("blkholefs=info"), Info, Debug),
        ] {
            assert!(enabled(levels, "blkholefs::fs", shown), "{levels:?}");
            assert!(
                hidden == Trace && levels == Some("trace") || !enabled(levels, "blkholefs::fs", hidden),
                "{levels:?}"
            );
            assert!(!enabled(levels, "fuser::request", Error), "{levels:?}");
        }
        assert!(enabled(Some("warn,fuser=debug"), "fuser::request", Debug));
        assert_eq!(logger(Some("debug")).filter(), LevelFilter::Debug);
    }

    #[test]
    fn control_characters_cannot_forge_a_line() {
        assert_eq!(one_line("a\nb\x1b[31m\u{9b}"), "a\\nb\\u{1b}[31m\\u{9b}");
        assert_eq!(one_line("/dev/\u{e4} b"), "/dev/\u{e4} b");
    }

    #[test]
    fn syslog_gets_one_datagram_for_each_line() {
        let dir = tempfile::tempdir().unwrap();
        let logger = UnixDatagram::bind(dir.path().join("log")).unwrap();
        let socket = connect(&dir.path().join("log")).unwrap();
        let output = Output::Syslog { socket, name: "blkholefs".to_owned() };
        deliver(&output, b"<4>one reason\n");
        deliver(&output, b"not of our form");
        deliver(&output, b"<3>two\n");
        let mut buffer = [0; 256];
        let pid = std::process::id();
        for expected in [format!("<28>blkholefs[{pid}]: one reason"), format!("<27>blkholefs[{pid}]: two")] {
            let length = logger.recv(&mut buffer).unwrap();
            assert_eq!(std::str::from_utf8(&buffer[..length]).unwrap(), expected);
        }
    }

    #[test]
    fn the_kernels_log_gets_one_write_for_each_line() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let ring = File::from(std::os::fd::OwnedFd::from(writer));
        deliver(&Output::Kernel { ring, name: "blkholefs".to_owned() }, b"<3>one reason\n");
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("<27>blkholefs[{}]: one reason", std::process::id()));
    }
}
