//! Why a device is shown without holes, and why answers about it are data.

use std::borrow::Cow;
use std::fmt;
use std::io;

use crate::error::plain;

mod degraded;

pub use degraded::{Degraded, DegradedState};

/// Text that is mostly known when the program is compiled.
type Text = Cow<'static, str>;

/// The reason why all of a device, or of one layer of it, is shown as data.
///
/// The text of a reason is a sentence without its final stop. Its subject is the layer, which the text calls "it".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DenseReason {
    /// Holes of this kind of device, or of one with this configuration, are not supported.
    Unsupported(Text),
    /// Something that must be known cannot be found out: `cannot ACTION: CAUSE`.
    Unreadable {
        /// What was tried, in the infinitive: `read its table`.
        action: Text,
        /// Why it failed: `Permission denied`.
        cause: String,
    },
    /// A text of the kernel has a form that is not supported: `WHAT not understood: TEXT`.
    NotUnderstood {
        /// What the text is, and the verb: `its arguments are`.
        what: Text,
        /// The text.
        text: String,
    },
    /// It is in a state in which holes are not certain, such as degraded, suspended or resyncing. It is dense as long
    /// as that lasts.
    State(Text),
    /// Its metadata could not be read at this moment. It is read again at a later request.
    NotNow(Text),
    /// Its metadata is damaged.
    Damaged(Text),
    /// There is no proof that what was read is still valid.
    Unproven(Text),
    /// The reason of a device of this kind: `KIND: REASON`.
    OfKind {
        /// The kind of device: `dm-raid`.
        kind: String,
        /// The reason.
        reason: Box<Self>,
    },
    /// Different parts of the device have different reasons.
    Parts(Vec<Self>),
}

impl DenseReason {
    /// The failure of `action`, such as `read its table`, with `error`.
    pub fn cannot(action: impl Into<Text>, error: &io::Error) -> Self {
        Self::Unreadable { action: action.into(), cause: plain(error) }
    }

    /// The reason of a device that is of that kind.
    #[must_use]
    pub fn of_kind(self, kind: &str) -> Self {
        Self::OfKind { kind: kind.to_owned(), reason: Box::new(self) }
    }

    /// Whether holes cannot be found out because of something that failed, or in a state that may pass. With any other reason
    /// the device is shown as data by design.
    pub fn is_degradation(&self) -> bool {
        match self {
            Self::Unreadable { .. } | Self::State(_) | Self::NotNow(_) | Self::Damaged(_) => true,
            Self::Unsupported(_) | Self::NotUnderstood { .. } | Self::Unproven(_) => false,
            Self::OfKind { reason, .. } => reason.is_degradation(),
            Self::Parts(reasons) => reasons.iter().any(Self::is_degradation),
        }
    }

    /// Whether a later request may find holes although nothing has changed that a guard sees.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::NotNow(_) => true,
            Self::OfKind { reason, .. } => reason.is_temporary(),
            Self::Parts(reasons) => reasons.iter().any(Self::is_temporary),
            _ => false,
        }
    }
}

impl fmt::Display for DenseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported(text) | Self::State(text) | Self::Damaged(text) | Self::Unproven(text) => {
                f.write_str(text)
            }
            Self::Unreadable { action, cause } => write!(f, "cannot {action}: {cause}"),
            Self::NotUnderstood { what, text } => write!(f, "{what} not understood: {text}"),
            Self::NotNow(text) => write!(f, "{text} (a later request tries again)"),
            Self::OfKind { kind, reason } => write!(f, "{kind}: {reason}"),
            Self::Parts(reasons) => {
                for (index, reason) in reasons.iter().enumerate() {
                    write!(f, "{}{reason}", if index == 0 { "" } else { "; " })?;
                }
                Ok(())
            }
        }
    }
}

impl From<String> for DenseReason {
    fn from(text: String) -> Self {
        Self::Unsupported(text.into())
    }
}

impl From<&'static str> for DenseReason {
    fn from(text: &'static str) -> Self {
        Self::Unsupported(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_a_sentence() {
        let refused = DenseReason::cannot("read its table", &io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(refused.to_string(), "cannot read its table: Permission denied");
        let later = DenseReason::NotNow("its pool is suspended".into()).of_kind("dm-thin");
        assert_eq!(later.to_string(), "dm-thin: its pool is suspended (a later request tries again)");
        let both = DenseReason::Parts(vec![refused.clone(), later]);
        assert!(both.to_string().contains("Permission denied; dm-thin"), "{both}");
        assert!(both.is_temporary() && !refused.is_temporary());
        assert!(both.is_degradation() && refused.is_degradation());
        assert!(!DenseReason::from("it is encrypted").of_kind("dm-crypt").is_degradation());
    }
}
