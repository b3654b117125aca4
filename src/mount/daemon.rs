//! The daemon's process: the fork, and the pipe over which the daemon reports how its start ended.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use nix::sys::stat::{Mode, umask};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, setsid};

use crate::error::{Error, ErrorKind, Result};
use crate::mount::logging;
use crate::sys::process::{self, Fork};

/// The two processes after [`fork`].
pub enum Forked {
    /// This is the mount command, and the daemon is its child.
    Command(StartingDaemon),
    /// This is the daemon.
    Daemon(StartReport),
}

/// Forks a daemon.
///
/// Until [`StartReport::serving`] the daemon stays in the process group of the mount command. autofs recognises the mount
/// command by its process group (`fs/autofs/autofs_i.h: autofs_oz_mode`). A lookup of the mountpoint by any other process
/// waits until the automount daemon knows that the mount command has ended, and the daemon's mount(2) is such a lookup.
///
/// # Errors
/// When there is no memory or no process left.
pub fn fork() -> Result<Forked> {
    let cannot = |e: io::Error| Error::new(ErrorKind::System, "cannot start a daemon").because(e);
    let (reader, writer) = io::pipe().map_err(cannot)?;
    Ok(match process::fork().map_err(cannot)? {
        Fork::Parent(process) => Forked::Command(StartingDaemon { process, pipe: reader }),
        Fork::Child => Forked::Daemon(StartReport { pipe: Some(writer) }),
    })
}

/// Enters the root directory and clears the file mode creation mask, so that the daemon keeps no file system busy.
///
/// # Errors
/// As chdir(2).
pub fn leave_directory() -> Result<()> {
    chdir("/").map_err(|e| Error::new(ErrorKind::System, "cannot enter the root directory").because(e))?;
    umask(Mode::empty());
    Ok(())
}

/// What the process that serves reports about its start.
#[derive(Debug)]
pub struct StartReport {
    /// The pipe to the mount command. `None` in the foreground, and after the report.
    pipe: Option<PipeWriter>,
}

impl StartReport {
    /// The report of a process that serves in the foreground: no mount command waits for it.
    pub fn foreground() -> Self {
        Self { pipe: None }
    }

    /// Whether no mount command waits.
    pub fn is_foreground(&self) -> bool {
        self.pipe.is_none()
    }

    /// Reports that the mount is served, to the mount command or to the service manager. A daemon has no terminal and a
    /// session of its own after this, and the mount command ends.
    ///
    /// # Errors
    /// Interrupted, when the mount command has ended already: the user does not know of the mount.
    pub fn serving(&mut self) -> Result<()> {
        let Some(pipe) = &mut self.pipe else { return notify_manager() };
        leave_terminal()?;
        let gone = |e| Error::new(ErrorKind::Interrupted, "the mount command was ended").because(e);
        // Written before setsid(2): up to there, a signal that ends the command's process group reaches this process too.
        pipe.write_all(&[0]).map_err(gone)?;
        setsid().map_err(|e| Error::new(ErrorKind::System, "cannot leave the session").because(e))?;
        pipe.write_all(&[0]).map_err(gone)?;
        // The command reads until the pipe is closed.
        self.pipe = None;
        Ok(())
    }

    /// Reports an error to the mount command; to the log after the start, and when the command has ended.
    pub fn failed(&mut self, text: &str, exit_code: u8) {
        let message = [&[exit_code], text.as_bytes()].concat();
        if self.pipe.take().is_none_or(|mut pipe| pipe.write_all(&message).is_err()) {
            log::error!("{text}");
        }
    }
}

/// Leaves the terminal. The standard descriptors stay open, on /dev/null: a closed one would be reused for the next file
/// that is opened, and a program that reads the command's output would wait until the daemon ends.
fn leave_terminal() -> Result<()> {
    let cannot = |e: io::Error| Error::new(ErrorKind::System, "cannot open").on("/dev/null").because(e);
    let null = File::options().read(true).write(true).open("/dev/null").map_err(cannot)?;
    let keep_stderr = logging::leave_terminal();
    dup2_stdin(&null).map_err(|e| cannot(e.into()))?;
    dup2_stdout(&null).map_err(|e| cannot(e.into()))?;
    if !keep_stderr {
        dup2_stderr(&null).map_err(|e| cannot(e.into()))?;
    }
    Ok(())
}

/// Notifies the service manager that the service is up, if there is one (sd_notify(3)).
fn notify_manager() -> Result<()> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match name.as_bytes() {
        [b'@', abstract_name @ ..] => SocketAddr::from_abstract_name(abstract_name),
        _ => SocketAddr::from_pathname(&name),
    };
    address
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address))
        .map(drop)
        .map_err(|e| Error::new(ErrorKind::System, "cannot notify the service manager").on(&name).because(e))
}

/// A daemon that has not yet reported how its start ended.
pub struct StartingDaemon {
    process: Pid,
    pipe: PipeReader,
}

/// How the start of a daemon ended.
#[derive(Debug)]
pub enum StartOutcome {
    /// The daemon serves the mount.
    Serving,
    /// The daemon failed, and has removed its mount.
    Failed {
        /// The error, as it is printed.
        text: String,
        /// The exit code.
        exit_code: u8,
    },
    /// The daemon died without a report, and may have left a mount.
    Died(Error),
}

/// What a daemon that serves has written: a byte before it leaves the session, and one after that.
const SERVING: [u8; 2] = [0, 0];

impl StartingDaemon {
    /// Waits for the report. The daemon has ended when this returns another outcome than [`StartOutcome::Serving`].
    ///
    /// # Errors
    /// As read(2).
    pub fn wait(self) -> Result<StartOutcome> {
        const MAX_MESSAGE: u64 = 16 << 10;
        let mut message = Vec::new();
        let read = self.pipe.take(MAX_MESSAGE).read_to_end(&mut message);
        read.map_err(|e| Error::failed("cannot read the daemon's report").because(e))?;
        if message == SERVING {
            return Ok(StartOutcome::Serving);
        }
        // Waits for the end of the daemon, so that nothing is busy because of it when the command ends.
        let status = waitpid(self.process, None);
        // A failure is its exit code and text, perhaps after the first byte of SERVING.
        match message.strip_prefix(&[0]).unwrap_or(&message).split_first() {
            Some((exit_code, text)) => {
                Ok(StartOutcome::Failed { text: String::from_utf8_lossy(text).into_owned(), exit_code: *exit_code })
            }
            None => Ok(StartOutcome::Died(Error::failed(match status {
                Ok(WaitStatus::Signaled(_, signal, _)) => format!("the daemon was killed by {signal}"),
                _ => "the daemon died before it served".to_owned(),
            }))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `fork` refuses to run in the threads of the test harness, so this tests the command's side alone.
    fn outcome(message: &[u8]) -> StartOutcome {
        let (pipe, mut writer) = io::pipe().unwrap();
        writer.write_all(message).unwrap();
        drop(writer);
        StartingDaemon { process: Pid::from_raw(i32::MAX), pipe }.wait().unwrap()
    }

    #[test]
    fn the_report_of_the_daemon_is_the_outcome() {
        let failed = |message: &[u8]| match outcome(message) {
            StartOutcome::Failed { text, exit_code } => (text, exit_code),
            other => panic!("{message:?}: {other:?}"),
        };
        assert!(matches!(outcome(&SERVING), StartOutcome::Serving));
        assert_eq!(failed(b"\x20text"), ("text".to_owned(), 32));
        assert_eq!(failed(b"\x01"), (String::new(), 1));
        assert_eq!(failed(b"\x00\x02text"), ("text".to_owned(), 2), "the last report counts");
        for message in [&b""[..], &[0]] {
            let StartOutcome::Died(error) = outcome(message) else { panic!("{message:?}") };
            assert_eq!(error.exit_code(), 32, "{message:?}: it died before it had left the session");
        }
    }

    #[test]
    fn a_failure_without_a_command_is_logged() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut report = StartReport { pipe: Some(writer) };
        report.failed("an error after the command has ended", 32);
        assert!(report.pipe.is_none());
    }
}
