//! The used and the free space of a swap area.
//!
//! A swap area keeps nothing over a restart, unless the system was suspended to it. Its first page holds the header (`union
//! swap_header` of `include/linux/swap.h`, written by `mkswap`), which is data. The other pages up to the last page that the
//! header names are free. What lies behind the last page is data, and bad pages are data too, as they are no swap space.
//!
//! Suspending changes the signature, and resuming restores it (`kernel/power/swap.c`). So an area with the signature of
//! `mkswap` holds no image that can be resumed. The kernel holds a swap area that it uses exclusively, and the caller of this
//! module does the same.

use std::ops::Range;

use super::ReadBytes;
use super::fields::{has_at, u32_at};
use crate::map::{Block, FillBuilder, FillMap};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The sizes that a page can have (`PAGE_SIZE` of the architectures of Linux). The signature is at the end of the first page.
const PAGE_SIZES: [usize; 5] = [4096, 8192, 16384, 32768, 65536];
/// The length of a signature (`magic` of `union swap_header`).
const SIGNATURE_LEN: usize = 10;
/// The signature of an area that holds no image of a suspended system (`SWAP_SIGNATURE_V2` of util-linux).
const SIGNATURE: &[u8] = b"SWAPSPACE2";
/// Other signatures at the same place, and what each is: `kernel/power/swap.c` (`HIBERNATE_SIG`), and the kinds that
/// libblkid (`superblocks/swap.c`) lists.
const OTHER_SIGNATURES: [(&[u8], &str); 7] = [
    (b"SWAP-SPACE", "it is a swap area of version 0"),
    (b"S1SUSPEND", "it holds an image of a suspended system"),
    (b"S2SUSPEND", "it holds an image of a suspended system"),
    (b"ULSUSPEND", "it holds an image of a suspended system"),
    (b"LINHIB0001", "it holds an image of a suspended system"),
    (b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c", "it holds an image of a suspended system"),
    (b"2ECAPSPAWS", "it is a swap area of a foreign byte order"),
];
/// Positions of the fields (`struct info` of `union swap_header`).
const VERSION: usize = 1024;
const LAST_PAGE: usize = 1028;
const BAD_PAGES: usize = 1032;
const FIRST_BAD_PAGE: usize = 1536;

/// The header of a swap area.
struct Header {
    page_size: u32,
    /// The index of the last page of the area. Page 0 is the header.
    last_page: u32,
    /// The indexes of pages that cannot be used.
    bad_pages: Vec<u32>,
}

/// Whether a device that begins with `head` is a swap area, in use for a suspended system or not.
pub fn is_swap(head: &[u8]) -> bool {
    signatures(head).next().is_some()
}

/// The used space of a swap area.
///
/// # Errors
/// When it holds the image of a suspended system, when its header is not that of `mkswap`, or when it cannot be read.
pub fn used(device: &dyn ReadBytes) -> Result<FillMap, DenseReason> {
    let len = device.len();
    let mut head = vec![0; usize::try_from(len.get()).unwrap_or(usize::MAX).min(65536)];
    device.read_exact(Bytes::ZERO, &mut head).map_err(|error| DenseReason::cannot("read its header", &error))?;
    let header = parse(&head)?;
    let page_size = Bytes::new(u64::from(header.page_size));
    let end = u64::from(header.last_page) + 1;
    if end > len.get() / page_size.get() {
        return Err(DenseReason::Damaged("its header names pages behind its end".into()));
    }
    let builder = FillBuilder::new(len, page_size);
    let mut filler = builder.filler();
    let mut mark = |pages: Range<u64>| filler.set_range(Block::new(pages.start)..Block::new(pages.end));
    mark(0..1);
    mark(end..u64::MAX);
    header.bad_pages.iter().for_each(|&page| mark(u64::from(page)..u64::from(page) + 1));
    builder.finish().ok_or_else(|| "it has too many pages".into())
}

/// The signatures in `head`, each with the size of the page that ends with it.
fn signatures(head: &[u8]) -> impl Iterator<Item = (u32, &'static [u8])> {
    let known = || std::iter::once(SIGNATURE).chain(OTHER_SIGNATURES.iter().map(|&(signature, _)| signature));
    let at = move |size: usize| known().find(|signature| has_at(head, size - SIGNATURE_LEN, signature));
    PAGE_SIZES.into_iter().filter_map(move |size| Some((size as u32, at(size)?)))
}

/// Parses the header in the first 64 KiB of a device.
fn parse(head: &[u8]) -> Result<Header, DenseReason> {
    let mut found = signatures(head);
    let (page_size, signature) = found.next().ok_or("it is no swap area")?;
    if found.next().is_some() {
        return Err("it has the signatures of two swap areas".into());
    }
    if let Some((_, what)) = OTHER_SIGNATURES.iter().find(|(other, _)| *other == signature) {
        return Err((*what).into());
    }
    let (version, last_page, count) = (u32_at(head, VERSION), u32_at(head, LAST_PAGE), u32_at(head, BAD_PAGES));
    if version != 1 {
        return Err(format!("it is a swap area of version {version}").into());
    }
    if last_page == 0 {
        return Err(DenseReason::Damaged("its header names no pages".into()));
    }
    // `MAX_SWAP_BADPAGES` of `include/linux/swap.h`.
    let most = (page_size as usize - SIGNATURE_LEN - FIRST_BAD_PAGE) / 4;
    let count = usize::try_from(count).ok().filter(|&count| count <= most);
    let count = count.ok_or(DenseReason::Damaged("its list of bad pages is too long".into()))?;
    let bad_pages: Vec<_> = (0..count).map(|index| u32_at(head, FIRST_BAD_PAGE + 4 * index)).collect();
    if bad_pages.iter().any(|&page| page == 0 || page > last_page) {
        return Err(DenseReason::Damaged("its list of bad pages names a page outside of it".into()));
    }
    Ok(Header { page_size, last_page, bad_pages })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filesystem::memory::MemoryDevice;
    use crate::map::{ExtentKind, HoleMap as _, view};

    /// A swap area of `pages` pages of `page_size` bytes, and `tail` bytes more.
    fn area(page_size: usize, pages: u32, tail: usize) -> MemoryDevice {
        let mut bytes = vec![0x55; page_size * pages as usize + tail];
        bytes[..page_size].fill(0);
        bytes[VERSION..VERSION + 4].copy_from_slice(&1_u32.to_le_bytes());
        bytes[LAST_PAGE..LAST_PAGE + 4].copy_from_slice(&(pages - 1).to_le_bytes());
        bytes[page_size - SIGNATURE_LEN..page_size].copy_from_slice(SIGNATURE);
        MemoryDevice(bytes)
    }

    fn holes(device: &MemoryDevice) -> Vec<(u64, u64)> {
        let map = used(device).expect("a good swap area");
        let runs = view::runs(&map, Bytes::new(1), Bytes::ZERO..map.len());
        let holes = runs.filter(|(_, extent)| extent.kind == ExtentKind::Hole);
        holes.map(|(start, extent)| (start.get(), extent.end.get())).collect()
    }

    #[test]
    fn all_but_the_header_and_what_is_behind_the_end_is_free() {
        for page_size in PAGE_SIZES {
            let size = page_size as u64;
            assert_eq!(holes(&area(page_size, 10, 0)), [(size, 10 * size)]);
            assert_eq!(holes(&area(page_size, 10, 5000)), [(size, 10 * size)]);
        }
    }

    #[test]
    fn bad_pages_are_data() {
        let mut device = area(4096, 10, 0);
        device.0[BAD_PAGES] = 2;
        device.0[FIRST_BAD_PAGE] = 3;
        device.0[FIRST_BAD_PAGE + 4] = 9;
        assert_eq!(holes(&device), [(4096, 3 * 4096), (4 * 4096, 9 * 4096)]);
        device.0[FIRST_BAD_PAGE + 4] = 10;
        assert!(used(&device).is_err());
    }

    #[test]
    fn anything_else_is_refused() {
        let refused = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut device = area(4096, 32, 0);
            change(&mut device.0);
            used(&device).err().map(|reason| reason.to_string())
        };
        assert_eq!(refused(&|_| ()), None);
        for (signature, _) in OTHER_SIGNATURES {
            let change = |bytes: &mut Vec<u8>| bytes[4086..4086 + signature.len()].copy_from_slice(signature);
            assert!(refused(&change).is_some(), "{signature:?}");
        }
        assert!(refused(&|bytes| bytes[VERSION] = 2).is_some_and(|text| text.contains("version 2")));
        assert!(refused(&|bytes| bytes[LAST_PAGE] = 32).is_some_and(|text| text.contains("behind its end")));
        assert!(refused(&|bytes| bytes[LAST_PAGE] = 0).is_some());
        assert!(refused(&|bytes| bytes[BAD_PAGES + 1] = 0x10).is_some());
        assert!(refused(&|bytes| bytes[8182..8192].copy_from_slice(SIGNATURE)).is_some());
        assert!(refused(&|bytes| bytes[4086] = 0).is_some());
        assert!(refused(&|bytes| bytes.truncate(100)).is_some());
    }
}
