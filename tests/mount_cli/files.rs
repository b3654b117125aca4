//! What `mount-helpers/` installs: links, man pages, examples.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bench::{NAMES, Ran};
use crate::common::needs;

fn helpers(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-helpers").join(name)
}

/// The relative paths of all files and links below a directory.
fn tree(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap().is_dir() {
                true => directories.push(entry.path()),
                false => found.push(entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned()),
            }
        }
    }
    found.sort();
    found
}

#[test]
fn what_is_installed_is_uninstalled() {
    for prefix in ["/usr", "/usr/local"] {
        let root = tempfile::tempdir().unwrap();
        let run = |script: &str| {
            let mut command = Command::new(helpers(script));
            command.env("DESTDIR", root.path()).env("PREFIX", prefix).env("BINARY", env!("CARGO_BIN_EXE_blkholefs"));
            Ran::of(&mut command).succeeds();
        };
        run("install");
        run("install");
        let installed = tree(root.path());
        let program = format!("{prefix}/sbin/blkholefs");
        assert!(installed.contains(&program[1..].to_owned()), "{installed:?}");
        for name in NAMES {
            let link = installed.iter().find(|path| path.ends_with(&format!("sbin/{name}"))).expect(name);
            assert_eq!(fs::read_link(root.path().join(link)).unwrap(), Path::new(&program));
        }
        for page in ["blkholefs.8", "mount.blkholefs.8", "umount.blkholefs.8"] {
            let page = format!("{prefix}/share/man/man8/{page}");
            assert!(fs::metadata(root.path().join(&page[1..])).unwrap().is_file(), "{page}");
        }
        run("uninstall");
        assert_eq!(tree(root.path()), [""; 0]);
    }
}

#[test]
fn nothing_to_install_is_said() {
    let root = tempfile::tempdir().unwrap();
    let mut command = Command::new(helpers("install"));
    command.env("DESTDIR", root.path()).env("BINARY", "/nonexistent");
    Ran::of(&mut command).fails(1, "run cargo build --release first");
    assert_eq!(tree(root.path()), [""; 0]);
}

#[test]
fn man_pages_render_without_warnings() {
    needs!(programs["man", "groff"]);
    for page in ["man/blkholefs.8", "man/mount.blkholefs.8"] {
        let ran = Ran::of(Command::new("man").args(["--warnings", "--local-file"]).arg(helpers(page)));
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{page}");
        for section in ["SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "EXIT STATUS", "NOTES", "SEE ALSO"] {
            assert!(ran.out.lines().any(|line| line == section), "{page} has no {section}");
        }
    }
}

/// systemd's generator creates mount units from the example lines.
#[test]
fn systemd_reads_the_fstab_example() {
    let generator = "/usr/lib/systemd/system-generators/systemd-fstab-generator";
    needs!(programs[generator]);
    let units = tempfile::tempdir().unwrap();
    let mut command = Command::new(generator);
    command.env("SYSTEMD_FSTAB", helpers("fstab.example")).args([units.path(); 3]);
    let ran = Ran::of(&mut command);
    assert_eq!(ran.code, 0, "{ran:?}");
    let unit =
        |name: &str| fs::read_to_string(units.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let thin = unit("mnt-thin.mount");
    for line in ["What=/dev/mapper/vg-thin", "Where=/mnt/thin", "Type=blkholefs"] {
        assert!(thin.lines().any(|have| have == line), "{line}: {thin}");
    }
    assert!(unit("mnt-vg0.automount").contains("Where=/mnt/vg0"));
    assert!(unit("mnt-dev.mount").contains("uid=34,mode=0400"));
}
