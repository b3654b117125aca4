//! The kernel's list of mounts, `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::device::DeviceId;

/// The file system type of the mounts of this program.
pub const FS_TYPE: &str = "fuse.blkholefs";

/// One line of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// The mount's id.
    pub id: u64,
    /// The id of the parent mount.
    pub parent: u64,
    /// The device number of the file system, `st_dev`. The major number of FUSE is zero.
    pub device: DeviceId,
    /// The mountpoint.
    pub point: PathBuf,
    /// Its type, such as `fuse.blkholefs`.
    pub fs_type: OsString,
    /// The mount source. Every user can choose any text for it, so it proves nothing about the mount of another user.
    pub source: OsString,
    /// For FUSE, the user who mounted it, from the option `user_id` that the kernel shows.
    pub owner: Option<u32>,
}

/// Parses the whole list, without the lines that do not have the kernel's format.
pub fn parse(list: &[u8]) -> Vec<MountEntry> {
    list.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// The mount that a path lookup of `point` finds: of all mounts on this mountpoint, the one that no other covers.
pub fn top<'a>(list: &'a [MountEntry], point: &Path) -> Option<&'a MountEntry> {
    let here = |entry: &&MountEntry| entry.point == point;
    let covered =
        |below: &MountEntry| list.iter().filter(here).any(|entry| entry.parent == below.id && entry.id != below.id);
    list.iter().rev().filter(here).find(|entry| !covered(entry))
}

/// `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG...] - TYPE SOURCE SUPER-OPTIONS`
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device = number(fields.next()?)?;
    let _root = fields.next()?;
    let point = unescape(fields.next()?).into();
    let _options = fields.next()?;
    fields.by_ref().find(|field| *field == b"-")?;
    let (fs_type, source) = (unescape(fields.next()?), unescape(fields.next()?));
    let mut super_options = fields.next().unwrap_or_default().split(|byte| *byte == b',');
    let owner = super_options.find_map(|option| number(option.strip_prefix(b"user_id=")?));
    Some(MountEntry { id, parent, device, point, fs_type, source, owner })
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Decodes the kernel's `mangle()` (`fs/proc_namespace.c`), which writes blanks, tabs, line breaks and backslashes as a
/// backslash and three octal digits.
pub fn unescape(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = match (byte, after) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        plain.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(plain)
}

impl MountEntry {
    /// Whether this is a mount of this program.
    pub fn is_blkholefs(&self) -> bool {
        self.fs_type == OsStr::from_bytes(FS_TYPE.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &[u8] = b"\
22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
40 22 0:45 / /mnt/a\\040b ro,nosuid,nodev,noexec - fuse.blkholefs /dev/x\\134y\\054z ro,user_id=0\n\
41 22 0:46 / /mnt/s ro shared:7 master:2 propagate_from:3 - tmpfs tmpfs rw\n\
42 41 0:47 / /mnt/s ro - fuse.blkholefs nbd://h/e ro\n\
43 22 0:48 / /mnt/t ro - tmpfs  rw\n\
garbage\n\
44 22 048 / /mnt/u ro - tmpfs none rw\n\
45 22 0:49 / /mnt/v ro shared:1\n";

    #[test]
    fn lines_of_the_kernel() {
        let list = parse(LIST);
        assert_eq!(list.iter().map(|entry| entry.id).collect::<Vec<_>>(), [22, 40, 41, 42, 43]);
        assert_eq!(list[1].point, Path::new("/mnt/a b"));
        assert_eq!(list[1].source, "/dev/x\\y,z");
        assert_eq!(list[1].device.to_string(), "0:45");
        assert_eq!((list[1].owner, list[3].owner), (Some(0), None));
        assert_eq!(list[2].fs_type, "tmpfs");
        assert_eq!(list[4].source, "", "an empty source is an empty field");
        assert!(list[1].is_blkholefs() && !list[0].is_blkholefs());
    }

    #[test]
    fn fields_of_single_lines() {
        let fields = |line: &[u8]| {
            let entry = parse(line).pop()?;
            Some((entry.device.to_string(), entry.point, entry.fs_type, entry.source))
        };
        let line = b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(fields(line), Some(("98:0".into(), "/mnt 2".into(), "ext3".into(), "/dev/root".into())));
        let line = b"36 35 0:45 /root / rw - btrfs /dev/a\\134b rw";
        assert_eq!(fields(line), Some(("0:45".into(), "/".into(), "btrfs".into(), "/dev/a\\b".into())));
        for line in
            [&b""[..], b"36", b"36 35 x /a /b - ext3 /dev/root rw", b"36 35 98:0 /a /b rw - ext3", b"1 1 1:1 / / rw"]
        {
            assert_eq!(fields(line), None);
        }
        assert_eq!(unescape(b"\\"), "\\");
        assert_eq!(unescape(b"\\999a"), "\\999a");
    }

    #[test]
    fn a_lookup_finds_the_top_of_stacked_mounts() {
        let list = parse(LIST);
        assert_eq!(top(&list, Path::new("/mnt/s")).unwrap().id, 42);
        assert_eq!(top(&list, Path::new("/")).unwrap().id, 22);
        assert_eq!(top(&list, Path::new("/mnt")), None);
        let mut turned = list;
        turned.reverse();
        assert_eq!(top(&turned, Path::new("/mnt/s")).unwrap().id, 42, "whatever order the kernel lists them in");
    }

    #[test]
    fn our_own_list_parses_completely() {
        let text = std::fs::read("/proc/self/mountinfo").unwrap();
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
        assert_eq!(parse(&text).len(), lines);
    }

    #[test]
    fn any_bytes_give_a_list() {
        let mut state = 1_u64;
        for _ in 0..20_000 {
            let mut bytes = LIST.to_vec();
            for _ in 0..8 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = usize::try_from(state >> 33).unwrap() % bytes.len();
                bytes[at] = b" \n\\-:0739\0\xff"[usize::try_from(state >> 20).unwrap() % 11];
            }
            let list = parse(&bytes);
            assert!(list.len() <= bytes.len());
            for entry in &list {
                assert!(top(&list, &entry.point).is_none_or(|top| top.point == entry.point));
            }
        }
    }
}
