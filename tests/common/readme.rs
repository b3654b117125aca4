//! The README and the pages of `docs`, whose commands some tests run.

use std::fs;
use std::path::Path;

/// The indented lines of the section `title` of a page, in the order of the page. `page` is relative to the repository.
pub fn indented(page: &str, title: &str) -> Vec<String> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).expect("a page");
    let title = format!("{title}\n");
    let section = text.split("\n## ").find(|section| section.starts_with(&title)).expect("a section of this title");
    section.lines().filter_map(|line| line.strip_prefix("    ")).map(ToOwned::to_owned).collect()
}
