// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Keys and kinds of earlier versions are still on the pages.

use jsonpages::{merged_baseline, of_checkout, JsonPages};
use std::fs;

const BASELINE: &str = "tests/jsonpages/baseline.txt";
const RECORD: &str = "XENTAP_RECORD";

#[test]
fn no_key_goes_away_or_changes_its_kind() {
    let file = of_checkout(BASELINE);
    let baseline = fs::read_to_string(&file).expect("the baseline");
    let difference = JsonPages::of_checkout().difference(&baseline);
    assert!(
        difference.gone.is_empty(),
        "readers of the JSON rely on these, which docs/reference has no more:\n{}\n\
         Put them back, and add a new key beside an old one. A reader that cannot go on without a change needs a new \
         `json_version` (userspace/control/src/shown.rs). If only a type has another name or page, write that into \
         {BASELINE} by hand.",
        difference.gone.join("\n")
    );
    if std::env::var_os(RECORD).is_some() {
        let merged = merged_baseline(&baseline, &difference.added);
        fs::write(&file, merged).expect("written");
        return;
    }
    assert!(
        difference.added.is_empty(),
        "new keys, which `{RECORD}=1 cargo test -p jsonpages` adds to {BASELINE}:\n{}",
        difference.added.join("\n")
    );
}
