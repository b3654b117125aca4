//! The file of `map --svg`.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::report::SVG_BEGIN;

/// Where a picture is written to.
pub struct SvgFile {
    path: PathBuf,
    /// Those of the picture that is replaced.
    permissions: Option<Permissions>,
}

impl SvgFile {
    /// Checks the file before anything is read: only a picture, or an empty file, is replaced. Whatever else is there may be an
    /// image that a device stands on.
    ///
    /// # Errors
    /// A usage error if there is something else, or the device itself.
    pub fn new(typed: &OsStr, device: &OsStr) -> Result<Self> {
        let refused = |what: &str| Err(Error::usage(format!("--svg: {what}")).on(typed));
        let metadata = match fs::metadata(typed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // The rename at the end would replace the link.
                return match fs::symlink_metadata(typed).is_ok() {
                    true => refused("it is a symbolic link that leads to nothing"),
                    false => Ok(Self { path: typed.into(), permissions: None }),
                };
            }
            other => other.map_err(|error| Error::failed("cannot find out what it is").on(typed).because(error))?,
        };
        if !metadata.is_file() {
            return refused("it exists, and is no regular file");
        }
        let identity = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
        if fs::metadata(device).is_ok_and(|device| identity(&device) == identity(&metadata)) {
            return refused("it is the device itself");
        }
        if metadata.len() > 0 && !is_picture(Path::new(typed))? {
            return refused("it exists, and is no picture: choose another name, or remove it");
        }
        // The picture that a symbolic link leads to is replaced, and not the link.
        let path = fs::canonicalize(typed).map_err(|error| Error::failed("cannot find it").on(typed).because(error))?;
        Ok(Self { path, permissions: Some(metadata.permissions()) })
    }

    /// Writes the picture into a file beside it, which then takes its name. An error leaves no part of a picture.
    ///
    /// # Errors
    /// As write(2) and rename(2).
    pub fn write(&self, picture: &[u8]) -> Result<()> {
        let beside = self.path.with_file_name(format!(".blkholefs-{}.svg", std::process::id()));
        let failed = |error| Error::failed("cannot write the picture").on(&self.path).because(error);
        let mut file = OpenOptions::new().write(true).create_new(true).open(&beside).map_err(failed)?;
        let result = self.fill(&mut file, picture).and_then(|()| fs::rename(&beside, &self.path));
        result.map_err(|error| {
            // Only the first error is of interest.
            let _ = fs::remove_file(&beside);
            failed(error)
        })
    }

    fn fill(&self, file: &mut File, picture: &[u8]) -> io::Result<()> {
        file.write_all(picture)?;
        self.permissions.iter().try_for_each(|permissions| file.set_permissions(permissions.clone()))?;
        file.sync_all()
    }
}

/// Whether a file begins like a picture of this program.
fn is_picture(path: &Path) -> Result<bool> {
    let mut begin = Vec::new();
    File::open(path)
        .and_then(|file| file.take(SVG_BEGIN.len() as u64).read_to_end(&mut begin))
        .map_err(|error| Error::failed("cannot read what is there").on(path).because(error))?;
    Ok(begin == SVG_BEGIN.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    const PICTURE: &str =
        concat!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n", "<!-- a picture by blkholefs map -->\n<svg/>\n",);

    #[test]
    fn only_a_picture_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let open = |name: &str| SvgFile::new(at(name).as_os_str(), at("device").as_os_str());
        let refused = |name: &str| open(name).err().expect("a refusal").to_string();
        open("new").unwrap().write(PICTURE.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(at("new")).unwrap(), PICTURE);
        symlink("new", at("link")).unwrap();
        fs::set_permissions(at("new"), Permissions::from_mode(0o640)).unwrap();
        let longer = format!("{PICTURE}<!-- -->\n");
        open("link").unwrap().write(longer.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(at("new")).unwrap(), longer);
        assert_eq!(fs::metadata(at("new")).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());

        fs::write(at("empty"), "").unwrap();
        assert!(open("empty").is_ok());
        fs::write(at("image"), "bytes of an image").unwrap();
        assert!(refused("image").contains("no picture"));
        fs::write(at("document"), "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"x\"/>\n").unwrap();
        assert!(refused("document").contains("no picture"), "another program wrote it");
        symlink("nothing", at("dangling")).unwrap();
        assert!(refused("dangling").contains("leads to nothing"));
        fs::hard_link(at("new"), at("device")).unwrap();
        assert!(refused("new").contains("the device itself"));
        assert!(refused(".").contains("no regular file"));
        assert_eq!(fs::read(at("image")).unwrap(), b"bytes of an image");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 7, "nothing is left beside them");
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let file = SvgFile::new(OsStr::new("/dev/full-is-no-directory/x.svg"), OsStr::new("/dev/null")).unwrap();
        assert_eq!(file.write(b"").unwrap_err().exit_code(), 32);
        let null = SvgFile::new(OsStr::new("/dev/null"), OsStr::new("x")).err().expect("a refusal");
        assert_eq!(null.exit_code(), 1);
    }
}
