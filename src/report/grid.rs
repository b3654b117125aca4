//! A device as a grid of cells, each for the same number of bytes, which the forms `picture` and `svg` draw.

use std::io;
use std::ops::Range;

use super::{Extents, human};
use crate::map::ExtentKind;
use crate::units::Bytes;

/// The bytes of the smallest cell: the block size of most file systems.
const SMALLEST_CELL: u64 = 4096;

/// What a picture is of.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    /// The device, as one line of text.
    pub name: &'a str,
    /// The older device, for a map of changes.
    pub older: Option<&'a str>,
    /// The length of the device.
    pub len: Bytes,
    /// The range of the picture, which does not end behind the device.
    pub range: &'a Range<Bytes>,
}

/// How full a cell is. Of a map of changes, how much of it changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shade {
    /// No data: all of the cell is a hole, or is unchanged.
    Empty,
    /// Some data, up to a third of the cell.
    Light,
    /// Data in up to two thirds.
    Medium,
    /// More data, but not only data.
    Dark,
    /// Only data.
    Full,
    /// Of a map of changes: no changed data, and zeros in a part of the cell.
    PartlyZero,
    /// Of a map of changes: only zeros.
    Zero,
}

impl Shade {
    /// The shades of a map of data and holes, with what each one means.
    const OF_MAP: [(Self, &'static str); 5] = [
        (Self::Empty, "hole"),
        (Self::Light, "up to 1/3 data"),
        (Self::Medium, "up to 2/3"),
        (Self::Dark, "more"),
        (Self::Full, "all data"),
    ];

    /// The shades of a map of changes.
    const OF_CHANGES: [(Self, &'static str); 7] = [
        (Self::Empty, "unchanged"),
        (Self::Light, "up to 1/3 changed"),
        (Self::Medium, "up to 2/3"),
        (Self::Dark, "more"),
        (Self::Full, "all changed"),
        (Self::PartlyZero, "partly zeros now"),
        (Self::Zero, "all zeros now"),
    ];
}

/// The bytes of a range that are not data.
#[derive(Clone, Copy, Debug, Default)]
struct Rest {
    holes: u64,
    unchanged: u64,
}

impl Rest {
    /// What is no hole and not unchanged is data, also where the map had no extent: any doubt is data.
    fn data(self, len: u64) -> u64 {
        len.saturating_sub(self.holes).saturating_sub(self.unchanged)
    }

    fn add(&mut self, kind: ExtentKind, bytes: u64) {
        let sum = match kind {
            ExtentKind::Data => return,
            ExtentKind::Unchanged => &mut self.unchanged,
            ExtentKind::Hole | ExtentKind::Free => &mut self.holes,
        };
        *sum = sum.saturating_add(bytes);
    }
}

/// A range of a device as cells, in rows from left to right.
pub struct Grid {
    range: Range<u64>,
    cell: u64,
    columns: usize,
    cells: Vec<Rest>,
    all: Rest,
    is_since: bool,
}

impl Grid {
    /// Adds up the extents in a grid that has `columns` cells in a row and `rows` rows at most. A cell is a power of two of
    /// bytes, so that it can be named in a short way. The memory depends on the number of cells, and not on that of the extents.
    ///
    /// # Errors
    /// What `extents` returns.
    pub fn of(scene: &Scene<'_>, columns: usize, rows: usize, extents: Extents<'_>) -> io::Result<Self> {
        let range = scene.range.start.get()..scene.range.end.get().max(scene.range.start.get());
        let len = range.end - range.start;
        let most = (columns.max(1) as u64).saturating_mul(rows.max(1) as u64);
        let cell = len.div_ceil(most).max(SMALLEST_CELL).checked_next_power_of_two().unwrap_or(1 << 63);
        let count = usize::try_from(len.div_ceil(cell)).unwrap_or(usize::MAX);
        let mut grid = Self {
            range,
            cell,
            columns: columns.max(1),
            cells: vec![Rest::default(); count],
            all: Rest::default(),
            is_since: scene.older.is_some(),
        };
        for extent in extents {
            let (start, extent) = extent?;
            grid.add(start.get()..extent.end.get(), extent.kind);
        }
        Ok(grid)
    }

    fn add(&mut self, extent: Range<u64>, kind: ExtentKind) {
        let (start, end) = (extent.start.max(self.range.start), extent.end.min(self.range.end));
        self.all.add(kind, end.saturating_sub(start));
        let first = start.saturating_sub(self.range.start) / self.cell;
        for (index, cell) in self.cells.iter_mut().enumerate().skip(usize::try_from(first).unwrap_or(usize::MAX)) {
            let bounds = bounds(&self.range, self.cell, index);
            if bounds.start >= end {
                break;
            }
            cell.add(kind, end.min(bounds.end).saturating_sub(start.max(bounds.start)));
        }
    }

    /// The bytes of a cell. The last cell may have fewer.
    pub fn cell(&self) -> Bytes {
        Bytes::new(self.cell)
    }

    /// The rows: the position at which each one begins, and its cells.
    pub fn rows(&self) -> impl Iterator<Item = (Bytes, impl Iterator<Item = Shade> + '_)> + '_ {
        self.cells.chunks(self.columns).enumerate().map(move |(row, cells)| {
            let first = row * self.columns;
            let shades = cells.iter().enumerate().map(move |(column, cell)| self.shade(*cell, first + column));
            (Bytes::new(bounds(&self.range, self.cell, first).start), shades)
        })
    }

    fn shade(&self, cell: Rest, index: usize) -> Shade {
        let bounds = bounds(&self.range, self.cell, index);
        let len = bounds.end - bounds.start;
        // Of a map without changes, a view may have unchanged ranges, which are holes.
        let (data, zeros) = (u128::from(cell.data(len)), if self.is_since { cell.holes } else { 0 });
        let len = u128::from(len);
        match (data, zeros) {
            (0, 0) => Shade::Empty,
            (0, zeros) if u128::from(zeros) < len => Shade::PartlyZero,
            (0, _) => Shade::Zero,
            _ if data * 3 <= len => Shade::Light,
            _ if data * 3 <= len * 2 => Shade::Medium,
            _ if data < len => Shade::Dark,
            _ => Shade::Full,
        }
    }

    /// Each shade that a cell may have, with what it means.
    pub fn legend(&self) -> &'static [(Shade, &'static str)] {
        if self.is_since { &Shade::OF_CHANGES } else { &Shade::OF_MAP }
    }

    /// What the picture is of, in one line.
    pub fn title(&self, scene: &Scene<'_>) -> String {
        let changes = scene.older.map(|older| format!(", changes since {older}")).unwrap_or_default();
        format!("{}{changes}", scene.name)
    }

    /// The length of the device, the range if it is a part of the device, and what a cell stands for.
    pub fn measure(&self, scene: &Scene<'_>) -> String {
        let len = human(scene.len);
        let part = match self.range.end - self.range.start == scene.len.get() {
            true => String::new(),
            false => {
                let (start, end) = (human(Bytes::new(self.range.start)), human(Bytes::new(self.range.end)));
                format!(", of which {start} to {end}")
            }
        };
        format!("{len}{part}, one cell is {}", human(self.cell()))
    }

    /// The sum of each kind: `data 1.5GiB (15.0%)`.
    pub fn sums(&self) -> Vec<String> {
        let len = self.range.end - self.range.start;
        let data = self.all.data(len);
        let sums = match self.is_since {
            true => {
                vec![("changed data", data), ("zeros now", self.all.holes), ("unchanged", self.all.unchanged)]
            }
            false => vec![("data", data), ("holes", len - data)],
        };
        sums.into_iter()
            .map(|(name, sum)| format!("{name} {} ({})", human(Bytes::new(sum)), percent(sum, len)))
            .collect()
    }
}

/// The range of the device that a cell of `cell` bytes stands for. Without a sum that may overflow: the cell may end behind
/// the last position.
fn bounds(range: &Range<u64>, cell: u64, index: usize) -> Range<u64> {
    let start = range.start.saturating_add((index as u64).saturating_mul(cell)).min(range.end);
    start..start.saturating_add(cell).min(range.end)
}

/// Tenths of a percent. Only nothing is `0.0%`, and only everything is `100.0%`.
fn percent(sum: u64, all: u64) -> String {
    let (sum, all) = (u128::from(sum), u128::from(all.max(1)));
    match (sum * 1000 + all / 2) / all {
        0 if sum > 0 => "<0.1%".to_owned(),
        1000.. if sum < all => ">99.9%".to_owned(),
        tenths => format!("{}.{}%", tenths / 10, tenths % 10),
    }
}

#[cfg(test)]
pub mod tests {
    use proptest::prelude::*;

    use super::super::tests::items;
    use super::*;

    /// The grid of a whole device with these extents.
    pub fn grid(columns: usize, rows: usize, is_since: bool, extents: &[(u64, u64, ExtentKind)]) -> Grid {
        let len = Bytes::new(extents.last().map_or(0, |extent| extent.1));
        let scene = Scene { name: "x", older: is_since.then_some("y"), len, range: &(Bytes::ZERO..len) };
        of(&scene, columns, rows, extents)
    }

    fn of(scene: &Scene<'_>, columns: usize, rows: usize, extents: &[(u64, u64, ExtentKind)]) -> Grid {
        let mut extents = items(extents);
        Grid::of(scene, columns, rows, &mut extents).unwrap()
    }

    fn shades(grid: &Grid) -> Vec<Shade> {
        grid.rows().flat_map(|(_, shades)| shades.collect::<Vec<_>>()).collect()
    }

    #[test]
    fn one_byte_is_seen_in_a_large_cell() {
        const GIB: u64 = 1 << 30;
        let data = [(0, 1, ExtentKind::Data), (1, 640 * GIB, ExtentKind::Hole)];
        let one = grid(8, 8, false, &data);
        assert_eq!(one.cell(), Bytes::new(16 * GIB));
        assert_eq!(shades(&one)[..2], [Shade::Light, Shade::Empty]);
        assert_eq!(one.sums(), ["data 1B (<0.1%)", "holes 639.9GiB (>99.9%)"]);
        let hole = [(0, 1, ExtentKind::Hole), (1, 640 * GIB, ExtentKind::Data)];
        assert_eq!(shades(&grid(8, 8, false, &hole))[..2], [Shade::Dark, Shade::Full]);
    }

    #[test]
    fn changes_have_shades_of_data_and_of_zeros() {
        let (data, zero, same) = (ExtentKind::Data, ExtentKind::Hole, ExtentKind::Unchanged);
        let extents = [
            (0, 4096, same),
            (4096, 4097, zero),
            (4097, 8192, same),
            (8192, 12288, zero),
            (12288, 12289, data),
            (12289, 16384, zero),
            (16384, 20480, data),
        ];
        let expected = [Shade::Empty, Shade::PartlyZero, Shade::Zero, Shade::Light, Shade::Full];
        assert_eq!(shades(&grid(8, 8, true, &extents)), expected);
        // In a map without changes, both kinds are holes.
        assert_eq!(shades(&grid(8, 8, false, &extents))[..3], [Shade::Empty; 3]);
    }

    #[test]
    fn what_has_no_extent_is_data() {
        let scene = Scene { name: "x", older: None, len: Bytes::new(8192), range: &(Bytes::ZERO..Bytes::new(8192)) };
        assert_eq!(shades(&of(&scene, 8, 8, &[(0, 4096, ExtentKind::Hole)])), [Shade::Empty, Shade::Full]);
    }

    #[test]
    fn sizes_at_the_limits() {
        assert_eq!(shades(&grid(8, 8, false, &[])), []);
        let whole = grid(64, 16, false, &[(0, u64::MAX, ExtentKind::Data)]);
        assert_eq!(shades(&whole), [Shade::Full; 1024]);
        assert_eq!(grid(1, 1, false, &[(0, u64::MAX, ExtentKind::Hole)]).sums()[1], "holes 15.9EiB (100.0%)");
    }

    #[test]
    fn a_part_of_a_device() {
        let range = Bytes::new(4096)..Bytes::new(3 * 4096 + 1);
        let scene = Scene { name: "x", older: None, len: Bytes::new(1 << 20), range: &range };
        let part = of(&scene, 2, 8, &[(0, 8192, ExtentKind::Data), (8192, 1 << 20, ExtentKind::Hole)]);
        assert_eq!(shades(&part), [Shade::Full, Shade::Empty, Shade::Empty]);
        assert_eq!(part.rows().map(|row| row.0.get()).collect::<Vec<_>>(), [4096, 3 * 4096]);
        assert_eq!(part.measure(&scene), "1MiB, of which 4KiB to 12KiB, one cell is 4KiB");
        assert_eq!(part.sums(), ["data 4KiB (50.0%)", "holes 4KiB (50.0%)"]);
    }

    proptest! {
        /// Each cell is compared with the extents in it, one by one.
        #[test]
        fn cells_are_as_full_as_their_extents(
            lengths in prop::collection::vec((1_u64..200_000, any::<bool>()), 1..60), columns in 1_usize..20, rows in 1_usize..9
        ) {
            let mut end = 0;
            let extents: Vec<_> = lengths.into_iter().map(|(length, is_data)| {
                end += length;
                (end - length, end, if is_data { ExtentKind::Data } else { ExtentKind::Hole })
            }).collect();
            let found = grid(columns, rows, false, &extents);
            let cells = shades(&found);
            prop_assert!(cells.len() <= columns * rows);
            prop_assert_eq!(cells.len() as u64, end.div_ceil(found.cell().get()));
            for (index, shade) in cells.into_iter().enumerate() {
                let cell = bounds(&(0..end), found.cell().get(), index);
                let within = |kind| extents.iter().filter(|it| it.2 == kind)
                    .map(|it| it.1.min(cell.end).saturating_sub(it.0.max(cell.start))).sum::<u64>();
                prop_assert_eq!(shade == Shade::Empty, within(ExtentKind::Data) == 0);
                prop_assert_eq!(shade == Shade::Full, within(ExtentKind::Hole) == 0);
                prop_assert_eq!(shade == Shade::Light, within(ExtentKind::Data) > 0 && within(ExtentKind::Data) * 3 <= cell.end - cell.start);
            }
        }
    }
}
