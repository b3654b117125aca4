//! The used space of disks with the tables of partitions that sfdisk writes.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;
#[path = "support/used_space.rs"]
#[allow(dead_code, reason = "each test uses its own part")]
mod used_space;

use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use blkholefs::testing::filesystem::detect::recognise;
use blkholefs::testing::filesystem::partitions;
use common::loop_device::Loop;
use common::random::Random;
use common::{MIB, needs, run, run_with_input};
use used_space::{ImageDevice, copy_without_free_space, flip, free_ranges, used_of};

const SIZE: u64 = 64 * MIB;

/// Does something with a disk whose sectors have that size. Only a loop device has others than those of 512 bytes.
fn with_sectors<T>(disk: &Path, sector: u64, action: impl FnOnce(&Path) -> T) -> T {
    match sector {
        512 => action(disk),
        _ => action(Loop::with_options(disk, &[&format!("--sector-size={sector}")]).path()),
    }
}

/// A disk of 64 MiB of random bytes, in which sfdisk makes these partitions.
fn disk(directory: &Path, sector: u64, script: &str) -> PathBuf {
    let path = directory.join("disk");
    let file = File::create(&path).unwrap();
    let random = Random::new(1).bytes(MIB);
    (0..SIZE / MIB).for_each(|index| file.write_all_at(&random, index * MIB).unwrap());
    // The random bytes of the first sector would be the code that starts a system. sfdisk keeps them.
    with_sectors(&path, sector, |device| {
        let options = ["--quiet", "--no-reread", "--no-tell-kernel", "--wipe=always", "--wipe-partitions=never"];
        run_with_input("sfdisk", options.into_iter().chain([device.to_str().unwrap()]), script);
    });
    path
}

/// Makes a swap area in a range of the disk.
fn make_swap(disk: &Path, range: &Range<u64>) {
    let area = disk.with_extension("swap");
    File::create(&area).unwrap().set_len(range.end - range.start).unwrap();
    run("mkswap", ["--quiet".as_ref(), area.as_os_str()]);
    let mut head = [0; 4096];
    File::open(&area).unwrap().read_exact(&mut head).unwrap();
    File::options().write(true).open(disk).unwrap().write_all_at(&head, range.start).unwrap();
}

/// What the partitions of a disk are: a name, or nothing where one is data.
fn parts(disk: &Path) -> Vec<(String, Option<&'static str>)> {
    let used = used_of(disk).unwrap();
    assert_eq!(used.kind, "partitions");
    used.parts.into_iter().map(|(name, part)| (name, part.ok())).collect()
}

fn free(disk: &Path) -> Vec<Range<u64>> {
    free_ranges(&used_of(disk).unwrap())
}

const DATA: Option<&str> = None;
const SWAP: Option<&str> = Some("swap");

fn named(parts: &[(u32, Option<&'static str>)]) -> Vec<(String, Option<&'static str>)> {
    parts.iter().map(|(number, part)| (format!("partition {number}"), *part)).collect()
}

/// Two areas of swap around one of random bytes, the first of them behind the second in the table.
const GPT: &str = "label: gpt\nstart=40MiB, size=10MiB\nstart=1MiB, size=8MiB\nstart=9MiB, size=4MiB\n";

#[test]
fn a_gpt_with_sectors_of_each_size() {
    needs!(root, programs["sfdisk", "mkswap"]);
    for sector in [512, 4096] {
        let directory = tempfile::tempdir().unwrap();
        let disk = disk(directory.path(), sector, GPT);
        assert_eq!(recognise(&ImageDevice::open(&disk)), Some("partitions"));
        assert_eq!(parts(&disk), named(&[(2, DATA), (3, DATA), (1, DATA)]), "sectors of {sector}");
        assert_eq!(free(&disk), []);
        make_swap(&disk, &(MIB..9 * MIB));
        make_swap(&disk, &(40 * MIB..50 * MIB));
        assert_eq!(parts(&disk), named(&[(2, SWAP), (3, DATA), (1, SWAP)]), "sectors of {sector}");
        let expected = [MIB + 4096..9 * MIB, 40 * MIB + 4096..50 * MIB];
        assert_eq!(free(&disk), expected);
        // The copy has the same table, and the same used space.
        let copy = directory.path().join("copy");
        assert_eq!(copy_without_free_space(&disk, &copy), expected);
        let dump = |disk: &Path| {
            with_sectors(disk, sector, |device| {
                run("sfdisk", ["--dump".as_ref(), device.as_os_str()]).replace(device.to_str().unwrap(), "DISK")
            })
        };
        assert_eq!(dump(&disk), dump(&copy));
        assert_eq!(free(&copy), expected);
    }
}

#[test]
fn a_boot_record_with_logical_partitions() {
    needs!(root, programs["sfdisk", "mkswap"]);
    let script =
        "label: dos\nstart=1MiB, size=8MiB, type=82\nstart=10MiB, size=50MiB, type=5\nstart=61MiB, size=2MiB\n\n";
    let logical =
        "start=11MiB, size=9MiB, type=83\nstart=21MiB, size=19MiB, type=82\nstart=45MiB, size=15MiB, type=83\n";
    for sector in [512, 4096] {
        let directory = tempfile::tempdir().unwrap();
        let script = script.trim_end().to_owned() + "\nstart=63MiB, size=1MiB\n" + logical;
        let disk = disk(directory.path(), sector, &script);
        make_swap(&disk, &(MIB..9 * MIB));
        make_swap(&disk, &(21 * MIB..40 * MIB));
        if sector == 4096 {
            // The table is valid for sectors of 512 bytes too, except for the chain of logical partitions.
            assert_eq!(recognise(&ImageDevice::open(&disk)), Some("partitions"));
        }
        let expected = [(1, SWAP), (5, DATA), (6, SWAP), (7, DATA), (3, DATA), (4, DATA)];
        assert_eq!(parts(&disk), named(&expected), "sectors of {sector}");
        assert_eq!(free(&disk), [MIB + 4096..9 * MIB, 21 * MIB + 4096..40 * MIB]);
    }
}

#[test]
fn swap_areas_with_pages_of_each_size() {
    needs!(programs["mkswap"]);
    for page in [4096, 8192, 16384, 32768, 65536] {
        let directory = tempfile::tempdir().unwrap();
        let area = directory.path().join("area");
        std::fs::write(&area, Random::new(5).bytes(3 * MIB + 5000)).unwrap();
        run("mkswap", ["--quiet", "--pagesize", &page.to_string(), area.to_str().unwrap()]);
        assert_eq!(recognise(&ImageDevice::open(&area)), Some("swap"));
        // What lies behind the last whole page is data.
        assert_eq!(free(&area), [page..(3 * MIB + 5000) / page * page], "pages of {page} bytes");
    }
}

/// The partitions that libblkid finds on a disk: the number, the start and the end. Its positions are in sectors of 512 bytes.
fn partitions_of_partx(disk: &Path, sector: u64) -> Vec<(u64, u64, u64)> {
    with_sectors(disk, sector, |device| {
        let columns = ["--show", "--noheadings", "--output=NR,START,SECTORS"];
        let lines = run("partx", columns.into_iter().chain([device.to_str().unwrap()]));
        let numbers = |line: &str| line.split_whitespace().map(|word| word.parse().unwrap()).collect::<Vec<u64>>();
        let place = |line: Vec<u64>| (line[0], line[1] * 512, (line[1] + line[2]) * 512);
        let mut found: Vec<_> = lines.lines().map(|line| place(numbers(line))).collect();
        found.sort_by_key(|(_, start, _)| *start);
        found
    })
}

#[test]
fn libblkid_finds_the_same_partitions() {
    needs!(root, programs["sfdisk", "partx"]);
    let logical = "label: dos\nstart=1MiB, size=8MiB\nstart=10MiB, size=54MiB, type=5\nstart=9MiB, size=1MiB\n\n\
        start=11MiB, size=9MiB\nstart=45MiB, size=15MiB\nstart=21MiB, size=19MiB\nstart=62MiB, size=2MiB\n";
    for (sector, script) in [(512, GPT), (4096, GPT), (512, logical), (4096, logical)] {
        let directory = tempfile::tempdir().unwrap();
        let disk = disk(directory.path(), sector, script);
        let found = partitions::read(&ImageDevice::open(&disk)).unwrap_or_else(|reason| panic!("{script}: {reason}"));
        let found: Vec<_> = found.iter().map(|p| (u64::from(p.number), p.start.get(), p.end.get())).collect();
        let mut expected = partitions_of_partx(&disk, sector);
        // The container of the logical partitions is no partition here.
        expected.retain(|(number, ..)| script == GPT || *number != 2);
        assert_eq!(found, expected, "sectors of {sector}: {script}");
        assert!(found.len() >= 3);
    }
}

/// Each byte of both tables is covered by a checksum, or compared.
#[test]
fn a_flipped_bit_of_a_gpt_is_refused() {
    needs!(programs["sfdisk", "mkswap"]);
    let directory = tempfile::tempdir().unwrap();
    let disk = disk(directory.path(), 512, GPT);
    make_swap(&disk, &(MIB..9 * MIB));
    let mut random = Random::new(2);
    let last = SIZE - 512;
    // The fields of the headers, the arrays, and the type of the entry that protects them.
    let arrays = [1024..1024 + 128 * 128, last - 128 * 128..last];
    let positions = arrays.into_iter().flat_map(|array| [array.start, array.end - 1, random.within(array)]);
    let mut positions: Vec<_> = positions.collect();
    positions.extend((512..512 + 92).chain(last..last + 92).chain([450, 454, 510, 462 + 4]));
    for at in positions {
        let bits = 1 << random.within(0..8);
        flip(&disk, at, bits);
        assert!(used_of(&disk).is_err(), "bits {bits} at {at}");
        flip(&disk, at, bits);
    }
    assert_eq!(free(&disk).len(), 1);
    // A disk that grew or shrank: the second table is not at the end.
    let file = File::options().write(true).open(&disk).unwrap();
    for size in [SIZE + MIB, SIZE - MIB, SIZE + 1] {
        file.set_len(size).unwrap();
        assert!(used_of(&disk).is_err_and(|reason| reason.contains("partitions")), "{size}");
    }
}

/// A partition with the header of a suspended system is data, and the others are as they are.
#[test]
fn one_partition_that_is_refused_is_data() {
    needs!(programs["sfdisk", "mkswap"]);
    let directory = tempfile::tempdir().unwrap();
    let disk = disk(directory.path(), 512, GPT);
    make_swap(&disk, &(MIB..9 * MIB));
    make_swap(&disk, &(40 * MIB..50 * MIB));
    let file = File::options().write(true).open(&disk).unwrap();
    file.write_all_at(b"S1SUSPEND\0", MIB + 4086).unwrap();
    assert_eq!(free(&disk), [40 * MIB + 4096..50 * MIB]);
    let reason = used_of(&disk).unwrap().parts[0].1.clone().map_err(|reason| reason.to_string());
    assert_eq!(reason, Err("swap: it holds an image of a suspended system".to_owned()));
    // Partitions of a GPT beside others in the boot record.
    file.write_all_at(&[0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0], 462 + 4).unwrap();
    assert!(used_of(&disk).is_err_and(|reason| reason.contains("beside")));
}

/// The file system of a partition is found at its place in the disk.
#[test]
fn a_partition_with_a_btrfs_file_system() {
    needs!(programs["sfdisk", "mkfs.btrfs", "btrfs"]);
    let directory = tempfile::tempdir().unwrap();
    let disk = disk(directory.path(), 512, "label: gpt\nstart=3MiB, size=40MiB\n");
    let image = directory.path().join("image");
    let source = directory.path().join("files");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), Random::new(3).bytes(3 * MIB)).unwrap();
    // The random bytes stay where mkfs.btrfs does not write.
    let mut bytes = Random::new(4).bytes(MIB).repeat(40);
    std::fs::write(&image, &bytes).unwrap();
    run("mkfs.btrfs", ["--quiet", "--mixed", "--rootdir", source.to_str().unwrap(), image.to_str().unwrap()]);
    bytes = std::fs::read(&image).unwrap();
    File::options().write(true).open(&disk).unwrap().write_all_at(&bytes, 3 * MIB).unwrap();
    assert_eq!(parts(&disk), named(&[(1, Some("btrfs"))]));
    let copy = directory.path().join("copy");
    let free = copy_without_free_space(&disk, &copy);
    assert!(free.iter().map(|range| range.end - range.start).sum::<u64>() > 10 * MIB);
    assert!(free.iter().all(|range| 4 * MIB <= range.start && range.end <= 43 * MIB), "{free:?}");
    File::open(&copy).unwrap().read_exact_at(&mut bytes, 3 * MIB).unwrap();
    std::fs::write(&image, &bytes).unwrap();
    run("btrfs", ["check", "--check-data-csum", image.to_str().unwrap()]);
}
