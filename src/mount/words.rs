//! Every option that the program knows, as data.

use nix::mount::MsFlags;

/// `MS_NOSYMFOLLOW` of `include/uapi/linux/mount.h` (Linux 5.10), which the nix crate lacks.
pub const MS_NOSYMFOLLOW: MsFlags = MsFlags::from_bits_retain(256);

const NONE: MsFlags = MsFlags::empty();

/// Options that change the flags of mount(2): name, flags to set, flags to clear (mount(8), "FILESYSTEM-INDEPENDENT MOUNT
/// OPTIONS"). `mand` sets nothing, because FUSE refuses it and Linux 5.15 dropped it.
pub const FLAGS: &[(&str, MsFlags, MsFlags)] = &[
    ("ro", MsFlags::MS_RDONLY, NONE),
    ("rw", NONE, MsFlags::MS_RDONLY),
    ("exec", NONE, MsFlags::MS_NOEXEC),
    ("noexec", MsFlags::MS_NOEXEC, NONE),
    ("suid", NONE, MsFlags::MS_NOSUID),
    ("nosuid", MsFlags::MS_NOSUID, NONE),
    ("dev", NONE, MsFlags::MS_NODEV),
    ("nodev", MsFlags::MS_NODEV, NONE),
    ("atime", NONE, MsFlags::MS_NOATIME),
    ("noatime", MsFlags::MS_NOATIME, NONE),
    ("diratime", NONE, MsFlags::MS_NODIRATIME),
    ("nodiratime", MsFlags::MS_NODIRATIME, NONE),
    ("relatime", MsFlags::MS_RELATIME, NONE),
    ("norelatime", NONE, MsFlags::MS_RELATIME),
    ("strictatime", MsFlags::MS_STRICTATIME, NONE),
    ("nostrictatime", NONE, MsFlags::MS_STRICTATIME),
    ("lazytime", MsFlags::MS_LAZYTIME, NONE),
    ("nolazytime", NONE, MsFlags::MS_LAZYTIME),
    ("sync", MsFlags::MS_SYNCHRONOUS, NONE),
    ("async", NONE, MsFlags::MS_SYNCHRONOUS),
    ("dirsync", MsFlags::MS_DIRSYNC, NONE),
    ("silent", MsFlags::MS_SILENT, NONE),
    ("loud", NONE, MsFlags::MS_SILENT),
    ("mand", NONE, NONE),
    ("nomand", NONE, NONE),
    ("iversion", MsFlags::MS_I_VERSION, NONE),
    ("noiversion", NONE, MsFlags::MS_I_VERSION),
    ("symfollow", NONE, MS_NOSYMFOLLOW),
    ("nosymfollow", MS_NOSYMFOLLOW, NONE),
];

/// Options that this program accepts and ignores: they are for mount(8), systemd or fusermount3, or request what this
/// program always does. The empty one is left at the end of a list from which mount(8) removed an option of its own.
pub const IGNORED: &[&str] = &[
    "",
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "nousers",
    "owner",
    "noowner",
    "group",
    "nogroup",
    "_netdev",
    "nonempty",
    "default_permissions",
];

/// Options that this program accepts with a value and ignores, such as `comment=backup`.
pub const IGNORED_WITH_VALUE: &[&str] = &["user", "comment", "helper", "uhelper", "fsname", "subtype"];

/// Options that this program knows and refuses, with the reason.
pub const REFUSED: &[(&str, &str)] = &[
    ("drop_privileges", "the daemon needs its privileges, to unmount and to ask device-mapper"),
    ("remount", "a mount cannot be changed: unmount it and mount it again"),
    ("auto_unmount", "the daemon unmounts on SIGTERM; auto_unmount could unmount another mount at the same place"),
];

/// Options of a mount that have a value.
pub const MOUNT_WITH_VALUE: &[&str] =
    &["uid", "gid", "mode", "umask", "max_read", "map_cache", "read_ahead", "queue_depth", "name"];

/// Options of what is shown, with a value.
pub const SOURCE: &[&str] = &["thin_metadata", "nbd", "since", "cluster_size", "backing"];

/// Options of what is shown, without a value.
pub const SOURCE_PLAIN: &[&str] = &["compact", "used"];

/// Options of a mount that have no value.
pub const MOUNT_PLAIN: &[&str] = &["allow_other", "allow-other", "direct_io", "nofail", "static", "writable"];

/// Further spellings of options, which are accepted and not suggested.
const SPELLINGS: [&str; 1] = ["allow-other"];

/// Whether an option is a comment, which only other programs read (`X-` and `x-`, mount(8)).
pub fn is_comment(name: &str) -> bool {
    name.starts_with("x-") || name.starts_with("X-")
}

/// Whether an option has a value.
pub fn has_value(name: &str) -> bool {
    [MOUNT_WITH_VALUE, SOURCE, IGNORED_WITH_VALUE].iter().any(|list| list.contains(&name))
}

/// Whether this program knows an option, whatever it does with it.
pub fn is_known(name: &str) -> bool {
    let lists = [IGNORED, IGNORED_WITH_VALUE, MOUNT_WITH_VALUE, SOURCE, SOURCE_PLAIN, MOUNT_PLAIN];
    let mut pairs = FLAGS.iter().map(|flag| flag.0).chain(REFUSED.iter().map(|refused| refused.0));
    is_comment(name) || lists.iter().any(|list| list.contains(&name)) || pairs.any(|known| known == name)
}

/// The known options with a similar spelling, nearest first, three at most.
pub fn near(word: &str) -> Vec<&'static str> {
    let flags = FLAGS.iter().map(|flag| flag.0);
    let known =
        flags.chain([IGNORED, MOUNT_WITH_VALUE, SOURCE, SOURCE_PLAIN, MOUNT_PLAIN].into_iter().flatten().copied());
    near_in(word, known.filter(|name| !name.is_empty() && !SPELLINGS.contains(name)))
}

/// The names with a similar spelling, nearest first, three at most.
pub fn near_in(word: &str, names: impl Iterator<Item = &'static str>) -> Vec<&'static str> {
    const LONGEST: usize = 24;
    if word.len() > LONGEST {
        return Vec::new();
    }
    let mut found: Vec<_> = names
        .map(|name| (distance(word.as_bytes(), name.as_bytes()), name))
        .filter(|(distance, name)| *distance <= 2 && *distance * 2 < name.len())
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, name)| name).take(3).collect()
}

/// The number of bytes to insert, delete or replace to turn one word into the other (the Levenshtein distance).
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, expected) in
            [("", "", 0), ("", "ab", 2), ("abc", "abc", 0), ("abc", "abd", 1), ("kitten", "sitting", 3)]
        {
            assert_eq!(distance(a.as_bytes(), b.as_bytes()), expected, "{a} {b}");
            assert_eq!(distance(b.as_bytes(), a.as_bytes()), expected, "{b} {a}");
        }
    }

    #[test]
    fn the_man_page_has_every_option() {
        let page = include_str!("../../mount-helpers/man/mount.blkholefs.8");
        let words = [MOUNT_WITH_VALUE, SOURCE, SOURCE_PLAIN, MOUNT_PLAIN].concat();
        for word in words.into_iter().filter(|word| !SPELLINGS.contains(word)) {
            let lists = |line: &str| line.split([' ', '=', '\\']).any(|part| part == word);
            assert!(page.lines().any(|line| line.starts_with(".B") && lists(line)), "{word}");
        }
    }

    #[test]
    fn near_words() {
        for word in ["alow_other", "allow-othr", "allow-other"] {
            assert_eq!(near(word), ["allow_other"], "{word}: one spelling");
        }
        assert_eq!(near("map_cahce"), ["map_cache"]);
        assert_eq!(near("zz"), [""; 0]);
        assert_eq!(near(&"x".repeat(100_000)), [""; 0]);
    }
}
