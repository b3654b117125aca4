//! The signals that the daemon handles. It blocks nearly all signals and reads them from a descriptor, so that none ends
//! the process without an unmount, which would leave a mount that answers ENOTCONN.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SignalFd, siginfo};

use crate::error::{Error, ErrorKind, Result};

/// What the daemon does on a signal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SignalAction {
    /// Unmount and end. The string is the name of the signal.
    Unmount(String),
    /// Drop every map, so that the next lseek(2) makes a new one.
    DropMaps,
    /// Write the counters to the log.
    LogCounters,
    /// Switch debug lines on or off.
    ToggleDebug,
}

/// The blocked signals of this process: all but [`FAULT_SIGNALS`].
pub struct Signals {
    descriptor: SignalFd,
    /// Whether the process serves in the foreground, so that signals of the terminal, such as Ctrl-C, are for it.
    foreground: bool,
}

/// The signals that the kernel sends for a fault of the program. They are not blocked, since the program must not continue
/// after a fault.
const FAULT_SIGNALS: [Signal; 7] =
    [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL, Signal::SIGFPE, Signal::SIGABRT, Signal::SIGSYS, Signal::SIGTRAP];

/// The code of a signal that the kernel sent, which for SIGINT, SIGQUIT and SIGHUP means the terminal
/// (`include/uapi/asm-generic/siginfo.h`).
const SI_KERNEL: i32 = 0x80;

impl Signals {
    /// Blocks the signals in this thread, and in all threads that it starts later.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn block(foreground: bool) -> Result<Self> {
        let cannot = |e: Errno| Error::new(ErrorKind::System, "cannot block signals").because(e);
        let mut blocked = SigSet::all();
        FAULT_SIGNALS.into_iter().for_each(|fault| blocked.remove(fault));
        blocked.thread_block().map_err(cannot)?;
        Ok(Self { descriptor: SignalFd::new(&blocked).map_err(cannot)?, foreground })
    }

    /// The next signal that has an action, if one is there already.
    ///
    /// # Errors
    /// As poll(2) and read(2).
    pub fn pending(&self) -> std::result::Result<Option<SignalAction>, Errno> {
        let mut polled = [PollFd::new(self.descriptor.as_fd(), PollFlags::POLLIN)];
        while poll(&mut polled, PollTimeout::ZERO)? > 0 {
            if let Some(signal) = self.descriptor.read_signal()?
                && let Some(action) = self.action_of(&signal)
            {
                return Ok(Some(action));
            }
        }
        Ok(None)
    }

    fn action_of(&self, signal: &siginfo) -> Option<SignalAction> {
        let number = i32::try_from(signal.ssi_signo).unwrap_or(0);
        action(number, signal.ssi_code, self.foreground)
    }

    /// Waits for the next signal that has an action.
    ///
    /// # Errors
    /// As read(2).
    pub fn next(&self) -> std::result::Result<SignalAction, Errno> {
        loop {
            match self.descriptor.read_signal() {
                Ok(Some(signal)) => {
                    if let Some(action) = self.action_of(&signal) {
                        return Ok(action);
                    }
                }
                Ok(None) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The action of a signal, if it has one. Until the start is reported, a daemon is in the process group of the mount
/// command; signals that the terminal sends to that group are for the command, and have no action here.
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
        // The system call that caused one of the first two fails with EPIPE or EFBIG. By default the others stop a process,
        // or do nothing.
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

    /// `SI_USER`: the code of a signal from kill(2).
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
    fn signals_of_the_terminal_are_for_the_command_and_for_a_foreground_service() {
        for signal in [Signal::SIGINT, Signal::SIGQUIT] {
            assert_eq!(action(signal as i32, SI_KERNEL, false), None, "{signal}");
            assert!(matches!(action(signal as i32, SI_KERNEL, true), Some(SignalAction::Unmount(_))), "{signal}");
        }
        assert_eq!(action(Signal::SIGHUP as i32, SI_KERNEL, false), None);
        assert_eq!(action(Signal::SIGHUP as i32, SI_USER, false), Some(SignalAction::DropMaps));
        assert!(matches!(action(Signal::SIGXCPU as i32, SI_KERNEL, false), Some(SignalAction::Unmount(_))));
    }
}
