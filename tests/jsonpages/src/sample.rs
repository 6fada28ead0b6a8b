// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Values that have each key of a type, for fakes of programs.

use crate::kind::{FieldKind, FieldList, ValueKind};
use crate::{DocumentedType, JsonPages};
use serde_json::{json, Map, Value};

/// Makes a text for a field, which may have to be one of a certain form.
pub type SampleText<'t> = &'t dyn Fn(&str) -> String;

/// How much of a type a sample has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    /// Each key, and no null.
    All,
    /// Only keys that are always there, and null where it may be.
    Least,
}

impl JsonPages {
    /// Returns values of a type, such as `json-answers.md#Reply`, with all keys and with the fewest: one for each variant of
    /// it and of each type in it.
    ///
    /// # Panics
    /// There is no such type.
    #[must_use]
    pub fn samples(&self, name: &str, text: SampleText<'_>) -> Vec<Value> {
        let extents = [Extent::All, Extent::Least];
        let each = extents.map(|extent| {
            Sampler {
                pages: self,
                text,
                extent,
            }
            .variants(name)
        });
        each.into_iter().flatten().collect()
    }
}

struct Sampler<'p> {
    pages: &'p JsonPages,
    text: SampleText<'p>,
    extent: Extent,
}

impl Sampler<'_> {
    fn variants(&self, name: &str) -> Vec<Value> {
        let found = self.pages.types.get(name);
        match found.unwrap_or_else(|| panic!("no page has a table of {name}")) {
            DocumentedType::Words(words) => words.iter().map(|word| json!(word)).collect(),
            DocumentedType::Object(fields) => self.objects(fields, &Map::new()),
            DocumentedType::Keyed(variants) => {
                let each = variants.iter().map(|(key, kind)| match kind {
                    None => json!(key),
                    Some(kind) => json!({ key: self.value(key, kind) }),
                });
                each.collect()
            }
            DocumentedType::Tagged { tag, variants } => {
                let each = variants.iter().flat_map(|(variant, fields)| {
                    let tag = Map::from_iter([(tag.clone(), json!(variant))]);
                    self.objects(fields, &tag)
                });
                each.collect()
            }
        }
    }

    /// Returns an object, and further ones for the other variants of each of its fields.
    fn objects(&self, fields: &FieldList, head: &Map<String, Value>) -> Vec<Value> {
        let mut first = head.clone();
        let mut others = Vec::new();
        let is_wanted = |kind: &FieldKind| self.extent == Extent::All || !kind.may_be_missing;
        for (key, kind) in fields.own.iter().filter(|(_, kind)| is_wanted(kind)) {
            let mut values = self.values(key, &kind.kind).into_iter();
            first.insert(key.clone(), values.next().unwrap_or_default());
            others.extend(values.map(|value| Map::from_iter([(key.clone(), value)])));
        }
        for name in &fields.of {
            let mut inner = self
                .variants(name)
                .into_iter()
                .filter_map(|value| match value {
                    Value::Object(object) => Some(object),
                    _ => None,
                });
            first.extend(inner.next().unwrap_or_default());
            others.extend(inner);
        }
        let mut objects = vec![Value::Object(first.clone())];
        objects.extend(others.into_iter().map(|other| {
            let mut object = first.clone();
            object.extend(other);
            Value::Object(object)
        }));
        objects
    }

    /// Returns a value, and further ones for other variants of its type.
    fn values(&self, key: &str, kind: &ValueKind) -> Vec<Value> {
        match kind {
            ValueKind::OrNull(_) if self.extent == Extent::Least => vec![Value::Null],
            ValueKind::OrNull(kind) => self.values(key, kind),
            ValueKind::List(kind) => {
                let each = self.values(key, kind).into_iter();
                each.map(|value| json!([value])).collect()
            }
            ValueKind::Named(name) => self.variants(name),
            kind => vec![self.value(key, kind)],
        }
    }

    fn value(&self, key: &str, kind: &ValueKind) -> Value {
        match kind {
            ValueKind::Text => json!((self.text)(key)),
            ValueKind::Number => json!(1),
            ValueKind::Bool => json!(true),
            ValueKind::OrNull(_) if self.extent == Extent::Least => Value::Null,
            ValueKind::OrNull(kind) => self.value(key, kind),
            ValueKind::List(kind) => json!([self.value(key, kind)]),
            ValueKind::Tuple(kinds) => kinds.iter().map(|kind| self.value(key, kind)).collect(),
            ValueKind::Map(kind) => json!({ "sample": self.value(key, kind) }),
            ValueKind::Numbers(names) => {
                names.iter().map(|name| (name.clone(), json!(1))).collect()
            }
            ValueKind::Object(fields) => {
                let objects = self.objects(fields, &Map::new());
                objects.into_iter().next().unwrap_or_default()
            }
            ValueKind::Named(name) => self.variants(name).into_iter().next().unwrap_or_default(),
        }
    }
}
