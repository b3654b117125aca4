//! The forms of `blkholefs map --format`, each read by the program that it is for.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::check::check_same_bytes;
use common::image::Image;
use common::loop_device::Loop;
use common::{KIB, needs, requires, run, try_run};

/// Not a multiple of 4096 bytes, and with data at the end.
const SIZE: u64 = 8192 * KIB + 512;
/// The data of the images.
const DATA: [std::ops::Range<u64>; 3] = [64 * KIB..192 * KIB, 1024 * KIB..1028 * KIB, 8192 * KIB..SIZE];

/// An image with data, and a directory for files.
struct Source {
    image: Image,
    directory: tempfile::TempDir,
}

impl Source {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
        Self { image: Image::with_data(SIZE, &DATA), directory }
    }

    fn image(&self) -> &Path {
        self.image.path()
    }

    /// A file with the map of the image in that form.
    fn map(&self, form: &str) -> PathBuf {
        let file = self.directory.path().join(form);
        fs::write(&file, map(&["--format", form, text(self.image())])).expect("a file in a directory of ours");
        file
    }

    fn scratch(&self) -> PathBuf {
        self.directory.path().join("copy")
    }
}

fn map(words: &[&str]) -> String {
    run(env!("CARGO_BIN_EXE_blkholefs"), ["map"].iter().chain(words))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

#[test]
fn bmaptool_copies_the_image_with_its_block_map() {
    needs!(programs["bmaptool"]);
    let source = Source::new();
    let bmap = source.map("bmap");
    let arguments = |to| ["copy".as_ref(), "--bmap".as_ref(), bmap.as_path(), source.image(), to];
    let copy = source.scratch();
    run("bmaptool", arguments(&copy));
    check_same_bytes(&copy, source.image());

    // The checksum is checked.
    let damaged = fs::read_to_string(&bmap).expect("a file of ours").replace("<BlocksCount> ", "<BlocksCount>  ");
    fs::write(&bmap, damaged).expect("a file of ours");
    let error = try_run("bmaptool", arguments(&copy), "").expect_err("a damaged block map");
    assert!(error.contains("checksum mismatch"), "{error}");
}

#[test]
fn bmaptool_writes_the_listed_blocks_over_a_device_and_no_others() {
    needs!(root, programs["bmaptool"]);
    let source = Source::new();
    let old = source.scratch();
    fs::write(&old, vec![0xff; SIZE as usize]).expect("a file in a directory of ours");
    let device = Loop::new(&old);
    let bmap = source.map("bmap");
    run("bmaptool", ["copy".as_ref(), "--bmap".as_ref(), bmap.as_path(), source.image(), device.path()]);
    let (copy, image) = (fs::read(device.path()).expect("a copy"), fs::read(source.image()).expect("the image"));
    assert_eq!(copy.len(), image.len());
    for block in 0..SIZE.div_ceil(4 * KIB) {
        let bytes = (block * 4 * KIB) as usize..((block + 1) * 4 * KIB).min(SIZE) as usize;
        let is_listed = DATA.iter().any(|data| data.contains(&(block * 4 * KIB)));
        let expected = if is_listed { image[bytes.clone()].to_vec() } else { vec![0xff; bytes.len()] };
        assert!(copy[bytes] == expected, "block {block}");
    }
}

#[test]
fn ddrescue_copies_the_domain_of_a_mapfile() {
    needs!(programs["ddrescue", "ddrescuelog"]);
    let source = Source::new();
    let mapfile = source.map("ddrescue");
    let finished = run("ddrescuelog", ["--list-blocks=+", "--block-size=512", text(&mapfile)]);
    let blocks = DATA.iter().flat_map(|range| range.start / 512..range.end / 512).map(|block| block.to_string());
    assert_eq!(finished.lines().collect::<Vec<_>>(), blocks.collect::<Vec<_>>());

    let copy = source.scratch();
    let domain = format!("--domain-mapfile={}", text(&mapfile));
    let log = source.directory.path().join("log");
    let said = run("ddrescue", [&domain, text(source.image()), text(&copy), text(&log)]);
    check_same_bytes(&copy, source.image());
    let rescued = run("ddrescuelog", ["--list-blocks=+", "--block-size=512", text(&log)]);
    assert_eq!(rescued, finished, "{said}");
}

/// The messages of `csi.proto`, and a parser of their JSON that prints what it read.
const CSI_READER: &str = r#"
import sys
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
field = descriptor_pb2.FieldDescriptorProto
file = descriptor_pb2.FileDescriptorProto(name="csi.proto", package="csi.v1", syntax="proto3")
kind = file.enum_type.add(name="BlockMetadataType")
for number, name in enumerate(["UNKNOWN", "FIXED_LENGTH", "VARIABLE_LENGTH"]):
    kind.value.add(name=name, number=number)
tuple = file.message_type.add(name="BlockMetadata")
for number, name in enumerate(["byte_offset", "size_bytes"]):
    tuple.field.add(name=name, number=number + 1, type=field.TYPE_INT64, label=field.LABEL_OPTIONAL)
response = file.message_type.add(name="GetMetadataDeltaResponse")
response.field.add(name="block_metadata_type", number=1, type=field.TYPE_ENUM, type_name=".csi.v1.BlockMetadataType",
                   label=field.LABEL_OPTIONAL)
response.field.add(name="volume_capacity_bytes", number=2, type=field.TYPE_INT64, label=field.LABEL_OPTIONAL)
response.field.add(name="block_metadata", number=3, type=field.TYPE_MESSAGE, type_name=".csi.v1.BlockMetadata",
                   label=field.LABEL_REPEATED)
pool = descriptor_pool.DescriptorPool()
pool.Add(file)
descriptor = pool.FindMessageTypeByName("csi.v1.GetMetadataDeltaResponse")
factory = message_factory.MessageFactory(pool)
message = json_format.Parse(open(sys.argv[1]).read(), factory.GetPrototype(descriptor)())
print(message.block_metadata_type, message.volume_capacity_bytes)
for block in message.block_metadata:
    print(block.byte_offset, block.size_bytes)
"#;

#[test]
fn protocol_buffers_reads_the_tuples_of_csi() {
    // The package is one of Debian's Python.
    let python = "/usr/bin/python3";
    if try_run(python, ["-c", "import google.protobuf"], "").is_err() && !requires(&["python3-protobuf"]) {
        return;
    }
    let source = Source::new();
    let read = run(python, ["-c", CSI_READER, text(&source.map("csi"))]);
    let tuples = DATA.iter().map(|range| format!("{} {}\n", range.start, range.end - range.start));
    assert_eq!(read, format!("2 {SIZE}\n{}", tuples.collect::<String>()));
    // A part of the device, as for a request with an offset to start from.
    let part = map(&["--format", "csi", "--offset", "100K", "--length", "1M", text(source.image())]);
    let part: serde_json::Value = serde_json::from_str(&part).expect("JSON");
    let tuples = part["blockMetadata"].as_array().expect("a list");
    assert_eq!(tuples.len(), 2);
    assert_eq!((&tuples[0]["byteOffset"], &tuples[0]["sizeBytes"]), (&"102400".into(), &"94208".into()));
}

#[test]
fn the_input_map_of_borg_covers_the_whole_image() {
    let source = Source::new();
    let text = fs::read_to_string(source.map("borg")).expect("a file of ours");
    let mut at = 0;
    let mut data = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<_> = line.split(' ').collect();
        let number = |index: usize| words[index].parse::<u64>().expect("a number");
        assert_eq!(number(0), at, "{line}");
        at += number(1);
        match words[2] {
            "data" => data.push(number(0)..at),
            state => assert_eq!(state, "zero"),
        }
    }
    assert_eq!((at, data.as_slice()), (SIZE, DATA.as_slice()));
}

#[test]
fn wrong_options_are_usage_errors() {
    let source = Source::new();
    let image = text(source.image());
    for (words, reason) in [
        (&["--format", "vhd"][..], "no form is called vhd: there are borg, bmap, ddrescue, csi"),
        (&["--format", "csi", "--json"], "exclude each other"),
        (&["--totals", "--json"], "exclude each other"),
        (&["--format", "bmap", "--offset", "4K"], "describes a whole device"),
        (&["--format", "borg", "--length", "4K"], "describes a whole device"),
    ] {
        let all = ["map"].iter().chain(words).chain([&image]);
        let error = try_run(env!("CARGO_BIN_EXE_blkholefs"), all, "").expect_err("a usage error");
        assert!(error.contains(reason), "{words:?}: {error}");
    }
}
