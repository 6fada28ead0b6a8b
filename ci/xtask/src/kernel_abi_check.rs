// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Comparison of the prepared kernel tree with the stock kernel. There are no symbol versions, so a mismatch would show
//! as a module that does not load, or worse, as one that does.

use anyhow::{bail, Context, Result};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const REMEDY: &str =
    "the build root and the stock kernel do not belong together: remove the cache folder's build-root-* and kernel-tree-* and build again";

/// Facts that the gates compare, as text.
#[derive(Debug, Default)]
struct Facts {
    stock_config: String,
    tree_config: String,
    rustc: String,
    bindgen: String,
    symvers: String,
    tree_symbols: String,
}

/// Compares the tree at `tree` with the stock kernel of the build root; an error is one sentence.
pub(crate) fn check(build_root: &Path, tree: &Path, release: &str) -> Result<()> {
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let headers = build_root.join(format!("usr/src/linux-headers-{release}"));
    compare(&Facts {
        stock_config: read(&headers.join(".config"))?,
        tree_config: read(&tree.join("build/.config"))?,
        rustc: read(&tree.join("rustc-version"))?,
        bindgen: read(&tree.join("bindgen-version"))?,
        symvers: read(&headers.join("Module.symvers"))?,
        tree_symbols: read(&tree.join("rust-symbols"))?,
    })
}

fn compare(facts: &Facts) -> Result<()> {
    for (what, key, have) in [
        ("rustc", "CONFIG_RUSTC_VERSION_TEXT", facts.rustc.trim()),
        (
            "bindgen",
            "CONFIG_BINDGEN_VERSION_TEXT",
            facts.bindgen.trim(),
        ),
    ] {
        let want = setting(&facts.stock_config, key).with_context(|| {
            format!("the stock kernel has no {key}, so it was built without Rust: {REMEDY}")
        })?;
        if want != have {
            bail!("{what} of the build root is \"{have}\" but the kernel was built with \"{want}\": {REMEDY}");
        }
    }
    if facts.stock_config != facts.tree_config {
        bail!("the prepared tree's .config differs from the stock kernel's: {REMEDY}");
    }
    let missing = missing_symbols(&facts.symvers, &facts.tree_symbols);
    if let Some(first) = missing.first() {
        bail!(
            "{} of the Rust symbols that the stock kernel exports are not in the prepared tree, for example {first}: {REMEDY}",
            missing.len()
        );
    }
    Ok(())
}

/// Returns the value of a string setting in a kernel configuration.
fn setting<'a>(config: &'a str, key: &str) -> Option<&'a str> {
    config.lines().find_map(|line| {
        line.strip_prefix(key)?
            .strip_prefix("=\"")?
            .strip_suffix('"')
    })
}

/// Returns the mangled Rust symbols of vmlinux in a Module.symvers that `nm`'s output does not define.
fn missing_symbols<'a>(symvers: &'a str, nm: &str) -> Vec<&'a str> {
    let have: BTreeSet<&str> = nm
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .collect();
    symvers
        .lines()
        .filter_map(|line| {
            let mut columns = line.split_whitespace().skip(1);
            let symbol = columns.next()?;
            (symbol.starts_with("_R") && columns.next()? == "vmlinux").then_some(symbol)
        })
        .filter(|symbol| !have.contains(symbol))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        let config = "CONFIG_RUSTC_VERSION_TEXT=\"rustc 1 (x)\"\nCONFIG_BINDGEN_VERSION_TEXT=\"bindgen 2\"\n";
        Facts {
            stock_config: config.into(),
            tree_config: config.into(),
            rustc: "rustc 1 (x)\n".into(),
            bindgen: "bindgen 2\n".into(),
            symvers:
                "0x0\t_RNvA\tvmlinux\tEXPORT_SYMBOL_GPL\t\n0x0\tprintk\tvmlinux\tEXPORT_SYMBOL\t\n"
                    .into(),
            tree_symbols: "rust/core.o:\n0000 T _RNvA\n".into(),
        }
    }

    fn complaint(change: impl FnOnce(&mut Facts)) -> String {
        let mut facts = good();
        change(&mut facts);
        compare(&facts).unwrap_err().to_string()
    }

    #[test]
    fn matching_tree_passes() {
        compare(&good()).unwrap();
    }

    #[test]
    fn each_mismatch_is_named() {
        assert!(complaint(|f| f.rustc = "rustc 1 (y)".into()).contains("rustc of the build root"));
        assert!(complaint(|f| f.bindgen = "bindgen 3".into()).contains("bindgen of the build root"));
        assert!(complaint(|f| f.tree_config.push_str("CONFIG_X=y\n")).contains(".config differs"));
        assert!(complaint(|f| f.tree_symbols.clear()).contains("_RNvA"));
        let no_rust = |f: &mut Facts| f.stock_config = String::new();
        assert!(complaint(no_rust).contains("without Rust"));
    }
}
