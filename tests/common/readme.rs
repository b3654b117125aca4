//! The README, whose commands some tests run.

/// The indented lines of a section, in the order of the page.
pub fn indented(title: &str) -> Vec<String> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).expect("the README");
    let title = format!("{title}\n");
    let section = page.split("\n## ").find(|section| section.starts_with(&title)).expect("a section of this title");
    section.lines().filter_map(|line| line.strip_prefix("    ")).map(ToOwned::to_owned).collect()
}
