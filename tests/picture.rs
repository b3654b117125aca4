//! `blkholefs map --picture` and `--svg`, and `map` and `info` of several devices.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::image::Image;
use common::{KIB, MIB, needs, run, try_run};

const PROGRAM: &str = env!("CARGO_BIN_EXE_blkholefs");

/// Data at the start, in the middle, and one block in the second half.
fn image() -> Image {
    Image::with_data(16 * MIB, &[0..MIB, 4 * MIB..4 * MIB + 64 * KIB, 12 * MIB..12 * MIB + 4 * KIB])
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

/// Runs the program with the standard output in a pipe, and an environment of these variables.
fn output(words: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.args(words).env_clear().envs(variables.iter().copied());
    command.output().expect("the program runs")
}

fn printed(words: &[&str], variables: &[(&str, &str)]) -> String {
    let output = output(words, variables);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// The characters of the cells, in rows.
fn cells(picture: &str) -> Vec<&str> {
    let rows = picture.lines().skip(3).take_while(|line| !line.is_empty());
    rows.map(|line| line.split_at(11).1).collect()
}

#[test]
fn a_picture_shows_where_the_data_is() {
    let image = image();
    let picture = printed(&["map", "--picture", text(image.path())], &[("COLUMNS", "43")]);
    assert!(
        picture.starts_with(&format!("{}\n16MiB, one cell is 32KiB\n\n       0B  #", text(image.path()))),
        "{picture}"
    );
    let rows = cells(&picture);
    assert_eq!(rows.len(), 16);
    assert_eq!(rows[0], "#".repeat(32));
    assert_eq!(rows[4], format!("##{}", ".".repeat(30)));
    assert_eq!(rows[12], format!("-{}", ".".repeat(31)));
    assert_eq!(rows[1], ".".repeat(32));
    assert!(picture.contains("data 1MiB (6.7%)") && picture.contains("holes 14.9MiB (93.3%)"), "{picture}");
}

#[test]
fn a_pipe_has_no_colours_and_the_locale_decides_about_blocks() {
    let image = image();
    let words = ["map", "--picture", text(image.path())];
    let utf8 = [("LANG", "C.UTF-8"), ("TERM", "xterm-256color")];
    let blocks = printed(&words, &utf8);
    assert!(blocks.contains('\u{2588}') && !blocks.contains('\x1b'), "{blocks}");
    let ascii = printed(&words, &[]);
    assert!(ascii.is_ascii(), "{ascii}");
    assert_eq!(printed(&["map", "--picture", "--ascii", text(image.path())], &utf8), ascii);
    assert_eq!(cells(&blocks).len(), cells(&ascii).len());
}

/// script(1) runs the program on a terminal, whose width stty(1) sets.
#[test]
fn a_terminal_has_colours_and_its_width() {
    needs!(programs["script", "stty"]);
    let image = image();
    let on_terminal = |more: &str| {
        let command = format!("stty cols 60; {more} {PROGRAM} map --picture {}", text(image.path()));
        let output = Command::new("script")
            .args(["--quiet", "--return", "--command", &command, "/dev/null"])
            .env_clear()
            .envs([("LANG", "C.UTF-8"), ("TERM", "xterm"), ("COLUMNS", "200"), ("PATH", "/usr/bin:/bin")])
            .output()
            .expect("script runs");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("text").replace('\r', "")
    };
    let coloured = on_terminal("");
    assert!(coloured.contains("       0B  \x1b[36m\u{2588}"), "{coloured}");
    let plain = on_terminal("NO_COLOR=1");
    assert!(!plain.contains('\x1b') && !on_terminal("TERM=dumb").contains('\x1b'), "{plain}");
    assert_eq!(cells(&plain)[0].chars().count(), 48, "{plain}");
}

#[test]
fn a_picture_of_a_part() {
    let image = image();
    let picture = printed(&["map", "--picture", "--offset", "4M", "--length", "128K", text(image.path())], &[]);
    assert!(picture.contains("16MiB, of which 4MiB to 4.1MiB, one cell is 4KiB"), "{picture}");
    assert_eq!(cells(&picture), [format!("{}{}", "#".repeat(16), ".".repeat(16))]);
}

#[test]
fn an_svg_file_is_written_whole_and_only_over_a_picture() {
    needs!(programs["python3"]);
    let (image, directory) = (image(), tempfile::tempdir().expect("a temporary directory"));
    let link = directory.path().join("a<b>&\u{1}\".img");
    std::os::unix::fs::symlink(image.path(), &link).expect("a link");
    let file = directory.path().join("map.svg");
    for _ in 0..2 {
        assert_eq!(run(PROGRAM, ["map", "--svg", text(&file), text(&link)]), "");
    }
    let written = fs::read_to_string(&file).expect("the picture");
    assert_eq!(run(PROGRAM, ["map", "--svg", "-", text(&link)]), written);
    let titles = "import sys,xml.etree.ElementTree as e; print(e.parse(sys.argv[1]).getroot()[0].text)";
    let title = run("python3", ["-c", titles, text(&file)]);
    assert!(title.ends_with("/a<b>&\\u{1}\".img\n"), "{title}");

    let before = fs::read(image.path()).expect("the image");
    for (target, reason) in [(image.path(), "the device itself"), (Path::new("/dev/null"), "no regular file")] {
        let error = try_run(PROGRAM, ["map", "--svg", text(target), text(image.path())], "").expect_err("a refusal");
        assert!(error.contains(reason), "{error}");
    }
    let other = self::image();
    let error = try_run(PROGRAM, ["map", "--svg", text(image.path()), text(other.path())], "").expect_err("a refusal");
    assert!(error.contains("no picture"), "{error}");
    assert!(fs::read(image.path()).expect("the image") == before, "the image was changed");
}

#[test]
fn several_devices_have_headers() {
    let (one, two) = (image(), Image::new(64 * KIB));
    let [a, b] = [text(one.path()), text(two.path())];
    for command in [&["map"][..], &["map", "--totals"], &["info"]] {
        let of = |devices: &[&str]| printed(&[command, devices].concat(), &[]);
        assert_eq!(of(&[a, b]), format!("==> {a} <==\n{}\n==> {b} <==\n{}", of(&[a]), of(&[b])), "{command:?}");
    }
    let of = |devices: &[&str]| printed(&[&["map", "--picture"], devices].concat(), &[]);
    assert_eq!(of(&[a, b]), format!("{}\n{}", of(&[a]), of(&[b])));
}

#[test]
fn several_devices_are_one_json_document() {
    let (one, two) = (image(), Image::new(64 * KIB));
    let [a, b] = [text(one.path()), text(two.path())];
    let json =
        |words: &[&str]| -> serde_json::Value { serde_json::from_str(&printed(words, &[])).expect("valid JSON") };
    let both = json(&["map", "--json", a, b]);
    let maps = [json(&["map", "--json", a]), json(&["map", "--json", b])];
    let [map_of_a, map_of_b] = &maps;
    assert_eq!(both, serde_json::json!([{ "device": a, "map": map_of_a }, { "device": b, "map": map_of_b }]));
    let mut infos = [json(&["info", "--json", a]), json(&["info", "--json", b])];
    infos[0]["device"] = a.into();
    infos[1]["device"] = b.into();
    assert_eq!(json(&["info", "--json", a, b]), serde_json::json!(infos));
}

#[test]
fn an_error_of_one_device_does_not_stop_the_others() {
    let one = image();
    let good = text(one.path());
    for words in [["map", "--totals"], ["map", "--json"], ["map", "--picture"], ["info", "--json"]] {
        let all = output(&[&words[..], &[good, "/nowhere", good]].concat(), &[]);
        assert_eq!(all.status.code(), Some(32), "{words:?}");
        let stderr = String::from_utf8_lossy(&all.stderr);
        assert_eq!(stderr, "blkholefs: /nowhere: cannot open: No such file or directory\n", "{words:?}");
        let stdout = String::from_utf8(all.stdout).expect("text");
        assert!(stdout.matches(good).count() >= 2, "{words:?}: {stdout}");
        if words[1] == "--json" {
            let parsed: serde_json::Value = serde_json::from_str(&stdout).expect("valid JSON");
            assert_eq!(parsed[1]["error"], "/nowhere: cannot open: No such file or directory");
            assert_eq!((parsed[0]["device"].as_str(), parsed[2]["device"].as_str()), (Some(good), Some(good)));
        }
    }
    // The exit code is that of the worst error, whatever its place.
    for (devices, code) in
        [(["/nowhere", "no://uri", good], 32), (["no://uri", good, "/nowhere"], 32), (["no://uri", good, good], 1)]
    {
        let all = output(&[&["map", "--totals"][..], &devices].concat(), &[]);
        assert_eq!(all.status.code(), Some(code), "{devices:?}: {}", String::from_utf8_lossy(&all.stderr));
        assert!(String::from_utf8_lossy(&all.stdout).contains(" data\n"), "{devices:?}");
    }
}

#[test]
fn each_command_prints_the_help_and_the_version() {
    let version = format!("blkholefs {}\n", env!("CARGO_PKG_VERSION"));
    for command in ["map", "info", "verify"] {
        for flag in ["-V", "--version"] {
            assert_eq!(printed(&[command, "x", flag], &[]), version, "{command} {flag}");
        }
        assert!(printed(&[command, "x", "--help"], &[]).contains("\nUsage:\n"), "{command}");
    }
}

#[test]
fn wrong_options_are_usage_errors() {
    let image = image();
    let name = text(image.path());
    for (words, reason) in [
        (&["map", "--ascii", name][..], "--ascii is for pictures"),
        (&["map", "--ascii", "--json", name], "--ascii is for pictures"),
        (&["map", "--picture", "--totals", name], "exclude each other"),
        (&["map", "--picture", "--svg", "x", name], "exclude each other"),
        (&["map", "--format", "csi", name, name], "one device at a time with --format"),
        (&["map", "--svg", "x", name, name], "one device at a time with --svg"),
        (&["map", "--since", "x", name, name], "one device at a time"),
        (&["map", "-o", "thin_metadata=x", name, name], "one device at a time with -o thin_metadata"),
        (&["info", "-o", "nbd=nbd://x/y", name, name], "one device at a time with -o nbd"),
        (&["verify", name, name], "verify: one device at a time"),
        (&["info", "--picture", name], "invalid option '--picture'"),
        (&["map", "--picture"], "map: a device is missing"),
    ] {
        let output = output(words, &[]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), error.contains(reason)), (Some(1), true), "{words:?}: {error}");
    }
    assert!(!Path::new("x").exists());
}
