//! The completions of bash, zsh and fish offer what the program knows: the help text says which commands and options there are,
//! `src/mount/words.rs` which options a list has after `-o`.

mod common;
#[path = "../src/mount/words.rs"]
#[allow(dead_code, reason = "only the lists are needed here")]
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use common::image::Image;
use common::{KIB, needs, run, try_run};

const BASH: &str = include_str!("../mount-helpers/completions/blkholefs.bash");
const ZSH: &str = include_str!("../mount-helpers/completions/_blkholefs");
const FISH: &str = include_str!("../mount-helpers/completions/blkholefs.fish");

fn strings(words: &[&str]) -> BTreeSet<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// The commands of the help text, each with its options: those of the usage, and those of the sections that name it.
fn help() -> BTreeMap<String, BTreeSet<String>> {
    let text = run(env!("CARGO_BIN_EXE_blkholefs"), ["--help"]);
    let section =
        |title: &str| text.split("\n\n").find(|part| part.lines().any(|line| line == title)).expect("a section");
    let listed = section("Commands:").lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let mut commands: BTreeMap<String, BTreeSet<String>> =
        listed.map(|name| (name.to_owned(), BTreeSet::new())).collect();
    let mut add = |names: &[&str], line: &str| {
        let options = line.split([' ', ',', '|', '[', ']']).filter(|word| word.starts_with('-') && word.len() > 1);
        for (_, known) in commands.iter_mut().filter(|(name, _)| names.contains(&name.as_str()) || names == ["all"]) {
            known.extend(options.clone().map(str::to_owned));
        }
    };
    let mut command = "";
    for line in section("Usage:").lines() {
        command =
            line.trim_start().strip_prefix("blkholefs ").and_then(|rest| rest.split(' ').next()).unwrap_or(command);
        add(&[command], line);
    }
    for part in text.split("\n\n") {
        let Some(names) = part.lines().next().and_then(|title| title.strip_prefix("Options of ")) else { continue };
        let names: Vec<_> =
            names.split([' ', ',', ':']).filter(|word| !["", "and", "commands"].contains(word)).collect();
        for line in part.lines().skip(1) {
            add(&names, line.trim_start().split("  ").next().unwrap_or_default());
        }
    }
    commands
}

/// What bash offers for the last word, which is divided as bash divides it.
fn bash(words: &[&str], line: &str) -> BTreeSet<String> {
    let script = format!(
        "{BASH}\nCOMP_LINE=$1 COMP_POINT=${{#1}}; shift; COMP_WORDS=(\"$@\") COMP_CWORD=$(($# - 1)); _blkholefs\n\
         ((${{#COMPREPLY[@]}})) && printf '%s\\n' \"${{COMPREPLY[@]}}\"; true"
    );
    let printed = run("bash", ["-c", &script, "bash", line].iter().chain(words));
    printed.lines().map(str::to_owned).collect()
}

/// [`bash`] for words without characters at which bash divides them.
fn bash_line(line: &str) -> BTreeSet<String> {
    bash(&line.split(' ').collect::<Vec<_>>(), line)
}

/// What fish offers at the end of a line, without the descriptions.
fn fish(line: &str) -> BTreeSet<String> {
    let script = format!("{FISH}\ncomplete -C $argv[1]");
    let printed = run("fish", ["--no-config", "-c", &script, line]);
    printed.lines().map(|line| line.split('\t').next().unwrap_or_default().to_owned()).collect()
}

/// The line that zsh makes of a line and a tabulator.
fn zsh(line: &str, directory: &Path) -> String {
    let (completions, result) = (directory.join("completions"), directory.join("result"));
    fs::create_dir_all(&completions).expect("a directory");
    fs::write(completions.join("_blkholefs"), ZSH).expect("a file of ours");
    let setup = format!(
        "PS1='> '\nfpath=({} $fpath)\nautoload -Uz compinit\ncompinit -u -D\nbindkey '^I' complete-word\n\
         finish() {{ print -r -- \"$BUFFER\" > {}; exit }}\nzle -N finish\nbindkey '^F' finish\n",
        completions.display(),
        result.display()
    );
    fs::write(directory.join(".zshrc"), setup).expect("a file of ours");
    let mut shell = Command::new("script")
        .args(["--quiet", "--command", "zsh -i", "/dev/null"])
        .env("ZDOTDIR", directory)
        .env("TERM", "dumb")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("script runs");
    let mut input = shell.stdin.take().expect("stdin is piped");
    write!(input, "{line}\t\x06").expect("input for zsh");
    assert!(shell.wait().expect("zsh ends").success());
    drop(input);
    fs::read_to_string(&result).expect("zsh has written its line").trim_end().to_owned()
}

/// The options after `-o` of a command: with `=` where they have a value.
fn list_options(command: &str) -> BTreeSet<String> {
    let with_value = |list: &[&str]| list.iter().map(|word| format!("{word}=")).collect::<Vec<_>>();
    let mut options: BTreeSet<String> = with_value(words::SOURCE).into_iter().collect();
    options.extend(strings(words::SOURCE_PLAIN));
    if command == "mount" {
        options.extend(with_value(words::MOUNT_WITH_VALUE));
        options.extend(strings(words::MOUNT_PLAIN));
        // Another spelling of `allow_other`.
        options.remove("allow-other");
    }
    options
}

/// Compares what is offered with what must be, apart from flags of mount(2), of which only some are offered.
fn check_list(shell: &str, command: &str, mut offered: BTreeSet<String>) {
    offered.retain(|word| command != "mount" || !words::FLAGS.iter().any(|flag| flag.0 == word));
    assert_eq!(offered, list_options(command), "{shell}: {command} -o");
}

#[test]
fn bash_offers_the_commands_and_their_options() {
    let help = help();
    assert!(help.len() >= 6 && help["map"].contains("--picture") && help["verify"].contains("--volume"), "{help:?}");
    assert_eq!(bash_line("blkholefs "), help.keys().cloned().collect());
    for (command, mut options) in help {
        // A list of options is that of mounts, or of what has a device.
        assert_eq!(bash_line(&format!("blkholefs {command} -")), options, "{command}");
        options.retain(|option| option.starts_with("--"));
        assert_eq!(bash_line(&format!("blkholefs {command} --")), options, "{command}");
        if bash_line(&format!("blkholefs {command} -")).contains("-o") {
            check_list("bash", &command, bash_line(&format!("blkholefs {command} -o ")));
        }
    }
}

#[test]
fn fish_offers_the_commands_and_their_options() {
    needs!(programs["fish"]);
    let help = help();
    assert_eq!(fish("blkholefs "), help.keys().cloned().collect());
    for (command, options) in help {
        // fish offers the long name of an option that has both.
        let short = if command == "mount" { &["-f", "-h", "-V"][..] } else { &["-h", "-V"] };
        let mut offered = fish(&format!("blkholefs {command} -"));
        offered.extend(fish(&format!("blkholefs {command} --")));
        offered.extend(strings(short));
        assert_eq!(offered, options, "{command}");
        if options.contains("-o") {
            check_list("fish", &command, fish(&format!("blkholefs {command} -o ")));
        }
    }
}

#[test]
fn zsh_knows_the_commands_and_their_options() {
    let block = |command: &str| {
        let begin = ZSH.find(&format!("\n        {command})")).unwrap_or_else(|| panic!("{command}"));
        ZSH[begin..].split(";;").next().unwrap_or_default()
    };
    for (command, options) in help() {
        assert!(ZSH.contains(&format!("'{command}:")), "{command}");
        let shared = if block(&command).contains("$source") { "-o+[ --volume=" } else { "" };
        let shown = block(&command).to_owned() + shared + " -h,--help} -V,--version}";
        let is_shown =
            |option: &String| ["[", "=", "+", "}", ","].iter().any(|end| shown.contains(&format!("{option}{end}")));
        assert!(options.iter().all(is_shown), "{command}: {options:?}: {shown}");
    }
    let is_word = |word: &str| ZSH.contains(&format!("'{}[", word.trim_end_matches('=')));
    assert!(list_options("mount").iter().all(|word| is_word(word)));
}

#[test]
fn zsh_completes_a_line() {
    needs!(programs["zsh", "script"]);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let image = directory.path().join("my disk.img");
    fs::write(&image, "bytes").expect("a file of ours");
    let quoted = format!("{}/my\\ disk.img", directory.path().display());
    for (typed, expected) in [
        ("blkholefs ver", "blkholefs verify".to_owned()),
        ("blkholefs map --pic", "blkholefs map --picture".to_owned()),
        ("blkholefs map --format=dd", "blkholefs map --format=ddrescue".to_owned()),
        ("blkholefs mount -o ro,stat", "blkholefs mount -o ro,static".to_owned()),
        ("blkholefs info UU", "blkholefs info UUID=".to_owned()),
        (&format!("blkholefs map {}/my", directory.path().display()), format!("blkholefs map {quoted}")),
    ] {
        // After a word of a list, zsh puts a comma that goes away with the next space.
        assert_eq!(zsh(typed, directory.path()).trim_end_matches([' ', ',']), expected, "{typed}");
    }
}

#[test]
fn the_forms_are_those_of_the_program() {
    let error = try_run(env!("CARGO_BIN_EXE_blkholefs"), ["map", "--format", "no", "x"], "").expect_err("no form");
    let forms =
        error.split("there are ").nth(1).expect("a list of forms").lines().next().unwrap_or_default().split(", ");
    let forms: BTreeSet<_> = forms.map(str::to_owned).collect();
    assert_eq!(bash_line("blkholefs map --format "), forms);
    let divided = bash(&["blkholefs", "map", "--format", "=", "b"], "blkholefs map --format=b");
    assert_eq!(divided, strings(&["borg", "bmap"]));
    let in_zsh = forms.iter().all(|form| ZSH.contains(&format!(" {form}")) || ZSH.contains(&format!("({form}")));
    assert!(in_zsh, "{forms:?}");
    if common::requires(&["fish"]) {
        assert_eq!(fish("blkholefs map --format "), forms);
    }
}

/// A directory with a file, a folder and a FIFO, which is no device.
fn files() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| directory.path().join(name);
    fs::write(at("my disk.img"), "").expect("a file of ours");
    fs::create_dir(at("folder")).expect("a folder of ours");
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("a FIFO");
    directory
}

#[test]
fn devices_and_images_are_offered() {
    needs!(programs["fish"]);
    let directory = files();
    let at = |name: &str| format!("{}/{name}", directory.path().display());
    let begin = at("");
    for command in ["map", "info", "verify", "mount"] {
        let line = format!("blkholefs {command} {begin}");
        assert_eq!(bash_line(&line), strings(&[&at("my disk.img"), &at("folder")]), "{command}");
        assert_eq!(fish(&line), strings(&[&at("my disk.img"), &at("folder/")]), "{command}");
        for tags in [bash_line(&format!("blkholefs {command} ")), fish(&format!("blkholefs {command} "))] {
            assert!(tags.is_superset(&strings(&["UUID=", "LABEL=", "PARTUUID=", "PARTLABEL="])), "{tags:?}");
        }
    }
    // Quotes of what was typed, options before, and values within a list.
    let quoted = begin.clone() + "my\\ d";
    let words = ["blkholefs", "map", "--offset", "4K", "--totals", &quoted];
    assert_eq!(bash(&words, &words.join(" ")), strings(&[&at("my disk.img")]));
    let words = ["blkholefs", "map", "-o", "used,since", "=", &begin];
    let line = format!("blkholefs map -o used,since={begin}");
    assert_eq!(bash(&words, &line), strings(&[&at("my disk.img"), &at("folder")]));
    let of_fish = [at("my disk.img"), at("folder/")].map(|path| format!("used,since={path}"));
    assert_eq!(fish(&line), of_fish.into_iter().collect());
    // Only a folder can be the second operand of mount.
    let line = format!("blkholefs mount -o ro x {begin}");
    assert_eq!(bash_line(&line), strings(&[&at("folder")]));
}

/// Options of a shell change how it expands patterns and divides words.
#[test]
fn bash_offers_the_same_whatever_the_shell_options_are() {
    let set = |setting: &str, words: &[&str], line: &str| {
        let script = format!(
            "{BASH}\nCOMP_LINE=$1 COMP_POINT=${{#1}}; shift; COMP_WORDS=(\"$@\") COMP_CWORD=$(($# - 1))\n{setting}\n\
             _blkholefs\nprintf '%s\\n' ended ${{COMPREPLY[@]+\"${{COMPREPLY[@]}}\"}}"
        );
        let printed = run("bash", ["-c", &script, "bash", line].iter().chain(words));
        let mut lines = printed.lines().map(str::to_owned);
        assert_eq!(lines.next().as_deref(), Some("ended"), "{setting}: {line}");
        lines.collect::<BTreeSet<_>>()
    };
    for setting in ["shopt -s failglob", "shopt -s nullglob", "set -f", "set -u", "IFS=:", "IFS="] {
        for line in ["blkholefs map --", "blkholefs mount -o ro,s", "blkholefs map [a", "blkholefs "] {
            let words: Vec<_> = line.split(' ').collect();
            assert_eq!(set(setting, &words, line), bash(&words, line), "{setting}: {line}");
        }
        // Not every machine has labels of partitions, nor a directory for them.
        for tag in ["UUID", "LABEL", "PARTUUID", "PARTLABEL"] {
            let (words, line) = (["blkholefs", "map", tag, "=", ""], format!("blkholefs map {tag}="));
            assert_eq!(set(setting, &words, &line), bash(&words, &line), "{setting}: {line}");
        }
    }
}

/// A mount at a directory whose name has any characters. Dropping this value unmounts it.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(spec: &Path, directory: &'a Path) -> Self {
        run(env!("CARGO_BIN_EXE_blkholefs"), ["mount".as_ref(), spec, directory]);
        Self(directory)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        run(env!("CARGO_BIN_EXE_blkholefs"), ["umount".as_ref(), self.0]);
    }
}

#[test]
fn mountpoints_are_offered_as_they_are() {
    needs!(root, programs["fish"]);
    let directory = tempfile::tempdir().expect("a temporary directory");
    // The kernel writes the space as \040, which is followed by a digit here.
    let place = directory.path().join("a 1%b\\");
    fs::create_dir(&place).expect("a folder of ours");
    let image = Image::new(64 * KIB);
    let mount = Mounted::new(image.path(), &place);
    let expected = place.to_str().expect("text").to_owned();
    for command in ["umount", "status"] {
        let line = format!("blkholefs {command} ");
        assert!(bash_line(&line).contains(&expected), "{:?}", bash_line(&line));
        assert!(fish(&line).contains(&expected), "{:?}", fish(&line));
    }
    drop(mount);
    assert!(!bash_line("blkholefs umount ").contains(&expected));
}
