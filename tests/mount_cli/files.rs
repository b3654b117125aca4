//! The man pages and examples of `mount-helpers/`. `tests/packaging` has the tests of how they are installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bench::Ran;
use crate::common::needs;

fn helpers(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-helpers").join(name)
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
