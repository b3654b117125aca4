//! The words of mount(8): arguments, `-o` lists, tags, and the kernel's list of mounts.
//!
//! Invariant: no input makes a parser panic. Numbers of options are within their limits. A list has at most as
//! many mounts as lines, and the top mount of a directory is mounted on this directory. The link of a tag is in a directory of
//! `/dev/disk`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use blkholefs::testing::mount::options::{self, FirstRw, UnknownOptions};
use blkholefs::testing::mount::{argv, mountinfo};
use blkholefs::testing::spec::Tag;

pub fn run(input: &[u8]) {
    let list = OsStr::from_bytes(input);
    for unknown in [UnknownOptions::Refuse, UnknownOptions::Warn] {
        if let Ok(options) = options::parse(list, unknown, FirstRw::IsWanted) {
            let options = options.mount;
            assert!([options.uid, options.gid].into_iter().flatten().all(|id| id < u32::MAX));
            assert!([options.mode, options.umask].into_iter().flatten().all(|mode| mode <= 0o777));
            assert!(options.max_read.is_none_or(|size| u32::try_from(size.get()).is_ok()));
        }
    }
    let words: Vec<OsString> = input.split(|byte| *byte == 0).map(|word| OsStr::from_bytes(word).to_owned()).collect();
    let _ = (argv::mount_helper(&words), argv::mount_command(&words), argv::umount(&words), argv::mount_fuse(&words));
    if let Ok(Some(tag)) = Tag::parse(list) {
        let directories = tag.link().parent().and_then(Path::parent);
        assert_eq!(directories, Some(Path::new("/dev/disk")), "{tag:?}");
    }
    let mounts = mountinfo::parse(input);
    assert!(mounts.len() <= input.split(|byte| *byte == b'\n').count());
    for point in mounts.iter().take(8).map(|mount| &*mount.point).chain([Path::new("/mnt")]) {
        assert!(mountinfo::top(&mounts, point).is_none_or(|top| top.point == point));
    }
}
