// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Output of programs beside the pages.

use crate::kind::{FieldKind, FieldList, ValueKind};
use crate::{DocumentedType, JsonPages, FAILURE, JSON_VERSION};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// Complaints about a value: where it is, and what is wrong.
type Complaints = Vec<String>;

impl JsonPages {
    /// Returns what is not as the pages say in the output of a command, such as `tap-ctl list`, with `--json`.
    #[must_use]
    pub fn complaints(&self, command: &str, output: &str) -> Vec<String> {
        let mut complaints = Complaints::new();
        let lines = output.lines().filter(|line| !line.is_empty());
        for line in lines {
            match serde_json::from_str(line) {
                Ok(Value::Array(each)) => {
                    for value in each {
                        self.at_top(command, value, &mut complaints);
                    }
                }
                Ok(value) => self.at_top(command, value, &mut complaints),
                Err(error) => complaints.push(format!("no JSON ({error}): {line}")),
            }
        }
        complaints
    }

    /// Checks the output of a command line of a program if it has `--json`. A program that was killed prints nothing.
    ///
    /// # Panics
    /// The output is not as the pages say.
    pub fn check_line(program: &str, line: &str, output: &str) {
        if !line.split(' ').any(|word| word == "--json") || output.trim().is_empty() {
            return;
        }
        static PAGES: OnceLock<JsonPages> = OnceLock::new();
        let pages = PAGES.get_or_init(JsonPages::of_checkout);
        let command = pages.command(program, line);
        pages.assert_documented(&command, output);
    }

    /// Returns the command of a line: the program and its verb, with a second word if the pages have it so.
    pub(crate) fn command(&self, program: &str, line: &str) -> String {
        let words: Vec<&str> = line.split(' ').collect();
        let mut plain = words.iter().filter(|word| !word.starts_with('-'));
        let verb = format!("{program} {}", plain.next().unwrap_or(&""));
        let longer = words.iter().map(|word| format!("{verb} {word}"));
        let mut longer = longer.filter(|command| self.commands.contains_key(command));
        longer.next().unwrap_or(verb)
    }

    /// Checks the output of a command that prints at least one object.
    ///
    /// # Panics
    /// The output is not as the pages say.
    pub fn assert_documented(&self, command: &str, output: &str) {
        let complaints = self.complaints(command, output);
        assert!(
            complaints.is_empty() && !output.trim().is_empty(),
            "{command} --json is not as docs/reference says:\n{}\n{output}",
            complaints.join("\n")
        );
    }

    fn at_top(&self, command: &str, value: Value, complaints: &mut Complaints) {
        let Value::Object(mut object) = value else {
            complaints.push(format!("{value} is at the top and no object"));
            return;
        };
        match object.remove("json_version") {
            Some(version) if version == JSON_VERSION => {}
            found => complaints.push(format!("json_version is {found:?}, not {JSON_VERSION}")),
        }
        if let Some(failure) = object.get("error").filter(|_| object.len() == 1) {
            self.check_named(FAILURE, failure, "error", complaints);
            return;
        }
        let Some(types) = self.types_of(command) else {
            complaints.push(format!("no page says what {command} prints"));
            return;
        };
        let value = Value::Object(object);
        let each = types.iter().map(|name| {
            let mut found = Complaints::new();
            self.check_named(name, &value, "", &mut found);
            found
        });
        complaints.extend(each.min_by_key(Vec::len).unwrap_or_default());
    }

    fn check_named(&self, name: &str, value: &Value, at: &str, complaints: &mut Complaints) {
        match self.types.get(name) {
            None => complaints.push(format!("{at}: no page has a table of {name}")),
            Some(DocumentedType::Words(words)) => {
                if !value.as_str().is_some_and(|word| words.contains(word)) {
                    complaints.push(format!("{at}: {value} is no word of {name}"));
                }
            }
            Some(DocumentedType::Keyed(variants)) => {
                self.check_keyed(name, variants, value, at, complaints);
            }
            Some(DocumentedType::Object(fields)) => {
                self.check_fields(fields, value, at, complaints);
            }
            Some(DocumentedType::Tagged { .. }) => {
                let fields = FieldList {
                    of: vec![name.into()],
                    ..FieldList::default()
                };
                self.check_fields(&fields, value, at, complaints);
            }
        }
    }

    fn check_keyed(
        &self,
        name: &str,
        variants: &BTreeMap<String, Option<ValueKind>>,
        value: &Value,
        at: &str,
        complaints: &mut Complaints,
    ) {
        let (key, content) = match value {
            Value::String(word) => (word.as_str(), None),
            Value::Object(object) if object.len() == 1 => {
                let (key, content) = object.iter().next().expect("one");
                (key.as_str(), Some(content))
            }
            _ => {
                complaints.push(format!("{at}: {value} is no {name}"));
                return;
            }
        };
        match (variants.get(key), content) {
            (Some(None), None) => {}
            (Some(Some(kind)), Some(content)) => {
                self.check_kind(kind, content, &inside(at, key), complaints);
            }
            _ => complaints.push(format!("{at}: {value} is no variant of {name}")),
        }
    }

    /// Compares an object with the fields that it must have.
    fn check_fields(
        &self,
        fields: &FieldList,
        value: &Value,
        at: &str,
        complaints: &mut Complaints,
    ) {
        let Value::Object(object) = value else {
            complaints.push(format!("{at}: {value} is no object"));
            return;
        };
        let mut known = BTreeMap::new();
        self.collect(fields, object, at, &mut known, complaints);
        for (key, kind) in &known {
            match object.get(key) {
                Some(value) => self.check_kind(&kind.kind, value, &inside(at, key), complaints),
                None if kind.may_be_missing => {}
                None => complaints.push(format!("{}: the key is missing", inside(at, key))),
            }
        }
        let unknown = object.keys().filter(|key| !known.contains_key(*key));
        complaints.extend(unknown.map(|key| format!("{}: no page has the key", inside(at, key))));
    }

    /// Collects fields, with those of the types that are among them.
    fn collect(
        &self,
        fields: &FieldList,
        object: &Map<String, Value>,
        at: &str,
        known: &mut BTreeMap<String, FieldKind>,
        complaints: &mut Complaints,
    ) {
        known.extend(fields.own.clone());
        for name in &fields.of {
            match self.types.get(name) {
                Some(DocumentedType::Object(inner)) => {
                    self.collect(inner, object, at, known, complaints);
                }
                Some(DocumentedType::Tagged { tag, variants }) => {
                    let kind = FieldKind {
                        kind: ValueKind::Text,
                        may_be_missing: false,
                    };
                    known.insert(tag.clone(), kind);
                    let variant = object.get(tag).and_then(Value::as_str);
                    match variant.and_then(|variant| variants.get(variant)) {
                        Some(inner) => self.collect(inner, object, at, known, complaints),
                        None => complaints.push(format!(
                            "{}: {variant:?} is no variant of {name}",
                            inside(at, tag)
                        )),
                    }
                }
                _ => complaints.push(format!("{at}: {name} has no fields")),
            }
        }
    }

    fn check_kind(&self, kind: &ValueKind, value: &Value, at: &str, complaints: &mut Complaints) {
        let fits = match (kind, value) {
            (ValueKind::OrNull(_), Value::Null)
            | (ValueKind::Text, Value::String(_))
            | (ValueKind::Number, Value::Number(_))
            | (ValueKind::Bool, Value::Bool(_)) => true,
            (ValueKind::OrNull(inner), value) => {
                return self.check_kind(inner, value, at, complaints);
            }
            (ValueKind::List(inner), Value::Array(values)) => {
                for (number, value) in values.iter().enumerate() {
                    self.check_kind(inner, value, &format!("{at}[{number}]"), complaints);
                }
                true
            }
            (ValueKind::Tuple(kinds), Value::Array(values)) if kinds.len() == values.len() => {
                for (kind, value) in kinds.iter().zip(values) {
                    self.check_kind(kind, value, at, complaints);
                }
                true
            }
            (ValueKind::Map(inner), Value::Object(object)) => {
                for (key, value) in object {
                    self.check_kind(inner, value, &inside(at, key), complaints);
                }
                true
            }
            (ValueKind::Numbers(names), Value::Object(object)) => {
                let is_number = |name: &String| object.get(name).is_some_and(Value::is_number);
                object.len() == names.len() && names.iter().all(is_number)
            }
            (ValueKind::Object(fields), value) => {
                return self.check_fields(fields, value, at, complaints);
            }
            (ValueKind::Named(name), value) => {
                return self.check_named(name, value, at, complaints);
            }
            _ => false,
        };
        if !fits {
            complaints.push(format!("{at}: {value} is not of the kind {kind}"));
        }
    }
}

/// Returns the path of a key.
fn inside(at: &str, key: &str) -> String {
    match at {
        "" => key.into(),
        at => format!("{at}.{key}"),
    }
}
