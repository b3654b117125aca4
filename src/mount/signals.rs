//! The signals that a daemon takes. None ends it as it is by default: a process that ends without an unmount leaves a
//! mount that answers ENOTCONN.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;

use crate::error::{Error, ErrorKind, Result};

/// What a signal asks of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SignalAction {
    /// Unmount and end, because of this signal.
    Unmount(String),
    /// Forget every map, so that the next question looks at the device again.
    DropMaps,
    /// Write the counters to the log.
    LogCounters,
    /// Switch debug lines on or off.
    ToggleDebug,
}

/// All signals to this process but those that stand for a fault of its own code, held until they are asked for.
pub struct Signals {
    descriptor: SignalFd,
    /// Whether the process serves in the foreground, where Ctrl-C is meant for it.
    foreground: bool,
}

/// What the kernel sends for a fault; to hold them back would be to run on after it.
const FAULT_SIGNALS: [Signal; 7] =
    [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL, Signal::SIGFPE, Signal::SIGABRT, Signal::SIGSYS, Signal::SIGTRAP];

/// Sent by the kernel, for signals of this kind by the terminal (`include/uapi/asm-generic/siginfo.h`).
const SI_KERNEL: i32 = 0x80;

impl Signals {
    /// Holds the signals back in this thread and in those that it will start.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn block(foreground: bool) -> Result<Self> {
        let cannot = |e: Errno| Error::new(ErrorKind::System, "cannot hold signals back").because(e);
        let mut held = SigSet::all();
        FAULT_SIGNALS.into_iter().for_each(|fault| held.remove(fault));
        held.thread_block().map_err(cannot)?;
        Ok(Self { descriptor: SignalFd::new(&held).map_err(cannot)?, foreground })
    }

    /// Waits for the next signal that asks for something.
    ///
    /// # Errors
    /// As read(2).
    pub fn next(&self) -> std::result::Result<SignalAction, Errno> {
        loop {
            match self.descriptor.read_signal() {
                Ok(Some(signal)) => {
                    let number = i32::try_from(signal.ssi_signo).unwrap_or(0);
                    if let Some(action) = action(number, signal.ssi_code, self.foreground) {
                        return Ok(action);
                    }
                }
                Ok(None) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// What a signal asks for. A daemon belongs to the terminal's process group until the mount was reported; what the
/// terminal sent until then was for the command.
fn action(number: i32, code: i32, foreground: bool) -> Option<SignalAction> {
    let from_terminal = code == SI_KERNEL;
    let Ok(signal) = Signal::try_from(number) else {
        return Some(SignalAction::Unmount(format!("real-time signal {number}")));
    };
    match signal {
        Signal::SIGINT | Signal::SIGQUIT | Signal::SIGHUP if from_terminal && !foreground => None,
        Signal::SIGHUP => Some(SignalAction::DropMaps),
        Signal::SIGUSR1 => Some(SignalAction::LogCounters),
        Signal::SIGUSR2 => Some(SignalAction::ToggleDebug),
        // The call that caused the first two fails with EPIPE or EFBIG; the others stop a process, or do nothing.
        Signal::SIGPIPE
        | Signal::SIGXFSZ
        | Signal::SIGTSTP
        | Signal::SIGTTIN
        | Signal::SIGTTOU
        | Signal::SIGCHLD
        | Signal::SIGCONT
        | Signal::SIGURG
        | Signal::SIGWINCH => None,
        other => Some(SignalAction::Unmount(other.as_str().to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `SI_USER`: somebody called kill(2).
    const SI_USER: i32 = 0;

    #[test]
    fn every_signal_that_would_end_the_process_unmounts_first() {
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGALRM, Signal::SIGXCPU] {
            assert_eq!(action(signal as i32, SI_USER, false), Some(SignalAction::Unmount(signal.as_str().to_owned())));
        }
        assert!(matches!(action(40, SI_USER, false), Some(SignalAction::Unmount(_))));
        for signal in [Signal::SIGPIPE, Signal::SIGXFSZ, Signal::SIGTSTP, Signal::SIGCHLD] {
            assert_eq!(action(signal as i32, SI_KERNEL, false), None, "{signal}");
        }
    }

    #[test]
    fn the_terminal_speaks_to_the_command_and_to_a_foreground_service() {
        for signal in [Signal::SIGINT, Signal::SIGQUIT] {
            assert_eq!(action(signal as i32, SI_KERNEL, false), None, "{signal}");
            assert!(matches!(action(signal as i32, SI_KERNEL, true), Some(SignalAction::Unmount(_))), "{signal}");
        }
        assert_eq!(action(Signal::SIGHUP as i32, SI_KERNEL, false), None);
        assert_eq!(action(Signal::SIGHUP as i32, SI_USER, false), Some(SignalAction::DropMaps));
        assert!(matches!(action(Signal::SIGXCPU as i32, SI_KERNEL, false), Some(SignalAction::Unmount(_))));
    }
}
