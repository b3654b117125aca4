//! When `mount-helpers/install` builds the program, with programs in the place of cargo and runuser(1).

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use crate::bench::Ran;
use crate::common::{needs, run};
use crate::tree::source;

/// A copy of what the script needs of the source, and a place to install to.
struct Copy(tempfile::TempDir);

impl Copy {
    fn new() -> Self {
        let copy = Self(tempfile::Builder::new().prefix("blkholefs my source ").tempdir().unwrap());
        for name in
            ["mount-helpers", "README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE", "Cargo.toml", "Cargo.lock"]
        {
            run("cp", ["-R".as_ref(), source(name).as_os_str(), copy.path().as_os_str()]);
        }
        for name in ["src", "docs", "bin"] {
            fs::create_dir(copy.path().join(name)).unwrap();
        }
        fs::write(copy.path().join("src/main.rs"), "").unwrap();
        fs::write(copy.path().join("docs/correctness.md"), "").unwrap();
        copy.program("cargo", r#"echo "cargo $*" >>"$LOG"; mkdir -p "$TARGET"; cp "$PROGRAM" "$TARGET/blkholefs""#);
        copy.program("runuser", r#"echo "runuser $1 $2 $3" >>"$LOG"; exec sh -c "$4""#);
        copy
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.path().join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\nset -e\n{script}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Installs, and returns the commands that were run for a build.
    fn install(&self) -> String {
        let path = |name: &str| self.path().join(name);
        let search = format!("{}:{}", path("bin").display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(path("mount-helpers/install"));
        command.env("PATH", search).env("LOG", path("log")).env("TARGET", path("target/release"));
        command.env("DESTDIR", path("root")).env_remove("PREFIX").env_remove("BINARY");
        let ran = Ran::of(command.env("PROGRAM", env!("CARGO_BIN_EXE_blkholefs")));
        ran.succeeds();
        let log = fs::read_to_string(path("log")).unwrap_or_default();
        let _ = fs::remove_file(path("log"));
        log
    }
}

#[test]
fn the_program_is_built_when_it_is_missing_or_older_than_the_source() {
    needs!(programs["strip"]);
    let copy = Copy::new();
    let at = copy.path().display();
    let build = format!("cargo build --release --manifest-path {at}/Cargo.toml --target-dir {at}/target\n");
    assert_eq!(copy.install(), build);
    assert_eq!(copy.install(), "");
    fs::File::open(copy.path().join("src/main.rs")).unwrap().set_modified(SystemTime::now()).unwrap();
    assert_eq!(copy.install(), build);
}

#[test]
fn what_was_built_is_installed_without_symbols() {
    needs!(programs["strip", "readelf"]);
    let copy = Copy::new();
    copy.install();
    let sections = |path: &str| run("readelf", ["--section-headers".as_ref(), copy.path().join(path).as_os_str()]);
    assert!(sections("target/release/blkholefs").contains(".symtab"));
    let installed = sections("root/usr/sbin/blkholefs");
    assert!(!installed.contains(".symtab") && !installed.contains(".debug_line"), "{installed}");
}

/// Under sudo, root has often no Rust, and files of root in `target/` would be in the way of the owner.
#[test]
fn root_lets_the_owner_of_the_source_build() {
    needs!(root, programs["strip"]);
    let copy = Copy::new();
    chown(copy.path(), Some(65534), None).unwrap();
    let log = copy.install();
    assert!(log.starts_with("runuser --login nobody --command\ncargo build --release "), "{log}");
}
