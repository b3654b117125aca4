//! What is below a directory, and what is expected there.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::bench::Ran;
use crate::common::run;

/// A file, link or directory of a tree.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    /// A directory with its mode.
    Directory(u32),
    /// A file with its mode.
    File(u32),
    /// A link with what it leads to.
    Link(String),
}

/// Everything below a root, by its absolute path there.
pub type Tree = BTreeMap<String, Entry>;

/// The tree below a root.
pub fn tree(root: &Path) -> Tree {
    let mut found = Tree::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for path in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            let metadata = path.symlink_metadata().unwrap();
            let mode = metadata.permissions().mode() & 0o7777;
            let entry = if metadata.is_symlink() {
                Entry::Link(fs::read_link(&path).unwrap().to_str().unwrap().to_owned())
            } else if metadata.is_dir() {
                directories.push(path.clone());
                Entry::Directory(mode)
            } else {
                Entry::File(mode)
            };
            let name = path.strip_prefix(root).unwrap().to_str().unwrap();
            found.insert(format!("/{name}"), entry);
        }
    }
    found
}

/// The files and links of a tree.
pub fn files(tree: &Tree) -> Tree {
    let files = tree.iter().filter(|(_, entry)| !matches!(entry, Entry::Directory(_)));
    files.map(|(path, entry)| (path.clone(), entry.clone())).collect()
}

/// The files of `mount-helpers/install` below /usr, without its list. Packages have the same ones.
pub fn installed() -> Tree {
    let root = tempfile::tempdir().unwrap();
    install(root.path(), "/usr").succeeds();
    let mut files = files(&tree(root.path()));
    files.remove("/usr/share/doc/blkholefs/installed").expect("the list");
    files
}

/// A file of the source.
pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The program without symbols, as packages have it: made once, from that of the tests.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        // Where cargo-deb looks for it below a target directory.
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("packaging/release");
        fs::create_dir_all(&directory).unwrap();
        let stripped = directory.join("blkholefs");
        // Another process may use the one that is there.
        let new = directory.join(format!("blkholefs.{}", std::process::id()));
        run("strip", ["-o".as_ref(), new.as_os_str(), env!("CARGO_BIN_EXE_blkholefs").as_ref()]);
        fs::rename(new, &stripped).unwrap();
        stripped
    })
}

/// Runs `mount-helpers/install` with the program of the tests.
pub fn install(root: &Path, prefix: &str) -> Ran {
    script("install", root, prefix)
}

/// Runs `mount-helpers/uninstall`.
pub fn uninstall(root: &Path, prefix: &str) -> Ran {
    script("uninstall", root, prefix)
}

fn script(name: &str, root: &Path, prefix: &str) -> Ran {
    let mut command = Command::new(source("mount-helpers").join(name));
    Ran::of(command.env("DESTDIR", root).env("PREFIX", prefix).env("BINARY", program()))
}
