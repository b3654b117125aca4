//! Parsers of the table and status lines of the targets `thin` and `thin-pool`, as the kernel prints them
//! (`Documentation/admin-guide/device-mapper/thin-provisioning.rst`).

use super::{DataBlockSize, MetaBlock, ThinId};
use crate::sys::device::DeviceId;
use crate::units::{Bytes, Sectors};

/// The arguments of `thin`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThinTable {
    /// The pool's device.
    pub pool: DeviceId,
    /// The device's number in the pool.
    pub id: ThinId,
    /// The external origin: unmapped blocks are read from it. Without one they read as zeros.
    pub origin: Option<DeviceId>,
}

/// The arguments of `thin-pool`, as far as they are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolTable {
    /// The metadata device.
    pub metadata: DeviceId,
    /// The size of a data block.
    pub block: DataBlockSize,
    /// Whether the rest of a new block is filled with zeros when a part of it is written.
    pub zeroes_new_blocks: bool,
}

/// The mapped blocks of a thin device, as its status reports them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Their size, including blocks past the end of the device.
    pub sectors: Sectors,
    /// The end of the last mapped block. Zero when no block is mapped.
    pub end: Sectors,
}

/// Whether a pool writes its metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It does. It may be out of space for data.
    ReadWrite,
    /// It does not, so the metadata on disk does not change.
    ReadOnly,
}

/// The status of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolStatus {
    /// The block of the metadata snapshot, if one is held.
    pub held_root: Option<MetaBlock>,
    /// Whether the pool writes its metadata.
    pub mode: Mode,
    /// Whether the kernel found the metadata inconsistent.
    pub needs_check: bool,
}

/// Parses the arguments of `thin`, `<pool> <device id> [<external origin>]`.
pub fn thin_table(params: &str) -> Option<ThinTable> {
    let mut words = params.split_ascii_whitespace();
    let pool = words.next()?.parse().ok()?;
    let id = ThinId::new(number(words.next()?)?.try_into().ok()?)?;
    let origin = words.next().map(|word| word.parse().ok());
    if words.next().is_some() || origin == Some(None) {
        return None;
    }
    Some(ThinTable { pool, id, origin: origin.flatten() })
}

/// Parses the arguments of `thin-pool`, `<metadata> <data> <block size> <low water mark> <number of features> <features>`.
pub fn pool_table(params: &str) -> Option<PoolTable> {
    let mut words = params.split_ascii_whitespace();
    let metadata = words.next()?.parse().ok()?;
    let _data: DeviceId = words.next()?.parse().ok()?;
    let block = DataBlockSize::new(Sectors::new(number(words.next()?)?))?;
    let zeroes_new_blocks = !words.any(|word| word == "skip_block_zeroing");
    Some(PoolTable { metadata, block, zeroes_new_blocks })
}

/// Parses the status of `thin`, `<mapped sectors> <highest mapped sector or ->`. `None` for `Fail`, `Error` and any
/// other text.
pub fn thin_status(status: &str) -> Option<Mapped> {
    let mut words = status.split_ascii_whitespace();
    let sectors = Sectors::new(number(words.next()?)?);
    let end = match words.next()? {
        "-" => 0,
        highest => number(highest)?.checked_add(1)?,
    };
    if words.next().is_some() || sectors.get() > end {
        return None;
    }
    Some(Mapped { sectors, end: Sectors::new(end) })
}

/// Parses the status of `thin-pool`, `<transaction id> <used>/<total> <used>/<total> <held root or -> <mode> ...`.
///
/// # Errors
/// The status itself, when it is that of a pool whose metadata must not be read, such as `Fail`, or is not understood.
pub fn pool_status(status: &str) -> Result<PoolStatus, String> {
    try_pool_status(status).ok_or_else(|| status.trim().to_owned())
}

fn try_pool_status(status: &str) -> Option<PoolStatus> {
    let words: Vec<&str> = status.split_ascii_whitespace().collect();
    let [transaction, metadata, data, held, mode, options @ ..] = &words[..] else { return None };
    number(transaction)?;
    for usage in [metadata, data] {
        let (used, total) = usage.split_once('/')?;
        number(used)?;
        number(total)?;
    }
    let held_root = match *held {
        "-" => None,
        block => Some(MetaBlock::new(number(block).filter(|block| *block != 0)?)),
    };
    let mode = match *mode {
        "rw" | "out_of_data_space" => Mode::ReadWrite,
        "ro" => Mode::ReadOnly,
        _ => return None,
    };
    Some(PoolStatus { held_root, mode, needs_check: options.contains(&"needs_check") })
}

/// Parses a number as the kernel prints it: `FromStr` alone would accept a sign.
fn number(word: &str) -> Option<u64> {
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok())?
}

impl Mapped {
    /// The size of the mapped blocks inside a device of `len` bytes. `None` when the status does not determine it: if
    /// blocks past the end of the device are mapped, the status has only the size of both together.
    pub fn inside(&self, len: Bytes, block: DataBlockSize) -> Option<Bytes> {
        let (bytes, end) = (self.sectors.bytes()?, self.end.bytes()?);
        let overhang = end.saturating_sub(len);
        (overhang < block.bytes()).then(|| bytes.saturating_sub(overhang))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: DeviceId = DeviceId { major: 254, minor: 300 };

    fn id(id: u32) -> ThinId {
        ThinId::new(id).unwrap()
    }

    #[test]
    fn the_table_of_a_thin_device() {
        let table = |origin| Some(ThinTable { pool: POOL, id: id(7), origin });
        assert_eq!(thin_table("254:300 7"), table(None));
        assert_eq!(thin_table(" 254:300  7\n"), table(None));
        assert_eq!(thin_table("254:300 7 7:1"), table(Some(DeviceId { major: 7, minor: 1 })));
        for text in
            ["", "254:300", "254:300 16777216", "254:300 -1", "254:300 +1", "254 7", "254:300 7 /dev/x", "1:1 1 1:1 1"]
        {
            assert_eq!(thin_table(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_table_of_a_pool() {
        let table = pool_table("7:1 7:0 384 1024 2 skip_block_zeroing no_discard_passdown").unwrap();
        assert_eq!(table.metadata, DeviceId { major: 7, minor: 1 });
        assert_eq!(table.block.bytes(), Bytes::new(192 << 10));
        assert!(!table.zeroes_new_blocks);
        assert!(pool_table("7:1 7:0 384 1024 1 no_discard_passdown").unwrap().zeroes_new_blocks);
        for text in ["", "7:1", "7:1 7:0", "7:1 7:0 100", "7:1 x 128", "x 7:0 128", "7:1 7:0 99999999999999999999"] {
            assert_eq!(pool_table(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_status_of_a_thin_device() {
        let mapped = |sectors, end| Some(Mapped { sectors: Sectors::new(sectors), end: Sectors::new(end) });
        assert_eq!(thin_status("0 -"), mapped(0, 0));
        assert_eq!(thin_status("256 1279"), mapped(256, 1280));
        for text in ["", "-", "Fail", "Error", "128", "128 -", "256 100", "128 18446744073709551615", "1 2 3"] {
            assert_eq!(thin_status(text), None, "{text:?}");
        }
    }

    #[test]
    fn mapped_bytes_inside_a_device() {
        let block = DataBlockSize::new(Sectors::new(128)).unwrap();
        let inside = |sectors, end, len| {
            let mapped = Mapped { sectors: Sectors::new(sectors), end: Sectors::new(end) };
            mapped.inside(Bytes::new(len), block).map(Bytes::get)
        };
        assert_eq!(inside(0, 0, 100), Some(0));
        assert_eq!(inside(256, 256, 131_072), Some(131_072));
        // The last block is cut by the end.
        assert_eq!(inside(256, 256, 131_071), Some(131_071));
        assert_eq!(inside(128, 1280, 600_000), Some(65_536 - 55_360));
        assert_eq!(inside(128, 1280, 9 * 65_536 + 512), Some(512));
        // A block behind the end is counted too: how many there are is not known.
        assert_eq!(inside(256, 256, 65_536), None);
        assert_eq!(inside(u64::MAX, u64::MAX, 65_536), None);
    }

    #[test]
    fn the_status_of_a_pool() {
        let line = "0 3373/32768 5000/1048576 - rw no_discard_passdown queue_if_no_space - 1024";
        let healthy = PoolStatus { held_root: None, mode: Mode::ReadWrite, needs_check: false };
        assert_eq!(pool_status(line), Ok(healthy));
        let held = pool_status(&line.replace(" - rw", " 112 out_of_data_space")).unwrap();
        assert_eq!(held, PoolStatus { held_root: Some(MetaBlock::new(112)), ..healthy });
        let broken = pool_status(&line.replace("rw", "ro").replace("space -", "space needs_check")).unwrap();
        assert_eq!(broken, PoolStatus { mode: Mode::ReadOnly, needs_check: true, ..healthy });
        // Kernels before 4.3 end the line after the mode's options.
        assert_eq!(pool_status("1 2/3 4/5 - rw discard_passdown"), Ok(healthy));
        for text in
            ["", "Fail", "Error", "0 1/2 3/4 -", "0 1/2 3/4 0 rw", "0 1/2 3 - rw", "x 1/2 3/4 - rw", "0 1/2 3/4 - new"]
        {
            assert_eq!(pool_status(text), Err(text.to_owned()));
        }
    }

    #[test]
    fn no_text_makes_a_parser_panic() {
        let words =
            ["0", "-", "7:1", "Fail", "1/2", "18446744073709551615", "rw", "needs_check", "\u{fe}", "99999999999:1"];
        let mut state = 1_u64;
        for _ in 0..20_000 {
            let mut text = String::new();
            for _ in 0..state % 9 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                text += words[usize::try_from(state >> 33).unwrap() % words.len()];
                text.push(' ');
            }
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if let Some(mapped) = thin_status(&text) {
                let block = DataBlockSize::new(Sectors::new(128)).unwrap();
                let inside = mapped.inside(Bytes::new(state), block);
                assert!(inside.is_none_or(|inside| inside <= Bytes::new(state)), "{text}");
            }
            let _ = (thin_table(&text), pool_table(&text), pool_status(&text));
        }
    }
}
