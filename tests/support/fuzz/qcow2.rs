//! Virtual qcow2 images of any extents.
//!
//! Invariant: any extents and any length give a layout or an error. The parts of an image follow each other without gaps. Each
//! byte of the device that a part names has its position there, and each byte that is data has a position at all. Metadata
//! does not depend on how it is cut into reads.
//!
//! An input is the length of the device (eight bytes), the logarithm of the cluster size, the kind of the backing file, a
//! position (eight bytes), and extents: a kind, and a length of eight bytes.

use blkholefs::testing::map::ExtentKind;
use blkholefs::testing::qcow2::{Backing, BackingFormat, Builder, ClusterSize, Content, Layout};
use blkholefs::testing::units::Bytes;

/// Parts that are checked one after another.
const PARTS: usize = 64;

pub fn run(input: &[u8]) {
    let Some(([a, b, c, d, e, f, g, h, bits, backing], rest)) = input.split_first_chunk() else { return };
    let Some((position, rest)) = rest.split_first_chunk() else { return };
    let len = Bytes::new(u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]));
    let size = ClusterSize::new(Bytes::new(1 << (bits % 64)));
    let Some(size) = size.or_else(|| ClusterSize::for_block(Bytes::new(1 << (bits % 64)), len)) else { return };
    let backing = match backing % 3 {
        0 => None,
        1 => Some(Backing { name: b"older".to_vec(), format: BackingFormat::Raw }),
        _ => Some(Backing { name: vec![b'x'; 1023], format: BackingFormat::Qcow2 }),
    };
    let mut builder = Builder::new(len, size, backing);
    let (mut at, mut data) = (0_u64, Vec::new());
    for extent in rest.as_chunks::<9>().0 {
        let kind = match extent[0] % 4 {
            0 => ExtentKind::Data,
            1 => ExtentKind::Hole,
            2 => ExtentKind::Unchanged,
            _ => ExtentKind::Free,
        };
        let length = u64::from_le_bytes([1, 2, 3, 4, 5, 6, 7, 8].map(|byte| extent[byte]));
        let end = at.saturating_add(length);
        builder.push(Bytes::new(at)..Bytes::new(end), kind);
        if kind.is_data() && at < end {
            data.extend([at, at + (end - at) / 2, end - 1]);
        }
        at = end;
    }
    if at < len.get() {
        builder.push(Bytes::new(at)..len, ExtentKind::Hole);
    }
    let Ok(layout) = builder.finish() else { return };
    assert!(data.into_iter().all(|offset| layout.position_of(Bytes::new(offset)).is_some()), "data is stored");
    parts(&layout, len, Bytes::ZERO);
    let position = u64::from_le_bytes(*position);
    parts(&layout, len, Bytes::new(position % layout.len().get()));
    parts(&layout, len, Bytes::new(position));
    metadata(&layout, position % layout.len().get());
}

fn parts(layout: &Layout, len: Bytes, from: Bytes) {
    let mut at = from;
    for _ in 0..PARTS {
        let part = layout.part_at(at);
        if at >= layout.len() {
            assert_eq!(part.range, at..at);
            return;
        }
        assert!(part.range.start == at && at < part.range.end && part.range.end <= layout.len(), "{part:?}");
        if let Content::Device(offset) = part.content {
            let last = part.range.end.get() - at.get() - 1;
            let end = Bytes::new(offset.get() + last);
            assert!(end < len, "{part:?} lies in the device");
            assert_eq!(layout.position_of(offset), Some(at));
            assert_eq!(layout.position_of(end), Some(Bytes::new(at.get() + last)));
        }
        at = part.range.end;
    }
}

fn metadata(layout: &Layout, position: u64) {
    let mut whole = [1; 3000];
    layout.fill_metadata(Bytes::new(position), &mut whole);
    let mut pieces = [2; 3000];
    let (first, second) = pieces.split_at_mut((position % 2999) as usize);
    layout.fill_metadata(Bytes::new(position), first);
    layout.fill_metadata(Bytes::new(position + first.len() as u64), second);
    assert!(whole == pieces, "the metadata at {position}");
}
