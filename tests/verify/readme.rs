//! The commands of the section "Prove it" of the README, which print there what they print here.

use std::os::unix::fs::{FileExt as _, symlink};
use std::process::Command;

use crate::common::image::{Image, open_for_writing};
use crate::common::loop_device::Loop;
use crate::common::readme::indented;
use crate::common::{GIB, MIB, needs, run};

/// A command, and what it prints.
struct Transcript {
    command: String,
    output: String,
}

/// The commands of the section, with `device` in place of the README's.
fn transcripts(device: &str) -> Vec<Transcript> {
    let mut transcripts: Vec<Transcript> = Vec::new();
    for line in indented("README.md", "Prove it") {
        let line = line.replace("/dev/loop0", device);
        match (line.strip_prefix("# "), transcripts.last_mut()) {
            (Some(command), _) => transcripts.push(Transcript { command: command.to_owned(), output: String::new() }),
            (None, Some(last)) => last.output += &(line + "\n"),
            (None, None) => panic!("output without a command: {line}"),
        }
    }
    transcripts
}

#[test]
fn verifications_print_what_the_readme_has() {
    needs!(root, programs["cp"]);
    let directory = tempfile::tempdir().unwrap();
    symlink(env!("CARGO_BIN_EXE_blkholefs"), directory.path().join("blkholefs")).unwrap();
    let image = Image::with_data(GIB, &[100 * MIB..110 * MIB, 300 * MIB..310 * MIB, 700 * MIB..710 * MIB]);
    let device = Loop::new(image.path());
    let copy = directory.path().join("copy.img");
    run("cp", ["--sparse=always".as_ref(), image.path().as_os_str(), copy.as_os_str()]);

    let transcripts = transcripts(device.path().to_str().unwrap());
    assert_eq!(transcripts.len(), 4);
    for Transcript { command, output } in transcripts {
        let fails = output.contains("different:");
        if fails {
            open_for_writing(&copy).write_all_at(b"x", 600_000_000).unwrap();
        }
        // Without it, each run would have another seed.
        let seed = output.lines().find_map(|line| line.strip_prefix("seed ")).map(|seed| format!(" --seed {seed}"));
        let script = format!("PATH=.:$PATH {command}{}", seed.unwrap_or_default());
        let result = Command::new("bash").args(["-c", &script]).current_dir(directory.path()).output().unwrap();
        let printed = String::from_utf8([result.stdout, result.stderr].concat()).unwrap();
        // A run of more than 10 seconds also prints how far it is.
        let printed: String = printed.split_inclusive('\n').filter(|line| !line.ends_with("% done\n")).collect();
        assert_eq!(printed, output, "{command}");
        assert_eq!(result.status.success(), !fails, "{command}");
    }
}
