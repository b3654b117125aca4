//! Virtual qcow2 images, read by QEMU and by a reader of the tests' own.
// Some devices are lists of one extent.
#![allow(clippy::single_range_in_vec_init)]

use std::fs;
use std::path::Path;

use blkholefs::testing::map::ExtentKind::{self, Data, Free, Hole, Unchanged};
use blkholefs::testing::qcow2::{Backing, BackingFormat, Builder, ClusterSize, Content, Error, Layout};
use blkholefs::testing::units::Bytes;

mod common;
#[path = "support/qcow2.rs"]
mod qcow2;
use common::random::{Random, seeds};
use common::{KIB, MIB, needs, run};
use qcow2::{Extents, Reader, State, cluster, layout, read};

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const PIB: u64 = 1 << 50;

/// A device, what it was before, and its extents.
struct Device {
    now: Vec<u8>,
    before: Vec<u8>,
    extents: Extents,
}

impl Device {
    /// Extents of `kinds`, mostly of whole units, often of whole clusters. `before` has bytes everywhere.
    fn random(random: &mut Random, len: u64, cluster: u64, kinds: &[ExtentKind]) -> Self {
        let before = random.bytes(len);
        let (mut now, mut extents) = (Vec::new(), Extents::new());
        while (now.len() as u64) < len && !kinds.is_empty() {
            let start = now.len() as u64;
            let length = match random.within(0..4) {
                0 => random.within(1..4) * 512,
                1 => random.within(1..3 * cluster),
                2 => cluster - start % cluster,
                _ => random.within(1..5) * cluster - start % cluster,
            };
            let end = (start + length).min(len);
            let kind = kinds[random.within(0..kinds.len() as u64) as usize];
            match kind {
                Data => now.extend(random.bytes(end - start)),
                Hole | Free => now.resize(end as usize, 0),
                Unchanged => now.extend(&before[start as usize..end as usize]),
            }
            extents.push((start..end, kind));
        }
        Self { now, before, extents }
    }

    fn layout(&self, size: u64, backing: Option<Backing>) -> Layout {
        layout(self.now.len() as u64, size, backing, &self.extents).unwrap()
    }

    fn image(&self, layout: &Layout) -> Vec<u8> {
        read(layout, |offset| self.now[offset as usize], 0..layout.len().get())
    }

    /// Whether a cluster must be data, zeros, or neither, by the definition.
    fn expected(&self, size: u64, index: u64, backing: bool) -> &'static str {
        let (start, end) = (index * size, ((index + 1) * size).min(self.now.len() as u64));
        let kinds = self.extents.iter().filter(|(range, _)| range.start < end && start < range.end);
        let mut kinds: Vec<_> = kinds
            .map(|(_, kind)| match kind {
                Hole | Free if backing => "zero",
                Hole | Free => "unallocated",
                Unchanged if backing => "unallocated",
                Data | Unchanged => "data",
            })
            .collect();
        if backing && end % 512 != 0 {
            kinds.push("zero");
        }
        let all_same = kinds.iter().all(|kind| *kind == kinds[0]);
        if all_same { kinds[0] } else { "data" }
    }

    /// Checks each entry of the image, and that positions and offsets are inverse.
    fn check(&self, layout: &Layout, backing: bool) {
        let image = Reader::new(layout);
        let len = self.now.len() as u64;
        assert_eq!(image.size, len.next_multiple_of(512));
        let mut stored = 0;
        for index in 0..len.div_ceil(image.cluster) {
            let state = image.state(index);
            let found = match state {
                State::Data(position) => {
                    for in_cluster in [0, 1, image.cluster / 2, image.cluster - 1] {
                        let offset = Bytes::new(index * image.cluster + in_cluster);
                        let position = Bytes::new(position + in_cluster);
                        let inside = offset.get() < len;
                        assert_eq!(layout.position_of(offset), inside.then_some(position));
                        let content = if inside { Content::Device(offset) } else { Content::Zeros };
                        assert_eq!(layout.part_at(position).content, content);
                    }
                    stored += 1;
                    "data"
                }
                State::Zero => "zero",
                State::Unallocated => "unallocated",
            };
            assert_eq!(found, self.expected(image.cluster, index, backing), "cluster {index}");
            if found != "data" {
                assert_eq!(layout.position_of(Bytes::new(index * image.cluster)), None);
            }
        }
        assert_eq!(layout.data_clusters(), stored);
        let clusters = layout.len().get() / image.cluster;
        assert!((0..clusters).all(|index| image.refcount(index * image.cluster) == 1));
        assert_eq!(image.refcount(layout.len().get()), 0);
        assert_eq!(layout.position_of(Bytes::new(len)), None);
    }
}

fn backing(name: &str, format: BackingFormat) -> Option<Backing> {
    Some(Backing { name: name.into(), format })
}

/// The bytes as QEMU has them: in whole sectors.
fn write_raw(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len((bytes.len() as u64).next_multiple_of(512)).unwrap();
}

/// Checks an image with QEMU: it is clean, is `raw`, and `convert` restores `raw`.
fn check_by_qemu(folder: &Path, image: &str, raw: &str) {
    let (image, raw, restored) = (folder.join(image), folder.join(raw), folder.join("restored"));
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let check = run("qemu-img", ["check", "-f", "qcow2", "--output=json", &path(&image)]);
    let check: serde_json::Value = serde_json::from_str(&check).unwrap();
    for problem in ["leaks", "corruptions", "check-errors"] {
        assert!(check.get(problem).is_none_or(|count| count == 0), "{check}");
    }
    assert_eq!(check["image-end-offset"], fs::metadata(&image).unwrap().len(), "{check}");
    let compared = run("qemu-img", ["compare", "-f", "qcow2", "-F", "raw", &path(&image), &path(&raw)]);
    assert_eq!(compared, "Images are identical.\n");
    run("qemu-img", ["convert", "-f", "qcow2", "-O", "raw", &path(&image), &path(&restored)]);
    assert!(fs::read(&restored).unwrap() == fs::read(&raw).unwrap(), "restored");
}

/// Lengths near the borders of clusters of this size, few enough for QEMU.
fn lengths(size: u64) -> Vec<u64> {
    let mut lengths = vec![512, 1000];
    for clusters in [1, 2, if size <= 64 * KIB { 37 } else { 5 }] {
        lengths.extend([clusters * size - 512, clusters * size - 1, clusters * size, clusters * size + 512]);
    }
    lengths
}

#[test]
fn qemu_reads_the_image_of_a_device() {
    needs!(programs["qemu-img"]);
    let folder = tempfile::tempdir().unwrap();
    for seed in seeds(0, 24) {
        let random = &mut Random::new(seed);
        let size = (4 * KIB) << random.within(0..10);
        let lengths = lengths(size);
        let len = lengths[random.within(0..lengths.len() as u64) as usize];
        let kinds: &[ExtentKind] = [&[Data, Hole, Free][..], &[Data], &[Hole]][random.within(0..3) as usize];
        println!("seed {seed}: clusters of {size}, {len} bytes, {kinds:?}");
        let device = Device::random(random, len, size, kinds);
        let layout = device.layout(size, None);
        device.check(&layout, false);
        write_raw(&folder.path().join("raw"), &device.now);
        fs::write(folder.path().join("image"), device.image(&layout)).unwrap();
        check_by_qemu(folder.path(), "image", "raw");
    }
}

#[test]
fn qemu_reads_an_increment_over_a_raw_file_and_over_an_image() {
    needs!(programs["qemu-img"]);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for seed in seeds(0, 12) {
        let random = &mut Random::new(seed);
        let size = (4 * KIB) << random.within(0..10);
        let lengths = lengths(size);
        let len = lengths[random.within(0..lengths.len() as u64) as usize];
        println!("seed {seed}: clusters of {size}, {len} bytes");
        let device = Device::random(random, len, size, &[Data, Hole, Unchanged, Unchanged]);
        write_raw(&folder.path().join("before"), &device.before);
        write_raw(&folder.path().join("now"), &device.now);

        let layout = device.layout(size, backing("before", BackingFormat::Raw));
        device.check(&layout, true);
        fs::write(folder.path().join("since"), device.image(&layout)).unwrap();
        check_by_qemu(folder.path(), "since", "now");

        // The same over a full image, which is then brought up to date by `commit`.
        let whole = vec![(0..len, Data)];
        let full = qcow2::layout(len, size, None, &whole).unwrap();
        let image = read(&full, |offset| device.before[offset as usize], 0..full.len().get());
        fs::write(folder.path().join("full"), image).unwrap();
        let layout = device.layout(size, backing("full", BackingFormat::Qcow2));
        fs::write(folder.path().join("chained"), device.image(&layout)).unwrap();
        check_by_qemu(folder.path(), "chained", "now");
        run("qemu-img", ["rebase", "-u", "-f", "qcow2", "-b", "before", "-F", "raw", &path("chained")]);
        check_by_qemu(folder.path(), "chained", "now");
        run("qemu-img", ["commit", "-q", "-f", "qcow2", &path("since")]);
        assert!(fs::read(path("before")).unwrap() == fs::read(path("now")).unwrap(), "committed");
    }
}

#[test]
fn qemu_maps_an_increment_as_data_zeros_and_unchanged() {
    needs!(programs["qemu-img"]);
    let folder = tempfile::tempdir().unwrap();
    let size = 64 * KIB;
    let extents =
        vec![(0..size, Unchanged), (size..3 * size, Data), (3 * size..5 * size, Hole), (5 * size..MIB, Unchanged)];
    let layout = layout(MIB, size, backing("before", BackingFormat::Raw), &extents).unwrap();
    fs::write(folder.path().join("before"), vec![1; MIB as usize]).unwrap();
    fs::write(folder.path().join("image"), read(&layout, |_| 2, 0..layout.len().get())).unwrap();
    let image = folder.path().join("image");
    let map = run("qemu-img", ["map", "-f", "qcow2", "--output=json", image.to_str().unwrap()]);
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let found: Vec<_> = map
        .iter()
        .map(|part| (part["start"].as_u64().unwrap() / size, part["depth"] == 0, part["zero"] == true))
        .collect();
    assert_eq!(found, [(0, false, false), (1, true, false), (3, true, true), (5, false, false)]);
    let info = run("qemu-img", ["info", "-f", "qcow2", "--output=json", image.to_str().unwrap()]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!((&info["backing-filename"], &info["backing-filename-format"]), (&"before".into(), &"raw".into()));
}

#[test]
fn a_device_without_bytes_and_a_very_large_one_are_images_for_qemu() {
    needs!(programs["qemu-img"]);
    let folder = tempfile::tempdir().unwrap();
    let empty = Device::random(&mut Random::new(0), 0, 4096, &[]);
    fs::write(folder.path().join("image"), empty.image(&empty.layout(64 * KIB, None))).unwrap();
    write_raw(&folder.path().join("raw"), &[]);
    check_by_qemu(folder.path(), "image", "raw");

    let extents = vec![(0..PIB, Hole), (PIB..PIB + 5 * MIB, Data), (PIB + 5 * MIB..2 * PIB, Hole)];
    let layout = layout(2 * PIB, 2 * MIB, None, &extents).unwrap();
    let image = folder.path().join("image");
    fs::write(&image, read(&layout, |_| 7, 0..layout.len().get())).unwrap();
    let image = image.to_str().unwrap();
    assert!(run("qemu-img", ["check", "-f", "qcow2", image]).starts_with("No errors were found"));
    let map = run("qemu-img", ["map", "-f", "qcow2", "--output=json", image]);
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let data: Vec<_> = map.iter().filter(|part| part["data"] == true).collect();
    assert_eq!(data.len(), 1);
    assert_eq!((data[0]["start"].as_u64(), data[0]["length"].as_u64()), (Some(PIB), Some(6 * MIB)));
}

#[test]
fn reading_in_pieces_equals_reading_the_whole() {
    for seed in seeds(0, 24) {
        let random = &mut Random::new(seed);
        let size = (4 * KIB) << random.within(0..3);
        // More than one L2 table in some: a table of 4 KiB covers 2 MiB.
        let len = random.within(1..5 * MIB);
        let with_backing = random.one_in(2);
        let name = with_backing
            .then(|| Backing { name: vec![b'x'; random.within(1..1024) as usize], format: BackingFormat::Raw });
        let device = Device::random(random, len, size, &[Data, Hole, Unchanged, Free]);
        let layout = device.layout(size, name.clone());
        device.check(&layout, with_backing);
        assert_eq!(Reader::new(&layout).backing, name.map_or(Vec::new(), |name| name.name));
        let whole = device.image(&layout);
        for _ in 0..200 {
            let start = random.within(0..whole.len() as u64);
            let longest = if random.one_in(2) { 20 } else { 3 * size };
            let end = (start + random.within(1..longest)).min(whole.len() as u64);
            let piece = read(&layout, |offset| device.now[offset as usize], start..end);
            assert!(piece == whole[start as usize..end as usize], "seed {seed}: {start}..{end}");
        }
        check_parts(&layout, len);
    }
}

/// The parts of an image are as long as possible, cover it, and are inverse to the positions of the device's bytes.
fn check_parts(layout: &Layout, len: u64) {
    let (mut at, mut last) = (Bytes::ZERO, None);
    while at < layout.len() {
        let part = layout.part_at(at);
        assert!(part.range.start == at && part.range.end > at && part.range.end <= layout.len());
        if let Content::Device(offset) = part.content {
            let length = part.range.end.get() - at.get();
            assert!(offset.get() + length <= len);
            assert_ne!(last, Some(offset), "two parts that could be one");
            assert_eq!(layout.position_of(offset), Some(at));
            let end = Bytes::new(offset.get() + length - 1);
            assert_eq!(layout.position_of(end), Some(Bytes::new(part.range.end.get() - 1)));
            last = Some(Bytes::new(offset.get() + length));
        }
        at = part.range.end;
    }
    assert_eq!(layout.part_at(at).range, at..at);
}

#[test]
fn large_devices_take_little_memory() {
    // 64 TiB of data in the middle of 2 PiB, and a few clusters at its end.
    let (len, size) = (2 * PIB, 64 * KIB);
    let (start, end) = (PIB + 3 * size, PIB + 64 * TIB + 5);
    let extents = vec![(0..start, Hole), (start..end, Data), (end..len - 7, Hole), (len - 7..len, Data)];
    let layout = layout(len, size, None, &extents).unwrap();
    assert!(layout.memory() < Bytes::new(100 * KIB), "{}", layout.memory());
    assert_eq!(layout.data_clusters(), (64 * TIB) / size - 2 + 1);
    let image = Reader::new(&layout);
    let clusters =
        [0, PIB / size + 2, PIB / size + 3, PIB / size + 12_345_678, (end - 1) / size, end / size + 1, len / size - 1];
    let states = clusters.map(|cluster| image.state(cluster));
    let first = match states[2] {
        State::Data(position) => position,
        other => panic!("{other:?}"),
    };
    let at = |index: u64| State::Data(first + index * size);
    let none = State::Unallocated;
    assert_eq!(states, [none, none, at(0), at(12_345_675), at(64 * TIB / size - 3), none, at(64 * TIB / size - 2)]);
    assert_eq!(layout.len().get(), first + layout.data_clusters() * size);
    for position in [0, first - size, first, layout.len().get() - size] {
        assert_eq!(image.refcount(position), 1);
    }
    assert_eq!(image.refcount(layout.len().get()), 0);
    check_parts(&layout, len);

    // All of a device that is discarded over a backing file: the tables are as long as the format makes them.
    let zeros = qcow2::layout(len, 2 * MIB, backing("x", BackingFormat::Raw), &vec![(0..len, Hole)]).unwrap();
    assert!(zeros.memory() < Bytes::new(100 * KIB));
    assert_eq!(Reader::new(&zeros).state(len / 2 / (2 * MIB) + 1), State::Zero);
}

#[test]
fn cluster_sizes_follow_the_device_and_the_limits_of_qemu() {
    let size = |block: u64, len: u64| {
        ClusterSize::for_block(Bytes::new(block), Bytes::new(len)).map(|size| size.bytes().get())
    };
    for (block, len, expected) in [
        (512, GIB, Some(64 * KIB)),
        (0, 0, Some(64 * KIB)),
        (64 * KIB, GIB, Some(64 * KIB)),
        (192 * KIB, GIB, Some(64 * KIB)),
        (384 * KIB, GIB, Some(128 * KIB)),
        (GIB, GIB, Some(2 * MIB)),
        (64 * KIB, 2 * PIB - TIB, Some(64 * KIB)),
        (64 * KIB, 2 * PIB, Some(128 * KIB)),
        (64 * KIB, 1 << 61, Some(2 * MIB)),
        (64 * KIB, (1 << 61) + 1, None),
        (64 * KIB, 1 << 63, None),
        (64 * KIB, u64::MAX, None),
    ] {
        assert_eq!(size(block, len), expected, "blocks of {block}, {len} bytes");
    }
    for invalid in [0, 512, 2048, 4097, 96 * KIB, 4 * MIB, u64::MAX] {
        assert_eq!(ClusterSize::new(Bytes::new(invalid)), None, "{invalid}");
    }
}

#[test]
fn what_is_no_image_is_an_error() {
    let data = |len| layout(len, 2 * MIB, None, &vec![(0..len, Data)]).map(|layout| layout.len().get());
    let too_large = |len| Error::TooLarge { len: Bytes::new(len), cluster: cluster(2 * MIB) };
    for len in [1 << 56, 1 << 61, 1 << 63, u64::MAX] {
        assert_eq!(data(len), Err(too_large(len)));
    }
    assert!(data((1 << 56) - TIB).is_ok_and(|len| len < 1 << 56));
    assert!(layout(1 << 61, 2 * MIB, None, &vec![(0..1 << 61, Hole)]).is_ok());
    assert!(layout((1 << 61) + 1, 2 * MIB, None, &vec![(0..(1 << 61) + 1, Hole)]).is_err());

    for (extents, at) in [
        (vec![], 0),
        (vec![(0..512, Data)], 512),
        (vec![(512..1024, Data)], 0),
        (vec![(0..512, Data), (0..1024, Data)], 512),
        (vec![(0..1025, Data)], 0),
    ] {
        assert_eq!(layout(1024, 4096, None, &extents).err(), Some(Error::Gap { at: Bytes::new(at) }), "{extents:?}");
    }

    let named = |name: &[u8]| {
        let backing = Backing { name: name.into(), format: BackingFormat::Raw };
        Builder::new(Bytes::ZERO, cluster(4096), Some(backing)).finish().err()
    };
    assert_eq!(named(&[b'x'; 1023]), None);
    for name in [&[b'x'; 1024][..], b"", b"a\0b"] {
        assert_eq!(named(name), Some(Error::BackingName));
    }
}
