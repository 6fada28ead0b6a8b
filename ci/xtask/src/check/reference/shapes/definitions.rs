// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The types that userspace defines, and which one a name means in a file.

use super::super::super::source::Source;
use super::super::rust;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use syn::{Item, UseTree};

/// A type and the file that defines it.
pub(super) struct Definition {
    pub(super) path: String,
    pub(super) name: String,
    pub(super) item: Item,
}

/// All types of userspace by their names.
pub(super) struct Definitions {
    types: BTreeMap<String, Vec<Definition>>,
    /// Paths of the names that a file imports.
    imports: BTreeMap<(String, String), Vec<String>>,
}

impl Definitions {
    pub(super) fn of(sources: &[Source]) -> Result<Self> {
        let mut types: BTreeMap<String, Vec<Definition>> = BTreeMap::new();
        let mut imports = BTreeMap::new();
        let is_program = |source: &&Source| {
            let path = source.path.as_str();
            path.starts_with("userspace/")
                && path.ends_with(".rs")
                && path.contains("/src/")
                && !path.contains("/tests")
        };
        for source in sources.iter().filter(is_program) {
            let file = rust::parse(source)?;
            rust::each_item(&file.items, &mut |item| {
                let name = match item {
                    Item::Struct(item) => item.ident.to_string(),
                    Item::Enum(item) => item.ident.to_string(),
                    Item::Type(item) => item.ident.to_string(),
                    Item::Use(item) => {
                        for path in imported(&item.tree) {
                            let name = path.last().cloned().unwrap_or_default();
                            imports.insert((source.path.clone(), name), path);
                        }
                        return;
                    }
                    _ => return,
                };
                types.entry(name.clone()).or_default().push(Definition {
                    path: source.path.clone(),
                    name,
                    item: item.clone(),
                });
            });
        }
        Ok(Definitions { types, imports })
    }

    /// Returns the type of this name that a file defines.
    pub(super) fn in_file(&self, path: &str, name: &str) -> Result<&Definition> {
        let mut all = self.types.get(name).into_iter().flatten();
        all.find(|definition| definition.path == path)
            .with_context(|| format!("{path} defines no type {name}"))
    }

    /// Returns the type that a name means in the file of `from`: one of its file, the one that the file imports, or the
    /// only one of its crate, or of all.
    pub(super) fn seen_from(&self, from: &Definition, name: &str) -> Result<&Definition> {
        let mut all: Vec<&Definition> = self.types.get(name).into_iter().flatten().collect();
        let own_crate = from.path.split("src/").next().unwrap_or_default();
        let import = self.imports.get(&(from.path.clone(), name.to_string()));
        let import = import.map(Vec::as_slice).unwrap_or_default();
        if let Some(first) = import.first() {
            let folder = match first.as_str() {
                "crate" | "self" | "super" => own_crate.to_string(),
                "diskio" => "userspace/io/".to_string(),
                name => format!("userspace/{name}/"),
            };
            // Any other name is a module of the file's own crate.
            let is_crate = all.iter().any(|other| other.path.starts_with(&folder));
            let folder = if is_crate { folder.as_str() } else { own_crate };
            all.retain(|other| other.path.starts_with(folder));
        }
        let module = import.iter().rev().nth(1).cloned().unwrap_or_default();
        let (file, folder) = (format!("/{module}.rs"), format!("/{module}/"));
        let nearer: [&dyn Fn(&Definition) -> bool; 4] = [
            &|other| other.path == from.path,
            &|other| other.path.ends_with(&file) || other.path.contains(&folder),
            &|other| other.path.starts_with(own_crate),
            &|_| true,
        ];
        for near in nearer {
            let found: Vec<&Definition> = all.iter().copied().filter(|other| near(other)).collect();
            if let [only] = found[..] {
                return Ok(only);
            }
        }
        let places: Vec<&str> = all.iter().map(|other| other.path.as_str()).collect();
        anyhow::bail!(
            "{}: it is not clear which {name} is meant: {places:?}",
            from.path
        )
    }
}

/// Returns the paths that a `use` brings in. A name that the file gives anew is left out.
fn imported(tree: &UseTree) -> Vec<Vec<String>> {
    match tree {
        UseTree::Path(path) => {
            let mut paths = imported(&path.tree);
            for inner in &mut paths {
                inner.insert(0, path.ident.to_string());
            }
            paths
        }
        UseTree::Name(name) => vec![vec![name.ident.to_string()]],
        UseTree::Group(group) => group.items.iter().flat_map(imported).collect(),
        UseTree::Rename(_) | UseTree::Glob(_) => Vec::new(),
    }
}
