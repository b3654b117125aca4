//! Makes images of thin metadata: with `thin_restore`, an independent implementation of the format, or by hand,
//! where a test needs shapes and damage that no tool makes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

/// Bytes of a metadata block.
pub const BLOCK: usize = 4096;
/// Sectors of a data block in the images made here.
pub const DATA_BLOCK_SECTORS: u32 = 128;
/// The checksum salt of a superblock.
pub const SUPERBLOCK: u32 = 160_774;
/// The checksum salt of a tree's node.
pub const NODE: u32 = 121_107;

/// A thin device: its id and its mapped blocks, ascending, each with the data block that it maps to.
#[derive(Clone, Debug)]
pub struct Device {
    pub id: u32,
    pub mappings: Vec<(u64, u64)>,
}

impl Device {
    /// A device that maps `ranges`, to data blocks in order from `data` on.
    pub fn new(id: u32, ranges: impl IntoIterator<Item = Range<u64>>, data: u64) -> Self {
        Self { id, mappings: ranges.into_iter().flatten().zip(data..).collect() }
    }

    /// The mapped ranges.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (block, _) in &self.mappings {
            match ranges.last_mut() {
                Some(last) if last.end == *block => last.end += 1,
                _ => ranges.push(*block..block + 1),
            }
        }
        ranges
    }
}

/// The devices in the XML that `thin_restore` reads. Runs of blocks that are contiguous on both sides become one range.
pub fn xml(devices: &[Device]) -> String {
    let data_blocks = devices.iter().flat_map(|device| &device.mappings).map(|(_, data)| data + 1).max().unwrap_or(1);
    let mut xml = format!(
        "<superblock uuid=\"\" time=\"1\" transaction=\"1\" version=\"2\" data_block_size=\"{DATA_BLOCK_SECTORS}\" \
         nr_data_blocks=\"{data_blocks}\">\n"
    );
    for device in devices {
        let (id, mapped) = (device.id, device.mappings.len());
        writeln!(
            xml,
            "<device dev_id=\"{id}\" mapped_blocks=\"{mapped}\" transaction=\"0\" creation_time=\"0\" snap_time=\"1\">"
        )
        .unwrap();
        for run in device.mappings.chunk_by(|a, b| a.0 + 1 == b.0 && a.1 + 1 == b.1) {
            let ((origin, data), length) = (run[0], run.len());
            writeln!(
                xml,
                "<range_mapping origin_begin=\"{origin}\" data_begin=\"{data}\" length=\"{length}\" time=\"0\"/>"
            )
            .unwrap();
        }
        xml.push_str("</device>\n");
    }
    xml + "</superblock>\n"
}

/// Writes `xml` into the image at `path` with `thin_restore`, as metadata of `blocks` blocks.
pub fn restore(xml: &str, blocks: u64, path: &Path) {
    let mut input = tempfile::NamedTempFile::new().unwrap();
    input.write_all(xml.as_bytes()).unwrap();
    std::fs::File::create(path).unwrap().set_len(blocks * BLOCK as u64).unwrap();
    let output = Command::new("thin_restore").arg("-i").arg(input.path()).arg("-o").arg(path).output().unwrap();
    assert!(output.status.success(), "thin_restore: {}", String::from_utf8_lossy(&output.stderr));
}

/// What `thin_dump` finds in the image at `path`: each device's mapped ranges, merged.
pub fn dump(path: &Path) -> Vec<(u32, Vec<Range<u64>>)> {
    let output = Command::new("thin_dump").arg(path).output().unwrap();
    assert!(output.status.success(), "thin_dump: {}", String::from_utf8_lossy(&output.stderr));
    let mut devices: Vec<(u32, Vec<Range<u64>>)> = Vec::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let number = |name: &str| -> Option<u64> {
            let rest = line.split_once(&format!(" {name}=\""))?.1;
            rest.split_once('"')?.0.parse().ok()
        };
        if let Some(id) = number("dev_id") {
            devices.push((id.try_into().unwrap(), Vec::new()));
        } else if let Some(first) = number("origin_begin").or_else(|| number("origin_block")) {
            let end = first + number("length").unwrap_or(1);
            let ranges = &mut devices.last_mut().unwrap().1;
            match ranges.last_mut() {
                Some(last) if last.end == first => last.end = end,
                _ => ranges.push(first..end),
            }
        }
    }
    devices
}

/// Writes a little-endian number of `size` bytes.
pub fn put(image: &mut [u8], at: usize, value: u64, size: usize) {
    image[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
}

/// Reads a little-endian number of `size` bytes.
pub fn get(image: &[u8], at: usize, size: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&image[at..at + size]);
    u64::from_le_bytes(bytes)
}

/// Makes the checksum of block `number` right for a block of the kind that `salt` stands for.
pub fn stamp(image: &mut [u8], number: usize, salt: u32) {
    let block = &mut image[number * BLOCK..][..BLOCK];
    let sum = !crc32c::crc32c(&block[4..]) ^ salt;
    block[..4].copy_from_slice(&sum.to_le_bytes());
}

/// An image made by hand: devices in trees with at most `fill` entries to a node.
pub fn build(devices: &[Device], fill: usize) -> Vec<u8> {
    let mut image = vec![0; BLOCK];
    let roots = devices.iter().map(|device| {
        let mapped = device.mappings.len() as u64;
        (device.id, mapping_tree(&mut image, &device.mappings, fill), mapped)
    });
    let roots: Vec<_> = roots.collect();
    for (at, value, size) in
        [(32, 27_022_010, 8), (40, 2, 4), (64, 1 << 30, 8), (336, u64::from(DATA_BLOCK_SECTORS), 4), (340, 8, 4)]
    {
        put(&mut image, at, value, size);
    }
    set_devices(&mut image, &roots, fill);
    let blocks = (image.len() / BLOCK) as u64;
    put(&mut image, 344, blocks, 8);
    stamp(&mut image, 0, SUPERBLOCK);
    image
}

/// Appends a mapping tree; the block of its root.
pub fn mapping_tree(image: &mut Vec<u8>, mappings: &[(u64, u64)], fill: usize) -> u64 {
    let values = mappings.iter().map(|(key, data)| (*key, (data << 24).to_le_bytes().to_vec()));
    tree(image, values.collect(), 8, fill)
}

/// Makes these the devices of an image: ids, roots of mapping trees, and numbers of mappings.
pub fn set_devices(image: &mut Vec<u8>, devices: &[(u32, u64, u64)], fill: usize) {
    let top = devices.iter().map(|(id, root, _)| (u64::from(*id), root.to_le_bytes().to_vec())).collect();
    let details = devices.iter().map(|(id, _, mapped)| {
        let mut value = mapped.to_le_bytes().to_vec();
        value.resize(24, 0);
        (u64::from(*id), value)
    });
    let details = details.collect();
    let (top, details) = (tree(image, top, 8, fill), tree(image, details, 24, fill));
    put(image, 320, top, 8);
    put(image, 328, details, 8);
    stamp(image, 0, SUPERBLOCK);
}

/// Appends the nodes of a tree that has other values than the one with the given root, and shares all other nodes with it:
/// the block of its root. `None` takes a mapping away.
pub fn changed_tree(image: &mut Vec<u8>, root: u64, changes: &[(u64, Option<u64>)], fill: usize) -> u64 {
    let mut nodes = changed_nodes(image, root, changes, fill);
    while nodes.len() > 1 {
        let entries: Vec<_> = nodes.iter().map(|(key, node)| (*key, node.to_le_bytes().to_vec())).collect();
        nodes = append_nodes(image, 1, &entries, fill);
    }
    nodes.first().map_or_else(|| node(image, 2, 8, &[]), |(_, root)| *root)
}

/// The nodes that take the place of a node: the first key and the block of each.
fn changed_nodes(image: &mut Vec<u8>, number: u64, changes: &[(u64, Option<u64>)], fill: usize) -> Vec<(u64, u64)> {
    let base = usize::try_from(number).unwrap() * BLOCK;
    let (kind, count) = (get(image, base + 4, 4), usize::try_from(get(image, base + 16, 4)).unwrap());
    let values = base + 32 + 8 * usize::try_from(get(image, base + 20, 4)).unwrap();
    let old: Vec<(u64, u64)> =
        (0..count).map(|at| (get(image, base + 32 + 8 * at, 8), get(image, values + 8 * at, 8))).collect();
    if kind == 2 {
        let mut entries: BTreeMap<u64, u64> = old.into_iter().collect();
        for (key, value) in changes {
            match value {
                Some(value) => entries.insert(*key, *value),
                None => entries.remove(key),
            };
        }
        let entries: Vec<_> = entries.iter().map(|(key, value)| (*key, value.to_le_bytes().to_vec())).collect();
        return append_nodes(image, 2, &entries, fill);
    }
    let mut entries = Vec::new();
    for (at, (key, child)) in old.iter().enumerate() {
        let start = if at == 0 { 0 } else { changes.partition_point(|(changed, _)| changed < key) };
        let end = old.get(at + 1).map_or(changes.len(), |(next, _)| changes.partition_point(|(key, _)| key < next));
        match &changes[start..end] {
            [] => entries.push((*key, *child)),
            these => entries.extend(changed_nodes(image, *child, these, fill)),
        }
    }
    let entries: Vec<_> = entries.iter().map(|(key, child)| (*key, child.to_le_bytes().to_vec())).collect();
    append_nodes(image, 1, &entries, fill)
}

/// Appends nodes of one level, as few as hold these entries; none for no entries.
fn append_nodes(image: &mut Vec<u8>, kind: u64, entries: &[(u64, Vec<u8>)], fill: usize) -> Vec<(u64, u64)> {
    let each = entries.len().div_ceil(entries.len().div_ceil(fill).max(1)).max(1);
    entries.chunks(each).map(|these| (these[0].0, node(image, kind, 8, these))).collect()
}

/// Appends a tree's nodes; the block of its root.
fn tree(image: &mut Vec<u8>, mut entries: Vec<(u64, Vec<u8>)>, value_size: usize, fill: usize) -> u64 {
    let (mut kind, mut size) = (2, value_size);
    loop {
        let mut parents = Vec::new();
        let mut rest = &entries[..];
        loop {
            let (these, others) = rest.split_at(rest.len().min(fill));
            let first = these.first().map_or(0, |(key, _)| *key);
            parents.push((first, node(image, kind, size, these).to_le_bytes().to_vec()));
            rest = others;
            if rest.is_empty() {
                break;
            }
        }
        if let [(_, root)] = &parents[..] {
            return get(root, 0, 8);
        }
        (entries, kind, size) = (parents, 1, 8);
    }
}

/// Appends one node; its block.
fn node(image: &mut Vec<u8>, kind: u64, value_size: usize, entries: &[(u64, Vec<u8>)]) -> u64 {
    let (number, start) = (image.len() / BLOCK, image.len());
    image.resize(start + BLOCK, 0);
    let max = (BLOCK - 32) / (8 + value_size) / 3 * 3;
    for (at, value) in [(4, kind), (16, entries.len() as u64), (20, max as u64), (24, value_size as u64)] {
        put(image, start + at, value, 4);
    }
    put(image, start + 8, number as u64, 8);
    for (index, (key, value)) in entries.iter().enumerate() {
        put(image, start + 32 + 8 * index, *key, 8);
        let at = start + 32 + 8 * max + value_size * index;
        image[at..at + value_size].copy_from_slice(value);
    }
    stamp(image, number, NODE);
    number as u64
}

/// Moves the nodes of two trees of the same size, each given top down, so that they alternate on disk, leaves first.
pub fn interleave(image: &mut [u8], one: &[usize], two: &[usize]) {
    let order: Vec<usize> = one.iter().rev().zip(two.iter().rev()).flat_map(|(one, two)| [*one, *two]).collect();
    arrange(image, &order);
}

/// Moves nodes, which must be complete trees, so that they are on disk in this order. Their blocks remain the same ones.
pub fn arrange(image: &mut [u8], order: &[usize]) {
    let mut places = order.to_vec();
    places.sort_unstable();
    let place_of = |node: u64| {
        let node = usize::try_from(node).unwrap();
        order.iter().position(|at| *at == node).map_or(node, |at| places[at]) as u64
    };
    let old = image.to_vec();
    for (place, node) in places.iter().zip(order) {
        image[place * BLOCK..][..BLOCK].copy_from_slice(&old[node * BLOCK..][..BLOCK]);
        put(image, place * BLOCK + 8, *place as u64, 8);
    }
    let top = usize::try_from(get(image, 320, 8)).unwrap();
    for number in places.iter().copied().chain([top]) {
        let base = number * BLOCK;
        let is_internal = get(image, base + 4, 4) == 1;
        for entry in (0..usize::try_from(get(image, base + 16, 4)).unwrap()).filter(|_| is_internal || number == top) {
            let at = base + 32 + 8 * 252 + 8 * entry;
            let moved = place_of(get(image, at, 8));
            put(image, at, moved, 8);
        }
        stamp(image, number, NODE);
    }
}
