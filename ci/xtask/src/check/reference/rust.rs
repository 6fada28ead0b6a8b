// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Rust sources as the compiler reads them: documentation, and attributes of serde.

use super::super::source::Source;
use anyhow::{Context, Result};
use syn::{Attribute, Expr, Item, ItemMod, Lit, LitStr, Meta, Token};

/// Parses a source.
pub(super) fn parse(source: &Source) -> Result<syn::File> {
    syn::parse_file(&source.text).with_context(|| format!("{}: cannot be parsed", source.path))
}

/// Calls `visit` for each item that is not one of a test.
pub(super) fn each_item<'f>(items: &'f [Item], visit: &mut dyn FnMut(&'f Item)) {
    for item in items {
        match item {
            Item::Mod(ItemMod { attrs, .. }) if is_test(attrs) => {}
            Item::Mod(ItemMod {
                content: Some((_, items)),
                ..
            }) => each_item(items, visit),
            item => visit(item),
        }
    }
}

fn is_test(attrs: &[Attribute]) -> bool {
    let mut cfg = attrs.iter().filter(|attr| attr.path().is_ident("cfg"));
    cfg.any(|attr| {
        let word = attr.parse_args::<syn::Ident>();
        word.is_ok_and(|word| word == "test")
    })
}

/// Returns the first paragraph of a documentation comment, with the text of links in place of the links.
pub(super) fn doc(attrs: &[Attribute]) -> String {
    let lines = attrs.iter().filter_map(|attr| match &attr.meta {
        Meta::NameValue(meta) if meta.path.is_ident("doc") => match &meta.value {
            Expr::Lit(literal) => match &literal.lit {
                Lit::Str(text) => Some(text.value()),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    });
    let lines = lines.map(|line| line.trim().to_string());
    let paragraph: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    without_links(&paragraph.join(" "))
}

/// Replaces `[text](target)` and `[text]` by the text.
fn without_links(text: &str) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, behind)) = rest.split_once('[') {
        let Some((inner, after)) = behind.split_once(']') else {
            break;
        };
        out.push_str(before);
        out.push_str(inner);
        rest = after;
        if let Some(target) = after.strip_prefix('(') {
            rest = target.split_once(')').map_or(after, |(_, behind)| behind);
        }
    }
    out + rest
}

/// The words of serde about a type, a variant or a field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SerdeWords {
    pub(super) tag: Option<String>,
    pub(super) rename: Option<String>,
    pub(super) rename_all: Option<String>,
    pub(super) into: Option<String>,
    /// The field may be missing in the output.
    pub(super) may_be_missing: bool,
    /// The field is never in the output.
    pub(super) is_skipped: bool,
    pub(super) is_flattened: bool,
}

/// Reads the words of serde.
///
/// # Errors
/// There is a word that decides the output and that this function does not know.
pub(super) fn serde_words(attrs: &[Attribute]) -> Result<SerdeWords> {
    let mut words = SerdeWords::default();
    for attr in attrs.iter().filter(|attr| attr.path().is_ident("serde")) {
        attr.parse_nested_meta(|meta| {
            let name = meta.path.get_ident().map(ToString::to_string);
            let value = if meta.input.peek(Token![=]) {
                Some(meta.value()?.parse::<LitStr>()?.value())
            } else {
                None
            };
            match name.as_deref().unwrap_or_default() {
                "tag" => words.tag = value,
                "rename" => words.rename = value,
                "rename_all" => words.rename_all = value,
                "into" => words.into = value,
                "skip_serializing_if" => words.may_be_missing = true,
                "skip" => words.is_skipped = true,
                "flatten" => words.is_flattened = true,
                "default" | "other" | "try_from" | "alias" | "deny_unknown_fields" => {}
                other => return Err(meta.error(format!("the word {other} of serde is unknown"))),
            }
            Ok(())
        })?;
    }
    Ok(words)
}

impl SerdeWords {
    /// Returns the name of a field or variant in the output. `style` is the type's `rename_all`.
    pub(super) fn name(&self, name: &str, style: Option<&str>) -> Result<String> {
        if let Some(name) = &self.rename {
            return Ok(name.clone());
        }
        Ok(match style {
            None => name.trim_start_matches("r#").to_string(),
            Some("kebab-case") => parted(name, '-'),
            Some("snake_case") => parted(name, '_'),
            Some("lowercase") => name.to_lowercase(),
            Some(other) => anyhow::bail!("the style {other} of serde is unknown"),
        })
    }
}

/// Writes `HandedOff` and `handed_off` as `handed-off`, or with another sign.
fn parted(name: &str, sign: char) -> String {
    let mut out = String::new();
    for c in name.chars() {
        match c {
            '_' => out.push(sign),
            c if c.is_ascii_uppercase() => {
                if !out.is_empty() {
                    out.push(sign);
                }
                out.push(c.to_ascii_lowercase());
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_of_tests_are_left_out() {
        let text = "struct A; mod b { struct C; } #[cfg(test)] mod tests { struct D; }";
        let file = syn::parse_file(text).unwrap();
        let mut names = Vec::new();
        each_item(&file.items, &mut |item| {
            if let Item::Struct(item) = item {
                names.push(item.ident.to_string());
            }
        });
        assert_eq!(names, ["A", "C"]);
    }

    #[test]
    fn first_paragraph_without_links_is_the_description() {
        let text = "/// The [`Disk`] of a\n/// [guest](crate::guest).\n///\n/// More.\nstruct A;";
        let item: syn::ItemStruct = syn::parse_str(text).unwrap();
        assert_eq!(doc(&item.attrs), "The `Disk` of a guest.");
    }

    #[test]
    fn words_of_serde_are_read_and_unknown_ones_refused() {
        let words = |text: &str| {
            let item: syn::ItemStruct = syn::parse_str(text).unwrap();
            serde_words(&item.attrs)
        };
        let read = words("#[serde(tag = \"is\", rename_all = \"kebab-case\")] struct A;").unwrap();
        assert_eq!(read.tag.as_deref(), Some("is"));
        let name = read.name("HandedOff", read.rename_all.as_deref());
        assert_eq!(name.unwrap(), "handed-off");
        assert!(
            words("#[serde(skip_serializing_if = \"x\")] struct A;")
                .unwrap()
                .may_be_missing
        );
        assert!(words("#[serde(planted)] struct A;").is_err());
        assert!(read.name("A", Some("planted")).is_err());
    }
}
