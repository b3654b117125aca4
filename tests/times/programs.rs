//! Programs that skip files whose times they know.

use super::*;

/// A directory in which each mount of a device appears at the same place.
struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a temporary directory") }
    }

    fn path(&self) -> &str {
        self.directory.path().to_str().expect("a temporary path is text")
    }

    /// Runs a program in the directory while a device is mounted there.
    fn run(&self, device: &Path, program: &str, arguments: &[&str]) -> String {
        let program_under_test = env!("CARGO_BIN_EXE_blkholefs");
        run(program_under_test, ["mount".as_ref(), device.as_os_str(), self.directory.path().as_os_str()]);
        let result = try_run(program, arguments, "");
        run(program_under_test, ["umount", self.path()]);
        result.unwrap_or_else(|error| panic!("{program}: {error}"))
    }
}

/// Checks that `copies`, which says whether a backup copies the file, is true for a device that changed and only then.
fn assert_copied_after_changes(copies: impl Fn(&Path) -> bool) {
    let (image, device) = loop_over(4 * MIB);
    assert!(copies(device.path()), "the first backup");
    for round in 0..2 {
        assert!(!copies(device.path()), "nothing changed, round {round}");
        device.detach();
        device.bind(image.path());
        assert!(!copies(device.path()), "it was bound again, round {round}");
        image.write(0..4096);
        settle(image.path());
        assert!(copies(device.path()), "it changed, round {round}");
    }
    let other = Image::on_disk(4 * MIB, &[0..4096]);
    run("touch", ["-d".as_ref(), "2001-01-01".as_ref(), other.path().as_os_str()]);
    settle(other.path());
    device.detach();
    device.bind(other.path());
    assert!(copies(device.path()), "it is another file");
    assert!(!copies(device.path()), "nothing changed");
}

#[test]
fn rsync_copies_what_changed_and_nothing_else() {
    needs!(root, programs["rsync"]);
    let (place, copy) = (Place::new(), tempfile::tempdir().expect("a temporary directory"));
    let source = format!("{}/", place.path());
    let target = copy.path().to_str().expect("a temporary path is text");
    assert_copied_after_changes(|device| {
        // By default rsync compares whole seconds.
        let output = place.run(
            device,
            "rsync",
            &["--archive", "--modify-window=-1", "--stats", "--no-human-readable", &source, target],
        );
        let count = output.lines().find_map(|line| line.strip_prefix("Number of regular files transferred: "));
        count.unwrap_or_else(|| panic!("{output}")) == "1"
    });
}

#[test]
fn tar_stores_what_changed_and_nothing_else() {
    needs!(root, programs["tar"]);
    let (place, records) = (Place::new(), tempfile::tempdir().expect("a temporary directory"));
    let snapshot = format!("--listed-incremental={}", records.path().join("snapshot").display());
    assert_copied_after_changes(|device| {
        let name = device.file_name().and_then(|name| name.to_str()).expect("text").to_owned();
        // The number of the file system is another one in each mount. What is first seen after the start of tar is stored by
        // its next run too.
        let tar =
            format!("stat {0}/* >/dev/null && tar -cvf /dev/null --no-check-device {snapshot} -C {0} .", place.path());
        place.run(device, "sh", &["-ec", &tar]).lines().any(|line| line.ends_with(&format!("/{name}")))
    });
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is text")
}

#[test]
fn borg_reads_what_changed_and_nothing_else() {
    needs!(root, programs["borg"]);
    let (place, repository) = (Place::new(), tempfile::tempdir().expect("a temporary directory"));
    let base = repository.path().to_str().expect("text");
    let settings = [format!("BORG_BASE_DIR={base}"), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes".to_owned()];
    let borg = |words: &[&str]| [&settings.each_ref().map(String::as_str), &["borg"][..], words].concat().join(" ");
    let store = format!("{base}/repository");
    run("sh", ["-ec", &format!("exec env {}", borg(&["init", "--encryption=none", &store]))]);
    let count = std::cell::Cell::new(0);
    assert_copied_after_changes(|device| {
        count.set(count.get() + 1);
        let archive = format!("{store}::{}", count.get());
        // borg reads the file with the latest times again, whatever they are. The device has been seen before that file is made.
        let later = repository.path().join("later");
        let make_later =
            format!("until echo >{0}; find {0} -newercc {1}/* | grep -q .; do :; done", text(&later), place.path());
        let create = borg(&["create", "--list", "--filter=AMC", &archive, place.path(), text(&later)]);
        let output = place.run(device, "sh", &["-ec", &format!("{make_later}; env {create} 2>&1")]);
        let name = device.file_name().and_then(|name| name.to_str()).expect("text").to_owned();
        output.lines().any(|line| line.ends_with(&name))
    });
}

#[test]
fn restic_reads_what_changed_and_nothing_else() {
    needs!(root, programs["restic"]);
    let (place, repository) = (Place::new(), tempfile::tempdir().expect("a temporary directory"));
    let base = text(repository.path());
    let restic = format!("env RESTIC_PASSWORD=test restic --repo {base}/repository --cache-dir {base}/cache");
    run("sh", ["-ec", &format!("exec {restic} init")]);
    assert_copied_after_changes(|device| {
        let backup = format!("exec {restic} backup --json {}", place.path());
        let output = place.run(device, "sh", &["-ec", &backup]);
        let mut lines = output.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let summary = lines.next_back().filter(|line| line["message_type"] == "summary");
        let summary = summary.unwrap_or_else(|| panic!("{output}"));
        summary["files_new"] == 1 || summary["files_changed"] == 1
    });
}
