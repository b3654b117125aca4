//! From a command to a daemon: fork, a pipe over which the daemon says how its start went, and the signals after it.

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

/// How a daemon says that it serves.
#[derive(Debug)]
pub struct Ready {
    /// To the waiting command; `None` in the foreground, and after the report.
    pipe: Option<PipeWriter>,
}

impl Ready {
    /// For a service that stays in the foreground.
    pub fn foreground() -> Self {
        Self { pipe: None }
    }

    /// Whether nobody waits in another process.
    pub fn is_foreground(&self) -> bool {
        self.pipe.is_none()
    }

    /// Says that the mount is there: the command that waits for it returns, the service manager goes on. From here on a
    /// daemon has no terminal and a session of its own.
    ///
    /// # Errors
    /// Interrupted, when the command that waited is gone: nobody knows of the mount.
    pub fn report(&mut self) -> Result<()> {
        let Some(pipe) = &mut self.pipe else { return notify_manager() };
        leave_terminal()?;
        let gone = |e| Error::new(ErrorKind::Interrupted, "the mount command was ended").because(e);
        // Before the session is left: then a command that is gone is noticed while its signals still come here too.
        pipe.write_all(&[0]).map_err(gone)?;
        setsid().map_err(|e| Error::new(ErrorKind::System, "cannot leave the session").because(e))?;
        pipe.write_all(&[0]).map_err(gone)?;
        // The command returns when the pipe ends.
        self.pipe = None;
        Ok(())
    }
}

/// Runs `work` in a daemon and waits until it reports; returns the exit code, 0 when it serves. `complain` makes the
/// text of an error that the user sees. `clear_away` runs when the daemon died without a report.
///
/// Until the report the daemon stays in the process group of the caller. autofs knows the mount command by that group
/// (`fs/autofs/autofs_i.h: autofs_oz_mode`): any other process that looks up the mountpoint, and the daemon's mount(2)
/// does, waits until the automount daemon knows that the mount command ended.
///
/// # Errors
/// When no daemon can be started, or it died.
pub fn background(
    complain: impl Fn(&Error) -> String,
    work: impl FnOnce(&mut Ready) -> Result<()>,
    clear_away: impl FnOnce() -> Result<()>,
) -> Result<u8> {
    let cannot = |e: io::Error| Error::new(ErrorKind::System, "cannot start a daemon").because(e);
    let (reader, writer) = io::pipe().map_err(cannot)?;
    match process::fork().map_err(cannot)? {
        Fork::Parent(child) => {
            drop(writer);
            wait_for_report(reader, child, clear_away)
        }
        Fork::Child => {
            drop(reader);
            let mut ready = Ready { pipe: Some(writer) };
            let code = match leave_directory().and_then(|()| work(&mut ready)) {
                Ok(()) => 0,
                Err(error) => {
                    give_up(&mut ready, &complain(&error), error.exit_code());
                    error.exit_code()
                }
            };
            std::process::exit(code.into())
        }
    }
}

fn leave_directory() -> Result<()> {
    chdir("/").map_err(|e| Error::new(ErrorKind::System, "cannot enter the root directory").because(e))?;
    umask(Mode::empty());
    Ok(())
}

/// The standard descriptors stay open, on /dev/null: closed, they would be given to the next file that is opened; and
/// who reads the command's output would wait for the daemon's end.
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

/// Hands an error to the command, or to the log when the command is gone.
fn give_up(ready: &mut Ready, text: &str, code: u8) {
    let record = [&[code], text.as_bytes()].concat();
    if ready.pipe.take().is_none_or(|mut pipe| pipe.write_all(&record).is_err()) {
        log::error!("{text}");
    }
}

/// What a daemon that serves has written: once before it leaves the session, and once after that.
const SERVES: [u8; 2] = [0, 0];

/// Reads [`SERVES`], or the record `CODE TEXT` of a failure, which may follow a first 0. A pipe that ends without either is
/// a daemon that died.
fn wait_for_report(reader: PipeReader, child: Pid, clear_away: impl FnOnce() -> Result<()>) -> Result<u8> {
    const LONGEST: u64 = 16 << 10;
    let mut record = Vec::new();
    let read = reader.take(LONGEST).read_to_end(&mut record);
    read.map_err(|e| Error::failed("cannot hear from the daemon").because(e))?;
    if record == SERVES {
        return Ok(0);
    }
    // It failed, and is on its way out: what it held is free when this command returns.
    let status = waitpid(child, None);
    match record.strip_prefix(&[0]).unwrap_or(&record).split_first() {
        Some((code, text)) => {
            eprintln!("{}", String::from_utf8_lossy(text));
            Ok(*code)
        }
        None => {
            let error = Error::failed(match status {
                Ok(WaitStatus::Signaled(_, signal, _)) => format!("the daemon was killed by {signal}"),
                _ => "the daemon died before it served".to_owned(),
            });
            Err(match clear_away() {
                Ok(()) => error,
                Err(left) => error.hint(format!("its mount is still there: {left}")),
            })
        }
    }
}

/// Tells a service manager that the service is up (sd_notify(3)), if one wants to know.
fn notify_manager() -> Result<()> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match name.as_bytes() {
        [b'@', abstract_name @ ..] => SocketAddr::from_abstract_name(abstract_name),
        _ => SocketAddr::from_pathname(&name),
    };
    address
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address))
        .map(drop)
        .map_err(|e| Error::new(ErrorKind::System, "cannot tell the service manager").on(&name).because(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `fork` refuses in the threads of the test harness, so the parent's half is tested alone.
    fn parent_hears(record: &[u8]) -> Result<u8> {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(record).unwrap();
        drop(writer);
        wait_for_report(reader, Pid::from_raw(i32::MAX), || Ok(()))
    }

    #[test]
    fn the_daemons_word_is_the_commands() {
        assert_eq!(parent_hears(&SERVES).unwrap(), 0);
        assert_eq!(parent_hears(&[0]).unwrap_err().exit_code(), 32, "it died before it had left the session");
        assert_eq!(parent_hears(b"\x20text").unwrap(), 32);
        assert_eq!(parent_hears(b"\x01").unwrap(), 1);
        assert_eq!(parent_hears(b"\x00\x02text").unwrap(), 2, "the last word counts");
        assert_eq!(parent_hears(b"").unwrap_err().exit_code(), 32);
    }

    #[test]
    fn a_command_that_is_gone_is_an_interruption() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut ready = Ready { pipe: Some(writer) };
        give_up(&mut ready, "nobody hears this", 32);
        assert!(ready.pipe.is_none());
    }
}
