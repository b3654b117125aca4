//! `mount-helpers/install` and `uninstall` below a private root.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::bench::{NAMES, Ran};
use crate::common::needs;
use crate::tree::{Entry, install, program, source, tree, uninstall};

const PREFIXES: [&str; 3] = ["/usr", "/usr/local", "/opt/blk"];

/// Roots before an installation: empty, and with /sbin as it is on systems of today and of the past.
fn roots() -> Vec<tempfile::TempDir> {
    let new = || tempfile::tempdir().unwrap();
    let (empty, merged, apart) = (new(), new(), new());
    for root in [&merged, &apart] {
        // Directories that are empty, and files of others.
        fs::create_dir_all(root.path().join("usr/sbin")).unwrap();
        fs::create_dir_all(root.path().join("usr/share/man/man8")).unwrap();
        fs::create_dir_all(root.path().join("usr/share/doc/other")).unwrap();
        fs::write(root.path().join("usr/sbin/other"), "").unwrap();
    }
    symlink("usr/sbin", merged.path().join("sbin")).unwrap();
    fs::create_dir(apart.path().join("sbin")).unwrap();
    vec![empty, merged, apart]
}

#[test]
fn an_uninstalled_tree_is_as_before() {
    needs!(programs["strip"]);
    for prefix in PREFIXES {
        for root in roots().iter().map(tempfile::TempDir::path) {
            let before = tree(root);
            install(root, prefix).succeeds();
            let first = tree(root);
            install(root, prefix).succeeds();
            assert_eq!(tree(root), first, "the second installation differs");
            assert!(first.contains_key(&format!("{prefix}/sbin/blkholefs")), "{first:?}");
            uninstall(root, prefix).succeeds();
            assert_eq!(tree(root), before, "{prefix}");
        }
    }
}

#[test]
fn mount_finds_the_program_by_relative_links() {
    needs!(programs["strip"]);
    for prefix in PREFIXES {
        for root in roots().iter().map(tempfile::TempDir::path) {
            install(root, prefix).succeeds();
            let sbin = if root.join("sbin").exists() { "sbin" } else { "usr/sbin" };
            let program = root.join(&prefix[1..]).join("sbin/blkholefs").canonicalize().unwrap();
            for name in NAMES {
                let link = root.join(sbin).join(name);
                assert!(fs::read_link(&link).unwrap().is_relative(), "{}", link.display());
                assert_eq!(link.canonicalize().unwrap(), program.canonicalize().unwrap());
            }
        }
    }
}

#[test]
fn nothing_is_setuid_or_writable_by_others() {
    needs!(programs["strip"]);
    let root = tempfile::tempdir().unwrap();
    install(root.path(), "/usr").succeeds();
    for (path, entry) in tree(root.path()) {
        if let Entry::File(mode) | Entry::Directory(mode) = entry {
            assert_eq!(mode & 0o7022, 0, "{path} has the mode {mode:o}");
        }
    }
}

/// A file of a package is neither replaced by an installation nor removed by what undoes it.
#[test]
fn files_of_others_stay() {
    needs!(programs["strip"]);
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("usr/sbin")).unwrap();
    symlink("elsewhere", root.path().join("usr/sbin/mount.fuse.blkholefs")).unwrap();
    let before = tree(root.path());
    for prefix in PREFIXES {
        install(root.path(), prefix).fails(1, "usr/sbin/mount.fuse.blkholefs is there, from a package");
        uninstall(root.path(), prefix).fails(1, "mount-helpers/install made nothing there");
        assert_eq!(tree(root.path()), before);
    }
}

/// Also what an earlier version installed, and this one would not.
#[test]
fn all_that_is_on_the_list_is_removed() {
    needs!(programs["strip"]);
    let root = tempfile::tempdir().unwrap();
    install(root.path(), "/usr").succeeds();
    let list = root.path().join("usr/share/doc/blkholefs/installed");
    let old = root.path().join("usr/share/doc/blkholefs/OLD");
    fs::write(&old, "").unwrap();
    fs::write(&list, fs::read_to_string(&list).unwrap() + "/usr/share/doc/blkholefs/OLD\n").unwrap();
    install(root.path(), "/usr").succeeds();
    assert!(old.exists());
    uninstall(root.path(), "/usr").succeeds();
    assert_eq!(tree(root.path()).len(), 0);
}

#[test]
fn a_prefix_that_cannot_be_in_a_unit_is_refused() {
    needs!(programs["strip"]);
    let root = tempfile::tempdir().unwrap();
    for prefix in ["usr", "/a b", "/a%b", "/", "//"] {
        install(root.path(), prefix).fails(1, "PREFIX is not an absolute path");
    }
    // Such a directory is outside of the root, and got the mode of one that is made.
    for prefix in ["/usr/..", "/usr/../../etc", "/./usr", "/.."] {
        install(root.path(), prefix).fails(1, "PREFIX has . or .. in it");
    }
    assert_eq!(tree(root.path()).len(), 0);
}

#[test]
fn a_slash_at_the_end_of_the_prefix_means_nothing() {
    needs!(programs["strip"]);
    let root = tempfile::tempdir().unwrap();
    install(root.path(), "/usr/local/").succeeds();
    let made = tree(root.path());
    assert!(made.contains_key("/usr/local/sbin/blkholefs"), "{made:?}");
    uninstall(root.path(), "/usr/local").succeeds();
    assert_eq!(tree(root.path()).len(), 0);
}

#[test]
fn a_link_to_the_script_installs_too() {
    needs!(programs["strip"]);
    let root = tempfile::tempdir().unwrap();
    for name in ["install", "uninstall"] {
        let link = root.path().join(name);
        symlink(source("mount-helpers").join(name), &link).unwrap();
        let mut command = Command::new(link);
        command.env("DESTDIR", root.path().join("place")).env("BINARY", program()).env_remove("PREFIX");
        Ran::of(&mut command).succeeds();
        assert_eq!(root.path().join("place/usr/sbin/mount.blkholefs").exists(), name == "install");
    }
}

/// Also the directory that is the root of the installation.
#[test]
fn every_user_can_read_what_is_installed_with_any_umask() {
    needs!(programs["strip"]);
    let root = tempfile::tempdir().unwrap();
    let place = root.path().join("place");
    let script = source("mount-helpers/install");
    let mut command = Command::new("sh");
    command.args(["-c", "umask 077; exec \"$0\""]).arg(script).env("DESTDIR", &place).env("BINARY", program());
    Ran::of(command.env_remove("PREFIX")).succeeds();
    for (path, entry) in tree(root.path()) {
        if let Entry::File(mode) | Entry::Directory(mode) = entry {
            assert_eq!(mode & 0o444, 0o444, "{path} has the mode {mode:o}");
        }
    }
}

/// A list that was damaged, or written by someone else, removes nothing.
#[test]
fn a_list_with_other_files_removes_nothing() {
    needs!(programs["strip"]);
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    install(&root, "/usr").succeeds();
    fs::create_dir_all(root.join("etc/blkholefs")).unwrap();
    fs::write(root.join("etc/passwd"), "").unwrap();
    fs::write(directory.path().join("blkholefs"), "").unwrap();
    let list = root.join("usr/share/doc/blkholefs/installed");
    let text = fs::read_to_string(&list).unwrap();
    for (line, why) in [
        ("/etc/passwd", "not a file of blkholefs: /etc/passwd"),
        ("/../blkholefs", "not a path of an installation: /../blkholefs"),
        ("/usr/../../blkholefs", "not a path of an installation"),
        ("blkholefs", "not a path of an installation: blkholefs"),
        ("", "not a path of an installation: "),
        ("/etc/blkholefs", "a directory and not a file: /etc/blkholefs"),
        ("/etc/../../", "not a path of an installation"),
    ] {
        fs::write(&list, format!("{line}\n{text}")).unwrap();
        let before = tree(directory.path());
        uninstall(&root, "/usr").fails(1, why);
        assert_eq!(tree(directory.path()), before, "{line}");
    }
    fs::write(&list, text).unwrap();
    uninstall(&root, "/usr").succeeds();
    assert!(root.join("etc/passwd").exists() && directory.path().join("blkholefs").exists());
}

/// dpkg replaces files that no package has.
#[test]
fn a_package_that_was_installed_over_it_stays() {
    needs!(programs["dpkg-query", "strip"]);
    let root = tempfile::tempdir().unwrap();
    install(root.path(), "/usr").succeeds();
    let state = root.path().join("var/lib/dpkg");
    fs::create_dir_all(state.join("info")).unwrap();
    let about = "Package: blkholefs\nStatus: install ok installed\nArchitecture: all\nVersion: 1\nMaintainer: x\nDescription: x\n";
    fs::write(state.join("status"), about).unwrap();
    fs::write(state.join("info/format"), "1\n").unwrap();
    fs::write(state.join("info/blkholefs.list"), "/.\n/usr\n/usr/sbin\n/usr/sbin/mount.blkholefs\n").unwrap();
    let before = tree(root.path());
    install(root.path(), "/usr").fails(1, "the package blkholefs has files of blkholefs in ");
    uninstall(root.path(), "/usr").fails(1, "the package blkholefs was installed over it: remove that first");
    assert_eq!(tree(root.path()), before);
    fs::remove_dir_all(root.path().join("var")).unwrap();
    uninstall(root.path(), "/usr").succeeds();
    assert_eq!(tree(root.path()).len(), 0);
}

/// It says where things are, and gives advice only for the system that runs.
#[test]
fn the_output_names_what_was_made() {
    needs!(programs["strip"]);
    let root = tempfile::tempdir().unwrap();
    let said = install(root.path(), "/usr/local").out;
    let at = |name: &str| Path::new(root.path()).join(name).display().to_string();
    for text in
        [at("usr/local/sbin/blkholefs"), at("usr/sbin/mount.blkholefs"), at("usr/local/share/doc/blkholefs/installed")]
    {
        assert!(said.contains(&text), "{text}: {said}");
    }
    assert!(!said.contains("daemon-reload") && said.lines().count() == 3, "{said}");
    let said = uninstall(root.path(), "/usr/local").out;
    assert!(said.starts_with("Removed ") && !said.contains("daemon-reload"), "{said}");
}
