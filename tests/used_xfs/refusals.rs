//! File systems whose free space is not known: each is refused, with its reason.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::SIZE;
use crate::common::image::{Image, open_for_writing};
use crate::common::random::Random;
use crate::common::{MIB, needs, run};
use crate::images::{Mounted, copy, field, fill, free_list, log_head, make, needs_xfs, used};

pub const NOT_EMPTY: &str = "its log is not empty: mount it once (mount -o nouuid for a snapshot) and unmount it";

fn reason(image: &Image) -> String {
    used(image.path()).err().expect("a reason")
}

#[test]
fn a_mounted_file_system() {
    needs_xfs!();
    for options in [&[][..], &["-l", "su=32k"], &["-b", "size=1024"]] {
        let image = make(SIZE, options);
        let mounted = Mounted::new(&image, "nouuid");
        fill(mounted.path(), 4096, 500, &mut Random::new(1));
        run("sync", ["-f".as_ref(), mounted.path().as_os_str()]);
        let dirty = copy(&image);
        run("xfs_freeze", ["-f".as_ref(), mounted.path().as_os_str()]);
        let frozen = copy(&image);
        run("xfs_freeze", ["-u".as_ref(), mounted.path().as_os_str()]);
        drop(mounted);
        used(image.path()).unwrap();
        for copy in [&dirty, &frozen] {
            assert_eq!(log_head(copy.path()), None);
            assert_eq!(reason(copy), NOT_EMPTY);
        }
        // What the reason advises.
        drop(Mounted::new(&frozen, "nouuid"));
        used(frozen.path()).unwrap();
    }
}

#[test]
fn a_log_on_another_device() {
    needs_xfs!();
    let log = Image::new(64 * MIB);
    let image = make(SIZE, &["-l", &format!("logdev={},size=64m", log.path().display())]);
    assert_eq!(reason(&image), "its log is on another device, whose state is not known");
}

/// A file system, and changes to its bytes that are taken back.
struct Changed {
    image: Image,
    block: u64,
    group_length: u64,
}

impl Changed {
    /// A fragmented file system, in which each tree has more than one block.
    fn new() -> Self {
        let image = make(SIZE, &["-b", "size=1024", "-d", "agcount=2"]);
        fill(Mounted::new(&image, "nouuid").path(), 1024, 3000, &mut Random::new(3));
        used(image.path()).unwrap();
        let group_length = field(image.path(), "sb 0", "agblocks");
        Self { image, block: 1024, group_length }
    }

    /// The first byte of a block of a group.
    fn place(&self, group: u64, block: u64) -> u64 {
        (group * self.group_length + block) * self.block
    }

    /// The reason after a change of the structure of `len` bytes at `offset`, whose checksum at `checksum` is made right.
    fn reason(&self, offset: u64, len: usize, checksum: Option<usize>, change: impl FnOnce(&mut [u8])) -> String {
        let file = open_for_writing(self.image.path());
        let mut original = vec![0; len];
        File::open(self.image.path()).unwrap().read_exact_at(&mut original, offset).unwrap();
        let mut changed = original.clone();
        change(&mut changed);
        assert_ne!(changed, original);
        if let Some(at) = checksum {
            changed[at..at + 4].fill(0);
            let crc = crc32c::crc32c(&changed);
            changed[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        }
        file.write_all_at(&changed, offset).unwrap();
        let reason = reason(&self.image);
        file.write_all_at(&original, offset).unwrap();
        used(self.image.path()).unwrap();
        reason
    }

    /// As [`Changed::reason`], for one flipped bit and a checksum that is not right.
    fn flipped(&self, offset: u64) -> String {
        self.reason(offset, 1, None, |byte| byte[0] ^= 0x10)
    }
}

#[test]
fn flipped_bits() {
    needs_xfs!();
    let changed = Changed::new();
    let image = changed.image.path();
    for at in [8, 130, 400] {
        assert_eq!(changed.flipped(at), "the checksum of the superblock is wrong");
    }
    for group in 0..2 {
        let agf = format!("agf {group}");
        let start = changed.place(group, 0);
        assert_eq!(changed.flipped(start + 512 + 52), format!("the checksum of the AGF of group {group} is wrong"));
        let list = format!("the checksum of the free list (AGFL) of group {group} is wrong");
        assert_eq!(changed.flipped(start + 3 * 512 + 60), list);
        assert!(!free_list(image, group).is_empty());
        for (root, order) in [("bnoroot", "block"), ("cntroot", "length")] {
            let root = changed.place(group, field(image, &agf, root));
            for at in [8, 70, 1000] {
                let expected = format!("the checksum of the free space tree of group {group} by {order} is wrong");
                assert_eq!(changed.flipped(root + at), expected);
            }
        }
    }
    // The record of the unmount, whose checksum is in its header.
    let head = log_head(image).unwrap();
    let block: u64 = field(image, "sb 0", "logstart");
    let log = changed
        .place(block >> field::<u32>(image, "sb 0", "agblklog"), block % changed.group_length.next_power_of_two());
    for at in [500, 503, 508] {
        let reason = changed.flipped(log + head * 512 - at);
        assert_eq!(reason, "the checksum of the last record of its log is wrong");
    }
    // The cycle of the last block before the head, and of the first one from it on.
    assert_eq!(changed.flipped(log + head * 512 - 509), NOT_EMPTY);
    assert_eq!(changed.flipped(log + head * 512), NOT_EMPTY);
}

#[test]
fn unknown_features_and_states() {
    needs_xfs!();
    let changed = Changed::new();
    let set = |at: usize, bit: u8| changed.reason(0, 512, Some(224), |bytes| bytes[at] |= bit);
    assert_eq!(set(208, 0x80), "it has compatible features that are not supported: 0x80000000");
    assert_eq!(set(215, 0x10), "it has read-only compatible features that are not supported: 0x10");
    assert_eq!(set(218, 0x01), "it has incompatible features that are not supported: 0x100");
    assert_eq!(set(218, 0x02), "it has incompatible features that are not supported: 0x200");
    assert_eq!(set(223, 0x01), "it has incompatible log features that are not supported: 0x1");
    assert_eq!(set(219, 0x10), "it needs a repair: run xfs_repair");
    assert_eq!(set(126, 0x01), "mkfs.xfs has not completed it");
    assert_eq!(set(32, 0xff), "its log has the UUID of another file system");
    assert_eq!(set(240, 0x40), "the superblock is newer than the log");
}

#[test]
fn numbers_that_do_not_fit() {
    needs_xfs!();
    let changed = Changed::new();
    let image = changed.image.path();
    let superblock = |at: usize| changed.reason(0, 512, Some(224), |bytes| bytes[at] ^= 1);
    assert!(superblock(151).starts_with("its groups have "));
    assert_eq!(superblock(91), "the number of its groups is wrong");
    let agf = |at: usize| changed.reason(512, 512, Some(216), |bytes| bytes[at] ^= 1);
    assert_eq!(agf(11), "the number or the length in the AGF of group 0 is wrong");
    assert_eq!(agf(15), "the number or the length in the AGF of group 0 is wrong");
    assert_eq!(agf(51), "the length of the free list of group 0 is wrong");
    assert_eq!(agf(55), "the number of free blocks in the AGF of group 0 is wrong");
    assert_eq!(agf(59), "the number of free blocks in the AGF of group 0 is wrong");
    assert_eq!(agf(63), "the number of blocks of trees in the AGF of group 0 is wrong");
    assert_eq!(agf(31), "the magic number or level in a block of the free space tree of group 0 by block is wrong");
    assert_eq!(agf(70), "the UUID or the log sequence number of the AGF of group 0 is wrong");

    // The kernel puts the fragments of one file into one group.
    let level = |group: &u64| field::<u64>(image, &format!("agf {group}"), "bnolevel");
    let group = (0..2).find(|group| level(group) > 1).expect("a tree of two levels");
    let wrong = |what: &str| format!("the {what} of the free space tree of group {group} by block is wrong");
    let root = changed.place(group, field(image, &format!("agf {group}"), "bnoroot"));
    let key = changed.reason(root, 1024, Some(52), |block| block[59] ^= 1);
    assert_eq!(key, wrong("key of a block"));
    let mut leaf = root;
    for _ in 1..level(&group) {
        let pointers = 56 + (1024 - 56) / 12 * 8;
        leaf = changed.place(group, word(image, leaf + pointers).into());
    }
    let tree = |at: usize, bit: u8| changed.reason(leaf, 1024, Some(52), |block| block[at] ^= bit);
    assert_eq!(tree(15, 1), wrong("chain of blocks"));
    assert_eq!(tree(51, 1), wrong("place, owner or UUID in a block"));
    assert_eq!(tree(6, 0xff), wrong("number of entries in a block"));
    assert_eq!(tree(76, 0x80), wrong("place of an extent"));
    // The third extent of the leaf begins one block earlier: the sums stay as they are.
    let third = word(image, leaf + 72) - 1;
    let moved = changed.reason(leaf, 1024, Some(52), |block| block[72..76].copy_from_slice(&third.to_be_bytes()));
    assert_eq!(moved, format!("the two free space trees of group {group} differ"));
}

fn word(image: &Path, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    File::open(image).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    u32::from_be_bytes(bytes)
}

#[test]
fn a_device_that_is_too_short() {
    needs_xfs!();
    let image = make(SIZE, &[]);
    image.resize(SIZE - 512);
    assert_eq!(reason(&image), "the device is shorter than its 81920 blocks of 4096");
    image.resize(100);
    assert!(reason(&image).starts_with("cannot read the superblock: "));
}
