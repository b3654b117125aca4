use super::*;

const BLOCK: Bytes = Bytes::new(512);
const LEN: Bytes = Bytes::new(1000 * 512);

/// A GET LBA STATUS answer of (first block, blocks, status) descriptors.
fn answer(descriptors: &[(u64, u32, u8)]) -> Vec<u8> {
    let mut data = (4 + 16 * descriptors.len() as u32).to_be_bytes().to_vec();
    data.extend([0; 4]);
    for (lba, blocks, status) in descriptors {
        data.extend(lba.to_be_bytes());
        data.extend(blocks.to_be_bytes());
        data.extend([*status, 0, 0, 0]);
    }
    data
}

/// The runs as (end in blocks of 512, hole), and whether the list was at fault.
fn read(data: &[u8], lba: u64) -> (Vec<(u64, bool)>, bool) {
    let status = lba_status(data, Bytes::new(lba * 512), BLOCK, LEN);
    (
        status.extents.iter().map(|run| (run.end.get() / 512, run.kind == ExtentKind::Hole)).collect(),
        status.fault.is_some(),
    )
}

#[test]
fn only_deallocated_and_anchored_blocks_are_holes() {
    for status in 0..=255 {
        let hole = matches!(status, 1 | 2);
        assert_eq!(read(&answer(&[(0, 1000, status)]), 0), (vec![(1000, hole)], false), "status {status:#x}");
    }
    let mut data = answer(&[(0, 1000, 1)]);
    data[8 + 13] = 1;
    assert_eq!(read(&data, 0), (vec![(1000, false)], false), "with an additional status");
}

#[test]
fn neighbours_of_one_kind_are_one_run() {
    let data = answer(&[(10, 5, 1), (15, 5, 2), (20, 1, 0), (21, 9, 3), (30, 1, 1)]);
    assert_eq!(read(&data, 10), (vec![(20, true), (30, false), (31, true)], false));
}

#[test]
fn a_list_is_used_up_to_the_first_misplaced_descriptor() {
    for (what, second) in [
        ("a gap", (16, 4, 1)),
        ("an overlap", (14, 4, 1)),
        ("backwards", (0, 10, 1)),
        ("the same again", (10, 5, 1)),
        ("an empty one", (15, 0, 1)),
        ("an address beyond 64 bits", (u64::MAX, 1, 1)),
    ] {
        assert_eq!(read(&answer(&[(10, 5, 1), second, (20, 5, 1)]), 10), (vec![(15, true)], true), "{what}");
    }
    for (what, first) in [("before", (9, 50, 1)), ("after", (11, 50, 1)), ("empty", (10, 0, 1))] {
        assert_eq!(read(&answer(&[first]), 10), (vec![], true), "{what}");
    }
}

#[test]
fn a_list_ends_with_the_disk() {
    assert_eq!(read(&answer(&[(990, 500, 1), (0, 1, 1)]), 990), (vec![(1000, true)], false));
    assert_eq!(read(&answer(&[(990, u32::MAX, 0)]), 990), (vec![(1000, false)], false));
}

#[test]
fn a_truncated_list_is_used_as_far_as_it_goes() {
    let data = answer(&[(0, 5, 1), (5, 5, 0), (10, 5, 1)]);
    for len in 0..24 {
        assert_eq!(read(&data[..len], 0), (vec![], true), "{len} bytes");
    }
    for len in 24..40 {
        assert_eq!(read(&data[..len], 0), (vec![(5, true)], false), "{len} bytes");
    }
    assert_eq!(read(&data, 0), (vec![(5, true), (10, false), (15, true)], false));
}

#[test]
fn a_length_that_is_no_multiple_of_a_descriptor_is_a_fault() {
    let good = answer(&[(0, 5, 1), (5, 5, 0)]);
    for listed in [0, 4, 19, 21, 32, 35, u32::MAX] {
        let mut data = good.clone();
        data[..4].copy_from_slice(&listed.to_be_bytes());
        assert_eq!(read(&data, 0), (vec![], true), "length {listed}");
    }
    for listed in [20, 36, 52, u32::MAX - 11] {
        let mut data = good.clone();
        data[..4].copy_from_slice(&listed.to_be_bytes());
        assert!(!read(&data, 0).1, "length {listed}");
    }
}

#[test]
fn blocks_of_4096_bytes_and_beyond_32_bits() {
    let block = Bytes::new(4096);
    let first = 1_u64 << 33;
    let data = answer(&[(first, u32::MAX, 1), (first + u64::from(u32::MAX), 1, 0)]);
    let status = lba_status(&data, Bytes::new(first * 4096), block, Bytes::MAX);
    let end = (first + u64::from(u32::MAX)) * 4096;
    let run = |end, kind| Extent { end: Bytes::new(end), kind };
    assert_eq!(
        status,
        LbaStatus { extents: vec![run(end, ExtentKind::Hole), run(end + 4096, ExtentKind::Data)], fault: None }
    );
}

#[test]
fn a_run_beyond_64_bits_is_at_fault() {
    let block = Bytes::new(1 << 31);
    let start = Bytes::new(u64::MAX - (u64::MAX % (1 << 31)));
    let data = answer(&[(start.get() >> 31, 1, 1)]);
    assert_eq!(lba_status(&data, start, block, Bytes::MAX).extents, []);
}

fn capacity_data(last: u64, block: u32, flags: u8) -> [u8; 32] {
    let mut data = [0; 32];
    data[..8].copy_from_slice(&last.to_be_bytes());
    data[8..12].copy_from_slice(&block.to_be_bytes());
    data[14] = flags;
    data
}

#[test]
fn capacities() {
    let read = capacity(&capacity_data(999, 512, 0xc0)).unwrap();
    assert_eq!(read, Capacity { len: LEN, block: BLOCK, provisioning: true, zeros: true });
    assert!(!capacity(&capacity_data(999, 512, 0x40)).unwrap().provisioning);
    assert!(!capacity(&capacity_data(999, 512, 0xbf)).unwrap().zeros);
    for (last, block) in [(999, 0), (u64::MAX, 1), (u64::MAX - 1, 2), (1 << 60, 4096)] {
        assert!(capacity(&capacity_data(last, block, 0xc0)).is_err(), "{last} {block}");
    }
    assert!(capacity(&capacity_data(999, 512, 0xc0)[..14]).is_err());
}

#[test]
fn vital_product_data() {
    assert!(lists_page(&[0, 0, 0, 3, 0x00, 0x83, 0xb2], PROVISIONING_PAGE).unwrap());
    assert!(!lists_page(&[0, 0, 0, 2, 0x00, 0x83, 0xb2], PROVISIONING_PAGE).unwrap());
    for (what, data) in [
        ("cut off", &[0, 0, 0, 4, 0x00, 0x83, 0xb2][..]),
        ("another page", &[0, 0x83, 0, 1, 0xb2]),
        ("another type", &[5, 0, 0, 1, 0xb2]),
        ("empty", &[]),
    ] {
        assert!(lists_page(data, PROVISIONING_PAGE).is_err(), "{what}");
    }
    for lbprz in 0..8 {
        let data = [0, 0xb2, 0, 4, 0, 0xe3 | lbprz << 2, 2, 0];
        assert_eq!(provisioning_zeros(&data).unwrap(), lbprz & 1 == 1, "LBPRZ {lbprz:03b}");
    }
    assert!(provisioning_zeros(&[0, 0xb2, 0, 1, 0]).is_err());
    assert!(provisioning_zeros(&[0, 0xb2, 0, 4, 0, 4]).is_err());
}

#[test]
fn inquiry_data() {
    let data = |first: u8, vendor: &[u8; 8]| [&[first, 0, 7, 2, 31, 0, 0, 0][..], vendor].concat();
    let read = |first, vendor| inquiry(&data(first, vendor)).unwrap();
    assert_eq!(read(0, b"Linux   "), InquiryData { disk: true, ata: false });
    assert_eq!(read(0, b"ATA     "), InquiryData { disk: true, ata: true });
    assert_eq!(read(0x14, b"HGST    "), InquiryData { disk: false, ata: false });
    assert!(inquiry(&data(0, b"Linux   ")[..15]).is_err());
}

#[test]
fn sense_formats() {
    let fixed = [0x70, 0, 0x06, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x29, 0x01];
    assert_eq!(sense(&fixed), Some(Sense { key: 6, code: (0x29, 1) }));
    assert_eq!(sense(&[0x72, 0x05, 0x20, 0, 0, 0, 0, 0]), Some(Sense { key: 5, code: (0x20, 0) }));
    assert!(sense(&fixed).unwrap().is_unit_attention());
    assert!(sense(&[0x72, 0x05, 0x24, 0]).unwrap().is_refusal());
    assert!(!sense(&[0x72, 0x03, 0x20, 0]).unwrap().is_refusal());
    assert_eq!(sense(&[0x70, 0, 3]), Some(Sense { key: 3, code: (0, 0) }));
    for data in [&[][..], &[0x70, 0], &[0x72, 5, 0x20], &[0x7f; 20]] {
        assert_eq!(sense(data), None);
    }
}

/// Checks for every input: extents advance, end with the disk and alternate, and each hole is in a descriptor.
fn check_invariants(data: &[u8], start: Bytes, block: Bytes, len: Bytes) {
    let status = lba_status(data, start, block, len);
    let mut last = start;
    for pair in status.extents.windows(2) {
        assert_ne!(pair[0].kind, pair[1].kind);
    }
    for run in &status.extents {
        assert!(run.end > last && run.end <= len);
        last = run.end;
    }
    assert!(status.extents.len() <= data.len() / DESCRIPTOR);
    let _ = (capacity(data), lists_page(data, PROVISIONING_PAGE), provisioning_zeros(data), inquiry(data), sense(data));
}

#[test]
fn any_bytes_give_a_value_or_an_error() {
    use proptest::prelude::*;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let base = answer(&[(3, 5, 1), (8, 5, 0), (13, 7, 2), (20, 1, 1), (21, 900, 3)]);
    let mutations = proptest::collection::vec((0..base.len(), any::<u8>()), 0..8);
    runner
        .run(
            &(mutations, 0..=base.len(), proptest::collection::vec(any::<u8>(), 0..200)),
            |(mutations, cut, random)| {
                let mut data = base.clone();
                for (at, value) in mutations {
                    data[at] = value;
                }
                data.truncate(cut);
                for data in [&data, &random] {
                    check_invariants(data, Bytes::new(3 * 512), BLOCK, LEN);
                    check_invariants(data, Bytes::new(3 * 4096), Bytes::new(4096), Bytes::MAX);
                }
                Ok(())
            },
        )
        .unwrap();
}
