// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Names of types: how many types of the workspace share a name is counted, and how many names of each crate have one
//! word. Counts may only fall.
//!
//! A name of one word such as `State` says nothing where it is used, and a search for it finds every other type of that
//! name. `docs/contributing/style.md` has the rule, `ci/names.allow` the names that still break it, and
//! `ci/one-word-names.allow` the number of each crate's types that do.

use super::allowed::{AllowedCounts, AllowedList};
use super::source::{self, Source};
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Types that may share a name.
const MOST: usize = 3;

/// Keywords that define a type.
const DEFINING: &[&str] = &["struct", "enum", "union", "trait", "type"];

/// Names of more types than that, which may only become fewer.
const ALLOWED: AllowedList = AllowedList {
    path: "ci/names.allow",
    header: "# Names that more than three types of the workspace have. A count may only fall:\n\
             # `cargo xtask check --lower-names` writes the lower ones.\n",
    most: MOST,
};

/// Types of a crate that may have a name of one word: those of its main concepts.
const MOST_OF_ONE_WORD: usize = 3;

/// Crates with more types than that whose names have one word, which may only become fewer.
const ALLOWED_OF_ONE_WORD: AllowedList = AllowedList {
    path: "ci/one-word-names.allow",
    header: "# Types of each crate whose names have one word, where these are more than three. A count may only fall:\n\
             # `cargo xtask check --lower-names` writes the lower ones.\n",
    most: MOST_OF_ONE_WORD,
};

/// Files that define each name: a file twice if it defines the name twice.
type Definitions<'s> = BTreeMap<String, Vec<&'s str>>;

/// Complains of names of more types than are allowed, and of counts that are too high.
pub(super) fn check(sources: &[Source]) -> Result<()> {
    let definitions = definitions(sources);
    let of_one_word = of_one_word(&definitions);
    let mut found = complaints(&definitions, &ALLOWED.of(sources));
    found.extend(complaints_of_words(
        &of_one_word,
        &ALLOWED_OF_ONE_WORD.of(sources),
    ));
    super::none(found)
}

/// Writes lower counts where fewer types have the name; never a higher one.
pub(crate) fn lower() -> Result<[PathBuf; 2]> {
    let sources = source::all()?;
    let definitions = definitions(&sources);
    let of_one_word = of_one_word(&definitions);
    let count = |area: &str| of_one_word.get(area).map_or(0, Vec::len);
    Ok([
        ALLOWED.lower(|name| types(&definitions, name))?,
        ALLOWED_OF_ONE_WORD.lower(count)?,
    ])
}

/// Returns the folder of the crate, or of the part of the module, that a file belongs to.
fn area(path: &str) -> &str {
    let within = ["ci/", "tests/", "userspace/"];
    let begin = within.iter().find(|folder| path.starts_with(**folder));
    let begin = begin.map_or(0, |folder| folder.len());
    let rest = path.get(begin..).unwrap_or_default();
    let end = rest.find('/').unwrap_or(rest.len());
    path.get(..begin + end).unwrap_or(path)
}

/// Returns the types of each crate whose names have one word.
fn of_one_word<'d>(definitions: &'d Definitions<'_>) -> BTreeMap<&'d str, Vec<&'d str>> {
    let mut found: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, files) in definitions {
        let capitals = name.chars().filter(char::is_ascii_uppercase).count();
        for file in files.iter().filter(|_| capitals == 1) {
            found.entry(area(file)).or_default().push(name);
        }
    }
    found
}

/// Complains of counts that are higher than what is left of `what`.
fn fallen<'a>(
    allowed: &'a AllowedCounts,
    what: &'a str,
    count: impl Fn(&str) -> usize + 'a,
) -> impl Iterator<Item = String> + 'a {
    allowed.iter().filter_map(move |(name, most)| {
        let count = count(name);
        (count < *most).then(|| {
            format!(
                "{name}: {count} {what} are left of {most}; run: cargo xtask check --lower-names"
            )
        })
    })
}

/// Complains of crates with more names of one word than are allowed, and of counts that are too high.
fn complaints_of_words(found: &BTreeMap<&str, Vec<&str>>, allowed: &AllowedCounts) -> Vec<String> {
    let mut complaints = Vec::new();
    for (area, names) in found {
        let most = allowed.get(*area).copied().unwrap_or(MOST_OF_ONE_WORD);
        if names.len() > most {
            complaints.push(format!(
                "{area}: {} types have names of one word, {most} may; give the new one a noun of two words. They are: {}",
                names.len(),
                names.join(" ")
            ));
        }
    }
    complaints.extend(fallen(allowed, "names of one word", |area| {
        found.get(area).map_or(0, Vec::len)
    }));
    let all: usize = found.values().map(Vec::len).sum();
    println!("        names: {all} types have names of one word");
    complaints
}

/// Returns the number of types that have this name.
fn types(definitions: &Definitions<'_>, name: &str) -> usize {
    definitions.get(name).map_or(0, Vec::len)
}

fn complaints(definitions: &Definitions<'_>, allowed: &AllowedCounts) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, files) in definitions {
        let most = allowed.get(name).copied().unwrap_or(MOST);
        if files.len() > most {
            complaints.push(format!(
                "{name}: {} types have this name, {most} may; give the new one a name of two words:",
                files.len()
            ));
            complaints.extend(files.iter().map(|file| format!("    {file}")));
        }
    }
    complaints.extend(fallen(allowed, "types", |name| types(definitions, name)));
    let shared = definitions.values().filter(|files| files.len() > MOST);
    println!(
        "        names: {} names are those of more than {MOST} types",
        shared.count()
    );
    complaints
}

fn definitions(sources: &[Source]) -> Definitions<'_> {
    let mut definitions = Definitions::new();
    for source in source::rust(sources) {
        for name in names(&source.text) {
            definitions.entry(name).or_default().push(&source.path);
        }
    }
    definitions
}

/// Returns the names of the types that a text defines, without types that belong to a trait.
fn names(text: &str) -> Vec<String> {
    let code = source::code(text);
    let mut names = Vec::new();
    // Whether each block around the place is the body of a trait or of its implementation.
    let mut blocks = Vec::new();
    let mut statement: Vec<&str> = Vec::new();
    for word in words(&code) {
        match word {
            "{" => {
                blocks.push(is_of_trait(&statement));
                statement.clear();
            }
            "}" | ";" => {
                if word == "}" {
                    blocks.pop();
                }
                statement.clear();
            }
            name => {
                let of_trait = blocks.last().is_some_and(|of_trait| *of_trait);
                let defines = statement
                    .last()
                    .copied()
                    .filter(|last| DEFINING.contains(last) && !(*last == "type" && of_trait));
                if defines.is_some() && name.starts_with(|c: char| c.is_ascii_uppercase()) {
                    names.push(name.to_string());
                }
                statement.push(name);
            }
        }
    }
    names
}

/// Returns whether a block that follows these words is the body of a trait or of an implementation.
fn is_of_trait(statement: &[&str]) -> bool {
    let begins = |word: &&str| ["impl", "trait"].contains(word);
    statement.iter().any(begins) && !statement.contains(&"fn")
}

/// Returns words, braces and semicolons, and nothing else; `r#type` is one word.
fn words(code: &str) -> impl Iterator<Item = &str> {
    let in_word = |c: char| c.is_alphanumeric() || c == '_' || c == '#';
    let pieces = code.split_inclusive(move |c: char| !in_word(c));
    pieces.flat_map(move |piece| {
        let word = piece.trim_end_matches(|c: char| !in_word(c));
        let mark = piece.get(word.len()..).unwrap_or_default();
        let marks = ["{", "}", ";"];
        [Some(word), Some(mark)]
            .into_iter()
            .flatten()
            .filter(move |part| !part.is_empty() && (*part == word || marks.contains(part)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lowered(found: &Definitions<'_>, allowed: &AllowedCounts) -> AllowedCounts {
        ALLOWED.lowered(allowed, |name| types(found, name))
    }

    #[test]
    fn names_of_types_are_found() {
        for (text, found) in [
            ("struct State;", "State"),
            ("pub(crate) enum Kind<'a> { A, B }", "Kind"),
            (
                "pub unsafe trait Store: Sized { type Error; fn f() {} type Other: Clone; }",
                "Store",
            ),
            ("type Job = Box<dyn FnOnce()>;", "Job"),
            ("union Word { a: u8 }", "Word"),
            ("fn f() { struct Inner { a: u8 } }", "Inner"),
            (
                "impl Disk { fn f() { enum Step {} type Job = u8; } }",
                "Step Job",
            ),
            ("fn f(x: impl Fn()) { type Job = u8; }", "Job"),
            ("mod tests { struct State; }", "State"),
        ] {
            assert_eq!(names(text).join(" "), found, "{text}");
        }
    }

    #[test]
    fn types_of_traits_and_words_that_define_nothing_do_not_count() {
        for text in [
            "impl FromStr for Disk { type Err = String; }",
            "impl<'a> Iterator for A<'a> where A<'a>: B { fn next() { { } } type Item = u8; }",
            "unsafe impl<T: Fn()> Store for T { type Error = T; fn f() {} type Other = u8; }",
            "// struct State;\nconst A: &str = \"struct State;\";",
            "fn f(r#type: Kind) { x.r#struct; }",
            "let kind = Kind::Struct;",
        ] {
            assert_eq!(names(text), [""; 0], "{text}");
        }
    }

    #[test]
    fn a_fourth_name_of_one_word_in_a_crate_is_refused() {
        let of = |path: &str, text: &str| Source::of(path, text);
        let three = "struct A; struct OwnName; enum B { C(u8) } trait Cd { type Item; }";
        let mut sources = vec![
            of("userspace/a/src/lib.rs", three),
            of("userspace/b/src/lib.rs", "struct Other;"),
            of("ring/src/lib.rs", "struct Ring;"),
        ];
        let complain = |sources: &[Source], allowed: &AllowedCounts| {
            complaints_of_words(&of_one_word(&definitions(sources)), allowed)
        };
        assert_eq!(complain(&sources, &BTreeMap::new()), [""; 0]);
        sources.push(of("userspace/a/tests/suite/main.rs", "struct Planted;"));
        let said = complain(&sources, &BTreeMap::new());
        assert!(
            matches!(&said[..], [said] if said.starts_with("userspace/a: 4 types") && said.ends_with("A B Cd Planted")),
            "{said:?}"
        );
        let four = BTreeMap::from([("userspace/a".to_string(), 4)]);
        assert_eq!(complain(&sources, &four), [""; 0]);
        let five = BTreeMap::from([("userspace/a".to_string(), 5)]);
        assert!(complain(&sources, &five)[0].contains("--lower-names"));
    }

    #[test]
    fn a_fourth_type_of_a_name_is_refused() {
        let three = [
            Source::of("a.rs", "struct Planted;"),
            Source::of("b.rs", "enum Planted {} mod tests { trait Planted {} }"),
            Source::of("c.md", "struct Planted;"),
        ];
        assert!(complaints(&definitions(&three), &BTreeMap::new()).is_empty());
        let four = [&three[..], &[Source::of("d.rs", "type Planted = u8;")]].concat();
        let complaints = complaints(&definitions(&four), &BTreeMap::new());
        assert!(
            complaints[0].starts_with("Planted: 4 types") && complaints[1].contains("a.rs"),
            "{complaints:?}"
        );
    }

    #[test]
    fn a_count_may_only_fall() {
        let sources = [Source::of("a.rs", &"struct Planted;".repeat(5))];
        let found = definitions(&sources);
        let allowed = |count| BTreeMap::from([("Planted".to_string(), count)]);
        assert!(complaints(&found, &allowed(5)).is_empty());
        assert!(complaints(&found, &allowed(4))[0].starts_with("Planted: 5 types"));
        assert!(complaints(&found, &allowed(6))[0].contains("--lower-names"));
        assert_eq!(lowered(&found, &allowed(6)), allowed(5));
        assert_eq!(lowered(&found, &allowed(4)), allowed(4));
        let few = [Source::of("a.rs", &"struct Planted;".repeat(3))];
        assert!(lowered(&definitions(&few), &allowed(4)).is_empty());
        assert!(complaints(&Definitions::new(), &allowed(4))[0].contains("0 types are left"));
    }
}
