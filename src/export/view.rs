//! Views: further files for one device, beside the exact file. Each wraps another export.
//!
//! | view | name | what it is |
//! |---|---|---|
//! | [`View::Compact`] | `NAME.qcow2` | an image of the device that has its data and no holes |
//! | [`View::Since`] | `NAME.since-OLDER.qcow2` | an image of what changed since an older snapshot |
//! | [`View::Used`] | `NAME.used` | the device with the free space of its file system as holes |
//!
//! A view is made when it is opened. What it shows is fixed from then on, so each open of a device that may have changed in
//! between is a file of its own, with an inode of its own while the other one is open: the kernel keeps the bytes of a file
//! by inode. stat(2) shows one number for all of them.

mod claim;
mod image;
mod older;
mod queue;
mod used;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Export, FileIdentity, FileSource, HostNode};
use crate::error::{Error, Result};
use crate::source::Context;
use crate::spec::ViewOptions;

pub use older::OlderSource;
use older::OpenedOlder;
pub use queue::ImageRead;
pub use used::has_known_file_system;

/// The kinds of views.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// A compact image of the device.
    Compact,
    /// An image of what changed since an older snapshot.
    Since,
    /// The device with the free space of its file system as holes.
    Used,
}

/// The ending of the name of an image.
const IMAGE: &[u8] = b".qcow2";
/// The ending of the name of a view of the used space.
const USED: &[u8] = b".used";

impl ViewOptions {
    /// The views that are wanted, each with the ending of its name.
    fn endings(&self) -> impl Iterator<Item = (View, Vec<u8>)> {
        let since = self.since.as_ref().map(|older| [b".since-", older.shown().as_bytes(), IMAGE].concat());
        // The longest ending first: each ending of an image of changes is one of a compact image too.
        let since = since.map(|ending| (View::Since, ending));
        let compact = self.compact.then(|| (View::Compact, IMAGE.to_vec()));
        let used = self.used.then(|| (View::Used, USED.to_vec()));
        since.into_iter().chain(compact).chain(used)
    }

    /// The names of the views of the file `name`.
    pub fn names_of(&self, name: &OsStr) -> impl Iterator<Item = (View, OsString)> {
        let name = name.as_bytes().to_vec();
        self.endings().map(move |(view, ending)| (view, OsString::from_vec([&*name, &ending].concat())))
    }

    /// Which view of which file has that name, in the order in which they are to be tried.
    pub fn named<'a>(&self, name: &'a OsStr) -> impl Iterator<Item = (View, &'a OsStr)> {
        self.endings().filter_map(|(view, ending)| {
            let base = name.as_bytes().strip_suffix(&*ending).filter(|base| !base.is_empty())?;
            Some((view, OsStr::from_bytes(base)))
        })
    }
}

/// The view of an open file that a command without a mount is about: the used space, or a compact image; the file itself if
/// neither is wanted.
///
/// # Errors
/// When it cannot be made, or both are wanted.
pub fn of_open(base: Arc<dyn Export>, options: &ViewOptions, context: &Context) -> Result<Arc<dyn Export>> {
    let identity = next_identity();
    match (options.compact, options.used) {
        (false, false) => Ok(base),
        (true, false) => Ok(Arc::new(image::ImageExport::compact(base, options, identity, context)?)),
        (false, true) => Ok(Arc::new(used::UsedExport::open(base, identity, Wanted::Contents, context)?)),
        (true, true) => Err(Error::usage("one view at a time: compact or used")),
    }
}

/// Whether the path of a device or image still leads to it. Other files have no path of their own.
fn is_at_its_path(base: &dyn Export) -> bool {
    let found = || HostNode::at(base.name()).ok()?.identity;
    base.identity().is_none_or(|identity| found() == Some(identity))
}

/// The name of a view in messages.
fn named(base: &dyn Export, ending: &str) -> PathBuf {
    let mut name = base.name().as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

fn next_identity() -> FileIdentity {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    FileIdentity::View(NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A view of a file, which is not open.
#[derive(Clone, Debug)]
pub struct ViewSource {
    /// The kind of view.
    pub view: View,
    /// The file that it is a view of.
    pub base: FileSource,
    /// The older snapshot, for [`View::Since`].
    pub older: Option<OlderSource>,
    /// How it is made.
    pub options: Arc<ViewOptions>,
    identity: FileIdentity,
}

impl ViewSource {
    /// A view that is different from all others: what it shows is not the same at each open.
    pub fn new(view: View, base: FileSource, older: Option<OlderSource>, options: Arc<ViewOptions>) -> Self {
        Self { view, base, older, options, identity: next_identity() }
    }

    /// The node of the view: that of the file, with an identity of its own.
    pub fn node(&self, base: HostNode) -> HostNode {
        HostNode { identity: Some(self.identity), ..base }
    }

    /// Opens the view: finds out what it shows, as far as that is wanted.
    ///
    /// # Errors
    /// When a device cannot be opened, or the view cannot be made.
    pub fn open(&self, wanted: Wanted, context: &Context) -> Result<Arc<dyn Export>> {
        if let (View::Since, Some(older)) = (self.view, &self.older)
            && wanted != Wanted::Bound
        {
            let older = OpenedOlder::new(older.clone());
            let (base, changes) = older.source.compared_with(&self.base, context)?;
            let image = image::ImageExport::of_changes(base, changes, &self.options, older, self.identity)?;
            return Ok(Arc::new(image));
        }
        let base = self.base.open()?;
        Ok(match self.view {
            View::Used if wanted == Wanted::Bound => Arc::new(used::UsedExport::dense(base, self.identity)),
            View::Used => Arc::new(used::UsedExport::open(base, self.identity, wanted, context)?),
            View::Compact | View::Since if wanted == Wanted::Bound => {
                Arc::new(image::ImageExport::dense(base, &self.options, self.identity)?)
            }
            View::Compact | View::Since => {
                Arc::new(image::ImageExport::compact(base, &self.options, self.identity, context)?)
            }
        })
    }
}

/// What a view is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Its contents.
    Contents,
    /// Its exact attributes. No device is claimed for them.
    Attributes,
    /// A length that it does not exceed, without much work. The kernel asks for the exact attributes before it uses them, and a
    /// read beyond the end is short.
    Bound,
}
