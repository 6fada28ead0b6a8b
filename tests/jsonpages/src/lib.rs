// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The JSON that pages of `docs/reference` document. Tests of the programs compare their output with it, key by key, and
//! a test of this crate compares the pages with a list of what earlier versions had.
//!
//! A page has a line for each command, as `` `tap-ctl list` prints [`ListedDisks`](#listeddisks). ``, and a table for each
//! type. `cargo xtask check` makes most of both from the sources of the programs.
#![forbid(unsafe_code)]

mod baseline;
mod check;
mod kind;
mod parse;
mod sample;
#[cfg(test)]
mod tests;

pub use baseline::{merged_baseline, BaselineDifference};
use kind::{FieldList, ValueKind};
pub use sample::SampleText;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Version of the pages, which each object at the top has.
const JSON_VERSION: u64 = 1;

/// The type of the object `error` of a command that failed.
const FAILURE: &str = "json-answers.md#Failure";

/// Types, by the page and the heading there, as `json-disks.md#Row`.
#[derive(Debug, Default)]
pub struct JsonPages {
    types: BTreeMap<String, DocumentedType>,
    /// Types that a command prints: one, or one of several. A program alone stands for its other verbs.
    commands: BTreeMap<String, BTreeSet<String>>,
}

/// A type as its table has it.
#[derive(Debug)]
enum DocumentedType {
    /// An object.
    Object(FieldList),
    /// An object with a field that names the variant.
    Tagged {
        /// Name of that field.
        tag: String,
        /// Further fields of each variant.
        variants: BTreeMap<String, FieldList>,
    },
    /// A text for a variant without content, or an object with one key.
    Keyed(BTreeMap<String, Option<ValueKind>>),
    /// One of these texts.
    Words(BTreeSet<String>),
}

/// Returns a file of the checkout.
#[must_use]
pub fn of_checkout(path: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = tests.ancestors().nth(2).expect("two folders above");
    root.join(path)
}

impl JsonPages {
    /// Reads the pages of the checkout.
    ///
    /// # Panics
    /// A page cannot be read or understood.
    #[must_use]
    pub fn of_checkout() -> JsonPages {
        let folder = of_checkout("docs/reference");
        let names = fs::read_dir(&folder).expect("the reference").map(|entry| {
            let name = entry.expect("an entry").file_name();
            name.into_string().expect("a name")
        });
        let is_of_json = |name: &String| name.starts_with("json-") || name == "events.md";
        let mut pages: Vec<(String, String)> = names
            .filter(is_of_json)
            .map(|name| {
                let text = fs::read_to_string(folder.join(&name)).expect("a page");
                (name, text)
            })
            .collect();
        pages.sort();
        let pages: Vec<(&str, &str)> = pages
            .iter()
            .map(|(name, text)| (name.as_str(), text.as_str()))
            .collect();
        JsonPages::of(&pages).unwrap_or_else(|error| panic!("docs/reference/{error}"))
    }

    /// Returns the commands of a program that have a line of their own, without the program.
    #[must_use]
    pub fn verbs(&self, program: &str) -> BTreeSet<&str> {
        self.commands
            .keys()
            .filter_map(|command| command.strip_prefix(program)?.strip_prefix(' '))
            .collect()
    }

    /// Returns the types of a command, or those of the other verbs of its program.
    fn types_of(&self, command: &str) -> Option<&BTreeSet<String>> {
        let own = self.commands.get(command);
        own.or_else(|| self.commands.get(command.split(' ').next()?))
    }
}
