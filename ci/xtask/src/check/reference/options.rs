// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Hand-written manual pages have every option of their program, and no other. The pages of the other
//! programs are made from their command lines.

use super::super::source::Source;
use super::rust;
use anyhow::{ensure, Context, Result};
use std::collections::BTreeSet;
use syn::token::Paren;
use syn::{Attribute, Expr, Item, Lit, LitStr, Token};

/// A program with such a page.
struct HandWritten {
    page: &'static str,
    source: &'static str,
    /// The structure with the command line.
    cli: &'static str,
}

const PROGRAMS: [HandWritten; 2] = [
    HandWritten {
        page: "ci/packaging/blktapctrl.8",
        source: "userspace/blktapctrl/src/main.rs",
        cli: "Cli",
    },
    HandWritten {
        page: "ci/packaging/tapdisk.8",
        source: "userspace/tapdisk/src/main.rs",
        cli: "Args",
    },
];

pub(super) fn complaints(sources: &[Source]) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for HandWritten { page, source, cli } in PROGRAMS {
        let find = |path: &str| {
            let found = sources.iter().find(|source| source.path == path);
            found.with_context(|| format!("{path} is missing"))
        };
        let declared = declared(find(source)?, cli)?;
        let listed = listed(&find(page)?.text);
        let missing = declared.difference(&listed);
        complaints.extend(missing.map(|option| format!("{page}: OPTIONS leaves out --{option}")));
        let foreign = listed.difference(&declared);
        complaints.extend(foreign.map(|option| format!("{page}: the program has no --{option}")));
    }
    Ok(complaints)
}

/// Returns the long options that the structure declares.
fn declared(source: &Source, cli: &str) -> Result<BTreeSet<String>> {
    let file = rust::parse(source)?;
    let mut options = BTreeSet::new();
    let mut failed = None;
    rust::each_item(&file.items, &mut |item| {
        let Item::Struct(item) = item else { return };
        if item.ident != cli {
            return;
        }
        for field in &item.fields {
            let name = field.ident.as_ref().map(ToString::to_string);
            match long_option(&field.attrs, &name.unwrap_or_default()) {
                Ok(option) => options.extend(option),
                Err(error) => failed = Some(error),
            }
        }
    });
    if let Some(error) = failed {
        return Err(error).with_context(|| source.path.clone());
    }
    ensure!(!options.is_empty(), "{}: {cli} has no option", source.path);
    Ok(options)
}

/// Returns the long option of a field, if it has one.
fn long_option(attrs: &[Attribute], field: &str) -> Result<Option<String>> {
    let mut option = None;
    for attr in attrs.iter().filter(|attr| attr.path().is_ident("arg")) {
        attr.parse_nested_meta(|meta| {
            let is_long = meta.path.is_ident("long");
            // Arguments of another word, such as `requires_if(…)`.
            if meta.input.peek(Paren) {
                meta.input.parse::<proc_macro2::Group>()?;
            }
            let value = match meta.input.peek(Token![=]) {
                true => Some(meta.value()?.parse::<Expr>()?),
                false => None,
            };
            if is_long {
                let name = match value {
                    Some(Expr::Lit(literal)) => match literal.lit {
                        Lit::Str(name) => Some(LitStr::value(&name)),
                        _ => None,
                    },
                    _ => None,
                };
                option = Some(name.unwrap_or_else(|| field.replace('_', "-")));
            }
            Ok(())
        })?;
    }
    Ok(option)
}

/// Returns the long options that the section OPTIONS of a page explains.
fn listed(page: &str) -> BTreeSet<String> {
    let words = super::items(page, "OPTIONS", ".It Fl ").flat_map(str::split_whitespace);
    let long = words.filter_map(|word| word.strip_prefix('-'));
    long.filter(|word| !word.is_empty())
        .map(String::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLI: &str = "#[derive(Parser)] struct PLANTED { #[arg(long)] stop_all: bool, #[arg(long, short, value_name = \"X\", default_value = a::B, requires_if(\"x\", \"y\"))] verbose: bool, #[arg(long = \"user\")] name: String, target: T }";
    const PAGE: &str = ".Sh SYNOPSIS\n.It Fl -elsewhere\n.Sh OPTIONS\n.Bl\n.It Fl -stop-all\n.It Fl v , Fl -verbose\n.It Fl -user Ar NAME\n.El\n.Sh FILES\n.It Fl -behind\n";

    fn found(page: &str) -> Result<Vec<String>> {
        let sources = PROGRAMS.iter().flat_map(|program| {
            [
                Source::of(program.source, &CLI.replace("PLANTED", program.cli)),
                Source::of(program.page, page),
            ]
        });
        complaints(&sources.collect::<Vec<_>>())
    }

    #[test]
    fn options_of_program_and_page_are_compared() {
        assert_eq!(found(PAGE).unwrap(), [""; 0]);
        let planted = PAGE.replace("-stop-all", "-planted");
        for complaint in [
            "blktapctrl.8: OPTIONS leaves out --stop-all",
            "blktapctrl.8: the program has no --planted",
            "tapdisk.8: OPTIONS leaves out --stop-all",
        ] {
            let found = found(&planted).unwrap();
            assert!(
                found.iter().any(|one| one.ends_with(complaint)),
                "{found:?}"
            );
        }
    }

    #[test]
    fn a_command_line_that_is_not_found_is_refused() {
        assert!(complaints(&[]).is_err());
        let sources = PROGRAMS
            .iter()
            .map(|program| Source::of(program.source, "struct Other;"));
        assert!(complaints(&sources.collect::<Vec<_>>()).is_err());
    }
}
