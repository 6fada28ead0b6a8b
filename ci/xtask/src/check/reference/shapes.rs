// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The JSON of the programs: tables of the types that they print, made from their definitions.

mod definitions;
mod pages;

use super::super::source::Source;
use super::in_cell;
use super::rust::{doc, serde_words, SerdeWords};
use anyhow::{bail, Context, Result};
use definitions::{Definition, Definitions};
use pages::{PrintedType, PAGES};
use std::collections::{BTreeMap, VecDeque};
use syn::{Fields, GenericArgument, Item, PathArguments, Type};

/// Returns the tables of each block, with its name.
pub(super) fn all(sources: &[Source]) -> Result<Vec<(&'static str, String)>> {
    tables(sources, PAGES)
}

fn tables(
    sources: &[Source],
    pages: &[(&'static str, &'static str, &[PrintedType])],
) -> Result<Vec<(&'static str, String)>> {
    let definitions = Definitions::of(sources)?;
    let mut blocks = Vec::new();
    let mut shown = ShownTypes::default();
    for (name, page, roots) in pages {
        let mut writer = PageWriter {
            definitions: &definitions,
            shown: &mut shown,
            page,
            pending: VecDeque::new(),
            text: String::new(),
        };
        for (commands, path, root) in *roots {
            let definition = definitions.in_file(path, root)?;
            let link = writer.link(definition);
            if !commands.is_empty() {
                let line = format!("{commands} prints {link}.\n\n");
                writer.text.push_str(&line);
            }
        }
        while let Some(definition) = writer.pending.pop_front() {
            writer
                .table(definition)
                .with_context(|| format!("{}: {}", definition.path, definition.name))?;
        }
        blocks.push((*name, writer.text));
    }
    Ok(blocks)
}

/// Types that a page has: the page, and the heading of the type.
#[derive(Default)]
struct ShownTypes {
    places: BTreeMap<(String, String), (&'static str, String)>,
}

/// The tables of a page.
struct PageWriter<'d> {
    definitions: &'d Definitions,
    shown: &'d mut ShownTypes,
    page: &'static str,
    /// Types that are linked and have no table yet.
    pending: VecDeque<&'d Definition>,
    text: String,
}

impl<'d> PageWriter<'d> {
    /// Returns a link to a type's table, which this page gets if none has it.
    fn link(&mut self, definition: &'d Definition) -> String {
        let key = (definition.path.clone(), definition.name.clone());
        if !self.shown.places.contains_key(&key) {
            let heading = self.heading(&definition.name);
            self.shown.places.insert(key.clone(), (self.page, heading));
            self.pending.push_back(definition);
        }
        let (page, heading) = &self.shown.places[&key];
        let page = if *page == self.page { "" } else { page };
        let anchor = heading.to_lowercase();
        format!("[`{heading}`]({page}#{anchor})")
    }

    /// Returns the name, with a number if this page has a type of that name.
    fn heading(&self, name: &str) -> String {
        let is_taken = |heading: &str| {
            let mut places = self.shown.places.values();
            places.any(|(page, taken)| *page == self.page && taken == heading)
        };
        let numbered = (2..).map(|number| format!("{name}{number}"));
        let mut names = std::iter::once(name.to_string()).chain(numbered);
        names.find(|heading| !is_taken(heading)).unwrap_or_default()
    }

    fn table(&mut self, definition: &'d Definition) -> Result<()> {
        let key = (definition.path.clone(), definition.name.clone());
        let (_, heading) = &self.shown.places[&key];
        self.text.push_str(&format!("### `{heading}`\n\n"));
        match &definition.item {
            Item::Struct(item) => {
                self.text.push_str(&format!("{}\n\n", doc(&item.attrs)));
                let style = serde_words(&item.attrs)?.rename_all;
                self.text
                    .push_str("| field | type | meaning |\n|---|---|---|\n");
                let rows = self.fields(&item.fields, style.as_deref(), definition)?;
                for row in rows {
                    let (name, shape, meaning) = row;
                    self.text
                        .push_str(&format!("| {name} | {shape} | {meaning} |\n"));
                }
            }
            Item::Enum(item) => self.variants(item, definition)?,
            _ => bail!("neither struct nor enum"),
        }
        self.text.push('\n');
        Ok(())
    }

    fn variants(&mut self, item: &'d syn::ItemEnum, definition: &'d Definition) -> Result<()> {
        let words = serde_words(&item.attrs)?;
        self.text.push_str(&format!("{}\n\n", doc(&item.attrs)));
        let is_plain = item
            .variants
            .iter()
            .all(|variant| variant.fields.is_empty());
        let head = match (&words.tag, is_plain) {
            (Some(tag), _) => format!("| `{tag}` | meaning | further fields |\n|---|---|---|\n"),
            (None, true) => "| text | meaning |\n|---|---|\n".into(),
            (None, false) => "| key | meaning | value |\n|---|---|---|\n".into(),
        };
        self.text.push_str(&head);
        for variant in &item.variants {
            let own = serde_words(&variant.attrs)?;
            if own.is_skipped {
                continue;
            }
            let name = own.name(&variant.ident.to_string(), words.rename_all.as_deref())?;
            let meaning = in_cell(&doc(&variant.attrs));
            let content = self.content(&variant.fields, definition)?;
            let row = match is_plain && words.tag.is_none() {
                true => format!("| `{name}` | {meaning} |\n"),
                false => format!("| `{name}` | {meaning} | {content} |\n"),
            };
            self.text.push_str(&row);
        }
        Ok(())
    }

    /// Returns the content of a variant in one cell.
    fn content(&mut self, fields: &'d Fields, definition: &'d Definition) -> Result<String> {
        Ok(match fields {
            Fields::Unit => String::new(),
            Fields::Unnamed(_) => {
                let shapes = fields.iter().map(|field| self.shape(&field.ty, definition));
                let shapes = shapes.collect::<Result<Vec<_>>>()?;
                match &shapes[..] {
                    [only] if only.starts_with('[') => format!("those of {only}"),
                    _ => shapes.join(", "),
                }
            }
            Fields::Named(_) => {
                let rows = self.fields(fields, None, definition)?;
                let cells = rows.into_iter().map(|(name, shape, meaning)| {
                    format!("{name}: {} ({shape})", meaning.trim_end_matches('.'))
                });
                cells.collect::<Vec<_>>().join("; ")
            }
        })
    }

    /// Returns name, type and meaning of each field.
    fn fields(
        &mut self,
        fields: &'d Fields,
        style: Option<&str>,
        definition: &'d Definition,
    ) -> Result<Vec<(String, String, String)>> {
        let mut rows = Vec::new();
        for (number, field) in fields.iter().enumerate() {
            let words: SerdeWords = serde_words(&field.attrs)?;
            if words.is_skipped {
                continue;
            }
            let mut shape = self.shape(&field.ty, definition)?;
            let meaning = in_cell(&doc(&field.attrs));
            if words.is_flattened {
                rows.push((format!("those of {shape}"), String::new(), meaning));
                continue;
            }
            if meaning.is_empty() {
                bail!("a field of {} has no description", definition.name);
            }
            if words.may_be_missing {
                shape = shape.replace(" or null", "") + ", or missing";
            }
            let name = match &field.ident {
                Some(name) => words.name(&name.to_string(), style)?,
                None => number.to_string(),
            };
            rows.push((format!("`{name}`"), shape, meaning));
        }
        Ok(rows)
    }

    /// Returns the JSON of a type, in words.
    fn shape(&mut self, kind: &'d Type, from: &'d Definition) -> Result<String> {
        let path = match kind {
            Type::Reference(inner) => return self.shape(&inner.elem, from),
            Type::Slice(inner) => return Ok(format!("list of {}", self.shape(&inner.elem, from)?)),
            Type::Array(inner) => return Ok(format!("list of {}", self.shape(&inner.elem, from)?)),
            Type::Tuple(tuple) => {
                let shapes = tuple.elems.iter().map(|inner| self.shape(inner, from));
                return Ok(format!(
                    "list: {}",
                    shapes.collect::<Result<Vec<_>>>()?.join(", ")
                ));
            }
            Type::Path(path) => path,
            _ => bail!("a type of an unknown form"),
        };
        let segment = path.path.segments.last().context("a type without name")?;
        let inner: Vec<&'d Type> = match &segment.arguments {
            PathArguments::AngleBracketed(arguments) => arguments
                .args
                .iter()
                .filter_map(|argument| match argument {
                    GenericArgument::Type(inner) => Some(inner),
                    _ => None,
                })
                .collect(),
            _ => Vec::new(),
        };
        let name = segment.ident.to_string();
        Ok(match (name.as_str(), &inner[..]) {
            ("bool", _) => "true or false".into(),
            ("u8" | "u16" | "u32" | "u64" | "u128" | "usize" | "i32" | "i64" | "f64", _) => {
                "number".into()
            }
            ("String" | "str" | "char" | "PathBuf" | "Path", _) => "text".into(),
            ("Duration", _) => "object: `secs`, `nanos`".into(),
            ("Option", [inner]) => format!("{} or null", self.shape(inner, from)?),
            ("Box" | "Rc" | "Arc" | "Cow", [inner]) => self.shape(inner, from)?,
            ("Vec" | "VecDeque" | "BTreeSet", [inner]) => {
                format!("list of {}", self.shape(inner, from)?)
            }
            ("BTreeMap" | "HashMap", [key, value]) => format!(
                "object, {} by {}",
                self.shape(value, from)?,
                self.shape(key, from)?
            ),
            _ => self.named(&segment.ident.to_string(), from)?,
        })
    }

    /// Returns the JSON of a type of the workspace.
    fn named(&mut self, name: &str, from: &'d Definition) -> Result<String> {
        let definition = self.definitions.seen_from(from, name)?;
        let attrs = match &definition.item {
            Item::Struct(item) => &item.attrs,
            Item::Enum(item) => &item.attrs,
            Item::Type(item) => return self.shape(&item.ty, definition),
            _ => bail!("{name} is neither struct nor enum"),
        };
        if serde_words(attrs)?
            .into
            .is_some_and(|into| into == "String")
        {
            return Ok("text".into());
        }
        match &definition.item {
            // A new type is written as its content.
            Item::Struct(item) => match &item.fields {
                Fields::Unnamed(fields) if fields.unnamed.len() == 1 => {
                    self.shape(&fields.unnamed[0].ty, definition)
                }
                Fields::Unnamed(fields) => {
                    let shapes = fields
                        .unnamed
                        .iter()
                        .map(|field| self.shape(&field.ty, definition));
                    Ok(format!(
                        "list: {}",
                        shapes.collect::<Result<Vec<_>>>()?.join(", ")
                    ))
                }
                _ => Ok(self.link(definition)),
            },
            _ => Ok(self.link(definition)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLANTED: &[(&str, &str, &[PrintedType])] = &[
        (
            "one",
            "one.md",
            &[("`saw one`", "userspace/saw/src/a.rs", "Board")],
        ),
        (
            "two",
            "two.md",
            &[("`saw two`", "userspace/saw/src/b.rs", "Report")],
        ),
    ];

    fn text(block: &str, a: &str, b: &str) -> Result<String> {
        let sources = [
            Source::of("userspace/saw/src/a.rs", a),
            Source::of("userspace/saw/src/b.rs", b),
        ];
        block_of(&sources, block)
    }

    fn block_of(sources: &[Source], block: &str) -> Result<String> {
        let blocks = tables(sources, PLANTED)?;
        let found = blocks.into_iter().find(|(name, _)| *name == block);
        Ok(found.context("there is no such block")?.1)
    }

    const A: &str = r#"
        /// A board.
        #[derive(Serialize)]
        struct Board {
            /// Its length in millimetres.
            length: u64,
            #[serde(skip)]
            hidden: Hidden,
            /// The owner.
            #[serde(skip_serializing_if = "Option::is_none")]
            owner: Option<Name>,
            /// Cuts.
            cuts: Vec<Cut>,
            #[serde(flatten)]
            rest: Rest,
        }
        struct Name(String);
        /// A cut.
        #[serde(tag = "is", rename_all = "kebab-case")]
        enum Cut {
            /// Along the grain.
            AlongGrain { /// Its depth.
                depth: Option<f64> },
            /// Another.
            Other(Rest),
            /// One of a newer program.
            #[serde(other)]
            Newer,
        }
        /// The rest.
        struct Rest { /// Is there one.
            is_there: bool }
    "#;
    const B: &str = "use crate::a::Board;\n/// R.\nstruct Report { /// All.\n boards: BTreeMap<String, Board>, /// Kind.\n kind: Kind }\n/// K.\n#[serde(rename_all = \"kebab-case\")] enum Kind { /// Hard.\n HardWood }";

    #[test]
    fn types_are_tables_of_their_json() {
        let one = text("one", A, B).unwrap();
        for part in [
            "`saw one` prints [`Board`](#board).",
            "### `Board`\n\nA board.\n\n| field | type | meaning |\n|---|---|---|\n| `length` | number | Its length in millimetres. |\n",
            "| `owner` | text, or missing | The owner. |",
            "| `cuts` | list of [`Cut`](#cut) | Cuts. |",
            "| those of [`Rest`](#rest) |",
            "| `is` | meaning | further fields |",
            "| `along-grain` | Along the grain. | `depth`: Its depth (number or null) |",
            "| `other` | Another. | those of [`Rest`](#rest) |",
        ] {
            assert!(one.contains(part), "{part}: {one}");
        }
        assert!(
            one.contains("| `newer` | One of a newer program. |"),
            "{one}"
        );
        assert!(!one.contains("hidden"), "{one}");
    }

    #[test]
    fn a_type_of_another_page_is_linked() {
        let two = text("two", A, B).unwrap();
        assert!(
            two.contains("| `boards` | object, [`Board`](one.md#board) by text | All. |"),
            "{two}"
        );
        assert!(
            two.contains("| `hard-wood` | Hard. |") && !two.contains("### `Board`"),
            "{two}"
        );
    }

    #[test]
    fn an_imported_type_is_the_one_that_is_meant() {
        let [a, b] = [A, B].map(String::from);
        let other = "/// Another.\nstruct Board { planted: bool }";
        let sources = [
            Source::of("userspace/saw/src/a.rs", &a),
            Source::of("userspace/saw/src/b.rs", &b),
            Source::of("userspace/saw/src/c.rs", other),
            Source::of("userspace/other/src/a.rs", other),
        ];
        let two = block_of(&sources, "two").unwrap();
        assert!(two.contains("(one.md#board)"), "{two}");
        let unclear = b.replace("use crate::a::Board;", "");
        let sources = [
            &sources[..1],
            &sources[2..],
            &[Source::of("userspace/saw/src/b.rs", &unclear)],
        ]
        .concat();
        let error = format!("{:#}", block_of(&sources, "two").unwrap_err());
        assert!(error.contains("not clear which Board"), "{error}");
    }

    #[test]
    fn a_field_that_is_renamed_changes_the_page() {
        let planted = A.replace("length: u64", "planted: u64");
        assert_ne!(
            text("one", A, B).unwrap(),
            text("one", &planted, B).unwrap()
        );
    }

    #[test]
    fn a_type_that_is_not_understood_is_refused() {
        for planted in [
            A.replace("length: u64", "length: Planted"),
            A.replace("length: u64", "length: fn()"),
            A.replace("tag = \"is\"", "untagged"),
            A.replace("/// Its length in millimetres.", ""),
        ] {
            assert!(text("one", &planted, B).is_err());
        }
    }
}
