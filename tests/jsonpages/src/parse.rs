// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Pages become types.

use crate::kind::{linked, FieldKind, FieldList, ValueKind};
use crate::{DocumentedType, JsonPages};
use std::collections::BTreeMap;

impl JsonPages {
    /// Reads pages: their names and texts.
    pub(crate) fn of(pages: &[(&str, &str)]) -> Result<JsonPages, String> {
        let mut all = JsonPages::default();
        for (page, text) in pages {
            all.read(page, text)
                .map_err(|error| format!("{page}: {error}"))?;
        }
        Ok(all)
    }

    fn read(&mut self, page: &str, text: &str) -> Result<(), String> {
        // The first line may be a heading, too.
        let text = format!("\n{text}");
        let mut parts = text.split("\n### `");
        let head = parts.next().unwrap_or_default();
        for (command, kind) in head.lines().filter_map(|line| printed(line, page)) {
            self.commands.entry(command).or_default().insert(kind);
        }
        for part in parts {
            let (heading, body) = part.split_once("`\n").ok_or("a heading without an end")?;
            let described =
                documented(body, page).map_err(|error| format!("{heading}: {error}"))?;
            self.types.insert(format!("{page}#{heading}"), described);
        }
        Ok(())
    }
}

/// Returns the command of a line that says which type a command prints, without its placeholders, and the type.
fn printed(line: &str, page: &str) -> Option<(String, String)> {
    let (commands, kind) = line.strip_suffix('.')?.split_once(" prints ")?;
    let words = commands.split('`').nth(1)?.split(' ');
    let is_placeholder = |word: &str| word.chars().all(|c| c.is_ascii_uppercase());
    let words: Vec<&str> = words.filter(|word| !is_placeholder(word)).collect();
    Some((words.join(" "), linked(kind, page)?))
}

fn documented(body: &str, page: &str) -> Result<DocumentedType, String> {
    let mut rows = body
        .lines()
        .skip_while(|line| !line.starts_with("| "))
        .take_while(|line| line.starts_with('|'))
        .filter(|line| !line.starts_with("|---"))
        .map(cells);
    let head = rows.next().ok_or("there is no table")?;
    let rows: Vec<Vec<String>> = rows.collect();
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    match head[..] {
        ["field", "type", "meaning"] => object(&rows, page),
        ["text", "meaning"] => {
            let words = rows.iter().map(|row| name(&row[0]));
            Ok(DocumentedType::Words(words.collect::<Result<_, _>>()?))
        }
        ["key", "meaning", "value"] => keyed(&rows, page),
        [tag, "meaning", "further fields"] => {
            let variants = rows.iter().map(|row| {
                let content = row.get(2).ok_or("a short row")?;
                Ok((name(&row[0])?, in_cell(content, page)?))
            });
            Ok(DocumentedType::Tagged {
                tag: name(tag)?,
                variants: variants.collect::<Result<_, String>>()?,
            })
        }
        _ => Err(format!("a table with other columns: {head:?}")),
    }
}

/// Returns the cells of a row. A bar within one has a backslash.
fn cells(line: &str) -> Vec<String> {
    let row = line.trim().trim_start_matches('|');
    let row = row.strip_suffix('|').unwrap_or(row).replace("\\|", "\0");
    row.split('|')
        .map(|cell| cell.replace('\0', "|").trim().into())
        .collect()
}

/// Returns the name between backticks that a cell is.
fn name(cell: &str) -> Result<String, String> {
    let inner = cell
        .strip_prefix('`')
        .and_then(|cell| cell.strip_suffix('`'));
    let inner = inner.filter(|name| !name.contains('`'));
    inner
        .map(String::from)
        .ok_or_else(|| format!("no name: {cell}"))
}

fn object(rows: &[Vec<String>], page: &str) -> Result<DocumentedType, String> {
    let mut fields = FieldList::default();
    for row in rows {
        match row[0].strip_prefix("those of ") {
            Some(link) => {
                let kind = linked(link, page).ok_or_else(|| format!("no link: {link}"))?;
                fields.of.push(kind);
            }
            None => {
                let kind = row.get(1).ok_or("a short row")?;
                fields
                    .own
                    .insert(name(&row[0])?, FieldKind::parse(kind, page)?);
            }
        }
    }
    Ok(DocumentedType::Object(fields))
}

fn keyed(rows: &[Vec<String>], page: &str) -> Result<DocumentedType, String> {
    let mut variants = BTreeMap::new();
    for row in rows {
        let content = row.get(2).ok_or("a short row")?;
        let content = match content.as_str() {
            "" => None,
            text if text.starts_with('`') => Some(ValueKind::Object(in_cell(text, page)?)),
            text => {
                let text = text.strip_prefix("those of ").unwrap_or(text);
                Some(ValueKind::parse(text, page)?)
            }
        };
        variants.insert(name(&row[0])?, content);
    }
    Ok(DocumentedType::Keyed(variants))
}

/// Reads the fields of a variant, which are in one cell: `` `name`: Meaning (kind); `name`: Meaning (kind) ``.
fn in_cell(cell: &str, page: &str) -> Result<FieldList, String> {
    let mut fields = FieldList::default();
    if cell.is_empty() {
        return Ok(fields);
    }
    if let Some(link) = cell.strip_prefix("those of ") {
        let kind = linked(link, page).ok_or_else(|| format!("no link: {link}"))?;
        fields.of.push(kind);
        return Ok(fields);
    }
    for part in cell.split("); `") {
        let part = part.trim_start_matches('`');
        let part = part.strip_suffix(')').unwrap_or(part);
        let (name, text) = part
            .split_once("`: ")
            .ok_or_else(|| format!("no field: {part}"))?;
        fields
            .own
            .insert(name.into(), last_parenthesis(text, page)?);
    }
    Ok(fields)
}

/// Returns the kind in the last parenthesis of a text that has lost the one that closes it.
fn last_parenthesis(text: &str, page: &str) -> Result<FieldKind, String> {
    let mut error = format!("no kind: {text}");
    for (at, _) in text.rmatch_indices(" (") {
        let inner = &text[at + 2..];
        // The parenthesis of a link, before the one that closed the kind.
        for end in ["", ")"] {
            match FieldKind::parse(&format!("{inner}{end}"), page) {
                Ok(kind) => return Ok(kind),
                Err(other) => error = other,
            }
        }
    }
    Err(error)
}
