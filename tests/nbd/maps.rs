//! Maps of real servers equal the output of `nbdinfo --map`.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use blkholefs::testing::map::ExtentKind;
use blkholefs::testing::source::Context;
use blkholefs::testing::source::nbd::{Client, layer};
use blkholefs::testing::units::Bytes;

use crate::common::nbd::{Server, directory, image, nbdinfo_map};
use crate::common::{GIB, KIB, MIB, needs, run};
use crate::{default_client, read, runs_of};

const BLOCKS: [std::ops::Range<u64>; 5] = [0..1, 16..17, 1024..1500, 1501..1502, 16383..16384];

/// Checks that the map equals that of nbdinfo, has holes, and that both ends of each hole read as zeros.
fn check(uri: &str) -> Arc<Client> {
    let client = default_client(uri);
    let map = runs_of(&client);
    assert_eq!(map, nbdinfo_map(uri), "{uri}");
    assert!(map.iter().any(|(_, kind)| *kind == ExtentKind::Hole), "{uri} has holes");
    let mut start = 0;
    for (end, kind) in map {
        if kind == ExtentKind::Hole {
            let len = usize::try_from((end - start).min(64 * KIB)).unwrap();
            for at in [start, end - len as u64] {
                assert!(read(&client, at, len).unwrap().iter().all(|byte| *byte == 0), "{uri}: zeros at {at}");
            }
        }
        start = end;
    }
    client
}

#[test]
fn maps_of_nbdkit_equal_nbdinfo() {
    needs!(programs["nbdkit", "nbdinfo"]);
    let directory = directory();
    let (socket, disk) = (directory.path().join("s"), directory.path().join("disk"));
    image(&disk, 64 * MIB, &BLOCKS);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let disk = disk.to_str().unwrap();
    for words in [
        vec!["file", disk],
        vec!["--readonly", "file", disk],
        vec!["memory", "1T"],
        vec!["data", "@0x100000 1 @0x40000000 2*5000", "size=3G"],
        vec!["sparse-random", "size=16G", "percent=5", "runlength=262144"],
        vec!["--filter=delay", "file", disk, "delay-extents=20ms", "delay-read=5ms"],
        vec![
            "--filter=blocksize-policy",
            "file",
            disk,
            "blocksize-minimum=64K",
            "blocksize-preferred=64K",
            "blocksize-maximum=1M",
            "blocksize-error-policy=error",
        ],
    ] {
        let _server = Server::nbdkit(&socket, &words);
        let client = check(&uri);
        assert_eq!(layer(client, &Context::default()).holes_from, "NBD block status (base:allocation)", "{words:?}");
        std::fs::remove_file(&socket).unwrap();
    }
}

#[test]
fn maps_of_qemu_nbd_equal_nbdinfo() {
    needs!(programs["qemu-nbd", "qemu-img", "qemu-io", "nbdinfo"]);
    let directory = directory();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    image(path("raw").as_ref(), 64 * MIB, &BLOCKS);
    run("qemu-img", ["convert", "-q", "-O", "qcow2", &path("raw"), &path("qcow2")]);
    // Allocated zero clusters next to unallocated clusters are one hole for lseek.
    run("qemu-io", ["-c", "write -z 20M 3M", "-c", "write -P 7 21M 64k", &path("qcow2")]);
    run("qemu-img", ["create", "-q", "-f", "qcow2", &path("large"), "20T"]);
    run("qemu-io", ["-c", "write -P 9 13T 64k", &path("large")]);
    // "qemu-nbd 7.2.22 (Debian ...)": the extended headers came with 8.2.
    let version = run("qemu-nbd", ["--version"]);
    let mut numbers = version.split([' ', '.']).filter_map(|word| word.parse::<u32>().ok());
    let extended = (numbers.next(), numbers.next()) >= (Some(8), Some(2));
    for (format, file) in [("qcow2", "qcow2"), ("raw", "raw"), ("qcow2", "large")] {
        let socket = directory.path().join(format!("{file}.socket"));
        let words = [format!("--format={format}"), "--export-name=a disk".to_owned(), path(file)];
        let _server = Server::qemu(&socket, &words.each_ref().map(String::as_str));
        let client = check(&format!("nbd+unix:///a%20disk?socket={}", socket.display()));
        let bits = if extended { ", 64 bits" } else { "" };
        assert_eq!(client.holes_from(), format!("NBD block status (base:allocation{bits})"));
    }
}

#[test]
fn a_write_is_never_inside_a_hole() {
    needs!(programs["nbdkit"]);
    let directory = directory();
    let (socket, disk) = (directory.path().join("s"), directory.path().join("disk"));
    image(&disk, GIB, &[]);
    let _server = Server::nbdkit(&socket, &["file", disk.to_str().unwrap()]);
    let client = default_client(&format!("nbd+unix:///?socket={}", socket.display()));
    let map = layer(client, &Context::default()).map;
    let file = File::options().write(true).open(&disk).unwrap();
    for block in (0..GIB / 4096).step_by(2741) {
        // The map queries the block before the write. The next query must include the write in any case.
        let before = map.extent_at(Bytes::new(block * 4096));
        assert_eq!(before.kind, ExtentKind::Hole);
        file.write_all_at(&[1], block * 4096).unwrap();
        assert_eq!(map.extent_at(Bytes::new(block * 4096)).kind, ExtentKind::Data);
    }
}

#[test]
fn no_holes_without_block_status() {
    needs!(programs["nbdkit"]);
    let directory = directory();
    for (name, words, dense) in [
        ("noextents", vec!["--filter=noextents", "memory", "64M"], false),
        ("no-sr", vec!["--no-sr", "memory", "64M"], true),
        ("error", vec!["--filter=error", "memory", "64M", "error-extents-rate=100%"], false),
    ] {
        let socket = directory.path().join(name);
        let _server = Server::nbdkit(&socket, &words);
        let client = default_client(&format!("nbd+unix:///?socket={}", socket.display()));
        assert_eq!(runs_of(&client), [(64 * MIB, ExtentKind::Data)], "{name}");
        assert_eq!(layer(Arc::clone(&client), &Context::default()).map.dense_because().is_some(), dense, "{name}");
        assert_eq!(layer(Arc::clone(&client), &Context::default()).holes_from == "none", dense, "{name}");
        assert_eq!(read(&client, 5, 10), Ok(vec![0; 10]));
    }
}
