//! Where log lines go: to standard error as long as somebody reads it, to the journal, to syslog, or to the kernel's log.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use log::{Level, LevelFilter};

/// The socket of the system's logger (syslog(3)).
const SYSLOG_SOCKET: &str = "/dev/log";

/// The kernel's log, which root may write to.
const KERNEL_LOG: &str = "/dev/kmsg";

/// `LOG_DAEMON` of syslog(3).
const FACILITY_DAEMON: u8 = 3 << 3;

enum Output {
    /// Lines for a person, after the program's name.
    Person { name: String },
    /// Lines after a priority `<N>`, as systemd reads them from standard error (sd-daemon(3)).
    Journal,
    /// One datagram for each line (RFC 3164; the receiver knows the time and the host).
    Syslog { socket: UnixDatagram, name: String },
    /// Records of the kernel's log (`Documentation/ABI/testing/dev-kmsg`), where no logger runs: early in the boot, in
    /// a rescue system.
    Kernel { ring: File, name: String },
    /// There is no logger.
    Nowhere,
}

static OUTPUT: Mutex<Output> = Mutex::new(Output::Nowhere);

/// Starts logging to standard error, under the name of the program: lines of this program up to `level`, none of the FUSE
/// library. Where `RUST_LOG` is set, it alone chooses the level; the library's lines are logged when it names `fuser`.
///
/// To be called once; later calls change nothing but the name and the level.
pub fn start(name: &str, level: LevelFilter) {
    set(if stderr_is_journal() { Output::Journal } else { Output::Person { name: name.to_owned() } });
    let logger = logger(std::env::var(LEVELS).ok().as_deref());
    let chosen = logger.filter();
    // A logger that is set already is this one.
    let _ = log::set_boxed_logger(Box::new(logger));
    log::set_max_level(if is_chosen() { chosen } else { level });
}

/// The variable by which the user chooses what is logged.
const LEVELS: &str = "RUST_LOG";

fn is_chosen() -> bool {
    std::env::var_os(LEVELS).is_some()
}

fn logger(levels: Option<&str>) -> env_logger::Logger {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(LevelFilter::Debug).filter_module("fuser", LevelFilter::Off);
    builder.parse_filters(levels.unwrap_or_default());
    builder.target(env_logger::Target::Pipe(Box::new(Sink)));
    builder.format(|line, record| {
        writeln!(line, "<{}>{}", priority(record.level()), one_line(&record.args().to_string()))
    });
    builder.build()
}

/// Starts logging for a process that a daemon started: where the daemon's lines go by now.
pub fn start_helper(name: &str) {
    start(name, LevelFilter::Info);
    let null = std::fs::metadata("/dev/null").map(|null| null.rdev());
    let stderr = std::fs::metadata("/proc/self/fd/2").map(|stderr| stderr.rdev());
    if matches!((stderr, null), (Ok(stderr), Ok(null)) if stderr == null) {
        leave_terminal();
    }
}

/// Raises the level to what a service tells: mount, unmount, new maps. `RUST_LOG` and `-v` keep theirs.
pub fn raise_to_info() {
    if !is_chosen() && log::max_level() < LevelFilter::Info {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Goes on without standard error, for a daemon: to the journal if that is where standard error ends, else to syslog.
/// Returns whether standard error must be kept open.
pub fn leave_terminal() -> bool {
    std::panic::set_hook(Box::new(|panic| log::error!("internal error: {panic}")));
    let mut output = OUTPUT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Output::Person { name } = &*output {
        let name = name.clone();
        *output = match connect(Path::new(SYSLOG_SOCKET)) {
            Ok(socket) => Output::Syslog { socket, name },
            Err(_) => match File::options().write(true).open(KERNEL_LOG) {
                Ok(ring) => Output::Kernel { ring, name },
                Err(_) => Output::Nowhere,
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

/// The text without line breaks and other control characters: names of devices and files may hold any.
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
    // A logger that hangs must not hang the file system.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Whether standard error is the stream that systemd named in `$JOURNAL_STREAM` (systemd.exec(5)).
fn stderr_is_journal() -> bool {
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let stderr = std::fs::metadata("/proc/self/fd/2").map(|stderr| format!("{}:{}", stderr.dev(), stderr.ino()));
    stderr.is_ok_and(|stderr| stderr == named)
}

/// Takes whole lines `<N>TEXT` from the logger. A line that cannot be delivered is lost: there is no one to tell.
struct Sink;

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        deliver(&OUTPUT.lock().unwrap_or_else(PoisonError::into_inner), bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn deliver(output: &Output, line: &[u8]) {
    let (priority, text) = match line {
        [b'<', digit, b'>', text @ ..] => (digit.wrapping_sub(b'0') & 7, text.strip_suffix(b"\n").unwrap_or(text)),
        _ => return,
    };
    let text = String::from_utf8_lossy(text);
    let for_daemons = |name| format!("<{}>{name}[{}]: {text}", FACILITY_DAEMON | priority, std::process::id());
    let _ = match output {
        Output::Person { name } => writeln!(io::stderr(), "{name}: {text}"),
        Output::Journal => writeln!(io::stderr(), "<{priority}>{text}"),
        Output::Syslog { socket, name } => socket.send(for_daemons(name).as_bytes()).map(drop),
        // Each write is a record: whole, or not at all.
        Output::Kernel { ring, name } => (&*ring).write(for_daemons(name).as_bytes()).map(drop),
        Output::Nowhere => Ok(()),
    };
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn the_users_levels_are_what_they_say() {
        use log::{Level::*, Log as _, Metadata};
        let lets = |levels, target: &str, level| {
            logger(levels).enabled(&Metadata::builder().target(target).level(level).build())
        };
        for (levels, shown, hidden) in [
            (None, Debug, Trace),
            (Some("debug"), Debug, Trace),
            (Some("warn"), Warn, Info),
            (Some("trace"), Trace, Trace),
            (Some("blkholefs=info"), Info, Debug),
        ] {
            assert!(lets(levels, "blkholefs::fs", shown), "{levels:?}");
            assert!(hidden == Trace && levels == Some("trace") || !lets(levels, "blkholefs::fs", hidden), "{levels:?}");
            assert!(!lets(levels, "fuser::request", Error), "{levels:?}");
        }
        assert!(lets(Some("warn,fuser=debug"), "fuser::request", Debug));
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
