//! Tags: what is known of a device, as a name for it, such as `UUID=...` and `LABEL=...` in fstab(5).

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::sys::device;

/// The kinds of tags of mount(8): each keyword, and the directory in which udev makes a link for each value.
const KINDS: [(&str, &str); 5] = [
    ("UUID=", "by-uuid"),
    ("LABEL=", "by-label"),
    ("PARTUUID=", "by-partuuid"),
    ("PARTLABEL=", "by-partlabel"),
    ("ID=", "by-id"),
];

/// The directory of the links.
const LINKS: &str = "/dev/disk";

/// A tag. It names the device to which a link of udev leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag {
    typed: OsString,
    link: PathBuf,
}

impl Tag {
    /// Parses a tag: a keyword, and a value that may be in quotes. `None` for text that does not begin with a keyword.
    ///
    /// # Errors
    /// A usage error for a value that is empty, has a zero byte, or begins with a quote that does not end it.
    pub fn parse(typed: &OsStr) -> Result<Option<Self>> {
        let found = KINDS.iter().find_map(|(keyword, directory)| {
            typed.as_bytes().strip_prefix(keyword.as_bytes()).map(|value| (*directory, value))
        });
        let Some((directory, value)) = found else { return Ok(None) };
        let wrong = |what: &str| Err(Error::usage(what).on(typed));
        let value = match value {
            [quote @ (b'"' | b'\''), rest @ ..] => match rest {
                [value @ .., last] if last == quote => value,
                _ => return wrong("the quote is not closed"),
            },
            plain => plain,
        };
        if value.is_empty() || value.contains(&0) {
            return wrong("the value is missing");
        }
        let link = Path::new(LINKS).join(directory).join(link_name(value));
        Ok(Some(Self { typed: typed.to_owned(), link }))
    }

    /// The path of udev's link, in a directory of `/dev/disk`.
    pub fn link(&self) -> &Path {
        &self.link
    }

    /// The device that has the tag: the path that mount(8) would find.
    ///
    /// # Errors
    /// ENOENT when no device has it, as far as udev knows. When its link does not lead to a block device.
    pub fn device(&self) -> Result<PathBuf> {
        let failed = |what: &str| Error::failed(what).on(&self.typed);
        let found = fs::canonicalize(&self.link).and_then(|device| Ok((fs::metadata(&device)?.file_type(), device)));
        match found {
            Ok((kind, device)) if kind.is_block_device() => Ok(device::mapper_path(&device).unwrap_or(device)),
            // Also `LABEL=..`, which is the name of a directory and of no link.
            Ok((_, other)) => {
                let hint = format!("{} leads to {}", self.link.display(), other.display());
                Err(failed("this tag does not lead to a block device").hint(hint))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(self.not_found()),
            Err(error) => {
                let cause = Error::failed("cannot follow").on(&self.link).because(error);
                Err(failed("cannot be looked up").because(cause))
            }
        }
    }

    fn not_found(&self) -> Error {
        if !Path::new(LINKS).exists() {
            let error =
                Error::failed(format!("there is no {LINKS}, in which udev makes links for tags")).on(&self.typed);
            return error
                .with_errno(libc::ENOENT)
                .hint("name the device by its path; blkid(8) shows the tags of devices");
        }
        let error = Error::failed("no device has this tag").on(&self.typed).with_errno(libc::ENOENT);
        if let Ok(device) = fs::read_link(&self.link) {
            return error.hint(format!("{} leads to {}, which is gone", self.link.display(), device.display()));
        }
        match self.differs_in_case() {
            Some(other) => error.hint(format!("there is {}: tags are compared as text", other.display())),
            None => error.hint(format!("there is no {}; lsblk -o +UUID,LABEL shows the tags", self.link.display())),
        }
    }

    /// A link with the same name but for the case of letters.
    fn differs_in_case(&self) -> Option<PathBuf> {
        let (directory, name) = (self.link.parent()?, self.link.file_name()?);
        let mut links = fs::read_dir(directory).ok()?.flatten();
        links.find(|link| link.file_name().eq_ignore_ascii_case(name)).map(|link| link.path())
    }
}

/// The name of a link for a value (`encode_devnode_name` of systemd, `blkid_encode_string` of libblkid): letters, digits, some signs and
/// characters of more than one byte stay, every other byte is `\x` and two digits. So there is no `/` in it.
fn link_name(value: &[u8]) -> OsString {
    let mut name = Vec::with_capacity(value.len());
    let escape = |name: &mut Vec<u8>, byte: u8| name.extend(format!("\\x{byte:02x}").into_bytes());
    for chunk in value.utf8_chunks() {
        for character in chunk.valid().chars() {
            match u8::try_from(character).ok().filter(u8::is_ascii) {
                Some(byte) if !byte.is_ascii_alphanumeric() && !b"#+-.:=@_".contains(&byte) => escape(&mut name, byte),
                _ => name.extend(character.encode_utf8(&mut [0; 4]).bytes()),
            }
        }
        chunk.invalid().iter().for_each(|byte| escape(&mut name, *byte));
    }
    OsString::from_vec(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(typed: &[u8]) -> Option<PathBuf> {
        Tag::parse(OsStr::from_bytes(typed)).unwrap().map(|tag| tag.link)
    }

    #[test]
    fn a_tag_is_a_link_of_udev() {
        for (typed, expected) in [
            ("UUID=3255683f-53a2", "by-uuid/3255683f-53a2"),
            ("UUID=ABCD-1234", "by-uuid/ABCD-1234"),
            ("LABEL=\"my disk\"", "by-label/my\\x20disk"),
            ("LABEL='a\"b'", "by-label/a\\x22b"),
            ("LABEL=it's", "by-label/it\\x27s"),
            ("LABEL=a/../b\\c%", "by-label/a\\x2f..\\x2fb\\x5cc\\x25"),
            ("LABEL=größe#+-.:=@_", "by-label/größe#+-.:=@_"),
            ("PARTUUID=ec6bfb77-01", "by-partuuid/ec6bfb77-01"),
            ("PARTLABEL=EFI system", "by-partlabel/EFI\\x20system"),
            ("ID=dm-name-vg-thin", "by-id/dm-name-vg-thin"),
        ] {
            assert_eq!(link(typed.as_bytes()), Some(Path::new(LINKS).join(expected)), "{typed}");
        }
        assert_eq!(link(b"LABEL=\xff\n"), Some("/dev/disk/by-label/\\xff\\x0a".into()));
    }

    #[test]
    fn other_text_is_no_tag() {
        for typed in ["", "./LABEL=x", "/dev/sda", "label=x", "UUID", "TYPE=ext4", "nbd://h/UUID=x", "MYLABEL=x"] {
            assert_eq!(link(typed.as_bytes()), None, "{typed}");
        }
    }

    #[test]
    fn a_tag_without_a_value_is_a_usage_error() {
        for typed in ["UUID=", "LABEL=\"\"", "LABEL=\"", "LABEL=\"x", "LABEL='x\"", "LABEL=\"x\"y", "ID=a\0b"] {
            assert_eq!(Tag::parse(OsStr::new(typed)).unwrap_err().exit_code(), 1, "{typed}");
        }
    }

    #[test]
    fn a_tag_that_no_device_has_is_not_found() {
        let tag = Tag::parse(OsStr::new("UUID=no-such-device")).unwrap().unwrap();
        let error = tag.device().unwrap_err();
        assert_eq!((error.errno(), error.exit_code()), (libc::ENOENT, 32));
        assert!(error.to_string().starts_with("UUID=no-such-device: "), "{error}");
        assert!(error.hint_text().is_some());
    }
}
