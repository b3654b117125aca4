//! Tests of tables of partitions. Those that real programs write are in `tests/used_partitions.rs`.

use super::*;
use crate::filesystem::memory::MemoryDevice;

const MIB: usize = 1 << 20;

/// Writes an entry of a boot record.
fn put(disk: &mut MemoryDevice, record: usize, index: usize, kind: u8, start: u32, sectors: u32) {
    let at = record + 446 + 16 * index;
    disk.0[at + 4] = kind;
    disk.0[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
    disk.0[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
    disk.0[record + 510..record + 512].copy_from_slice(b"\x55\xaa");
}

/// A disk of 2 MiB with a primary partition, and a container with two logical ones.
fn disk() -> MemoryDevice {
    let mut disk = MemoryDevice(vec![0; 2 * MIB]);
    put(&mut disk, 0, 0, 0x83, 8, 1000);
    put(&mut disk, 0, 1, 0x05, 1008, 3088);
    put(&mut disk, 1008 * 512, 0, 0x82, 8, 992);
    put(&mut disk, 1008 * 512, 1, 0x05, 1000, 2000);
    put(&mut disk, 2008 * 512, 0, 0x83, 8, 1992);
    disk
}

fn sectors(disk: &MemoryDevice) -> Result<Vec<(u32, u64, u64)>, String> {
    let place = |p: &Partition| (p.number, p.start.get() / 512, p.end.get() / 512);
    read(disk).map(|partitions| partitions.iter().map(place).collect()).map_err(|reason| reason.to_string())
}

#[test]
fn primary_and_logical_partitions() {
    assert_eq!(sectors(&disk()), Ok(vec![(1, 8, 1008), (5, 1016, 2008), (6, 2016, 4008)]));
    assert!(is_partitioned(&disk().0, Bytes::new(1)));
}

#[test]
fn inconsistent_tables_are_refused() {
    let refused = |text: &str, change: &dyn Fn(&mut MemoryDevice)| {
        let mut disk = disk();
        change(&mut disk);
        let found = sectors(&disk);
        assert!(found.as_ref().is_err_and(|reason| reason.contains(text)), "{text}: {found:?}");
    };
    refused("overlap", &|disk| put(disk, 0, 2, 0x83, 1007, 10));
    refused("overlap", &|disk| put(disk, 0, 2, 0x83, 4090, 6));
    refused("beyond its end", &|disk| put(disk, 0, 1, 0x05, 1008, 4000));
    refused("beyond its end", &|disk| disk.0.truncate(MIB));
    refused("two extended", &|disk| put(disk, 0, 2, 0x0f, 4096, 0x100));
    refused("missing", &|disk| put(disk, 0, 2, 0xee, 1, 4095));
    refused("no place", &|disk| put(disk, 0, 2, 0x83, 0, 0));
    refused("no place", &|disk| put(disk, 0, 2, 0x00, 8, 8));
    refused("no boot record", &|disk| disk.0[511] = 0);
    refused("no boot record", &|disk| disk.0[446] = 1);
    // The chain: a record that is no record, a link back, a link out of the container, and a third entry.
    refused("damaged", &|disk| disk.0[2008 * 512 + 510] = 0);
    refused("too long", &|disk| put(disk, 2008 * 512, 1, 0x05, 0, 100));
    refused("leaves", &|disk| put(disk, 2008 * 512, 1, 0x05, 3088, 100));
    refused("damaged", &|disk| put(disk, 2008 * 512, 2, 0x83, 8, 8));
    refused("damaged", &|disk| put(disk, 2008 * 512, 0, 0x83, 8, 2090));
    // A header of a GPT anywhere.
    refused("beside", &|disk| disk.0[512..520].copy_from_slice(b"EFI PART"));
    refused("beside", &|disk| disk.0[2 * MIB - 512..2 * MIB - 504].copy_from_slice(b"EFI PART"));
}

/// A boot record does not say how large the sectors are.
#[test]
fn a_table_that_is_valid_for_both_sizes_of_sectors_is_refused() {
    let mut disk = MemoryDevice(vec![0; 2 * MIB]);
    put(&mut disk, 0, 0, 0x83, 8, 100);
    assert!(sectors(&disk).is_err_and(|reason| reason.contains("512 or 4096")));
    put(&mut disk, 0, 0, 0x83, 8, 1000);
    assert_eq!(sectors(&disk), Ok(vec![(1, 8, 1008)]));
}
