//! File systems of which the free space is not certain.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::time::Instant;

use blkholefs::testing::filesystem::{MemoryDevice, ReadBytes as _, ext};
use blkholefs::testing::map::HoleMap as _;
use blkholefs::testing::units::Bytes;

use super::common::random::Random;
use super::common::{MIB, needs, run};
use super::image::{Ext, files};

fn refused(ext: &Ext, text: &str) {
    match ext.used() {
        Err(reason) => assert!(reason.to_string().contains(text), "{reason} has no {text}"),
        Ok(_) => panic!("not refused: {text}"),
    }
}

/// Inverts one bit of the image.
fn flip(ext: &Ext, at: u64, bit: u8) {
    let file = fs::OpenOptions::new().read(true).write(true).open(ext.path()).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
}

#[test]
fn states_in_the_superblock() {
    needs!(programs["mke2fs", "debugfs"]);
    for (command, text) in [
        ("feature needs_recovery", "its journal is not empty: mount and unmount it once, or run e2fsck"),
        ("feature orphan_present", "files whose deletion is not complete"),
        ("feature FEATURE_I31", "incompatible features that are not supported: 0x80000000"),
        ("feature FEATURE_R30", "read-only compatible features that are not supported: 0x40000000"),
        ("feature FEATURE_C30", "compatible features that are not supported: 0x40000000"),
        ("feature shared_blocks", "its files share blocks"),
        ("feature compression", "features that are not supported: 0x1"),
        ("ssv state 0", "not unmounted cleanly"),
        ("ssv state 3", "errors were found in it: run e2fsck"),
        ("ssv error_count 1", "errors were found in it: run e2fsck"),
        ("ssv last_orphan 12", "files whose deletion is not complete"),
        ("ssv flags 0x10", "flags that are not supported"),
        ("ssv free_blocks_count 77", "free blocks, and its superblock has 77"),
        ("ssv blocks_count 1000000", "longer than its device"),
        ("ssv checksum_type 2", "checksums of type 2"),
    ] {
        let ext = Ext::new(64 * MIB, "-t ext4");
        ext.debugfs(&format!("{command}\n"));
        refused(&ext, text);
    }
}

#[test]
fn a_journal_device() {
    needs!(programs["mke2fs"]);
    refused(&Ext::new(64 * MIB, "-O journal_dev"), "external journal");
}

#[test]
fn a_mounted_file_system() {
    needs!(root, programs["mke2fs"]);
    let ext = Ext::new(64 * MIB, "-t ext4");
    ext.mounted(|mount| {
        files(&mount.join("files"), 1);
        run("sync", ["-f".as_ref(), mount.as_os_str()]);
        refused(&ext, "its journal is not empty");
    });
    let ext = Ext::new(64 * MIB, "-t ext2");
    ext.mounted(|mount| {
        run("sync", ["-f".as_ref(), mount.as_os_str()]);
        refused(&ext, "not unmounted cleanly");
    });
}

#[test]
fn use_by_another_computer() {
    needs!(programs["mke2fs", "debugfs", "dumpe2fs"]);
    let ext = Ext::new(64 * MIB, "-t ext4 -O mmp,^metadata_csum");
    assert!(ext.used().is_ok());
    let text = run("dumpe2fs", ["-h".as_ref(), ext.path().as_os_str()]);
    let block = text.lines().find_map(|line| line.strip_prefix("MMP block number:")).expect("it has the block");
    let block: u64 = block.trim().parse().unwrap();
    let file = fs::OpenOptions::new().write(true).open(ext.path()).unwrap();
    file.write_all_at(&0xe24d_4d50_u32.to_le_bytes(), block * 4096 + 4).unwrap();
    refused(&ext, "says that it is mounted or being checked");
    file.write_all_at(&[0; 4], block * 4096).unwrap();
    refused(&ext, "(mmp) is wrong");
}

#[test]
fn flipped_bits() {
    needs!(programs["mke2fs", "dumpe2fs"]);
    for options in ["-t ext4", "-t ext4 -O ^64bit", "-t ext4 -O ^metadata_csum,uninit_bg", "-t ext2"] {
        let make = || Ext::filled(300 * MIB, options);
        let has_crc32c = !options.contains("^metadata_csum") && !options.contains("ext2");
        let has_crc16 = options.contains("uninit_bg");
        let ext = make();
        let text = run("dumpe2fs", [ext.path()]);
        let bitmap = text.lines().find_map(|line| line.trim().strip_prefix("Block bitmap at ")).unwrap();
        let bitmap: u64 = bitmap.split([' ', ',']).next().unwrap().parse().unwrap();
        flip(&ext, bitmap * 4096 + 4000, 3);
        let text =
            if has_crc32c { "checksum of the block bitmap of group 0" } else { "the block bitmap of group 0 has" };
        refused(&ext, text);
        let ext = make();
        // The count of directories, in the descriptor of group 1.
        let size = if options.contains("^64bit") || options.contains("ext2") { 32 } else { 64 };
        flip(&ext, 4096 + size + 0x10, 0);
        match has_crc32c || has_crc16 {
            true => refused(&ext, "the checksum of the descriptor of group 1 is wrong"),
            false => assert!(ext.used().is_ok()),
        }
        let ext = make();
        flip(&ext, 4096 + 1, 0);
        let _ = ext.used().err().expect("the position of a bitmap");
        if has_crc32c {
            let ext = make();
            flip(&ext, 1024 + 0x30, 0);
            refused(&ext, "the checksum of its superblock is wrong");
        }
    }
}

#[test]
fn every_bit_of_the_metadata_matters_or_changes_nothing() {
    needs!(programs["mke2fs"]);
    for options in ["-t ext2 -b 1024 -g 512 -N 64", "-t ext4 -b 1024 -g 512 -N 64 -O ^has_journal"] {
        let bytes = fs::read(Ext::filled(2 * MIB, options).path()).unwrap();
        let free = |device: &MemoryDevice| ext::used(device).map(|map| map.allocated());
        let mut device = MemoryDevice(bytes);
        let right = free(&device).unwrap();
        // The superblock, the descriptors, and bitmaps behind them.
        for at in (1024..2048).chain(2048..2048 + 256).chain((2304..60 << 10).step_by(61)) {
            let bit = at % 8;
            device.0[at] ^= 1 << bit;
            if let Ok(used) = free(&device) {
                assert_eq!(used, right, "{options}: the byte {at}");
            }
            device.0[at] ^= 1 << bit;
        }
    }
}

#[test]
fn truncated_and_random_devices() {
    needs!(programs["mke2fs"]);
    let bytes = fs::read(Ext::filled(2 * MIB, "-t ext2 -b 1024").path()).unwrap();
    for len in (0..5000).chain((5000..bytes.len()).step_by(4099)) {
        assert!(ext::used(&MemoryDevice(bytes[..len].to_vec())).is_err(), "{len} bytes");
    }
    let mut random = Random::new(Random::seed_or(1));
    for _ in 0..200 {
        assert!(ext::used(&MemoryDevice(random.bytes(9000))).is_err());
    }
}

/// Superblocks with random or extreme numbers, in time and without a panic; without checksums, so that all of them are read.
#[test]
fn hostile_superblocks() {
    needs!(programs["mke2fs"]);
    let mut random = Random::new(Random::seed_or(2));
    for options in [
        "-t ext2 -b 1024",
        "-t ext4 -O ^metadata_csum,^uninit_bg -b 1024",
        "-t ext4 -O ^metadata_csum,meta_bg,^resize_inode,^uninit_bg",
    ] {
        let bytes = fs::read(Ext::filled(2 * MIB, options).path()).unwrap();
        for _ in 0..3000 {
            let mut device = MemoryDevice(bytes.clone());
            for _ in 0..random.within(1..4) {
                let at = if random.one_in(3) { 2048 + random.within(0..64) } else { 1024 + random.within(0..96) }
                    as usize
                    * 4
                    % 4096;
                let at = at.max(1024);
                let value = [0, 1, u32::MAX, 1 << 31, 8, random.next() as u32 & 0xff][random.within(0..6) as usize];
                device.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            let start = Instant::now();
            if let Ok(map) = ext::used(&device) {
                assert_eq!(map.len(), device.len());
                assert!(map.extent_at(Bytes::ZERO).kind.is_data());
            }
            assert!(start.elapsed().as_secs() < 5);
        }
    }
}
