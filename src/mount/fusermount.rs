//! fusermount3(1), the setuid program of the fuse3 package that mounts and unmounts for ordinary users.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::process;

/// The paths at which distributions install it. `PATH` is not used.
const PLACES: [&str; 5] = [
    "/usr/bin/fusermount3",
    "/bin/fusermount3",
    "/usr/local/bin/fusermount3",
    "/run/wrappers/bin/fusermount3",
    "/usr/bin/fusermount",
];

/// The environment variable for the descriptor of the socket over which it sends the FUSE device (`util/fusermount.c` of
/// libfuse).
const SOCKET_VARIABLE: &str = "_FUSE_COMMFD";

/// Mounts on `dir` with the option list `options`, and returns the FUSE device.
///
/// # Errors
/// When fusermount3 is not installed or refuses; the message is that of fusermount3.
pub fn mount(dir: &Path, options: &OsStr) -> Result<OwnedFd> {
    let cannot = |e: io::Error| Error::new(ErrorKind::System, "cannot run fusermount3").because(e);
    let (own_end, child_end) = UnixStream::pair().map_err(cannot)?;
    fcntl(&child_end, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|e| cannot(e.into()))?;
    let mut child = command()?
        .env(SOCKET_VARIABLE, child_end.as_raw_fd().to_string())
        .args([OsStr::new("-o"), options, OsStr::new("--"), dir.as_os_str()])
        .stderr(Stdio::piped())
        .spawn()
        .map_err(cannot)?;
    drop(child_end);
    let device = process::receive_descriptor(&own_end);
    match device {
        Ok(device) => child.wait().map(|_| device).map_err(cannot),
        Err(_) => {
            let output = child.wait_with_output().map_err(cannot)?;
            Err(Error::failed(format!("cannot mount: {}", error_line(&output.stderr))).on(dir))
        }
    }
}

/// Unmounts `dir`; `lazy` detaches it although it is in use.
///
/// # Errors
/// When fusermount3 is not installed or refuses; the message is that of fusermount3.
pub fn unmount(dir: &Path, lazy: bool) -> Result<()> {
    let output = command()?
        .args(["-u"])
        .args(lazy.then_some("-z"))
        .args([OsStr::new("--"), dir.as_os_str()])
        .output()
        .map_err(|e| Error::new(ErrorKind::System, "cannot run fusermount3").because(e))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::failed(format!("cannot unmount: {}", error_line(&output.stderr))).on(dir))
}

/// Escapes a value for the option list of fusermount3.
pub fn escaped(value: &OsStr) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut escaped = Vec::new();
    for byte in value.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            escaped.push(b'\\');
        }
        escaped.push(*byte);
    }
    OsString::from_vec(escaped)
}

fn command() -> Result<Command> {
    let program = PLACES.iter().find(|place| Path::new(place).exists()).ok_or_else(|| {
        Error::usage("only root can mount and unmount without fusermount3").hint("install the package fuse3")
    })?;
    let mut command = Command::new(program);
    // In a process group of its own: Ctrl-C between its mount(2) and the sending of the device would leave a dead mount.
    command.env_clear().process_group(0).stdin(Stdio::null()).stdout(Stdio::null());
    Ok(command)
}

/// The last line of its error output, without its name.
fn error_line(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("fusermount3 failed without a message");
    line.split_once(": ").map_or(line, |(_, rest)| rest).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_do_not_end_a_name() {
        assert_eq!(escaped(OsStr::new(r"/dev/a,b\c")), r"/dev/a\,b\\c");
    }

    #[test]
    fn an_error_is_one_line() {
        assert_eq!(error_line(b"fusermount3: user has no write access to /m\n"), "user has no write access to /m");
        assert_eq!(error_line(b"x\nfusermount3: no: really\n\n"), "no: really");
        assert!(error_line(b"").contains("without a message"));
    }
}
