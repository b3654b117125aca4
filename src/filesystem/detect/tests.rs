//! Tests of what is found on a device.

use super::*;
use crate::filesystem::memory::MemoryDevice;

/// A swap area of 128 pages of 4 KiB.
fn swap_area() -> MemoryDevice {
    let mut bytes = vec![0; 128 * 4096];
    bytes[1024] = 1;
    bytes[1028] = 127;
    bytes[4086..4096].copy_from_slice(b"SWAPSPACE2");
    MemoryDevice(bytes)
}

#[test]
fn one_kind_is_recognised() {
    let device = swap_area();
    assert_eq!(recognise(&device), Some("swap"));
    let used = used_space(&device).unwrap_or_else(|reason| panic!("{reason}"));
    assert_eq!((used.kind, used.map.len(), used.parts.len()), ("swap", device.len(), 0));
    assert_eq!(used.map.extent_at(Bytes::new(4096)), crate::map::Extent { end: device.len(), kind: ExtentKind::Free });
}

#[test]
fn nothing_is_free_on_a_device_with_a_second_signature() {
    for (at, signature) in [
        (65536 + 64, &b"_BHRfS_M"[..]),
        (512, b"LABELONE"),
        (0, b"LUKS\xba\xbe"),
        (4096, b"\xfc\x4e\x2b\xa9"),
        (128 * 4096 - 8192, b"\xfc\x4e\x2b\xa9"),
        (128 * 4096 - 65536, b"\xfc\x4e\x2b\xa9"),
        (0x4_0000, b"SKUL\xba\xbe"),
        (4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
        (128 * 1024, b"\x0c\xb1\xba\0\0\0\0\0"),
        (128 * 4096 - 1024, b"\0\0\0\0\0\xba\xb1\x0c"),
    ] {
        let mut device = swap_area();
        device.0[at..at + signature.len()].copy_from_slice(signature);
        let refused = used_space(&device).err().map(|reason| reason.to_string());
        assert!(refused.is_some_and(|text| text.contains("signatures")), "{signature:?} at {at}");
    }
}

#[test]
fn a_device_of_any_length_has_an_answer() {
    for len in [0, 1, 511, 512, 4095, 4096, 65535, 65536, 70_000, 128 << 10, 300 << 10] {
        for byte in [0, 0x55, 0xff] {
            assert!(used_space(&MemoryDevice(vec![byte; len])).is_err());
            assert_eq!(recognise(&MemoryDevice(vec![byte; len])), None);
        }
    }
}
