//! The SPEC of a command line, which names what is to be shown, and the options that say more about it.

mod tag;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, shown};
use crate::qcow2::ClusterSize;
use crate::source::nbd::Uri;
use crate::source::thin::ThinId;

pub use tag::Tag;

/// The length in bytes of the longest name of a file (`NAME_MAX`).
pub const LONGEST_NAME: usize = 255;

/// A SPEC, parsed once. No later change of the current directory changes its meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    typed: OsString,
    kind: SpecKind,
}

/// What a SPEC names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SpecKind {
    /// A device, an image or a directory of devices: its absolute path, which may lead to nothing.
    Path(PathBuf),
    /// An export of an NBD server.
    Nbd(Uri),
}

/// Options of what is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceOptions {
    /// The metadata of a thin pool that is not active, whose data device or image is the SPEC: an absolute path.
    pub thin_metadata: Option<PathBuf>,
    /// The volume of that pool. A mount shows all volumes, and has none here.
    pub volume: Option<ThinId>,
    /// The export that the NBD device of the kernel is connected to, which the SPEC is or stands on.
    pub nbd: Option<Uri>,
    /// Whether nobody writes to the devices while they are mounted, by the word of the user. Only for mounts.
    pub is_static: bool,
    /// The name of the only file, instead of that of the device. Only for mounts.
    pub name: Option<OsString>,
    /// The views that are shown beside each file.
    pub views: ViewOptions,
}

/// Further files that are shown for each device, beside the exact one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ViewOptions {
    /// A compact image of the device.
    pub compact: bool,
    /// What changed since this older snapshot.
    pub since: Option<Older>,
    /// The device with the free space of its file system as holes.
    pub used: bool,
    /// The cluster size of images; one that fits the device where `None`.
    pub cluster_size: Option<ClusterSize>,
    /// The name of the backing file that is written into an image of changes; one that is derived where `None`.
    pub backing: Option<OsString>,
}

impl ViewOptions {
    /// How many kinds of views are wanted.
    pub fn count(&self) -> usize {
        usize::from(self.compact) + usize::from(self.since.is_some()) + usize::from(self.used)
    }
}

/// An older snapshot, as it is named in an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Older {
    /// An absolute path of a device.
    Path(PathBuf),
    /// A name beside the newer device, the id of a volume of an offline pool, or the name of a dirty bitmap of an NBD export.
    Name(OsString),
}

impl Older {
    /// Parses the name of an older snapshot: a path if there is a slash in it, and a name otherwise. `None` for text that
    /// names nothing, such as an empty one.
    ///
    /// # Errors
    /// For a relative path when the current directory was removed.
    pub fn parse(typed: &OsStr) -> Result<Option<Self>> {
        if Path::new(typed).file_name().is_none() {
            return Ok(None);
        }
        let is_path = typed.as_encoded_bytes().contains(&b'/');
        Ok(Some(if is_path { Self::Path(absolute(Path::new(typed))?) } else { Self::Name(typed.to_owned()) }))
    }

    /// The path, or the name.
    pub fn typed(&self) -> OsString {
        match self {
            Self::Path(path) => path.into(),
            Self::Name(name) => name.clone(),
        }
    }

    /// The name that stands in the name of the view.
    pub fn shown(&self) -> &OsStr {
        match self {
            Self::Path(path) => path.file_name().unwrap_or(path.as_os_str()),
            Self::Name(name) => name,
        }
    }
}

impl Spec {
    /// Parses a SPEC. Text that begins with a URI scheme and `://` is a URI, text such as `UUID=...` a tag, all else is a path. A tag
    /// is the path of the device that has it, as if that were typed: mount(8) too runs its helpers with that path.
    ///
    /// # Errors
    /// A usage error for a URI that is not a usable NBD URI, and for a tag without a value. A failure with ENOENT for a tag that no
    /// device has, and for a relative path when the current directory was removed.
    pub fn parse(typed: &OsStr) -> Result<Self> {
        if let Some(tag) = Tag::parse(typed)? {
            let device = tag.device()?;
            return Ok(Self { typed: device.clone().into(), kind: SpecKind::Path(device) });
        }
        let kind = match typed.to_str().filter(|text| is_uri(text)) {
            Some(text) => SpecKind::Nbd(Uri::parse(text)?),
            None => SpecKind::Path(absolute(Path::new(typed))?),
        };
        Ok(Self { typed: typed.to_owned(), kind })
    }

    /// The text as the user typed it, or the device that has the tag that was typed. mount(8) and systemd compare the source of a mount with it.
    pub fn typed(&self) -> &OsStr {
        &self.typed
    }

    /// What it names.
    pub fn kind(&self) -> &SpecKind {
        &self.kind
    }

    /// The absolute path, if it names one.
    pub fn path(&self) -> Option<&Path> {
        match &self.kind {
            SpecKind::Path(path) => Some(path),
            SpecKind::Nbd(_) => None,
        }
    }

    /// The URI, if it names an NBD export.
    pub fn nbd_uri(&self) -> Option<&Uri> {
        match &self.kind {
            SpecKind::Path(_) => None,
            SpecKind::Nbd(uri) => Some(uri),
        }
    }

    /// Whether it is a path to nothing, such as the node of a disk that is not plugged in. `false` when that cannot be
    /// determined, and for every URI.
    pub fn is_missing(&self) -> bool {
        let metadata = self.path().map(std::fs::metadata);
        metadata.is_some_and(|result| result.is_err_and(|error| error.kind() == io::ErrorKind::NotFound))
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            SpecKind::Path(path) => shown(path).fmt(f),
            SpecKind::Nbd(_) => shown(&self.typed).fmt(f),
        }
    }
}

/// Makes a path absolute. Symbolic links stay as they are, and the path need not exist.
///
/// # Errors
/// When the path is relative and the current directory was removed, and when the path is empty.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Error::failed("cannot make the path absolute").on(path).because(error))
}

/// Whether `text` begins with a scheme (RFC 3986, section 3.1) and `://`.
fn is_uri(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| {
        scheme.starts_with(|first: char| first.is_ascii_alphabetic())
            && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_path_becomes_absolute_and_the_text_stays() {
        let here = std::env::current_dir().unwrap();
        for (typed, path) in
            [("disk.img", here.join("disk.img")), ("/dev/x", "/dev/x".into()), ("./a://b", here.join("a:/b"))]
        {
            let spec = Spec::parse(OsStr::new(typed)).unwrap();
            assert_eq!(spec.path(), Some(&*path), "{typed}");
            assert_eq!((spec.typed(), spec.nbd_uri()), (OsStr::new(typed), None));
        }
        let bytes = OsStr::from_bytes(b"/dev/\xff\n");
        let spec = Spec::parse(bytes).unwrap();
        assert_eq!((spec.path().unwrap().as_os_str(), spec.typed()), (bytes, bytes));
        assert_eq!(spec.to_string(), "/dev/\\xff\\n");
        assert_eq!(Spec::parse(OsStr::new("")).unwrap_err().exit_code(), 32);
    }

    #[test]
    fn a_uri_is_an_nbd_export_or_an_error() {
        for text in ["nbd://h/x", "NBD+unix:///?socket=s", "nbds://h/?tls-certificates=p"] {
            let spec = Spec::parse(OsStr::new(text)).unwrap();
            assert_eq!((spec.typed(), spec.to_string()), (OsStr::new(text), text.to_owned()));
            assert_eq!((spec.path(), spec.nbd_uri()), (None, Some(&Uri::parse(text).unwrap())));
            assert!(!spec.is_missing());
        }
        for text in ["nbd+vsock://1/", "http://h/x", "nbd:///x"] {
            assert_eq!(Spec::parse(OsStr::new(text)).unwrap_err().exit_code(), 1, "{text}");
        }
    }

    #[test]
    fn only_a_path_to_nothing_is_missing() {
        for (typed, missing) in [("/nonexistent", true), ("/dev/null", false), ("/dev/null/x", false)] {
            assert_eq!(Spec::parse(OsStr::new(typed)).unwrap().is_missing(), missing, "{typed}");
        }
    }
}
