//! The README and the other pages: links to files, folders and sections lead somewhere, and the reasons for "all data" that are
//! explained are those of the program.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The pages whose links are checked, relative to the repository, and all of `docs`.
const PAGES: [&str; 5] = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benches/README.md", "tests/fuzz/README.md"];

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn pages() -> Vec<PathBuf> {
    let docs = fs::read_dir(repository().join("docs")).expect("a folder").map(|entry| entry.expect("an entry").path());
    PAGES.iter().map(|page| repository().join(page)).chain(docs).collect()
}

/// The lines of a page that are text: not indented by four or more, and not fenced.
fn text_lines(page: &str) -> Vec<&str> {
    let mut is_fenced = false;
    let is_text = |line: &&str| {
        let is_fence = line.trim_start().starts_with("```");
        is_fenced ^= is_fence;
        !is_fenced && !is_fence && !line.starts_with("    ")
    };
    page.lines().filter(is_text).collect()
}

/// The targets of the links `[text](target)` of a page.
fn targets(page: &str) -> Vec<String> {
    let text = text_lines(page).join("\n");
    let after_links = text.split("](").skip(1);
    after_links.filter_map(|rest| rest.split_once(')')).map(|(target, _)| target.to_owned()).collect()
}

/// The name that a heading has in links: as on GitHub, in small letters, with a hyphen for each space and without other signs.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|sign| sign.is_alphanumeric() || matches!(sign, ' ' | '-' | '_'));
    kept.map(|sign| if sign == ' ' { '-' } else { sign.to_ascii_lowercase() }).collect()
}

fn anchors(page: &str) -> BTreeSet<String> {
    let headings = text_lines(page).into_iter().filter(|line| line.starts_with('#'));
    headings.map(|line| anchor(line.trim_start_matches('#').trim())).collect()
}

/// What is wrong with a link of `page`, if anything is.
fn fault(page: &Path, target: &str) -> Option<String> {
    if target.starts_with("https://") {
        return None;
    }
    let (path, section) = target.split_once('#').unwrap_or((target, ""));
    let file = if path.is_empty() { page.to_owned() } else { page.with_file_name(path) };
    let text = if file.is_dir() { Ok(String::new()) } else { fs::read_to_string(&file) };
    match text {
        Err(error) => Some(format!("{}: {target}: {error}", page.display())),
        Ok(text) if !section.is_empty() && !anchors(&text).contains(section) => {
            Some(format!("{}: {target}: no such section", page.display()))
        }
        Ok(_) => None,
    }
}

#[test]
fn links_lead_to_files_and_sections() {
    let mut count = 0;
    let mut faults = Vec::new();
    for page in pages() {
        let targets = targets(&fs::read_to_string(&page).expect("a page"));
        count += targets.len();
        faults.extend(targets.iter().filter_map(|target| fault(&page, target)));
    }
    assert!(count > 20, "{count} links were found");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_broken_link_is_a_fault() {
    let readme = repository().join("README.md");
    assert!(fault(&readme, "docs/nowhere.md").is_some());
    assert!(fault(&readme, "#nowhere").is_some());
    assert_eq!(fault(&readme, "#try-it"), None);
    assert_eq!(targets("see [a](b.md#c) and\n    [code](d)\n```\n[e](f)\n```\n"), ["b.md#c"]);
    assert_eq!(anchor("My file is all data: `info`"), "my-file-is-all-data-info");
}

/// Every page of `docs` is reached from the README.
#[test]
fn the_readme_names_every_page() {
    let readme = fs::read_to_string(repository().join("README.md")).expect("a page");
    let targets = targets(&readme);
    for page in fs::read_dir(repository().join("docs")).expect("a folder") {
        let name = format!("docs/{}", page.expect("an entry").file_name().display());
        assert!(targets.iter().any(|target| target == &name), "{name}");
    }
}

/// The source of the program as one text, in which the parts of a literal on several lines are joined.
fn source(folder: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        text += &if path.is_dir() { source(&path) } else { fs::read_to_string(&path).expect("a source file") };
    }
    let mut parts = text.split("\\\n");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.trim_start())
}

#[test]
fn the_reasons_of_all_data_are_those_of_the_program() {
    let page = fs::read_to_string(repository().join("docs/troubleshooting.md")).expect("a page");
    let section = page.split("\n## ").find(|section| section.starts_with("My file is all data")).expect("the section");
    let cells = section.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    // In a row: `REASON`, `REASON` (kind). What follows a colon or dots differs between devices.
    let quoted = cells.flat_map(|cell| cell.split('`').step_by(2));
    let reasons: Vec<_> = quoted.map(|text| text.split([':', '.']).next().unwrap_or_default().trim()).collect();
    assert!(reasons.len() > 15, "{reasons:?}");
    let source = source(&repository().join("src"));
    for reason in reasons.into_iter().filter(|reason| !reason.is_empty()) {
        assert!(source.contains(reason), "the program has no reason {reason:?}");
    }
}

/// The lines of a man page that are not filled, as they are printed.
fn unfilled(page: &str) -> Vec<String> {
    let blocks = page.split("\n.nf\n").skip(1).filter_map(|rest| rest.split("\n.fi").next());
    let lines = blocks.flat_map(str::lines).map(|line| line.strip_prefix(".B ").unwrap_or(line));
    lines.map(|line| line.replace("\\-", "-").replace("\\(aq", "'")).collect()
}

/// Such a line is indented by 14 columns, and a longer one is broken at any letter by a terminal of 80.
#[test]
fn the_examples_of_the_man_pages_fit_a_terminal() {
    for page in ["blkholefs.8", "mount.blkholefs.8"] {
        let text = fs::read_to_string(repository().join("mount-helpers/man").join(page)).expect("a page");
        let lines = unfilled(&text);
        assert!(lines.len() > 10, "{page}: {lines:?}");
        let long: Vec<_> = lines.iter().filter(|line| line.len() > 80 - 14).collect();
        assert!(long.is_empty(), "{page}: {long:?}");
    }
}
