//! What a mount shows: the exact files, and the views of them that the user asked for.

use std::ffi::{OsStr, OsString};
use std::iter;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::FileKind;
use super::shown::{CatalogEntry, FileSource, KeptOpen, Shown};
use super::usage::Usage;
use super::view::{OlderSource, View, ViewSource, Wanted};
use crate::error::{Error, Result};
use crate::source::Context;
use crate::source::nbd::{SideExport, Uri};
use crate::source::thin::ThinId;
use crate::spec::{LONGEST_NAME, Older, SourceOptions, Spec, ViewOptions};

/// The files and directories of a mount.
pub struct Catalog {
    shown: Shown,
    views: Arc<ViewOptions>,
}

impl Catalog {
    /// Looks up what a SPEC names, and opens it once to find out whether it can be read.
    ///
    /// # Errors
    /// When it does not exist, cannot be opened for reading, or is none of the things that can be shown. When a view of a single
    /// file cannot be made.
    pub fn new(spec: &Spec, options: &SourceOptions) -> Result<Self> {
        let catalog = Self { shown: Shown::new(spec, options)?, views: Arc::new(options.views.clone()) };
        if let Some(older) = &options.views.since {
            catalog.older(older)?;
        }
        if let Shown::File { source, .. } = &catalog.shown {
            for view in [View::Since, View::Used] {
                if let Some(view) = catalog.view(view, source)? {
                    view.open(Wanted::Contents, &Context::default())?;
                }
            }
        }
        Ok(catalog)
    }

    /// The path of the only file inside the mount, for a mount on a regular file.
    ///
    /// # Errors
    /// When there is more than one file.
    pub fn only_file(&self) -> Result<PathBuf> {
        let only = self.shown.only_file().ok_or_else(|| Error::failed("a directory cannot be mounted on a file"))?;
        let views: Vec<_> = self.views.names_of(only.as_os_str()).collect();
        match views.as_slice() {
            [] => Ok(only),
            [(_, name)] => Ok(PathBuf::from(name)),
            _ => Err(Error::usage("several views cannot be mounted on one file: choose one, or mount on a directory")),
        }
    }

    /// Checks that the only file and its views can have their names in a directory.
    ///
    /// # Errors
    /// A usage error for a name that is too long.
    pub fn check_names(&self) -> Result<()> {
        let Some(only) = self.shown.only_file() else { return Ok(()) };
        let views = self.views.names_of(only.as_os_str()).map(|(_, name)| name);
        let is_too_long = |name: &OsString| name.len() > LONGEST_NAME;
        let Some(name) = iter::once(only.clone().into()).chain(views).find(is_too_long) else { return Ok(()) };
        let what = format!("the name would have {} bytes, and that of a file has at most {LONGEST_NAME}", name.len());
        Err(Error::usage(what).on(name).hint("give the file a shorter name with name="))
    }

    /// The export `uri`, with the NBD device of the kernel that is connected to it: the device that the only file
    /// shows, or one below it in its stack.
    ///
    /// # Errors
    /// When there is more than one file, or it cannot be opened; and as [`SideExport::new`].
    pub fn side_export(&self, uri: Uri) -> Result<SideExport> {
        self.shown.side_export(uri)
    }

    /// The path of the entry `name` of a directory. `None` for a name that no entry can have, such as `..`.
    pub fn child(&self, directory: &Path, name: &OsStr) -> Option<PathBuf> {
        self.shown.child(directory, name)
    }

    /// Looks up a path inside the mount. A view is found only where no exact file has its name.
    ///
    /// # Errors
    /// ENOENT when nothing is shown there.
    pub fn find(&self, path: &Path) -> Result<CatalogEntry> {
        let not_found = match self.shown.find(path) {
            Err(error) if error.errno() == libc::ENOENT => error,
            found => return found,
        };
        let name = path.file_name().unwrap_or_default();
        for (view, base) in self.views.named(name) {
            if let Ok(CatalogEntry::File(source, node)) = self.shown.find(&path.with_file_name(base))
                && self.is_offered(view, &source)
                && let Some(view) = self.view(view, &source)?
            {
                let node = view.node(node.map_or_else(|| source.node(), Ok)?);
                return Ok(CatalogEntry::View(view, node));
            }
        }
        Err(not_found)
    }

    /// Opens what stays open for as long as a directory is open, so that a listing with the attributes of all volumes reads
    /// each part of the metadata at most once.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn keep_open(&self) -> Result<KeptOpen> {
        self.shown.keep_open()
    }

    /// The entries of a directory of the mount as they are now, sorted by name or by volume id, each file followed by its
    /// views.
    ///
    /// # Errors
    /// As readdir(3).
    pub fn entries(&self, directory: &Path) -> Result<Vec<(OsString, FileKind)>> {
        let exact = self.shown.entries(directory)?;
        if self.views.count() == 0 {
            return Ok(exact);
        }
        let mut entries = Vec::with_capacity(exact.len() * 2);
        for (name, kind) in &exact {
            entries.push((name.clone(), *kind));
            if *kind != FileKind::File {
                continue;
            }
            let Ok(CatalogEntry::File(source, _)) = self.shown.find(&directory.join(name)) else { continue };
            for (view, name) in self.views.names_of(name) {
                let is_hidden = name.len() > LONGEST_NAME || exact.iter().any(|(other, _)| *other == name);
                if !is_hidden && self.is_offered(view, &source) {
                    entries.push((name, FileKind::File));
                }
            }
        }
        Ok(entries)
    }

    /// The sizes of everything that is shown.
    pub fn usage(&self) -> Usage {
        Usage::of(&self.shown)
    }

    /// A view of a file; `None` if no such view is wanted.
    ///
    /// # Errors
    /// When the older snapshot cannot be found.
    fn view(&self, view: View, source: &FileSource) -> Result<Option<ViewSource>> {
        let older = match (view, &self.views.since) {
            (View::Since, Some(older)) => Some(self.older(older)?),
            (View::Compact, _) if self.views.compact => None,
            (View::Used, _) if self.views.used => None,
            _ => return Ok(None),
        };
        Ok(Some(ViewSource::new(view, source.clone(), older, self.views.clone())))
    }

    /// The older snapshot that an option names.
    ///
    /// # Errors
    /// A usage error where it cannot name one.
    fn older(&self, older: &Older) -> Result<OlderSource> {
        let wrong = |what: &str| Error::usage(format!("since={}: {what}", older.shown().display()));
        match (&self.shown, older) {
            (Shown::Directory(root), Older::Name(name)) => Ok(OlderSource::Path(root.path.join(name))),
            (Shown::File { source: FileSource::Path(path), .. }, Older::Name(name)) => {
                Ok(OlderSource::Path(path.with_file_name(name)))
            }
            (Shown::Pool(pools), Older::Name(name)) => {
                let id = name.to_str().and_then(ThinId::parse);
                let id = id.ok_or_else(|| wrong("expected the id of a volume"))?;
                Ok(OlderSource::Volume(Arc::new(pools.open()?.volume(id)?)))
            }
            (Shown::File { source: FileSource::Export(_), .. }, Older::Name(name)) => {
                let bitmap = name.to_str().ok_or_else(|| wrong("expected the name of a dirty bitmap"))?;
                Ok(OlderSource::Bitmap(bitmap.to_owned()))
            }
            (Shown::Directory(_) | Shown::File { source: FileSource::Path(_), .. }, Older::Path(path)) => {
                Ok(OlderSource::Path(path.clone()))
            }
            (Shown::Pool(_), Older::Path(_)) => Err(wrong("expected the id of a volume")),
            (Shown::File { .. }, Older::Path(_)) => Err(wrong("expected the name of a dirty bitmap")),
            (Shown::File { .. }, Older::Name(_)) => Err(Error::from_errno(libc::ENOENT)),
        }
    }

    /// Whether a view of that file is shown. Of a single file each view is: the mount found out that it can be made.
    fn is_offered(&self, view: View, source: &FileSource) -> bool {
        match (&self.shown, view) {
            (Shown::File { .. }, _) | (_, View::Compact) => true,
            (_, View::Since) => {
                let older = self.views.since.as_ref().and_then(|older| self.older(older).ok());
                older.is_some_and(|older| older.can_be_older_than(source))
            }
            (_, View::Used) => source.has_known_file_system(),
        }
    }
}
