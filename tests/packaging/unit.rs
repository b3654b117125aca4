//! The unit file where it is installed.

use std::fs;
use std::process::Command;

use crate::bench::Ran;
use crate::common::needs;
use crate::tree::{install, source};

#[test]
fn the_unit_runs_the_program_below_the_prefix() {
    needs!(programs["strip"]);
    let unit = fs::read_to_string(source("mount-helpers/systemd/blkholefs@.service")).unwrap();
    for prefix in ["/usr", "/usr/local"] {
        let root = tempfile::tempdir().unwrap();
        install(root.path(), prefix).succeeds();
        let path = root.path().join(&prefix[1..]).join("lib/systemd/system/blkholefs@.service");
        let installed = fs::read_to_string(path).unwrap();
        assert!(installed.contains(&format!("\nExecStart={prefix}/sbin/blkholefs mount ")), "{installed}");
        assert_eq!(installed.replace(&format!("{prefix}/sbin/blkholefs"), "/usr/sbin/blkholefs"), unit);
    }
}

#[test]
fn systemd_accepts_the_unit() {
    needs!(programs["systemd-analyze", "strip"]);
    let root = tempfile::tempdir().unwrap();
    install(root.path(), "/usr/local").succeeds();
    let unit = fs::read_to_string(root.path().join("usr/local/lib/systemd/system/blkholefs@.service")).unwrap();
    let place = root.path().join("blkholefs@dev-loop0.service");
    // The program is not in that place of this system.
    fs::write(&place, unit.replace("/usr/local/sbin/blkholefs", env!("CARGO_BIN_EXE_blkholefs"))).unwrap();
    let mut command = Command::new("systemd-analyze");
    Ran::of(command.args(["verify", "--man=no", "--recursive-errors=no"]).arg(place)).succeeds();
}

/// With such an option, the service has its own mount namespace, and no other process sees what it mounts:
/// systemd.exec(5), "Sandboxing", "Paths", "Credentials" and others.
#[test]
fn no_option_of_the_unit_makes_a_namespace() {
    let of_namespaces = |key: &str| {
        let prefixes =
            ["Protect", "Private", "Root", "Mount", "Extension", "Temporary", "LoadCredential", "SetCredential"];
        let whole = [
            "DynamicUser",
            "ProcSubset",
            "LogNamespace",
            "NetworkNamespacePath",
            "IPCNamespacePath",
            "JoinsNamespaceOf",
        ];
        prefixes.iter().any(|prefix| key.starts_with(prefix)) || key.ends_with("Paths") || whole.contains(&key)
    };
    assert!(of_namespaces("ProtectSystem") && of_namespaces("ReadWritePaths") && !of_namespaces("DevicePolicy"));
    for unit in ["mount-helpers/systemd/blkholefs@.service", "mount-helpers/systemd/mnt-thin.mount"] {
        let text = fs::read_to_string(source(unit)).unwrap();
        let settings = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('='));
        let keys: Vec<_> = settings.map(|(key, _)| key).collect();
        assert!(keys.len() > 4, "{keys:?}");
        assert_eq!(keys.iter().find(|key| of_namespaces(key)), None, "{unit}");
    }
}
