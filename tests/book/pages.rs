//! The pages of `docs/`: read from the table of contents, and cut into lines of text and blocks of code.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

/// A page of the book.
pub struct Page {
    /// Its path under `docs/`.
    pub path: PathBuf,
    pub text: String,
}

/// A fenced block: what stands after the fence (`console,needs-gpu`), the 1-based line of the fence, and its lines.
pub struct Block {
    pub kind: String,
    pub line: usize,
    pub lines: Vec<String>,
}

pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn docs() -> PathBuf {
    repository().join("docs")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every page that the table of contents names.
pub fn pages() -> Vec<Page> {
    let summary = read(&docs().join("SUMMARY.md"));
    let links = summary.lines().flat_map(targets);
    links.map(|link| Page { text: read(&docs().join(&link)), path: PathBuf::from(link) }).collect()
}

impl Page {
    /// Its fenced blocks, and its lines outside of them with their 1-based numbers.
    pub fn parts(&self) -> (Vec<Block>, Vec<(usize, &str)>) {
        let (mut blocks, mut text) = (Vec::new(), Vec::new());
        let mut open: Option<Block> = None;
        for (line, content) in (1..).zip(self.text.lines()) {
            match (content.trim_start().strip_prefix("```"), open.take()) {
                (Some(kind), None) => {
                    open = Some(Block { kind: kind.trim().to_string(), line, lines: Vec::new() });
                }
                (Some(_), Some(block)) => blocks.push(block),
                (None, Some(mut block)) => {
                    block.lines.push(content.to_string());
                    open = Some(block);
                }
                (None, None) => text.push((line, content)),
            }
        }
        assert!(open.is_none(), "{}: a block has no end", self.path.display());
        (blocks, text)
    }

    /// The names that links may put after `#`: headings, in the way of code hosts and mdBook.
    fn anchors(&self) -> BTreeSet<String> {
        let (_, text) = self.parts();
        let headings = text.into_iter().filter(|(_, line)| line.starts_with('#'));
        headings.map(|(_, line)| anchor(line.trim_start_matches('#').trim())).collect()
    }
}

fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

/// Where the links of a line lead, pictures included; code is no link.
fn targets(line: &str) -> Vec<String> {
    // Every second piece between backquotes is code.
    let text: String = line.split('`').step_by(2).collect::<Vec<_>>().join("code");
    let after_text = text.split("](").skip(1);
    after_text.filter_map(|rest| Some(rest.split_once(')')?.0.to_string())).collect()
}

/// `a/b/../c` without its dots.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => _ = plain.pop(),
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    fn add(folder: &Path, found: &mut BTreeSet<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                add(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "md") {
                found.insert(path.strip_prefix(docs()).unwrap().to_path_buf());
            }
        }
    }
    let mut found = BTreeSet::new();
    add(&docs(), &mut found);
    found.remove(Path::new("SUMMARY.md"));
    let named: BTreeSet<PathBuf> = pages().into_iter().map(|page| page.path).collect();
    let missing: Vec<_> = found.difference(&named).collect();
    assert!(missing.is_empty(), "name these pages in docs/SUMMARY.md: {missing:?}");
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let pages = pages();
    let mut broken = Vec::new();
    for page in &pages {
        for (line, content) in page.parts().1 {
            for target in targets(content).iter().filter(|target| !target.contains("://")) {
                let (path, heading) = target.split_once('#').unwrap_or((target, ""));
                let folder = page.path.parent().unwrap();
                let led = if path.is_empty() {
                    page.path.clone()
                } else {
                    plain(&Path::new("docs").join(folder).join(path))
                };
                let led = led.strip_prefix("docs").map(Path::to_path_buf).unwrap_or(led);
                let there = docs().join(&led).exists() || repository().join(&led).exists();
                let other = pages.iter().find(|page| page.path == led);
                let headed = heading.is_empty() || other.is_none_or(|page| page.anchors().contains(heading));
                if !(there && headed) {
                    broken.push(format!("docs/{}:{line}: {target}", page.path.display()));
                }
            }
        }
    }
    assert!(broken.is_empty(), "links that lead nowhere:\n{}", broken.join("\n"));
}

/// Pictures load in a moment, and the repository stays small.
#[test]
fn pictures_are_small() {
    for entry in std::fs::read_dir(docs().join("pictures")).unwrap() {
        let entry = entry.unwrap();
        let bytes = entry.metadata().unwrap().len();
        assert!(bytes <= 100_000, "{}: {bytes} bytes", entry.path().display());
    }
}

#[test]
fn links_and_headings_are_read() {
    assert_eq!(targets("a [b](c.md#d), `[x](y)` and ![e](f.png)"), ["c.md#d", "f.png"]);
    assert_eq!(anchor("`--recompute none|layer`"), "--recompute-nonelayer");
    assert_eq!(plain(Path::new("docs/how-to/../data.md")), Path::new("docs/data.md"));
}
