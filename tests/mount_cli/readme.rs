//! The first steps of the README, typed as they are there, and its line of fstab for an NBD export.

use std::fs;
use std::process::Command;

use crate::bench::{Bench, Ran};
use crate::common::nbd::Server;
use crate::common::readme::indented;
use crate::common::{needs, wait_until};

/// The lines of a section: those that are typed, and those that are printed, which begin with `# `.
fn session(title: &str) -> (Vec<String>, Vec<String>) {
    let (printed, typed): (Vec<String>, _) =
        indented("README.md", title).into_iter().partition(|line| line.starts_with("# "));
    (typed, printed.iter().map(|line| line["# ".len()..].to_owned()).collect())
}

/// A printed line, without what differs between machines: the name of the device, and the owner, mode and time of its file. du(1)
/// prints a tab, which would complete a name where the page is pasted.
fn comparable(line: &str, device: &str) -> String {
    let line = line.replace(device, "loop0").replace('\t', "    ");
    match line.split_whitespace().collect::<Vec<_>>()[..] {
        [blocks, mode, links, _owner, _group, size, _month, _day, _time, name] if mode.starts_with("-r") => {
            [blocks, links, size, name].join(" ")
        }
        _ => line,
    }
}

#[test]
fn first_steps_print_what_the_readme_has() {
    needs!(root, programs["unshare", "losetup", "dd", "cp", "cmp", "du"]);
    let bench = Bench::new();
    let (typed, expected) = session("First steps");
    let directory = bench.path("try");
    let place = directory.to_str().expect("a temporary path is text");
    let commands = typed.join("\n").replace("/tmp/try", place);
    let ran = bench.script("", &format!("export PATH={}:$PATH\n{commands}\n", bench.path("bin").display()));
    assert_eq!(ran.err, "", "{ran:?}");
    let first = ran.out.lines().next().expect("the device is printed first");
    let device = first.strip_prefix("/dev/").expect("a device");
    let is_bound = || {
        let backing = fs::read_to_string(format!("/sys/block/{device}/loop/backing_file"));
        backing.is_ok_and(|backing| backing.contains(place))
    };
    assert!(wait_until(|| !is_bound()), "{device} is still bound");
    let printed: Vec<_> = ran.out.lines().map(|line| comparable(&line.replace(place, "/tmp/try"), device)).collect();
    let expected: Vec<_> = expected.iter().map(|line| comparable(line, "loop0")).collect();
    assert_eq!(printed, expected);
    assert!(!directory.exists(), "everything is taken away");
}

/// The line of the README's section that mounts an NBD export.
fn network_line() -> String {
    let line = indented("README.md", "Use it").into_iter().find(|line| line.starts_with("nbd://"));
    line.expect("a line of fstab with an NBD export") + "\n"
}

#[test]
fn fstab_line_mounts_an_nbd_export() {
    needs!(root, programs["unshare", "nbdkit", "mount", "umount"]);
    let bench = Bench::new();
    let image = bench.image.path().to_str().expect("a temporary path is text");
    let (_server, port) = Server::nbdkit_tcp(&["--readonly", "--exportname=export", "file", image]);
    let place = bench.mnt();
    let line = network_line().replace("server/export", &format!("127.0.0.1:{port}/export"));
    let line = line.replace("/mnt/export", place.to_str().expect("a temporary path is text"));
    let ran = bench.script(
        &line,
        r#"
        mount -a -O _netdev -T fstab
        stat -c '%s %F' mnt/export
        umount mnt
        ! pgrep -f "mount.blkholefs.*$PWD/mnt"
        "#,
    );
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("1048576 regular file\n", ""));
}

/// systemd mounts a line with `_netdev` after the network is up, as part of remote-fs.target.
#[test]
fn fstab_line_of_an_nbd_export_belongs_to_the_network() {
    let generator = "/usr/lib/systemd/system-generators/systemd-fstab-generator";
    needs!(programs[generator]);
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/mount-helpers/fstab.example");
    let example = fs::read_to_string(example).unwrap();
    let directory = tempfile::tempdir().unwrap();
    for (name, table, unit) in [
        ("readme", network_line(), "remote-fs.target.wants/mnt-export.automount"),
        ("example", example, "remote-fs.target.wants/mnt-export.automount"),
    ] {
        let units = directory.path().join(name);
        fs::create_dir(&units).unwrap();
        fs::write(units.join("fstab"), table).unwrap();
        let mut command = Command::new(generator);
        let ran = Ran::of(command.env("SYSTEMD_FSTAB", units.join("fstab")).args([&units; 3]));
        assert_eq!(ran.code, 0, "{ran:?}");
        assert!(units.join(unit).exists(), "{name}: no {unit}");
        assert!(!units.join("local-fs.target.wants/mnt-export.automount").exists(), "{name}");
    }
}
