use super::*;

#[test]
fn a_greeting_is_answered_with_its_own_flags() {
    let greeting = |flags: [u8; 2]| {
        let mut bytes = *b"NBDMAGICIHAVEOPT\0\0";
        bytes[16..].copy_from_slice(&flags);
        Greeting::decode(&bytes).unwrap()
    };
    assert_eq!(greeting([0, 3]), Greeting { fixed: true, no_zeroes: true });
    assert_eq!(greeting([0xff, 0xfd]).answer(), [0, 0, 0, 1]);
    assert_eq!(greeting([0, 2]).answer(), [0, 0, 0, 2]);
    assert!(Greeting::decode(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\0\0").is_err(), "oldstyle");
    assert!(Greeting::decode(b"SSH-2.0-OpenSSH_9.").is_err());
}

#[test]
fn encoded_options() {
    assert_eq!(NbdOption::StructuredReply.encode(&[]), b"IHAVEOPT\0\0\0\x08\0\0\0\0");
    assert_eq!(NbdOption::Go.encode(&go("ab")), b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x02ab\0\x01\0\x03");
    assert_eq!(set_meta_context("e", &[BASE_ALLOCATION]), b"\0\0\0\x01e\0\0\0\x01\0\0\0\x0fbase:allocation");
}

#[test]
fn option_replies() {
    let reply = |option: u32, kind: u32, len: u32| {
        let mut bytes = [0; OPTION_HEADER];
        bytes[..8].copy_from_slice(&OPTION_REPLY.to_be_bytes());
        bytes[8..12].copy_from_slice(&option.to_be_bytes());
        bytes[12..16].copy_from_slice(&kind.to_be_bytes());
        bytes[16..].copy_from_slice(&len.to_be_bytes());
        option_reply(&bytes, NbdOption::Go)
    };
    assert_eq!(reply(7, 1, 0).unwrap(), (OptionReply::Ack, 0));
    assert_eq!(reply(7, 3, 12).unwrap(), (OptionReply::Info, 12));
    assert_eq!(reply(7, 0x8000_0006, 5).unwrap(), (OptionReply::Error(6), 5));
    assert!(reply(8, 1, 0).is_err(), "another option");
    assert!(reply(7, 1, 4).is_err(), "an acknowledgement has no data");
    assert!(reply(7, 2, 4).is_err(), "a list was not requested");
    assert!(reply(7, 3, MAX_OPTION_REPLY + 1).is_err());
    assert!(option_reply(&[0; OPTION_HEADER], NbdOption::Go).is_err());
}

#[test]
fn block_sizes_are_checked_and_capped() {
    let info = |min: u32, max: u32| {
        let words = [min, 4096, max].map(u32::to_be_bytes).concat();
        NbdInfo::decode(&[&[0, 3], words.as_slice()].concat())
    };
    let sizes = |min, max| NbdInfo::BlockSizes(BlockSizes { minimum: Bytes::new(min), maximum: Bytes::new(max) });
    assert_eq!(info(1, u32::MAX).unwrap(), sizes(1, 32 << 20));
    assert_eq!(info(4096, 65536).unwrap(), sizes(4096, 65536));
    assert_eq!(info(4096, 65535).unwrap(), sizes(4096, 61440));
    for (min, max) in [(0, 4096), (3, 4096), (131_072, 1 << 20), (4096, 512)] {
        assert!(info(min, max).is_err(), "{min} {max}");
    }
    assert!(NbdInfo::decode(&[0, 3, 0]).is_err());
    assert_eq!(NbdInfo::decode(&[0, 9, 1]).unwrap(), NbdInfo::Other);
}

#[test]
fn export_information() {
    let info = |size: u64, flags: u16| {
        NbdInfo::decode(&[&[0, 0], size.to_be_bytes().as_slice(), flags.to_be_bytes().as_slice()].concat())
    };
    let export = |size, read_only, multi_conn, flush| {
        let (fua, write_zeroes) = (false, false);
        NbdInfo::Export(ExportInfo { size: Bytes::new(size), read_only, multi_conn, flush, fua, write_zeroes })
    };
    let flags = |flags| match info(5, flags).unwrap() {
        NbdInfo::Export(export) => (export.flush, export.fua, export.write_zeroes),
        other => panic!("{other:?}"),
    };
    assert_eq!([0x5, 0x9, 0x41].map(flags), [(true, false, false), (false, true, false), (false, false, true)]);
    assert_eq!(info(5, 1).unwrap(), export(5, false, false, false));
    assert_eq!(info(0, 0x103).unwrap(), export(0, true, true, false));
    assert_eq!(info(0, 0x105).unwrap(), export(0, false, true, true));
    assert!(info(5, 2).is_err(), "flags without HAS_FLAGS");
    assert!(info(1 << 63, 1).is_err());
    assert!(NbdInfo::decode(&[0, 0, 1]).is_err());
}

#[test]
fn only_the_requested_context_is_accepted() {
    let read = |payloads: &[&[u8]], names: &[&str]| meta_contexts(payloads.iter().copied(), names).ok();
    let names = [BASE_ALLOCATION, "qemu:dirty-bitmap:b"];
    let (base, bitmap) = (b"\0\0\0\x07base:allocation".as_slice(), b"\0\0\0\x08qemu:dirty-bitmap:b".as_slice());
    assert_eq!(read(&[], &names), Some(vec![None, None]));
    assert_eq!(read(&[base], &names[..1]), Some(vec![Some(7)]));
    assert_eq!(read(&[bitmap, base], &names), Some(vec![Some(7), Some(8)]));
    for payloads in [
        vec![b"\0\0\0\x07base:allocatio".as_slice()],
        vec![b"\0\0\0\x07qemu:dirty-bitmap:"],
        vec![b"\0\0\0\x07qemu:dirty-bitmap:bb"],
        vec![b"\0\0"],
        vec![base, base],
        vec![base, b"\0\0\0\x07qemu:dirty-bitmap:b"],
    ] {
        assert_eq!(read(&payloads, &names), None, "{payloads:?}");
    }
}

proptest::proptest! {
    /// Any bytes give a value within the protocol's limits, or an error.
    #[test]
    fn noise(bytes in proptest::collection::vec(0..=255_u8, 0..64), kind in 0..6_u8) {
        if let Some(greeting) = bytes.first_chunk() {
            let _ = Greeting::decode(greeting);
        }
        if let Some(header) = bytes.first_chunk::<OPTION_HEADER>() {
            let mut header = *header;
            header[..8].copy_from_slice(&OPTION_REPLY.to_be_bytes());
            header[8..12].copy_from_slice(&7_u32.to_be_bytes());
            if let Ok((_, len)) = option_reply(&header, NbdOption::Go) {
                proptest::prop_assert!(len <= MAX_OPTION_REPLY);
            }
        }
        match NbdInfo::decode(&[&[0, kind], bytes.as_slice()].concat()) {
            Ok(NbdInfo::BlockSizes(blocks)) => {
                proptest::prop_assert!(blocks.minimum.get().is_power_of_two() && blocks.minimum <= blocks.maximum);
                proptest::prop_assert_eq!(blocks.maximum.align_down(blocks.minimum), blocks.maximum);
                proptest::prop_assert!(blocks.maximum <= DEFAULT_MAX_PAYLOAD);
            }
            Ok(NbdInfo::Export(export)) => proptest::prop_assert!(i64::try_from(export.size.get()).is_ok()),
            Ok(NbdInfo::Other) | Err(_) => {}
        }
        let _ = meta_contexts([bytes.as_slice()].into_iter(), &[BASE_ALLOCATION]);
    }
}
