//! The used space of ext2, ext3 and ext4, on file systems that `mke2fs` and the kernel made.

mod common;
#[path = "used_ext/image.rs"]
mod image;
#[path = "used_ext/refusals.rs"]
mod refusals;

use std::fs;
use std::time::Instant;

use blkholefs::testing::filesystem::ext;
use common::{GIB, KIB, MIB, needs, run};
use image::{Ext, files};

macro_rules! tests_of_options {
    ($($name:ident: $size:expr, $options:expr;)*) => {
        $(
            #[test]
            fn $name() {
                needs!(programs["mke2fs", "e2fsck", "debugfs", "dumpe2fs"]);
                Ext::filled($size, $options).check();
            }
        )*
    };
}

tests_of_options! {
    plain: 300 * MIB, "-t ext4";
    blocks_of_1k: 64 * MIB, "-t ext4 -b 1024";
    blocks_of_2k: 64 * MIB, "-t ext4 -b 2048";
    blocks_of_64k: 300 * MIB, "-t ext4 -b 65536 -F";
    clusters_of_64k: 300 * MIB, "-t ext4 -O bigalloc -C 65536";
    clusters_of_16k_and_blocks_of_1k: 300 * MIB, "-t ext4 -b 1024 -O bigalloc -C 16384";
    clusters_and_an_odd_length: 300 * MIB + 20 * KIB, "-t ext4 -O bigalloc -C 65536";
    without_flex_bg: 300 * MIB, "-t ext4 -O ^flex_bg";
    without_flex_bg_and_sparse_super: 300 * MIB, "-t ext4 -b 1024 -O ^flex_bg,^sparse_super,^resize_inode";
    flex_bg_of_all: 600 * MIB, "-t ext4 -G 1024 -b 1024";
    meta_bg: 600 * MIB, "-t ext4 -O meta_bg,^resize_inode";
    meta_bg_with_blocks_of_1k: 600 * MIB, "-t ext4 -b 1024 -O meta_bg,^resize_inode";
    meta_bg_without_flex_bg: 600 * MIB, "-t ext4 -b 1024 -O meta_bg,^resize_inode,^flex_bg";
    meta_bg_and_clusters: 600 * MIB, "-t ext4 -b 1024 -O meta_bg,^resize_inode,bigalloc -C 4096";
    with_64bit: 300 * MIB, "-t ext4 -O 64bit";
    without_64bit: 300 * MIB, "-t ext4 -O ^64bit";
    crc16_of_descriptors: 300 * MIB, "-t ext4 -O ^metadata_csum,uninit_bg";
    crc16_of_descriptors_without_64bit: 300 * MIB, "-t ext4 -O ^metadata_csum,uninit_bg,^64bit";
    without_checksums: 300 * MIB, "-t ext4 -O ^metadata_csum,^uninit_bg";
    checksum_seed: 300 * MIB, "-t ext4 -O metadata_csum_seed";
    without_journal: 300 * MIB, "-t ext4 -O ^has_journal";
    ext2: 300 * MIB, "-t ext2";
    ext2_with_blocks_of_1k: 64 * MIB, "-t ext2 -b 1024";
    ext2_of_revision_0: 64 * MIB, "-t ext2 -r 0";
    ext3: 300 * MIB, "-t ext3";
    sparse_super2: 600 * MIB, "-t ext4 -b 1024 -O sparse_super2,^resize_inode";
    sparse_super2_with_one_backup: 600 * MIB, "-t ext4 -O sparse_super2,^resize_inode -E num_backup_sb=1";
    orphan_file: 300 * MIB, "-t ext4 -O orphan_file";
    few_inodes: 300 * MIB, "-t ext4 -N 16";
    large_inodes: 300 * MIB, "-t ext4 -I 1024 -i 4096";
    small_groups: 64 * MIB, "-t ext4 -g 1024";
    odd_length: 77 * MIB + 3 * KIB, "-t ext4 -b 1024";
    one_short_group: MIB, "-t ext4 -b 1024 -O ^has_journal";
}

#[test]
fn many_features() {
    needs!(programs["mke2fs", "e2fsck", "debugfs", "dumpe2fs"]);
    let features = "mmp,inline_data,ea_inode,large_dir,quota,project,verity,encrypt,casefold,fast_commit,stable_inodes";
    let ext = Ext::filled(300 * MIB, &format!("-t ext4 -I 512 -O {features}"));
    // mke2fs does not count the files of `-d` in the quotas. Exit status 1: errors were corrected.
    let _ = common::try_run("e2fsck", ["-fy".as_ref(), ext.path().as_os_str()], "");
    ext.check();
}

#[test]
fn bytes_behind_the_file_system_are_used() {
    needs!(programs["mke2fs", "e2fsck", "debugfs", "dumpe2fs"]);
    let ext = Ext::filled(64 * MIB, "-t ext4");
    common::image::open_for_writing(ext.path()).set_len(70 * MIB + 513).unwrap();
    ext.check();
    assert_eq!(ext.free().last().map(|free| free.end <= 64 * MIB), Some(true));
}

#[test]
fn nearly_full() {
    needs!(programs["mke2fs", "e2fsck", "debugfs", "dumpe2fs"]);
    let ext = Ext::filled(64 * MIB, "-t ext4 -m 0");
    let free = |ext: &Ext| ext.free().iter().map(|free| free.end - free.start).sum::<u64>();
    // debugfs leaves a damaged file system behind when a file does not fit.
    let count = free(&ext) / MIB - 2;
    ext.debugfs(&(0..count).map(|at| format!("write {} more{at}\n", ext.large_file())).collect::<String>());
    ext.check();
    assert!(free(&ext) < 3 * MIB);
}

#[test]
fn fragmented() {
    needs!(programs["mke2fs", "e2fsck", "debugfs", "dumpe2fs"]);
    for options in ["-t ext4", "-t ext4 -b 1024", "-t ext2"] {
        let ext = Ext::new(64 * MIB, options);
        let small = ext.folder().join("small");
        fs::write(&small, vec![7; 9000]).unwrap();
        ext.debugfs(&(0..800).map(|at| format!("write {} file{at}\n", small.display())).collect::<String>());
        ext.debugfs(&(0..800).step_by(2).map(|at| format!("rm file{at}\n")).collect::<String>());
        ext.check();
        assert!(ext.free().len() > 100, "{options}: {:?}", ext.free().len());
    }
}

#[test]
fn resized() {
    needs!(programs["mke2fs", "e2fsck", "debugfs", "dumpe2fs", "resize2fs"]);
    for options in
        ["-t ext4", "-t ext4 -O ^64bit,^flex_bg", "-t ext4 -b 1024", "-t ext2", "-t ext4 -O meta_bg,^resize_inode"]
    {
        let ext = Ext::filled(200 * MIB, options);
        for size in ["700M", "150M", "400M"] {
            common::image::open_for_writing(ext.path()).set_len(700 * MIB).unwrap();
            run("resize2fs", ["-f".as_ref(), ext.path().as_os_str(), size.as_ref()]);
            ext.check();
        }
    }
}

#[test]
fn filled_by_the_kernel() {
    needs!(root, programs["mke2fs", "e2fsck", "debugfs", "dumpe2fs"]);
    for options in
        ["-t ext4", "-t ext4 -O bigalloc -C 65536", "-t ext4 -O ^metadata_csum,uninit_bg", "-t ext2", "-t ext3"]
    {
        let ext = Ext::new(400 * MIB, options);
        ext.mounted(|mount| {
            for at in 0..60_u64 {
                files(&mount.join(format!("folder{at}")), at);
            }
            for at in (0..60).step_by(3) {
                fs::remove_dir_all(mount.join(format!("folder{at}"))).unwrap();
            }
        });
        ext.check();
    }
}

#[test]
fn a_frozen_file_system_is_clean() {
    needs!(root, programs["mke2fs", "e2fsck", "debugfs", "dumpe2fs", "fsfreeze"]);
    let ext = Ext::filled(200 * MIB, "-t ext4");
    let copy = ext.folder().join("copy");
    ext.mounted(|mount| {
        files(&mount.join("later"), 5);
        run("fsfreeze", ["--freeze".as_ref(), mount.as_os_str()]);
        fs::copy(ext.path(), &copy).unwrap();
        run("fsfreeze", ["--unfreeze".as_ref(), mount.as_os_str()]);
    });
    ext.with_image(copy).check();
}

/// Without checksums of descriptors, every group has its bitmap on the device.
#[test]
fn a_terabyte_takes_few_reads() {
    needs!(programs["mke2fs", "dumpe2fs"]);
    for (options, reads, mib) in [("-t ext4", 700, 8), ("-t ext4 -O ^metadata_csum,^uninit_bg", 1200, 48)] {
        let ext = Ext::new(1024 * GIB, &format!("{options} -E lazy_itable_init=1,lazy_journal_init=1 -J size=4"));
        let device = ext.device();
        let start = Instant::now();
        let map = ext::used(&device).unwrap();
        println!("{options}: {:?}, {} reads, {} bytes", start.elapsed(), device.reads(), device.bytes_read());
        drop(map);
        assert!(device.reads() < reads && device.bytes_read() < mib * MIB, "{options}: {} reads", device.reads());
        ext.check_free_ranges();
    }
}

#[test]
fn the_magic_number() {
    needs!(programs["mke2fs"]);
    let ext = Ext::new(MIB, "-t ext2");
    let head = fs::read(ext.path()).unwrap();
    assert!(ext::is_ext(&head[..64 << 10]) && ext::is_ext(&head[..2048]));
    assert!(!ext::is_ext(&head[..1024]) && !ext::is_ext(&[]) && !ext::is_ext(&[0; 4096]));
}
