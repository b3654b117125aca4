//! What a daemon answers to `blkholefs status`.
//!
//! Invariant: no answer makes the parser panic. An answer that is accepted has no more files than lines, and can be written and
//! read again. No answer puts a control character into the table, or a line of its own.

use blkholefs::testing::mount::status::{self, MountState, MountStatus};
use blkholefs::testing::report;

pub fn run(input: &[u8]) {
    let Some(answer) = status::parse(input) else { return };
    assert!(answer.files.len() <= input.split(|byte| *byte == b'\n').count());
    let again = status::parse(&status::format(&answer)).expect("what is written can be read");
    assert_eq!((again.open_files, again.map_memory), (answer.open_files, answer.map_memory));
    let remarks: usize = answer.files.iter().map(|file| file.dense.len()).sum();
    let mount = MountStatus {
        spec: "/dev/x".into(),
        directory: "/mnt".into(),
        mountpoints: vec!["/mnt".into()],
        options: None,
        daemon: None,
        resident: None,
        user: None,
        state: MountState::Serving(answer),
    };
    let mounts = [mount];
    let table = report::status(&mounts);
    assert_eq!(table.lines().count(), 2 + remarks, "{table}");
    assert!(table.lines().all(|line| !line.contains(char::is_control)), "{table}");
    let json = report::status_json(&mounts);
    assert!(json.ends_with('\n') && json.lines().count() == 1, "{json}");
}
