// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The metrics of `tap-ctl metrics`: name, type and description, which the source has in one place each.

use super::super::source::Source;
use super::{in_cell, rust};
use anyhow::{ensure, Result};
use std::collections::BTreeMap;
use syn::visit::{self, Visit};
use syn::{Expr, ExprTuple, Item, Lit};

/// Beginning of the paths of the sources that name metrics.
const FOLDER: &str = "userspace/tap-ctl/src/metrics";
/// Beginnings of the names of metrics.
const PREFIXES: [&str; 3] = ["xen_disk_", "xen_tap_", "xen_guest_"];

/// Returns the table of all metrics.
pub(super) fn table(sources: &[Source]) -> Result<String> {
    let mut table = String::from("| metric | type | meaning |\n|---|---|---|\n");
    for (name, (kind, meaning)) in families(sources)? {
        table.push_str(&format!("| `{name}` | {kind} | {} |\n", in_cell(&meaning)));
    }
    Ok(table)
}

/// Returns type and meaning of each metric.
fn families(sources: &[Source]) -> Result<BTreeMap<String, (String, String)>> {
    let mut found = FamilyVisitor::default();
    for source in sources {
        let is_one = source.path.starts_with(FOLDER) && source.path.ends_with(".rs");
        if is_one && !source.path.ends_with("tests.rs") {
            let file = rust::parse(source)?;
            rust::each_item(&file.items, &mut |item: &Item| found.visit_item(item));
        }
    }
    ensure!(!found.families.is_empty(), "no metric is in {FOLDER}");
    let alone: Vec<&String> = found
        .names
        .iter()
        .filter(|name| !found.families.contains_key(*name))
        .collect();
    ensure!(
        alone.is_empty(),
        "metrics without a type and a description beside their name: {alone:?}"
    );
    Ok(found.families)
}

/// Collects the tuples of name, type and description, and all names.
#[derive(Default)]
struct FamilyVisitor {
    families: BTreeMap<String, (String, String)>,
    names: Vec<String>,
}

impl<'f> Visit<'f> for FamilyVisitor {
    fn visit_expr_tuple(&mut self, tuple: &'f ExprTuple) {
        let words: Vec<String> = tuple.elems.iter().filter_map(string).collect();
        if let [name, kind, meaning] = &words[..] {
            if is_metric(name) {
                let family = (kind.clone(), meaning.clone());
                self.families.insert(name.clone(), family);
            }
        }
        visit::visit_expr_tuple(self, tuple);
    }

    fn visit_lit_str(&mut self, literal: &'f syn::LitStr) {
        let name = literal.value();
        if is_metric(&name) {
            self.names.push(name);
        }
    }
}

fn is_metric(name: &str) -> bool {
    PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

fn string(expression: &Expr) -> Option<String> {
    match expression {
        Expr::Lit(literal) => match &literal.lit {
            Lit::Str(text) => Some(text.value()),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> [Source; 2] {
        [
            Source::of("userspace/tap-ctl/src/metrics/a.rs", text),
            Source::of(
                "userspace/tap-ctl/src/metrics/tests.rs",
                "fn f() { \"xen_tap_b\"; }",
            ),
        ]
    }

    #[test]
    fn metrics_are_listed_with_type_and_meaning() {
        let text = r#"
            const A: &[F] = &[(("xen_tap_a", "counter", "One|two."), |x| x)];
            fn f() { text.family(("xen_disk_b", "gauge", "Three.")); }
        "#;
        let table = table(&source(text)).unwrap();
        assert!(table.ends_with(
            "| `xen_disk_b` | gauge | Three. |\n| `xen_tap_a` | counter | One\\|two. |\n"
        ));
    }

    #[test]
    fn a_metric_without_description_is_refused() {
        let planted =
            source(r#"fn f() { text.family("xen_tap_planted"); g(("xen_tap_a", "b", "c")); }"#);
        let error = table(&planted).unwrap_err().to_string();
        assert!(error.contains("xen_tap_planted"), "{error}");
        assert!(table(&[]).is_err());
    }
}
