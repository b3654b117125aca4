//! The RPM package of `mount-helpers/packages/blkholefs.spec`.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bench::Ran;
use crate::common::{needs, run};
use crate::tree::{Entry, Tree, files, installed, program, source, tree};

/// Makes the package as packagers do, but with the program of the tests.
fn make(directory: &Path) -> PathBuf {
    let mut command = Command::new("rpmbuild");
    let define = |name: &str| format!("{name} {}", directory.display());
    command.args(["-bb", "--build-in-place"]);
    for name in ["_topdir", "_tmppath"] {
        command.args(["--define", &define(name)]);
    }
    command.arg("mount-helpers/packages/blkholefs.spec").current_dir(source("")).env("BINARY", program());
    // Debian's rpm has its database in the home directory.
    command.env("HOME", directory);
    let ran = Ran::of(&mut command);
    assert_eq!(ran.code, 0, "{ran:?}");
    let package = tree(directory).into_keys().find(|path| path.ends_with(".rpm")).expect("a package");
    directory.join(&package[1..])
}

/// The files with the names that do not depend on the distribution: rpmbuild may compress manuals, and Debian's zsh has
/// a directory of its own.
fn common(found: &Tree) -> Tree {
    let plain = |text: &str| text.trim_end_matches(".gz").replace("vendor-completions", "site-functions");
    let entry = |entry: &Entry| match entry {
        Entry::Link(target) => Entry::Link(plain(target)),
        other => other.clone(),
    };
    files(found).iter().map(|(path, found)| (plain(path), entry(found))).collect()
}

/// What a package says about itself. Where rpm's database is missing, it makes an empty one.
fn query(package: &Path, words: &[&str]) -> String {
    let database = package.with_file_name("database");
    let paths = ["--dbpath".as_ref(), database.as_os_str(), package.as_os_str()];
    run("rpm", ["--query", "--package"].iter().chain(words).map(AsRef::as_ref).chain(paths))
}

#[test]
fn package_needs_only_the_c_library() {
    needs!(programs["rpm", "rpmbuild", "strip"]);
    let directory = tempfile::tempdir().unwrap();
    let package = make(directory.path());
    let format = "--queryformat=%{NAME} %{VERSION} %{LICENSE}\n%{SUMMARY}";
    let line = concat!("blkholefs ", env!("CARGO_PKG_VERSION"), " MIT OR Apache-2.0\n", env!("CARGO_PKG_DESCRIPTION"));
    assert_eq!(query(&package, &[format]), line);
    assert_eq!(query(&package, &["--recommends"]), "fuse3\n");
    assert_eq!(query(&package, &["--scripts"]), "", "no script runs as root");
    let required = query(&package, &["--requires"]);
    let of_system = ["libc.so", "libm.so", "libgcc_s.so", "ld-linux", "rpmlib(", "rtld("];
    let other: Vec<_> =
        required.lines().filter(|line| !of_system.iter().any(|start| line.starts_with(start))).collect();
    assert!(required.contains("libc.so.6") && other.is_empty(), "{other:?}");
}

#[test]
fn package_installs_what_is_installed_by_hand_and_is_erased() {
    needs!(root, programs["rpm", "rpmbuild", "strip"]);
    let directory = tempfile::tempdir().unwrap();
    let package = make(directory.path());
    let root = tempfile::tempdir().unwrap();
    let rpm = |words: &[&str]| {
        let mut command = Command::new("rpm");
        // Debian's rpm refuses to install without --force-debian, and other ones do not know it.
        if Path::new("/etc/debian_version").exists() {
            command.arg("--force-debian");
        }
        Ran::of(command.arg("--root").arg(root.path()).args(words)).succeeds();
    };
    // Nothing else is installed there, and that is what the database knows.
    rpm(&["--install", "--nodeps", package.to_str().unwrap()]);
    rpm(&["--verify", "--nodeps", "blkholefs"]);
    let mut found = common(&tree(root.path()));
    found.retain(|path, _| path.starts_with("/usr/") && !path.starts_with("/usr/lib/sysimage/"));
    assert_eq!(found, common(&installed()));
    let version = Ran::of(Command::new(root.path().join("usr/sbin/mount.blkholefs")).arg("-V"));
    assert!(version.out.contains(env!("CARGO_PKG_VERSION")), "{version:?}");
    rpm(&["--erase", "blkholefs"]);
    let left: Vec<_> = tree(root.path()).into_keys().filter(|path| path.contains("blkholefs")).collect();
    assert_eq!(left, [""; 0]);
}
