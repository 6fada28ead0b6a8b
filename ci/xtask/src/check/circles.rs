// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! No circle of files: in the trees of the module a file that uses another one is not used by it, directly or
//! indirectly. Declarations and re-exports of a folder's `mod.rs` are ignored.

use super::source::{self, Source};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};

/// The trees of the module: the name by which `crate::` finds each, and its folder. Other names are the driver's own.
const TREES: &[(&str, &str)] = &[
    ("linux", "xenbus/src/linux/"),
    ("proto", "xenbus/src/proto/"),
    ("ring", "ring/src/ring/"),
    ("tap", "blktap-kmod/src/"),
    ("", "blkback/src/"),
];

/// Files that each file uses, with the lines.
type FileUses = BTreeMap<String, BTreeSet<String>>;

pub(super) fn check(sources: &[Source]) -> Result<()> {
    super::none(complaints(sources))
}

fn complaints(sources: &[Source]) -> Vec<String> {
    let uses = uses(sources);
    let reach: FileUses = uses
        .keys()
        .map(|file| (file.clone(), reachable(&uses, file)))
        .collect();
    let mut circles = BTreeSet::new();
    for (file, reached) in &reach {
        if reached.contains(file) {
            let back = |other: &&String| reach.get(*other).is_some_and(|of| of.contains(file));
            circles.insert(reached.iter().filter(back).cloned().collect::<Vec<_>>());
        }
    }
    circles
        .iter()
        .map(|files| {
            format!(
                "these files use each other in a circle: {}: move what they share below both",
                files.join(", ")
            )
        })
        .collect()
}

/// Returns the files that a file uses directly or indirectly.
fn reachable(uses: &FileUses, from: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut left = vec![from];
    while let Some(file) = left.pop() {
        for next in uses.get(file).into_iter().flatten() {
            if found.insert(next.clone()) {
                left.push(next);
            }
        }
    }
    found
}

fn uses(sources: &[Source]) -> FileUses {
    let paths: BTreeSet<&str> = sources.iter().map(|source| source.path.as_str()).collect();
    let mut uses = FileUses::new();
    for source in source::rust(sources) {
        let Some((_, tree)) = TREES
            .iter()
            .find(|(_, folder)| source.path.starts_with(folder))
        else {
            continue;
        };
        if declares(&source.path) {
            continue;
        }
        let own = room(&paths, &source.path);
        let code = source::code(&source.text);
        let used = mentioned(&code)
            .filter_map(|names| used(&paths, tree, &source.path, &names))
            .filter(|other| *other != own);
        uses.entry(own.clone())
            .or_default()
            .extend(used.collect::<Vec<_>>());
    }
    uses
}

/// Returns true for a file that only declares the others of its folder.
fn declares(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    matches!(name, "mod.rs" | "lib.rs") || name.ends_with("_main.rs")
}

/// Returns the file that a file counts as: with `a.rs` beside it, all of the folder `a` is a part of that.
fn room(paths: &BTreeSet<&str>, path: &str) -> String {
    let mut end = 0;
    while let Some(at) = path[end..].find('/') {
        end += at + 1;
        let file = format!("{}.rs", &path[..end - 1]);
        if paths.contains(file.as_str()) {
            return file;
        }
    }
    path.into()
}

/// Returns the file of a path, from a file of a tree.
fn used(paths: &BTreeSet<&str>, tree: &str, file: &str, names: &[String]) -> Option<String> {
    let mut names = names.iter().map(String::as_str).peekable();
    let mut place = match names.next()? {
        "crate" => {
            let named = TREES.iter().find(|(name, _)| Some(name) == names.peek());
            if named.is_some() {
                names.next();
            }
            named
                .map_or("blkback/src/", |(_, folder)| folder)
                .to_string()
        }
        _ => {
            let mut place = file.rsplit_once('/')?.0.to_string() + "/";
            while names.next_if(|name| *name == "super").is_some() {
                place = place.trim_end_matches('/').rsplit_once('/')?.0.to_string() + "/";
            }
            // Outside of the tree there are the others.
            let inside = place.starts_with(tree);
            if !inside {
                return None;
            }
            place
        }
    };
    for name in names {
        let file = format!("{place}{name}.rs");
        if paths.contains(file.as_str()) {
            return Some(room(paths, &file));
        }
        place = format!("{place}{name}/");
        if !paths.iter().any(|path| path.starts_with(&place)) {
            return None;
        }
    }
    None
}

/// Returns the paths of a text that begin at the crate or above the file, each as its names; braces are expanded.
fn mentioned(code: &str) -> impl Iterator<Item = Vec<String>> + '_ {
    ["crate::", "super::"].into_iter().flat_map(move |word| {
        let starts = code.match_indices(word).map(|(at, _)| at);
        let whole = move |at: &usize| {
            let before = code[..*at].chars().next_back();
            !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':')
        };
        starts.filter(whole).flat_map(move |at| {
            let mut found = Vec::new();
            tree_of(&code[at..], &mut Vec::new(), &mut found);
            found
        })
    })
}

/// Reads a path and the braces at its end; returns the text behind it.
fn tree_of<'a>(text: &'a str, before: &mut Vec<String>, found: &mut Vec<Vec<String>>) -> &'a str {
    let depth = before.len();
    let mut rest = text.trim_start();
    loop {
        if let Some(inner) = rest.strip_prefix('{') {
            rest = inner;
            while !rest.is_empty() && !rest.starts_with('}') {
                let after = tree_of(rest, before, found).trim_start();
                // Other text is skipped.
                let skip = after.chars().next().filter(|c| *c != '}');
                rest = &after[skip.map_or(0, char::len_utf8)..];
            }
            rest = rest.strip_prefix('}').unwrap_or(rest);
            break;
        }
        let end = rest
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(rest.len());
        before.push(rest[..end].into());
        rest = &rest[end..];
        match rest.strip_prefix("::") {
            Some(next) => rest = next,
            None => {
                found.push(before.clone());
                break;
            }
        }
    }
    before.truncate(depth);
    rest
}

#[cfg(test)]
mod tests {
    use super::{complaints, Source};

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let sources: Vec<_> = files
            .iter()
            .map(|(path, text)| Source::of(path, text))
            .collect();
        complaints(&sources)
    }

    #[test]
    fn a_circle_of_two_is_found() {
        let complaints = found(&[
            ("blktap-kmod/src/node.rs", "use super::registry;\n"),
            ("blktap-kmod/src/registry.rs", "use super::node::Opener;\n"),
        ]);
        assert_eq!(complaints.len(), 1);
        assert!(complaints[0].contains("node.rs, blktap-kmod/src/registry.rs"));
    }

    #[test]
    fn a_circle_through_braces_and_trees_is_found() {
        let complaints = found(&[
            (
                "blkback/src/a.rs",
                "use crate::{one::Two, engine::{b, c::D}};\n",
            ),
            (
                "blkback/src/engine/c.rs",
                "fn f() { crate::linux::xen::e::g() }\n",
            ),
            ("xenbus/src/linux/xen/e.rs", "use crate::a::G;\n"),
        ]);
        assert_eq!(complaints.len(), 1);
        assert!(complaints[0].contains("blkback/src/engine/c.rs"));
    }

    #[test]
    fn a_file_and_its_folder_are_one() {
        let complaints = found(&[
            ("ring/src/ring/tap/shadow.rs", "use super::table;\n"),
            ("ring/src/ring/tap/shadow/part.rs", "use super::Shadow;\n"),
            ("ring/src/ring/tap/table.rs", "use crate::ring::abi;\n"),
            ("ring/src/ring/abi.rs", "// use crate::ring::tap::table;\n"),
        ]);
        assert!(complaints.is_empty(), "{complaints:?}");
    }

    #[test]
    fn a_circle_through_a_part_of_a_file_is_found() {
        let complaints = found(&[
            ("ring/src/ring/tap/shadow.rs", ""),
            (
                "ring/src/ring/tap/shadow/part.rs",
                "use crate::ring::tap::table;\n",
            ),
            ("ring/src/ring/tap/table.rs", "use super::shadow::Shadow;\n"),
        ]);
        assert_eq!(complaints.len(), 1);
    }
}
