// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Kinds of values, as cells of tables have them.

use std::collections::BTreeMap;
use std::fmt;

/// Kind of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ValueKind {
    Text,
    Number,
    Bool,
    /// Another kind, or null.
    OrNull(Box<ValueKind>),
    List(Box<ValueKind>),
    /// A list with these values.
    Tuple(Vec<ValueKind>),
    /// An object with any keys.
    Map(Box<ValueKind>),
    /// An object with these keys, whose values are numbers.
    Numbers(Vec<String>),
    /// A type with a table.
    Named(String),
    /// An object with these fields, in a cell of a variant.
    Object(FieldList),
}

/// Kind of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FieldKind {
    pub(crate) kind: ValueKind,
    pub(crate) may_be_missing: bool,
}

/// Fields of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FieldList {
    pub(crate) own: BTreeMap<String, FieldKind>,
    /// Types whose fields are among them.
    pub(crate) of: Vec<String>,
}

/// Returns the type of a link such as `` [`Row`](json-disks.md#row) ``.
pub(crate) fn linked(text: &str, page: &str) -> Option<String> {
    let (heading, rest) = text.strip_prefix("[`")?.split_once("`](")?;
    let target = rest.strip_suffix(')')?;
    let (other, anchor) = target.split_once('#')?;
    if anchor != heading.to_lowercase() {
        return None;
    }
    let page = if other.is_empty() { page } else { other };
    Some(format!("{page}#{heading}"))
}

impl ValueKind {
    pub(crate) fn parse(text: &str, page: &str) -> Result<ValueKind, String> {
        let text = text.trim();
        let inner = |text| ValueKind::parse(text, page).map(Box::new);
        if text == "true or false" {
            return Ok(ValueKind::Bool);
        }
        if let Some(text) = text.strip_suffix(" or null") {
            return Ok(ValueKind::OrNull(inner(text)?));
        }
        if let Some(text) = text.strip_prefix("list of ") {
            return Ok(ValueKind::List(inner(text)?));
        }
        if let Some(text) = text.strip_prefix("list: ") {
            let each = text.split(", ").map(|text| ValueKind::parse(text, page));
            return Ok(ValueKind::Tuple(each.collect::<Result<_, _>>()?));
        }
        if let Some(text) = text.strip_prefix("object, ") {
            let value = text.strip_suffix(" by text");
            let value = value.ok_or_else(|| format!("an object by another key: {text}"))?;
            return Ok(ValueKind::Map(inner(value)?));
        }
        if let Some(text) = text.strip_prefix("object: ") {
            let names = text.split(", ").map(|name| name.trim_matches('`').into());
            return Ok(ValueKind::Numbers(names.collect()));
        }
        match text {
            "text" => Ok(ValueKind::Text),
            "number" => Ok(ValueKind::Number),
            text => linked(text, page)
                .map(ValueKind::Named)
                .ok_or_else(|| format!("an unknown kind: {text}")),
        }
    }
}

impl fmt::Display for ValueKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ValueKind::Text => f.write_str("text"),
            ValueKind::Number => f.write_str("number"),
            ValueKind::Bool => f.write_str("true or false"),
            ValueKind::OrNull(kind) => write!(f, "{kind} or null"),
            ValueKind::List(kind) => write!(f, "list of {kind}"),
            ValueKind::Tuple(kinds) => {
                let kinds: Vec<String> = kinds.iter().map(ToString::to_string).collect();
                write!(f, "list: {}", kinds.join(", "))
            }
            ValueKind::Map(kind) => write!(f, "object, {kind} by text"),
            ValueKind::Numbers(names) => write!(f, "object: {}", names.join(", ")),
            ValueKind::Named(name) => f.write_str(name),
            ValueKind::Object(fields) => {
                let fields: Vec<String> = fields.lines().collect();
                write!(f, "object: {}", fields.join("; "))
            }
        }
    }
}

impl FieldKind {
    pub(crate) fn parse(text: &str, page: &str) -> Result<FieldKind, String> {
        let required = text.strip_suffix(", or missing");
        Ok(FieldKind {
            kind: ValueKind::parse(required.unwrap_or(text), page)?,
            may_be_missing: required.is_some(),
        })
    }
}

impl fmt::Display for FieldKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = if self.may_be_missing {
            ", or missing"
        } else {
            ""
        };
        write!(f, "{}{end}", self.kind)
    }
}

impl FieldList {
    /// Returns a line for each field, and for each type whose fields are among them.
    pub(crate) fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let own = self
            .own
            .iter()
            .map(|(name, kind)| format!("{name}: {kind}"));
        let of = self.of.iter().map(|of| format!("those of {of}"));
        own.chain(of)
    }
}
